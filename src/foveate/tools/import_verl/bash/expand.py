"""Words become fields: parameters, arithmetic and commands put in, quotes removed, blanks split."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from foveate.tools.import_verl.bash import patterns
from foveate.tools.import_verl.bash.arithmetic import UnreadOperand
from foveate.tools.import_verl.bash.braces import expand_braces
from foveate.tools.import_verl.bash.state import LineEnds, ScriptEnds, State
from foveate.tools.import_verl.bash.syntax import Arithmetic, Command, Parameter, Substitution, Text, Word, WordPart
from foveate.tools.import_verl.bash.values import Array, is_bare_mark
from foveate.tools.import_verl.bash.variables import Variables

_LONGEST_SUBJECT = 2_000
_TESTED = {":-": True, ":=": True, ":?": True, ":+": True, "-": False, "=": False, "?": False, "+": False}


class Expander(Variables):
    """Expands words under a state; `capture` runs commands for their output."""

    def __init__(self, state: State, capture: Callable[[tuple[Command, ...], int], str]) -> None:
        super().__init__(state)
        self._capture = capture
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
                fields.append(self.bound(current))
            current, kept = None, False

        for part, of_default in self._spliced(self._with_home(word, assignment=False)):
            values = self._values(part)
            if isinstance(part, Text) and not part.quoted:
                assigned |= "=" in part.text
                has_glob |= not assigned and any(one in part.text for one in "*?")
            whole = part.quoted or (isinstance(part, Text) and not of_default)
            for number, value in enumerate(values):
                if number:
                    flush()
                for piece, separator in [(value, "")] if whole else self._split(value):
                    current = (current or "") + piece if piece or whole else current
                    if separator:
                        if separator.strip(" \t\n"):  # it ends a field, be that empty
                            current, kept = current or "", True
                        flush()
                kept |= part.quoted
        flush()
        if has_glob and "f" not in self.state.options:
            return [self.marks.make(f"line {word.line}: a pattern of file names", several=True)]
        return fields

    def _spliced(self, parts: Sequence[WordPart], of_default: bool = False) -> Iterator[tuple[WordPart, bool]]:
        """The parts, with those of a default in place of a `${name:-default}` that takes it, and whether they are of a
        default: those are split outside of quotes, and may hold an array."""
        for part in parts:
            if isinstance(part, Parameter) and part.operator in (":-", "-", ":+", "+"):
                index = self._index(part)
                if part.name in ("@", "*") or index in ("@", "*"):
                    takes = self._given(self.elements(part.name)) == (part.operator[-1] == "+")
                else:
                    takes = self._takes_word(part, self.lookup(part.name, index, part.line))
                if takes:
                    if part.quoted:
                        yield Text("", True), False
                    yield from self._spliced(part.arguments[0].parts, True)
                    continue
                if index is not None:  # an expression may count, as in ${A[i++]:-default}
                    part = replace(part, index=Word((Text(index, True),), part.line))
            yield part, of_default

    def _given(self, values: Sequence[str]) -> bool:
        return any(self.marks.known(value) != "" for value in values)

    def _takes_word(self, part: Parameter, value: str | None) -> bool | None:
        """Whether the word behind an operator stands for the parameter; None where that is not known."""
        known = None if value is None else self.marks.known(value)
        bare = value is not None and self.marks.unread_in(value) != [] and is_bare_mark(value)
        if bare and known is None and _TESTED[part.operator]:
            return None
        missing = value is None or (bare and known == "") or (_TESTED[part.operator] and known == "")
        return missing == (part.operator[-1] != "+")

    def _split(self, value: str) -> list[tuple[str, str]]:
        """Pieces, each with the separator behind it."""
        separators, value = self.separators(), self.marks.split(value)
        if separators is None:
            mark = f"line {self.line}: a value split at an $IFS that was not read"
            return [(self.marks.make(mark, several=True), "")]
        pieces = re.split(f"({patterns.separator_regex(separators)})", value) if separators else [value]
        return list(zip(pieces[::2], [*pieces[1::2], ""], strict=True))

    def text(self, word: Word) -> str:
        """One text, as on the right of an assignment: nothing is split."""
        parts = self._with_home(word, assignment=True)
        return self.bound("".join(self._one_text(part) for part in parts))

    def _one_text(self, part: WordPart) -> str:
        values = self._values(part)
        star = isinstance(part, Parameter) and (part.name == "*" or (part.index and part.index.literal == "*"))
        return self.joined(values) if star and len(values) > 1 else " ".join(values)

    def pattern(self, word: Word) -> list[tuple[str, bool]] | None:
        """The pieces of a pattern, each with whether it stands for itself; None where something was not read."""
        pieces = list[tuple[str, bool]]()
        for part in self._with_home(word, assignment=False):
            known = self.marks.known(" ".join(self._values(part)))
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

    # ------------------------------------------------------------------------------------------------------ parts

    def _values(self, part: WordPart) -> list[str]:
        """The values of a part: one, or any number of them for `@` and `*`."""
        match part:
            case Text():
                return [part.text]
            case Arithmetic():
                return [self.arithmetic(self.text(part.expression), part.line)]
            case Substitution():
                if part.process:
                    return [self.marks.make(f"line {part.line}: the output of commands as a file")]
                return [self._capture(part.body, part.line)]
            case Parameter():
                return self._parameter(part)

    # ------------------------------------------------------------------------------------------------- parameters

    def _index(self, part: Parameter) -> str | None:
        """The index of an element: a key, or the value of an expression; `@` and `*` as they stand."""
        if part.index is None:
            return None
        if part.index.literal in ("@", "*"):
            return part.index.literal
        found = self.state.variables.get(part.name)
        text = self.text(part.index)
        return text if isinstance(found, Array) and found.keyed else self.arithmetic(text, part.line)

    def _parameter(self, part: Parameter) -> list[str]:
        index = self._index(part)
        if part.operator.startswith("!"):
            return self._indirect(part, index)
        several = part.name in ("@", "*") or index in ("@", "*")
        found = self.state.variables.get(part.name)
        if not several or (part.operator == ":" and isinstance(found, str)):  # ${text[@]:1} is a part of the text
            value = self.lookup(part.name, None if several else index, part.line)
            if value is None and not part.operator and not several and self.is_outside(part.name, index):
                self.refuse_unset(part.name, part.line)
                value = ""
            return [self._operated(part, value)]
        values = self.elements(part.name)
        joined = part.quoted and "*" in (part.name, index)
        uncounted = self.marks.uncounted(values)
        if part.operator == "length":
            if not values and found is None:
                self.refuse_unset(part.name, part.line)
            return [uncounted or str(len(values))]
        if part.operator == ":":
            values = [uncounted] if uncounted else self._slice(values, part)
        elif part.operator in _TESTED:
            given = self._given(values)
            if not given and part.operator[-1] != "+":
                return [self._operated(part, None)]
            if part.operator[-1] == "+":
                return [self.text(part.arguments[0])] if given else []
        elif part.operator:
            values = [self._operated(part, value) for value in values]
        return [self.joined(values)] if joined else values

    def _indirect(self, part: Parameter, index: str | None) -> list[str]:
        if index in ("@", "*"):
            found = self.state.variables.get(part.name)
            keys = [str(key) for key in found.keys] if isinstance(found, Array) else ["0"] * (found is not None)
            if uncounted := self.marks.uncounted(self.elements(part.name)):
                keys = [uncounted]
            return [self.joined(keys)] if part.quoted and index == "*" else keys
        if part.operator in ("!@", "!*"):
            names = sorted(name for name in self.state.variables if name.startswith(part.name))
            return [self.joined(names)] if part.quoted and part.operator == "!*" else names
        name = self.marks.known(self.lookup(part.name, index, part.line) or "")
        if name is None or not re.fullmatch(r"[A-Za-z_]\w*|\d+", name):
            return [self.marks.make(f"line {part.line}: the variable that ${part.name} names")]
        value = self.lookup(name, None, part.line)
        return [self._operated(replace(part, name=name, index=None, operator=part.operator[1:]), value)]

    def _slice(self, values: list[str], part: Parameter) -> list[str]:
        first, _, length = self.text(part.arguments[0]).partition(":")
        try:
            bounds = self.number(first, part.line, unset=True), self.number(length, part.line, unset=True)
        except UnreadOperand as operand:
            return [self.marks.split(self.marks.derived(operand.args[0]))]
        if length and bounds[1] < 0:
            raise LineEnds(part.line, f"a negative length of a part of ${{{part.name}[@]}}")
        found = self.state.variables.get(part.name)
        if part.name in ("@", "*"):
            values = [self.state.script, *values]
        indexed = found if isinstance(found, Array) and not found.keyed else None
        places = [int(key) for key in indexed.keys] if indexed else range(len(values))
        start = bounds[0] if bounds[0] >= 0 else bounds[0] + 1 + max(places, default=-1)
        behind = [value for place, value in zip(places, values, strict=True) if place >= start >= 0]
        return behind[: bounds[1]] if length else behind

    def _operated(self, part: Parameter, value: str | None) -> str:
        """The value of one parameter under its operator."""
        operator, name = part.operator, part.name
        if operator in _TESTED:
            return self._tested(part, value)
        if value is None:
            self.refuse_unset(name, part.line)
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
            self.assign(part.name, self._index(part), text)  # bash, too, computes it again
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
        if end < start:
            raise LineEnds(part.line, f"a part of ${{{part.name}}} that ends before it begins")
        return value[start:end]

    def _patterned(self, part: Parameter, value: str) -> str:
        operator = part.operator
        if operator[0] == "@":
            changed = {"@U": value.upper(), "@L": value.lower(), "@u": value[:1].upper() + value[1:]}
            return changed.get(operator, self.marks.make(f"line {part.line}: ${{{part.name}{operator}}}"))
        pieces = self.pattern(part.arguments[0])
        if operator[0] in "^,~" and not part.arguments[0].parts:
            pieces = [("?", False)]
        pattern = patterns.to_regex(pieces) if pieces is not None else None
        if pattern is None:
            return self.marks.make(f"line {part.line}: a pattern in ${{{part.name}}}")
        if operator[0] in "^,~":
            return patterns.change_case(operator, value, pattern)
        if operator[0] in "#%":
            return patterns.remove_match(operator, value, pattern)
        replacement = part.arguments[1] if len(part.arguments) > 1 else None
        parts = self._with_home(replacement, assignment=False) if replacement else []
        pieces = [(self._one_text(part), part.quoted) for part in parts]
        if any("&" in text and not quoted for text, quoted in pieces):
            return self.marks.make(f"line {part.line}: a replacement with &, in which versions of bash differ")
        new = "".join(text for text, _ in pieces)
        return patterns.replace_match(operator, value, pattern, new)
