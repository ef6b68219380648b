"""The end of an answer: a verdict that says the claim again, and lines that each give one value.

All functions read the form of `foveate.rewards.plain_text.unified`.
"""

from __future__ import annotations

import re

from foveate.rewards.equations import REJECTED
from foveate.rewards.plain_text import unwrapped

_VERDICT = re.compile(
    r"(?:(?:(?:therefore|thus|so|hence|then|finally|因此|所以|故)[,:]?\s*)*)"
    r"(?P<said>(?:yes|no|true|false|correct|incorrect)\b|是的?|否|不是|对|错|正确|错误)\s*(?:[,;:.!]|-+(?=\s))\s*"
    r"(?P<claim>[^\n*]{1,200}?)[.!\s]*$",
    re.IGNORECASE,
)
_BOLD_END = re.compile(r"\*\*(?P<bold>[^*\n]{1,240})\*\*[.!\s]*$")
_SENTENCES = re.compile(r"(?<=[.!?])(?:\s+|(?=[\u4e00-\u9fff]))|\n+")
_YES = frozenset(("yes", "true", "correct", "是", "是的", "对", "正确"))
_NEGATED = re.compile(
    r"n't\b|\b(?:not|no|never|without|neither|nor|cannot|un(?:equal|like)|non-?\w+)\b|[不没非无]", re.IGNORECASE
)
_RESERVED = re.compile(
    r"\b(?:but|if|unless|or|maybe|perhaps|either|possibly|only|assuming|depends?|provided|except|however|although|though"
    r"|wait|yet)\b|但|如果|除非|或|可能|只有",
    re.IGNORECASE,
)
"""Words with which a verdict holds in part only."""
_SMALL = frozenset((
    "a", "an", "the", "of", "in", "on", "at", "to", "is", "are", "was", "were", "has", "have", "had", "it", "that",
    "this", "they", "these", "those", "he", "she", "we", "there", "both", "do", "does", "did", "can", "will", "each",
    "other", "not", "no", "s", "t", "so", "aren", "isn", "don", "doesn", "and", *"它们这那个两是的都也所以不",
))  # fmt: skip
_ITEM = re.compile(r"(?:(?P<mark>[-*·+]|\(?\d{1,2}\s*[.)、])\s+)?(?P<said>\S.{0,99}?)[\s.;,]*")
_GIVEN = re.compile(r"\$?(?=[^=:]*[A-Za-z\u0370-\u03ff\u4e00-\u9fff\\])[^\d=:][^=:]{0,40}?\s*[=:]\s*\$?\s*\S[^=:]*")
"""A name and its value: `x = 7`, `Length: 9 cm`."""
_MOST_ITEMS = 8
_LONGEST_LINE = 120
_LONGEST_STEP = 40


def closing_verdict(text: str, asked: str) -> str | None:
    """The `yes`, `no`, `true`, ... with which the last sentence of a longer text begins, where it says the claim of the
    question again (`So yes, they are similar.`), or is bold or a line of its own (`**No, the ratios differ.**`). None
    where its claim contradicts it, holds in part only, or where it replies to another question."""
    body, bold = unwrapped(text).strip(), _BOLD_END.search(text)
    line = unwrapped(bold["bold"]).strip() if bold else body.rpartition("\n")[2].strip()
    sentence = _SENTENCES.split(body)[-1].strip()
    last, found = next(((one, found) for one in (line, sentence) if (found := _VERDICT.match(one))), ("", None))
    before = body[: body.rfind(last)].strip()
    if found is None or not (before or bold):
        return None
    claim, yes = found["claim"].strip(), found["said"].casefold() in _YES
    said, known = _content(claim), _content(asked)
    if any(one.casefold() not in _words(asked) for one in _RESERVED.findall(claim)):
        return None
    negated = bool(_NEGATED.search(claim)), bool(_NEGATED.search(asked))
    if said <= known:
        return found["said"] if yes == (negated[0] == negated[1]) else None
    apart = last == line and not before.endswith("?") and not (yes and negated[0])
    return found["said"] if apart else None


def _words(text: str) -> set[str]:
    return set(re.findall("[a-z]+|[\u4e00-\u9fff]", text.casefold()))


def _content(text: str) -> set[str]:
    """The words, without plural endings, and the Chinese characters of a text that are not small."""
    return {word.removesuffix("s") for word in _words(text) - _SMALL}


def closing_list(text: str) -> str | None:
    """The list that the last lines of a text are, bare of bold: `x = 7, y = 3` of lines, with bullets or behind a
    colon, that each give a name its value; numbered lines of a few words as a sequence, `B \\to D \\to A`."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    items: list[re.Match[str]] = []
    for line in reversed(lines):
        item = _ITEM.fullmatch(line) if len(line) <= _LONGEST_LINE else None
        if item is None or (items and bool(item["mark"]) != bool(items[0]["mark"])):
            break
        if not item["mark"] and not _GIVEN.fullmatch(item["said"]):
            break
        items.insert(0, item)
    lead = lines[-len(items) - 1] if len(items) < len(lines) else ""
    said = [item["said"].strip() for item in items]
    if not 2 <= len(said) <= _MOST_ITEMS or _NEGATED.search(lead) or any(REJECTED.search(one) for one in (lead, *said)):
        return None
    if all(_GIVEN.fullmatch(one) for one in said):
        return ", ".join(said) if items[0]["mark"] or lead.endswith(":") else None
    numbers = [re.sub(r"\D", "", item["mark"] or "") for item in items]
    counted = numbers == [str(i + 1) for i in range(len(said))]
    return r" \to ".join(said) if counted and all(len(one) <= _LONGEST_STEP for one in said) else None
