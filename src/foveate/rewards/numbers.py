"""Numbers in digits: decimals and fractions, exactly, without a parser of expressions."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")
_FRACTION = re.compile(
    r"(?P<sign>[-+]?)(?:\\[dt]?frac\{(?P<above>\d{1,30}(?:\.\d{1,30})?)\}\{(?P<below>\d{1,30})\}|(?P<over>\d{1,30})/(?P<under>\d{1,30})"
    r"|(?P<whole>\d{1,30}(?:\.\d{1,30})?))"
)


def close(given: Decimal, wanted: Decimal, digits: int) -> bool:
    """Whether two numbers agree: within 10^-digits, below 1 within half a unit of that many significant digits."""
    size = abs(wanted)
    allowed = Decimal(1) if size >= 1 else Decimal("0.5").scaleb(size.adjusted() + 1) if size else Decimal(0)
    return abs(given - wanted) <= allowed.scaleb(-digits)


def same_fractions(answer: str, truth: str, digits: int) -> bool | None:
    """The verdict on two fractions of whole numbers, without the parser, which takes milliseconds; None for others."""
    given, wanted = _fraction(answer), _fraction(truth)
    if given is None or wanted is None:
        return None
    return given == wanted or close(_as_decimal(given), _as_decimal(wanted), digits)


def _as_decimal(value: Fraction) -> Decimal:
    return Decimal(value.numerator) / value.denominator


def _fraction(text: str) -> Fraction | None:
    found = _FRACTION.fullmatch(text)
    if found is None:
        return None
    above, below = found["above"] or found["over"] or found["whole"], found["below"] or found["under"] or "1"
    value = Fraction(above) / int(below) if int(below) else None
    return -value if value is not None and found["sign"] == "-" else value


def decimal_of(text: str) -> Decimal | None:
    """The number that a text is, with or without commas between thousands; None for any other text."""
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
