r"""Statements in one form: what excludes a number, ratios, places in a row, relations, times of day, dates.

All functions read and write the form of `foveate.rewards.latex.tidy`.
"""

from __future__ import annotations

import re
from calendar import day_name, month_name
from collections.abc import Sequence

from foveate.rewards.conditions import MIRROR, chain, union_without
from foveate.rewards.names import FUNCTIONS
from foveate.rewards.phrases import CHANGE

_BUILDER = re.compile(r"\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\\mid(?![A-Za-z])|\||:)\s*([^|:]+)\\\}")
_ANGLED = re.compile(r"<\s*([^<>=]+(?:,[^<>=]+)+)>")
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s+to\s+(\d+(?:\.\d+)?)(?:\s+to\s+(\d+(?:\.\d+)?))?")
_CLOCK = re.compile(r"(\d{1,2})(?:\s*:\s*(\d\d))?\s*(?:([ap])\.?\s?m\.?)?", re.IGNORECASE)
_O_CLOCK = re.compile(r"(\d{1,2})\s*o'clock", re.IGNORECASE)
_POINT = re.compile(r"(?:the\s+)?points?\s+(?=\()", re.IGNORECASE)
_HALF_DAYS = {"noon": "12 pm", "midnight": "12 am"}
_DATE = re.compile(
    rf"(?:the\s+)?(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?({'|'.join(month_name[1:])})(?![a-z])(.*)", re.IGNORECASE
)
_DAY = re.compile(
    rf"({'|'.join(month_name[1:])})\s+(\d{{1,2}})(?:st|nd|rd|th|(?=,?\s+\d{{4}}\b))(?![a-z])", re.IGNORECASE
)
_MONTHS = {name[:3].lower(): name for name in month_name[1:]}
_SHORT_MONTH = re.compile(
    rf"(?<![A-Za-z])({'|'.join(_MONTHS)}|sept)(?![A-Za-z])\.?(?=\s+\d)|(?<=\d\s)({'|'.join(_MONTHS)}|sept)(?![A-Za-z])\.?",
    re.IGNORECASE,
)
_HALF_DAY = re.compile(r"\s*(?:in the (?:(morning)|afternoon|evening)|at night)$", re.IGNORECASE)
_WEEKDAYS = {name[:3].lower(): name for name in day_name}
_WEEKDAY = re.compile(r"(mon|tues?|wed|thu(?:rs?)?|fri|sat|sun)\.?", re.IGNORECASE)
_SHARE = re.compile(r"(?:an?\s+)?(\d+)\s+(?:out\s+of|in|of)\s+(\d+)(?:\s+chance)?")
_RATE = re.compile(r"(?<=%)\s+(?:per\s+\w+|p\.a\.?)$")
_NO_NAMES = (
    "not?|nor|never|than|over|under|above|below|least|most|more|less|nearly|almost|plus|minus|from|between|up|about|angle"
    "|line|segment|arc|side|circle|point|ray|plane|left|right|before|after|near|multiple|divisor|twice|double|triple|half"
    "|beyond|outside|can|cannot|could|would|should|may|might|it|we|you|they|is|are|was|be|to|for|if|let|see|none|close|fails?"
    f"|{'|'.join((*FUNCTIONS, *month_name[1:]))}"
)
_NAMED_VALUE = re.compile(rf"^(?:(?!(?i:{_NO_NAMES})\b)[A-Za-z]{{2,}}\s+){{1,3}}(?=[\d(])")
_WEEKDAY_OF = re.compile(rf"^(?:{'|'.join(day_name)}),?\s+(?=\S)", re.IGNORECASE)
_ONLY = re.compile(r"^(?:only|both|statements)\s+(?=\S)|\s+only$", re.IGNORECASE)
_WHOLE = re.compile(r",?\s*(?:where\s+|for\s+|with\s+)?\(?[a-z]\s*\\in\s*\\mathbb\s*\{?[ZN]\}?\)?$")
_O_CLOCK_HANZI = re.compile(r"(上午|早上|凌晨|下午|晚上|中午)?\s*(\d{1,2})点(?:(\d{1,2})分?|(半)|(?:钟|整))?")
_ISO_DATE = re.compile(
    r"(?:(?P<year>\d{4})[-/年])(?P<month>\d{1,2})[-/月](?P<day>\d{1,2})日?|(?P<m>\d{1,2})/(?P<d>\d{1,2})/(?P<y>\d{4})|(?P<mm>\d{1,2})月(?P<dd>\d{1,2})日"
)
_YEARS = re.compile(
    r"(?:(?:between|from)\s+)?([12]\d{3})\s*(?:-|to|until|至|到|(?<=^between [12]\d{3} )and)\s*([12]\d{3})",
    re.IGNORECASE,
)
_EXCEPT = re.compile(
    r"all (?:the )?real(?:s| numbers)(?:\s+[a-z])?,?\s+(?:except|but|other than|excluding)(?:\s+for)?"
    r"(?:\s+[a-z]\s*=)?\s*(\S+(?:(?:,\s*(?:and\s+)?|\s+and\s+)\S+)*)",
    re.IGNORECASE,
)
_ROWS = re.compile(r"\[\s*\[([^\[\]]*)\](?:\s*,\s*\[[^\[\]]*\])*\s*\]")
_ROW = re.compile(r"\[([^\[\]]*)\]")
_CASES = re.compile(r"(?:\\\{\s*)?\\begin\{(cases|array|aligned|gathered)\}(?:\{[lcr]+\})?([^&]*)\\end\{\1\}\s*\.?")
_PLACE = re.compile(r"^(?:on|in|at|for|during|by)\s+(?:the\s+)?(?=\S)", re.IGNORECASE)
_COLUMN = re.compile(r"\\begin\{[pb]matrix\}\s*([^&]*?)\s*\\end\{[pb]matrix\}")
_ROW_END = "\\\\"
_BETWEEN = re.compile(r"between\s+(-?\S+)\s+and\s+(-?\S+)", re.IGNORECASE)
_QUADRANT = re.compile(
    r"(?:in\s+)?(?:the\s+)?(?:(?P<before>first|second|third|fourth|[1-4]|I{1,3}|IV)\s+quadrant"
    r"|quadrant\s+(?P<behind>[1-4]|I{1,3}|IV|one|two|three|four)|第(?P<hanzi>[一二三四])象限)",
    re.IGNORECASE,
)
_QUADRANTS = (
    ("first", "1", "i", "one", "一"),
    ("second", "2", "ii", "two", "二"),
    ("third", "3", "iii", "three", "三"),
    ("fourth", "4", "iv", "four", "四"),
)
_PLACES = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x")
_NUMBERED = (
    "row|column|figure|fig\\.?|graph|group|stage|step|picture|image|pattern|diagram|table|chapter|section|phase|box|octant"
    "|floor|trial|period|term|statement|term"
)
_NTH = re.compile(
    rf"(?:the\s+)?(?:(?P<place>{'|'.join(_PLACES)}|\d{{1,2}}(?:st|nd|rd|th))\s+(?P<noun>{_NUMBERED})"
    rf"|(?P<name>{_NUMBERED})\s+(?:number\s+|no\.?\s*|#\s*)?(?P<number>\d{{1,2}}|{'|'.join(_ROMAN)}|one|two|three|four|five))",
    re.IGNORECASE,
)
_COUNTING = ("one", "two", "three", "four", "five")
_RELATED = re.compile(
    r"(?P<one>(?:(?:the\s+)?(?:line|segment|side|triangle|plane|ray)\s+)?\S+)\s+is\s+"
    r"(?P<relation>parallel|perpendicular|congruent|similar)\s+to\s+(?P<other>(?:(?:the\s+)?[a-z]{3,}\s+)?\S+)"
    r"|(?:(?:the\s+)?(?:lines|segments|sides|triangles|planes|rays)\s+)?(?P<first>\S+)\s+and\s+(?P<second>\S+)\s+are\s+"
    r"(?P<kind>parallel|perpendicular|congruent|similar)(?:\s+to\s+each\s+other)?",
    re.IGNORECASE,
)
_BACKWARDS = re.compile(r"-\s*\\(?:overrightarrow|vec)\s*\{\s*([A-Z])([A-Z])\s*\}")
"""The opposite of a vector between two points."""
_RELATIONS = {"parallel": "parallel", "perpendicular": "perp", "congruent": "cong", "similar": "sim"}
_COORDINATE = re.compile(r"([a-z])\s*=\s*([^=]+)")
_ORDER = re.compile(
    r"\b(?:arrange|rank|sort)\b|\border\s+(?:the(?:se)?|them|from)\b|\b(?:in|into)\s+(?:the\s+)?(?:\w+\s+)?order\b(?!\s+(?:to|that|for)\b)"
    r"|\b(?:what|which|correct|right|proper|chronological)\s+(?:order|sequence)\b(?!\s+(?:pair|triple))|\bsequence\s+of\s+(?:the\s+)?(?:steps|events|stages)\b|\b(?:increasing|decreasing|ascending|descending)\s+order\b"
    r"|\bfrom (?:the )?\w+(?:est|st) to\b|排列|排序|排成|顺序|次序",
    re.IGNORECASE,
)


