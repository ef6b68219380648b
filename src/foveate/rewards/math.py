r"""Mathematical answers, compared by value: numbers, expressions, intervals, sets, units, percent, fractions, choices.

Expressions are read with the `math-verify` library (`pip install 'foveate[math]'`); around it stand what it leaves out:
Unicode signs, mixed numbers, exponents like 1.5e3, units (`foveate.rewards.units`), words and names of points
(`foveate.rewards.names`), lists and points, numbers of any size, and multiple choice. A comparison of hostile
expressions can take for ever: run it in worker processes with a time limit (`foveate.rewards.pool`).
"""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from foveate.errors import ConfigError
from foveate.records import Score, Task
from foveate.rewards.asked import same_as_asked
from foveate.rewards.brackets import closing_bracket, entries_of, parts_of
from foveate.rewards.choices import named_option, options, right_option, several_options
from foveate.rewards.conditions import as_intervals
from foveate.rewards.equations import same_equations, sides
from foveate.rewards.labelled import same_parts
from foveate.rewards.latex import tidy
from foveate.rewards.names import FUNCTIONS, has_words, same_plain, same_wording, with_names_as_symbols
from foveate.rewards.numbers import close, decimal_of, same_fractions
from foveate.rewards.phrases import same_phrases
from foveate.rewards.plain_text import stated_answer, unified, unwrapped
from foveate.rewards.readings import readings
from foveate.rewards.statements import asks_for_order, coordinates, same_times, without_additions
from foveate.rewards.text import Extraction, question, score_final_answer
from foveate.rewards.units import DEGREE, Quantity, as_beside, same_label, split_unit

try:
    import math_verify
    import sympy
    from latex2sympy2_extended import NormalizationConfig
except ImportError:
    raise ConfigError(
        "rewards of mathematical answers need the math-verify library, which is not installed; "
        "install it with: pip install 'foveate[math]'"
    ) from None

# It warns that it runs without a limit of its own: limits are the business of the worker processes.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_ANSWER_LENGTH = 1000
"""Characters of a final answer that are looked at; a longer one is wrong."""

_PERCENT = re.compile(r"\s*(?:\\?%|\\?\bpercent)$")
_RIGHT_LETTER = re.compile(r"[(【]?([A-J])(?:$|[.:)、】])")
_BLACKBOARD = re.compile(r"\\mathbb\s*\{?\s*([A-Z])\s*\}?")
_SPACED = re.compile(r"-?\d+(?:\.\d+)?(?: -?\d+(?:\.\d+)?){2,}")
"""A list whose entries stand apart only."""
_GAP = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_UNION = r"\cup"
_DOTS = r"\dots"
_ARROW = r"\to"
_NEXT = re.compile(
    r"\s*(?:-*\\to|\\(?:Long)?[Rr]ightarrow|⇒|⟶|➡|=+>)(?![A-Za-z])\s*|,?\s+(?:and\s+)?(?:then|followed\s+by)\s+"
)
"""What says that the next entry of a sequence follows."""
_COLON = re.compile(r"\s*:\s*")
_ORDERED = (sympy.Interval, sympy.Tuple)
_TWO_NUMBERS = re.compile(r"(?<![_^\d.])[\d.]+\s+[\d.]")
_BARE_FUNCTION = re.compile(
    r"(?<![\\A-Za-z_])(" + "|".join(sorted(FUNCTIONS - {"sqrt"}, key=len, reverse=True)) + r")(?![A-Za-z])"
)
_EXPONENT = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![A-Za-z\d.])")
_INDEX = re.compile(r"(?<![A-Za-z\\{])([A-Za-z])(\d+)(?![A-Za-z\d])")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ROUNDING = Decimal("1e-12")
"""The relative error that decimals have in the parser, which keeps 15 digits of them."""
_EXACT = Decimal("1e-20")
"""The relative error of expressions without decimals, at numbers of 40 digits."""
_LATEX = math_verify.LatexExtractionConfig(
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
)


def math_reward(text: str, task: Task, *, extraction: Extraction = "box", digits: int = 6) -> Score:
    r"""1 if the final answer of a text has the value of the ground truth (see `same_answer`), else 0.

    With extraction "box" the answer is the last balanced `\boxed{...}`, and a text without one is worth 0. With "text"
    it may also stand in `<answer>` tags or be the whole text after `</think>`, or what a sentence there says it is. A
    ground truth that is a list accepts any of its entries. Parts: accuracy; parsed, 1 if a final answer was found.
    Raises DataError for a ground truth that is neither text nor number.
    """

    def is_right(answer: str, accepted: list[str]) -> bool:
        return any(matches(answer, one, task, digits) for one in accepted)

    return score_final_answer(text, task, extraction, is_right)


