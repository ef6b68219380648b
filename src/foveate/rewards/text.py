"""Answers as text: where the final answer stands, what a ground truth accepts, multiple choice, form and length."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from foveate.data.conversations import with_words
from foveate.errors import DataError
from foveate.records import Score, Task
from foveate.rewards import GROUND_TRUTH
from foveate.rewards.choices import given_options, named_option, options, right_option, several_options
from foveate.rewards.plain_text import answer_part, behind_thoughts, plain, statements, tagged_answer

NO_ANSWER = "no final answer in the text"
NO_OPTION = "no option in the answer"

Extraction = Literal["box", "text"]

_BOX_OR_BRACE = re.compile(
    r"(?P<box>(?<!\\)\\+(?:boxed|fbox|framebox))\s*(?:(?P<brace>\{)|(?P<bare>-?\d+(?:[.,/]\d+)*|\\[A-Za-z]+(?:\{[^{}]*\})*|[A-Za-z]\b))"
    r"|\\[\\{}]|[{}]"
)
_JOINT = re.compile(
    r"[\s,;、，；]*(?:\b(?:and|or|as well as)\b|[和或与及])?[\s,]*(?P<name>[A-Za-z](?:_?\w|_\{\w\})?\s*=)?\s*"
)
_JOINT_DRESS = re.compile(r"\\[,;:! ()\[\]]|\\q?quad|\\text\s*\{([^{}]*)\}|[$~*]")
_LONGEST_JOINT = 40
_CORRECTED = re.compile(
    r"\bcorrection\s*:|\bmy\s+mistake\b|\bon\s+second\s+thought\b"
    r"|\bI\s+(?:have\s+|had\s+)?(?:misread|miscounted|miscalculated|was\s+wrong|made\s+an?\s+(?:mistake|error))\b|更正|我[弄算看]错",
    re.IGNORECASE,
)
_NAMED = re.compile(r"([A-Za-z](?:_?\w|_\{\w\})?)\s*=[\s$({\\]*$")


# -------------------------------------------------------------------------------------------------- final answers


class _Box(NamedTuple):
    """A closed box: where it begins and ends in the text, and its content."""

    start: int
    end: int
    content: str


def _boxes(text: str) -> list[_Box]:
    r"""Every closed box of a text in order: `\boxed{...}`, `\fbox{...}`, `\boxed 7`, also with doubled backslashes. Of
    nested boxes it is the innermost. Escaped braces `\{` do not count. Linear in the length of the text."""
    found: list[_Box] = []
    open_braces: list[tuple[int, int, bool] | None] = []
    for token in _BOX_OR_BRACE.finditer(text):
        if token["bare"]:
            found.append(_Box(token.start(), token.end(), token["bare"]))
        elif token["box"]:
            open_braces.append((token.start(), token.end(), token["box"].count("\\") % 2 == 0))
        elif token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}" and open_braces and (opened := open_braces.pop()) is not None:
            start, inside, doubled = opened
            content = text[inside : token.start()].strip()
            if not (found and found[-1].start > start):  # else it holds another box
                found.append(_Box(start, token.end(), content.replace(r"\\", "\\") if doubled else content))
    return found


def last_box(text: str) -> str | None:
    r"""The content of the last closed `\boxed{...}`, `\fbox{...}` or `\boxed 7`, or None; of nested ones the innermost.
    A box that is never closed is passed over."""
    found = _boxes(text)
    return found[-1].content if found else None


def boxed_answer(text: str) -> str | None:
    r"""The content of the last box, or of the last boxes as a list where they are joined by no more than a comma, `and`
    or a name: `\boxed{2} and \boxed{3}`, `x = \boxed{2}, y = \boxed{3}`. None without a box."""
    found = _boxes(text)
    if not found:
        return None
    joined = [found[-1]]
    names: list[str] = []
    for before, after in pairwise(reversed(found)):
        joint = _joint(text[after.end : before.start]) if before.start - after.end <= _LONGEST_JOINT else None
        if joint is None:
            break
        names.insert(0, (joint["name"] or "").rstrip("= "))
        joined.insert(0, after)
    contents = [box.content for box in joined]
    first = _NAMED.search(text[max(joined[0].start - _LONGEST_JOINT, 0) : joined[0].start])
    if names and first and all(names):
        contents = [f"{name}={content}" for name, content in zip((first[1], *names), contents, strict=True)]
    return ", ".join(dict.fromkeys(content for content in contents if content)) or contents[-1]


def _joint(gap: str) -> re.Match[str] | None:
    return _JOINT.fullmatch(_JOINT_DRESS.sub(lambda found: f" {found.group(1) or ''} ", gap))


def final_answer(text: str, extraction: Extraction) -> str | None:
    r"""The answer that a text arrives at, or None. If anything stands behind the last `</think>`, it is looked for only
    there.

    "box" accepts the last box only, see `boxed_answer`, as published graders do. "text" takes, without a box, the last
    `<answer>...</answer>`, and without that all that stands behind `</think>`; and a box that is corrected
    behind it gives way to the correction.
    """
    tail = answer_part(text)
    box = boxed_answer(tail)
    if extraction == "box":
        return box
    if box is not None:
        behind = tail[_boxes(tail)[-1].end :]
        return behind.strip() if _CORRECTED.search(behind) and any(statements(behind)) else box
    tagged = tagged_answer(tail)
    return (behind_thoughts(text) if tagged is None else tagged).strip() or None


# -------------------------------------------------------------------------------------------------- ground truths


def truths(task: Task) -> list[str]:
    """The accepted answers of a task: one for a string or a number, each entry for a list, tuple or NumPy array.
    Raises DataError for anything else, and for an empty one."""
    found = _truths(task.answer)
    if not found:
        raise DataError(f"{task.where}, field {GROUND_TRUTH}: {_not_an_answer(task.answer)}")
    return found


def check_answer(task: Task) -> list[tuple[str, str]]:
    """The faults of a task whose ground truth must be text, a number or a list of them, as (field, what is wrong)."""
    return [] if _truths(task.answer) else [(GROUND_TRUTH, _not_an_answer(task.answer))]


def _truths(value: Any) -> list[str]:
    values = _entries(value)
    if any(isinstance(v, bool) or not isinstance(v, str | int | float) for v in values):
        return []
    shown = [v.strip() if isinstance(v, str) else _number(v) for v in values]
    return shown if all(shown) else []


def _entries(value: Any) -> list[Any]:
    """The accepted ground truths as they stand, so that numbers can be told from text."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return str(int(Decimal(repr(value)))) if value == int(value) else repr(value)


