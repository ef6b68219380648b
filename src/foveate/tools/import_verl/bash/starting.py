"""The programs that a script starts: computed here, recorded, or a shell that runs another text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from foveate.tools.import_verl.bash.programs import run_program
from foveate.tools.import_verl.bash.shell import Shell, Started

_SHELLS = ("bash", "sh", "zsh", "dash")


def start_program(shell: Shell, words: list[str], line: int) -> int | None:
    """Compute what a program writes, or record that the script starts it; its status where that is known."""
    marks = shell.expander.marks
    known = [marks.known(word) for word in words]
    name = (known[0] or "").rpartition("/")[2]
    if _is_missing_module(known):
        shell.note(line, f"{known[2]} is taken to fail: that module is not installed where GPUs are NVIDIA's")
        return 1
    given = None if shell.given is None else marks.known(shell.given)
    values = [word for word in known if word is not None]
    if name in ("echo", "printf", "cat", "tee") and len(values) < len(words):
        values = words  # what was not read passes through these as it is
    result = (
        run_program(name, values[1:], given if name not in ("cat", "tee") else shell.given)
        if len(values) == len(words)
        else None
    )
    if result is not None:
        shell.write(result[0])
        return result[1]
    if name == "xargs":
        words = _with_input(shell, words, line)
    started = Started(tuple(words), line, shell.state.directory, shell.doubts[-1] if shell.doubts else "")
    if started not in shell.started[-8:]:  # a loop that starts the same again and again
        shell.started.append(started)
    shell.write(marks.make(f"line {line}: the output of {name or 'a command'}"))
    _run_inner_shell(shell, words, line)
    return None


def _with_input(shell: Shell, words: list[str], line: int) -> list[str]:
    """The words of `xargs program ...` with the arguments that it takes from its input."""
    rest = words[1:]
    while rest and rest[0] in ("-r", "-t", "--"):
        rest.pop(0)
    if shell.given is None or re.search(r"[\\'\"]", shell.given) or not rest or rest[0].startswith("-"):
        mark = shell.expander.marks.make(f"line {line}: what xargs takes from its input")
        placed = [word.replace("{}", mark) for word in words]
        return placed if placed != words else [*words, mark]
    return [*words, *shell.given.split()]


def _is_missing_module(words: Sequence[str | None]) -> bool:
    """Whether a program asks Python for the module of another maker's devices, which is not installed beside CUDA."""
    program, *rest = words
    asks = len(rest) == 2 and rest[0] == "-c" and re.fullmatch(r"\s*import torch_(npu|mlu|musa)\s*", rest[1] or "")
    return bool(asks and re.fullmatch(r"(?:.*/)?python[\d.]*", program or ""))


def _run_inner_shell(shell: Shell, words: Sequence[str], line: int) -> None:
    """Run what a program hands to another shell: `bash -c text`, `srun bash -c text`, `bash other.sh`."""
    place = next((at for at, word in enumerate(words) if word.rpartition("/")[2] in _SHELLS), None)
    if place is None or place + 1 >= len(words):
        return
    rest = list(words[place + 1 :])
    has_text = False
    while rest and re.fullmatch(r"-[a-zA-Z]+|--\w+", rest[0]):
        has_text |= "c" in rest[0] and not rest[0].startswith("--")
        rest.pop(0)
    if not rest:
        return
    text = rest[0] if has_text else shell.script_text(rest[0])
    if text is None or (has_text and shell.expander.marks.known(text) is None):
        shell.note(line, f"{shell.shown(rest[0])} is run, and was not read")
        return

    def action() -> None:
        state = shell.state
        state.variables = {name: value for name, value in state.variables.items() if name in state.exported}
        state.variables["IFS"] = " \t\n"
        state.functions, state.options, state.attributes = {}, frozenset(), {}
        state.arguments = rest[1:] if not has_text else rest[2:]
        state.script = rest[0] if not has_text else (rest[1] if len(rest) > 1 else state.script)
        shell.run_text(text, line if has_text else 0)

    shell.subshell(action)
