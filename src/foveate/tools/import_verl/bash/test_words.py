"""The words and operators of `[[ ... ]]`."""

from __future__ import annotations

import re

from foveate.tools.import_verl.bash.syntax import Text, Word, WordPart
from foveate.tools.import_verl.bash.words import WordReader

_UNARY = re.compile(r"-[a-zA-Z](?=\s)")
_BINARY = re.compile(r"==|=~|!=|=|<|>|-(?:eq|ne|lt|le|gt|ge|nt|ot|ef)(?=\s)")


class TestReader(WordReader):
    """Reads a test as nested tuples, as `syntax.Test` holds it."""

    def read_test(self) -> tuple:
        left = self._test_and()
        self.skip_newlines()
        while self.peek("||"):
            self.at += 2
            left = ("||", left, self._test_and())
            self.skip_newlines()
        return left

    def _test_and(self) -> tuple:
        left = self._test_not()
        self.skip_newlines()
        while self.peek("&&"):
            self.at += 2
            left = ("&&", left, self._test_not())
            self.skip_newlines()
        return left

    def _test_not(self) -> tuple:
        self.skip_newlines()
        if re.compile(r"!(?=\s)").match(self.text, self.at):
            self.at += 1
            return ("!", self._test_not())
        if self.peek("("):
            self.at += 1
            inner = self.read_test()
            self.skip_newlines()
            self.expect(")", "( in [[")
            return inner
        if unary := _UNARY.match(self.text, self.at):
            self.at = unary.end()
            self.skip_newlines()
            return (unary[0], self.read_word())
        left = self.read_word()
        self.skip_newlines()
        binary = _BINARY.match(self.text, self.at)
        if binary is None:
            return ("-n", left)
        self.at = binary.end()
        self.skip_newlines()
        return ("==" if binary[0] == "=" else binary[0], left, self._right_side(binary[0]))

    def _right_side(self, operator: str) -> Word:
        """The word behind a comparison: a regular expression, or an extended pattern, holds brackets and bars."""
        if operator == "=~" or re.compile(r"\S*[@*+?!]\(").match(self.text, self.at):
            line, depth, start, parts = self.line, 0, self.at, list[WordPart]()
            while self.at < len(self.text):
                found = self.text[self.at]
                if found in " \t\n" and depth == 0:
                    break
                if found in "()":
                    if found == ")" and depth == 0:
                        break
                    depth += 1 if found == "(" else -1
                if found in "()|&;<> \t":
                    parts.append(Text(found, False))
                    self.at += 1
                else:
                    parts += self.read_word().parts
            if self.at == start:
                raise self.error("a word is missing")
            return Word(tuple(parts), line)
        return self.read_word()
