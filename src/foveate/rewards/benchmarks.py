"""The rules by which published benchmarks score an answer, on the final answer that a text gives.

The published evaluations of MathVista and MathVerse have a model extract it; here `text.final_answer` does.
docs/evaluation.md says where the rules differ from the official code.
"""

from __future__ import annotations

import math
import re
from typing import Any

from foveate.records import Score, Task
from foveate.rewards import GROUND_TRUTH
from foveate.rewards.choices import options
from foveate.rewards.numeric import read_number
from foveate.rewards.strings import accepted_texts
from foveate.rewards.text import NO_ANSWER, Extraction, check_answer, final_answer, multiple_choice, truths

_LETTER = re.compile(r"\(([A-Za-z])\)")
_LONGEST = 200
"""Characters of an answer that are compared with options."""
_KINDS = ("integer", "float", "text", "list")
_NUMBER = re.compile(r"-?(?:\b\d{1,3}(?:,\d{3})+\b(?:\.\d+)?|\d+(?:\.\d+)?[eE][+-]?\d{1,3}|\d+\.\d+|\.\d+|\d+)")
_KEYS = re.compile(r"\b(?:could be|so|is|thus|therefore|final|answer|result)\s|=")
_SENTENCE = re.compile(r"\.\s(?=[A-Z])|\n")
_HANDWRITTEN = ("HME100k", "Handwritten Mathematical Expression Recognition")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


# ------------------------------------------------------------------------------------------------------- MathVista


def mathvista(text: str, task: Task, *, extraction: Extraction = "text") -> Score:
    """MathVista's rule (Lu et al. 2024): 1 if the final answer, in the form of the row, is the ground truth as text.

    A row with options: a letter in brackets or alone stands for its option, any other answer for the option that is
    nearest to it by edit distance. `extra_info.answer_type` integer: cut to a whole number; float: rounded to
    `extra_info.precision` places; text and list: as it stands. Parts: accuracy; parsed, 1 if it has that form.
    """
    answer = final_answer(text, extraction)
    if answer is None:
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note=NO_ANSWER)
    values = list(options(task).values())
    said = _chosen(answer, values) if values else _in_form(answer, task)
    if said is None:
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note="no number in the answer")
    right = float(any(said.strip() == truth.strip() for truth in truths(task)))
    return Score(right, {"accuracy": right, "parsed": 1.0})


def _chosen(answer: str, values: list[str]) -> str:
    bare = answer.strip()
    bracketed = _LETTER.search(bare)
    letter = bracketed[1].upper() if bracketed else bare
    place = ord(letter) - ord("A") if len(letter) == 1 else -1
    if 0 <= place < len(values):
        return values[place]
    return min(values, key=lambda value: edit_distance(letter[:_LONGEST], value[:_LONGEST]))


def _in_form(answer: str, task: Task) -> str | None:
    kind = task.meta.get("answer_type")
    if kind not in ("integer", "float"):
        return answer
    found = read_number(answer)
    if found is None:
        return None
    value = float(found.value)
    if not math.isfinite(value):
        return None
    return str(int(value)) if kind == "integer" else str(round(value, _precision(task) or 0))


def _precision(task: Task) -> int | None:
    """Decimals of a float, 0 where the row has none; None for what is no whole number."""
    given = task.meta.get("precision")
    try:
        return int(float(0 if given is None or given == "" else given))
    except (TypeError, ValueError, OverflowError):
        return None


def edit_distance(one: str, other: str) -> int:
    """The fewest characters to insert, delete or replace that make one text the other (Levenshtein 1966)."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def check_mathvista(task: Task) -> list[tuple[str, str]]:
    """The faults of a row of MathVista, as (field, what is wrong)."""
    faults, kind = check_answer(task), task.meta.get("answer_type", "text")
    values = list(options(task).values())
    if not faults and values and truths(task)[0].strip() not in [value.strip() for value in values]:
        faults = [(GROUND_TRUTH, f"{task.answer!r:.80} is none of the options {', '.join(values)}; write its text")]
    if kind not in _KINDS:
        faults.append(("extra_info.answer_type", f"{kind!r:.80} is none of {', '.join(_KINDS)}"))
    if kind == "float" and _precision(task) is None:
        faults.append(("extra_info.precision", f"{task.meta.get('precision')!r:.80} is no number of decimals"))
    return faults


# ------------------------------------------------------------------------------------------------------------ MMMU


def mmmu(text: str, task: Task, *, extraction: Extraction = "text") -> Score:
    """MMMU's rule (Yue et al. 2024): a row with options as `multiple_choice`; an open one is right if a number of the
    answer's key statement is the ground truth to two places, or the statement contains it as text. Parts: accuracy,
    parsed."""
    if options(task, numbered=True):
        return multiple_choice(text, task, extraction=extraction)
    answer = final_answer(text, extraction)
    if answer is None:
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note=NO_ANSWER)
    said = [form for key in _key_statements(answer) for part in (key, *_NUMBER.findall(key)) for form in _forms(part)]
    wanted = [form for truth in accepted_texts(task) for form in _forms(truth)]
    right = float(any(_agree(one, other) for one in said for other in wanted))
    return Score(right, {"accuracy": right, "parsed": 1.0})


def _key_statements(answer: str) -> list[str]:
    """The text behind the last key word of each sentence; the whole answer where there is none."""
    found = []
    for sentence in _SENTENCE.split(answer.strip().strip(".")):
        keys = [*_KEYS.finditer(sentence.lower())]
        said = sentence[keys[-1].end() :].strip() if keys else ""
        if said and said not in ".,:;!?'":
            found.append(said)
    return found or [answer.strip().strip(".")]


def _forms(text: str) -> list[Any]:
    """A text as MMMU compares it: a number rounded to two places, else in small letters, a single one with a space."""
    bare = text.strip().lower()
    try:
        return [round(float(bare.replace(",", "")), 2)]
    except (ValueError, OverflowError):
        return [f" {bare}", f"{bare} "] if len(bare) == 1 else [bare]


def _agree(said: Any, wanted: Any) -> bool:
    if isinstance(said, str):
        return isinstance(wanted, str) and wanted in said
    return said == wanted


# -------------------------------------------------------------------------------------------------------- OCRBench


def ocrbench(text: str, task: Task) -> Score:
    """OCRBench's rule (Liu et al. 2024): 1 if the answer, behind its thoughts, contains an accepted text, in small
    letters; rows of handwritten formulas (`extra_info.dataset` HME100k, or that `question_type`) compare letter case,
    and no spaces. Parts: accuracy."""
    answer = final_answer(text, "text") or ""
    handwritten = any(task.meta.get(name) in _HANDWRITTEN for name in ("dataset", "question_type", "category"))
    form = _without_spaces if handwritten else _small
    right = float(any(form(truth) in form(answer) for truth in accepted_texts(task)))
    return Score(right, {"accuracy": right})


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def _small(text: str) -> str:
    return text.translate(_FULL_WIDTH).lower().strip().replace("\n", " ")
