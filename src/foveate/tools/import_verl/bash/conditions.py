"""Tests: `[ ... ]`, `[[ ... ]]`. True, False, or None where the answer depends on what was not read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from foveate.tools.import_verl.bash import patterns
from foveate.tools.import_verl.bash.arithmetic import UnreadOperand
from foveate.tools.import_verl.bash.expand import Expander
from foveate.tools.import_verl.bash.state import LineEnds
from foveate.tools.import_verl.bash.syntax import Word
from foveate.tools.import_verl.bash.values import Array, is_bare_mark

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "-eq": lambda left, right: left == right,
    "-ne": lambda left, right: left != right,
    "-lt": lambda left, right: left < right,
    "-le": lambda left, right: left <= right,
    "-gt": lambda left, right: left > right,
    "-ge": lambda left, right: left >= right,
}
_BINARY = {*_COMPARE, "=", "==", "!=", "<", ">", "\\<", "-nt", "-ot", "-ef"}


def both(left: bool | None, right: bool | None) -> bool | None:
    return False if left is False or right is False else None if left is None or right is None else True


def negate(value: bool | None) -> bool | None:
    return None if value is None else not value


def evaluate_test(expression: tuple, expander: Expander, line: int) -> bool | None:
    """The truth of what stands in `[[ ]]`."""
    match expression:
        case ("&&", left, right):
            value = evaluate_test(left, expander, line)
            return False if value is False else both(value, evaluate_test(right, expander, line))
        case ("||", left, right):
            value = evaluate_test(left, expander, line)
            other = None if value else evaluate_test(right, expander, line)
            return True if value else negate(both(negate(value), negate(other)))
        case ("!", inner):
            return negate(evaluate_test(inner, expander, line))
        case (operator, word):
            return _unary(operator, expander.text(word), expander)
    operator, left, right = expression
    if operator in _COMPARE:
        try:
            numbers = [expander.number(expander.text(word), line, unset=True) for word in (left, right)]
        except UnreadOperand:
            return None
        except LineEnds:
            return False
        return _COMPARE[operator](*numbers)
    if operator in ("==", "!=", "=~"):
        return _matches(operator, expander.text(left), right, expander)
    return _binary(operator, expander.text(left), expander.text(right), expander)


def _matches(operator: str, left: str, right: Word, expander: Expander) -> bool | None:
    subject, pieces = expander.marks.known(left), expander.pattern(right)
    if subject is None or pieces is None:
        return None
    if operator != "=~":
        pattern = patterns.to_regex(pieces)
        found = pattern.fullmatch(subject) if pattern and len(subject) < 2_000 else None
        equal = None if pattern is None else found is not None
        return equal if operator == "==" else negate(equal)
    pattern = patterns.extended_regex(pieces)
    if pattern is None or len(subject) > 2_000:
        expander.state.variables["BASH_REMATCH"] = expander.marks.make("a regular expression that is not read here")
        return None
    found = pattern.search(subject)
    groups = (found[0], *(group or "" for group in found.groups())) if found else ()
    expander.state.variables["BASH_REMATCH"] = Array(dict(enumerate(groups)))
    return found is not None


def evaluate_brackets(arguments: Sequence[str], expander: Expander) -> bool | None:
    """The truth of the arguments of `[` or `test`, by the number of them as POSIX has it."""
    match list(arguments):
        case []:
            return False
        case [one]:
            return _unary("-n", one, expander)
        case ["!", *rest] if len(rest) < 4:
            return negate(evaluate_brackets(rest, expander))
        case [operator, value] if re.fullmatch("-[a-zA-Z]", operator):
            return _unary(operator, value, expander)
        case [left, operator, right] if operator in _BINARY:
            return _binary(operator, left, right, expander)
    found = list(arguments)
    for operator in ("-o", "-a"):
        for place in range(1, len(found) - 1):
            if found[place] == operator:
                left = evaluate_brackets(found[:place], expander)
                right = evaluate_brackets(found[place + 1 :], expander)
                return both(left, right) if operator == "-a" else negate(both(negate(left), negate(right)))
    if found[0] == "(" and found[-1] == ")":
        return evaluate_brackets(found[1:-1], expander)
    known = [expander.marks.known(one) for one in found]
    return None if None in known else False  # bash: an error, which is no success


def _unary(operator: str, value: str, expander: Expander) -> bool | None:
    known = expander.marks.known(value)
    if operator in ("-n", "-z"):
        if known is None and is_bare_mark(value):
            return None
        return (known != "") == (operator == "-n")
    if operator == "-v" and known is not None:
        name, _, index = known.partition("[")
        return expander.lookup(name, index.rstrip("]") or None, 0) is not None
    return expander.file_test(operator, known) if known else None


def _binary(operator: str, left: str, right: str, expander: Expander) -> bool | None:
    first, second = expander.marks.known(left), expander.marks.known(right)
    if first is None or second is None:
        return None
    if operator in _COMPARE:
        numbers = [int(one) for one in (first, second) if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", one)]
        return len(numbers) == 2 and _COMPARE[operator](*numbers)
    match operator:
        case "=" | "==":
            return first == second
        case "!=":
            return first != second
        case "<":
            return first < second
        case ">":
            return first > second
    return None
