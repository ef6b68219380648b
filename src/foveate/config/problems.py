"""The faults of settings, in one line: where each stands, what it is, and what was meant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from foveate.config.base import Settings
from foveate.config.elsewhere import ELSEWHERE, IN_WORDS
from foveate.config.runs import STAGES, is_group, walk
from foveate.registry import explain

PYTHON = "settings"
"""The place of what a call from Python does not give."""
MOST_UNKNOWN = 8
"""Unknown settings that one message names."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A value and where it was written; `value` is a dict of entries for a mapping, else a plain scalar or list."""

    value: Any
    where: str


def first_problem(error: ValidationError, entry: Entry, cls: type[Settings]) -> str:
    """One line for all problems: every unknown name, since they explain missing ones, else the first problem; and how
    many more there are."""
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    told = [_told(problem, entry, cls) for problem in (unknown[:MOST_UNKNOWN] or problems[:1])]
    more = f" (and {len(problems) - len(told)} more)" if len(problems) > len(told) else ""
    return "; ".join(told) + more


def _told(problem: Any, entry: Entry, cls: type[Settings]) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "together":
        path, text = problem["ctx"]["path"], problem["ctx"]["text"]
        location = path.split(".")
    else:
        path = ".".join(part for part in location if not part.isdigit())
        text = explain(problem)
    where = _place(entry, location)
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown setting {path}{_nearest(path, cls)}"
    if problem["type"] == "missing":
        path = _required(path, cls)
        hint = f"; give {path.rpartition('.')[2]}=..." if where == PYTHON else ""
        return f"{where}: {path} is missing{hint}"
    numbers = [f"entry {int(part) + 1}" for part in location if part.isdigit()]
    return f"{where}: {' '.join([path, *numbers])} {text}"


def _required(path: str, cls: type[Settings]) -> str:
    """Of a group that is missing, the first setting in it that has no default; else the path itself."""
    fields = dict(walk(cls))
    below = [name for name, one in fields.items() if name.startswith(f"{path}.") and not is_group(one)]
    return next((name for name in below if fields[name].is_required()), path)


def _place(entry: Entry, location: Sequence[str]) -> str:
    """Where the value at `location` was written, or the nearest mapping above it."""
    for key in location:
        if not isinstance(entry.value, dict) or key not in entry.value:
            break
        entry = entry.value[key]
    return entry.where


def _nearest(path: str, cls: type[Settings]) -> str:
    """The settings that an unknown one may stand for: that of another trainer's name, the same name in another group,
    one of another command, else one spelled alike."""
    group, _, name = path.rpartition(".")
    known = {dotted: dotted.rpartition(".") for dotted, _ in walk(cls) if dotted != group}
    same = [dotted for dotted, (_, _, last) in known.items() if last == name]
    if not same and name in IN_WORDS:
        return f"; {IN_WORDS[name]}"
    if not same and name in ELSEWHERE:
        meant = ELSEWHERE[name]
        return f"; did you mean {meant}?" if _has(cls, meant) else _of_others(meant, cls)
    if not same and (others := _of_others(path, cls)):
        return others
    siblings = {last: dotted for dotted, (above, _, last) in known.items() if above == group}
    lasts = {last: dotted for dotted, (_, _, last) in known.items()}
    alike = [siblings[last] for last in get_close_matches(name, siblings, n=1)]
    alike = alike or get_close_matches(path, known, n=1, cutoff=0.75)
    alike = alike or [lasts[last] for last in get_close_matches(name, lasts, n=1)]
    if same or alike:
        return f"; did you mean {' or '.join(same or alike)}?"
    above = f"{group} has" if group else "there are"
    return f"; {above} {', '.join(siblings)}"


def _has(cls: type[Settings], path: str) -> bool:
    """Whether there is such a setting, or the choice or optional group (`algorithm.loss`) that it may stand in."""
    known = {dotted for dotted, _ in walk(cls)}
    return path in known or path.rpartition(".")[0] in known - {one.partition(".")[0] for one in known}


def _of_others(path: str, cls: type[Settings]) -> str:
    """The commands that have a setting which this one has not; empty where none has it."""
    having = [stage for stage, other in STAGES.items() if other is not cls and _is_setting(other, path)]
    return f"; {path} is a setting of foveate {', '.join(having)}, and not of this command" if having else ""


def _is_setting(cls: type[Settings], path: str) -> bool:
    last = {dotted.rpartition(".")[2] for dotted, _ in walk(cls)}
    return _has(cls, path) if "." in path else path in last
