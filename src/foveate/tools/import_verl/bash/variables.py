"""The variables of a shell: looked up, assigned, converted by their attributes, and computed with."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from foveate.tools.import_verl.bash.arithmetic import ArithmeticFault, Scope, UnreadOperand, evaluate_arithmetic
from foveate.tools.import_verl.bash.state import OF_A_PROCESS, LineEnds, ScriptEnds, State
from foveate.tools.import_verl.bash.values import LONGEST, Array, Marks, Unreadable

_NAME = r"([A-Za-z_]\w*)(?:\[[^\]]*\])?"
_ASSIGNED = re.compile(rf"{_NAME}\s*(?:[-+*/%&|^]|<<|>>)?=(?!=)|(?:\+\+|--)\s*{_NAME}|{_NAME}\s*(?:\+\+|--)", re.ASCII)
"""Within an expression: a variable that it assigns to."""


class Variables:
    def __init__(self, state: State) -> None:
        self.state, self.marks = state, Marks()
        self.line = 0
        """Of the command that is followed."""

    def lookup(self, name: str, index: str | None, line: int) -> str | None:
        """The value of a variable or an element; None where it is unset."""
        arguments = self.state.arguments
        if name == "0":
            return self.state.script
        if name.isdigit():
            place = int(name)
            unknown = self.marks.uncounted(arguments[:place])
            return unknown or (arguments[place - 1] if place <= len(arguments) else None)
        match name:
            case "#":
                return self.marks.uncounted(arguments) or str(len(arguments))
            case "?":
                if self.state.status is None:
                    return self.marks.make(f"line {line}: the status of a command that was not run")
                return str(self.state.status)
            case "$" | "!" | "-":
                return self.marks.make(f"line {line}: ${name} of a running shell")
            case "PWD":
                return self.state.directory
            case "BASH_SOURCE":
                return self.state.script if index in (None, "0") else None
        found = self.state.variables.get(name)
        if found is None and name in OF_A_PROCESS:
            return self.marks.make(f"line {line}: ${name} of a running shell")
        if not isinstance(found, Array):
            return found if index in (None, "0") else None
        if found.keyed:
            return found.elements.get(index or "0")
        place = found.position(index or "0")
        before = (
            found.values
            if (index or "0").startswith("-")
            else [found.elements[one] for one in found.keys if int(one) <= place]
        )
        return self.marks.uncounted(before) or found.elements.get(place)

    def elements(self, name: str) -> list[str]:
        if name in ("@", "*"):
            return list(self.state.arguments)
        found = self.state.variables.get(name)
        if isinstance(found, Array):
            return found.values
        value = self.lookup(name, None, 0)
        return [] if value is None else [value]

    def refuse_unset(self, name: str, line: int) -> None:
        if "u" in self.state.options and name not in ("@", "*"):
            reason = f"${name} is set nowhere, and `set -u` ends the script there; give it in the environment"
            raise ScriptEnds(line, reason)

    def arithmetic(self, text: str, line: int) -> str:
        """The value of an expression, or the mark of what it depends on."""
        try:
            return str(self.number(text, line, unset=False))
        except UnreadOperand as operand:
            return self.marks.derived(operand.args[0])

    def number(self, text: str, line: int, *, unset: bool) -> int:
        """The value of an expression. `unset`: whether a variable that is set nowhere is 0, or was not read.

        Raises UnreadOperand for one that was not read; then what it assigns was not read either.
        """

        def read(value: str) -> str:
            known = self.marks.known(value) if unset or not self.marks.unread_in(value) else None
            if known is None:
                raise UnreadOperand(value)
            return known

        def get(name: str, index: str | None) -> str:
            value = self.lookup(name, index, line)
            if value is None and name in self.state.variables:
                return ""  # an element that is not there
            if value is None:
                self.refuse_unset(name, line)
            return read(self.marks.make(f"needs ${name}", unset=True) if value is None else value)

        try:
            return evaluate_arithmetic(read(text), Scope(get, self.assign), 0)
        except UnreadOperand as operand:
            for match in _ASSIGNED.finditer(text):
                self.state.variables[match[1] or match[2] or match[3]] = self.marks.derived(operand.args[0])
            raise
        except ArithmeticFault as fault:
            raise LineEnds(line, f"arithmetic on {text.strip()[:40]!r}: {fault}") from None

    def converted(self, name: str, value: str) -> str:
        """The value that a variable takes by its attributes: a number (i), or letters of one case (u, l, c)."""
        letters = self.state.attributes.get(name, "")
        if "?" in letters or ("c" in letters and self.marks.unread_in(value)):
            return self.marks.make(f"line {self.line}: what the attributes of {name} make of a value")
        value = self.arithmetic(value, self.line) if "i" in letters else value
        changes: dict[str, Callable[[str], str]] = {"u": str.upper, "l": str.lower, "c": str.capitalize}
        return next((change(value) for letter, change in changes.items() if letter in letters), value)

    def is_readonly(self, name: str) -> bool:
        return "r" in self.state.attributes.get(name, "")

    def assign(self, name: str, index: str | None, value: str) -> None:
        if self.is_readonly(name):
            raise LineEnds(self.line, f"{name} is readonly, and keeps its value")
        value = self.converted(name, value)
        if index is None:
            found = self.state.variables.get(name)
            if not isinstance(found, Array):
                self.state.variables[name] = self.bound(value)
                return
            index = "0"
        found = self.state.variables.get(name)
        if isinstance(found, str):
            found = Array({0: found})
        found = found or Array({})
        key: int | str = index
        if not found.keyed:
            key = found.position(index)
            if key < 0:
                raise LineEnds(self.line, f"{name}[{index}] is before the first element")
        self.state.variables[name] = Array({**found.elements, key: self.bound(value)}, found.keyed)

    def separators(self) -> str | None:
        """The characters of $IFS; None where they were not read."""
        found = self.state.variables.get("IFS", " \t\n")
        return self.marks.known(found if isinstance(found, str) else found.elements.get(0, ""))

    def joined(self, values: Sequence[str]) -> str:
        """The values as one text, with the first character of $IFS between them."""
        separators = self.separators()
        mark = f"line {self.line}: values joined by an $IFS that was not read"
        return self.marks.make(mark) if separators is None else separators[:1].join(values)

    def bound(self, text: str) -> str:
        if len(text) > LONGEST:
            raise Unreadable(f"a value of more than {LONGEST} characters")
        return text
