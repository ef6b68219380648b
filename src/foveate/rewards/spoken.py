r"""Mathematics as it is said or typed, in LaTeX: `the square root of 5`, `2 to the power of 3`, `x is at least 4`,
`lg 5`, `9 choose 3`, `]1, 2]`, `3 degrees below zero`.
"""

from __future__ import annotations

import re

_PLAIN = re.compile(r"[-+\d.,\s/]*")
_COMPARED = {
    "\\ge ": r"greater than or equal to|at least|no less than|not less than",
    "\\le ": r"less than or equal to|at most|no more than|not more than|not greater than",
    "> ": r"(?:strictly )?(?:greater|more|larger|bigger) than",
    "< ": r"(?:strictly )?(?:less|smaller) than",
    "\\ne ": r"not equal to",
}
_CONDITION = re.compile(
    r"^(?:(?:all|any)\s+)?(?:real\s+)?(?:(?:numbers?|values)\s+(?:of\s+)?)?(?P<name>[a-z])\s+"
    r"(?:(?:such\s+that|with|where|for\s+which|that\s+are|that\s+is)\s+(?:(?P=name)\s+)?)?(?:is\s+|are\s+|must\s+be\s+)?"
    rf"(?:{'|'.join(f'(?P<w{i}>{words})' for i, words in enumerate(_COMPARED.values()))})\s+(?=[-\d\\])",
    re.IGNORECASE,
)
_SUCH = re.compile(
    r"^(?:all|any)\s+(?:real\s+)?(?:(?:numbers?|values)\s+(?:of\s+)?)?(?P<name>[a-z])\s*,?\s*(?:such\s+that|with|where|for\s+which)"
    r"\s+(?=(?P=name)\s*[\\<>])"
)
_BINOMIAL = re.compile(
    r"(?<![\w}^])(?:(\d{1,3})(?:\s+choose\s+|C)(\d{1,3})|[_^]\{?(\d{1,3})\}?\s*C\s*_\{?(\d{1,3})\}?"
    r"|C\s*_\{?(\d{1,3})\}?\s*\^\{?(\d{1,3})\}?)(?![\w])"
)
_OUTWARD = re.compile(
    r"(?<![\w)}])(?P<left>[\[\]])\s*(?P<inside>[^\[\](){}]+[,;][^\[\](){}]+?)\s*(?P<right>[\[\]])(?![\w(])"
)
"""An interval whose open ends are brackets turned outwards: `]1, 2]`."""
_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\\?(?<![A-Za-z])log\s*_\s*(?:\{\s*e\s*\}|e(?![A-Za-z]))\s*"), r"\\ln "),
    (re.compile(r"\\?(?<![A-Za-z])lg(?![A-Za-z])\s*"), r"\\log_{10} "),
    (re.compile(r"\bplus\s*(?:or|/)\s*minus\s*|\+\s*/\s*-\s*", re.IGNORECASE), r"\\pm "),
    (re.compile(r"(?:\bthe\s+)?\bcube\s+root\s+of\s+(?=\d|[a-z]\b|\()", re.IGNORECASE), r"\\cbrt "),
    (re.compile(r"(?:\bthe\s+)?\bsquare\s+root\s+of\s+(?=\d|[a-z]\b|\()", re.IGNORECASE), r"\\surd "),
    (re.compile(r"(?:(?<=\d)\s+|^)root\s+(?=\d)", re.IGNORECASE), r" \\surd "),
    (re.compile(r"\*?\s*(?<![\\A-Za-z])sqrt\s*(?=[({\d])"), r" \\surd "),
    (re.compile(r"(?<=\d)\s+times\s+(?=[\d\\])", re.IGNORECASE), r" \\cdot "),
    (re.compile(r"(?<=[\dA-Za-z)])\s+to\s+the\s+power\s+(?:of\s+)?(-?\w+)", re.IGNORECASE), r"^{\1}"),
    (re.compile(r"(?<=\d)\s+(?:in\s+(?:total|all)|altogether|overall)$", re.IGNORECASE), ""),
    (re.compile(r"^(\d+(?:\.\d+)?\s*(?:°(?:\s*[CF])?|degrees?(?:\s+[CFa-z]+)?))\s+below\s+zero$", re.I), r"-\1"),
    (re.compile(r"^(\d+(?:\.\d+)?)\s+below\s+zero$", re.IGNORECASE), r"-\1"),
    (re.compile(r"(?<=\d)\s+squared$", re.IGNORECASE), "^{2}"),
    (re.compile(r"(?<=\d)\s+cubed$", re.IGNORECASE), "^{3}"),
    (re.compile(r"^零下\s*(?=\d)"), "-"),
    (re.compile(r"^(\d{1,3})\s*h(?:rs?|ours?)?\s*(\d{1,2})\s*(?:m|mins?|minutes?)$"), r"\1 h \2 min"),
    (re.compile(r"^(\d{1,3})\s*(小时|时)\s*(\d{1,2})\s*分$"), r"\1\2\3分钟"),
)


def in_signs(text: str) -> str:
    r"""A text with what it says in words, or types without LaTeX, in signs; see the head of this file. Roots become
    `\surd` and `\cbrt`, for which `foveate.rewards.latex.tidy` knows the arguments."""
    if _PLAIN.fullmatch(text):
        return text
    for pattern, sign in _RULES:
        text = pattern.sub(sign, text)
    if "&" in text and "\\begin" not in text:
        text = re.sub(r"\s*\\?&\s*", " and ", text)
    if "C" in text or "choose" in text:
        text = _BINOMIAL.sub(lambda found: r"\binom{{{}}}{{{}}}".format(*(one for one in found.groups() if one)), text)
    if "[" in text or "]" in text:
        text = _OUTWARD.sub(_interval, text)
    text = _SUCH.sub("", text)
    if found := _CONDITION.match(text):
        sign = next(sign for i, sign in enumerate(_COMPARED) if found[f"w{i}"])
        text = f"{found['name']} {sign}{text[found.end() :]}"
    return text


def _interval(found: re.Match[str]) -> str:
    if found["left"] == "[" and found["right"] == "]":
        return found.group()
    left, right = ("[" if found["left"] == "[" else "("), ("]" if found["right"] == "]" else ")")
    return f"{left}{found['inside'].replace(';', ',')}{right}"