def _not_an_answer(value: Any) -> str:
    return f"{value!r:.80} is no answer: it must be a text or a finite number, or a list of accepted ones"


# --------------------------------------------------------------------------------------------------------- scores


def score_final_answer(
    text: str, task: Task, extraction: Extraction, is_right: Callable[[str, list[str]], bool]
) -> Score:
    """1 where `is_right` (of the final answer and the accepted ones), else 0. Parts: accuracy; parsed, 1 if a final
    answer was found."""
    answer = final_answer(text, extraction)
    if answer is None:
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note=NO_ANSWER)
    right = float(is_right(answer, truths(task)))
    return Score(right, {"accuracy": right, "parsed": 1.0})


def exact(text: str, task: Task, *, extraction: Extraction = "text", normalise: bool = True) -> Score:
    """1 if the final answer equals an accepted answer, else 0. With `normalise` in plain form (case, white space, the
    marks around it and `\\text{}` do not matter), without it character by character. Parts: accuracy, parsed."""
    form = plain if normalise else str
    return score_final_answer(text, task, extraction, lambda answer, accepted: form(answer) in map(form, accepted))


def check_choice(task: Task) -> list[tuple[str, str]]:
    """The faults of a multiple-choice task, as (field, what is wrong): its ground truth must be text or a number, and
    one of its options where it has any."""
    faults, values = check_answer(task), options(task, numbered=True)
    if faults or not values:
        return faults
    shown = ", ".join(f"{label} ({value:.20})" for label, value in values.items())
    return [
        (GROUND_TRUTH, f"{truth!r:.80} is none of the options {shown}; write a label, a value, or an index from 0 on")
        for truth in _entries(task.answer)
        if right_option(truth, values) is None and not several_options(str(truth), values)
    ]


