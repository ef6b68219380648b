"""The answers of a step: their metrics for the curves, and the answers themselves for reading."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import repeat
from pathlib import Path

import torch

from foveate.data.answers import ScoredAnswer, ScoredRow, prompt_fields, score_fields, write_answers
from foveate.files import with_room
from foveate.records import FAILED, Group, Score
from foveate.train.targets import TrainGroup


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the answers of a step: reward, its parts, length, how many were truncated or not graded; with
    several sources of tasks also the reward, length and number of answers of each."""
    scores: list[Score] = [score for group in groups for score in group.scores]
    answers = [answer for group in groups for answer in group.answers]
    values = torch.tensor([score.value for score in scores], dtype=torch.float64)
    lengths = torch.tensor([len(answer.token_ids) for answer in answers], dtype=torch.float64)
    names = sorted({name for score in scores for name in score.parts})
    parts = {f"reward/{name}": _mean([score.parts[name] for score in scores if name in score.parts]) for name in names}
    return {
        "reward/mean": values.mean().item(),
        "reward/std": values.std(correction=0).item(),
        **parts,
        "reward/failed": float(sum(score.note.startswith(FAILED) for score in scores)),
        "answer/length": lengths.mean().item(),
        "answer/length_max": lengths.max().item(),
        "rollout/tokens": lengths.sum().item(),
        "rollout/groups": float(len(groups)),
        "answer/truncated": _mean([float(answer.finish == "length") for answer in answers]),
        "answer/timed_out": _mean([float(answer.finish == "abort") for answer in answers]),
        **_by_source(groups),
    }


def _by_source(groups: Sequence[Group]) -> dict[str, float]:
    sources = sorted({group.task.source for group in groups})
    metrics: dict[str, float] = {}
    for source in sources if len(sources) > 1 else ():
        members = [group for group in groups if group.task.source == source]
        lengths = [float(len(answer.token_ids)) for group in members for answer in group.answers]
        metrics[f"source/{source}/reward"] = _mean([score.value for group in members for score in group.scores])
        metrics[f"source/{source}/length"] = _mean(lengths)
        metrics[f"source/{source}/answers"] = float(len(lengths))
    return metrics


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _advantages(examples: Sequence[TrainGroup]) -> list[float]:
    """The advantage of each answer, the mean of those of its tokens."""
    means: list[float] = []
    for example in examples:
        assert example.advantage is not None
        lengths = [len(answer) for answer in example.packed.answers]
        means.extend(part.double().mean().item() for part in example.advantage.split(lengths))
    return means


def write_rollouts(
    folder: Path,
    step: int,
    groups: Sequence[Group],
    examples: Sequence[TrainGroup] | None = None,
    patience: float = 0.0,
) -> None:
    """`step_000001.jsonl` in the folder: a `ScoredRow` per prompt.
    `patience`: seconds that it waits for room on a full disk."""
    advantages = repeat(None) if examples is None else iter(_advantages(examples))
    rows = []
    for group in groups:
        answers = tuple(
            ScoredAnswer(
                answer.text,
                answer.finish,
                len(answer.token_ids),
                **score_fields(score),
                version=answer.version,
                versions=answer.sampled_by,
                advantage=next(advantages),
            )
            for answer, score in zip(group.answers, group.scores, strict=True)
        )
        rows.append(ScoredRow(**prompt_fields(group.task), answers=answers))
    with_room(partial(write_answers, folder / f"step_{step:06d}.jsonl", rows), patience)
