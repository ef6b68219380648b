"""Text of rows and requests is text: what a person or a web page wrote makes no control tokens.

A tokenizer reads `<|im_end|>` as its token wherever it stands. In the content of a message that would end the turn and
let the text begin another one. So control words in contents are put behind stand-ins while the chat template is
rendered, and become tokens of ordinary text. Texts without such words, that is nearly all, go the plain way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from foveate.errors import DataError, one_line

_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))
"""Characters that mean nothing by themselves."""


def pattern_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """Finds any of some words, the longest first; None for no words."""
    ordered = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


class Disguise:
    """Stand-ins for control words in some texts: one character for each word, which none of the texts has."""

    def __init__(self, words: Sequence[str], texts: Iterable[str]) -> None:
        used = set(chain.from_iterable(texts))
        free = (chr(code) for code in chain(*_PRIVATE) if chr(code) not in used)
        self._stand_ins = dict(zip(words, free, strict=False))
        if len(self._stand_ins) < len(words):
            raise DataError("has control words and uses nearly all private characters of Unicode; leave these out")
        self._words = {character: word for word, character in self._stand_ins.items()}
        self._pattern = pattern_of(words)
        self.words = tuple(words)

    def hide(self, text: str) -> str:
        """The text with stand-ins for its control words."""
        return self._pattern.sub(lambda found: self._stand_ins[found[0]], text) if self._pattern else text

    def parts(self, rendered: str) -> Iterator[tuple[bool, str]]:
        """A rendered prompt in pieces, each with whether it is a control word that the template wrote; in the others
        stand-ins have become the words of the contents again."""
        place = 0
        for found in self._pattern.finditer(rendered) if self._pattern else ():
            yield False, self._shown(rendered[place : found.start()])
            yield True, found[0]
            place = found.end()
        yield False, self._shown(rendered[place:])

    def _shown(self, text: str) -> str:
        return text.translate({ord(character): word for character, word in self._words.items()})


def word_id(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The token of a word of the vocabulary."""
    number = tokenizer.convert_tokens_to_ids(word)
    assert isinstance(number, int)
    return number


@contextmanager
def without_panics() -> Iterator[None]:
    """Within it a panic of the tokenizers library, which is no Exception, is a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer cannot do that ({one_line(error)[:300]})") from error


def encode_text(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...], text: str) -> list[int]:
    """The tokens of a text in which control words are ordinary text. Raises DataError, without a place, for a tokenizer
    that cannot do that."""
    try:
        with without_panics():
            plain = _plain_tokenizer(tokenizer, len(tokenizer), words)
            ids = plain.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except DataError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        what = f"which its tokenizer cannot write as text ({one_line(error)[:200]})"
        raise DataError(f"holds control words ({', '.join(words)}), {what}") from error
    if not {*ids}.isdisjoint(word_id(tokenizer, word) for word in words):
        raise DataError(f"holds control words ({', '.join(words)}), which its tokenizer cannot write as text")
    return ids


@lru_cache(maxsize=8)
def _plain_tokenizer(tokenizer: PreTrainedTokenizerBase, _size: int, words: tuple[str, ...]) -> Tokenizer:
    """The tokenizer, of that many tokens, without its control words: their ids have other words, which no text
    holds."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise DataError(f"holds control words ({', '.join(words)}), which its tokenizer cannot write as text")
    spec: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    other = {word: f"\U0010fffd{number}\U0010fffd" for number, word in enumerate(words)}
    for token in spec["added_tokens"]:
        token["content"] = other.get(token["content"], token["content"])
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, dict):
        spec["model"]["vocab"] = {other.get(piece, piece): number for piece, number in vocabulary.items()}
    else:
        spec["model"]["vocab"] = [[other.get(piece, piece), score] for piece, score in vocabulary]
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    plain = Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = False
    return plain
