"""The command of a script that starts training, and its arguments as bash would pass them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from foveate.errors import DataError
from foveate.tools.import_verl.bash.interpreter import Interpreter
from foveate.tools.import_verl.bash.shell import LONGEST_SCRIPT, Leaves
from foveate.tools.import_verl.bash.state import ScriptEnds
from foveate.tools.import_verl.bash.values import Marks, Unreadable, is_bare_mark

_PYTHON = re.compile(r"(?:.*/)?(?:python[\d.]*|torchrun|pypy3?)")
_TAKES_VALUE = {"-X", "-W"}
_OTHER_STAGE = re.compile(r"(^|[._/])(fsdp_)?sft|generat|eval|merge|convert|preprocess|infer|server|launch_server")
_SETTING = re.compile(r"(?:[+]{0,2}|~)(?:data|actor_rollout_ref|algorithm|trainer|worker|critic|reward\w*|config)[.=]")


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of the launch. `unread`: why its text, or what stands behind its =, was not read; "": it was.
    `passed`: what bash passes, where only variables that are set nowhere are missing; None: not known."""

    text: str
    unread: str
    passed: str | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """`program` is the module or file that Python runs; `notes` say what was taken for granted on the way."""

    program: str
    arguments: tuple[Argument, ...]
    line: int
    directory: str
    notes: tuple[str, ...]


def read_launch(script: Path, environment: Mapping[str, str], arguments: Sequence[str], number: int = 1) -> Launch:
    """The `number`-th command of a script that starts reinforcement learning.

    Raises DataError for a file that is no bash script, or that starts no such training under this environment.
    """
    text = _text_of(script)
    shell, ended = Interpreter(script, environment, arguments), ""
    try:
        shell.run_text(text)
    except ScriptEnds as end:
        ended = f"line {end.line}: {end.reason}" if end.reason else ""
    except Leaves:
        pass
    except Unreadable as error:
        ended = f"not read to its end: {error}"
    except RecursionError:
        ended = "nested too deeply to be read"
    except Exception as error:
        where = f"{script}, line {shell.expander.line}"
        raise DataError(
            f"{where}: cannot be read here ({type(error).__name__}: {error}); `--run` takes the launch from bash itself"
        ) from error
    marks = shell.expander.marks
    found = [
        (program, rest, shell.started[at]) for at, program, rest in launches_of([one.words for one in shell.started])
    ]
    if not found:
        raise DataError(f"{script}: {_why_none(shell, ended)}")
    if not 1 <= number <= len(found):
        raise DataError(f"{script}: has {len(found)} launches of verl, so that there is none of number {number}")
    program, rest, started = found[number - 1]
    notes = [*shell.notes, *([f"the script {ended}" if ended.startswith("not") else ended] if ended else [])]
    if started.doubt:
        notes.append(f"line {started.line}: the launch stands in {started.doubt.partition(': ')[2]}")
    if len(found) > 1:
        lines = ", ".join(str(one.line) for _, _, one in found)
        notes.append(f"the script launches {len(found)} times (lines {lines}); the recipe is of number {number}")
    words = tuple(_argument(word, marks) for word in rest)
    here = marks.known(started.directory)
    return Launch(program, words, started.line, here or "", tuple(notes))


def _text_of(script: Path) -> str:
    if script.exists() and not script.is_file():
        raise DataError(f"{script}: is no regular file; name a launch script")
    try:
        size = script.stat().st_size
        text = script.read_text(encoding="utf-8") if size <= LONGEST_SCRIPT else ""
    except (OSError, ValueError) as error:
        raise DataError(f"{script}: cannot be read as a launch script: {error}") from None
    if size > LONGEST_SCRIPT:
        raise DataError(f"{script}: has {size} bytes; a launch script has {LONGEST_SCRIPT} at most")
    if "\0" in text:
        raise DataError(f"{script}: cannot be read as a launch script: it holds bytes of 0")
    return text


def _python_program(words: Sequence[str]) -> tuple[str, list[str]]:
    """The module or file that the last Python among the words runs, and its arguments; "" where there is none."""
    places = [
        place
        for place, word in enumerate(words)
        if _PYTHON.fullmatch(word) or (is_bare_mark(word) and words[place + 1 : place + 2] == ("-m",))
    ]
    for place in reversed(places):
        rest = list(words[place + 1 :])
        while rest:
            word = rest.pop(0)
            if word == "-m" and rest:
                if rest[0].startswith("torch.distributed"):
                    rest.pop(0)
                    continue
                return rest[0], rest[1:]
            if word.endswith(".py"):
                return word, rest
            if word in _TAKES_VALUE and rest:
                rest.pop(0)
    return "", []


def _argument(word: str, marks: Marks) -> Argument:
    unread = marks.unread_in(word)
    if not unread:
        return Argument(word, "")
    first = next((one for one in unread if not one.unset), unread[0])
    reason = f"{first.reason}, which neither the script nor the environment sets" if first.unset else first.reason
    return Argument(word.partition("=")[0] if "=" in word else word, reason, marks.known(word))


def launches_of(commands: Sequence[Sequence[str]]) -> list[tuple[int, str, list[str]]]:
    """The commands that start reinforcement learning: the place of each, what Python runs, and its arguments."""
    programs = [(place, *_python_program(words)) for place, words in enumerate(commands)]
    return [found for found in programs if _gives_settings(found[2]) and not _OTHER_STAGE.search(found[1])]


def _gives_settings(words: Sequence[str]) -> bool:
    return any(_SETTING.match(word) for word in words)


def _why_none(shell: Interpreter, ended: str) -> str:
    programs = [found for found in (_python_program(one.words) for one in shell.started) if found[0]]
    others = [program for program, words in programs if _gives_settings(words)]
    what = "no line launches verl (python3 -m verl.trainer.main_ppo key=value ...)"
    if others:
        what = f"launches {others[0]}, which is no reinforcement learning; verl.trainer.main_ppo and its kin are read"
    elif programs:
        what = f"starts {programs[0][0]}, but no line gives verl settings (key=value)"
    why = [ended] if ended else list(shell.notes)[:1]
    return what + (f"; {why[0]}" if why else "")
