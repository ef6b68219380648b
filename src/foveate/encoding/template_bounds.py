"""Bounds on the operations of chat templates that no limit of time can interrupt, as they run in C: powers, repeated
texts, and whatever else makes a value many times larger than what it is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from itertools import islice
from types import BuiltinMethodType, FunctionType
from typing import Any

import jinja2.nodes
import jinja2.sandbox
from jinja2.visitor import NodeTransformer

MOST_CHARACTERS, MOST_ITEMS, MOST_BITS, MOST_WIDTH = 2**23, 2**20, 4096, 2**16
"""Of a text, a list (with all that is in it), a whole number, and the width to which something is filled."""
_WIDTH = re.compile(r"\d{6}|\*")
_FILLS = ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "zfill")
"""Filters and methods of texts that take a width."""


class TooLarge(ValueError):
    """A value that no prompt needs."""

    def __init__(self, found: str) -> None:
        super().__init__(f"the template makes {found}")


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox of transformers, in which every operation takes bounded time and memory. Raises TooLarge."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.filters = _Filters(self.filters)
        self.finalize = _weighed
        self.globals.pop("lipsum", None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _ConcatAsAdd().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _BOUNDS[operator](left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *arguments: Any, **named: Any) -> Any:
        if isinstance(obj, BuiltinMethodType) and isinstance(obj.__self__, str | bytes):
            arguments = _bounded_call(obj.__name__, (obj.__self__, *arguments), named)[1:]
        return super().call(context, obj, *arguments, **named)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*arguments: Any, **named: Any) -> str:
            inner = [one for value in arguments if isinstance(value, Mapping) for one in value.values()]
            _bounded_call("format", (value.__self__, *arguments, *inner), named)
            return wrapped(*arguments, **named)

        return bounded

    @staticmethod
    def concat(parts: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The text of a block."""
        kept, left = [], MOST_CHARACTERS
        for part in parts:
            left -= len(part)
            if left < 0:
                raise TooLarge(f"a text of more than {MOST_CHARACTERS:,} characters")
            kept.append(part)
        return "".join(kept)


class _ConcatAsAdd(NodeTransformer):
    """`a ~ b` as the sum of two texts, which is intercepted."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        texts = [
            jinja2.nodes.Filter(self.visit(one), "string", [], [], None, None, lineno=node.lineno) for one in node.nodes
        ]
        total: jinja2.nodes.Expr = texts[0]
        for text in texts[1:]:
            total = jinja2.nodes.Add(total, text, lineno=node.lineno)
        return total


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name, with bounds, also those that are added later."""

    def __init__(self, filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__({name: _bounded_filter(name, function) for name, function in filters.items()})

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _bounded_filter(name, function))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    takes_context = isinstance(function, FunctionType) and "jinja_pass_arg" in vars(function)

    @wraps(function)
    def bounded(*arguments: Any, **named: Any) -> Any:
        first, own = (arguments[:1], arguments[1:]) if takes_context else ((), arguments)
        return function(*first, *_bounded_call(name, own, named), **named)

    return bounded


