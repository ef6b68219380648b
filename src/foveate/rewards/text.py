"""Answers as text: where the final answer stands, multiple choice, format tags, length and repetition."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from foveate.errors import ConfigError, DataError
from foveate.records import Score, Task
from foveate.rewards import GROUND_TRUTH

NO_ANSWER = "no final answer in the text"

Extraction = Literal["box", "text"]

_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\[\\{}]|[{}]")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\*\*")
_CHOICE = re.compile(r"(?:option|choice|answer)?\s*:?\s*(?:\(\s*([A-Z])\s*\)|([A-Z])(?=$|[.:)]))", re.IGNORECASE)
_OPTION_MARK = re.compile(r"(?:(?<=\s)|^)\(?([A-J])[.):]\s+", re.MULTILINE)


# -------------------------------------------------------------------------------------------------- final answers


def last_box(text: str) -> str | None:
    r"""The content of the last balanced `\boxed{...}`, or None. Escaped braces `\{` do not count; of nested boxes it is
    the innermost; a box that is never closed is passed over. Linear in the length of the text."""
    last: tuple[int, int] | None = None
    open_braces: list[int | None] = []
    for found in _BOX_OR_BRACE.finditer(text):
        token = found.group()
        if token.startswith("\\boxed"):
            open_braces.append(found.end())
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, found.start()
    return text[last[0] : last[1]].strip() if last else None


def final_answer(text: str, extraction: Extraction) -> str | None:
    r"""The answer that a text arrives at, or None.

    "box" accepts the last `\boxed{...}` only. "text" takes, without a box, the last `<answer>...</answer>`, and without
    that the text behind the last `</think>`, or the whole text.
    """
    box = last_box(text)
    if box is not None or extraction == "box":
        return box
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    tail = text[start + len("<answer>") : end] if start >= 0 else text[text.rfind("</think>") + 1 :]
    return tail.removeprefix("/think>").strip() or None


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
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    values = list(value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(v, bool) or not isinstance(v, str | int | float) for v in values):
        return []
    shown = [v.strip() if isinstance(v, str) else _number(v) for v in values]
    return shown if all(shown) else []


def _number(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return str(int(value)) if value == int(value) else repr(value)


def _not_an_answer(value: Any) -> str:
    return f"{value!r:.80} is no answer: it must be a text or a finite number, or a list of accepted ones"


def plain(text: str) -> str:
    r"""Text without its dress: `\text{...}` and bold markers, letter case, runs of white space, quotes around it and
    the stop at its end are gone. Answers of one plain form are the same, so `5!`, `.5` and `5²` keep their marks."""
    text = _WRAPPED.sub(lambda found: f" {found.group(1) or ''} ", unicodedata.normalize("NFC", text))
    return " ".join(text.casefold().split()).strip(" \"'`$").rstrip(" .,;:")


# ------------------------------------------------------------------------------------------------ multiple choice


def choice_letter(answer: str) -> str | None:
    """The option that an answer names: `B`, `(b)`, `B. 5 cm`, `Option B`; None for one that names none."""
    found = _CHOICE.match(_WRAPPED.sub(lambda f: f.group(1) or "", answer).strip(" $.\n\t"))
    return (found.group(1) or found.group(2)).upper() if found else None


def options(task: Task) -> Mapping[str, str]:
    """The options of a multiple-choice task, letter -> value; empty if it has none.

    They are `extra_info.choices` or `.options` (a list, or a mapping by letter), or else stand in the last user message
    as `A. 5  B. 6`, `(A) 5`, `A: 5`, in a row that starts with A and has at least two.
    """
    given = task.meta.get("choices", task.meta.get("options"))
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if isinstance(given, Mapping):
        return {str(letter).upper(): str(value) for letter, value in given.items()}
    if isinstance(given, list | tuple):
        return {chr(ord("A") + i): str(value) for i, value in enumerate(given)}
    questions = [message.content for message in task.messages if message.role == "user"]
    return _options_in(questions[-1]) if questions else {}


@lru_cache(maxsize=4096)
def _options_in(question: str) -> Mapping[str, str]:
    marks = list(_OPTION_MARK.finditer(question))
    starts = [i for i, mark in enumerate(marks) if mark.group(1) == "A"]
    if not starts:
        return {}
    row = marks[starts[-1] :]
    count = next((i for i, mark in enumerate(row) if mark.group(1) != chr(ord("A") + i)), len(row))
    ends = [mark.start() for mark in row[1:]] + [len(question)]
    found = {row[i].group(1): question[row[i].end() : ends[i]].strip() for i in range(count)}
    last = row[count - 1].group(1)
    found[last] = found[last].partition("\n")[0].strip()
    return found if len(found) > 1 else {}


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


def multiple_choice(text: str, task: Task, *, extraction: Extraction = "box") -> Score:
    """1 for the right option, named by its letter or by its value, whichever the ground truth is; else 0.

    Parts: accuracy; parsed, 1 if a final answer was found. Values are compared in their plain form.
    """
    values = options(task)
    return score_final_answer(
        text, task, extraction, lambda answer, accepted: any(_same_option(answer, one, values) for one in accepted)
    )


def _same_option(answer: str, truth: str, values: Mapping[str, str]) -> bool:
    by_value = {plain(value): letter for letter, value in values.items()}
    named = by_value.get(plain(answer)) or choice_letter(answer)
    wanted = by_value.get(plain(truth)) or choice_letter(truth)
    return plain(answer) == plain(truth) or (named is not None and named == wanted)


# ------------------------------------------------------------------------------------------------- match and form


def exact(text: str, task: Task, *, extraction: Extraction = "text", normalise: bool = True) -> Score:
    """1 if the final answer equals an accepted answer, else 0. With `normalise` in plain form (case, white space, the
    marks around it and `\\text{}` do not matter), without it character by character. Parts: accuracy, parsed."""
    form = plain if normalise else str
    return score_final_answer(text, task, extraction, lambda answer, accepted: form(answer) in map(form, accepted))


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


# --------------------------------------------------------------------------------------------- length, repetition


def overlong_penalty(length: float, limit: int, buffer: int) -> float:
    """The soft overlong punishment of DAPO (Yu et al. 2025, equation 13), in -1..0: 0 up to `limit` - `buffer`, then
    falling in a line to -1 at `limit`, and -1 from there on."""
    return max(min((limit - buffer - length) / buffer, 0.0), -1.0)


def overlong(*, limit: int, buffer: int, tokenizer: str = "") -> Callable[[str, Task], Score]:
    """The reward `overlong_penalty` of an answer's length: in tokens of `tokenizer`, a model folder that holds a
    `tokenizer.json`, or without one in words. Stop tokens are not in the text and do not count. A term of a weighted
    sum. Parts: length. Raises ConfigError for a buffer outside 1..limit and for a folder without tokenizer."""
    if not 0 < buffer <= limit:
        raise ConfigError(f"reward overlong: buffer must be in 1..limit, found buffer {buffer} and limit {limit}")
    file = Path(tokenizer) / "tokenizer.json"
    if tokenizer and not file.is_file():
        raise ConfigError(f"reward overlong: no {file}; `tokenizer` is a model folder that holds a tokenizer.json")
    tokens = Tokenizer.from_file(str(file)) if tokenizer else None

    def reward(text: str, task: Task) -> Score:  # noqa: ARG001
        length = len(tokens.encode(text, add_special_tokens=False).ids) if tokens else len(text.split())
        return Score(overlong_penalty(length, limit, buffer), {"length": float(length)})

    return reward


def repetition(text: str, task: Task, *, size: int = 4) -> Score:  # noqa: ARG001
    """Less 0 to 1 for saying the same again: minus the share of the `size`-grams of words (white space apart, case
    folded) that occurred before. 0 for text shorter than one n-gram. Parts: repeated, the share."""
    words = text.casefold().split()
    grams = Counter(zip(*(words[i:] for i in range(size)), strict=False))
    share = 1.0 - len(grams) / grams.total() if grams else 0.0
    return Score(-share, {"repeated": share})


def question(task: Task) -> str:
    """The text of a task's last user message, without image marks."""
    asked = [message.content for message in task.messages if message.role == "user"]
    return asked[-1].replace("<image>", "").strip() if asked else ""


def jsonable(value: Any) -> Any:
    """A value as JSON can hold it: NumPy arrays and numbers become lists and numbers, other objects text."""
    return json.loads(
        json.dumps(value, default=lambda v: v.tolist() if isinstance(v, np.ndarray | np.generic) else str(v))
    )
