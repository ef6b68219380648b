"""Arithmetic of bash: whole numbers of 64 bits, with variables and assignments."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_TOKEN = re.compile(
    r"\s*(?:(?P<number>0[xX][0-9a-fA-F]+|\d+(?:#\w+)?)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<operator>\*\*|<<=|>>=|\+\+|--|&&|\|\||[-+*/%&|^]=|<<|>>|[<>=!]=|[-+*/%<>!~&|^?:=(),\[\]]))",
    re.ASCII,
)
_BINARY = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", ">", "<=", ">="), ("<<", ">>"), ("+", "-"),
    ("*", "/", "%"), ("**",),
)  # fmt: skip
_DEEPEST = 20


class ArithmeticFault(Exception):
    """An expression that bash refuses."""


class UnreadOperand(Exception):
    """An expression that depends on a value which was not read; `args[0]` is the value."""


@dataclass(frozen=True, slots=True)
class Scope:
    """How an expression sees variables: the text of one ("" where it is unset), how to assign it, and whether it is an
    array with keys, between whose brackets stands a text."""

    get: Callable[[str, str | None], str]
    set: Callable[[str, str | None, str], None]
    is_keyed: Callable[[str], bool]


def evaluate_arithmetic(text: str, scope: Scope, depth: int = 0) -> int:
    """The value of an expression; an empty one is 0."""
    if depth > _DEEPEST:
        raise ArithmeticFault("variables that name each other without end")
    if not text.strip():
        return 0
    reader = _Reader(text, scope, depth)
    value = reader.comma()
    if reader.tokens[reader.at][0]:
        raise ArithmeticFault(f"unexpected {reader.tokens[reader.at][1]!r}")
    return value


def _wrap(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _bracketed(text: str, place: int) -> str:
    """The text between the bracket at a place and the one that closes it."""
    depth = 0
    for end in range(place, len(text)):
        depth += {"[": 1, "]": -1}.get(text[end], 0)
        if depth == 0:
            return text[place + 1 : end]
    raise ArithmeticFault("no ]")


class _Reader:
    def __init__(self, text: str, scope: Scope, depth: int) -> None:
        self.tokens, self.at, self.scope, self.depth = list[tuple[str, str]](), 0, scope, depth
        self.acts = True
        place = 0
        text = text.rstrip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None:
                raise ArithmeticFault(f"cannot read {text[place : place + 10]!r}")
            kind, found = match.lastgroup or "", match[match.lastgroup or 0]
            place = match.end()
            if found in ("++", "--") and self._signs(text[place:].lstrip()[:1]):
                found, place = found[0], place - 1
            self.tokens.append((kind, found))
            if match["name"] and text[place : place + 1] == "[" and scope.is_keyed(match["name"]):
                key = _bracketed(text, place)
                self.tokens.append(("key", re.sub("[\"']", "", key)))
                place += len(key) + 2
        self.tokens.append(("", ""))

    def _signs(self, follows: str) -> bool:
        """Whether `++` or `--` are two signs: behind no variable, and before none."""
        before = self.tokens[-1] if self.tokens else ("", "")
        is_variable = before[0] in ("name", "key") or before[1] == "]"
        return not is_variable and not (follows.isalpha() or follows == "_")

    def _next(self, *operators: str) -> str:
        """The operator here if it is one of these, which is then taken."""
        kind, text = self.tokens[self.at]
        if kind == "operator" and text in operators:
            self.at += 1
            return text
        return ""

    def _need(self, operator: str) -> None:
        if not self._next(operator):
            raise ArithmeticFault(f"no {operator}")

    def comma(self) -> int:
        value = self.assignment()
        while self._next(","):
            value = self.assignment()
        return value

    def assignment(self) -> int:
        start = self.at
        if self.tokens[self.at][0] == "name":
            name, index = self._variable()
            if operator := self._next("=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="):
                value = self.assignment()
                if operator != "=":
                    value = self._apply(operator[:-1], self._get(name, index), value)
                return self._set(name, index, value)
            self.at = start
        condition = self._level(0)
        if not self._next("?"):
            return condition
        chosen = self._silently(self.assignment, bool(condition))
        self._need(":")
        other = self._silently(self.assignment, not condition)
        return chosen if condition else other

    def _silently(self, read: Callable[[], int], acts: bool) -> int:
        """The value that `read` gives, without an effect where the operand does not count."""
        before, self.acts = self.acts, self.acts and acts
        value = read()
        self.acts = before
        return value

    def _level(self, level: int) -> int:
        if level == len(_BINARY):
            return self._unary()
        left = self._level(level + 1)
        while operator := self._next(*_BINARY[level]):
            if operator in ("&&", "||"):
                right = self._silently(lambda: self._level(level + 1), bool(left) == (operator == "&&"))
                left = int(bool(left) and bool(right)) if operator == "&&" else int(bool(left) or bool(right))
            else:
                right = self._level(level if operator == "**" else level + 1)
                left = self._apply(operator, left, right)
        return left

    def _unary(self) -> int:
        if operator := self._next("++", "--"):
            name, index = self._variable()
            return self._set(name, index, self._get(name, index) + (1 if operator == "++" else -1))
        if operator := self._next("-", "+", "!", "~"):
            value = self._unary()
            return {"-": _wrap(-value), "+": value, "!": int(not value), "~": ~value}[operator]
        if self._next("("):
            value = self.comma()
            self._need(")")
            return value
        kind, text = self.tokens[self.at]
        if kind == "number":
            self.at += 1
            return _number(text)
        if kind != "name":
            raise ArithmeticFault(f"unexpected {text!r}" if text else "an operand is missing")
        name, index = self._variable()
        value = self._get(name, index)
        if operator := self._next("++", "--"):
            self._set(name, index, value + (1 if operator == "++" else -1))
        return value

    def _variable(self) -> tuple[str, str | None]:
        kind, name = self.tokens[self.at]
        if kind != "name":
            raise ArithmeticFault(f"unexpected {name!r}")
        self.at += 1
        index = None
        if self.tokens[self.at][0] == "key":
            index = self.tokens[self.at][1]
            self.at += 1
        elif self._next("["):
            index = str(self.comma())
            self._need("]")
        return name, index

    def _get(self, name: str, index: str | None) -> int:
        text = self.scope.get(name, index) if self.acts else "0"
        return evaluate_arithmetic(text, self.scope, self.depth + 1) if not text.isdigit() else _number(text)

    def _set(self, name: str, index: str | None, value: int) -> int:
        value = _wrap(value)
        if self.acts:
            self.scope.set(name, index, str(value))
        return value

    def _apply(self, operator: str, left: int, right: int) -> int:
        if operator in ("/", "%") and right == 0:
            if not self.acts:
                return 0
            raise ArithmeticFault("division by 0")
        if operator == "**" and right < 0:
            raise ArithmeticFault("a negative exponent")
        match operator:
            case "+":
                return _wrap(left + right)
            case "-":
                return _wrap(left - right)
            case "*":
                return _wrap(left * right)
            case "**":
                return _wrap(pow(left, right, 2**64))
            case "/":
                return _wrap(abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1))
            case "%":
                return abs(left) % abs(right) * (-1 if left < 0 else 1)
            case "<<":
                return _wrap(left << (right & 63))
            case ">>":
                return left >> (right & 63)
            case "&":
                return left & right
            case "|":
                return left | right
            case "^":
                return left ^ right
        compared = {"==": left == right, "!=": left != right, "<": left < right, ">": left > right}
        return int((compared | {"<=": left <= right, ">=": left >= right})[operator])


def _number(text: str) -> int:
    base, hash_mark, digits = text.partition("#")
    try:
        if hash_mark:
            return _wrap(int(digits, int(base)))
        if text[:2] in ("0x", "0X"):
            return _wrap(int(text, 16))
        return _wrap(int(text, 8 if text.startswith("0") and len(text) > 1 else 10))
    except ValueError:
        raise ArithmeticFault(f"{text[:30]!r} is no number of its base") from None
