r"""Forms that an answer may take because of its question: `no solutions` where it asks how many, `true` for `yes`, a
point for an intercept, another letter for the constant of an integral, `m \parallel l` for `l and m`.

All functions read the form of `foveate.rewards.latex.tidy`. None of them says that an answer is wrong.
"""

from __future__ import annotations

import re

from foveate.rewards.brackets import entries_of
from foveate.rewards.phrases import Same

_HOW_MANY = re.compile(r"how many|\bnumber of\b|多少|几[个只条人种根]|个数", re.IGNORECASE)
_NONE = re.compile(r"(?:there\s+(?:is|are)\s+)?(?:none|no(?P<of>(?:\s+[a-z][a-z'-]*){1,6}))", re.IGNORECASE)
_NONE_HANZI = re.compile(r"(?:一[个只条种]也)?没有(?P<of>[\u4e00-\u9fff]{0,6})")
_SOLUTIONS = re.compile(r"solution|root|zero|解|根", re.IGNORECASE)
_EMPHASIS = frozenset(("at", "all", "such", "any", "in", "the", "of", "here"))
_VERDICTS = {
    **dict.fromkeys(("true", "correct", "对", "正确", "成立", "√", "✓", "\\surd", "\\checkmark"), ("truth", True)),
    **dict.fromkeys(
        ("false", "incorrect", "wrong", "untrue", "not true", "not correct", "错", "错误", "不对", "不正确", "不成立",
         "✗", "\\times"),
        ("truth", False),
    ),
    **dict.fromkeys(("yes", "是", "是的", "能", "可以"), ("reply", True)),
    **dict.fromkeys(("no", "否", "不是", "不能", "不可以"), ("reply", False)),
}  # fmt: skip
_OF_TRUTH = re.compile(r"\b(?:true|correct|right|valid)\b|对|正确|判断", re.IGNORECASE)
_OF_FALSEHOOD = re.compile(
    r"\b(?:incorrect|wrong|invalid|untrue|not)\b|n't\b|(?<!true or )\bfalse\b|不|(?<![对/、])错", re.I
)
_INTERCEPT = re.compile(r"\b([xy])\s*\$?\s*-?\s*intercept", re.IGNORECASE)
_INTEGRAL = re.compile(r"\\int|∫|integra|antiderivative|differential equation|积分|原函数|微分方程", re.IGNORECASE)
_CONSTANT = re.compile(r"\+\s*(?:([CcKk])|const(?:ant)?)\.?$")
_RELATED = re.compile(r"\s*\\(parallel|perp|cong|sim)(?![A-Za-z])\s*")
_RELATIONS = {
    "parallel": re.compile(r"parallel|平行", re.IGNORECASE),
    "perp": re.compile(r"perpendicular|垂直", re.IGNORECASE),
    "cong": re.compile(r"congruent|全等", re.IGNORECASE),
    "sim": re.compile(r"similar|相似", re.IGNORECASE),
}


_MANY = re.compile(r"infinite(?:ly\s+many)?|an\s+infinite\s+number|\\infty|无数个?|无穷多个?", re.IGNORECASE)
_BLANK = re.compile(r"_{2,}|\\underline|○|□|比较大小|\bcompare\b", re.IGNORECASE)
_SIGNS = {
    **dict.fromkeys((">", "\\gt", "greater than", "is greater than", "more than", "大于"), ">"),
    **dict.fromkeys(("<", "\\lt", "less than", "is less than", "fewer than", "小于"), "<"),
    **dict.fromkeys(("=", "equal", "equal to", "equals", "等于"), "="),
}
_COMPARISON = re.compile(r"[^<>=]+?\s*(<|>|=|\\gt|\\lt|(?:is\s+)?(?:greater|less)\s+than|大于|小于|等于)\s*[^<>=]+")
_QUADRANT = re.compile(r"quadrant|象限", re.IGNORECASE)
_QUADRANTS = {"1": "I", "2": "II", "3": "III", "4": "IV"}


