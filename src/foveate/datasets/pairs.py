"""Prepare from what is prepared: preference pairs from answers with scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.answers import RIGHT, CorrectnessRule, ScoredAnswer, answers_by_id
from foveate.data.demos import CHOSEN, REJECTED
from foveate.data.table import TaskTable
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.prepared import (
    Prepared,
    infer_schema,
    publish,
    rollout_hashes,
    rows_by_id,
    shown_counts,
    task_row,
)
from foveate.errors import require

PAIRED = "prompts with a right and a wrong answer"
ALL_RIGHT, ALL_WRONG = "all answers right", "all answers wrong"
ALL_TRUNCATED, UNANSWERED = "all right answers truncated", "without answers"


def prepare_pairs(
    sources: Sequence[Path],
    out: Path,
    *,
    rollouts: Sequence[Path],
    max_per_prompt: int = 15,
    correctness_rule: CorrectnessRule = RIGHT,
    seed: int = 0,
    reading: ReadOptions = AS_IS,
) -> Prepared:
    """Preference pairs as pairs.parquet with a manifest: for each row a right answer and a wrong one, at most
    `max_per_prompt` of all such pairs, drawn at random by `seed` and the row (MMPR's correctness pairs take 15).

    Equal texts count once; a right answer that was truncated is not chosen. The rows have extra_info.chosen and
    extra_info.rejected. Raises DataError for bad rows, ids that are not unique, and if there is no pair.
    """
    require(max_per_prompt >= 1, f"setting max_per_prompt: must be at least 1, not {max_per_prompt}")
    table, found = reading(sources)
    answers = answers_by_id(rollouts)
    drawn: dict[int, list[tuple[str, str]]] = {}
    counts: dict[str, int] = dict.fromkeys(("prompts", PAIRED, ALL_RIGHT, ALL_WRONG, ALL_TRUNCATED, UNANSWERED), 0)
    for task_id, index in rows_by_id(table).items():
        rng = np.random.default_rng((seed, index))
        given = answers.get(task_id, [])
        pairs = _draw_pairs(given, correctness_rule, max_per_prompt, rng)
        if pairs:
            drawn[index] = pairs
        counts["prompts"] += 1
        counts[_outcome(given, correctness_rule, bool(pairs))] += 1
    require(bool(drawn), f"{table.names}: {_no_pairs(counts)} ({shown_counts(counts)})")
    schema = infer_schema(_pair_rows(table, drawn, images=False))
    return publish(
        out,
        {"pairs": _pair_rows(table, drawn)},
        schema,
        total=sum(map(len, drawn.values())),
        sources=table.files,
        settings={
            "max_per_prompt": max_per_prompt,
            "right": asdict(correctness_rule),
            "seed": seed,
            "rollouts": rollout_hashes(rollouts),
            **({"columns": dict(reading.columns)} if reading.columns else {}),
        },
        problems=found.problems,
        counts=counts,
        notes=found.lines(),
    )


def _outcome(answers: Sequence[ScoredAnswer], correctness_rule: CorrectnessRule, paired: bool) -> str:
    """The count that a prompt belongs to."""
    if not answers:
        return UNANSWERED
    if paired:
        return PAIRED
    right = [answer for answer in answers if correctness_rule(answer)]
    if not right:
        return ALL_WRONG
    return ALL_TRUNCATED if not any(answer.finish == "stop" for answer in right) else ALL_RIGHT


def _no_pairs(counts: Mapping[str, int]) -> str:
    """The reason why there are no pairs, and what to change."""
    advice = {
        ALL_RIGHT: "nearly all are right; take harder prompts, more answers for each, or a higher threshold",
        ALL_WRONG: "nearly all are wrong; take a better start, more answers for each, or a lower threshold",
        ALL_TRUNCATED: "right answers reached the token limit and are not chosen; raise rollout.max_tokens",
        UNANSWERED: "the answers belong to other rows; give the rollouts of these files",
    }
    answered = [name for name in (ALL_RIGHT, ALL_WRONG, ALL_TRUNCATED) if counts[name]]
    most = max(answered, key=lambda name: counts[name], default=UNANSWERED)
    return f"no row has both a right and a wrong answer: {advice[most]}"


def _draw_pairs(
    answers: Sequence[ScoredAnswer], correctness_rule: CorrectnessRule, most: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    right = list(
        dict.fromkeys(answer.text for answer in answers if correctness_rule(answer) and answer.finish == "stop")
    )
    wrong = list(
        dict.fromkeys(answer.text for answer in answers if not correctness_rule(answer) and answer.text not in right)
    )
    wrong = [text for text in wrong if text.strip()]
    chosen = rng.permutation(len(right) * len(wrong))[:most]
    return [(right[number // len(wrong)], wrong[number % len(wrong)]) for number in sorted(chosen.tolist())]


def _pair_rows(
    table: TaskTable, drawn: Mapping[int, Sequence[tuple[str, str]]], images: bool = True
) -> Iterator[dict[str, Any]]:
    for task, pairs in zip(table.select(list(drawn)), drawn.values(), strict=True):
        for number, (chosen, rejected) in enumerate(pairs):
            numbered = replace(task, id=f"{task.id}-{number}")
            yield task_row(numbered, images=images, **{CHOSEN: chosen, REJECTED: rejected, "prompt_id": task.id})
