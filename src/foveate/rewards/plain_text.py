"""Texts in plain form: characters that are alike, dress that does not matter, and what a sentence says."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import Literal

_OPEN, _CLOSE, _THOUGHT = "<answer>", "</answer>", "</think>"
_WRAPPED = re.compile(
    r"\\(?:text\w*|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|ce|boldsymbol|bm|bold|emph|underline|operatorname\*?)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}|\*\*"
)
_NESTED_WRAPS = 3
_POWERS = re.compile(r"(?:(?<=\d)|(?<=\))|(?<=(?<![A-Za-z])[A-Za-z]))\*\*(?=-?[\dA-Za-z(])")
_HEADING = re.compile(r"^#{1,6}\s+", re.MULTILINE)
_CUE = re.compile(
    r"(?:(?:answers?|solution|result|choice|option)(?:\*\*|[\s:])(?:(?!not\b|n't|never\b)[^.:=\n。]){0,60}?"
    r"(?:\bis\b|\bare\b|\bbe\b|:|=|\s-\s)|\banswers?\s*(?:is|:|=)"
    r"|(?:答案|结果|选项)(?:应?[为是])?\s*[:：]?|故?应?选[择项]?\s*[:：]?)\**\s*[:：]?\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<!i\.e)(?<!e\.g)[.!?。](?=\s|\*|$)|\n|。")
_COPULA = re.compile(
    r"(?:(?<!so )\b(?:(?:is|are)\s+equal\s+to"
    r"|is|are|was|were|(?<!not )(?<!n't )be|becomes?|equals?|says|reads|shows|has|contains|represents"
    r"|indicates|denotes|means|(?:see|count|spot)s?|(?:comes|amounts|works\s+out|simplifies)\s+to)\b|:(?!\d)"
    r"|(?<=it's)|(?<=It's)|(?<=hat's)|(?<!不)是(?!否)|(?<![因认作成])为|(?<![没所])有|[多少高低]了|等于|达到|写着)\s*(?!\Z)"
)
_VARIABLE = re.compile(r"(?<![A-Za-z])([b-z])[\s$\\)]*$")
_CONTINUED = re.compile(r"[\d}]\s*\.{3,}$")
_FORMS = ("<super>", "<sub>", "<fraction>", "<circle>")
_RAISED_FRACTION = re.compile(r"([⁰¹²³⁴-⁹]+)[⁄∕/]([₀-₉]+)")
_ALIKE = str.maketrans(
    {
        "−": "-",
        "‐": "-",
        "‑": "-",
        "–": "-",
        "—": "-",
        "º": "°",
        "˚": "°",
        "⁄": "/",
        "∕": "/",
        "。": ".",
        "•": "·",
        "∶": ":",
        "⋅": "·",
        "′": "'",
    }
)


def unified(text: str) -> str:
    r"""A text with one form for every character that Unicode calls alike (NFKC): fullwidth letters and signs become
    plain ones, `x²` becomes `x^{2}`, `x₁` becomes `x_{1}` and `½` becomes `\frac{1}{2}`."""
    if text.isascii():
        return text
    text = _RAISED_FRACTION.sub(lambda found: rf"\frac{{{_digits(found[1])}}}{{{_digits(found[2])}}}", text)
    return "".join(_plain_run(kind, "".join(run)) for kind, run in groupby(text.translate(_ALIKE), key=_kind))


def _digits(raised: str) -> str:
    return unicodedata.normalize("NFKC", raised)


def _kind(character: str) -> str:
    """The form that Unicode says a character is, if it is one of `_FORMS`."""
    kind = unicodedata.decomposition(character).partition(" ")[0]
    return kind if kind in _FORMS else ""


def _plain_run(kind: str, run: str) -> str:
    if kind == "<fraction>":
        parts = (unicodedata.normalize("NFKC", one).partition("⁄") for one in run)
        return "".join(rf"\frac{{{above}}}{{{below}}}" for above, _, below in parts)
    if kind == "<circle>":
        return ",".join(unicodedata.normalize("NFKC", run))
    same = unicodedata.normalize("NFKC", run).translate(_ALIKE)
    return {"<super>": f"^{{{same}}}", "<sub>": f"_{{{same}}}"}.get(kind, same)


def with_powers(text: str) -> str:
    """A text in which `**` is the sign of powers, as in `x**2`, with `^` for it; where one is not, they are bold."""
    return _POWERS.sub("^", text) if text.count("**") == len(_POWERS.findall(text)) > 0 else text


def unwrapped(text: str) -> str:
    r"""Text without `\text{...}` and its like (what they hold stays, set off by spaces), without `**` and the marks of
    headings."""
    text = _HEADING.sub("", with_powers(text))
    for _ in range(_NESTED_WRAPS):
        text, count = _WRAPPED.subn(lambda found: f" {found.group(1) or ''} ", text)
        if not count:
            break
    return text


def plain(text: str) -> str:
    r"""Text without its dress: `\text{...}` and bold markers, letter case, runs of white space, quotes around it and
    the stop at its end are gone. Answers of one plain form are the same, so `5!`, `.5`, `5²`, `5'` and `5...` keep
    their marks."""
    bare = " ".join(unwrapped(unified(text)).casefold().split())
    if _CONTINUED.search(bare):
        return bare
    bare = bare.rstrip(" .,;:").strip(' "`$')
    quoted = bare.startswith("'")
    return (bare.strip(" '") if quoted else bare).rstrip(" .,;:")


def behind_thoughts(text: str) -> str:
    """The text behind the last `</think>`; the whole of it without one."""
    return text[text.rfind(_THOUGHT) + len(_THOUGHT) :] if _THOUGHT in text else text


def answer_part(text: str) -> str:
    """The text behind the last `</think>`; the whole of it where nothing stands there."""
    said = behind_thoughts(text)
    return said if said.strip() else text


def tagged_answer(text: str, which: Literal["last", "first"] = "last") -> str | None:
    """The text between the last, or the first, `<answer>` and `</answer>`; None without both. Plain searches: a lazy
    pattern takes quadratic time on many tags."""
    if which == "last":
        end = text.rfind(_CLOSE)
        start = text.rfind(_OPEN, 0, max(end, 0))
    else:
        start = text.find(_OPEN)
        end = text.find(_CLOSE, start)
    return text[start + len(_OPEN) : end] if -1 < start < end else None


def stated_answer(text: str) -> str:
    """The answer that a text states in words, the last of its `statements`; the text itself where it states none."""
    stated = [*statements(text)]
    return stated[-1] if stated else text


def statements(text: str) -> Iterator[str]:
    """The words behind each `the answer is`, `Final answer:`, `答案是`, ..., to the end of the sentence."""
    for found in _CUE.finditer(text):
        rest = text[found.end() :].lstrip()
        ended = _SENTENCE_END.search(rest)
        said = rest[: ended.start()] if ended else rest
        yield re.sub(r",?\s+(?:and\s+)?not\s.*$", "", said.strip())


def last_sentence(text: str) -> str:
    """The last sentence of a text that is not blank; the text itself if all of it is."""
    return next((one for one in reversed(_SENTENCE_END.split(text)) if one.strip()), text)


def last_value(text: str) -> str:
    """The value that the last sentence of a text gives something: `5 cm` of `So the side is 5 cm.`, and `y = 5` of
    `Thus y is 5.`"""
    *before, value = _COPULA.split(last_sentence(text))
    variable = _VARIABLE.search(before[-1]) if before else None
    return f"{variable[1]} = {value.strip()}" if variable and value[:1].isdigit() else value.strip()
