r"""Numbers in words at the start of an answer: `forty-two`, `two and a half hours`, `half an hour`, `三分之二`."""

from __future__ import annotations

import re
import unicodedata

from foveate.rewards.units import known_unit

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: i for i, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_SHARES = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10, "hundredth": 100,
}  # fmt: skip
ORDINALS = {"first": 1, "second": 2, "third": 3} | {
    word: n for word, n in _SHARES.items() if n > 3 and word != "quarter"
}
"""Words that by themselves say a place in a row, and the number of it."""
_BELOW_100 = rf"(?:(?:{'|'.join(_TENS)})(?:[ -](?:{'|'.join(_ONES[1:10])}))?|{'|'.join(reversed(_ONES))})"
_SHARE = rf"(?P<share>{'|'.join(_SHARES)})s?(?![A-Za-z-])(?:\s+of(?=\s+an?\s))?(?:\s+an?(?=\s))?"
_FRACTION = re.compile(rf"(?:(?P<count>{_BELOW_100}|an?|\d+)[ -](?!half[ -])|(?=half|quarter\s+of)){_SHARE}", re.I)
_MIXED = re.compile(rf"(?P<whole>{_BELOW_100}|\d+)[ -]and[ -](?P<count>{_BELOW_100}|an?)[ -]{_SHARE}", re.I)
_BELOW_1000 = rf"(?:(?:{_BELOW_100}|an?)[ -]hundred(?:[ -](?:and[ -])?{_BELOW_100})?|{_BELOW_100})(?![A-Za-z])"
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_CARDINAL = re.compile(
    rf"{_BELOW_1000}(?:[ -](?:thousand|million|billion)(?![A-Za-z])(?:,?[ -](?:and[ -])?{_BELOW_1000})?)*"
    r"|an?(?=\s+(?:dozen|thousand|million|billion)\b)",
    re.I,
)
_ONE_UNIT = re.compile(r"an?(?=\s+([a-z]{3,})(?![a-z]))", re.I)
_SIGN = re.compile(r"(?:(minus|negative)|positive|plus)\s+", re.I)
_PAST = re.compile(
    rf"(?:an?\s+)?(?P<part>half|quarter|(?:{_BELOW_100}|\d{{1,2}})(?:\s+minutes?)?)\s+(?P<way>past|after|to|before)\s+"
    rf"(?P<hour>{_BELOW_100}|\d{{1,2}})(?:\s+o'clock)?(?P<behind>(?:\s+in\s+the\s+\w+|\s+at\s+night|\s*[ap]\.?\s?m\.?)?)",
    re.I,
)
_HANZI = "[零〇一二两三四五六七八九十百千万亿]+"
_HANZI_NUMBER = re.compile(rf"(?:(?P<below>{_HANZI})分之)?(?P<number>{_HANZI})(?P<behind>[^\d\s]{{0,9}})")
_COUNTED = frozenset("成个只条本张人次倍种组名位件辆棵朵")


def in_digits(text: str) -> str:
    """A text with the number that it begins with in digits; the text itself if it begins with none in words.

    Chinese numerals count only where a unit or a measure word, or nothing, stands behind: 三角形 is no number.
    """
    if not text[:1].isascii():
        found = _HANZI_NUMBER.fullmatch(text)
        return _from_hanzi(found) if found else text
    if found := _SIGN.match(text):
        number = in_digits(text[found.end() :])
        return f"{'-' if found[1] else ''}{number}" if re.match(r"\d|\\frac", number) else text
    if found := _MIXED.match(text):
        return rf"{_count(found['whole'])}\frac{{{_count(found['count'])}}}{{{_share(found)}}}{text[found.end() :]}"
    if found := _FRACTION.match(text):
        return rf"\frac{{{_count(found['count'])}}}{{{_share(found)}}}{text[found.end() :]}"
    found = _CARDINAL.match(text) or _ONE_UNIT.match(text)
    if found is None or (found.re is _ONE_UNIT and known_unit(found[1]) is None):
        return text
    return f"{_count(found.group())}{text[found.end() :]}"


def on_the_clock(text: str) -> str:
    """`quarter past three` as 3:15; other texts as they are. `10 to 5` is a ratio without a word for minutes."""
    found = _PAST.fullmatch(text)
    if found is None or (found["way"] == "to" and not re.search("half|quarter|minute", found["part"], re.I)):
        return text
    part, hour = found["part"].lower(), _count(found["hour"])
    minutes = {"half": 30, "quarter": 15}.get(part) or _count(part.removesuffix("s").removesuffix("minute"))
    if found["way"].lower() in ("to", "before"):
        hour, minutes = (hour - 2) % 12 + 1, 60 - minutes
    return f"{hour}:{minutes:02}{found['behind']}"


def _count(words: str | None) -> int:
    """The number that words or digits say; 1 for none."""
    total = group = 0
    for word in re.findall(r"[a-z]+|\d+", (words or "one").lower()):
        if word == "hundred":
            group *= 100
        elif word in _SCALES:
            total, group = total + group * _SCALES[word], 0
        elif word != "and":
            group += int(word) if word.isdecimal() else _WORDS.get(word, 1)  # a, an
    return total + group


def _share(found: re.Match[str]) -> int:
    return _SHARES[found["share"].lower()]


def _from_hanzi(found: re.Match[str]) -> str:
    behind = found["behind"]
    if behind and behind[0] not in _COUNTED and (len(behind) > 3 or known_unit(behind) is None):
        return found.group()
    number = _hanzi(found["number"])
    if behind == "成":  # tenths
        return f"{10 * number}\\%"
    if found["below"] is None:
        return f"{number}{behind}"
    below = _hanzi(found["below"])
    return f"{number}\\%{behind}" if below == 100 else rf"\frac{{{number}}}{{{below}}}{behind}"


def _hanzi(numerals: str) -> int:
    """The value of numerals such as 三百零五 and 一万二千."""
    total = section = digit = 0
    for numeral in numerals.replace("两", "二"):  # Unicode gives 两 no value
        value = int(unicodedata.numeric(numeral))
        if value < 10:
            digit = value
        elif value < 10_000:
            section, digit = section + (digit or 1) * value, 0
        else:
            total, section, digit = (total + section + digit) * value, 0, 0
    return total + section + digit
