"""A calculator for models: arithmetic in bounds, and nothing that could run."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

LONGEST, DEEPEST, MOST_BITS = 500, 40, 4_096
"""Characters and depth of an expression, and bits of a whole number in it."""

_TWO: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_ONE: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def _rounded(value: float, digits: int = 0) -> float:
    if abs(digits) > MOST_BITS:
        raise ValueError(f"round takes at most {MOST_BITS} digits, found {digits}")
    return round(value, digits) if digits else round(value)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs, "round": _rounded, "floor": math.floor, "ceil": math.ceil, "sqrt": math.sqrt, "exp": math.exp,
    "log": math.log, "log2": math.log2, "log10": math.log10, "sin": math.sin, "cos": math.cos, "tan": math.tan,
    "asin": math.asin, "acos": math.acos, "atan": math.atan, "degrees": math.degrees, "radians": math.radians,
    "min": min, "max": max, "gcd": math.gcd,
}  # fmt: skip
_NAMES = {"pi": math.pi, "e": math.e}


def calculator(expression: str) -> str:
    """Computes an arithmetic expression.

    Args:
        expression: Numbers, + - * / // % ** and round brackets, pi, e, and functions such as sqrt(2) or max(1, 2).
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters; at most {LONGEST} are read")
    text = expression.replace("^", "**").replace("×", "*").replace("÷", "/").replace("−", "-").strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression[:60]!r} is no arithmetic expression") from None
    try:
        value = _value(tree.body, 0)
    except (ZeroDivisionError, OverflowError, TypeError) as error:
        raise ValueError(f"{expression[:60]!r} cannot be computed ({error})") from None
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr, depth: int) -> int | float:
    if depth > DEEPEST:
        raise ValueError(f"the expression is nested more than {DEEPEST} times")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            found = value
        case ast.Name(id=name) if name in _NAMES:
            found = _NAMES[name]
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _ONE:
            found = _ONE[type(sign)](_value(operand, depth + 1))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _TWO:
            a, b = _value(left, depth + 1), _value(right, depth + 1)
            if isinstance(sign, ast.Pow):
                _require_small_power(a, b)
            found = _TWO[type(sign)](a, b)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            found = _FUNCTIONS[name](*(_value(one, depth + 1) for one in arguments))
        case _:
            raise ValueError(f"{ast.unparse(node)[:60]!r} is no part of an arithmetic expression")
    return _bounded(found)


def _require_small_power(base: int | float, exponent: int | float) -> None:
    """A whole number to the power of another one may have billions of digits."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        bits = base.bit_length() * exponent
        if bits > MOST_BITS:
            raise ValueError(f"the power would have {bits} bits; at most {MOST_BITS} are computed")


def _bounded(value: Any) -> int | float:
    if isinstance(value, int) and value.bit_length() <= MOST_BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError("the result is no real number of at most 4,096 bits")
