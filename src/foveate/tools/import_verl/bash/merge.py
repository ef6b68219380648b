"""The memory of a shell after branches of which it is not known which one was taken."""

from __future__ import annotations

import re
from collections.abc import Sequence

from foveate.tools.import_verl.bash.state import State
from foveate.tools.import_verl.bash.values import Array, Marks

_SETTING = re.compile(r"([+~]{0,2}[\w.@/-]*[A-Za-z_][\w.@/-]*)=")


def merge(left: State, right: State, reason: str, marks: Marks) -> State:
    """The state in which everything that differs between two branches was not read."""
    merged = left.copy()
    for name in dict.fromkeys([*left.variables, *right.variables]):
        one, other = left.variables.get(name), right.variables.get(name)
        if one != other:
            mark = marks.make(
                f"{reason}, which may set {name}", several=isinstance(one, Array) or isinstance(other, Array)
            )
            merged.variables[name] = _either(one, other, mark)
    if left.arguments != right.arguments:
        merged.arguments = _common(left.arguments, right.arguments, marks.make(reason, several=True))
    if left.directory != right.directory:
        merged.directory = marks.make(reason)
    for name in {*left.attributes, *right.attributes}:
        one, other = left.attributes.get(name, ""), right.attributes.get(name, "")
        merged.attributes[name] = one if one == other else "?"
    merged.functions |= right.functions
    merged.exported |= right.exported
    merged.options |= right.options
    merged.status = left.status if left.status == right.status else None
    return merged


def _either(one: str | Array | None, other: str | Array | None, mark: str) -> str | Array:
    if isinstance(one, Array) or isinstance(other, Array):
        arrays = [
            found if isinstance(found, Array) else Array({} if found is None else {0: found}) for found in (one, other)
        ]
        if any(array.keyed for array in arrays):
            keys = dict.fromkeys(key for array in arrays for key in array.elements)
            first, second = (array.elements for array in arrays)
            return Array({key: first[key] if first.get(key) == second.get(key) else mark for key in keys}, True)
        return Array(dict(enumerate(_common(arrays[0].values, arrays[1].values, mark))))
    words = [word for text in (one, other) for word in (text or "").split()]
    if words and all(_SETTING.match(word) for word in words):
        return " ".join(_common((one or "").split(), (other or "").split(), mark))
    return mark


def _common(one: Sequence[str], other: Sequence[str], mark: str) -> list[str]:
    """The common start of two lists, then `key=` and the mark for each setting of either, or the mark."""
    same = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    same = min(len(one), len(other)) if same is None else same
    rest = [*one[same:], *other[same:]]
    settings = [f"{match[1]}={mark}" if (match := _SETTING.match(word)) else mark for word in rest]
    return [*one[:same], *dict.fromkeys(settings)]
