"""From characters to words: quotes, expansions, here-documents."""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import TYPE_CHECKING

from foveate.tools.import_verl.bash.syntax import (
    Arithmetic,
    BashSyntaxError,
    Parameter,
    Substitution,
    Text,
    Word,
    WordPart,
)

if TYPE_CHECKING:
    from foveate.tools.import_verl.bash.syntax import Command

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PARAMETER = re.compile(r"[A-Za-z_]\w*|\d+|[@*#?$!-]", re.ASCII)
_OPERATOR = re.compile(r":[-=?+]|##?|%%?|/[/#%]?|\^\^?|,,?|~~?|@[A-Za-z]|[-=?+:]")
_PLAIN = re.compile(r"[^\s\\'\"$`;&|<>()#{}\[\]]+")
_DOUBLE_QUOTED = re.compile(r"[^\\\"$`]+")
_ANSI_C = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "e": "\x1b", "E": "\x1b", "f": "\f", "v": "\v"}
_ANSI_C |= {one: one for one in "\\'\"?"}
_ANSI_C_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{1,4})|U([0-9a-fA-F]{1,8})|([0-7]{1,3})|(.))", re.DOTALL
)
META = " \t\n;&|<>()"


class WordReader:
    """A position in a text. `read_commands` is the parser's, for `$(...)`."""

    def __init__(self, text: str, line: int = 1) -> None:
        self.text, self.at, self._first_line = text, 0, line
        self.after_here_documents = dict[int, int]()
        """For the end of a line with here-documents, where they end."""
        self._newlines = [match.start() for match in re.finditer("\n", text)]

    def read_commands(self, closing: str) -> tuple[Command, ...]:
        raise NotImplementedError

    @property
    def line(self) -> int:
        return bisect_right(self._newlines, self.at - 1) + self._first_line

    def error(self, text: str) -> BashSyntaxError:
        return BashSyntaxError(self.line, text)

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def expect(self, text: str, after: str) -> None:
        if not self.peek(text):
            raise self.error(f"no {text} after {after}")
        self.at += len(text)

    def skip_blanks(self) -> None:
        """Past blanks, continued lines and a comment, not past a newline."""
        while self.at < len(self.text):
            if self.text[self.at] in " \t\r":
                self.at += 1
            elif self.peek("\\\n") or self.text[self.at :] == "\\":
                self.at += 2
            elif self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return

    def skip_newlines(self) -> None:
        self.skip_blanks()
        while self.peek("\n"):
            self.at = self.after_here_documents.get(self.at, self.at + 1)
            self.skip_blanks()

    # ----------------------------------------------------------------------------------------------------- words

    def read_word(self, stop: str = META, *, empty: bool = False) -> Word:
        """A word up to an unquoted character of `stop`."""
        line, parts = self.line, list[WordPart]()
        while self.at < len(self.text) and (found := self.text[self.at]) not in stop:
            if self.peek("\\\n") or self.text[self.at :] == "\\":
                self.at += 2
            elif found == "\\":
                parts.append(Text(self.text[self.at + 1 : self.at + 2], True))
                self.at += 2
            elif found == "'":
                parts.append(Text(self._until("'", "'"), True))
            elif found == '"':
                parts += self._double_quoted()
            elif found == "$" and self.text[self.at + 1 : self.at + 2] == "'":
                self.at += 1
                parts.append(Text(self._ansi_c(), True))
            elif found == "$" and self.text[self.at + 1 : self.at + 2] == '"':
                self.at += 1
            elif found in "$`":
                parts.append(self._expansion(False))
            elif plain := _PLAIN.match(self.text, self.at):
                taken = next((n for n, one in enumerate(plain[0]) if one in stop), len(plain[0]))
                parts.append(Text(plain[0][:taken], False))
                self.at += taken
            else:
                parts.append(Text(found, False))
                self.at += 1
        if not parts and not empty:
            raise self.error("a word is missing")
        return Word(tuple(parts), line)

    def _until(self, closing: str, name: str) -> str:
        """The raw text between the character here and the next `closing`."""
        end = self.text.find(closing, self.at + 1)
        if end < 0:
            raise self.error(f"no closing {name}")
        text = self.text[self.at + 1 : end]
        self.at = end + 1
        return text

    def _ansi_c(self) -> str:
        match = re.compile(r"'((?:[^'\\]|\\.)*)'", re.DOTALL).match(self.text, self.at)
        if match is None:
            raise self.error("no closing '")
        self.at = match.end()
        return _ANSI_C_ESCAPE.sub(self._ansi_c_character, match[1])

    def _ansi_c_character(self, match: re.Match[str]) -> str:
        if match[5]:
            return _ANSI_C.get(match[5], match[0])
        code = int(match[4], 8) & 255 if match[4] else int(match[1] or match[2] or match[3], 16)
        wide = bool(match[2] or match[3])
        if code == 0 or code > (0xDFFF if wide else 127):
            raise self.error(f"the character {match[0]} in $'' is not read here")
        return chr(code)

    def _double_quoted(self) -> list[WordPart]:
        self.at += 1
        parts = list[WordPart]()
        while not self.peek('"'):
            if self.at >= len(self.text):
                raise self.error('no closing "')
            parts.append(self._quoted_part('$`"\\\n'))
        self.at += 1
        return parts or [Text("", True)]

    def _quoted_part(self, escapable: str) -> WordPart:
        """One part of a text in which only expansions and some escapes act."""
        if self.text[self.at] == "\\":
            following = self.text[self.at + 1 : self.at + 2]
            self.at += 2
            escaped = following and following in escapable
            return Text(("" if following == "\n" else following) if escaped else "\\" + following, True)
        if self.text[self.at] in "$`":
            return self._expansion(True)
        plain = _DOUBLE_QUOTED.match(self.text, self.at)
        if plain is None:
            self.at += 1
            return Text(self.text[self.at - 1], True)
        self.at = plain.end()
        return Text(plain[0], True)

    def _as_quoted(self, text: str, line: int) -> Word:
        """The text of a here-document or an arithmetic expression as a word."""
        reader = type(self)(text, line)
        parts = list[WordPart]()
        while reader.at < len(text):
            parts.append(reader._quoted_part("$`\\\n"))
        return Word(tuple(parts), line)

    # ------------------------------------------------------------------------------------------------ expansions

    def _expansion(self, quoted: bool) -> WordPart:
        line = self.line
        if self.peek("`"):
            raw = re.compile(r"`((?:[^`\\]|\\.)*)`", re.DOTALL).match(self.text, self.at)
            if raw is None:
                raise self.error("no closing `")
            self.at = raw.end()
            inner = type(self)(re.sub(r"\\([$`\\])", r"\1", raw[1]), line)
            return Substitution(inner.read_commands(""), quoted, False, line)
        if self.peek("$(("):
            start = self.at
            if (expression := self.read_arithmetic(3)) is not None:
                return Arithmetic(expression, quoted, line)
            self.at = start
        if self.peek("$[") and (end := self._bracket_end()):
            expression = self._as_quoted(self.text[self.at + 2 : end].replace('"', ""), line)
            self.at = end + 1
            return Arithmetic(expression, quoted, line)
        if self.peek("$("):
            self.at += 2
            body = self.read_commands(")")
            self.expect(")", "$(")
            return Substitution(body, quoted, False, line)
        if self.peek("${"):
            return self._braces(quoted, line)
        self.at += 1
        name = _PARAMETER.match(self.text, self.at)
        if name is None:
            return Text("$", quoted)
        taken = name[0][:1] if name[0].isdigit() else name[0]  # $10 is ${1}0
        self.at += len(taken)
        return Parameter(taken, None, "", (), quoted, line, bare=_NAME.fullmatch(taken) is not None)

    def _bracket_end(self) -> int:
        """The place of the ] that closes the $[ here, the old form of an expression; 0 where none does."""
        depth = 0
        for match in re.compile(r"[\[\]]").finditer(self.text, self.at):
            depth += 1 if match[0] == "[" else -1
            if depth == 0:
                return match.start()
        return 0

    def read_arithmetic(self, opening: int) -> Word | None:
        """The expression before the `))` that closes what opens here, or None where two brackets close apart."""
        begin, depth = self.at + opening, 0
        line = self.line
        for match in re.compile(r"[()]").finditer(self.text, begin):
            if match[0] == "(":
                depth += 1
            elif depth:
                depth -= 1
            elif self.text[match.start() : match.start() + 2] == "))":
                self.at = match.start() + 2
                return self._as_quoted(self.text[begin : match.start()].replace('"', ""), line)
            else:
                return None
        return None

    def split_header(self, header: Word) -> list[Word]:
        """The three expressions of `for ((a; b; c))`."""
        groups: list[list[WordPart]] = [[]]
        for part in header.parts:
            pieces = part.text.split(";") if isinstance(part, Text) else [part]
            for number, piece in enumerate(pieces):
                if number:
                    groups.append([])
                groups[-1].append(Text(piece, True) if isinstance(piece, str) else piece)
        if len(groups) != 3:
            raise self.error("for (( needs three expressions")
        return [Word(tuple(group), header.line) for group in groups]

    def _braces(self, quoted: bool, line: int) -> Parameter:
        self.at += 2
        operator = ""
        if self.text[self.at : self.at + 1] in ("#", "!") and self.text[self.at + 1 : self.at + 2] not in ("}", ":"):
            operator = "length" if self.peek("#") else "!"
            self.at += 1
        name = _PARAMETER.match(self.text, self.at)
        if name is None:
            raise self.error("${ without a name: bad substitution")
        self.at = name.end()
        index = None
        if self.peek("[") and _NAME.match(name[0]):
            self.at += 1
            index = self.read_word("]")
            self.expect("]", "[")
        arguments: tuple[Word, ...] = ()
        if not self.peek("}"):
            following = _OPERATOR.match(self.text, self.at)
            if operator == "!" and (prefix := re.compile(r"[@*](?=\})").match(self.text, self.at)):
                following = prefix
            if following is None or operator == "length":
                raise self.error(f"${{{operator}{name[0]} ...: bad substitution")
            operator += following[0]
            self.at = following.end()
            of_text = following[0][-1] in "-=?+:"  # a pattern is one inside of quotes, too
            first = self._argument(quoted and of_text, "/}" if following[0].startswith("/") else "}")
            second = ()
            if following[0].startswith("/") and self.peek("/"):
                self.at += 1
                second = (self.read_word("}", empty=True),)
            arguments = (first, *second)
        self.expect("}", "${")
        return Parameter(name[0], index, operator, arguments, quoted, line)

    def _argument(self, quoted: bool, stop: str) -> Word:
        """The word inside `${name operator word}`, to an unquoted character of `stop`."""
        if not quoted:
            return self.read_word(stop, empty=True)
        line, parts = self.line, list[WordPart]()
        while self.at < len(self.text) and self.text[self.at] not in stop:
            if self.peek('"'):
                parts += self._double_quoted()
            elif self.text[self.at] == "\\":
                parts.append(self._quoted_part('$`"\\\n}'))
            elif self.text[self.at] in "$`":
                parts.append(self._expansion(True))
            else:
                parts.append(Text(self.text[self.at], True))
                self.at += 1
        return Word(tuple(parts), line)

    # -------------------------------------------------------------------------------------------- here-documents

    def read_here_document(self, delimiter: str, quoted: bool, strip_tabs: bool) -> Word:
        """Lines from here to the one that is the delimiter; without one, to the end, as bash takes it."""
        line, lines = self.line, list[str]()
        while self.at < len(self.text):
            end = self.text.find("\n", self.at)
            end = len(self.text) if end < 0 else end
            found = self.text[self.at : end]
            self.at = min(end + 1, len(self.text))
            found = found.lstrip("\t") if strip_tabs else found
            if found == delimiter:
                break
            lines.append(found + "\n")
        body = "".join(lines)
        return Word((Text(body, True),), line) if quoted else self._as_quoted(body, line)
