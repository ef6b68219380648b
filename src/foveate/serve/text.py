"""The text of an answer while it grows, token by token, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[tuple[int, ...]], str]

_UNFINISHED = "\ufffd"
"""How the first bytes of a character read while the others are in tokens to come."""


class GrowingText:
    """Tokens are decoded with the few before them, so that an answer takes time in proportion to its length. A piece is
    given out as soon as no later token can change it nor make it part of a stop text. `done`: a stop text was found,
    which the text ends before."""

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self.done = False
        self._decode, self._stops = decode, stops
        self._longest = max(map(len, stops), default=0)
        self._text, self._given = "", 0
        self._token_ids: list[int] = []
        self._settled = 0
        """How many of the kept tokens only give context: their text is in `_text`."""
        self._said = 0
        """Characters of the kept tokens that are in `_text`."""

    def add(self, token: int) -> str:
        """The piece of text that is certain since this token; "" for none. Not to be called once it is done."""
        self._token_ids.append(token)
        text = self._decode(tuple(self._token_ids))
        is_whole = not text.endswith(_UNFINISHED)
        self._grow(text if is_whole else text[: -len(_UNFINISHED)])
        if is_whole:
            self._token_ids = self._token_ids[self._settled :]
            self._settled = len(self._token_ids)
            self._said = len(self._decode(tuple(self._token_ids)))
        return self._give(len(self._text) if self.done else len(self._text) - self._held())

    def end(self) -> str:
        """The piece that was held back, when no more tokens come."""
        if not self.done:
            self._grow(self._decode(tuple(self._token_ids)))
        return self._give(len(self._text))

    def whole(self) -> str:
        """All of the text, when no more tokens come."""
        self.end()
        return self._text

    def _grow(self, text: str) -> None:
        """Add what is new in the text of the kept tokens, up to a stop text."""
        before = len(self._text)
        self._text += text[self._said :]
        self._said = max(self._said, len(text))
        since = max(0, before - self._longest + 1)
        places = [place for stop in self._stops if (place := self._text.find(stop, since)) >= 0]
        if places:
            self.done, self._text = True, self._text[: min(places)]

    def _held(self) -> int:
        """The length of the longest end of the text with which a stop text begins."""
        most = min(self._longest - 1, len(self._text))
        return next((n for n in range(most, 0, -1) if self._begins_a_stop(self._text[-n:])), 0)

    def _begins_a_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)

    def _give(self, until: int) -> str:
        piece = self._text[self._given : until]
        self._given = max(self._given, until)
        return piece
