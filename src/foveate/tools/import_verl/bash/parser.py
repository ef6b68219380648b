"""From words to commands: a recursive descent over the grammar of bash."""

from __future__ import annotations

import re

from foveate.tools.import_verl.bash.syntax import (
    AndOr,
    ArithmeticCommand,
    Assignment,
    Background,
    BashSyntaxError,
    Case,
    Command,
    CommandGroup,
    For,
    ForArithmetic,
    Function,
    If,
    Pipeline,
    Redirect,
    Redirected,
    Simple,
    Substitution,
    Test,
    Text,
    While,
    Word,
)  # fmt: skip
from foveate.tools.import_verl.bash.test_words import TestReader
from foveate.tools.import_verl.bash.words import META

_RESERVED = re.compile(
    r"(?:if|then|elif|else|fi|for|select|while|until|do|done|case|esac|function|time|coproc|[{}!]|\[\[)(?=[\s;&|<>()]|$)"
)
_CLOSING = {"then", "elif", "else", "fi", "do", "done", "esac", "}"}
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\[|\+?=)", re.ASCII)
_FUNCTION = re.compile(r"([^\s;&|<>()$`\"'\\=]+)[ \t]*\([ \t]*\)")
_REDIRECT = re.compile(r"(\d*)(<<<|<<-|<<|<&|<>|<(?!\()|>>|>&|>\||>(?!\()|&>>|&>)")
_DECLARING = ("declare", "local", "export", "readonly", "typeset")
_LINE_END = re.compile(r"(?<!\\)\n|\Z")


def parse_script(text: str) -> tuple[list[list[Command]], BashSyntaxError | None]:
    """The commands of each line that bash would run, and the error at which it would stop: it reads line by line."""
    parser, lines = BashParser(text), list[list[Command]]()
    try:
        while parser.at < len(text):
            if commands := parser.read_line():
                lines.append(commands)
    except BashSyntaxError as error:
        return lines, error
    except RecursionError:
        return lines, BashSyntaxError(parser.line, "nested too deeply to be read")
    return lines, None


