"""Short texts: string match, lists of strings, search, and counts.

Two texts are the same if their normal forms are (`normalised`). The forms of Vero's verifiers (arXiv 2604.04917) are
the base; docs/rewards.md lists where these differ.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from foveate.errors import DataError
from foveate.records import Score, Task
from foveate.rewards import GROUND_TRUTH
from foveate.rewards.choices import options
from foveate.rewards.number_words import in_digits
from foveate.rewards.plain_text import unwrapped
from foveate.rewards.text import (
    NO_ANSWER,
    Extraction,
    check_answer,
    check_choice,
    final_answer,
    multiple_choice,
    score_final_answer,
    truths,
)

_MARK = re.compile("[\u0300-\u0337\u0339-\u036f]")
"""Accents, as Unicode sets them behind their letters. Other combining marks make other letters, and a stroke another
sign: ≠ is not =."""
_ALIKE = str.maketrans({"−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "⁄": "/", "∕": "/"})
_RAISED = re.compile(r"(?<=\d)(?=[⁰¹²³⁴-⁹])")
_BESIDE = re.compile(r"(?<=\d)(?=[½¼¾⅐-⅞↉])")
"""Behind a digit, a raised figure and a fraction are numbers of their own: 10² is not 102, and 1½ not 11/2."""
_STROKE = re.compile(r"(?<=\d)\s+/\s+(?=\d)")
_POWER = re.compile(r"(?<=[^\W\d_])\^\{?(\w+)\}?")
_ARROW = re.compile(r"(?<![-=])[-=]+>|<-+(?=\s)|[\u2190-\u21ff]|^\s*\+(?=\.?\d)|^\s*=")
"""Arrows, a plus before a number and a leading equals sign, which say nothing."""
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TOKEN = re.compile(
    r"(?<![\w).])-?(?=\.?\d)(?:\.\d+|[^\W_]+(?:(?<=\d)[./](?=\d)[^\W_]+)*)|[^\W_]+(?:(?<=\d)[./](?=\d)[^\W_]+)*"
    r"|[+<>=≠≤≥±×÷√∞^]|(?<=[^\W\d_])#"
)
_WHOLE = re.compile(r"(-?\d+)\.0+")
_ARTICLES = frozenset(("a", "an", "the"))
_ITEM = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|-?\d+(?:\.\d+)?"
_PYTHON_LIST = re.compile(rf"[\[({{]\s*(?:(?:{_ITEM})\s*(?:,\s*(?:{_ITEM})\s*)*,?)?\s*[\])}}]")
_PYTHON_ITEM = re.compile(_ITEM)
_SEPARATOR = re.compile(r"\s*(?:[,;、，；\n]+(?:\s*and\b)?|\\\\)\s*")
_AND = re.compile(r"\s*(?:\band\b|\s&\s)\s*")
_ITEM_MARK = re.compile(r"(?:[-*•]|\d{1,2}[.)])\s+")
_NUMBER = re.compile(
    r"(?<![\w.])(?P<number>-?(?:\d{1,3}(?:,\d{3}){1,6}|\d{1,20})(?:\.\d{1,20})?)(?![\d/]|\.\d|,\d{3}(?!\d)|e\d|st\b|nd\b|rd\b|th\b|\s*\\?%)"
    r"(?:\s*(?P<scale>hundred|thousand|k|million|billion|dozen)\b)?"
)
_SCALES = {"hundred": 100, "thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_BOUND = re.compile(
    r"(?:\bnot|n't|\bthan|\bat\s+(?:least|most)|\bover|\bunder|\bup\s+to)\s+(?:\w+\s+)?$|[<>≤≥]\s*$", re.I
)
"""What makes of the number behind it one that is denied, or a bound."""
_WORD = re.compile(r"[A-Za-z][A-Za-z-]*|[\u4e00-\u9fff]+")
_NOTHING = re.compile(
    r"(?:there(?:'s|\s+is|\s+are)\s+|I\s+(?:can\s+)?(?:see|count|find)\s+)?(?:none|nothing"
    r"|no\s+(?!answer|idea|doubt|clue|problem|way|need|one\b|more|less|fewer)[\w-]+)(?:\s+(?!clear|certain|sure)[\w-]+){0,8}[.!\s]*",
    re.IGNORECASE,
)
_LONGEST_LIST = 20_000
_MOST_OFF = 100  # one wild answer does not decide the mean
_LONGEST_COUNT = 400
"""Characters of an answer in which counts in words are looked for."""
_NEAR = 30
"""Characters before a number in which it is denied."""


def normalised(text: str) -> str:
    r"""The normal form of a short text: characters that Unicode calls alike are one (NFKC), accents and letter case are
    gone, so are `\text{}`, bold and quotes, commas between thousands, zeros behind a whole number's point, articles and
    all punctuation. Numbers keep their sign, point and stroke: `-5` is not `5`, and `3.5` not `3 5`. Signs of
    mathematics stay, too: `C++` is not `C#`, `x > 3` not `x < 3`, `10^2` not `102`. An article stays at the end
    (`vitamin A`) and where nothing but single letters would be left."""
    bare = _one_form(_BESIDE.sub(" ", _RAISED.sub("^", unwrapped(text))))
    bare = unicodedata.normalize("NFC", _MARK.sub("", unicodedata.normalize("NFD", bare))).casefold()
    bare = _POWER.sub(r"\1", _ARROW.sub(" ", bare))
    words = [_number(word) for word in _TOKEN.findall(_THOUSANDS.sub("", bare))]
    kept = [word for word in words[:-1] if word not in _ARTICLES] + words[-1:]
    return " ".join(kept if any(len(word) > 1 for word in kept) else words)


def _one_form(text: str) -> str:
    same = unicodedata.normalize("NFKC", text.translate(_ALIKE)).translate(_ALIKE)
    same = _STROKE.sub("/", same)
    return same.replace("<=", "≤").replace(">=", "≥").replace("!=", "≠")


def _number(token: str) -> str:
    whole = _WHOLE.fullmatch(token)
    return whole[1] if whole else re.sub(r"^(-?)\.", r"\g<1>0.", token)


def same_text(one: str, other: str) -> bool:
    """Whether two texts have one normal form; texts that are nothing but punctuation must be equal as they stand."""
    return _key(one) == _key(other) != ""


def _key(text: str) -> str:
    """The normal form of a text; of nothing but punctuation, the text as it stands."""
    return normalised(text) or text.strip()


def entries(value: object) -> list[str] | None:
    """The entries of a list, also of one that is text, as JSON or as Python writes lists and sets of texts and numbers;
    None for anything else."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        bare = value.strip()
        if bare[:1] not in ("[", "(", "{") or len(bare) > _LONGEST_LIST:
            return None
        try:
            value = json.loads(bare)
        except (ValueError, RecursionError):
            if not _PYTHON_LIST.fullmatch(bare):
                return None
            value = [_unquoted(item) for item in _PYTHON_ITEM.findall(bare)]
    if not isinstance(value, list | tuple):
        return None
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in value):
        return None
    return [one if isinstance(one, str) else f"{one:g}" if isinstance(one, float) else str(one) for one in value]


