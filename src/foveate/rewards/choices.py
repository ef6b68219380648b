"""Multiple choice: the options of a task, the option that an answer names, and the right one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from foveate.data.options import option_columns, options_of
from foveate.records import Task
from foveate.rewards.plain_text import last_value, plain, stated_answer, statements, unified, unwrapped

_MARKS_IN_TEXT = re.compile(
    r"(?:(?<=\s)|^|(?<=[?;,.]))(?:[(【]([A-J]|\d{1,2})[)】]\s*|([A-J]|\d{1,2})(?:[.):]\s+|[.、])\s*)", re.MULTILINE
)
_LEADING = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:option|choice|answer|选项|选|答案)\s*[-:=_是为]?\s*)?"
    r"(?:[(\[【]\s*([A-J])\s*[)\]】]|([A-J])(?=$|[.:)、,;!\n]|\s*\(|\s+-\s|\s+[\u4e00-\u9fff]|\s+(?:only|is|as|because|since|for|which)\b))"
    r"(?P<mark>\s*[-.:)、,;]*)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_ARTICLE_A = (
    r"\s+a\s+(?!(?:and|or|as|at|because|but|for|from|here|in|instead|is|it|not|on|over|since|so|with)\b)[a-z]{2,}"
)
"""An article and its noun, where a letter might stand: `I choose a dog`."""
_NAMED = re.compile(
    rf"(?:\b(?:options?|choices?|only|(?:choose|select|pick)s?(?!{_ARTICLE_A}))\s*:?\s*[(\[]?|[(【]|(?:选项|选择|选)\s*[:(]?\s*)([A-J])(?![A-Za-z'])[)\]】]?"
    r"|(?<![A-Za-z'(])([A-J])(?=\s+(?:is\s+(?:the\s+|most\s+)*(?:correct|right|best|answer|likely)|it\s+is\b|(?:fits|matches|works)\s+best)|\s*项?\s*(?:正确|最))"
    r"|(?:(?:\b(?:is|be|with|so|but|thus|hence|therefore|say|guess|think|maybe|perhaps|probably|likely|surely|certainly|definitely|clearly|leav(?:es|ing))\b,?|'s|[:=]|->)\s+|[是为])(?-i:([A-J])(?=[.!?]*\s*$))",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\s*(?:is|are|was|seems?|looks?|can|does|do)?\s*(?:not|n't|isn't|cannot|can't|doesn't|wrong|incorrect|false|(?:be\s+)?(?:excluded|eliminated|ruled\s+out))\b|不|错",
    re.I,
)
_DENIAL_BEFORE = re.compile(
    r"(?:\b(?:not|cannot|never|nor|neither|than|except|exclud\w+|eliminat\w+)|n't)(?:\s+(?:be|the))*\s*$|\band\s+so\s*$|不$",
    re.I,
)
_ANOTHER = re.compile(
    r"\s*(?:[,;、/&|+]|\.(?=\S)|\.\.+|-\s)*\s*[(\[]?\s*(?:(?:or|and|but|maybe|perhaps|possibly|also|even|&|和|或)\s*)*"
    r"[(\[]?(?![AI]\s+(?!is\b|are\b|or\b|and\b)[a-z])([A-J])(?![A-Za-z'])"
)
"""Another letter right behind one; not `I think`, nor an article."""
_ITEM_END = re.compile(r"\s*(?:[,;、/&|()\n]|\.(?:\s|$)|\b(?:or|and|but|maybe|perhaps|possibly)\b)\s*")
_NEAR = 40  # characters before an option in which a denial of it may stand
_MORE = re.compile(rf"(?:{_ANOTHER.pattern})*")
_SEVERAL = re.compile(r"(?:[A-J](?:\s*(?:,|;|、|and|&)\s*)*)+[A-J]")
_LONGEST_LIST = 120
"""Characters of a text that may be nothing but several letters."""
_LONGEST_LISTING = 1000
"""Characters of a text in which several options may be listed."""
_MARKED = re.compile(r"[(\[【]\s*([A-J])\s*[)\]】]")
_AROUND_SEVERAL = re.compile(
    r"^(?:(?:the\s+)?(?:correct\s+|right\s+)?(?:options?|choices?|answers?|letters?|statements?)\s+(?:are\s+)?|both\s+|only\s+|选项?)+"
    r"|\s*(?:\bare\b|都|均)?\s*(?:\b(?:all|both)\s+)?(?:\bthe\s+)?(?:\b(?:correct|right|true)\b|正确|对)(?:\s+(?:options|answers|ones))?$"
    r"|\s+only$",
    re.IGNORECASE,
)
_GUESS = re.compile(
    r"(?:(?P<head>.{0,200}\b(?:say|think|guess|believe|(?:go|going)\s+with|(?:look|seem)s?(?:\s+like|\s+to\s+be)?))\s+(?:that\s+)?"
    r"(?:(?:it|this|that)(?:'s|\s+is)\s+)?(?P<said>[^,;]{1,100}?)|(?P<given>[^,;]{1,100}?)\s+it\s+is"
    r"|(?:it|this|that)(?:'s|\s+is)?\s+(?:(?:must|should|would|can\s+only|has\s+to)\s+be\s+)?(?P<must>[^,;]{1,100}?))"
    r"(?:,?\s+(?:and\s+|but\s+)?(?:not|rather\s+than)\s.{0,200})?[.!?]*",
    re.I,
)
"""A sentence that says what something may be: `I'd say oak`, `It looks like an oak, not a pine`, `Oak it is`."""
_DENIAL = re.compile(r"n't\b|\b(?:not|never|cannot|no)\b", re.I)
_ARTICLE = re.compile(r"^(?:an?|the)\s+")
_BUT_NOT = re.compile(r",\s+(?:and\s+|but\s+)?not\s+(?:option\s+)?\(?[A-J]\)?(?=[.!,;]|\s*$)")
_PLACE = re.compile(r"(?:the\s+)?(first|second|third|fourth|fifth)\s+(?:option|choice|answer|one)[.!]?", re.IGNORECASE)
_PLACES = ("first", "second", "third", "fourth", "fifth")
_BLANKS = re.compile(r"[^\S\n]+")
_LINES = re.compile(r"(?: ?\n)+ ?")
_SENTENCE = re.compile(r"(?<=[.!?。])\s+|\n+")
_TYPED = [
    (re.compile(pattern), typed)
    for pattern, typed in (
        (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:!]|\\(?:quad|qquad)(?![A-Za-z])", " "),
        (r" ?(?:\^ ?\{? ?\\circ ?\}?|\\degrees?(?![A-Za-z])|°)", "°"),
        (r" ?\\?%", "%"),
        (r"\\[dt]?frac ?\{([^{}]{1,40})\} ?\{([^{}]{1,40})\}", r"\1/\2"),
        (r" ?(?:\\sqrt ?\{(\w{1,20})\}|√ ?(\w{1,20}))", r"√\1\2"),
        (r" ?(?:\\pi(?![A-Za-z])|π)", "π"),
        (r" ?(?:\\(?:times|cdot)(?![A-Za-z])|[×·]) ?", "×"),
    )
]
"""LaTeX of a short value, and what one types for it: `130^\\circ` is `130°`."""


# -------------------------------------------------------------------------------------------------------- options


def options(task: Task, numbered: bool = False) -> Mapping[str, str]:
    """The options of a multiple-choice task, label -> value; empty if it has none.

    They are `extra_info.choices` or `.options`: a list, a mapping by label, or either as text; or columns of
    `extra_info` named `A`, `B`, ... or `option_A`, ...; or else they stand in the last user message as `A. 5  B. 6`,
    `(A) 5`, `A: 5`, `A、5`, in a row that starts with A and has at least two. With `numbered`, a row of the question
    may be marked 1, 2, ... as well.
    """
    found = given_options(task)
    if found:
        return found
    questions = [message.content for message in task.messages if message.role == "user"]
    return _options_in(questions[-1], numbered) if questions else {}


def given_options(task: Task) -> Mapping[str, str]:
    """The options that a row has in columns, in any of the forms of `foveate.data.options`; empty without any."""
    given = task.meta.get("choices", task.meta.get("options"))
    return options_of(given.tolist() if isinstance(given, np.ndarray) else given) or option_columns(task.meta)


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + i) for i in range(count)]


def _numbers(count: int) -> list[str]:
    return [str(i + 1) for i in range(count)]


@lru_cache(maxsize=4096)
def _options_in(question: str, numbered: bool) -> Mapping[str, str]:
    question = unified(question)
    marks = [(found[1] or found[2], found) for found in _MARKS_IN_TEXT.finditer(question)]
    return _row(question, marks, "A") or (_row(question, marks, "1") if numbered else {})


def _row(question: str, marks: list[tuple[str, re.Match[str]]], first: str) -> Mapping[str, str]:
    """The last row of marks that counts up from `first`, with the text behind each."""
    same = [(label, found) for label, found in marks if label.isdigit() == first.isdigit()]
    starts = [i for i, (label, _) in enumerate(same) if label == first]
    if not starts:
        return {}
    row = same[starts[-1] :]
    expected = _numbers(len(row)) if first.isdigit() else _letters(len(row))
    count = next((i for i, (label, _) in enumerate(row) if label != expected[i]), len(row))
    ends = [found.start() for _, found in row[1:]] + [len(question)]
    found = {label: question[mark.end() : ends[i]].strip() for i, (label, mark) in enumerate(row[:count])}
    found[expected[count - 1]] = found[expected[count - 1]].partition("\n")[0].strip()
    return found if len(found) > 1 else {}


# ------------------------------------------------------------------------------------------ the option of an answer


def named_option(answer: str, values: Mapping[str, str]) -> str | None:
    """The option that a final answer names, by its value or its label: `B`, `(b)`, `B. 5 cm`, `Option B`, `The correct
    answer is **B**.`, `5 cm`. The last statement of an answer goes first, then its last sentence that names an option.

    None for an answer that names none, several at once, a label with the value of another option, or a label that is
    none of `values`; without values, letters from A to J are labels.
    """
    text = re.sub(r"['‘]([A-J])['’]", r" \1 ", _typed(unwrapped(unified(answer))))
    text = re.sub(r"\\[()]|[$\"“”`<>{}]", " ", text)
    text = _LINES.sub("\n", _BLANKS.sub(" ", text))  # patterns below take cubic time on long runs of white space
    text = _BUT_NOT.sub("", re.sub(r" (?=[,.;:!)])", "", text).strip())
    by_value = {bare: label for label, value in values.items() if (bare := _bare(value))}
    by_value = {value.removesuffix("°"): label for value, label in by_value.items()} | by_value
    listed = len(text) <= _LONGEST_LISTING and _lists_several(text, by_value)
    for part in _chosen_parts(text, by_value) if listed else _parts(text):
        if listed and _lists_several(part, by_value):
            continue
        if found := _PLACE.fullmatch(part.strip()):
            return dict(enumerate(values)).get(_PLACES.index(found[1].lower()))
        label = by_value.get(_bare(part)) or _leading_label(part, values, by_value)
        if label is not None:
            return label if label in values or (label and not values) else None
    for sentence in reversed(_SENTENCE.split(text)):
        named = set(_mentioned(sentence))
        if named:
            only = named.pop() if len(named) == 1 else None
            return only if only in values or not values else None
        if found := _GUESS.fullmatch(sentence.strip()):
            head, said, given = found["head"] or "", found["said"], found["given"] or found["must"]
            label = by_value.get(_bare(said or given))
            if label and not _DENIAL.search(head):
                return label
    return None


def _lists_several(text: str, by_value: Mapping[str, str]) -> bool:
    """Whether a text lists several options by value, with their labels or without: `red, green`, `A. red B. green`."""
    said = _bare(text)
    if said in by_value or sum(value in said for value in by_value) < 2:
        return False
    items = {by_value.get(_bare(item)) for item in _ITEM_END.split(text)} - {None}
    for value, label in by_value.items():
        item = re.compile(rf"(?<![^\W_]){re.escape(label.casefold())}[.):\s]+{re.escape(value)}(?![^\W_])")
        items |= {label for found in item.finditer(said) if not _DENIED.match(said, found.end())}
    return len(items) > 1


def _chosen_parts(text: str, by_value: Mapping[str, str]) -> Iterator[str]:
    """The parts of a text that lists options which may choose one: its statements, and at the end a value again."""
    yield from reversed([*statements(text)])
    last = _bare([part for part in _SENTENCE.split(text) if part.strip()][-1])
    if last in by_value and _bare(text).count(last) > 1:
        yield last


def _parts(text: str) -> Iterator[str]:
    """The parts of an answer that may be nothing but an option, in the order in which they count."""
    yield text
    stated = [*statements(text)]
    yield from reversed(stated)
    *earlier, last = [part for part in _SENTENCE.split(text) if part.strip()] or [""]
    if earlier:
        yield last
    yield last_value(text)


def _bare(text: str) -> str:
    return _ARTICLE.sub("", _typed(plain(text)))


def _typed(text: str) -> str:
    for pattern, typed in _TYPED:
        text = pattern.sub(typed, text)
    return text


def _leading_label(text: str, values: Mapping[str, str], by_value: Mapping[str, str]) -> str | None:
    """The label that a text begins with, or "" where another label or the value of another one follows; None where it
    begins with none, or denies it."""
    if text.strip() in values:
        return text.strip()
    found = _LEADING.fullmatch(text.strip())
    if found is None:
        return _value_label(text, by_value)
    label = (found[1] or found[2]).upper()
    rest = found["rest"]
    other = by_value.get(_bare(rest)) or by_value.get(_bare(rest).strip("()"), label)
    again = _ANOTHER.match(found["mark"] + rest)
    if again and _DENIED.match(again.string, again.end()):
        again = None
    if _DENIED.match(rest):
        return None
    return "" if other != label or (again and again[1].upper() != label) else label


def _value_label(text: str, by_value: Mapping[str, str]) -> str | None:
    """The label of the value that a text begins with, followed by a mark: `blue, because of the sky`; of a letter
    before its own value: `C blue`; "" where another letter stands behind it: `blue (A)`."""
    bare = _bare(text)
    for value, label in by_value.items():
        if value and (bare == f"{label.casefold()} {value}" or re.match(rf"{re.escape(value)}\s*[,;(]", bare)):
            marked = re.match(r"\s*\(\s*([a-j])\s*\)", bare.removeprefix(value))
            return label if marked is None or marked[1].upper() == label else ""
    return None


def _mentioned(sentence: str) -> Iterator[str]:
    """The options that a sentence names without denying them."""
    for found in _NAMED.finditer(sentence):
        more = _MORE.match(sentence, found.end())
        before = sentence[max(found.start() - _NEAR, 0) : found.start()]
        denied = _DENIED.match(sentence, more.end() if more else found.end()) or _DENIAL_BEFORE.search(before)
        if not denied:
            yield (found[1] or found[2] or found[3]).upper()
            if another := _ANOTHER.match(sentence, found.end()):
                yield another[1]


# --------------------------------------------------------------------------------------------------- ground truths


def right_option(truth: Any, values: Mapping[str, str]) -> str | None:
    """The option that a ground truth means, or None: by label, by value, or a whole number as an index from 0 on."""
    if isinstance(truth, float) and truth.is_integer():
        truth = int(truth)
    if isinstance(truth, int | np.integer) and not isinstance(truth, bool):
        labels = list(values)
        if str(truth) in values:
            return str(truth)
        if 0 <= truth < len(labels):
            return labels[int(truth)]
    text = str(truth).strip()
    by_value = {_bare(value): label for label, value in values.items()}
    found = text if text in values else by_value.get(_bare(text)) or named_option(text, values)
    if found is None and text.isdecimal() and not any(label.isdigit() for label in values):
        return right_option(int(text), values) if int(text) < len(values) else None
    return found


def several_options(text: str, values: Mapping[str, str]) -> frozenset[str]:
    """The labels of an answer that is, or states, nothing but several letters: `A, C`, `故选：AC`; else empty."""
    said = " ".join(stated_answer(unwrapped(unified(text))).split())
    if len(said) > _LONGEST_LIST:
        return frozenset()
    bare = _MARKED.sub(r"\1", said).strip(" $.()")
    bare = _AROUND_SEVERAL.sub("", bare).strip()
    letters = re.findall(r"[A-J]", bare) if _SEVERAL.fullmatch(bare) else []
    single = frozenset(letters)
    return single if len(single) == len(letters) and (single <= set(values) or not values) else frozenset()
