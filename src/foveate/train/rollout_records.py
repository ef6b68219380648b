"""The answers of a step: their metrics for the curves, and the answers themselves for reading."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from foveate.data.answers import ScoredAnswer, ScoredRow, prompt_fields, score_fields, write_answers
from foveate.evaluate.turns import kept_turns, place_to_look, turn_metrics
from foveate.files import with_room
from foveate.records import Group

_SHOWN = 4
"""Prompts of a step with the images that their answers have observed."""


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the answers of a step: reward and its parts, over those that were graded (one at least); length, in
    sampled tokens; how many were truncated or not graded; of answers with environments their turns and calls; with
    several sources of tasks also the reward, length and number of answers of each."""
    every = [score for group in groups for score in group.scores]
    scores = [score for score in every if score.value is not None]
    answers = [answer for group in groups for answer in group.answers]
    values = torch.tensor(_rewards(groups), dtype=torch.float64)
    lengths = torch.tensor([answer.trained_tokens for answer in answers], dtype=torch.float64)
    names = sorted({name for score in scores for name in score.parts})
    parts = {f"reward/{name}": _mean([score.parts[name] for score in scores if name in score.parts]) for name in names}
    return {
        "reward/mean": values.mean().item(),
        "reward/std": values.std(correction=0).item(),
        **parts,
        "reward/failed": float(len(every) - len(scores)),
        "answer/length": lengths.mean().item(),
        "answer/length_max": lengths.max().item(),
        "rollout/tokens": lengths.sum().item(),
        "rollout/groups": float(len(groups)),
        "answer/truncated": _mean([float(answer.finish == "length") for answer in answers]),
        "answer/timed_out": _mean([float(answer.finish == "abort") for answer in answers]),
        **turn_metrics(
            [turns for group in groups for turns in group.turns],
            [place_to_look(group.task) for group in groups for _ in group.turns],
        ),
        **_by_source(groups),
    }


def _by_source(groups: Sequence[Group]) -> dict[str, float]:
    sources = sorted({group.task.source for group in groups})
    metrics: dict[str, float] = {}
    for source in sources if len(sources) > 1 else ():
        members = [group for group in groups if group.task.source == source]
        lengths = [float(answer.trained_tokens) for group in members for answer in group.answers]
        if rewards := _rewards(members):
            metrics[f"source/{source}/reward"] = _mean(rewards)
        metrics[f"source/{source}/length"] = _mean(lengths)
        metrics[f"source/{source}/answers"] = float(len(lengths))
    return metrics


def _rewards(groups: Sequence[Group]) -> list[float]:
    """The rewards of the graded answers."""
    return [score.value for group in groups for score in group.scores if score.value is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write_rollouts(
    folder: Path, step: int, groups: Sequence[Group], advantages: Sequence[Sequence[float | None]] | None = None
) -> None:
    """`step_000001.jsonl` in the folder: a `ScoredRow` per prompt. `advantages`: of the answers of each group, None for
    one that was not trained on. What the first answers have observed is kept in the run's folder, made small."""
    rows = []
    for number, group in enumerate(groups):
        own = [None] * len(group.answers) if advantages is None else advantages[number]
        every = group.turns or [()] * len(group.answers)
        kept = folder.parent if number < _SHOWN else None
        answers = tuple(
            ScoredAnswer(
                answer.text,
                answer.finish,
                answer.trained_tokens,
                turns=kept_turns(turns, kept),
                **score_fields(score),
                version=answer.version,
                versions=answer.versions,
                advantage=advantage,
            )
            for answer, score, advantage, turns in zip(group.answers, group.scores, own, every, strict=True)
        )
        rows.append(ScoredRow(**prompt_fields(group.task), answers=answers))
    with_room(partial(write_answers, folder / f"step_{step:06d}.jsonl", rows))