def _unquoted(item: str) -> str:
    return re.sub(r"\\(.)", r"\1", item[1:-1]) if item[:1] in "'\"" else item


def accepted_texts(task: Task) -> list[str]:
    """The accepted answers of a task: as `text.truths`, and the entries of a list that is written as text. Raises
    DataError for a ground truth that is neither text nor number, and for an empty entry."""
    for field, fault in check_texts(task):
        raise DataError(f"{task.where}, field {field}: {fault}")
    return entries(task.answer) or truths(task)


# ------------------------------------------------------------------------------------------------------------ rewards


def string_match(text: str, task: Task, *, extraction: Extraction = "text") -> Score:
    """1 if the final answer is an accepted text in normal form (`normalised`), else 0. A list of ground truths, also
    one written as text, accepts any of its entries. Parts: accuracy, parsed."""
    accepted = accepted_texts(task)
    return score_final_answer(
        text, task, extraction, lambda answer, _: any(same_text(answer, truth) for truth in accepted)
    )


def string_list(text: str, task: Task, *, extraction: Extraction = "text", partial: bool = True) -> Score:
    """A list of texts in any order: 2 m / (p + k) for m entries in common of p in the answer and k in the ground truth
    (F1), or without `partial` 1 for the whole list and else 0. Entries are compared in normal form, each counted once
    per occurrence. An answer writes its list as JSON, or with commas, semicolons, line breaks and `and`. Parts:
    accuracy, precision, recall, parsed."""
    wanted = Counter(map(_key, accepted_texts(task)))
    answer = final_answer(text, extraction)
    if answer is None:
        return Score(0.0, {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "parsed": 0.0}, note=NO_ANSWER)
    written = entries(answer)
    if written is None:
        bare = unwrapped(answer).strip().strip("$[]() ").removesuffix(".")
        parts = [_ITEM_MARK.sub("", part) for part in _SEPARATOR.split(bare) if part]
        written = [one for part in parts for one in ([part] if _key(part) in wanted else _AND.split(part)) if one]
    given = Counter(map(_key, written))
    common = (given & wanted).total()
    right = float(given == wanted)
    f1 = 2 * common / (given.total() + wanted.total()) if given or wanted else 1.0
    parts = {
        "accuracy": right,
        "precision": common / given.total() if given else float(not wanted),
        "recall": common / wanted.total() if wanted else float(not given),
        "parsed": 1.0,
    }
    return Score(f1 if partial else right, parts)


