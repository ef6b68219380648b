"""Held-out tasks -> predictions: greedy answers, sampled answers, and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from foveate.data.table import TaskTable
from foveate.encoding.encode import Encoder
from foveate.evaluate.answers import GeneratedAnswer
from foveate.evaluate.predictions import Box, Prediction, SampledAnswer
from foveate.records import Answer, SamplingParams, Score, Task
from foveate.rewards.boxes import BOX_FRAME, in_thousandths, parse_box, truth_box
from foveate.rewards.pool import Graders
from foveate.rollout.engine import Answering, Request
from foveate.rollout.seeds import seed_of

TAGS = ("relation", "kind", "dataset")
"""Fields of a task's meta by whose values accuracy is broken down."""
BATCH = 64
SIZES = ((0.01, "under 1 %"), (0.05, "1 to 5 %"), (0.2, "5 to 20 %"), (math.inf, "over 20 %"))
"""Shares of the picture below which the true box lies."""
WORDS = ((2, "1 to 2"), (5, "3 to 5"), (9, "6 to 9"), (math.inf, "10 or more"))
"""Lengths up to which an expression goes."""
Scored = tuple[GeneratedAnswer, Score]
BoxReader = Callable[[str, Task], Box | None]
"""From an answer to its box in thousandths."""


def predict(
    engine: Answering,
    tasks: TaskTable,
    encoder: Encoder,
    graders: Graders,
    *,
    samples: int,
    max_tokens: int,
    seed: int,
    detailed: int = 0,
    read_box: BoxReader | None = None,
    advance: Callable[[int], None],
) -> list[Prediction]:
    """One prediction per task: the greedy answer, and `samples` answers drawn at temperature 1. The draws depend on
    `seed` and the index of the task alone, so that two models are asked with the same luck. The first `detailed` rows
    keep the log-probs of their tokens, which the report shows."""
    predictions: list[Prediction] = []
    for begin in range(0, len(tasks), BATCH):
        some = [encoder.with_box_frame(tasks[i]) for i in range(begin, min(begin + BATCH, len(tasks)))]
        requests = [Request(encoder(task), seed_of("eval", seed, begin + i)) for i, task in enumerate(some)]
        greedy = engine.generate(requests, SamplingParams(1, max_tokens, temperature=0.0))
        drawn: list[tuple[Answer, ...]] = [()] * len(some)
        if samples:
            drawn = engine.generate(requests, SamplingParams(samples, max_tokens, temperature=1.0))
        answers = [(*best, *others) for best, others in zip(greedy, drawn, strict=True)]
        asked = [(one, task) for task, own in zip(some, answers, strict=True) for one in own]
        scores = iter(graders.grade_many(asked))
        for task, own in zip(some, answers, strict=True):
            detailed_row = len(predictions) < detailed
            first, *others = ((_answer(one, encoder, detailed_row and one is own[0]), next(scores)) for one in own)
            predictions.append(prediction(task, first, others, read_box=read_box))
        advance(len(some))
    return predictions


def _answer(answer: Answer, encoder: Encoder, detailed: bool) -> GeneratedAnswer:
    ids = answer.token_ids
    pieces = tuple(zip(encoder.pieces(ids), answer.logprobs.tolist(), strict=True)) if detailed else ()
    return GeneratedAnswer(answer.text, len(ids), answer.finish, pieces)


def model_box(text: str, task: Task) -> Box | None:
    """The last box of an answer, from the frame of the model's family where the task says it."""
    box = parse_box(text)
    return in_thousandths(box, task) if box is not None and BOX_FRAME in task.meta else box


def prediction(
    task: Task,
    first: Scored,
    drawn: Sequence[Scored],
    *,
    way: str = "greedy",
    ranks: Sequence[float] | None = None,
    read_box: BoxReader | None = None,
) -> Prediction:
    """The answers to one task with their scores. `ranks`, one per drawn answer, are what best-of-N goes by; without
    them it is the mean log-prob where it is known."""
    answer, score = first
    has_box = "iou" in score.parts
    image = task.images[0] if task.images else None
    tags = {tag: str(task.meta[tag]) for tag in TAGS if task.meta.get(tag)}
    question = _question(task)
    return Prediction(
        id=task.id,
        source=task.source,
        question=question,
        answer=list(truth_box(task)) if has_box else _plain(task.answer),
        width=image.width if image else 0,
        height=image.height if image else 0,
        text=answer.text,
        box=(read_box or model_box)(answer.text, task) if has_box else None,
        score=score.value,
        iou=score.parts.get("iou"),
        hit=_hit(score),
        tags={**tags, **_box_tags(truth_box(task), question)} if has_box else tags,
        sampled=tuple(_sampled(*one, ranks[i] if ranks else None) for i, one in enumerate(drawn)),
        way=way,
        pieces=tuple((text, round(logprob, 4)) for text, logprob in answer.pieces),
    )


def _sampled(answer: GeneratedAnswer, score: Score, rank: float | None) -> SampledAnswer:
    if rank is None and answer.pieces:
        rank = sum(logprob for _, logprob in answer.pieces) / len(answer.pieces)
    return SampledAnswer(answer.text, score.value, score.parts.get("iou"), _hit(score), rank)


def _box_tags(box: Box, expression: str) -> dict[str, str]:
    """How large the true box is in the picture, and how long the expression."""
    share = (box[2] - box[0]) * (box[3] - box[1]) / 1e6
    words = len(expression.replace("<image>", "").split())
    return {
        "box size": next(name for limit, name in SIZES if share < limit),
        "words": next(name for limit, name in WORDS if words <= limit),
    }


def _hit(score: Score) -> bool | None:
    return bool(score.parts["hit"]) if "hit" in score.parts else None


def _question(task: Task) -> str:
    asked = task.meta.get("question")
    return str(asked) if asked else next(m.content for m in reversed(task.messages) if m.role == "user")


def _plain(answer: Any) -> Any:
    return answer.tolist() if isinstance(answer, np.ndarray) else answer
