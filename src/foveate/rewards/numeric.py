"""Numbers within a tolerance, and lists of numbers. Decimals are compared exactly, so that a bound is one."""

from __future__ import annotations

import math
import re
from collections import Counter
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np

from foveate.errors import DataError
from foveate.records import Score, Task
from foveate.rewards import GROUND_TRUTH
from foveate.rewards.number_words import in_digits
from foveate.rewards.numbers import close
from foveate.rewards.plain_text import last_value, unified, unwrapped
from foveate.rewards.strings import accepted_texts, check_texts, same_text
from foveate.rewards.text import NO_ANSWER, Extraction, check_answer, final_answer, truths

RELAXED = 0.05
"""The relative tolerance of ChartQA's relaxed accuracy (Masry et al. 2022)."""
TOLERANCE_FIELD = "tolerance"
"""The field of `extra_info` that gives a row its own tolerance."""
_DIGITS = 6
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d{1,60})(?:\.\d{0,60})?|\.\d{1,60}"
_POWER = r"(?:\s*(?:[eE]|(?:\\times|×|\*|\\cdot)\s*10\s*\^)\s*\{?\s*(?P<power>[-+]?\d{1,3})\}?)?"
_QUANTITY = re.compile(
    rf"(?:[A-Za-z]\w{{0,20}}\s*(?:=|\\approx|≈)\s*)?(?:about|approximately|around|roughly|\\approx|≈|~)?\s*"
    rf"(?P<sign>[-+]?)\s*(?:USD|US\$|\\?[$€£¥])?\s*(?P<under>[-+]?)"
    rf"(?:\\[dt]?frac\s*\{{(?P<above>{_PLAIN})\}}\s*\{{(?P<below>{_PLAIN})\}}"
    rf"|(?P<number>{_PLAIN}){_POWER}(?:\s*/\s*(?P<over>\d{{1,30}}))?)"
    r"\s*(?P<scale>thousand|million|billion|trillion)?(?P<percent>\s*(?:\\?%|percent\b|per\s?cent\b))?"
    r"(?:[\s\\,°]*(?:[A-Za-z$€£¥°][\w^{}²³/.-]{0,20})(?:\s+[A-Za-z$€£¥°][\w^{}²³/.-]{0,20}){0,3})?[\s°]*\.?",
    re.IGNORECASE,
)
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_ANY_NUMBER = re.compile(r"(?:(?<![\w.\])])-)?(?<![A-Za-z_.\d])(?:\d+(?:\.\d+)?|\.\d+)")
_INLINE = re.compile(r"\\[()\[\]]")
_LONGEST = 200


class ReadNumber(NamedTuple):
    """A number that a text is, in percent where it says so."""

    value: Decimal
    percent: bool


def read_number(text: str) -> ReadNumber | None:
    r"""The number that a text is, or None: in digits or words, with commas between thousands, a power of ten, a
    fraction, money, percent, `million`, a name before it (`x = 5`) and a label of up to four words behind it."""
    bare = _INLINE.sub("", unwrapped(unified(text[:_LONGEST]))).strip().strip("$").strip()
    found = _QUANTITY.fullmatch(bare) or _QUANTITY.fullmatch(in_digits(bare)) or _QUANTITY.fullmatch(last_value(bare))
    if found is None:
        return None
    above, below = (found["above"], found["below"]) if found["above"] else (found["number"], found["over"] or "1")
    denominator = _decimal(below)
    if not denominator:
        return None
    value = _decimal(above).scaleb(int(found["power"] or 0) + _SCALES.get((found["scale"] or "").lower(), 0))
    value /= denominator
    negative = "-" in (found["sign"], found["under"])
    return ReadNumber(-value if negative else value, bool(found["percent"]))


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def within(given: ReadNumber, wanted: ReadNumber, tolerance: float) -> bool:
    """Whether |given - wanted| <= tolerance |wanted|, exactly; with a tolerance of 0 they agree to 6 digits
    (`numbers.close`). Where one of them is in percent, the other may be so, too, or a share: 50 % is 50 and 0.5."""
    shares = {given.value}
    if given.percent != wanted.percent:
        shares.add(given.value.scaleb(-2 if given.percent else 2))
    if not tolerance:
        return any(close(value, wanted.value, _DIGITS) for value in shares)
    allowed = Decimal(repr(tolerance)) * abs(wanted.value)
    return any(abs(value - wanted.value) <= allowed for value in shares)


def numeric(text: str, task: Task, *, tolerance: float = RELAXED, extraction: Extraction = "text") -> Score:
    """1 if |a - t| <= tolerance |t| for the number a of the answer and the ground truth t, else 0.

    A row may give its own tolerance in `extra_info.tolerance`; 0 wants agreement to 6 digits. A ground truth of 0 wants
    0. Parts: accuracy; parsed, 1 if the answer is a number; error, |a - t| / |t|, at most 1. Raises DataError for a
    ground truth that is no number.
    """
    own = tolerance_of(task)
    allowed = tolerance if own is None else own
    wanted = [_required(task, truth) for truth in truths(task)]
    answer = final_answer(text, extraction)
    given = read_number(answer) if answer is not None else None
    if given is None:
        note = NO_ANSWER if answer is None else "no number in the answer"
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note=note)
    right = float(any(within(given, one, allowed) for one in wanted))
    off = min(abs(given.value - one.value) / (abs(one.value) or 1) for one in wanted)
    return Score(right, {"accuracy": right, "parsed": 1.0, "error": min(float(off), 1.0)})


