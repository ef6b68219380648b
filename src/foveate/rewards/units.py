"""Units at the end of an answer: which one, and what it measures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Unit:
    """What is measured, such as ("length", 2) for an area, and the factor to the base unit of that measure."""

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
_SYMBOLS = r"°|\^\{?\\circ\}?|\^\{?°\}?|\\degree"
_POWERS = {"": 1, "sq": 2, "sq.": 2, "square": 2, "cu": 3, "cu.": 3, "cubic": 3}
_ENDING = re.compile(
    rf"(?P<value>.*?[\w)}}\]])\s*(?:(?P<symbol>{_SYMBOLS})"
    r"|[\s](?P<kind>square|cubic|sq\.?|cu\.?)?\s*(?P<unit>[A-Za-zμµ]+)\.?\s*(?:\^?\s*\{?(?P<power>[23²³])\}?)?)\s*\.?",
    re.DOTALL,
)
_GLUED = re.compile(r"(\d)\s*(mm|cm|dm|km|m|kg|mg|ml|mL|ft|in)(?![A-Za-z])")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mbox|textrm|operatorname)\s*\{([^{}]*)\}")
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
    spaced = _GLUED.sub(r"\1 \2", _WRAPPED.sub(r" \1", spaced)).rstrip()
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
