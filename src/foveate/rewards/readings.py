r"""Readings of a final answer: the answer itself, and its value where it is a sentence or carries a remark.

A sentence says what stands behind its verb (`The pH is 7.4`), what it sets in bold, the only number in it (`I count 7
birds`), or `yes` and `no` at its start. Nothing is read from a sentence that denies or compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from foveate.rewards.names import FUNCTIONS
from foveate.rewards.phrases import CHANGE
from foveate.rewards.plain_text import last_sentence, last_value, stated_answer, unified, unwrapped
from foveate.rewards.units import read_unit

_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_VERDICT = re.compile(
    r"(yes|no|true|false|correct|incorrect|是|否|对|错|正确|错误)(?:的$|的?\s*[,;:.!。，；—-]+\s*\S)", re.IGNORECASE
)
_DENIAL = re.compile(
    r"n't\b|\b(?:not|never|cannot|no|nor|neither|than|least|most|over|under|nearly|almost|if|unless|per|every|each|[b-hj-z])\b"
    r"|[不没非]|超过|至少|最多",
    re.I,
)
_COUNTED = re.compile(
    r"(?P<words>[A-Z][A-Za-z']*,?(?:\s+[a-z][a-z']*,?)+\s+|[^\x00-\x7f]{2,40}?\s*)(?P<value>\\?[$€£¥]?\d.*)", re.DOTALL
)
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_TAIL = re.compile(
    r",?\s+(?:which|because|since|so that|as (?:shown|seen|indicated)|according to|based on|from the|for a total)\b.*$"
    r"|\s+(?:in|during|by|since)\s+(?:the\s+year\s+)?[12]\d{3}(?!\d).*$"
    r"|,\s+(?:making|indicating|as|so|and)\b.*$|[,，][^,，\d]*[\u4e00-\u9fff].*$",
    re.DOTALL,
)
_CONNECTIVE = re.compile(
    r"(?:(?:therefore|thus|so|hence|then|finally|consequently|clearly|now|we\s+(?:get|have|find|obtain|see)(?:\s+that)?"
    r"|so\s+that|that)(?:,\s*|\s+)|(?:因此|所以|故|得|可得|解得|于是|则)[,:，：]?\s*)+",
    re.IGNORECASE,
)
_DOING = re.compile(r"^[a-z]{2,}ing\s+")
_VERB = re.compile(r"(?:it|they|he|she|this|that|the\s+[a-z]+)\s+([a-z]{3,})", re.IGNORECASE)
"""A subject and what it does: `It decreases`."""
_REMARK = re.compile(r"(?P<said>.*?[\w%}°$])\s+\((?P<remark>[^()]*)\)", re.DOTALL)
_MORE = re.compile(
    r"(?:or|i\.e\.,?|about|approximately|approx\.?|\\approx|=|roughly|also|that is,?)\s*(?=[\d$\\A-Za-z-])", re.I
)
_WORDY = re.compile(r"[A-Za-z]{3,}$")
_LONGEST = 1000
"""Characters of a sentence that is read."""
_APPROXIMATION = re.compile(r"\s*\\approx\s*|\s*≈\s*")


def readings(answer: str) -> Iterator[str]:
    """Each reading of a final answer, the answer itself first; see the head of this file."""
    yield answer
    if len(answer) < 2:
        return
    text = unified(answer)
    bold = _BOLD.findall(last_sentence(text)[:_LONGEST])
    if len(bold) == 1:
        yield bold[0]
    text = unwrapped(text).strip()
    sentence = last_sentence(text).strip()
    if (found := _VERDICT.match(text)) and stated_answer(text) == text:
        yield found[1]
    if found := _CONNECTIVE.match(sentence):
        yield sentence[found.end() :]
    if len(sentence) <= _LONGEST:
        yield from _said(text, sentence)


def _said(text: str, sentence: str) -> Iterator[str]:
    """The readings of the last sentence of a text."""
    short, (before, _, _) = _TAIL.sub("", sentence), sentence.partition(": ")
    for part in dict.fromkeys((sentence, short, before)):
        said = last_value(part)
        if said != part.strip():
            yield said
            yield _DOING.sub("", said)
    if text == sentence and "\\approx" in sentence.replace("≈", "\\approx"):
        yield from (side for side in _APPROXIMATION.split(sentence) if side.strip())
    if found := _VERB.fullmatch(short.rstrip(".! ")):
        yield found[1]
    yield from _remarked(sentence)
    found = _COUNTED.fullmatch(short)
    words = found["words"] if found else ""
    if found and len(_NUMBER.findall(sentence)) == 1 and not (_DENIAL.search(words) or CHANGE.search(words)):
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
