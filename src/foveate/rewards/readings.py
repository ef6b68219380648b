r"""Readings of a final answer: the answer itself, and what it says where it is a sentence or carries a remark.

A sentence says what stands behind its verb (`The pH is 7.4`), what it sets in bold, the only number in it (`I count 7
birds`), or `yes` and `no` at its start. Nothing is read from a sentence that denies or compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from foveate.rewards.names import FUNCTIONS
from foveate.rewards.phrases import CHANGE
from foveate.rewards.plain_text import last_sentence, last_value, unified, unwrapped
from foveate.rewards.units import read_unit

_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_VERDICT = re.compile(
    r"(yes|no|true|false|correct|incorrect|是|否|对|错|正确|错误)的?\s*[,;:.!。，；—-]+\s*\S", re.IGNORECASE
)
_DENIAL = re.compile(
    r"n't\b|\b(?:not|never|cannot|no|nor|neither|than|least|most|over|under|nearly|almost|if|unless|per|every|each)\b"
    r"|[不没非]|超过|至少|最多",
    re.I,
)
_COUNTED = re.compile(
    r"(?P<words>[A-Z][A-Za-z']*,?(?:\s+[a-z][a-z']*,?)+\s+|[^\x00-\x7f]{2,40}?\s*)(?P<value>\\?[$€£¥]?\d.*)", re.DOTALL
)
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_TAIL = re.compile(
    r",?\s+(?:which|because|since|so that|as (?:shown|seen|indicated)|according to|based on|from the|for a total)\b.*$"
    r"|,\s+(?:making|indicating|as|so|and)\b.*$|[,，][^,，\d]*[\u4e00-\u9fff].*$",
    re.DOTALL,
)
_CONNECTIVE = re.compile(
    r"(?:(?:therefore|thus|so|hence|then|finally|consequently|clearly|now|we\s+(?:get|have|find|obtain|see)(?:\s+that)?"
    r"|so\s+that|that)(?:,\s*|\s+)|(?:因此|所以|故|得|可得|解得|于是|则)[,:，：]?\s*)+",
    re.IGNORECASE,
)
_REMARK = re.compile(r"(?P<said>.*?[\w%}°$])\s+\((?P<remark>[^()]*)\)", re.DOTALL)
_MORE = re.compile(
    r"(?:or|i\.e\.,?|about|approximately|approx\.?|\\approx|=|roughly|also|that is,?)\s*(?=[\d$\\A-Za-z-])", re.I
)
_WORDY = re.compile(r"[A-Za-z]{3,}$")
_APPROXIMATION = re.compile(r"\s*\\approx\s*|\s*≈\s*")


def readings(answer: str) -> Iterator[str]:
    """What a final answer may say, the answer itself first; see the head of this file."""
    yield answer
    if len(answer) < 3:
        return
    text = unified(answer)
    if found := _VERDICT.match(text.strip("* ")):
        yield found[1]
    if "≈" in text or "\\approx" in text:
        yield from (side for side in _APPROXIMATION.split(text) if side.strip())
    bold = _BOLD.findall(last_sentence(text))
    if len(bold) == 1:
        yield bold[0]
    text = unwrapped(text).strip()
    sentence = last_sentence(text).strip()
    if found := _CONNECTIVE.match(sentence):
        yield sentence[found.end() :]
    for said in dict.fromkeys((last_value(text), last_value(_TAIL.sub("", sentence)))):
        if said != text:
            yield said
    yield from _remarked(text)
    found = _COUNTED.fullmatch(_TAIL.sub("", sentence))
    if (
        found
        and len(_NUMBER.findall(sentence)) == 1
        and not (_DENIAL.search(found["words"]) or CHANGE.search(found["words"]))
    ):
        yield found["value"]


def _remarked(text: str) -> Iterator[str]:
    """The parts of `sodium chloride (NaCl)`, `0.5 (or 1/2)` and `12 (cm)`: what is said, what is said again."""
    found = _REMARK.fullmatch(text.rstrip(" ."))
    if found is None or _DENIAL.search(found["remark"]):
        return
    said, remark = found["said"].strip(), found["remark"].strip()
    unit = read_unit(remark)
    if unit and not unit[1].strip():
        yield f"{said} {remark}"
        return
    more = _MORE.match(remark)
    words = _WORDY.search(said)
    if (
        (words and words.group() not in FUNCTIONS)
        or more
        or (said[-1:].isalnum() and re.fullmatch(r"[A-Za-z ]{4,}", remark))
    ):
        yield said
    if more or (words and words.group() not in FUNCTIONS):
        yield remark[more.end() :] if more else remark