def standard(text: str) -> str:
    r"""A statement in the form that is compared: `3 to 5` as `3:5`, `5 March` as `March 5`, `<1, 2>` as
    `\langle 1, 2 \rangle`, `\{x \mid x > 2\}` as `x > 2`, and `c > b > a` as `a < b < c`."""
    if found := _RATIO.fullmatch(text):
        return ":".join(part for part in found.groups() if part)
    if found := _WEEKDAY.fullmatch(text):
        return _WEEKDAYS[found[1][:3].lower()]
    if found := _SHARE.fullmatch(text):
        return rf"\frac{{{found[1]}}}{{{found[2]}}}"
    text = _HALF_DAY.sub(lambda found: " am" if found[1] else " pm", text)
    if found := _O_CLOCK_HANZI.fullmatch(text):
        half_day = {"上": " am", "早": " am", "凌": " am", "下": " pm", "晚": " pm"}.get((found[1] or " ")[0], "")
        return f"{found[2]}:{int(found[3] or (30 if found[4] else 0)):02}{half_day}"
    if found := _YEARS.fullmatch(text):
        return f"{found[1]}:{found[2]}"
    text = _SHORT_MONTH.sub(lambda found: _MONTHS[(found[1] or found[2])[:3].lower()], text)
    if found := _ISO_DATE.fullmatch(text):
        month = int(found["month"] or found["m"] or found["mm"])
        year = found["year"] or found["y"]
        if 1 <= month <= 12:
            return f"{month_name[month]} {int(found['day'] or found['d'] or found['dd'])}" + (
                f" {year}" if year else ""
            )
    if found := _EXCEPT.fullmatch(text):
        return union_without(found[1]) or rf"(-\infty,{found[1]}) \cup ({found[1]},\infty)"
    if _ROWS.fullmatch(text):
        rows = r" \\ ".join(row.replace(",", " & ") for row in _ROW.findall(text[1:-1]))
        return rf"\begin{{bmatrix}} {rows} \end{{bmatrix}}"
    if found := _CASES.fullmatch(text):
        return ", ".join(row.strip() for row in found[2].split(_ROW_END) if row.strip())
    if found := _O_CLOCK.fullmatch(text):
        return f"{found[1]}:00"
    if found := _POINT.match(text):
        return text[found.end() :]
    if found := _DATE.fullmatch(text):
        return f"{found[2]} {found[1]}{found[3]}"
    if found := _DAY.match(text):
        return f"{found[1]} {found[2]}{text[found.end() :].replace(',', '')}"
    text = _COLUMN.sub(
        lambda found: f"({', '.join(found[1].split(_ROW_END))})" if _ROW_END in found[1] else found[0], text
    )
    if found := _BETWEEN.fullmatch(text):
        return f"({found[1]},{found[2]})"
    if found := _QUADRANT.fullmatch(text):
        said = (found["before"] or found["behind"] or found["hanzi"]).lower()
        return f"Quadrant {next(names[2] for names in _QUADRANTS if said in names).upper()}"
    if found := _RELATED.fullmatch(text):
        one, other = found["one"] or found["first"], found["other"] or found["second"]
        return rf"{one} \{_RELATIONS[(found['relation'] or found['kind']).lower()]} {other}"
    if found := _BACKWARDS.fullmatch(text):
        return rf"\overrightarrow{{{found[2]}{found[1]}}}"
    if found := _ANGLED.fullmatch(text):
        return rf"\langle {found[1]}\rangle"
    if found := _BUILDER.fullmatch(text):
        text = found[1].strip()
    terms, signs = chain(text)
    if len(signs) > 1 and set(signs) <= {">", "\\ge"}:
        reversed_signs = (MIRROR[sign] for sign in reversed(signs))
        return terms[-1] + "".join(f" {sign} {term}" for sign, term in zip(reversed_signs, terms[-2::-1], strict=True))
    return text


