"""Units: read by one grammar, as products of powers of prefixed names, and converted by their dimensions.

What stands behind a number and is no unit (`5 apples`) is a label. Both may be missing on one side of a comparison.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

_UNITS = """
m metre meter 米 | 1 | m | *
公里 | 1000 | m |
公斤 | 1000 | g |
g gram gramme 克 | 1 | g | *
s sec second 秒 | 1 | s | *
A amp ampere | 1 | A | *
K kelvin | 1 | K | *
mol mole | 1 | mol | *
cd candela | 1 | cd |
N newton | 1000 | g m s-2 | *
Nm | 1000 | g m2 s-2 |
J joule | 1000 | g m2 s-2 | *
W watt | 1000 | g m2 s-3 | *
Pa pascal | 1000 | g m-1 s-2 | *
Hz hertz | 1 | s-1 | *
C coulomb | 1 | A s | *
V volt | 1000 | g m2 s-3 A-1 | *
Ω ohm | 1000 | g m2 s-3 A-2 | *
S siemens | 1/1000 | g-1 m-2 s3 A2 | *
F farad | 1/1000 | g-1 m-2 s4 A2 | *
H henry | 1000 | g m2 s-2 A-2 | *
T tesla | 1000 | g s-2 A-1 | *
Wb weber | 1000 | g m2 s-2 A-1 | *
L l litre liter 升 | 1/1000 | m3 | *
eV electronvolt | 1602176634/10000000000000000000000000 | g m2 s-2 | *
cal calorie | 4184 | g m2 s-2 | *
Wh | 3600000 | g m2 s-2 | *
bar | 100000000 | g m-1 s-2 | *
atm atmosphere | 101325000 | g m-1 s-2 |
min minute 分钟 | 60 | s |
h hr hour 小时 时 | 3600 | s |
d day 天 | 86400 | s |
week 周 | 604800 | s |
yr year 年 | 31557600 | s |
month 月 | 2629800 | s |
in inch | 127/5000 | m |
ft foot feet | 381/1250 | m |
yd yard | 1143/1250 | m |
mi mile | 201168/125 | m |
mph | 1397/3125 | m s-1 |
mmHg torr | 101325000/760 | g m-1 s-2 |
cc | 1/1000000 | m3 |
dB decibel | 1 | dB |
mps | 1 | m s-1 |
M molar | 1000 | mol m-3 |
knot | 463/900 | m s-1 |
kph kmh | 5/18 | m s-1 |
lb pound | 45359237/100000 | g |
oz ounce | 45359237/1600000 | g |
t tonne ton 吨 | 1000000 | g |
ha hectare 公顷 | 10000 | m2 |
acre | 316160658/78125 | m2 |
gal gallon | 473176473/125000000000 | m3 |
rpm bpm | 1/60 | s-1 |
° deg degree 度 | 1 | ° |
rad radian 弧度 | 1 | |
unit | 1 | unit |
$ dollar USD 美元 | 1 | $ |
cent ¢ | 1/100 | $
penny pence | 1/100 | £ |
€ euro EUR 欧元 | 1 | € |
£ GBP 英镑 | 1 | £ |
¥ yen yuan RMB 元 | 1 | ¥ |
角 | 1/10 | ¥ |
₹ rupee Rs INR | 1 | ₹ |
byte B | 8 | bit | *
bit | 1 | bit | *
°C celsius centigrade ℃ | 1 | K |
°F fahrenheit | 5/9 | K |
"""
_OFFSETS = {"°C": Fraction(27315, 100), "°F": Fraction(45967, 180)}
_SYMBOL_PREFIXES = {
    "p": -12, "n": -9, "µ": -6, "μ": -6, "m": -3, "c": -2, "d": -1, "h": 2, "k": 3, "M": 6, "G": 9, "T": 12,
}  # fmt: skip
_WORD_PREFIXES = {
    "nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6, "giga": 9, "tera": 12,
    "毫": -3, "厘": -2, "分": -1, "千": 3, "微": -6, "兆": 6,
}  # fmt: skip
_POWER_WORDS = {"square": 2, "sq": 2, "平方": 2, "cubic": 3, "cu": 3, "立方": 3}
_BEHIND = {"squared": 2, "cubed": 3}
_JOINERS = frozenset((
    "and", "or", "nor", "not", "no", "to", "than", "but", "if", "when", "where", "is", "are", "per",
))  # fmt: skip
_NAME = (
    r"(?:\\mu\s*|\\text)?(?:°\s*[CF](?![A-Za-z])|°|(?:[A-Za-zµμ]\s*)?(?:\\Omega|Ω)|[A-Za-zµμ]+|\\?\$"
    r"|[€£¥₹¢]|[\u4e00-\u9fff]+)"
)
_TOKEN = re.compile(
    rf"\s*(?P<op>/|\\cdot|\\times|\*|·|-(?=[A-Za-z])|\bper\b)?\s*(?P<open>\()?\s*(?:(?P<kind>square|cubic|sq|cu)\b\.?\s*|(?P<hanzi>平方|立方))?"
    rf"(?P<name>{_NAME})\.?(?:\s*(?P<behind>squared|cubed)\b|(?:\s*\^\s*\{{?\s*|(?=\d)(?!\d\d))(?P<power>-?\d)\s*\}}?)?\s*(?P<close>\))?"
)
_START = re.compile(r"(?<=[\w)}\]!.°'|])\s*(?=[A-Za-z°Ωµμ€£¥₹¢\\\u4e00-\u9fff(])|(?<=[\d)}\]])\s*/\s*(?=[A-Za-z])")
_LABEL = re.compile(
    r"(?:(?:\s+of(?:\s+(?:an?|the))?)?\s+(?=[A-Za-z]*[aeiouyAEIOUY])[A-Za-z]{3,}[A-Za-z'-]*\.?)(?:\s+[A-Za-z][A-Za-z'-]*\.?){0,4}|\s*[\u4e00-\u9fff]{1,6}"
)
_MARKED_LETTER = re.compile(r"[A-Za-z][\^_]\{?-?[\d.]+\}?$")
_PART = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)\s*([A-Za-z]+|[\u4e00-\u9fff]{1,3})\.?")
_SEVERAL_HANZI = re.compile(r"(?:\d{1,12}(?:\.\d{1,12})?\s*[\u4e00-\u9fff]{1,3}\s*){2,4}")
_SEVERAL = re.compile(rf"{_PART.pattern}(?:(?:\s*,?\s+and)?\s+{_PART.pattern}){{1,3}}")
_PRIME = r"(?:'|\^\s*\{?(?:\s*\\prime){1,2}\s*\}?)"
_MINUTES = re.compile(
    rf"(\d{{1,6}})\s*°\s*(\d{{1,2}})\s*{_PRIME}(?!')(?:\s*(\d{{1,2}}(?:\.\d{{1,12}})?)\s*(?:''|\"|{_PRIME}))?"
)
_FEET = re.compile(r"(\d{1,6})\s*'\s*(\d{1,2}(?:\.\d{1,12})?)\s*(?:''|\")")
_PER_SECOND = re.compile(r"(?<![A-Za-z])([kcm]?m)s(?=\s*\^\s*\{?\s*-)")
"""The way to write metres per second as `ms^{-1}`, which are no milliseconds."""
_DEGREES_OF = re.compile(
    r"(?:degrees?|deg|°)\s*(?:(?=celsius|centigrade|fahrenheit)|([CF])(?![A-Za-z]))", re.IGNORECASE
)
_CURRENCY = re.compile(r"(?:US\s*)?\\?(\$|USD|EUR|GBP|Rs|[€£¥₹])\.?\s*(?=[\d.])")
_INSIDE = re.compile(r"\s+(?:the|an?|this|that|each|every|all|total|its?|my|our|his|her|their)\b", re.IGNORECASE)
"""Words behind the preposition `in`, which is no inch there."""
_PRICE = re.compile(r"^\\?([$€£¥₹])\s*([\d.,]+)\s*(?:/|per\b)\s*(?=[A-Za-z])")
_VALUE_END = re.compile(r"[\d)}\]!π.]$|\\(?!cdot$|times$|div$|pm$)[A-Za-z]+$|(?<![\\A-Za-z])[A-Za-z]+$")


@dataclass(frozen=True, slots=True)
class Unit:
    """A measure as powers of base units, such as (("m", 2),) for an area, and factor and offset to these base units."""

    measure: tuple[tuple[str, int], ...]
    factor: Fraction
    offset: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class Quantity:
    """The value of an answer as text, its unit if it has one, and the label behind it if that is no unit."""

    value: str
    unit: Unit | None = None
    label: str = ""


DEGREE = Unit((("°", 1),), Fraction(1))


def _table() -> dict[str, tuple[Unit, bool]]:
    found = {}
    for line in _UNITS.strip().split("\n"):
        names, factor, dimensions, *prefixed = (part.strip() for part in line.split("|"))
        powers = (re.fullmatch(r"(\D+?)(-?\d)?", one) for one in dimensions.split())
        measure = tuple(sorted((power[1], int(power[2] or 1)) for power in powers if power))
        for name in names.split():
            unit = Unit(measure, Fraction(factor), _OFFSETS.get(names.split()[0], Fraction(0)))
            found[name] = unit, prefixed == ["*"]
    return found


_KNOWN = _table()


_SHARED = {
    _KNOWN["pound"][0]: _KNOWN["£"][0],
    _KNOWN["cent"][0]: Unit(_KNOWN["€"][0].measure, Fraction(1, 100)),
    _KNOWN["C"][0]: _KNOWN["°C"][0],
    _KNOWN["F"][0]: _KNOWN["°F"][0],
}
"""Names that mean another unit beside one of that measure."""


@lru_cache(maxsize=4096)
def known_unit(name: str) -> Unit | None:
    """The unit of one name: a symbol or a word, with its prefix, or the plural of a word."""
    name = name.replace("\\$", "$").replace("\\mu", "µ").replace("\\Omega", "Ω").replace(" ", "")
    if name in _KNOWN:
        return _KNOWN[name][0]
    for prefixes, is_word in ((_SYMBOL_PREFIXES, False), (_WORD_PREFIXES, True)):
        for prefix, power in prefixes.items():
            base = name.removeprefix(prefix)
            known = _KNOWN.get(base) if base != name else None
            if known and known[1] and (len(base) > 2 or not base.isascii() if is_word else len(base) <= 3):
                return Unit(known[0].measure, known[0].factor * Fraction(10) ** power)
    if len(name) > 2 and name != name.casefold():
        return known_unit(name.casefold()) if name.casefold() != name and not name.isupper() else None
    for plural in ("es", "s"):
        if len(name) > 3 and name.endswith(plural) and (found := known_unit(name.removesuffix(plural))):
            return found
    return None


def read_unit(text: str) -> tuple[Unit, str] | None:
    """The unit with which a text begins, a product of powers such as `kg·m/s^2` or `square feet`, and the text behind
    it; None if it begins with no unit."""
    powers: Counter[str] = Counter()
    factor, offset, position, below, last = Fraction(1), Fraction(0), 0, False, 1
    while token := _TOKEN.match(text, position):
        unit = known_unit(token["name"])
        if unit is None or (token["name"] == "in" and _INSIDE.match(text, token.end("name"))):
            break
        sign = -1 if token["op"] in ("/", "per") or below else 1
        below = (below or bool(token["open"] and sign < 0)) and not token["close"]
        kind = token["kind"] or token["hanzi"] or token["behind"]
        power = int(token["power"] or (_POWER_WORDS | _BEHIND)[kind] if kind or token["power"] else 1) * sign
        for base, exponent in unit.measure:
            powers[base] += exponent * power
        factor *= unit.factor**power
        offset, last = unit.offset if position == 0 and power == 1 else Fraction(0), power
        position = token.end()
    if position == 0 or last == 0:
        return None
    measure = tuple(sorted((base, power) for base, power in powers.items() if power))
    return Unit(measure, factor, offset), text[position:]


@lru_cache(maxsize=4096)
def split_unit(answer: str) -> Quantity:
    r"""The value, the unit and the label of an answer: `5 cm`, `60°`, `\$5`, `3 square feet`, `10 m/s`, `5 apples`.

    A unit of one letter other than m must stand apart (`5 g`): `5g` is five times g. Words behind a unit are left aside
    (`5 meters long`).
    """
    answer = _PRICE.sub(r"\2 \1/", answer)
    if found := _CURRENCY.match(answer):
        behind = split_unit(answer[found.end() :].strip())
        label = behind.label if behind.unit is None else ""
        return Quantity(behind.value if label else answer[found.end() :].strip(), known_unit(found[1]), label)
    answer = _DEGREES_OF.sub(lambda found: f"°{found[1]}" if found[1] else " ", _PER_SECOND.sub(r"\1 s", answer))
    if several := _sum_of_units(answer):
        return several
    for start in _START.finditer(answer):
        value, rest = answer[: start.start()].rstrip(), answer[start.start() :].strip()
        if not value or not _VALUE_END.search(value):
            continue
        found = read_unit(rest)
        if found is not None and _stands_behind(value, start.group(), rest) and _is_label(found[1]):
            return Quantity(value, found[0] if found[0].measure else None, found[1].strip(" .").casefold())
    label = re.search(rf"(?<=[\d)}}\]%])({_LABEL.pattern})\s*$", answer)
    if label and _is_label(label.group()):
        return Quantity(answer[: label.start()].rstrip(), None, label.group().strip(" .").casefold())
    return Quantity(answer)


def _sum_of_units(answer: str) -> Quantity | None:
    """A length or time in several units: `6 ft 2 in`, `2 hours 30 minutes`; an angle as `30°15'`."""
    if found := _FEET.fullmatch(answer):
        answer = f"{found[1]} ft {found[2]} in"
    if found := _MINUTES.fullmatch(answer):
        degrees = Fraction(found[1]) + Fraction(found[2]) / 60 + Fraction(found[3] or 0) / 3600
        return Quantity(f"\\frac{{{degrees.numerator}}}{{{degrees.denominator}}}", DEGREE)
    if not (_SEVERAL.fullmatch(answer) or _SEVERAL_HANZI.fullmatch(answer)):
        return None
    parts = [(Fraction(number), known_unit(name)) for number, name in _PART.findall(answer)]
    for shared, meant in _SHARED.items():
        if any(unit and unit.measure == meant.measure for _, unit in parts):
            parts = [(number, meant if unit == shared else unit) for number, unit in parts]
    units = [unit for _, unit in parts if unit]
    if len(units) < len(parts) or len({unit.measure for unit in units}) > 1:
        return None
    total = sum((number * unit.factor for number, unit in parts if unit), Fraction(0))
    return Quantity(f"\\frac{{{total.numerator}}}{{{total.denominator}}}", Unit(units[0].measure, Fraction(1)))


def _stands_behind(value: str, gap: str, rest: str) -> bool:
    """Whether what follows a value may be its unit. A unit of one letter is no factor only behind a number of its own,
    which is neither an exponent nor an index, and apart from it."""
    rest = re.sub(r"^(?:\\cdot|\\times|[*·])\s*", "", rest)
    name = re.match(r"[A-Za-zµ\\]+|[\u4e00-\u9fff]+", rest)
    long = name is None or len(name.group()) > 1 or not rest[0].isascii()
    if not long and not re.search(r"[\d.)}\]π!]$|\\[a-z]+$", value):
        return False
    if not long and _MARKED_LETTER.search(value):
        return False
    if gap or rest.startswith("°"):
        return True
    return value[-1:].isdigit() and not _MARKED_LETTER.search(value) and (long or rest[0] in "mΩ")


def _is_label(rest: str) -> bool:
    """Whether nothing stands behind a unit, or words that say what was measured."""
    words = rest.strip(" .")
    if not words:
        return True
    return _LABEL.fullmatch(f" {words}") is not None and not _JOINERS & set(words.casefold().split())


def as_beside(given: Quantity, wanted: Quantity) -> tuple[Quantity, Quantity]:
    """Two quantities, with names that units share read as the other one says: pounds beside `£` are money, cents
    beside `€` its hundredths, `50p` beside either is pence, and `20 C` beside a temperature is one."""
    pence = [
        quantity.unit is not None and quantity.unit.measure == _KNOWN["£"][0].measure for quantity in (given, wanted)
    ]
    if pence[0] != pence[1]:
        given, wanted = (
            quantity if is_money else _in_pence(quantity)
            for quantity, is_money in zip((given, wanted), pence, strict=True)
        )
    warm = [unit for unit in (given.unit, wanted.unit) if unit and unit.measure == _KNOWN["°C"][0].measure]
    if len(warm) == 1 and DEGREE in (given.unit, wanted.unit):
        return replace(given, unit=warm[0]), replace(wanted, unit=warm[0])
    for shared, meant in _SHARED.items():
        units = [quantity.unit for quantity in (given, wanted)]
        if shared in units and any(unit and unit.measure == meant.measure for unit in units):
            given, wanted = (replace(q, unit=meant) if q.unit == shared else q for q in (given, wanted))
    return given, wanted


def _in_pence(quantity: Quantity) -> Quantity:
    """`50p`, which is 50 times p anywhere but beside pounds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*p", quantity.value)
    return Quantity(found[1], _KNOWN["pence"][0]) if found and quantity.unit is None else quantity


def same_quantity(one: Quantity, other: Quantity) -> bool:
    """Whether two numbers with units of one measure are the same, to a hundredth, as rounding leaves them."""
    one, other = as_beside(one, other)
    if one.unit is None or other.unit is None or one.unit.measure != other.unit.measure or one.unit == other.unit:
        return False
    try:
        first, second = (Fraction(q.value) * u.factor + u.offset for q, u in ((one, one.unit), (other, other.unit)))
    except ValueError:
        return False
    return abs(first - second) * 100 <= abs(second)


def same_label(one: str, other: str) -> bool:
    """Whether two labels say the same; one may be missing, and the plural is no other label."""
    return not one or not other or one.rstrip("s") == other.rstrip("s")
