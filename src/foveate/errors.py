"""Exceptions for problems that a user can fix: the command line prints one line and exits with code 1."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NOT_PRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and line break, marks that turn the direction of text, and halves of surrogates."""


class UserError(Exception):
    """The base: a one-line message that says what was found, where, what is allowed and what to do."""


class ConfigError(UserError, ValueError):
    """A setting that must be changed."""


class DataError(UserError, ValueError):
    """Input that must be corrected: the message names file, row and field."""


class RankLost(UserError, RuntimeError):
    """A process of a run died or stopped answering. The run can resume from its last checkpoint."""


class DiskError(UserError, OSError):
    """A file that could not be written: the message names its path, the reason and the space left."""


class DiskFull(DiskError):
    """There is no room for a file: writing it again may succeed once there is."""


class EngineError(UserError, RuntimeError):
    """A rollout engine that cannot continue: the message says what it did and where its log is."""


def require(condition: bool, message: str) -> None:
    """Raise DataError with `message` unless `condition` holds."""
    if not condition:
        raise DataError(message)


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey, and that UTF-8 can hold: what else is in it is written as an
    escape, such as `\\x1b`."""
    return _NOT_PRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def counted(count: int, noun: str) -> str:
    """A number of things: "1 row", "2 rows"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def join_where(parts: Sequence[str]) -> str:
    """The place of a problem for an error message: `file, row 3, field images`."""
    return ", ".join(part for part in parts if part)
