"""Words become fields: parameters, arithmetic and commands put in, quotes removed, blanks split."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from foveate.tools.import_verl.bash import patterns
from foveate.tools.import_verl.bash.arithmetic import ArithmeticFault, Scope, UnreadOperand, evaluate_arithmetic
from foveate.tools.import_verl.bash.braces import expand_braces
from foveate.tools.import_verl.bash.syntax import Arithmetic, Command, Parameter, Substitution, Text, Word, WordPart
from foveate.tools.import_verl.bash.values import LONGEST, Array, Marks, Unreadable, is_bare_mark

_OF_A_PROCESS = (
    "RANDOM", "SRANDOM", "SECONDS", "EPOCHSECONDS", "EPOCHREALTIME", "HOSTNAME", "UID", "EUID", "PPID", "BASHPID",
    "LINENO", "BASH_VERSION", "OSTYPE", "HOSTTYPE", "MACHTYPE", "FUNCNAME", "PIPESTATUS", "BASH", "SHLVL", "GROUPS",
)  # fmt: skip
_LONGEST_SUBJECT = 2_000
_TESTED = {":-": True, ":=": True, ":?": True, ":+": True, "-": False, "=": False, "?": False, "+": False}


class ScriptEnds(Exception):
    """The script, or the shell within it, ends here; `reason` where it is an error."""

    def __init__(self, line: int, reason: str = "", status: int | None = 1) -> None:
        super().__init__(reason)
        self.line, self.reason, self.status = line, reason, status


@dataclass(slots=True)
class State:
    """The memory of a shell. Arrays are replaced, never changed, so that a copy is cheap."""

    script: str
    directory: str
    variables: dict[str, str | Array] = field(default_factory=dict)
    functions: dict[str, Command] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    exported: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    status: int | None = 0

    def copy(self) -> State:
        return replace(self, variables=dict(self.variables), functions=dict(self.functions))


class Expander:
    """Expands words under a state; `capture` runs commands for their output."""

    def __init__(self, state: State, capture: Callable[[tuple[Command, ...], int], str]) -> None:
        self.state, self.marks, self._capture = state, Marks(), capture
        self.file_test: Callable[[str, str], bool | None] = lambda operator, path: None  # noqa: ARG005
        """The answer to a test of a file, such as -f; None where it is not certain."""

    # ------------------------------------------------------------------------------------------------------ words

    def fields(self, word: Word) -> list[str]:
        return [found for one in expand_braces(word) for found in self._fields(one)]

    def _fields(self, word: Word) -> list[str]:
        fields, current = list[str](), None
        kept, assigned, has_glob = False, False, False

        def flush() -> None:
            nonlocal current, kept
            if current is not None and (kept or self.marks.known(current) != ""):
                fields.append(self._bound(current))
            current, kept = None, False

        for part in self._spliced(self._with_home(word, assignment=False)):
            values, separate = self._values(part)
            if isinstance(part, Text) and not part.quoted:
                assigned |= "=" in part.text
                has_glob |= not assigned and any(one in part.text for one in "*?")
            whole = isinstance(part, Text) or part.quoted
            for number, value in enumerate(values):
                if number:
                    flush()
                for place, piece in enumerate([value] if whole else self._split(value)):
                    if place:
                        flush()
                    current = (current or "") + piece if piece or whole else current
            kept |= part.quoted and (bool(values) or not separate)
        flush()
        if has_glob and "f" not in self.state.options:
            return [self.marks.make(f"line {word.line}: a pattern of file names")]
        return fields

    def _spliced(self, parts: Sequence[WordPart]) -> Iterator[WordPart]:
        """The parts, with those of a default in place of an unquoted `${name:-default}` that takes it: their quotes
        hold."""
        for part in parts:
            if isinstance(part, Parameter) and not part.quoted and part.operator in (":-", "-", ":+", "+"):
                index = self._index(part)
                several = part.name in ("@", "*") or index in ("@", "*")
                value = None if several else self.lookup(part.name, index, part.line)
                if not several and self._takes_word(part, value):
                    yield from self._spliced(part.arguments[0].parts)
                    continue
            yield part

    def _takes_word(self, part: Parameter, value: str | None) -> bool | None:
        """Whether the word behind an operator stands for the parameter; None where that is not known."""
        known = None if value is None else self.marks.known(value)
        bare = value is not None and self.marks.unread_in(value) != [] and is_bare_mark(value)
        if bare and known is None and _TESTED[part.operator]:
            return None
        missing = value is None or (bare and known == "") or (_TESTED[part.operator] and known == "")
        return missing == (part.operator[-1] != "+")

    def _split(self, value: str) -> list[str]:
        """Pieces between separators; an empty first or last piece tells that one stood there."""
        separators = self.state.variables.get("IFS", " \t\n")
        if not isinstance(separators, str) or not separators:
            return [value]
        blank = "".join(one for one in separators if one in " \t\n")
        if blank == separators:
            return re.split(f"[{re.escape(blank)}]+", value)
        return re.split(f"[{re.escape(blank)}]*[{re.escape(separators)}][{re.escape(blank)}]*", value)

    def text(self, word: Word) -> str:
        """One text, as on the right of an assignment: nothing is split."""
        parts = self._with_home(word, assignment=True)
        return self._bound("".join(" ".join(self._values(part)[0]) for part in parts))

    def pattern(self, word: Word) -> list[tuple[str, bool]] | None:
        """The pieces of a pattern, each with whether it stands for itself; None where something was not read."""
        pieces = list[tuple[str, bool]]()
        for part in self._with_home(word, assignment=False):
            known = self.marks.known(" ".join(self._values(part)[0]))
            if known is None:
                return None
            pieces.append((known, part.quoted if not isinstance(part, Arithmetic) else True))
        return pieces

    def _with_home(self, word: Word, *, assignment: bool) -> list[WordPart]:
        """The parts with the home directory for a leading ~, also behind `name=`, and behind : in an assignment."""
        parts = list(word.parts)
        for number, part in enumerate(parts):
            if not isinstance(part, Text) or part.quoted or "~" not in part.text or (number and not assignment):
                continue
            start = r"(^|:)" if assignment and not number else r"(:)" if assignment else r"^((?:[A-Za-z_]\w*=)?)"
            end = "|$" if number == len(parts) - 1 else ""
            found = re.sub(rf"{start}~(?=/|:{end})", self._home, part.text)
            parts[number] = Text(found, True) if found != part.text else part
        return parts

    def _home(self, match: re.Match[str]) -> str:
        home = self.state.variables.get("HOME")
        return match[1] + (home if isinstance(home, str) else self.marks.make("needs $HOME", unset=True))

    def _bound(self, text: str) -> str:
        if len(text) > LONGEST:
            raise Unreadable(f"a value of more than {LONGEST} characters")
        return text

    # ------------------------------------------------------------------------------------------------------ parts

    def _values(self, part: WordPart) -> tuple[list[str], bool]:
        """The values of a part, and whether each of them is a field of its own."""
        match part:
            case Text():
                return [part.text], False
            case Arithmetic():
                return [self.arithmetic(self.text(part.expression), part.line)], False
            case Substitution():
                if part.process:
                    return [self.marks.make(f"line {part.line}: the output of commands as a file")], False
                return [self._capture(part.body, part.line)], False
            case Parameter():
                return self._parameter(part)

    def arithmetic(self, text: str, line: int) -> str:
        """The value of an expression, or the mark of what it depends on."""
        try:
            return str(self.number(text, line, unset=False))
        except UnreadOperand as operand:
            return self.marks.derived(operand.args[0])

    def number(self, text: str, line: int, *, unset: bool) -> int:
        """The value of an expression. `unset`: whether a variable that is set nowhere is 0, or was not read."""

        def get(name: str, index: str | None) -> str:
            value = self.lookup(name, index, line)
            if value is None:
                self._refuse_unset(name, line)
            text = self.marks.make(f"needs ${name}", unset=True) if value is None else value
            known = self.marks.known(text) if unset or not self.marks.unread_in(text) else None
            if known is None:
                raise UnreadOperand(text)
            return known

        if self.marks.unread_in(text):
            known = self.marks.known(text) if unset else None
            if known is None:
                raise UnreadOperand(text)
            text = known
        try:
            return evaluate_arithmetic(text, Scope(get, self.assign), 0)
        except ArithmeticFault as fault:
            raise ScriptEnds(line, f"arithmetic on {text.strip()[:40]!r}: {fault}") from None

    def assign(self, name: str, index: str | None, value: str) -> None:
        if index is None:
            found = self.state.variables.get(name)
            if not isinstance(found, Array):
                self.state.variables[name] = self._bound(value)
                return
            index = "0"
        found = self.state.variables.get(name)
        if isinstance(found, str):
            found = Array({0: found})
        found = found or Array({})
        key: int | str = index
        if not found.keyed:
            key = int(index) if re.fullmatch(r"-?\d{1,9}", index) else 0
            key = key if key >= 0 else key + 1 + max((int(one) for one in found.elements), default=-1)
        self.state.variables[name] = Array({**found.elements, key: self._bound(value)}, found.keyed)

    # ------------------------------------------------------------------------------------------------- parameters

    def lookup(self, name: str, index: str | None, line: int) -> str | None:
        """The value of a variable or an element; None where it is unset."""
        if name.isdigit():
            if name == "0":
                return self.state.script
            return self.state.arguments[int(name) - 1] if int(name) <= len(self.state.arguments) else None
        match name:
            case "#":
                return str(len(self.state.arguments))
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
        if found is None and name in _OF_A_PROCESS:
            return self.marks.make(f"line {line}: ${name} of a running shell")
        if not isinstance(found, Array):
            return found if index in (None, "0") else None
        if found.keyed:
            return found.elements.get(index or "0")
        number = int(index) if re.fullmatch(r"-?\d{1,9}", index or "0") and index else 0
        number = number if number >= 0 else number + 1 + max((int(one) for one in found.elements), default=-1)
        return found.elements.get(number)

    def _index(self, part: Parameter) -> str | None:
        """The index of an element: a key, or the value of an expression; `@` and `*` as they stand."""
        if part.index is None:
            return None
        if part.index.literal in ("@", "*"):
            return part.index.literal
        found = self.state.variables.get(part.name)
        text = self.text(part.index)
        return text if isinstance(found, Array) and found.keyed else self.arithmetic(text, part.line)

    def _parameter(self, part: Parameter) -> tuple[list[str], bool]:
        index = self._index(part)
        if part.operator == "!":
            return self._indirect(part, index)
        several = part.name in ("@", "*") or index in ("@", "*")
        if not several:
            value = self.lookup(part.name, index, part.line)
            return [self._operated(part, value)], False
        values = self._elements(part.name)
        joined = part.quoted and "*" in (part.name, index)
        if part.operator == "length":
            return [str(len(values))], False
        if part.operator == ":":
            values = self._slice(values, part)
        elif part.operator in _TESTED:
            given = any(self.marks.known(value) != "" for value in values)
            if not given and part.operator[-1] != "+":
                return [self._operated(part, None)], False
            if part.operator[-1] == "+":
                return ([self.text(part.arguments[0])] if given else []), not given
        elif part.operator:
            values = [self._operated(part, value) for value in values]
        if joined:
            separator = self.state.variables.get("IFS", " ")
            return [(separator[:1] if isinstance(separator, str) else " ").join(values)], False
        return values, True

    def _elements(self, name: str) -> list[str]:
        if name in ("@", "*"):
            return list(self.state.arguments)
        found = self.state.variables.get(name)
        if isinstance(found, Array):
            return found.values
        value = self.lookup(name, None, 0)
        return [] if value is None else [value]

    def _indirect(self, part: Parameter, index: str | None) -> tuple[list[str], bool]:
        if index in ("@", "*"):
            found = self.state.variables.get(part.name)
            keys = list(found.elements) if isinstance(found, Array) else ([0] if found is not None else [])
            return [str(key) for key in keys], True
        name = self.marks.known(self.lookup(part.name, index, part.line) or "")
        if name is None or not re.fullmatch(r"[A-Za-z_]\w*", name):
            return [self.marks.make(f"line {part.line}: the variable that ${part.name} names")], False
        value = self.lookup(name, None, part.line)
        return [self._operated(replace(part, name=name, operator=""), value)], False

    def _slice(self, values: list[str], part: Parameter) -> list[str]:
        first, _, length = self.text(part.arguments[0]).partition(":")
        bounds = self.number(first, part.line, unset=True), self.number(length, part.line, unset=True)
        whole = [self.state.script, *values] if part.name in ("@", "*") and bounds[0] >= 0 else values
        start = bounds[0] if bounds[0] >= 0 else max(0, len(whole) + bounds[0])
        return whole[start : start + bounds[1]] if length else whole[start:]

    def _operated(self, part: Parameter, value: str | None) -> str:
        """The value of one parameter under its operator."""
        operator, name = part.operator, part.name
        if operator in _TESTED:
            return self._tested(part, value)
        if value is None:
            self._refuse_unset(name, part.line)
            missing = self.marks.make(f"needs ${name}", unset=True)
            return missing if operator != "length" else self.marks.derived(missing)
        if not operator:
            return value
        if self.marks.unread_in(value):
            whole_is_unset = self.marks.known(value) == "" and is_bare_mark(value)
            return value if whole_is_unset and operator != "length" else self.marks.derived(value)
        if operator == "length":
            return str(len(value))
        if operator == ":":
            return self._substring(part, value)
        if len(value) > _LONGEST_SUBJECT:
            return self.marks.make(f"line {part.line}: a pattern on a long value")
        return self._patterned(part, value)

    def _refuse_unset(self, name: str, line: int) -> None:
        if "u" in self.state.options and name not in ("@", "*"):
            reason = f"${name} is set nowhere, and `set -u` ends the script there; give it in the environment"
            raise ScriptEnds(line, reason)

    def _tested(self, part: Parameter, value: str | None) -> str:
        operator, takes = part.operator, self._takes_word(part, value)
        if takes is None:
            assert value is not None
            return value  # it may be empty
        if not takes:
            return "" if operator[-1] == "+" else value or ""
        text = self.text(part.arguments[0])
        if operator[-1] == "?":
            said = self.marks.known(text) or "it is not set"
            raise ScriptEnds(part.line, f"the script ends without ${part.name}: {said}; give it in the environment")
        if operator[-1] == "=":
            self.assign(part.name, self._index(part), text)
        return text

    def _substring(self, part: Parameter, value: str) -> str:
        first, colon, length = self.text(part.arguments[0]).partition(":")
        try:
            start = self.number(first, part.line, unset=False)
            size = self.number(length, part.line, unset=False) if colon else None
        except UnreadOperand as operand:
            return self.marks.derived(operand.args[0])
        start = start if start >= 0 else len(value) + start
        if start < 0 or start > len(value):
            return ""
        end = len(value) if size is None else start + size if size >= 0 else len(value) + size
        return value[start : max(start, end)]

    def _patterned(self, part: Parameter, value: str) -> str:
        operator = part.operator
        if operator[0] == "@":
            changed = {"@U": value.upper(), "@L": value.lower(), "@u": value[:1].upper() + value[1:]}
            return changed.get(operator, self.marks.make(f"line {part.line}: ${{{part.name}{operator}}}"))
        pieces = self.pattern(part.arguments[0])
        if operator in ("^", "^^", ",", ",,") and not part.arguments[0].parts:
            pieces = [("?", False)]
        pattern = patterns.to_regex(pieces) if pieces is not None else None
        if pattern is None:
            return self.marks.make(f"line {part.line}: a pattern in ${{{part.name}}}")
        if operator[0] in "^,":
            change = str.upper if operator[0] == "^" else str.lower
            first = 1 if len(operator) == 1 else len(value)
            return "".join(
                change(one) if place < first and pattern.fullmatch(one) else one for place, one in enumerate(value)
            )
        if operator[0] in "#%":
            return patterns.remove_match(operator, value, pattern)
        new = self.text(part.arguments[1]) if len(part.arguments) > 1 else ""
        return patterns.replace_match(operator, value, pattern, new)
