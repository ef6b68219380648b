"""The builtins of bash that make variables, give them attributes, and unset them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from foveate.tools.import_verl.bash.syntax import Assignment
from foveate.tools.import_verl.bash.values import Array

if TYPE_CHECKING:
    from foveate.tools.import_verl.bash.interpreter import Interpreter

Fields = Sequence[str | Assignment]
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def texts(fields: Fields) -> list[str]:
    return [field for field in fields if isinstance(field, str)]


def _declare(shell: Interpreter, fields: Fields, line: int, *, here: bool = False, also: str = "") -> int:
    """Make variables and their attributes. `here`: local to a function; `also`: letters of further options."""
    options = also + "".join(field[1:] for field in texts(fields) if re.fullmatch("-[a-zA-Z]+", field))
    removed = "".join(field[1:] for field in texts(fields) if re.fullmatch("[+][a-zA-Z]+", field))
    status = 0
    for field in fields:
        assignment = field if isinstance(field, Assignment) else None
        name = assignment.name if assignment else str(field).partition("=")[0]
        if re.fullmatch("[-+][a-zA-Z]+", name) or not NAME.fullmatch(name):
            continue
        variables = shell.state.variables
        if shell.expander.is_readonly(name):
            status = int(status or assignment is not None or "=" in str(field))
            continue
        if here and shell.locals and "g" not in options and name not in shell.locals[-1]:
            shell.locals[-1][name] = shell.saved(name)
            shell.state.attributes.pop(name, None)
            variables.pop(name, None) if assignment is None or "A" in options else None
        _set_attributes(shell, name, options, removed)
        if "A" in options and not isinstance(variables.get(name), Array):
            variables[name] = Array({}, True)
        elif "a" in options and name not in variables:
            variables[name] = Array({})
        if assignment:
            shell.assign(assignment)
        elif "=" in str(field):
            shell.expander.assign(name, None, str(field).partition("=")[2])
        if "n" in options:
            variables[name] = shell.expander.marks.make(f"line {line}: a name for another variable")
        if "x" in options:
            shell.state.exported |= {name}
        if "r" in options:
            shell.state.attributes[name] += "r"
    return status


def _set_attributes(shell: Interpreter, name: str, options: str, removed: str) -> None:
    """Keep those that change later assignments; of the cases, the last one holds, and two at once are none."""
    before = shell.state.attributes.get(name, "")
    cases = set(options) & set("ulc")
    kept = {letter for letter in before if letter not in removed and not (cases and letter in "ulc")}
    kept |= ({"i"} if "i" in options else set()) | (cases if len(cases) == 1 else set())
    shell.state.attributes[name] = "".join(sorted(kept))


def export(shell: Interpreter, fields: Fields, line: int) -> int:
    return _declare(shell, fields, line, also="x")


def local(shell: Interpreter, fields: Fields, line: int) -> int:
    return _declare(shell, fields, line, here=True)


def declare_here(shell: Interpreter, fields: Fields, line: int) -> int:
    return _declare(shell, fields, line, here=bool(shell.locals))


def readonly(shell: Interpreter, fields: Fields, line: int) -> int:
    return _declare(shell, fields, line, also="r")


def unset(shell: Interpreter, fields: Fields, line: int) -> int:
    words = texts(fields)
    only = words[0] if words and words[0] in ("-v", "-f") else ""
    status = 0
    for name in words[bool(only) :]:
        match = re.fullmatch(r"([A-Za-z_]\w*)\[(.+)\]", name, re.DOTALL)
        if only != "-f" and shell.expander.is_readonly(match[1] if match else name):
            status = 1
        elif match and only != "-f":
            status = status or _unset_element(shell, match[1], match[2], line)
        elif name in shell.state.variables and only != "-f":
            shell.state.variables.pop(name)
            shell.state.attributes.pop(name, None)
        elif only != "-v":
            shell.state.functions.pop(name, None)
    return status


def _unset_element(shell: Interpreter, name: str, index: str, line: int) -> int:
    variables = shell.state.variables
    found = variables.get(name)
    if found is None:
        return 0
    if index in ("@", "*") or (isinstance(found, str) and index == "0"):
        variables.pop(name)
        return 0
    if isinstance(found, str):
        return 1
    index = index if found.keyed else shell.expander.arithmetic(index, line)
    if shell.expander.marks.unread_in(index):
        reason = f"line {line}: the element of {name} that unset takes"
        variables[name] = shell.expander.marks.make(reason, several=True)
        return 0
    key = index if found.keyed else found.position(index)
    if isinstance(key, int) and key < 0:  # before the first element
        return 1
    variables[name] = Array({one: value for one, value in found.elements.items() if one != key}, found.keyed)
    return 0