def search(text: str, task: Task, *, extraction: Extraction = "text") -> Score:
    """The answer to a question about something small in a large image: as `multiple_choice` where the row has options,
    else as `string_match`. Parts: accuracy, parsed."""
    if options(task, numbered=True):
        return multiple_choice(text, task, extraction=extraction)
    return string_match(text, task, extraction=extraction)


def counting(text: str, task: Task, *, extraction: Extraction = "text") -> Score:
    """1 if the answer gives the right count, else 0. The count may be in digits or in words (`seven`, `none`) and stand
    in a sentence, if that holds one number only. Parts: accuracy; parsed, 1 if a count was found; error, how far it is
    off."""
    wanted = Fraction(truths(task)[0])
    answer = final_answer(text, extraction)
    given = count_in(answer) if answer is not None else None
    if given is None:
        return Score(0.0, {"accuracy": 0.0, "parsed": 0.0}, note="no count in the answer")
    right = float(given == wanted)
    return Score(right, {"accuracy": right, "parsed": 1.0, "error": float(min(abs(given - wanted), _MOST_OFF))})


def count_in(text: str) -> Fraction | None:
    """The one number of a text, in digits (`3`, `2 dozen`) or in words; None where there is none, or several different
    ones, and for one that is denied or a bound (`not 3`, `more than 3`). Ordinals and percent are no counts."""
    bare = unwrapped(_one_form(text))
    matches = [*_NUMBER.finditer(bare)]
    if any(_BOUND.search(bare, max(one.start() - _NEAR, 0), one.start()) for one in matches):
        return None
    found = {Fraction(one["number"].replace(",", "")) * _SCALES.get(one["scale"] or "", 1) for one in matches}
    if len(bare) <= _LONGEST_COUNT:
        said = {Fraction(number) for number in _in_words(bare)}
        found |= said - {1} if found else said  # beside digits, one is mostly a pronoun
        if not found and _NOTHING.fullmatch(bare.strip()):
            return Fraction(0)
    return found.pop() if len(found) == 1 else None


def _in_words(text: str) -> Iterator[str]:
    """The whole numbers that a text says in words, in digits."""
    end = 0
    for found in _WORD.finditer(text):
        if found.start() < end or found.group().casefold() in _ARTICLES:
            continue
        rest = text[found.start() :]
        said = in_digits(rest)
        number = re.match(r"-?\d+(?![\d.])", said)
        if number and said != rest and not _BOUND.search(text, max(found.start() - _NEAR, 0), found.start()):
            yield number.group()
            end = len(text) - len(said[number.end() :])


# ------------------------------------------------------------------------------------------------------------- checks


def check_texts(task: Task) -> list[tuple[str, str]]:
    """The faults of a task whose ground truth must be text, a number, or a list of them, as (field, what is wrong)."""
    found = entries(task.answer)
    if found is not None and not all(entry.strip() for entry in found or [""]):
        return [(GROUND_TRUTH, f"{task.answer!r:.80} is empty or has an empty entry; leave it out, or the row")]
    return [] if found else check_answer(task)


def check_list(task: Task) -> list[tuple[str, str]]:
    """The faults of a task whose ground truth must be a list of texts or numbers."""
    if entries(task.answer):
        return check_texts(task)
    return [(GROUND_TRUTH, f"{task.answer!r:.80} is no list of texts; write one, as JSON where it is text")]


def check_search(task: Task) -> list[tuple[str, str]]:
    """The faults of a search task: those of multiple choice where it has options, else those of texts."""
    return check_choice(task) if options(task, numbered=True) else check_texts(task)


def check_count(task: Task) -> list[tuple[str, str]]:
    """The faults of a counting task: its ground truth must be one whole number that is not negative."""
    faults = check_answer(task)
    if faults or (len(truths(task)) == 1 and re.fullmatch(r"\d+(?:\.0+)?", truths(task)[0])):
        return faults
    return [(GROUND_TRUTH, f"{task.answer!r:.80} is no count; write one whole number, 0 or more, in digits")]