def matches(answer: str, truth: str, task: Task, digits: int = 6) -> bool:
    """Whether an answer to a task is right. Of a multiple choice, letter and value stand for each other: a value is
    right if it is the value of the right letter, and a letter if its value is the right one."""
    return any(_reads_as(reading, truth, task, digits) for reading in dict.fromkeys(readings(answer, question(task))))


def _reads_as(answer: str, truth: str, task: Task, digits: int) -> bool:
    if same_plain(answer, truth):
        return True
    answer = stated_answer(unwrapped(answer))
    values, asked = options(task), question(task)
    if values and right_option(truth, values) is None and (wanted := several_options(truth, values)):
        return several_options(answer, values) == wanted
    right = _RIGHT_LETTER.match(stated_answer(unified(truth)))
    letter = named_option(answer, values) if right or values else None
    if right and letter:
        return letter == right[1]
    if right and values:
        return right[1] in values and same_answer(answer, values[right[1]], digits, asked)
    if letter and letter in values and same_answer(values[letter], truth, digits, asked):
        return True
    return same_answer(answer, truth, digits, asked)


def same_answer(answer: str, truth: str, digits: int = 6, asked: str = "") -> bool:
    r"""Whether two answers, as text or LaTeX, have the same value. `asked` is the question, whose variables are known.

    - Numbers are equal when they differ by less than 10^-`digits`, or below 1 by half a unit of that many significant
      digits: 0.333333 is 1/3, and 1e-19 is not 2e-19. 1,000 is 1000, and 1.5e3 is 1500.
    - Expressions are equal when their difference simplifies to 0: `\sqrt{8}` is `2\sqrt{2}`, 2/4 is 1/2.
    - Words and names of points are text, see `foveate.rewards.names`; so is whatever holds an ellipsis.
    - Conditions, times of day and dates have one form, see `foveate.rewards.statements`; numbers may be words.
    - A percentage stands for itself and for its fraction: 50% is 0.5, and 50. An angle of 60 degrees is pi/3.
    - Intervals, points and vectors must agree in brackets and order. Sets and lists without brackets have no order.
    - `x = 5` is 5, but `x^2 = 4` and `2x = 4` are not 4. Case and `\text{}` of words do not matter.
    - A unit may be left out on one side; two units must measure the same, and are converted: 5 m is 500 cm, not 5 cm.

    An answer of more than `MAX_ANSWER_LENGTH` characters, or one that cannot be read as mathematics, is right only if
    it equals the truth as text.
    """
    if same_plain(answer, truth):
        return True
    return len(answer) <= MAX_ANSWER_LENGTH and _same(tidy(answer), tidy(truth), digits, asked)


def _same(given: str, wanted: str, digits: int, asked: str) -> bool:
    if _without_marks(given) == _without_marks(wanted):
        return True
    verdict = same_parts(given, wanted, lambda one, other: _same(one, other, digits, asked))
    if verdict is not None:
        return verdict
    given, wanted = without_additions(given, wanted)
    if not given or not wanted or _DOTS in given + wanted:
        return False
    if given[-1].isdigit() and wanted[-1].isdigit():  # most answers are plain numbers
        numbers = decimal_of(given), decimal_of(wanted)
        if numbers[0] is not None and numbers[1] is not None:
            return close(numbers[0], numbers[1], digits)
    for compared in _COMPARISONS:
        verdict = compared(given, wanted, digits, asked)
        if verdict is not None:
            return verdict
    return _same_quantities(split_unit(given), split_unit(wanted), digits)


def _without_marks(text: str) -> str:
    """Text without spaces, and without the marks of indices where no other braces are: `H_2O` is `H2O`."""
    text = _GAP.sub("", _BLACKBOARD.sub(r"\1", text))
    return text if "\\" in text.replace(_ARROW, "") or "^" in text else re.sub("[_{}]", "", text)


# ------------------------------------------------------------------------------------- lists, words and equations


def _same_statements(given: str, wanted: str, digits: int, asked: str) -> bool | None:  # noqa: ARG001
    """The verdict on two times of day, and on conditions of which one is a union of intervals or may be written so."""
    one, other = as_intervals(given), as_intervals(wanted)
    if (one or other) and not (one and other and one[0] != other[0]):
        ranges = one[1] if one else given, other[1] if other else wanted
        same = _same_value(*ranges, digits)
        if same or _UNION in given + wanted:
            return same
    if f"Quadrant {given}" == wanted or f"Quadrant {wanted}" == given:
        return True
    return same_times(given, wanted)


def _same_as_asked(given: str, wanted: str, digits: int, asked: str) -> bool | None:
    """True for a form of the same answer that the question allows, see `foveate.rewards.asked`."""
    return same_as_asked(given, wanted, asked, lambda one, other: _same(one, other, digits, ""))