def numbered(text: str) -> str:
    """A place in a row in one form: `second row`, `2nd row`, `Row II` and `row no. 2` as `row 2`."""
    found = _NTH.fullmatch(text)
    if found is None:
        return text
    said = (found["place"] or found["number"]).lower()
    names = next((names for names in (_PLACES, _ROMAN, _COUNTING) if said in names), None)
    number = names.index(said) + 1 if names else int(said.rstrip("stndrh"))
    return f"{(found['noun'] or found['name']).lower().replace('fig.', 'figure')} {number}"


def without_additions(given: str, wanted: str) -> tuple[str, str]:
    r"""Two answers, without what only one of them says beside its value: the preposition in `in 2015` (but `on it` is
    not `in it`), the name in `radius 3`, the time in `8% per year`, the weekday of a date, `k \in \mathbb{Z}`."""
    for addition in (_ONLY, _PLACE, _WEEKDAY_OF, _WHOLE, _RATE, _NAMED_VALUE):
        if given == wanted:
            break
        found = addition.search(given), addition.search(wanted)
        if bool(found[0]) != bool(found[1]) and not (CHANGE.search(given) or CHANGE.search(wanted)):
            given, wanted = addition.sub("", given), addition.sub("", wanted)
    return given, wanted


def same_times(given: str, wanted: str) -> bool | None:
    """The verdict on two times of day, of which one at least says `am` or `pm`; the other may leave it out."""
    one, other = (_CLOCK.fullmatch(_HALF_DAYS.get(said.casefold(), said)) for said in (given, wanted))
    if one is None or other is None or not (one[3] or other[3]):
        return None
    half_days = [found[3].lower() if found[3] else "" for found in (one, other)]
    hours = [int(found[1]) % 12 + 12 * (half == "p") if half else int(found[1])
             for found, half in zip((one, other), half_days, strict=True)]  # fmt: skip
    same_hour = hours[0] == hours[1] or ("" in half_days and int(one[1]) == int(other[1]))
    return same_hour and int(one[2] or 0) == int(other[2] or 0)


def coordinates(equations: Sequence[str]) -> list[str] | None:
    """The values of `x=3`, `y=-4`, whose variables stand in the order of the alphabet; None for other entries."""
    found = [_COORDINATE.fullmatch(one) for one in equations]
    names = [one[1] for one in found if one]
    return [one[2] for one in found if one] if len(names) == len(found) and names == sorted({*names}) else None


def asks_for_order(question: str) -> bool:
    """Whether a question wants things put in an order."""
    return bool(_ORDER.search(question))
