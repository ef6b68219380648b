"""Steps of an answer, and the conversation in which a process reward model judges them.

A step is a paragraph of the answer: blank lines separate steps, and lines where there is none. The conversation is that
of VisualPRM (arXiv 2503.10291): the first turn of the user holds images, question and first step, each further one the
next step, and each turn of the assistant is `+` for a solution that is right up to there, `-` for one that is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from foveate.data.conversations import IMAGE_TAG, IMAGE_WORD
from foveate.errors import DataError
from foveate.records import Message, Task

RIGHT_STEP, WRONG_STEP = "+", "-"
MOST_STEPS = 12
"""Steps of an answer at most, as in the paper."""
FIRST_STEP = "{images}### Question:\n{question}\n\n### Solution Process:\n{step}"
"""The first turn of the user, as VisualPRM was trained on it."""
_MARKS = re.compile(rf"(?:{IMAGE_TAG}\s*)*")
_BREAK = {True: re.compile(r"\n[^\S\n]*\n\s*"), False: re.compile(r"\n\s*")}


def split_steps(text: str, most: int = MOST_STEPS) -> tuple[str, ...]:
    """The steps of an answer, at least one; joined they are the text. Of more than `most` neighbours are merged, so
    that all have as many, or one more."""
    found = _BREAK[_BREAK[True].search(text.strip()) is not None]
    begin = len(text) - len(text.lstrip())
    ends = [match.end() for match in found.finditer(text, begin) if match.end() < len(text)]
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    count = min(most, len(pieces))
    places = [len(pieces) * number // count for number in range(count + 1)]
    return tuple("".join(pieces[a:b]) for a, b in pairwise(places))


def judged_steps(task: Task, steps: Sequence[str], judgements: Sequence[str]) -> Task:
    """The task of the conversation about the steps of an answer to `task`, which ends before the last judgement: those
    of the steps before it are `judgements`. System messages, which are for who answered, are left out; a mark of an
    image in a step is text. Raises DataError for a task that `check_one_turn` finds fault with."""
    for field, fault in check_one_turn(task):
        raise DataError(f"{task.where}, field {field}: {fault}")
    messages = [message for message in task.messages if message.role != "system"]
    last = max(place for place, message in enumerate(messages) if message.role == "user")
    asked = messages[last].content
    images = asked[: _MARKS.match(asked).end()]  # pyright: ignore[reportOptionalMemberAccess]
    first, *rest = (step.strip().replace(IMAGE_TAG, IMAGE_WORD) for step in steps)
    turns = [Message("user", FIRST_STEP.format(images=images, question=asked[len(images) :], step=first))]
    for judgement, step in zip(judgements, rest, strict=True):
        turns += [Message("assistant", judgement), Message("user", step)]
    return replace(task, messages=(*messages[:last], *turns))


def check_one_turn(task: Task) -> list[tuple[str, str]]:
    """The faults of a task whose answers have no steps that could be judged, as (field, what is wrong)."""
    if all(message.role != "assistant" for message in task.messages):
        return []
    return [("prompt", "has turns of the assistant, which would be judged as steps; process rewards take one question")]