def _same_phrases(given: str, wanted: str, digits: int, asked: str) -> bool | None:
    return same_phrases(given, wanted, lambda one, other: _same(one, other, digits, asked))


def _same_lists(given: str, wanted: str, digits: int, asked: str) -> bool | None:
    """The verdict on two lists, sets, points or intervals; None unless both have several entries."""
    (name, one, entries), (other_name, other, expected) = entries_of(given), entries_of(wanted)
    if len(entries) == 1 and len(expected) > 2 and _SPACED.fullmatch(given):
        entries = given.split()
    if len(entries) < 2 or len(expected) < 2:
        return None
    if len(entries) != len(expected) or (name and other_name and name != other_name):
        return False
    if {one, other} == {"", "()"}:
        bare, point = (entries, expected) if not one else (expected, entries)
        values = coordinates(bare)
        return values is not None and all(_same(a, b, digits, asked) for a, b in zip(values, point, strict=True))
    if {one, other} <= {"", "{}"} and not (one == other == "" and asks_for_order(asked)):
        left = list(expected)
        for entry in entries:
            place = next((i for i, wish in enumerate(left) if _same(entry, wish, digits, asked)), None)
            if place is None:
                return False
            left.pop(place)
        return True
    return one == other and all(_same(a, b, digits, asked) for a, b in zip(entries, expected, strict=True))


def _same_sequences(given: str, wanted: str, digits: int, asked: str) -> bool | None:
    """The verdict on a sequence joined by arrows, or by `then`, and a list, in their order; None for anything else. Two
    entries are one only where the question asks for an order: `A \\to B` may be a mapping."""
    chains = [parts_of(text, _NEXT) for text in (given, wanted)]
    if (len(chains[0]) > 1) == (len(chains[1]) > 1):
        return None
    chain, text = (chains[0], wanted) if len(chains[0]) > 1 else (chains[1], given)
    _, brackets, entries = entries_of(text)
    if brackets or len(entries) < (2 if asks_for_order(asked) else 3):
        return None
    return len(chain) == len(entries) and all(_same(a, b, digits, asked) for a, b in zip(chain, entries, strict=True))


def _same_ratios(given: str, wanted: str, digits: int, asked: str) -> bool | None:  # noqa: ARG001
    """The verdict on two ratios of three numbers or more."""
    one, other = parts_of(given, _COLON), parts_of(wanted, _COLON)
    if len(one) < 3 or len(other) < 3:
        return None
    return len(one) == len(other) and all(
        _same_value(rf"({a}) \cdot ({other[0]})", rf"({b}) \cdot ({one[0]})", digits)
        for a, b in zip(one, other, strict=True)
    )


def _same_words(given: str, wanted: str, digits: int, asked: str) -> bool | None:  # noqa: ARG001
    """The verdict on words and names; an equation says them of something, see `foveate.rewards.equations`."""
    one_equation = len(sides(given)) > 1, len(sides(wanted)) > 1
    return None if one_equation[0] != one_equation[1] else same_wording(given, wanted, asked)


def _same_equations(given: str, wanted: str, digits: int, asked: str) -> bool | None:
    return same_equations(given, wanted, asked, lambda one, other: _same(one, other, digits, asked))


_COMPARISONS = (
    _same_as_asked, _same_statements, _same_phrases, _same_sequences, _same_lists, _same_ratios, _same_words,
    _same_equations,
)  # fmt: skip
"""The comparisons of anything but quantities, in the order in which they are asked for a verdict."""


# ---------------------------------------------------------------------------------------------------- quantities


def _same_quantities(given: Quantity, wanted: Quantity, digits: int) -> bool:
    given, wanted = as_beside(given, wanted)
    one, other = (q.value if closing_bracket(q.value) else _THOUSANDS.sub("", q.value) for q in (given, wanted))
    if given.unit and wanted.unit:
        if given.unit.measure != wanted.unit.measure:
            return False
        if given.unit != wanted.unit:
            one, other = (
                rf"({value}) \cdot {unit.factor} + {unit.offset}"
                for value, unit in ((one, given.unit), (other, wanted.unit))
            )
    elif (given.unit and wanted.label) or (given.label and wanted.unit):
        return False
    if (given.unit or wanted.unit) and bool(_PERCENT.search(one)) != bool(_PERCENT.search(other)):
        return False
    if not same_label(given.label, wanted.label):
        return False
    if has_words(one) or has_words(other):
        return one.casefold().split() == other.casefold().split()
    one, other = one.replace("°", ""), other.replace("°", "")
    if _same_value(one, other, digits):
        return True
    if DEGREE not in (given.unit, wanted.unit) or (given.unit and wanted.unit) or given.label or wanted.label:
        return False
    turned = [rf"({q.value}) \cdot \frac{{\pi}}{{180}}" if q.unit else q.value for q in (given, wanted)]
    return _same_value(turned[0], turned[1], digits)


