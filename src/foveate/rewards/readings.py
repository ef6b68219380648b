r"""Readings of a final answer: the answer itself, and its value where it is a sentence or carries a remark.

A sentence says what stands behind its verb (`The pH is 7.4`), what it sets in bold, the only number in it (`I count 7
birds`), the only formula in it (`the vertex $V(1;4)$`), or `yes` and `no` at its start; of a sentence with a conclusion
(`..., so the side is 5`), this. Nothing is read from a sentence that denies or compares. Lines that each give a name
its value, at the end of a text, are a list; see `foveate.rewards.closing` for these and for verdicts at the end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from foveate.rewards.closing import closing_list, closing_verdict
from foveate.rewards.equations import REJECTED
from foveate.rewards.names import FUNCTIONS, criterion
from foveate.rewards.phrases import CHANGE
from foveate.rewards.plain_text import last_sentence, last_value, stated_answer, unified, unwrapped, with_powers
from foveate.rewards.units import read_unit, same_quantity, split_unit

_BOLD = re.compile(r"\*\*([^*]+)\*\*")
_VERDICT = re.compile(
    r"(yes|no|true|false|correct|incorrect|是|否|对|错|正确|错误)(?:的$|的?\s*[,;:.!。，；—-]+\s*\S)", re.IGNORECASE
)
_DENIAL = re.compile(
    r"n't\b|\b(?:not|never|cannot|no|nor|neither|than|least|most|over|under|nearly|almost|if|unless|per|every|each|[b-hj-z](?!-[a-z]{3}))\b"
    r"|[不没非]|超过|至少|最多",
    re.I,
)
_COUNTED = re.compile(
    r"(?P<words>[A-Z][A-Za-z']*,?(?:\s+[a-z][a-z']*,?)+\s+|[^\x00-\x7f]{2,40}?\s*)(?P<value>\\?[$€£¥]?\d.*)", re.DOTALL
)
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_TAIL = re.compile(
    r",?\s+(?:which|because|since|so that|as (?:shown|seen|indicated)|according to|based on|from the|for a total)\b.*$"
    r"|\s+(?:in|during|by|since)\s+(?:the\s+year\s+)?[12]\d{3}(?!\d)\D*$"
    r"|,\s+(?:making|indicating|as|so|and)\b[^\d]*$|[,，][^,，\d]*[\u4e00-\u9fff].*$",
    re.DOTALL,
)
_CONNECTIVE = re.compile(
    r"(?:(?:therefore|thus|so|hence|then|finally|consequently|clearly|now|we\s+(?:get|have|find|obtain|see)(?:\s+that)?"
    r"|so\s+that|that)(?:,\s*|\s+)|(?:因此|所以|故|得|可得|解得|于是|则)[,:，：]?\s*)+",
    re.IGNORECASE,
)
_WHERE = re.compile(r",?\s+where\s+\$?\\?[A-Za-z]\w*\$?\s+(?:is|are|denotes|represents)\s(?!.*\d).*$", re.DOTALL)
_AGAIN = re.compile(
    r"(.{1,60}?\w),?\s*(?:\bor|i\.e\.,?|that\s+is,?|which\s+(?:is|equals)|=|\\approx)\s+(.{1,60}?)(?:,.*|\s+(?:long|in\s+total))?[.]?"
)
"""A quantity that is said again in another unit: `5 km, or 5000 m, long`."""
_IS = re.compile(
    r"(?P<who>[^,;:]{1,80}?)\s+(?:is|are|was|were|has|have|had|shows?|belongs?\s+to)\s+(?P<what>.+)", re.IGNORECASE
)
_WHICH = re.compile(r"\b(?:which|who|what)\b|哪|谁", re.IGNORECASE)
_VALUE_FIRST = re.compile(
    r"(?P<value>\$[^$]+\$|[-+\d\\][^A-Za-z]*(?:\\[a-z]+[^A-Za-z]*){0,6}?)\s+(?P<what>[a-z].+)", re.IGNORECASE
)
_BETWEEN_CLAUSES = re.compile(
    r"\s*[,;]\s+(?:(?:and|while|whereas|but|so|which\s+makes|therefore|hence|thus)\s+)?(?=\S)|\s+(?:and|while|whereas|but)\s+",
    re.IGNORECASE,
)
_GIVES = re.compile(
    r"(?P<subject>[^\d=$]{3,60}?)\s+(?:(?:is|are|was|were|of|equals)\s+)?(?=[-$\\]?\d|\\frac|\\sqrt)", re.IGNORECASE
)
_HEDGE = re.compile(r"\b(?:or|maybe|perhaps|either|possibly)\b", re.IGNORECASE)
_NEGATED = re.compile(r"n't\b|\b(?:not|no|never|except|other|without|neither|nor)\b", re.IGNORECASE)
_SMALL_WORDS = frozenset((
    "a", "an", "the", "of", "in", "on", "at", "to", "is", "are", "was", "were", "has", "have", "had", "it", "that",
    "this",
))  # fmt: skip
_DOING = re.compile(r"^[a-z]{2,}ing\s+")
_VERB = re.compile(r"(?:it|they|he|she|this|that|the\s+[a-z]+)\s+([a-z]{3,})", re.IGNORECASE)
"""A subject and what it does: `It decreases`."""
_REMARK = re.compile(r"(?P<said>.*?[\w%}°$])\s+\((?P<remark>[^()]*)\)", re.DOTALL)
_MORE = re.compile(
    r"(?:or|i\.e\.,?|about|approximately|approx\.?|\\approx|=|roughly|also|that is,?)\s*(?=[\d$\\A-Za-z-])", re.I
)
_LINES = re.compile(r"(?:\s*\$?[A-Za-z](?:_\w)?\s*=\s*[^=\n]{1,80}(?:\n|$)){2,5}")
"""Equations in lines of their own."""
_CLAUSE = re.compile(
    r"[,;]\s+(?:and\s+)?(?:so|thus|therefore|hence|giving|which\s+(?:gives|means|is))(?:\s+that)?,?\s+|[,，]\s*(?:所以|因此|故|则|即|得)",
    re.IGNORECASE,
)
_YIELDS = re.compile(
    r"\b(?:gives?|yields?|get|obtain|results?\s+in|find(?:\s+that)?|we\s+have|lies|lie|(?:meet|intersect|occur|located)s?\s+at|(?:cross|touch)(?:es)?\s+at)"
    r"\s+(?:us\s+)?(?=\S)|得到|解得|可得|算得",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?!(?:if|when|unless|for|initially|first|at\s+first|originally|otherwise|alternatively|say|suppose|assuming|let|given|not|without|except|either|neither)\b)[A-Z][a-z]+(?:\s[^,=]{0,80})?,\s+"
    r"(?=\$|[A-Za-z](?:_\w|_\{\w+\})?\s*=|[A-Z]{2}\s*=|\\|-?\d)",
    re.IGNORECASE,
)
"""What leads to an equation at the end of a sentence: `Taking square roots, x = 4`."""
_FORMULA = r"(?:\$\$?[^$]+\$\$?|\\\(.+?\\\))"
_FORMULAS = re.compile(rf"{_FORMULA}(?:\s*(?:,?\s*(?:and|or)\s|[,=]|和|或|、)\s*{_FORMULA})*")
_LEANING = re.compile(
    r"\b(?:of|from|below|above|near|between|beyond|before|after|plus|minus|times|by|with|without|to|and|or|for|where|let|when"
    r"|since|because|as|like|divides?|around|into)\s*$",
    re.IGNORECASE,
)
"""Words with which what follows is no answer."""
_AWAY = re.compile(
    r"\b(?:left|right|below|above|near|between|beyond|before|after|multiple|half|twice|double|close)\s+(?:(?:of|to)\s+)?$",
    re.IGNORECASE,
)
_OF = re.compile(r"of\s+(?:the|all|a|an|its|these|those)\s", re.IGNORECASE)
_CHINESE_VERDICT = re.compile(
    r".*(?:说法|结论|命题|判断|叙述|这)(?:是|都)*(不正确|不对|不成立|正确|错误|成立|对|错)的?[.。]?", re.DOTALL
)
_ASIDE = re.compile(r"(?:an?|the|which|since|because|as|by)\s.*", re.IGNORECASE | re.DOTALL)
_WORDY = re.compile(r"[A-Za-z]{3,}$")
_REASONED = re.compile(
    r"\s+(?:(?:congruence|similarity)\s+)?(?:postulate|theorem|criterion|rule|condition|property)$", re.IGNORECASE
)
_REASON = re.compile(r"\b(?:by|using|from)\s+(?:the\s+)?([^,;.]{1,60})[.!]?$", re.IGNORECASE)
_REASONS = re.compile(
    r"\b(?:which|what|name|state|give|by)\b.*\b(?:postulate|theorem|criterion|rule|property|condition|reason|law|method)"
    r"|\b(?:how|why)\b.*\b(?:congruent|similar)\b",
    re.IGNORECASE | re.DOTALL,
)
"""Questions for the reason of something, which a sentence may name at its end: `They are congruent by SAS.`"""
_LONGEST = 1000
"""Characters of a sentence that is read."""
_APPROXIMATION = re.compile(r"\s*\\approx\s*|\s*≈\s*")


def readings(answer: str, asked: str = "") -> Iterator[str]:
    """Each reading of a final answer to a question, the answer itself first; see the head of this file."""
    yield answer
    if len(answer) < 2:
        return
    text = with_powers(unified(answer))
    bold = _BOLD.findall(last_sentence(text)[:_LONGEST])
    if len(bold) == 1:
        yield bold[0]
        yield from _remarked(unwrapped(bold[0]).strip())
    if said := closing_verdict(text, asked):
        yield said
    text = unwrapped(text).strip()
    sentence = _asked_for(last_sentence(text).strip(), asked)
    if text.endswith("?") and " " in sentence:
        return
    if (found := _VERDICT.match(text)) and stated_answer(text) == text:
        yield found[1]
    if found := _CONNECTIVE.match(sentence):
        yield sentence[found.end() :]
    if "\n" in text and (lines := _LINES.fullmatch(text)):
        yield ", ".join(lines.group().split("\n"))
    if listed := closing_list(text):
        yield listed
    if len(sentence) <= _LONGEST:
        if _follows_prose(text, sentence):
            yield sentence
        yield from _said(text, sentence)
        yield from _concluded(sentence, asked)


def _asked_for(sentence: str, asked: str) -> str:
    """The one of the clauses of a sentence whose subject the question has, where each gives another thing its value:
    of `The perimeter is 20 and the area is 25.` the second where it asks for the area; else the sentence."""
    short = sentence if len(sentence) <= _LONGEST else ""
    clauses = [_GIVES.match(clause) for clause in _BETWEEN_CLAUSES.split(short)]
    if len(clauses) < 2 or None in clauses:
        return sentence
    known = set(re.findall(r"[a-z]{3,}", asked.casefold())) - _SMALL_WORDS
    named = [one for one in clauses if one and set(re.findall(r"[a-z]{3,}", one["subject"].casefold())) & known]
    return named[0].string if len(named) == 1 else sentence


def _follows_prose(text: str, sentence: str) -> bool:
    """Whether a sentence stands behind another one, and not behind a value."""
    before = text[: text.rfind(sentence)].strip()
    return len(re.findall(r"[A-Za-z]{2,}|[\u4e00-\u9fff]", last_sentence(before))) > 2


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
    if (
        found
        and len(_NUMBER.findall(sentence)) == 1
        and not any(denying.search(words) for denying in (_DENIAL, _AWAY, REJECTED, CHANGE))
    ):
        yield found["value"]


def _concluded(sentence: str, asked: str) -> Iterator[str]:
    """The readings of what a sentence comes to: its conclusion, what its calculation yields, its only formula."""
    clause = _CLAUSE.split(sentence)[-1]
    if REJECTED.search(clause):
        return
    if clause != sentence:
        yield clause
        yield last_value(clause)
    if found := _WHERE.search(sentence):
        yield sentence[: found.start()]
        yield last_value(sentence[: found.start()])
    yield from _of_the_question(clause, asked)
    if (found := _AGAIN.fullmatch(last_value(clause))) and same_quantity(split_unit(found[1]), split_unit(found[2])):
        yield found[1]
    if found := _CHINESE_VERDICT.fullmatch(clause):
        yield found[1]
    *before, said = _YIELDS.split(clause)
    if before and not _DENIAL.search(before[-1]):
        yield said
    if found := _LEAD.match(clause):
        yield clause[found.end() :]
    if (found := _REASON.search(clause)) and _REASONS.search(asked) and not _DENIAL.search(clause[: found.start()]):
        yield _REASONED.sub("", found[1])
        yield from _remarked(found[1])
    formulas = [*_FORMULAS.finditer(clause)]
    if len(formulas) != 1:
        return
    words, behind = clause[: formulas[0].start()], clause[formulas[0].end() :].strip(" .")
    if _DENIAL.search(words) or _LEANING.search(words) or _NUMBER.search(words):
        return
    if not behind or (
        _OF.match(behind) and set(behind.casefold().split()) <= set(re.findall(r"\w+", asked.casefold()))
    ):
        yield formulas[0].group()


def _of_the_question(clause: str, asked: str) -> Iterator[str]:
    """The answer of a sentence that otherwise says the question again: `Peru has the lowest bar`, `5 birds are in the
    tree`. Every word of the rest stands in the question, and both deny or neither does."""
    found = _CONNECTIVE.match(clause)
    bare = clause[found.end() if found else 0 :].strip(" .!")
    for found, group in ((_IS.fullmatch(bare), "who"), (_VALUE_FIRST.fullmatch(bare), "value")):
        if found is None or (group == "who" and not _WHICH.search(asked)):
            continue
        said = {_stem(word) for word in re.findall(r"[a-z']+", found["what"].casefold())} - _SMALL_WORDS
        known = {_stem(word) for word in re.findall(r"[a-z']+", asked.casefold())}
        if not said or not said <= known or re.search(r"\d", found["what"]) or _HEDGE.search(bare):
            continue
        if bool(_NEGATED.search(bare)) == bool(_NEGATED.search(asked)):
            yield found[group]


def _stem(word: str) -> str:
    return word.removesuffix("s")


def _remarked(text: str) -> Iterator[str]:
    """The parts of `sodium chloride (NaCl)`, `0.5 (or 1/2)`, `12 (cm)` and `72 km/h (20 m/s)`: what is said, what is
    said again. An aside such as `(a square)` says nothing more."""
    found = _REMARK.fullmatch(_REASONED.sub("", text.rstrip(" .")))
    if found is None:
        return
    said, remark = found["said"].strip(), found["remark"].strip()
    meant = criterion(said.rpartition(" ")[2]), criterion(remark)
    if all(meant):
        if meant[0] == meant[1]:  # else the words are those of another abbreviation
            yield said
            yield remark
        return
    value = last_value(said)
    if same_quantity(split_unit(value), split_unit(remark)):
        yield value
        yield remark
    if _DENIAL.search(remark):
        return
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
    if (words or said[-1:] in "$}") and _ASIDE.fullmatch(remark):
        yield value
    if more or (words and words.group() not in FUNCTIONS):
        yield remark[more.end() :] if more else remark