def same_as_asked(given: str, wanted: str, asked: str, same: Same) -> bool | None:
    """True where the question makes two answers one, by the forms that the head of this file names; else None."""
    if _same_verdicts(given, wanted, asked) or _same_signs(given, wanted, asked):
        return True
    if _QUADRANT.search(asked) and _QUADRANTS.get(given, given) == _QUADRANTS.get(wanted, wanted):
        return True
    if _HOW_MANY.search(asked) and all(_is_countless(text, asked) for text in (given, wanted)):
        return True
    for one, other in ((given, wanted), (wanted, given)):
        if other == "0" and _is_none(one, asked):
            return True
        for form in (_as_values(one, asked), _as_pair(one, asked)):
            if form is not None and same(form, other):
                return True
    renamed = _with_constant_of(given, wanted, asked)
    return True if renamed is not None and same(renamed, wanted) else None


def verdict_of(text: str) -> tuple[str, bool] | None:
    """Whether a text says that something is true ("truth") or yes to it ("reply"), and which of both; else None."""
    return _VERDICTS.get(text.casefold().strip(" .!"))


def _same_verdicts(given: str, wanted: str, asked: str) -> bool:
    """Whether two verdicts agree: `correct` and `true`, `yes` and `是`; `yes` and `true` where the question asks
    whether something is true, and not whether it is false."""
    one, other = verdict_of(given), verdict_of(wanted)
    if one is None or other is None or one[1] != other[1]:
        return False
    return one[0] == other[0] or bool(_OF_TRUTH.search(asked) and not _OF_FALSEHOOD.search(asked))


def _is_none(text: str, asked: str) -> bool:
    """Whether a text says that there is none of what the question counts."""
    if not _HOW_MANY.search(asked):
        return False
    if text == "\\emptyset":
        return bool(_SOLUTIONS.search(asked))
    if found := _NONE_HANZI.fullmatch(text):
        return found["of"] in asked
    found = _NONE.fullmatch(text)
    if found is None:
        return False
    counted = {_stem(word) for word in re.findall("[a-z'-]+", asked.casefold())} | _EMPHASIS
    return all(_stem(word) in counted for word in (found["of"] or "").casefold().split())


def _is_countless(text: str, asked: str) -> bool:
    """Whether a text says that there are infinitely many of what the question counts."""
    found = _MANY.match(text)
    behind = text[found.end() :].casefold().split() if found else []
    return found is not None and all(_stem(word) in asked.casefold() for word in behind)


def _same_signs(given: str, wanted: str, asked: str) -> bool:
    """Whether two answers are one sign of comparison, in signs or words; `3 > 2` is `>` where a blank is to fill."""
    signs = []
    for text in (given, wanted):
        found = _COMPARISON.fullmatch(text) if _BLANK.search(asked) else None
        signs.append(_SIGNS.get(" ".join((found[1] if found else text).casefold().split())))
    return signs[0] is not None and signs[0] == signs[1]


def _stem(word: str) -> str:
    return word.removesuffix("s")


def _as_values(text: str, asked: str) -> str | None:
    """Points on an axis as numbers, where the question asks for the intercepts of this axis alone."""
    axes = {found.lower() for found in _INTERCEPT.findall(asked)}
    if len(axes) != 1:
        return None
    place = 0 if axes == {"x"} else 1
    _, brackets, entries = entries_of(text)
    points = [text] if brackets == "()" else entries
    values = [_coordinate(point, place) for point in points]
    return None if None in values else ", ".join(value for value in values if value is not None)


def _coordinate(point: str, place: int) -> str | None:
    """One of the two coordinates of a point, of which the other is 0."""
    _, brackets, entries = entries_of(point)
    if brackets != "()" or len(entries) != 2 or entries[1 - place].rpartition("=")[2].strip() != "0":
        return None
    return entries[place]


def _as_pair(text: str, asked: str) -> str | None:
    """`m \\parallel l` as the list of both, where the question asks which ones are so related."""
    parts = _RELATED.split(text)
    return f"{parts[0]}, {parts[2]}" if len(parts) == 3 and _RELATIONS[parts[1]].search(asked) else None


def _with_constant_of(given: str, wanted: str, asked: str) -> str | None:
    """An integral with its constant named as in the other one. A letter that stands elsewhere, too, is no constant."""
    if not _INTEGRAL.search(asked):
        return None
    one, other = _CONSTANT.search(given), _CONSTANT.search(wanted)
    if one is None or other is None or one[1] == other[1]:
        return None
    for found, text in ((one, given), (other, wanted)):
        letters = re.sub(r"\\[A-Za-z]+|[A-Za-z]{3,}", "", text[: found.start()] + " " + asked)
        if found[1] and found[1] in letters:
            return None
    return f"{given[: one.start()]}+ {other[1] or 'C'}"
