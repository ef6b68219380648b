"""The syntax tree of a bash script, as far as launch scripts go."""

from __future__ import annotations

from dataclasses import dataclass


class BashSyntaxError(Exception):
    """A text that bash would not read either, or that is not read here; `line` counts from 1."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line


@dataclass(frozen=True, slots=True)
class Text:
    """Literal characters; quoted ones are no pattern, no blank between words, and no brace."""

    text: str
    quoted: bool


@dataclass(frozen=True, slots=True)
class Parameter:
    """`$name`, `${name[index]operator arguments}`; `operator` "#" is the length, "!" the name in a variable. `bare`: it
    is a name without braces, which letters behind it would belong to."""

    name: str
    index: Word | None
    operator: str
    arguments: tuple[Word, ...]
    quoted: bool
    line: int
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """`$((expression))`."""

    expression: Word
    quoted: bool
    line: int


@dataclass(frozen=True, slots=True)
class Substitution:
    """`$(commands)` and backticks; `<(commands)`, whose value is the name of a pipe, has `process`."""

    body: tuple[Command, ...]
    quoted: bool
    process: bool
    line: int


WordPart = Text | Parameter | Arithmetic | Substitution


@dataclass(frozen=True, slots=True)
class Word:
    parts: tuple[WordPart, ...]
    line: int

    @property
    def literal(self) -> str | None:
        """The text of a word in which nothing is expanded; None for others."""
        texts = [part.text for part in self.parts if isinstance(part, Text)]
        return "".join(texts) if len(texts) == len(self.parts) else None


@dataclass(frozen=True, slots=True)
class Assignment:
    """`name=value`, `name[index]+=value`, `name=(elements)`: a list of words, each with the index it was given."""

    name: str
    index: Word | None
    append: bool
    value: Word | tuple[tuple[Word | None, Word], ...]
    line: int


@dataclass(frozen=True, slots=True)
class Redirect:
    descriptor: int | None
    operator: str
    target: Word
    """The file, or the text of a here-document."""


@dataclass(frozen=True, slots=True)
class Simple:
    assignments: tuple[Assignment, ...]
    words: tuple[Word | Assignment, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Pipeline:
    commands: tuple[Command, ...]
    negated: bool
    line: int


@dataclass(frozen=True, slots=True)
class AndOr:
    """Pipelines joined by `&&` and `||`; the operator before each, "" before the first."""

    items: tuple[tuple[str, Command], ...]
    line: int


@dataclass(frozen=True, slots=True)
class Background:
    command: Command
    line: int


@dataclass(frozen=True, slots=True)
class If:
    branches: tuple[tuple[tuple[Command, ...], tuple[Command, ...]], ...]
    otherwise: tuple[Command, ...]
    line: int


@dataclass(frozen=True, slots=True)
class While:
    condition: tuple[Command, ...]
    body: tuple[Command, ...]
    until: bool
    line: int


@dataclass(frozen=True, slots=True)
class For:
    """`words` None: over the positional parameters."""

    name: str
    words: tuple[Word, ...] | None
    body: tuple[Command, ...]
    line: int


@dataclass(frozen=True, slots=True)
class ForArithmetic:
    start: Word
    condition: Word
    step: Word
    body: tuple[Command, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Case:
    """Each arm: its patterns, its commands, and what ended it (`;;`, `;&`, `;;&`)."""

    subject: Word
    arms: tuple[tuple[tuple[Word, ...], tuple[Command, ...], str], ...]
    line: int


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    body: Command
    line: int


@dataclass(frozen=True, slots=True)
class CommandGroup:
    """`{ commands; }`, or `( commands )` in a shell of its own."""

    body: tuple[Command, ...]
    subshell: bool
    line: int


@dataclass(frozen=True, slots=True)
class ArithmeticCommand:
    expression: Word
    line: int


@dataclass(frozen=True, slots=True)
class Test:
    """`[[ expression ]]`: words and operators as nested tuples, ("-z", word), ("==", word, word), ("&&", a, b)."""

    expression: tuple
    line: int


@dataclass(frozen=True, slots=True)
class Redirected:
    command: Command
    redirects: tuple[Redirect, ...]
    line: int


Command = (
    Simple | Pipeline | AndOr | Background | If | While | For | ForArithmetic | Case | Function | CommandGroup
    | ArithmeticCommand | Test | Redirected
)  # fmt: skip
