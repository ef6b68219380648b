"""Runs a script without running anything: no program is started, no file is written.

Programs whose output follows from their arguments are computed (`basename`); the output of others is not read. Where a
test cannot be answered, all branches are followed, and what they set differently was not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from foveate.tools.import_verl.bash import builtins, patterns
from foveate.tools.import_verl.bash.arithmetic import UnreadOperand
from foveate.tools.import_verl.bash.braces import expand_braces
from foveate.tools.import_verl.bash.conditions import evaluate_test
from foveate.tools.import_verl.bash.parser import parse_script
from foveate.tools.import_verl.bash.shell import Leaves, Shell
from foveate.tools.import_verl.bash.starting import start_program
from foveate.tools.import_verl.bash.state import LineEnds, ScriptEnds
from foveate.tools.import_verl.bash.syntax import (
    AndOr,
    ArithmeticCommand,
    Assignment,
    Background,
    Case,
    Command,
    CommandGroup,
    For,
    ForArithmetic,
    Function,
    If,
    Pipeline,
    Redirected,
    Simple,
    Test,
    Text,
    While,
    Word,
)  # fmt: skip
from foveate.tools.import_verl.bash.values import Unreadable, without_marks

_MOST_STEPS, _DEEPEST = 20_000, 40


class Interpreter(Shell):
    """Follows the commands of a script; `started` holds the programs that it would start."""

    def run_text(self, text: str, line: int = 0) -> None:
        if self._depth > _DEEPEST:
            raise Unreadable("scripts that start each other without end")
        lines, error = parse_script(text if line else without_marks(text))
        self._depth += 1
        for commands in lines:
            self._line(commands)
        self._depth -= 1
        if error is not None:
            raise ScriptEnds(line or error.line, f"bash cannot read on: {error}", 2)

    def _line(self, commands: Sequence[Command]) -> None:
        """Run the commands of a line, to an error that ends the line but not the script."""
        escapes, self.escapes = self.escapes, []
        try:
            self.run(commands)
        except LineEnds as end:
            self.note(end.line, end.reason)
            self.state.status = 1
        finally:
            self._join_escapes(escapes, commands[0].line, "line")

    def run(self, commands: Sequence[Command]) -> None:
        for command in commands:
            self.execute(command)

    def execute(self, command: Command) -> None:
        self._steps += 1
        self.expander.line = command.line
        if self._steps > _MOST_STEPS:
            raise Unreadable(f"more than {_MOST_STEPS} commands")
        match command:
            case Redirected():
                self._redirected(command)
            case Simple():
                self._simple(command)
            case Pipeline():
                self._pipeline(command)
            case AndOr():
                self._and_or(command)
            case Background():
                self.subshell(lambda: self.execute(command.command))
                self.state.status = 0
            case If():
                self._if(command.branches, command)
            case While():
                self._while(command)
            case For():
                self._for(command)
            case ForArithmetic():
                self._for_arithmetic(command)
            case Case():
                self._case(command)
            case Function():
                self.state.functions[command.name] = command.body
                self.state.status = 0
            case CommandGroup():
                if command.subshell:
                    self.subshell(lambda: self.run(command.body))
                    self.ends_with(self.state.status, command.line)
                else:
                    self.run(command.body)
            case Test():
                self._answer(evaluate_test(command.expression, self.expander, command.line), command.line)
            case ArithmeticCommand():
                self._answer(self._true(command.expression, command.line), command.line)

    def _status(self, action: Callable[[], int | None]) -> int | None:
        """The status of a builtin; that of an error in an expansion or an assignment of its own is 1."""
        try:
            return action()
        except LineEnds as end:
            self.note(end.line, end.reason)
            return 1

    def _true(self, expression: Word, line: int) -> bool | None:
        try:
            return self.expander.number(self.expander.text(expression), line, unset=True) != 0
        except UnreadOperand:
            return None
        except LineEnds as end:
            self.note(end.line, end.reason)
            return False

    def _answer(self, answer: bool | None, line: int) -> None:
        self.ends_with(None if answer is None else int(not answer), line)

    # ------------------------------------------------------------------------------------------------ compound ones

    def test(self, commands: Sequence[Command]) -> int | None:
        """The status of commands that decide something, which under `set -e` may fail."""
        self._tested += 1
        try:
            self.run(commands)
        finally:
            self._tested -= 1
        return self.state.status

    def _and_or(self, command: AndOr) -> None:
        last = len(command.items) - 1
        for place, (operator, item) in enumerate(command.items):
            status = self.state.status
            if operator and status is not None and (status == 0) != (operator == "&&"):
                continue

            def action(item: Command = item, place: int = place) -> None:
                if place == last:
                    self.execute(item)
                else:
                    self.test([item])

            if operator and status is None:
                self.one_of([action, lambda: None], command.line)
                self.state.status = None if place < last else self.state.status
            else:
                action()

    def _if(self, branches: Sequence[tuple[Sequence[Command], Sequence[Command]]], command: If) -> None:
        if not branches:
            self.state.status = self.state.status if command.otherwise else 0
            return self.run(command.otherwise)
        (condition, body), rest = branches[0], branches[1:]
        status = self.test(condition)
        if status is None:
            return self.one_of([lambda: self.run(body), lambda: self._if(rest, command)], command.line)
        return self.run(body) if status == 0 else self._if(rest, command)

    def _loop(self, turn: Callable[[], bool | None], body: Sequence[Command], line: int) -> None:
        """Run `body` as long as `turn` says so; None from it: perhaps. The status is that of the last turn, or 0."""
        escapes, self.escapes = self.escapes, []
        status: int | None = 0
        try:
            while (again := turn()) is not False:
                self._steps += 1
                if self._steps > _MOST_STEPS:
                    raise Unreadable(f"line {line}: a loop of more than {_MOST_STEPS} commands")
                try:
                    if again is None:
                        self.state.status = status
                        self.one_of([lambda: self.run(body), lambda: None], line)
                        status = self.state.status
                        break
                    self.run(body)
                    status = self.state.status
                except Leaves as leaves:
                    status = 0
                    if leaves.kind == "return" or leaves.levels > 1:
                        leaves.levels -= leaves.kind != "return"
                        raise
                    if leaves.kind == "break":
                        break
        finally:
            self._join_escapes(escapes, line, "break", "continue")
        self.state.status = status

    def _while(self, command: While) -> None:
        def turn() -> bool | None:
            status = self.test(command.condition)
            return None if status is None else (status == 0) != command.until

        self._loop(turn, command.body, command.line)

    def _for(self, command: For) -> None:
        words = command.words
        values = (
            list(self.state.arguments)
            if words is None
            else [one for word in words for one in self.expander.fields(word)]
        )
        following = iter(values)

        def turn() -> bool | None:
            value = next(following, None)
            if value is None:
                return False
            if self._status(lambda: self.expander.assign(command.name, None, value)):
                return False
            return None if self.expander.marks.known(value) is None and len(values) == 1 else True

        self._loop(turn, command.body, command.line)

    def _for_arithmetic(self, command: ForArithmetic) -> None:
        first = True

        def turn() -> bool | None:
            nonlocal first
            self._true(command.start if first else command.step, command.line)
            first = False
            empty = not self.expander.text(command.condition).strip()
            return True if empty else self._true(command.condition, command.line)

        self._loop(turn, command.body, command.line)

    def _case(self, command: Case) -> None:
        self.state.status = 0
        self._arms(command, 0, self.expander.marks.known(self.expander.text(command.subject)))

    def _arms(self, command: Case, start: int, subject: str | None) -> None:
        """The first arm from `start` on that matches, or perhaps matches."""
        for place in range(start, len(command.arms)):
            words, body, end = command.arms[place]

            def follow(place: int = place, body: Sequence[Command] = body, end: str = end) -> None:
                self.run(body)
                if end == ";&" and place + 1 < len(command.arms):
                    follow(place + 1, *command.arms[place + 1][1:])
                elif end == ";;&":
                    self._arms(command, place + 1, subject)

            answers = [self._fits(word, subject) for word in words]
            if True in answers:
                return follow()
            if None in answers:
                return self.one_of([follow, lambda place=place: self._arms(command, place + 1, subject)], command.line)
        return None

    def _fits(self, word: Word, subject: str | None) -> bool | None:
        if word.parts == (Text("*", False),):
            return True
        pieces = self.expander.pattern(word)
        pattern = patterns.to_regex(pieces) if pieces is not None else None
        if pattern is None or subject is None or len(subject) > 2_000:
            return None
        return pattern.fullmatch(subject) is not None

    def _pipeline(self, command: Pipeline) -> None:
        before, given = self.output, self.given
        statuses = list[int | None]()
        self._tested += command.negated
        try:
            for place, part in enumerate(command.commands):
                last = place == len(command.commands) - 1
                self.output = before if last else []
                if len(command.commands) == 1:
                    self.execute(part)
                else:
                    self.subshell(lambda part=part: self.execute(part))
                statuses.append(self.state.status)
                if not last:
                    self.given = "".join(self.output or ())
        finally:
            self.output, self.given = before, given
            self._tested -= command.negated
        status = statuses[-1]
        if "pipefail" in self.state.options:
            failed = [one for one in statuses if one != 0]
            status = failed[-1] if failed else 0
        if command.negated:
            self.state.status = None if status is None else int(not status)
        else:
            self.ends_with(status, command.line)

    # ---------------------------------------------------------------------------------------------- simple commands

    def _redirected(self, command: Redirected) -> None:
        output, given = self.output, self.given
        for redirect in command.redirects:
            text = self.expander.text(redirect.target)
            if redirect.operator in ("<<", "<<-"):
                self.given = text
            elif redirect.operator == "<<<":
                self.given = text + "\n"
            elif redirect.operator.startswith("<"):
                self.given = None
            elif redirect.descriptor in (None, 1) and text != "1":
                self.output = None
        try:
            self.execute(command.command)
        finally:
            self.output, self.given = output, given

    def _simple(self, command: Simple) -> None:
        captured = self.captured
        if not command.words:
            for assignment in command.assignments:
                self.assign(assignment)
            return self.ends_with(0 if captured == self.captured else self.state.status, command.line)
        fields = list[str | Assignment]()
        for word in command.words:
            fields += self._declared(word) if isinstance(word, Assignment) else self.expander.fields(word)
        if not fields:
            return self.ends_with(0 if captured == self.captured else self.state.status, command.line)
        before = {one.name: self.saved(one.name) for one in command.assignments}
        exported = self.state.exported
        for assignment in command.assignments:
            self._status(lambda assignment=assignment: self.assign(assignment))
        self.state.exported |= set(before)
        try:
            self.call(fields, command.line)
        finally:
            self.restore(before)
            self.state.exported = exported if before else self.state.exported
        return None

    def _declared(self, assignment: Assignment) -> Sequence[str | Assignment]:
        """An assignment behind `export` and its kin: one with braces is a word like any other."""
        value = assignment.value
        if not isinstance(value, Word) or assignment.index or assignment.append or len(expand_braces(value)) == 1:
            return [assignment]
        name = Text(f"{assignment.name}=", False)
        return self.expander.fields(replace(value, parts=(name, *value.parts)))

    def call(self, fields: Sequence[str | Assignment], line: int) -> None:
        """Run a function, a builtin, or a program with its arguments."""
        name = fields[0] if isinstance(fields[0], str) else ""
        if name in self.state.functions:
            return self._call_function(name, [one for one in fields[1:] if isinstance(one, str)], line)
        if builtin := builtins.BUILTINS.get(name):
            assigns = any(isinstance(field, Assignment) for field in fields)  # expansions, not yet the builtin's own
            status = (
                builtin(self, fields[1:], line) if assigns else self._status(lambda: builtin(self, fields[1:], line))
            )
            return self.ends_with(status, line)
        words = [one for one in fields if isinstance(one, str)]
        return self.ends_with(start_program(self, words, line), line)

    def _call_function(self, name: str, arguments: list[str], line: int) -> None:
        if self._depth > _DEEPEST:
            raise Unreadable(f"line {line}: functions that call each other without end")
        before, self.state.arguments = self.state.arguments, arguments
        escapes, self.escapes = self.escapes, []
        self.locals.append({})
        self._depth += 1
        try:
            self.execute(self.state.functions[name])
        except Leaves as leaves:
            if leaves.kind != "return":
                raise
        finally:
            self._depth -= 1
            self._join_escapes(escapes, line, "break", "continue", "return")
            self.restore(self.locals.pop())
            self.state.arguments = before
        self.ends_with(self.state.status, line)