def check_letter(task: Task) -> list[tuple[str, str]]:
    """The faults of a mathematical task that may have options: `check_answer`, and a letter must be one of those that
    the row has in columns. (A value may be written in another form than its option.)"""
    faults, values = check_answer(task), given_options(task)
    if faults or not values:
        return faults
    letters = [one for one in truths(task) if re.fullmatch(r"\(?[A-J][.)]?", one) and right_option(one, values) is None]
    return [(GROUND_TRUTH, f"{one!r} is none of the options {', '.join(values)}") for one in letters]


def multiple_choice(text: str, task: Task, *, extraction: Extraction = "box") -> Score:
    """1 for the right option, named by its label or by its value, whichever the ground truth is, also in a sentence
    (see `named_option`); else 0. A ground truth of several letters wants all of them, in any order.

    Parts: accuracy; parsed, 1 if the answer names an option. Values are compared in their plain form.
    """
    answer = final_answer(text, extraction)
    if answer is None:
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note=NO_ANSWER)
    accepted, values = truths(task), options(task, numbered=True)
    named = named_option(answer, values)
    several = several_options(answer, values) if any(several_options(truth, values) for truth in accepted) else set()
    right = False
    for truth, accepted_one in zip(_entries(task.answer), accepted, strict=True):
        wanted = right_option(truth, values)
        is_index = wanted is not None and accepted_one.isdecimal() and named != wanted
        right |= plain(answer) == plain(accepted_one) and not is_index
        right |= named is not None and named == wanted
        right |= bool(several) and wanted is None and several == several_options(str(truth), values)
    read = right or named is not None or bool(several)
    return Score(float(right), {"accuracy": float(right), "parsed": float(read)}, note="" if read else NO_OPTION)


def format_tags(text: str, task: Task, *, tags: list[str] = ["think", "answer"], strict: bool = True) -> Score:  # noqa: ARG001, B006
    """1 if the text consists of `<tag>...</tag>` sections, each tag exactly once and in this order, else 0.

    With `strict` nothing but white space stands outside of them; without it only the start is held: text may stand
    after and between sections, and the first one opens the answer.
    """
    position, gaps = 0, []
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        start, end = text.find(opening, position), text.find(closing, position)
        if start < 0 or end < start or text.count(opening) != 1 or text.count(closing) != 1:
            return Score(0.0, {"format": 0.0})
        gaps.append(text[position:start])
        position = end + len(closing)
    outside = [*gaps, text[position:]] if strict else gaps[:1]
    held = float(not any(gap.strip() for gap in outside))
    return Score(held, {"format": held})


# ------------------------------------------------------------------------------------------------------ repetition


def repetition(text: str, task: Task, *, size: Annotated[int, Field(ge=1)] = 4) -> Score:  # noqa: ARG001
    """Less 0 to 1 for saying the same again: minus the share of the `size`-grams of words (white space apart, case
    folded) that occurred before. 0 for text shorter than one n-gram. Parts: repeated, the share."""
    words = text.casefold().split()
    grams = Counter(zip(*(words[i:] for i in range(size)), strict=False))
    share = 1.0 - len(grams) / grams.total() if grams else 0.0
    return Score(-share, {"repeated": share})


def question(task: Task) -> str:
    """The text of a task's last user message, without image marks."""
    asked = [message.content for message in task.messages if message.role == "user"]
    return with_words(asked[-1].replace("<image>", "")).strip() if asked else ""


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: NumPy arrays and numbers become lists and numbers, other objects text."""
    return json.loads(
        json.dumps(value, default=lambda v: v.tolist() if isinstance(v, np.ndarray | np.generic) else str(v))
    )
