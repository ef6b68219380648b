r"""Mathematical answers, compared by value: numbers, expressions, intervals, sets, units, percent, fractions, choices.

Values are compared with the `math-verify` library (`pip install 'foveate[math]'`); around it stand what it leaves out:
Unicode signs, mixed numbers, exponents like 1.5e3, units, and multiple choice. A comparison of hostile expressions can
take for ever: run it in worker processes with a time limit (`foveate.rewards.pool`).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from foveate.errors import ConfigError
from foveate.records import Score, Task
from foveate.rewards.text import Extraction, choice_letter, options, plain, score_final_answer

try:
    import math_verify
    import sympy
except ImportError:
    raise ConfigError(
        "rewards of mathematical answers need the math-verify library, which is not installed; "
        "install it with: pip install 'foveate[math]'"
    ) from None

# It warns that it runs without a limit of its own: limits are the business of the worker processes.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_ANSWER_LENGTH = 1000
"""Characters of a final answer that are looked at; a longer one is wrong."""

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_FRACTION = re.compile(
    r"(?P<sign>[-+]?)(?:\\[dt]?frac\{(?P<above>\d{1,30}(?:\.\d{1,30})?)\}\{(?P<below>\d{1,30})\}|(?P<over>\d{1,30})/(?P<under>\d{1,30})"
    r"|(?P<whole>\d{1,30}(?:\.\d{1,30})?))"
)
_MIXED = re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_EXPONENT = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![A-Za-z\d.])")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
_PERCENT = re.compile(r"\s*(?:\\?%|\\?\bpercent)$")
_RIGHT_LETTER = re.compile(r"\(?([A-J])(?:$|[.:)])")
_TERM = re.compile(r"(?:\d+[A-Za-z]|[A-Za-z]\s*\^)[^=]*=[^=]*")
_SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "θ": r"\theta ",
        "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "\u00a0": " ",
    }
)  # fmt: skip


def math_reward(text: str, task: Task, *, extraction: Extraction = "box", digits: int = 6) -> Score:
    r"""1 if the final answer of a text has the value of the ground truth (see `same_answer`), else 0.

    With extraction "box" the answer is the last balanced `\boxed{...}`, and a text without one is worth 0. With "text"
    it may also stand in `<answer>` tags or be the whole text after `</think>`. A ground truth that is a list accepts
    any of its entries. Parts: accuracy; parsed, 1 if a final answer was found. Raises DataError for a ground truth
    that is neither text nor number.
    """
    return score_final_answer(
        text, task, extraction, lambda answer, accepted: any(matches(answer, one, task, digits) for one in accepted)
    )


def matches(answer: str, truth: str, task: Task, digits: int = 6) -> bool:
    """Whether an answer to a task is right. Of a multiple choice, letter and value stand for each other: a value is
    right if it is the value of the right letter, and a letter if its value is the right one."""
    if plain(answer) == plain(truth):
        return True
    values = options(task)
    letter = choice_letter(answer)
    right = _RIGHT_LETTER.match(truth)
    if right:
        return letter == right[1] if letter else right[1] in values and same_answer(answer, values[right[1]], digits)
    return same_answer(values.get(letter or "", answer), truth, digits)


def same_answer(answer: str, truth: str, digits: int = 6) -> bool:
    r"""Whether two answers, as text or LaTeX, have the same value.

    - Numbers are equal when they differ by less than 10^-`digits`, or that part of the truth if it is below 1: 0.333333
      is 1/3. 1,000 is 1000, and 1.5e3 is 1500.
    - Expressions are equal when their difference simplifies to 0: `\sqrt{8}` is `2\sqrt{2}`, 2/4 is 1/2.
    - A percentage stands for itself and for its fraction: 50% is 0.5, and 50.
    - Intervals must agree in both ends and brackets. Sets and lists without brackets have no order.
    - `x = 5` is 5, but `x^2 = 4` and `2x = 4` are not 4. Case and `\text{}` of words do not matter.
    - A unit may be left out on one side; two units must measure the same, and are converted: 5 m is 500 cm, not 5 cm.

    An answer of more than `MAX_ANSWER_LENGTH` characters, or one that cannot be read as mathematics, is right only if
    it equals the truth as text.
    """
    if plain(answer) == plain(truth):
        return True
    if len(answer) > MAX_ANSWER_LENGTH:
        return False
    given, wanted = _read(answer), _read(truth)
    if given.unit and wanted.unit:
        if given.unit.measure != wanted.unit.measure:
            return False
        if given.unit.factor != wanted.unit.factor:
            given, wanted = (Quantity(rf"({q.value}) \cdot {q.unit.factor}", None) for q in (given, wanted) if q.unit)
    return _same_value(given.value, wanted.value, digits)


@lru_cache(maxsize=16_384)
def _same_value(answer: str, truth: str, digits: int) -> bool:
    if answer.replace(" ", "") == truth.replace(" ", ""):
        return True
    if _PERCENT.search(answer) or _PERCENT.search(truth):
        return _same_percentage(answer, truth, digits)
    given, wanted = _decimal(answer), _decimal(truth)
    if given is not None and wanted is not None:
        return abs(given - wanted) <= min(abs(wanted), Decimal(1)).scaleb(-digits)
    plainly = _plain_equality(answer, truth, digits)
    if plainly is not None:
        return plainly
    if any(_TERM.fullmatch(one) and "=" not in other for one, other in ((answer, truth), (truth, answer))):
        return False
    parsed = _parse(answer), _parse(truth)
    if all(parsed) and _plainly_differ(parsed[0][0], parsed[1][0], digits):
        return False
    return math_verify.verify(parsed[1], parsed[0], float_rounding=digits, timeout_seconds=None)


def _plain_equality(answer: str, truth: str, digits: int) -> bool | None:
    """The verdict of math-verify on two fractions of whole numbers or two intervals between such, without the parser,
    which takes milliseconds; None where it must be asked: for anything else, and for values that nearly agree."""
    given, wanted = _fraction(answer), _fraction(truth)
    if given is not None and wanted is not None:
        return _near(given, wanted, digits)
    one, other = _interval(answer), _interval(truth)
    if one is None or other is None:
        return None
    ends = [_near(a, b, digits) for a, b in zip(one[1:], other[1:], strict=True)]
    if one[0] != other[0] or False in ends:
        return False
    return None if None in ends else True


def _near(given: Fraction, wanted: Fraction, digits: int) -> bool | None:
    """Whether two numbers are the same, or plainly are not; None in between."""
    difference = abs(given - wanted)
    if difference > 2 * Fraction(10) ** -digits * max(abs(wanted), 1):
        return False
    return None if difference else True


def _fraction(text: str) -> Fraction | None:
    found = _FRACTION.fullmatch(text)
    if found is None:
        return None
    above, below = found["above"] or found["over"] or found["whole"], found["below"] or found["under"] or "1"
    value = Fraction(above) / int(below) if int(below) else None
    return -value if value is not None and found["sign"] == "-" else value


def _interval(text: str) -> tuple[str, Fraction, Fraction] | None:
    """The brackets and the ends of `[1, 5/2)`, if the first end is the smaller one: others are read as pairs."""
    inside = text[1:-1].split(",")
    if len(inside) != 2 or text[0] not in "[(" or text[-1] not in "])":
        return None
    low, high = (_fraction(end.strip()) for end in inside)
    return (text[0] + text[-1], low, high) if low is not None and high is not None and low < high else None


def _same_percentage(answer: str, truth: str, digits: int) -> bool:
    """Of two percentages the numbers are compared; against a plain number, a percentage is its number or a fraction."""
    number, wanted = _PERCENT.sub("", answer), _PERCENT.sub("", truth)
    if _same_value(number, wanted, digits):
        return True
    if answer == number:
        return _same_value(number, rf"\frac{{{wanted}}}{{100}}", digits)
    return truth == wanted and _same_value(rf"\frac{{{number}}}{{100}}", wanted, digits)


def _plainly_differ(given: Any, wanted: Any, digits: int) -> bool:
    """Whether two expressions have different values at one point, each variable at a number of its own. Most wrong
    answers are told apart so, without the simplification by which equal ones are found equal."""
    expressions = given, wanted
    if not all(isinstance(e, sympy.Expr) and not e.is_Symbol for e in expressions):
        return False
    names = sorted({symbol.name for e in expressions for symbol in e.free_symbols})
    at = {name: 0.7312 + 0.1371 * i for i, name in enumerate(names)}
    values = [e.subs({symbol: at[symbol.name] for symbol in e.free_symbols}).evalf(20) for e in expressions]
    difference, size = (abs(value).evalf(20) for value in (values[0] - values[1], values[1]))
    if not all(isinstance(value, sympy.Number) and value.is_finite for value in (difference, size)):
        return False
    return bool(difference > 2 * 10.0**-digits * max(size, 1))


@lru_cache(maxsize=4096)
def _read(answer: str) -> Quantity:
    """The value of an answer in LaTeX that math-verify reads, and its unit."""
    answer = answer.strip().strip("$").strip()
    for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]")):
        if answer.startswith(opening) and answer.endswith(closing):
            answer = answer[2:-2]
    quantity = split_unit(answer)
    value = _MIXED.sub(r"\1\\frac{\2}{\3}", quantity.value)
    value = _ROOT.sub(lambda found: rf"\sqrt{{{found.group(1) or found.group(2)}}}", value)
    return Quantity(value.translate(_SIGNS).strip().rstrip(".").strip(), quantity.unit)


def _decimal(text: str) -> Decimal | None:
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


@lru_cache(maxsize=4096)
def _parse(latex: str) -> list[Any]:
    latex = _EXPONENT.sub(r"\1 \\times 10^{\2}", latex)
    return math_verify.parse(f"${latex}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


# -------------------------------------------------------------------------------------------------------------- units


@dataclass(frozen=True, slots=True)
class Unit:
    """A measure, such as ("length", 2) for an area, and the factor to the base unit of that measure."""

    measure: tuple[str, int]
    factor: Fraction


@dataclass(frozen=True, slots=True)
class Quantity:
    """The value of an answer as text, and its unit if it has one."""

    value: str
    unit: Unit | None


_UNITS: dict[str, tuple[str, str]] = {
    "nm|nanomet(?:er|re)s?": ("length", "1/1000000000"),
    "[μµ]m|micromet(?:er|re)s?": ("length", "1/1000000"),
    "mm|millimet(?:er|re)s?": ("length", "1/1000"),
    "cm|centimet(?:er|re)s?": ("length", "1/100"),
    "dm|decimet(?:er|re)s?": ("length", "1/10"),
    "m|met(?:er|re)s?": ("length", "1"),
    "km|kilomet(?:er|re)s?": ("length", "1000"),
    "in|inch|inches": ("length", "127/5000"),
    "ft|foot|feet": ("length", "381/1250"),
    "yd|yards?": ("length", "1143/1250"),
    "mi|miles?": ("length", "201168/125"),
    "units?": ("unit", "1"),
    "mg|milligrams?": ("mass", "1/1000"),
    "g|grams?": ("mass", "1"),
    "kg|kilograms?": ("mass", "1000"),
    "lbs?|pounds?": ("mass", "45359237/100000"),
    "oz|ounces?": ("mass", "45359237/1600000"),
    "ms|milliseconds?": ("time", "1/1000"),
    "s|sec|seconds?": ("time", "1"),
    "min|minutes?": ("time", "60"),
    "h|hrs?|hours?": ("time", "3600"),
    "days?": ("time", "86400"),
    "weeks?": ("time", "604800"),
    "ml|mL|millilit(?:er|re)s?": ("volume", "1/1000000"),
    "l|L|lit(?:er|re)s?": ("volume", "1/1000"),
    "deg|degrees?": ("angle", "1"),
    "dollars?|USD": ("money", "1"),
    "cents?": ("money", "1/100"),
}
_KNOWN = {re.compile(names): (measure, Fraction(factor)) for names, (measure, factor) in _UNITS.items()}
_DEGREE = Unit(("angle", 1), Fraction(1))
_DOLLAR = Unit(("money", 1), Fraction(1))
_DEGREE_SIGNS = r"°|\^\{?\\circ\}?|\^\{?°\}?|\\degree"
_POWERS = {"": 1, "sq": 2, "sq.": 2, "square": 2, "cu": 3, "cu.": 3, "cubic": 3}
_ENDING = re.compile(
    rf"(?P<value>.*?[\w)}}\]])\s*(?:(?P<symbol>{_DEGREE_SIGNS})"
    r"|[\s](?P<kind>square|cubic|sq\.?|cu\.?)?\s*(?P<unit>[A-Za-zμµ]+)\.?\s*(?:\^?\s*\{?(?P<power>[23²³])\}?)?)\s*\.?",
    re.DOTALL,
)
_GLUED = re.compile(r"(\d)\s*(mm|cm|dm|km|m|kg|mg|ml|mL|ft|in)(?![A-Za-z])")
_UNIT_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textrm|operatorname)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\[,;:! ]|~|\\quad")
_CURRENCY = re.compile(r"\\?\$\s*(?=[\d.])|[€£¥]\s*(?=[\d.])")


def split_unit(answer: str) -> Quantity:
    r"""The value and the unit of an answer: `5 cm`, `5\text{ cm}^2`, `60^\circ`, `\$5`, `3 square feet`.

    A unit of one letter other than m must stand apart (`5 g`, `5\text{g}`): `5g` is five times g. What is no known unit
    stays with the value.
    """
    spaced = _SPACES.sub(" ", answer)
    if found := _CURRENCY.match(spaced):
        return Quantity(spaced[found.end() :].strip(), _DOLLAR if "$" in found.group() else None)
    spaced = _GLUED.sub(r"\1 \2", _UNIT_TEXT.sub(r" \1", spaced)).rstrip()
    ending = _ENDING.fullmatch(spaced)
    if ending is None:
        return Quantity(answer, None)
    if ending["symbol"]:
        return Quantity(ending["value"].strip(), _DEGREE)
    power = {None: 0, "2": 2, "²": 2, "3": 3, "³": 3}[ending["power"]] or _POWERS[ending["kind"] or ""]
    for names, (measure, factor) in _KNOWN.items():
        if names.fullmatch(ending["unit"]):
            dimension = ("length", 3) if measure == "volume" else (measure, power)
            return Quantity(ending["value"].strip(), Unit(dimension, factor**power))
    return Quantity(answer, None)
