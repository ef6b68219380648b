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
            uncounted = self.marks.uncounted([found]) if found else ""  # an array of which no element is known
            return uncounted or (found if index in (None, "0") else None)
        if index is not None and self.marks.known(index) is None:
            return self.marks.derived(index)
        if self.is_outside(name, index):
            self._refuse_outside(name, index, line)
            return None
        if found.keyed:
            return found.elements.get("0" if index is None else index)
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

        def put(name: str, index: str | None, value: str) -> None:
            if self.is_outside(name, index):
                self._refuse_outside(name, index, line)  # else bash goes on with the value
            else:
                self.assign(name, index, value)

        try:
            return evaluate_arithmetic(read(text), Scope(get, put, self.is_keyed), 0)
        except UnreadOperand as operand:
            for match in _ASSIGNED.finditer(text):
                name, value = match[1] or match[2] or match[3], self.marks.derived(operand.args[0])
                is_element = "[" in match[0] or isinstance(self.state.variables.get(name), Array)
                self.state.variables[name] = self.marks.split(value) if is_element else value
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

    def is_keyed(self, name: str) -> bool:
        """Whether a variable is an array with keys."""
        found = self.state.variables.get(name)
        return isinstance(found, Array) and found.keyed

    def is_outside(self, name: str, index: str | None) -> bool:
        """Whether an index is none of the array: before its first element, or an empty key."""
        found = self.state.variables.get(name)
        if index is None:
            return False
        if not isinstance(found, Array):
            found = Array({} if found is None else {0: found})
        return self.marks.known(index) == "" if found.keyed else found.position(index) < 0

    def _refuse_outside(self, name: str, index: str | None, line: int) -> None:
        """An index that is none of an array ends the script under `set -e`, be it tested or not."""
        if "e" in self.state.options:
            raise ScriptEnds(line, f"{name}[{index}] is no element, and `set -e` ends the script there")

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
            if self.marks.uncounted([found]):
                return
            found = Array({0: found})
        found = found or Array({})
        if self.marks.known(index) is None:  # any of its elements may have changed
            self.state.variables[name] = self.marks.split(self.marks.derived(index))
            return
        if self.is_outside(name, index):
            self._refuse_outside(name, index, self.line)
            raise LineEnds(self.line, f"{name}[{index}] is no element")
        key: int | str = index if found.keyed else found.position(index)
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