def _bounded_call(name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a filter, or of a method with its object, once they are known to be harmless."""
    if name == "join" and not isinstance(arguments[-1 if isinstance(arguments[0], str) else 0], str | list | tuple):
        place = len(arguments) - 1 if isinstance(arguments[0], str) else 0
        items = list(islice(arguments[place], MOST_ITEMS + 1))
        arguments = (*arguments[:place], items, *arguments[place + 1 :])
    every = [*arguments, *named.values()]
    for value in every:
        _weighed(value)
    numbers = [value for value in every if isinstance(value, int)]
    texts = [value for value in every if isinstance(value, str | bytes)]
    if name in _FILLS and any(abs(number) > MOST_WIDTH for number in numbers):
        raise TooLarge(f"something of the width {max(numbers, key=abs)}")
    if name in _FILLS and numbers and texts:
        first: Any = texts[0]
        spaces = len(first) if name == "expandtabs" else first.count("\n" if isinstance(first, str) else b"\n")
        _require_text((spaces + 1) * max(map(abs, numbers)))
    if name == "format" and texts:
        _bound_format(texts[0], every[1:])
    if name == "translate":
        raise TooLarge("a text by a table; write replace")
    if name == "replace" and len(texts) >= 3:
        _require_text((len(texts[0]) // max(len(texts[1]), 1) + 1) * len(texts[2]))
    if name in ("join", "indent", "wordwrap") and texts:
        longest = max(map(len, texts))
        items = [len(value) for value in every if isinstance(value, list | tuple)]
        _require_text(max(items, default=0) * longest if items else _product(texts))
    return arguments


def _product(texts: list[Any]) -> int:
    """An upper bound of the size of the first text, or of the second, with the other between its letters."""
    return len(texts[0]) * len(texts[1]) if len(texts) > 1 else 0


def _weighed(value: Any) -> Any:
    """The value, once all that is in it is known to be little: what stands in it several times counts each time."""
    if isinstance(value, str | bytes):
        _require_text(len(value))
    elif isinstance(value, list | tuple | dict):
        left, queue = MOST_ITEMS, [(value, 1)]
        while queue:
            one, depth = queue.pop()
            inner = [*one.keys(), *one.values()] if isinstance(one, dict) else one
            left -= depth * (len(inner) + 1)
            if left < 0:
                raise TooLarge(f"a list with more than {MOST_ITEMS:,} values in it")
            for part in inner:
                if isinstance(part, list | tuple | dict):
                    queue.append((part, depth + 1))
                elif isinstance(part, str):
                    left -= len(part) // 16
    return value


def _require_text(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise TooLarge(f"a text of {size:,} characters; {MOST_CHARACTERS:,} are allowed")


def _bound_format(text: Any, values: Iterable[Any]) -> None:
    shown = text if isinstance(text, str) else text.decode("latin-1")
    flat = [inner for value in values for inner in (value if isinstance(value, tuple | list) else (value,))]
    if _WIDTH.search(shown) or ("{" in shown and any(isinstance(v, int) and abs(v) > MOST_WIDTH for v in flat)):
        raise TooLarge(f"a text by the format {shown[:40]!r}, which names a width")


def _bound_add(left: Any, right: Any) -> None:
    if isinstance(left, str | bytes) and isinstance(right, str | bytes):
        _require_text(len(left) + len(right))
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) + len(right) > MOST_ITEMS:
        raise TooLarge(f"a list of {len(left) + len(right):,} values")


def _bound_multiply(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() + right.bit_length())
    for one, times in ((left, right), (right, left)):
        if isinstance(one, str | bytes) and isinstance(times, int):
            _require_text(len(one) * times)
        elif isinstance(one, list | tuple) and isinstance(times, int) and len(one) * times > MOST_ITEMS:
            raise TooLarge(f"a list of {len(one) * times:,} values")


def _bound_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _require_bits(left.bit_length() * abs(right))


def _require_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise TooLarge(f"a number of more than {MOST_BITS:,} bits")


def _bound_remainder(left: Any, right: Any) -> None:
    if isinstance(left, str | bytes):
        _bound_format(left, (right,))


_BOUNDS: Mapping[str, Callable[[Any, Any], None]] = {
    "+": _bound_add,
    "*": _bound_multiply,
    "**": _bound_power,
    "%": _bound_remainder,
}


def bound_templates() -> None:
    """Have transformers render chat templates in a `BoundedEnvironment`, in this process, from now on."""
    from transformers.utils import chat_template_utils

    templates: Any = chat_template_utils
    if templates.ImmutableSandboxedEnvironment is not BoundedEnvironment:
        templates.ImmutableSandboxedEnvironment = BoundedEnvironment
        templates._compile_jinja_template.cache_clear()
