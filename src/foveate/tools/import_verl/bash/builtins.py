"""The builtins of bash that change what a script remembers, and shells that a script starts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from foveate.tools.import_verl.bash.conditions import evaluate_brackets
from foveate.tools.import_verl.bash.declaring import NAME, Fields, declare_here, export, local, readonly, texts, unset
from foveate.tools.import_verl.bash.patterns import separator_regex
from foveate.tools.import_verl.bash.programs import run_program
from foveate.tools.import_verl.bash.shell import Leaves
from foveate.tools.import_verl.bash.state import ScriptEnds
from foveate.tools.import_verl.bash.values import Array

if TYPE_CHECKING:
    from foveate.tools.import_verl.bash.interpreter import Interpreter


def _set(shell: Interpreter, fields: Fields, line: int) -> int:  # noqa: ARG001
    words = texts(fields)
    while words:
        word = words.pop(0)
        if word in ("--", "-"):
            shell.state.arguments = words
            return 0
        if not re.fullmatch("[-+][a-zA-Z]+", word):
            shell.state.arguments = [word, *words]
            return 0
        names = set(word[1:]) - {"o"}
        if "o" in word[1:] and words:
            long = {"errexit": "e", "nounset": "u", "allexport": "a", "noglob": "f"}
            names.add(long.get(words[0], words[0]))
            words.pop(0)
        options = shell.state.options
        shell.state.options = options | names if word[0] == "-" else options - names
    return 0


def _shift(shell: Interpreter, fields: Fields, line: int) -> int | None:  # noqa: ARG001
    count = _number(shell, fields, 1)
    arguments = shell.state.arguments
    if uncounted := shell.expander.marks.uncounted(arguments[: count or 0]):
        shell.state.arguments = [uncounted]
        return None
    if count is None or count > len(arguments):
        return 1
    shell.state.arguments = arguments[count:]
    return 0


def _number(shell: Interpreter, fields: Fields, default: int) -> int | None:
    known = [shell.expander.marks.known(field) for field in texts(fields)]
    if not known:
        return default
    return int(known[0]) if known[0] and re.fullmatch(r"\d{1,9}", known[0]) else None


def _exit(shell: Interpreter, fields: Fields, line: int) -> int:
    status = _number(shell, fields, 0) if fields else shell.state.status
    raise ScriptEnds(line, "", status)


def _leave(kind: str) -> Callable[[Interpreter, Fields, int], int]:
    def leave(shell: Interpreter, fields: Fields, line: int) -> int:  # noqa: ARG001
        if kind == "return":
            shell.state.status = _number(shell, fields, 0) if fields else shell.state.status
            raise Leaves(kind)
        raise Leaves(kind, _number(shell, fields, 1) or 1)

    return leave


def _brackets(shell: Interpreter, fields: Fields, line: int) -> int | None:  # noqa: ARG001
    words = texts(fields)
    answer = evaluate_brackets(words[:-1] if words[-1:] == ["]"] else words, shell.expander)
    return None if answer is None else int(not answer)


def _cd(shell: Interpreter, fields: Fields, line: int) -> int:
    words = [word for word in texts(fields) if word not in ("--", "-P", "-L")]
    target = shell.expander.marks.known(words[0]) if words else str(shell.state.variables.get("HOME", ""))
    here = shell.expander.marks.known(shell.state.directory)
    if (words and words[0] == "-") or target is None or here is None:
        shell.state.directory = shell.expander.marks.make(f"line {line}: the folder that cd goes to")
        return 0
    folder = os.path.normpath(os.path.join(here, target))
    if not os.path.isdir(folder):
        shell.note(line, f"cd to {folder}, which is no folder here")
        folder = shell.expander.marks.make(f"line {line}: the folder that cd goes to")
    shell.state.variables["OLDPWD"] = shell.state.directory
    shell.state.directory = folder
    return 0


def _pwd(shell: Interpreter, fields: Fields, line: int) -> int:  # noqa: ARG001
    shell.write(shell.state.directory + "\n")
    return 0


def _eval(shell: Interpreter, fields: Fields, line: int) -> int | None:
    text = " ".join(texts(fields))
    if shell.expander.marks.known(text) is None:
        shell.note(line, "eval of a text that was not read")
        return None
    shell.state.status = 0
    shell.run_text(text, line)
    return shell.state.status


def _source(shell: Interpreter, fields: Fields, line: int) -> int | None:
    words = texts(fields)
    text = shell.script_text(words[0]) if words else None
    if text is None:
        shell.note(line, f"{shell.shown(words[0]) if words else 'a file'} is sourced, and was not read")
        return None
    before = shell.state.arguments
    shell.state.arguments = words[1:] or before
    try:
        shell.run_text(text)
    finally:
        shell.state.arguments = before
    return shell.state.status


def _command(shell: Interpreter, fields: Fields, line: int) -> int | None:
    if not fields or str(fields[0]) in ("-v", "-V"):
        shell.write(shell.expander.marks.make(f"line {line}: where a program lies") + "\n")
        return None
    fields = [field for field in fields if field not in ("-p", "--")]
    functions, shell.state.functions = shell.state.functions, {}
    try:
        shell.call(fields, line)
    finally:
        shell.state.functions = functions
    return shell.state.status


def _exec(shell: Interpreter, fields: Fields, line: int) -> int:
    fields = list(fields)
    while fields and fields[0] in ("-a", "-l", "-c", "--"):
        fields = fields[2 if fields[0] == "-a" else 1 :]
    if not fields:
        return 0
    shell.call(fields, line)
    raise ScriptEnds(line, "", shell.state.status)


def _read(shell: Interpreter, fields: Fields, line: int) -> int | None:
    words, as_array, whole = texts(fields), False, False
    names = list[str]()
    while words:
        word = words.pop(0)
        if re.fullmatch("-[a-zA-Z]+", word):
            as_array |= "a" in word
            whole |= word.endswith("d") and words[:1] == [""]
            if word[-1] in "dptnNu" and words:
                words.pop(0)
        else:
            names.append(word)
    names = [name for name in names if NAME.fullmatch(name)] or ["REPLY"]
    given = shell.given
    if given is None or (shell.expander.marks.unread_in(given) and (as_array or len(names) > 1)):
        for name in names:
            mark = shell.expander.marks.make(f"line {line}: what read reads", several=as_array)
            shell.state.variables[name] = Array({0: mark}) if as_array else mark
        return None
    line_read, newline, shell.given = (given, "", "") if whole else given.partition("\n")
    separators = shell.expander.separators()
    if separators is None:
        for name in names:
            shell.state.variables[name] = shell.expander.marks.make(f"line {line}: what read splits at $IFS")
        return None
    stripped = line_read.strip("".join(one for one in separators if one in " \t\n"))
    pattern = separator_regex(separators) if separators else "$^"
    if as_array:
        pieces = re.split(pattern, stripped) if stripped else []
        pieces = pieces[:-1] if pieces and not pieces[-1] else pieces
        elements = [shell.expander.converted(names[0], piece) for piece in pieces]
        shell.state.variables[names[0]] = Array(dict(enumerate(elements)))
    else:
        pieces = re.split(pattern, stripped, maxsplit=len(names) - 1) if len(names) > 1 else [stripped]
        ended = re.split(pattern, pieces[-1])
        if len(pieces) == len(names) and len(ended) == 2 and not ended[1]:
            pieces[-1] = ended[0]
        for name, piece in zip(names, [*pieces, *[""] * len(names)], strict=False):
            shell.expander.assign(name, None, piece)
    return 0 if newline and not whole else 1


def _lines(shell: Interpreter, fields: Fields, line: int) -> int | None:
    names = [word for word in texts(fields) if NAME.fullmatch(word)] or ["MAPFILE"]
    stripped = any(re.fullmatch("-[a-z]*t", word) for word in texts(fields))
    if shell.given is None:
        mark = shell.expander.marks.make(f"line {line}: the lines of {names[-1]}", several=True)
        shell.state.variables[names[-1]] = Array({0: mark})
        return None
    found = shell.given.splitlines(keepends=not stripped)
    shell.state.variables[names[-1]] = Array(dict(enumerate(found)))
    return 0


def _let(shell: Interpreter, fields: Fields, line: int) -> int | None:
    value = "0"
    for field in texts(fields):
        value = shell.expander.arithmetic(field, line)
    known = shell.expander.marks.known(value)
    return None if known is None else int(known == "0")


def _printf(shell: Interpreter, fields: Fields, line: int) -> int | None:
    words = texts(fields)
    variable = words[1] if words[:1] == ["-v"] and len(words) > 2 else None
    words = words[2:] if variable else words
    result = run_program("printf", words, None)
    text = result[0] if result else shell.expander.marks.make(f"line {line}: the output of printf")
    if variable:
        shell.expander.assign(variable, None, text)
    else:
        shell.write(text)
    return 0


def _getopts(shell: Interpreter, fields: Fields, line: int) -> int | None:
    if not shell.state.arguments:
        return 1
    for name in (*texts(fields)[1:2], "OPTARG", "OPTIND"):
        shell.state.variables[name] = shell.expander.marks.make(f"line {line}: what getopts reads")
    return None


def _true(shell: Interpreter, fields: Fields, line: int) -> int:  # noqa: ARG001
    return 0


def _shell_options(shell: Interpreter, fields: Fields, line: int) -> int:
    for name in texts(fields):
        if "-s" in fields and name in ("nocasematch", "lastpipe", "localvar_inherit"):
            shell.note(line, f"shopt -s {name}, which is not followed here")
    return 0


def _false(shell: Interpreter, fields: Fields, line: int) -> int:  # noqa: ARG001
    return 1


BUILTINS: dict[str, Callable[[Interpreter, Fields, int], int | None]] = {
    ":": _true, "true": _true, "false": _false, "[": _brackets, "test": _brackets, "cd": _cd, "pushd": _cd,
    "pwd": _pwd,
    "export": export, "declare": declare_here, "typeset": declare_here, "readonly": readonly, "local": local,
    "unset": unset, "set": _set, "shift": _shift, "exit": _exit, "return": _leave("return"), "break": _leave("break"),
    "continue": _leave("continue"), "eval": _eval, "source": _source, ".": _source, "command": _command,
    "builtin": _command, "exec": _exec, "read": _read, "mapfile": _lines, "readarray": _lines, "let": _let,
    "printf": _printf, "getopts": _getopts, "shopt": _shell_options, "trap": _true, "ulimit": _true, "umask": _true,
    "alias": _true, "sleep": _true,
}  # fmt: skip
