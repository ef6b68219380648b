"""The options of a question that stand in columns beside it: read in the forms that datasets have, and shown to the
model where the question does not show them itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from foveate.data.conversations import ROLE_NAMES, TURN_KEYS
from foveate.data.sources import read_literal

OPTION_COLUMNS = ("choices", "options")
LABEL_KEYS = ("label", "letter", "key", "id")
TEXT_KEYS = ("text", "value", "content", "option")
"""The keys of an option that is a mapping of its own."""

_MARKED = re.compile(r"\s*[(\[【（]?\s*([A-Za-z]|\d{1,2})\s*[.):\]、】．）：]\s*(.*)", re.DOTALL)
_MARKED_IN_TEXT = re.compile(r"(?:^|(?<=[\s;,]))(?=(?:[(\[【][A-Z][)\]】]|[A-Z](?:[.):]\s|、))\s*\S)")
_COLUMN = re.compile(r"(?i:option|choice)[_ ]?[A-Ja-j]|[A-J]")

Options = Mapping[str, str]
"""The text of each option by its label."""


def options_of(given: Any) -> Options:
    """The options in a value: a list of texts, or of mappings with a label and a text; a mapping by label, or of two
    lists; or a text that holds one of them, or has the options marked or a line each. Empty for anything else."""
    if isinstance(given, str):
        return options_of(read_literal(given)) or options_of(_parts(given))
    if isinstance(given, Mapping):
        labels, texts = _first(given, LABEL_KEYS), _first(given, TEXT_KEYS)
        if isinstance(labels, list) and isinstance(texts, list):
            return _labelled(labels, texts)
        return _labelled(list(given), list(given.values()))
    if not isinstance(given, list | tuple):
        return {}
    values = [value for value in given if value is not None]
    if values and all(isinstance(value, Mapping) for value in values):
        labels, texts = ([_first(value, keys) for value in values] for keys in (LABEL_KEYS, TEXT_KEYS))
        return _labelled(_letters(len(values)) if None in labels else labels, texts)
    marks = [_MARKED.fullmatch(str(value)) for value in values]
    labels = [mark[1].upper() for mark in marks if mark]
    if labels in (_letters(len(values)), [str(i + 1) for i in range(len(values))]):
        return _labelled(labels, [mark[2].strip() for mark in marks if mark])
    return _labelled(_letters(len(values)), values)


def option_columns(row: Mapping[str, Any]) -> Options:
    """The options in columns of their own, `option_A`, ... or `A`, ...: from A on, and at least two."""
    named = {label: row[name] for label, name in _option_names(tuple(row)).items()}
    if len(named) < 2:
        return {}
    options = _labelled(list(named), list(named.values()))
    return dict(sorted(options.items())) if {"A", "B"} <= {*options} else {}


@lru_cache(maxsize=4096)
def _option_names(names: tuple[str, ...]) -> Mapping[str, str]:
    return {name[-1].upper(): name for name in names if _COLUMN.fullmatch(name)}


def with_options(prompt: Any, options: Options, written: Any = None) -> Any:
    """The prompt, a text or turns, with the options under its last question, a line each, unless it has them with
    marks: `A. cat`, `(A) cat`, `A: cat`. written: the options as the row has them; marks of their own are kept."""
    if all(text == label for label, text in options.items()):  # bare letters, as where the image shows the options
        return prompt
    marked = isinstance(written, list) and all(isinstance(one, str) and _MARKED.fullmatch(one) for one in written)
    lines = written if marked else [f"{label}. {text}" for label, text in options.items()]
    listed = "\n".join(lines)
    if isinstance(prompt, str):
        return prompt if shows(prompt, options) else f"{prompt}\n{listed}"
    asked = [position for position, turn in enumerate(prompt) if _role(turn) == "user"]
    if not asked or any(shows(_text(prompt[position]), options) for position in asked):
        return prompt
    turn = prompt[asked[-1]]
    key = next(inner for outer, inner in TURN_KEYS.items() if outer in turn)
    content = turn.get(key)
    more = [*content, {"type": "text", "text": f"\n{listed}"}] if isinstance(content, list) else f"{content}\n{listed}"
    return [*prompt[: asked[-1]], {**turn, key: more}, *prompt[asked[-1] + 1 :]]


def shows(question: str, options: Options) -> bool:
    """Whether a question shows these options: each with its mark in front, or the marks of all at the start of
    lines."""
    plain = " ".join(re.sub(r"[*_`]", "", question).split()).casefold()
    lines = [line.lstrip(" *_`-") for line in question.splitlines()]
    return all(_is_marked(plain, label, text) for label, text in options.items()) or all(
        any((mark := _MARKED.match(line)) and mark[1].upper() == label for line in lines) for label in options
    )


def _is_marked(plain: str, label: str, text: str) -> bool:
    label = re.escape(label.casefold())
    text = re.escape(" ".join(re.sub(r"[*_`]", "", text).split()).casefold())
    return (
        re.search(rf"(?<!\w)(?:[(\[【]\s*{label}\s*[)\]】]|{label}\s*[.):、,]|{label} -)[.:]?\s*{text}", plain)
        is not None
    )


def _labelled(labels: Sequence[Any], texts: Sequence[Any]) -> Options:
    """Options by label, without empty ones (None, NaN); none where there are fewer than two, or one is no text."""
    if len(labels) != len(texts) or not all(isinstance(text, str | int | float | None) for text in texts):
        return {}
    pairs = zip(labels, texts, strict=True)
    found = {
        str(label).strip(" ().:").upper(): str(text) for label, text in pairs if text not in (None, "") and text == text
    }
    return found if len(found) > 1 else {}


def _first(given: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((given[key] for key in keys if key in given), None)


def _letters(count: int) -> list[str]:
    return [chr(ord("A") + i) for i in range(count)]


def _parts(text: str) -> list[str]:
    """The options of a text, marked one behind the other or a line each."""
    starts = [found.start() for found in _MARKED_IN_TEXT.finditer(text)]
    if len(starts) > 1:
        pieces = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
        return [piece.strip().rstrip(";,") for piece in pieces]
    return [line.strip() for line in text.splitlines() if line.strip()]


def _role(turn: Any) -> Any:
    role = next((turn[key] for key in TURN_KEYS if key in turn), None) if isinstance(turn, Mapping) else None
    return ROLE_NAMES.get(role, role) if isinstance(role, str) else None


def _text(turn: Mapping[str, Any]) -> str:
    content = next((turn[inner] for outer, inner in TURN_KEYS.items() if outer in turn and inner in turn), "")
    if not isinstance(content, list):
        return str(content)
    return "\n".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
