"""Numbers within a tolerance, and lists of numbers. Decimals are compared exactly, so that a bound is one."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np

from foveate.errors import DataError
from foveate.records import Score, Task
from foveate.registry import NotNegative, Share
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
_SCALES = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "mn": 6, "mln": 6, "billion": 9, "bn": 9, "trillion": 12}
_SCALES |= {"tn": 12, "lakh": 5, "crore": 7}
_ONE = ("a", "an", "one")
_LETTERS = {"K": 3, "M": 6, "B": 9, "T": 12}
"""Letters right behind a number that may scale it, and may be units: 5K, 2.5M."""
_NO_LABEL = (
    r"(?:or|and|not|to|plus|minus|over|divided|squared|cubed|choose|dozen|mod|factorial|(?-i:[xyznieπ]))(?![A-Za-z])"
    r"|[A-Za-z]*(?:\^|_)?\{?\\?(?:sqrt|pi|frac|log|ln|sin|cos|tan)\b"
)
"""What makes of a number something else, and is no label of it."""
_CIRC = r"\^?\{?\\circ\b\}?"
_WORD = r"[A-Za-z$€£¥][\w^{}²³/.-]{0,20}"
_QUANTITY = re.compile(
    rf"(?:[A-Za-z]\w{{0,20}}\s*(?:=|\\approx|≈)\s*)?(?:about|approximately|around|roughly|\\approx|≈|~)?\s*"
    rf"(?P<sign>[-+]?)\s*(?:USD|US\$|\\?[$€£¥])?\s*(?P<under>[-+]?)"
    rf"(?:(?P<units>\d{{1,30}})(?:\s*(?=\\[dt]?frac)|\s+(?=\d{{1,30}}\s*/)))?"
    rf"(?:\\[dt]?frac\s*\{{(?P<above>{_PLAIN})\}}\s*\{{(?P<below>{_PLAIN})\}}"
    rf"|10\s*\^\s*\{{?(?P<tens>[-+]?\d{{1,3}})(?!\d)\}}?"
    rf"|(?P<number>{_PLAIN}){_POWER}(?:\s*/\s*(?P<over>\d{{1,30}}))?)"
    r"(?P<letter>(?-i:[KMBT])(?![A-Za-z/²³^]))?"
    rf"\s*(?P<scale>(?:{'|'.join(_SCALES)})\b)?(?P<percent>\s*(?:\\?%|percent\b|per\s?cent\b))?"
    rf"(?:(?:\s|\\[,;:!]|\\(?=[ %]|degree|[mM]u\b|Omega|ohm)|[,°]|{_CIRC})*(?!{_NO_LABEL})"
    rf"(?P<label>{_WORD}(?:\s+{_WORD}){{0,3}}))?(?:[\s°]|{_CIRC})*\.?",
    re.IGNORECASE,
)
_ANY_NUMBER = re.compile(r"(?:(?<![\w.\])])-)?(?<![A-Za-z_.\d])(?:\d+(?:\.\d+)?|\.\d+)")
_INLINE = re.compile(r"\\[()\[\]]")
_LONGEST = 200


class ReadNumber(NamedTuple):
    """A number that a text is, in percent where it says so. scaled: what it may mean as well, with a letter such as M
    behind it, which is a million or a unit."""

    value: Decimal
    percent: bool
    scaled: Decimal | None = None


def read_number(text: str) -> ReadNumber | None:
    r"""The number that a text is, or None: in digits or words, with commas between thousands, a power of ten, a
    fraction, a mixed number, money, percent, `million`, a name before it (`x = 5`) and a label of up to four words
    behind it, but no word that makes it another one (`5 or 6`, `5 squared`)."""
    bare = " ".join(_INLINE.sub("", unwrapped(unified(text[:_LONGEST]))).strip().strip("$").split())
    found = _QUANTITY.fullmatch(bare) or _QUANTITY.fullmatch(in_digits(bare)) or _QUANTITY.fullmatch(last_value(bare))
    if found is None or any(in_digits(word) != word for word in (found["label"] or "").split() if word not in _ONE):
        return None
    above, below = (
        (found["above"], found["below"]) if found["above"] else (found["number"] or "1", found["over"] or "1")
    )
    denominator = _decimal(below)
    if not denominator:
        return None
    value = _decimal(above).scaleb(int(found["power"] or found["tens"] or 0)) / denominator + int(found["units"] or 0)
    value = value.scaleb(_SCALES.get((found["scale"] or "").lower(), 0))
    value = -value if "-" in (found["sign"], found["under"]) else value
    return ReadNumber(
        value, bool(found["percent"]), value.scaleb(_LETTERS[found["letter"]]) if found["letter"] else None
    )


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def within(given: ReadNumber, wanted: ReadNumber, tolerance: float) -> bool:
    """Whether |given - wanted| <= tolerance |wanted|, exactly; with a tolerance of 0 they agree to 6 digits
    (`numbers.close`). Where one of them is in percent, the other may be so, too, or a share: 50 % is 50 and 0.5."""
    return any(
        _is_within(value, truth, tolerance)
        for value, truth in itertools.product(_meanings(given, wanted.percent), _meanings(wanted, wanted.percent))
    )


def _meanings(number: ReadNumber, percent: bool) -> Iterator[Decimal]:
    """The values that a number may have beside one that is, or is not, in percent."""
    for value in (number.value, number.scaled):
        if value is not None:
            yield value
            if number.percent != percent:
                yield value.scaleb(-2 if number.percent else 2)


def _is_within(value: Decimal, truth: Decimal, tolerance: float) -> bool:
    if not tolerance:
        return close(value, truth, _DIGITS)
    return abs(value - truth) <= Decimal(repr(tolerance)) * abs(truth)


def numeric(text: str, task: Task, *, tolerance: NotNegative = RELAXED, extraction: Extraction = "text") -> Score:
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
    tolerance: NotNegative = RELAXED,
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
        each = [numbers_of(one) if isinstance(one, str | int | float | np.generic) else [] for one in value]
        return [number for numbers in each for number in numbers] if all(each) else []
    if isinstance(value, int | float | np.generic) and not isinstance(value, bool):
        return [float(value)] if math.isfinite(value) else []
    return [float(one) for one in _ANY_NUMBER.findall(unified(value))] if isinstance(value, str) else []


def number_list(text: str, task: Task, *, partial: Share = 0.2, extraction: Extraction = "text") -> Score:
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
    return [
        (
            GROUND_TRUTH,
            f"{task.answer!r:.80} holds no numbers, or something else beside them; write a list of finite numbers",
        )
    ]


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