def chartqa(
    text: str,
    task: Task,
    *,
    tolerance: float = RELAXED,
    rule: Literal["read", "published"] = "read",
    extraction: Extraction = "text",
) -> Score:
    """Relaxed accuracy of ChartQA (Masry et al. 2022): where the ground truth is a number, `numeric` with 5 percent,
    else `string_match`. With the rule "published" as the code of the benchmark has it (`published_relaxed`), which
    reads plain numbers only. Parts: accuracy, parsed."""
    accepted = accepted_texts(task)
    answer = final_answer(text, extraction)
    if answer is None:
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note=NO_ANSWER)
    given, own = read_number(answer), tolerance_of(task)
    allowed = tolerance if own is None else own
    right = False
    for truth in accepted:
        wanted = read_number(truth)
        if rule == "published":
            right |= published_relaxed(answer, truth, allowed)
            continue
        is_close = given is not None and wanted is not None and within(given, wanted, allowed)
        right |= is_close or same_text(answer, truth)
    return Score(float(right), {"accuracy": float(right), "parsed": 1.0})


def published_relaxed(answer: str, truth: str, tolerance: float) -> bool:
    """ChartQA's relaxed correctness as its code has it: both are plain numbers, of which a percentage is divided by
    100, and differ by no more than that share of a ground truth that is not 0; else equal texts in any letter case."""
    given, wanted = _plain_number(answer), _plain_number(truth)
    if given is not None and wanted:
        return abs(given - wanted) / abs(wanted) <= tolerance
    return answer.lower() == truth.lower()


def _plain_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def tolerance_of(task: Task) -> float | None:
    """The tolerance that a row gives itself, or None. Raises DataError for one that is no number from 0 on."""
    given = task.meta.get(TOLERANCE_FIELD)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf:
        raise DataError(f"{task.where}, field extra_info.{TOLERANCE_FIELD}: {given!r} is no number from 0 on")
    return float(given)


def _required(task: Task, truth: str) -> ReadNumber:
    found = read_number(truth)
    if found is None:
        raise DataError(f"{task.where}, field {GROUND_TRUTH}: {truth!r:.80} is no number")
    return found


# ------------------------------------------------------------------------------------------------------ number list


def numbers_of(value: Any) -> list[float]:
    """The numbers of a list, or those of a text in their order; a dash between two digits is no sign."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [float(one) for one in value if isinstance(one, int | float) and not isinstance(one, bool)] or [
            number for one in value if isinstance(one, str) for number in numbers_of(one)
        ]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [float(value)]
    return [float(one) for one in _ANY_NUMBER.findall(unified(value))] if isinstance(value, str) else []


def number_list(text: str, task: Task, *, partial: float = 0.2, extraction: Extraction = "text") -> Score:
    """1 for the numbers of the ground truth in their order; for the same numbers in another order `partial` times the
    share of places that are right; else 0. Vero's rule for orders (arXiv 2604.04917), as of Visual Jigsaw. Parts:
    accuracy; places, the share of right places; parsed, 1 if the answer has as many numbers."""
    wanted = numbers_of(task.answer)
    if not wanted:
        raise DataError(f"{task.where}, field {GROUND_TRUTH}: {task.answer!r:.80} holds no number")
    answer = final_answer(text, extraction)
    given = numbers_of(answer) if answer is not None else []
    parsed = float(len(given) == len(wanted))
    if Counter(given) != Counter(wanted):
        return Score(0.0, {"accuracy": 0.0, "places": 0.0, "parsed": parsed}, note="" if given else NO_ANSWER)
    places = sum(one == other for one, other in zip(given, wanted, strict=True)) / len(wanted)
    right = float(given == wanted)
    return Score(1.0 if right else partial * places, {"accuracy": right, "places": places, "parsed": parsed})


# ------------------------------------------------------------------------------------------------------------- checks


def check_number(task: Task) -> list[tuple[str, str]]:
    """The faults of a numeric task, as (field, what is wrong): its ground truth must be a number, and so must its
    tolerance."""
    faults = check_answer(task) or [
        (GROUND_TRUTH, f"{truth!r:.80} is no number; write it in digits, or choose the reward math or chartqa")
        for truth in truths(task)
        if read_number(truth) is None
    ]
    return faults + _tolerance_fault(task)


def check_relaxed(task: Task) -> list[tuple[str, str]]:
    """The faults of a task with a relaxed answer: text, a number or a list of them; and a tolerance that is none."""
    return check_texts(task) + _tolerance_fault(task)


def check_numbers(task: Task) -> list[tuple[str, str]]:
    """The faults of a task whose ground truth must be a list of numbers, also as text."""
    if numbers_of(task.answer):
        return []
    return [(GROUND_TRUTH, f"{task.answer!r:.80} holds no number; write a list of numbers, or one as text")]


def _tolerance_fault(task: Task) -> list[tuple[str, str]]:
    try:
        tolerance_of(task)
    except DataError:
        found = task.meta[TOLERANCE_FIELD]
        return [
            (
                f"extra_info.{TOLERANCE_FIELD}",
                f"{found!r:.80} is no number from 0 on; write a share, 0.05 for 5 percent",
            )
        ]
    return []
