"""A shell in which nothing is run: its state, the shells within it, and branches of which any may be taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foveate.tools.import_verl.bash.expand import Expander
from foveate.tools.import_verl.bash.merge import merge
from foveate.tools.import_verl.bash.state import LineEnds, ScriptEnds, State
from foveate.tools.import_verl.bash.syntax import Assignment, Command, Word
from foveate.tools.import_verl.bash.values import LONGEST, Array, Unreadable, without_marks

LONGEST_SCRIPT = 1_000_000
"""Bytes of a script that is read."""
_FILE_TESTS: dict[str, Callable[[Path], bool]] = {"-e": Path.exists, "-f": Path.is_file, "-d": Path.is_dir}


class Leaves(Exception):
    """`break`, `continue` or `return`: leaves `levels` loops, or a function."""

    def __init__(self, kind: str, levels: int = 1) -> None:
        super().__init__(kind)
        self.kind, self.levels = kind, levels


@dataclass(frozen=True, slots=True)
class Started:
    """A program with its arguments, as the script starts it. `doubt`: why it may not be started."""

    words: tuple[str, ...]
    line: int
    directory: str
    doubt: str


class Shell:
    def __init__(self, script: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> None:
        variables = {name: without_marks(value) for name, value in environment.items()}
        directory = variables.pop("PWD", None) or str(Path.cwd())
        variables.setdefault("IFS", " \t\n")
        state = State(str(script), directory, dict(variables), exported=frozenset(variables))
        state.arguments = [without_marks(argument) for argument in arguments]
        self.expander = Expander(state, self.capture)
        self.expander.file_test = self._file_test
        self.started, self.notes = list[Started](), dict[str, None]()
        self.output: list[str] | None = None
        self.captured = 0
        self.given: str | None = None
        self.doubts, self.escapes = list[str](), list[tuple[str, State]]()
        self.locals: list[dict[str, tuple[str | Array | None, str]]] = []
        self._steps, self._tested, self._depth = 0, 0, 0

    @property
    def state(self) -> State:
        return self.expander.state

    @state.setter
    def state(self, state: State) -> None:
        self.expander.state = state

    def note(self, line: int, text: str) -> None:
        self.notes[f"line {line}: {text}"] = None

    def run(self, commands: Sequence[Command]) -> None:
        raise NotImplementedError

    def run_text(self, text: str, line: int = 0) -> None:
        """Run the commands of a script, to where bash would stop."""
        raise NotImplementedError

    def _file_test(self, operator: str, path: str) -> bool | None:
        """Of a file of this machine; one that is not here may be made by a program that the script has named it to."""
        here = self.expander.marks.known(self.state.directory)
        if here is None or operator not in _FILE_TESTS:
            return None
        file = Path(here, path)
        try:
            found = _FILE_TESTS[operator](file)
        except (OSError, ValueError):
            return None
        name = file.name or path
        if not found and any(name in word for one in self.started for word in one.words):
            return None
        self.notes[f"{operator} {path}: {'true' if found else 'false'} on this machine"] = None
        return found

    def script_text(self, name: str) -> str | None:
        """The text of another script; None where its name was not read, or no such file of at most 1 MB is here."""
        known, here = self.expander.marks.known(name), self.expander.marks.known(self.state.directory)
        if not known or here is None:
            return None
        path = Path(here, known)
        try:
            is_script = path.is_file() and path.stat().st_size <= LONGEST_SCRIPT
            return path.read_text(encoding="utf-8") if is_script else None
        except (OSError, ValueError):
            return None

    def shown(self, word: str) -> str:
        """A word for a note: its beginning, or why it was not read."""
        unread = self.expander.marks.unread_in(word)
        return unread[0].reason if unread else word[:100]

    def ends_with(self, status: int | None, line: int) -> None:
        """Set the status of a command; under `set -e` one that is not 0 ends the script."""
        self.state.status = status
        if status not in (None, 0) and "e" in self.state.options and not self._tested:
            raise ScriptEnds(line, "a command fails, and `set -e` ends the script there")

    # -------------------------------------------------------------------------------------------- shells and branches

    def subshell(self, action: Callable[[], None]) -> None:
        """Act in a shell of its own, which leaves only its status behind."""
        before, depth = self.state, self._depth
        self.state = before.copy()
        try:
            action()
            status = self.state.status
        except ScriptEnds as end:
            status = end.status
            if end.reason:
                self.note(end.line, end.reason)
        except LineEnds as end:
            status = 1
            self.note(end.line, end.reason)
        except Leaves:
            status = 0
        self.state, self._depth = before, depth
        self.state.status = status

    def capture(self, body: Sequence[Command], line: int) -> str:
        """The output of commands in a shell of its own, without the newlines at its end."""
        before, self.output = self.output, []
        self.captured += 1
        self.subshell(lambda: self._run_capture(body))
        text, self.output = "".join(self.output), before
        if len(text) > LONGEST:
            raise Unreadable(f"line {line}: an output of more than {LONGEST} characters")
        return text.rstrip("\n")

    def _run_capture(self, body: Sequence[Command]) -> None:
        self.state.options -= {"e"}  # not handed to $(...)
        self.run(body)

    def write(self, text: str) -> None:
        if self.output is not None:
            self.output.append(text)

    def one_of(self, branches: Sequence[Callable[[], None]], line: int) -> None:
        """Follow every branch from here; what they set differently was not read."""
        reason = f"line {line}: a branch whose test was not read"
        base, ended = self.state, list[ScriptEnds | LineEnds | Leaves]()
        survivors = list[State]()
        self.doubts.append(reason)
        for branch in branches:
            self.state = base.copy()
            depth = self._depth
            try:
                branch()
                survivors.append(self.state)
            except (ScriptEnds, LineEnds, Leaves) as end:
                self._depth = depth
                ended.append(end)
                if not isinstance(end, ScriptEnds):
                    self.escapes.append((end.kind if isinstance(end, Leaves) else "line", self.state))
        self.doubts.pop()
        if not survivors:
            self.escapes = self.escapes[: None if isinstance(ended[-1], ScriptEnds) else -1]
            raise ended[-1]
        if any(isinstance(end, ScriptEnds) for end in ended):
            self.note(line, "a test that was not read is taken not to end the script")
        self.state = survivors[0]
        for other in survivors[1:]:
            self.state = merge(self.state, other, reason, self.expander.marks)

    def _join_escapes(self, before: list[tuple[str, State]], line: int, *kinds: str) -> None:
        """At the end of a loop, a function or a line: the states with which some branch may have left it earlier."""
        for kind, state in self.escapes:
            if kind not in kinds:
                before = [*before, (kind, state)]
            else:
                reason = f"line {line}: left early in a branch whose test was not read"
                self.state = merge(self.state, state, reason, self.expander.marks)
        self.escapes = before

    def assign(self, assignment: Assignment) -> None:
        """Assign a value, or the elements of an array."""
        name, value, variables = assignment.name, assignment.value, self.state.variables
        if self.expander.is_readonly(name):
            raise LineEnds(assignment.line, f"{name} is readonly, and keeps its value")
        if "a" in self.state.options:
            self.state.exported |= {name}
        found = variables.get(name)
        if isinstance(value, Word):
            index = None
            if assignment.index is not None:
                keyed = isinstance(found, Array) and found.keyed
                index = self.expander.text(assignment.index)
                index = index if keyed else self.expander.arithmetic(index, assignment.line)
            before = self.expander.lookup(name, index, assignment.line) if assignment.append else None
            text = self.expander.text(value)
            if assignment.append and "i" in self.state.attributes.get(name, ""):
                text = f"{before or 0}+{self.expander.arithmetic(text, assignment.line)}"
                before = None
            self.expander.assign(name, index, (before or "") + text)
            return
        keyed = isinstance(found, Array) and found.keyed
        old = found if isinstance(found, Array) else Array({} if found is None else {0: found})
        elements = dict(old.elements) if assignment.append else {}
        pairs = list[str]()
        for index, word in value:
            if index is not None:
                key = self.expander.text(index)
                position = key if keyed else self.expander.arithmetic(key, assignment.line)
                if not keyed and not position.isdigit():
                    reason = f"line {assignment.line}: an index of {name}"
                    variables[name] = self.expander.marks.make(reason, several=True)
                    return
                elements[position if keyed else int(position)] = self.expander.text(word)
            elif keyed:
                pairs += self.expander.fields(word)
            else:
                for one in self.expander.fields(word):
                    elements[max((int(key) for key in elements), default=-1) + 1] = one
        elements |= dict(zip(pairs[::2], [*pairs[1::2], ""], strict=False))
        if len(elements) > 10_000:
            raise Unreadable("an array of more than 10000 elements")
        given = {
            key: value if old.elements.get(key) is value else self.expander.converted(name, value)
            for key, value in elements.items()
        }
        variables[name] = Array(given, keyed)

    def saved(self, name: str) -> tuple[str | Array | None, str]:
        """The value and the attributes of a variable, for `restore`."""
        return self.state.variables.get(name), self.state.attributes.get(name, "")

    def restore(self, before: Mapping[str, tuple[str | Array | None, str]]) -> None:
        for name, (value, attributes) in before.items():
            self.state.attributes[name] = attributes
            if value is None:
                self.state.variables.pop(name, None)
            else:
                self.state.variables[name] = value
