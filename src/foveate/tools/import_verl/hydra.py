"""The value of a `key=value` override, by the grammar of Hydra."""

from __future__ import annotations

import re
from typing import Any

_INTEGER = re.compile(r"[+-]?(?:0|[1-9](?:_?[0-9])*)")
_FLOAT = re.compile(
    r"[+-]?(?:(?:(?:0|[1-9](?:_?[0-9])*)?\.[0-9](?:_?[0-9])*|(?:0|[1-9](?:_?[0-9])*)\.?)(?:e[+-]?[0-9](?:_?[0-9])*)"
    r"|(?:0|[1-9](?:_?[0-9])*)?\.[0-9](?:_?[0-9])*|(?:0|[1-9](?:_?[0-9])*)\.|inf|nan)",
    re.IGNORECASE,
)
_PLAIN = re.compile(r"\\[\\()\[\]{}:=, \t]|[\w/\-+.$%*@?| \t\\:]", re.ASCII)
_INTERPOLATION = re.compile(r"\$\{[^{}]*\}")


class HydraFault(Exception):
    """A value that Hydra refuses, or that is not read here."""


def parse_value(text: str) -> Any:
    """A number, text, boolean, None, list or mapping; what holds `${...}` stays text."""
    if not text.strip():
        return ""
    reader = _Reader(text)
    value = reader.element(",")
    if reader.peek(","):
        raise HydraFault("is a list of alternatives to Hydra; a list is written [a,b]")
    if reader.at < len(text):
        raise HydraFault(f"cannot be read at {text[reader.at : reader.at + 10]!r}")
    return value


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def peek(self, character: str) -> bool:
        self._blank()
        return self.text[self.at : self.at + 1] == character

    def _blank(self) -> None:
        while self.text[self.at : self.at + 1] in (" ", "\t"):
            self.at += 1

    def element(self, stop: str) -> Any:
        if self.peek("["):
            return self._items("]", lambda: self.element(",]"))
        if self.peek("{"):
            return dict(self._items("}", self._pair))
        if self.peek("'") or self.peek('"'):
            return self._quoted()
        return self._primitive(stop)

    def _items(self, closing: str, read: Any) -> list[Any]:
        self.depth += 1
        if self.depth > 50:
            raise HydraFault("is nested too deeply")
        self.at += 1
        found = list[Any]()
        while not (not found and self.peek(closing)):
            found.append(read())
            if not self.peek(","):
                break
            self.at += 1
        if not self.peek(closing):
            raise HydraFault(f"has no {closing}")
        self.at += 1
        self.depth -= 1
        self._blank()
        return found

    def _pair(self) -> tuple[Any, Any]:
        key = self.element(":")
        if not self.peek(":") or isinstance(key, (list, dict)):
            raise HydraFault("has a mapping without key: value")
        self.at += 1
        return key, self.element(",}")

    def _quoted(self) -> str:
        quote = self.text[self.at]
        match = re.compile(rf"{quote}((?:[^\\{quote}]|\\.)*){quote}", re.DOTALL).match(self.text, self.at)
        if match is None:
            raise HydraFault(f"has no closing {quote}")
        self.at = match.end()
        self._blank()
        unescaped = re.sub(rf"(\\+)({quote})", lambda found: "\\" * (len(found[1]) // 2) + found[2], match[1])
        return re.sub(r"(\\+)$", lambda found: "\\" * (len(found[1]) // 2), unescaped)

    def _primitive(self, stop: str) -> Any:
        self._blank()
        start, pieces = self.at, list[str]()
        interpolated = escaped = False
        while self.at < len(self.text):
            if inner := _INTERPOLATION.match(self.text, self.at):
                interpolated = True
                pieces.append(inner[0])
                self.at = inner.end()
                continue
            plain = _PLAIN.match(self.text, self.at)
            if plain is None or (plain[0] == ":" and ":" in stop):
                break
            if len(plain[0]) == 2:
                pieces.append("\0" + plain[0][1])
                escaped = True
            else:
                pieces.append(plain[0])
            self.at = plain.end()
        text = re.sub(r"(?<!\0)[ \t]+$", "", "".join(pieces)).replace("\0", "")
        if self.at == start or not text:
            raise HydraFault("has an empty element" if self.at == start else "is blank")
        if self.peek("("):
            raise HydraFault("calls a function of Hydra")
        return text if interpolated or escaped else typed(text)


def typed(text: str) -> Any:
    """The value that an unquoted word stands for."""
    lower = text.lower()
    if lower in ("true", "false"):
        return lower == "true"
    if lower == "null":
        return None
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) < 100 else float(text)
    return float(text) if _FLOAT.fullmatch(text) else text
