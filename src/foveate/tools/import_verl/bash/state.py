"""The memory of a shell."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from foveate.tools.import_verl.bash.syntax import Command
from foveate.tools.import_verl.bash.values import Array

OF_A_PROCESS = (
    "RANDOM", "SRANDOM", "SECONDS", "EPOCHSECONDS", "EPOCHREALTIME", "HOSTNAME", "UID", "EUID", "PPID", "BASHPID",
    "LINENO", "BASH_VERSION", "OSTYPE", "HOSTTYPE", "MACHTYPE", "FUNCNAME", "PIPESTATUS", "BASH", "SHLVL", "GROUPS",
)  # fmt: skip
"""Variables whose values come from the running shell."""


class ScriptEnds(Exception):
    """The script, or the shell within it, ends here; `reason` where it is an error."""

    def __init__(self, line: int, reason: str = "", status: int | None = 1) -> None:
        super().__init__(reason)
        self.line, self.reason, self.status = line, reason, status


class LineEnds(Exception):
    """An error in an expansion or an assignment: bash leaves the line that it read, and goes on with the next one."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line, self.reason = line, reason


@dataclass(slots=True)
class State:
    """The memory of a shell. Arrays are replaced, never changed, so that a copy is cheap."""

    script: str
    directory: str
    variables: dict[str, str | Array] = field(default_factory=dict)
    functions: dict[str, Command] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)
    """Letters of `declare` that change what is assigned to a variable; "?" where branches differ in them."""
    exported: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    status: int | None = 0

    def copy(self) -> State:
        return replace(
            self,
            variables=dict(self.variables),
            functions=dict(self.functions),
            attributes=dict(self.attributes),
        )