@lru_cache(maxsize=16_384)
def _same_value(answer: str, truth: str, digits: int) -> bool:
    if _GAP.sub("", answer) == _GAP.sub("", truth):
        return True
    if ("'" in answer) != ("'" in truth):
        return False
    if _PERCENT.search(answer) or _PERCENT.search(truth):
        return _same_percentage(answer, truth, digits)
    given, wanted = decimal_of(answer), decimal_of(truth)
    if given is not None and wanted is not None:
        return close(given, wanted, digits)
    shortly = same_fractions(answer, truth, digits)
    if shortly is not None:
        return shortly
    if _TWO_NUMBERS.search(answer) or _TWO_NUMBERS.search(truth):
        return False
    parsed = _parse(answer), _parse(truth)
    if parsed[0] is None or parsed[1] is None:
        return False
    parsed = tuple(
        sympy.expand_log(e, force=True) if isinstance(e, sympy.Expr) and e.has(sympy.log) else e for e in parsed
    )
    verdict = _compared(parsed[0], parsed[1], digits)
    if verdict is not None:
        return verdict
    return math_verify.verify(
        parsed[1], parsed[0], float_rounding=digits, timeout_seconds=None, allow_set_relation_comp=True
    )


def _same_percentage(answer: str, truth: str, digits: int) -> bool:
    """Of two percentages the numbers are compared; against a plain number, a percentage is its number or a fraction."""
    number, wanted = _PERCENT.sub("", answer), _PERCENT.sub("", truth)
    if _same_value(number, wanted, digits):
        return True
    if answer == number:
        return _same_value(number, rf"\frac{{{wanted}}}{{100}}", digits)
    return truth == wanted and _same_value(rf"\frac{{{number}}}{{100}}", wanted, digits)


def _compared(given: Any, wanted: Any, digits: int) -> bool | None:
    """The verdict on two expressions by their values, each variable at a number of its own: two numbers are equal or
    not; with variables most wrong answers are told apart so, without the simplification by which equal ones are found
    equal. None where values do not say it."""
    listed, ordered = (any(isinstance(e, kind) for e in (given, wanted)) for kind in (sympy.FiniteSet, _ORDERED))
    if listed and ordered:
        return False  # math-verify takes a list for a point
    expressions = given, wanted
    if any(isinstance(e, sympy.Expr) and e.has(sympy.I) for e in expressions):
        expressions = tuple(e.subs(sympy.Symbol("i"), sympy.I) for e in expressions)
    if not all(isinstance(e, sympy.Expr) and not e.is_Symbol for e in expressions):
        return None
    names = sorted({symbol.name for e in expressions for symbol in e.free_symbols})
    if names == ["i"]:  # alone, it is the imaginary unit
        expressions, names = [e.subs(dict.fromkeys(e.free_symbols, sympy.I)) for e in expressions], []
    at = {name: sympy.Float("0.7312", 40) + i * sympy.Float("0.1371", 40) for i, name in enumerate(names)}
    rounded = any(e.has(sympy.Float) for e in expressions)
    values = [e.subs({symbol: at[symbol.name] for symbol in e.free_symbols}).evalf(30) for e in expressions]
    difference, size = (abs(value).evalf(30) for value in (values[0] - values[1], values[1]))
    if not all(isinstance(value, sympy.Number) and value.is_finite for value in (difference, size)):
        return None
    distance, magnitude = (Decimal(str(value)) for value in (difference, size))
    if not magnitude:  # a value that cancels out keeps a rounding error of 100 digits
        return distance < Decimal("1e-100") if not names else None
    if not names:
        return close(magnitude + distance, magnitude, digits) or (rounded and distance <= magnitude * _ROUNDING)
    return False if distance > magnitude * (Decimal(10).scaleb(-digits) if rounded else _EXACT) else None


@lru_cache(maxsize=4096)
def _parse(latex: str) -> Any:
    """The expression that math-verify reads in the whole of a text, or None: never in a part of it."""
    latex = _EXPONENT.sub(r"\1 \\times 10^{\2}", with_names_as_symbols(latex))
    latex = _INDEX.sub(r"\1_{\2}", _BARE_FUNCTION.sub(r"\\\1 ", latex)).replace(r"\varnothing", r"\emptyset")
    unlimited: Any = None
    found = math_verify.parse(
        f"${latex}$", extraction_config=[_LATEX], fallback_mode="no_fallback", parsing_timeout=unlimited
    )
    return found[0] if found else None