class BashParser(TestReader):
    """The commands of a text."""

    def read_commands(self, closing: str) -> tuple[Command, ...]:
        """Commands up to `closing` ("": the end of the text), which is not taken."""
        commands = list[Command]()
        while True:
            self.skip_newlines()
            if self.at >= len(self.text):
                if closing:
                    raise self.error(f"the script ends before a {closing}")
                return tuple(commands)
            if closing and self.peek(closing):
                return tuple(commands)
            commands.append(self._list_item())

    def read_line(self) -> list[Command]:
        """The commands that bash reads before it runs them: those to the end of a line."""
        commands = list[Command]()
        self.skip_newlines()
        while self.at < len(self.text) and not self.peek("\n"):
            commands.append(self._list_item())
            self.skip_blanks()
        return commands

    def _reserved(self) -> str:
        """The reserved word that stands here, which is not taken."""
        match = _RESERVED.match(self.text, self.at)
        return match[0] if match else ""

    def _take(self, *words: str) -> str:
        self.skip_newlines()
        found = self._reserved()
        if found not in words:
            raise self.error(f"found {self.text[self.at : self.at + 12].strip()!r} where {' or '.join(words)} belongs")
        self.at += len(found)
        return found

    # --------------------------------------------------------------------------------------------------- the lists

    def _list_item(self) -> Command:
        """Pipelines joined by && and ||, and the `;` or `&` behind them."""
        line = self.line
        items = [("", self._pipeline())]
        while True:
            self.skip_blanks()
            operator = self.text[self.at : self.at + 2]
            if operator not in ("&&", "||"):
                break
            self.at += 2
            self.skip_newlines()
            items.append((operator, self._pipeline()))
        command = items[0][1] if len(items) == 1 else AndOr(tuple(items), line)
        if self.peek(";;") or self.peek(";&"):
            return command
        if self.peek(";"):
            self.at += 1
        elif self.peek("&"):
            self.at += 1
            return Background(command, line)
        elif self.at < len(self.text) and self.text[self.at] not in "\n)":
            raise self.error(f"unexpected {self.text[self.at : self.at + 12].strip()!r}")
        return command

    def _pipeline(self) -> Command:
        line, negated = self.line, False
        while self._reserved() in ("!", "time"):
            negated ^= self._take("!", "time") == "!"
            self.skip_blanks()
            if self.peek("-p "):
                self.at += 2
                self.skip_blanks()
        commands = [self._command()]
        self.skip_blanks()
        while self.peek("|") and not self.peek("||"):
            self.at += 2 if self.peek("|&") else 1
            self.skip_newlines()
            commands.append(self._command())
            self.skip_blanks()
        return commands[0] if len(commands) == 1 and not negated else Pipeline(tuple(commands), negated, line)

    def _body(self, *closing: str) -> tuple[tuple[Command, ...], str]:
        """Commands, at least one, up to one of the words, which is taken."""
        commands = list[Command]()
        while True:
            self.skip_newlines()
            if commands and self._reserved() in closing:
                return tuple(commands), self._take(*closing)
            if self.at >= len(self.text):
                raise self.error(f"the script ends before {' or '.join(closing)}")
            commands.append(self._list_item())

    # ------------------------------------------------------------------------------------------------ the commands

    def _command(self) -> Command:
        self.skip_blanks()
        line, word = self.line, self._reserved()
        if word in _CLOSING:
            raise self.error(f"unexpected {word!r}")
        if word in ("select", "coproc"):
            raise self.error(f"{word} is not read here")
        if word or self.peek("("):
            return self._redirected(self._compound(word, line), line)
        if function := _FUNCTION.match(self.text, self.at):
            self.at = function.end()
            self.skip_newlines()
            return Function(function[1], self._command(), line)
        return self._simple(line)

    def _compound(self, word: str, line: int) -> Command:
        self.at += len(word)
        match word:
            case "if":
                return self._if(line)
            case "while" | "until":
                condition, _ = self._body("do")
                return While(condition, self._body("done")[0], word == "until", line)
            case "for":
                return self._for(line)
            case "case":
                return self._case(line)
            case "{":
                return CommandGroup(self._body("}")[0], False, line)
            case "[[":
                expression = self.read_test()
                self.skip_newlines()
                self.expect("]]", "[[")
                return Test(expression, line)
            case "function":
                self.skip_blanks()
                name = self.read_word().literal or ""
                self.skip_blanks()
                if self.peek("("):
                    self.at += 1
                    self.skip_blanks()
                    self.expect(")", "function")
                self.skip_newlines()
                return Function(name, self._command(), line)
        if self.peek("((") and (expression := self._arithmetic_command()) is not None:
            return ArithmeticCommand(expression, line)
        self.at += 1
        body = self.read_commands(")")
        self.expect(")", "(")
        if not body:
            raise self.error("( ) without commands")
        return CommandGroup(body, True, line)

    def _arithmetic_command(self) -> Word | None:
        start = self.at
        expression = self.read_arithmetic(2)
        self.at = start if expression is None else self.at
        return expression

    def _if(self, line: int) -> If:
        branches, closed = list[tuple[tuple[Command, ...], tuple[Command, ...]]](), "elif"
        while closed == "elif":
            condition, _ = self._body("then")
            body, closed = self._body("elif", "else", "fi")
            branches.append((condition, body))
        otherwise = self._body("fi")[0] if closed == "else" else ()
        return If(tuple(branches), otherwise, line)

    def _for(self, line: int) -> Command:
        self.skip_blanks()
        if self.peek("((") and (header := self._arithmetic_command()) is not None:
            parts = self.split_header(header)
            self.skip_blanks()
            self.at += self.peek(";")
            closing = "}" if self._take("do", "{") == "{" else "done"
            return ForArithmetic(parts[0], parts[1], parts[2], self._body(closing)[0], line)
        name = self.read_word().literal or ""
        self.skip_newlines()
        words: tuple[Word, ...] | None = None
        if re.compile(r"in(?=\s|;)").match(self.text, self.at):
            self.at += 2
            found = list[Word]()
            self.skip_blanks()
            while self.at < len(self.text) and self.text[self.at] not in ";\n":
                found.append(self.read_word())
                self.skip_blanks()
            words = tuple(found)
        self.skip_blanks()
        self.at += self.peek(";")
        closing = "}" if self._take("do", "{") == "{" else "done"
        return For(name, words, self._body(closing)[0], line)

    def _case(self, line: int) -> Case:
        self.skip_blanks()
        subject = self.read_word()
        self.skip_newlines()
        if not re.compile(r"in(?=\s)").match(self.text, self.at):
            raise self.error("case without in")
        self.at += 2
        arms = list[tuple[tuple[Word, ...], tuple[Command, ...], str]]()
        while True:
            self.skip_newlines()
            if self._reserved() == "esac":
                self._take("esac")
                return Case(subject, tuple(arms), line)
            if arms and not arms[-1][2]:
                raise self.error("found no esac")
            self.at += self.peek("(")
            patterns = list[Word]()
            while not patterns or self.peek("|"):
                self.at += bool(patterns)
                self.skip_blanks()
                patterns.append(self.read_word())
                self.skip_blanks()
            self.expect(")", "a pattern of case")
            arms.append((tuple(patterns), *self._arm()))

    def _arm(self) -> tuple[tuple[Command, ...], str]:
        commands = list[Command]()
        while True:
            self.skip_newlines()
            for end in (";;&", ";;", ";&"):
                if self.peek(end):
                    self.at += len(end)
                    return tuple(commands), end
            if self._reserved() == "esac":
                return tuple(commands), ""
            if self.at >= len(self.text):
                raise self.error("the script ends before esac")
            commands.append(self._list_item())

    # ------------------------------------------------------------------------------------------- simple commands

    def _simple(self, line: int) -> Command:
        assignments, words, redirects = list[Assignment](), list[Word | Assignment](), list[Redirect]()
        while True:
            self.skip_blanks()
            if self.at >= len(self.text):
                break
            if redirect := self._redirect():
                redirects.append(redirect)
                continue
            substituted = self.text[self.at : self.at + 2] in ("<(", ">(")
            if self.text[self.at] in META and not substituted:
                break
            first = words[0] if words else None
            declaring = isinstance(first, Word) and first.literal in _DECLARING
            if (not words or declaring) and (assignment := self._assignment()):
                (words if declaring else assignments).append(assignment)
            else:
                words.append(self._process_substitution() if substituted else self.read_word())
        if not (assignments or words or redirects):
            raise self.error(f"unexpected {self.text[self.at : self.at + 12].strip()!r}")
        if self.peek("("):
            raise self.error("unexpected (")
        simple = Simple(tuple(assignments), tuple(words), line)
        return Redirected(simple, tuple(redirects), line) if redirects else simple

    def _process_substitution(self) -> Word:
        line = self.line
        self.at += 2
        body = self.read_commands(")")
        self.expect(")", "<(")
        return Word((Substitution(body, True, True, line),), line)

    def _redirected(self, command: Command, line: int) -> Command:
        redirects = list[Redirect]()
        self.skip_blanks()
        while redirect := self._redirect():
            redirects.append(redirect)
            self.skip_blanks()
        return Redirected(command, tuple(redirects), line) if redirects else command

    def _redirect(self) -> Redirect | None:
        match = _REDIRECT.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        descriptor, operator = int(match[1]) if match[1] else None, match[2]
        self.skip_blanks()
        if operator in ("<<", "<<-"):
            return Redirect(descriptor, operator, self._here_document(operator == "<<-"))
        if self.text[self.at : self.at + 2] in ("<(", ">("):
            return Redirect(descriptor, operator, self._process_substitution())
        return Redirect(descriptor, operator, self.read_word())

    def _here_document(self, strip_tabs: bool) -> Word:
        """Its text stands behind this line, or behind the last here-document of this line."""
        word = self.read_word()
        quoted = any(not isinstance(part, Text) or part.quoted for part in word.parts)
        delimiter = word.literal
        if delimiter is None:
            raise self.error("the delimiter of a here-document must be plain text")
        end = _LINE_END.search(self.text, self.at)
        assert end is not None
        here, self.at = self.at, self.after_here_documents.get(end.start(), end.start() + 1)
        body = self.read_here_document(delimiter, quoted, strip_tabs)
        self.after_here_documents[end.start()] = self.at
        self.at = here
        return body

    def _assignment(self) -> Assignment | None:
        line, start = self.line, self.at
        match = _ASSIGNMENT.match(self.text, self.at)
        if match is None:
            return None
        self.at, index, operator = match.end(), None, match[2]
        if operator == "[":
            index = self.read_word("]\n", empty=True)
            following = re.compile(r"\]\+?=").match(self.text, self.at)
            if following is None or not index.parts:
                self.at = start
                return None
            self.at, operator = following.end(), following[0][1:]
        append = operator == "+="
        if self.peek("(") and index is None:
            self.at += 1
            return Assignment(match[1], None, append, self._elements(), line)
        return Assignment(match[1], index, append, self.read_word(empty=True), line)

    def _elements(self) -> tuple[tuple[Word | None, Word], ...]:
        elements = list[tuple[Word | None, Word]]()
        while True:
            self.skip_newlines()
            if self.at >= len(self.text):
                raise self.error("the script ends before the ) of an array")
            if self.peek(")"):
                self.at += 1
                return tuple(elements)
            start, index = self.at, None
            if self.peek("["):
                self.at += 1
                index = self.read_word("]\n", empty=True)
                if self.peek("]=") and index.parts:
                    self.at += 2
                else:
                    self.at, index = start, None
            elements.append((index, self.read_word(empty=index is not None)))
