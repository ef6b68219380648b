"""Exceptions for problems that a user can fix: the command line prints one line and exits with code 1."""

from __future__ import annotations

from collections.abc import Sequence


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


def join_where(parts: Sequence[str]) -> str:
    """The place of a problem for an error message: `file, row 3, field images`."""
    return ", ".join(part for part in parts if part)
