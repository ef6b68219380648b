"""Programs and builtins whose output follows from their arguments and input alone: text in, text out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from foveate.tools.import_verl.bash.patterns import CLASSES
from foveate.tools.import_verl.bash.values import LONGEST, Unreadable

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", '"': '"', "'": "'"}
_FORMAT = re.compile(r"%(%|[-+ 0#]*\d{0,4}(?:\.\d{1,3})?[sdiufgeqbxX])")


def run_program(name: str, arguments: Sequence[str], given: str | None) -> tuple[str, int] | None:
    """Output and status of a program, where both are certain; `given`: its input, None where that was not read."""
    program = _PROGRAMS.get(name)
    if program is not None:
        return program(arguments)
    filtering = _FILTERS.get(name)
    return filtering(arguments, given) if filtering is not None and given is not None else None


def _echo(arguments: Sequence[str]) -> tuple[str, int]:
    rest, newline, escapes = list(arguments), True, False
    while rest and re.fullmatch("-[neE]+", rest[0]):
        option = rest.pop(0)
        newline &= "n" not in option
        escapes |= "e" in option
    text = " ".join(rest)
    return (_unescape(text) if escapes else text) + ("\n" if newline else ""), 0


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[0]), text)


def _printf(arguments: Sequence[str]) -> tuple[str, int] | None:
    rest = [*arguments[1:]] if arguments[:1] == ["--"] else [*arguments]
    if not rest or rest[0].startswith("-"):
        return None
    form, values, written = _unescape(rest[0]), rest[1:], ""
    if len(_FORMAT.findall(form)) != form.replace("%%", "").count("%") + form.count("%%"):
        return None
    while True:
        taken = iter(values)

        def fill(match: re.Match[str], taken=taken) -> str:
            return "%" if match[1] == "%" else _formatted(match[1], next(taken, ""))

        try:
            written += _FORMAT.sub(fill, form)
        except ValueError:
            return None
        rest = list(taken)
        if len(written) > LONGEST:
            raise Unreadable(f"a value of more than {LONGEST} characters")
        if not rest or len(rest) == len(values):
            return written, 0
        values = rest


def _formatted(form: str, value: str) -> str:
    kind = form[-1]
    if kind in "diuxX":
        return f"%{form}" % int(value or "0", 10)
    if kind in "fge":
        return f"%{form}" % float(value or "0")
    if kind == "s":
        return f"%{form}" % value
    if kind == "b":
        return _unescape(value)
    raise ValueError(form)


def _basename(arguments: Sequence[str]) -> tuple[str, int] | None:
    rest = list(arguments)
    suffix = ""
    if rest[:1] == ["-s"] and len(rest) > 2:
        suffix, rest = rest[1], rest[2:]
    rest = rest[1:] if rest[:1] == ["--"] else rest
    if not rest or rest[0].startswith("-") or len(rest) > 2:
        return None
    name = rest[0].rstrip("/").rpartition("/")[2] or ("/" if rest[0] else "")
    suffix = rest[1] if len(rest) == 2 else suffix
    return (name[: -len(suffix)] if suffix and name.endswith(suffix) and name != suffix else name) + "\n", 0


def _dirname(arguments: Sequence[str]) -> tuple[str, int] | None:
    rest = [*arguments[1:]] if arguments[:1] == ["--"] else [*arguments]
    if len(rest) != 1 or rest[0].startswith("-"):
        return None
    path = rest[0].rstrip("/") or rest[0][:1]
    folder = path.rpartition("/")[0].rstrip("/") if "/" in path else "."
    return (folder or "/") + "\n", 0


def _seq(arguments: Sequence[str]) -> tuple[str, int] | None:
    rest = list(arguments)
    separator = "\n"
    if len(rest) > 1 and rest[0].startswith("-s"):
        separator, rest = (rest[0][2:], rest[1:]) if len(rest[0]) > 2 else (rest[1], rest[2:])
    if not 1 <= len(rest) <= 3 or not all(re.fullmatch(r"-?\d{1,9}", one) for one in rest):
        return None
    numbers = [int(one) for one in rest]
    first, step, last = (
        (1, 1, *numbers) if len(rest) == 1 else (numbers[0], 1, numbers[1]) if len(rest) == 2 else numbers
    )
    if step == 0 or abs(last - first) // abs(step) > 10_000:
        return None
    found = [str(number) for number in range(first, last + (1 if step > 0 else -1), step)]
    return separator.join(found) + ("\n" if found else ""), 0


def _tr(arguments: Sequence[str], given: str) -> tuple[str, int] | None:
    delete = arguments[:1] == ["-d"]
    sets = [_characters(one) for one in arguments[delete:]]
    if delete and len(sets) == 1 and sets[0]:
        return "".join(one for one in given if one not in sets[0]), 0
    if len(sets) != 2 or not sets[0] or not sets[1]:
        return None
    table = {ord(one): sets[1][min(place, len(sets[1]) - 1)] for place, one in enumerate(sets[0])}
    return given.translate(table), 0


def _characters(text: str) -> str | None:
    text = CLASSES.get(text, text)
    if (text.startswith("-") and len(text) > 1) or "[:" in text:
        return None
    text = _unescape(text)
    return re.sub("(.)-(.)", lambda found: "".join(map(chr, range(ord(found[1]), ord(found[2]) + 1))), text, flags=re.S)


def _cut(arguments: Sequence[str], given: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(?:-d ?(.) -f ?(\d+)|-f ?(\d+) -d ?(.))", " ".join(arguments), re.DOTALL)
    if match is None:
        return None
    separator, number = match[1] or match[4], int(match[2] or match[3])
    lines = []
    for line in given.splitlines():
        pieces = line.split(separator)
        lines.append(line if len(pieces) == 1 else pieces[number - 1] if 0 < number <= len(pieces) else "")
    return "".join(f"{line}\n" for line in lines), 0


def _ends(arguments: Sequence[str], given: str, *, last: bool) -> tuple[str, int] | None:
    match = re.fullmatch(r"(?:-n ?|-)(\d{1,9})", " ".join(arguments)) if arguments else None
    if arguments and match is None:
        return None
    count, lines = int(match[1]) if match else 10, given.splitlines(keepends=True)
    return "".join(lines[max(0, len(lines) - count) :] if last else lines[:count]), 0


def _grep(arguments: Sequence[str], given: str) -> tuple[str, int] | None:
    options = [one for one in arguments if one.startswith("-")]
    rest = [one for one in arguments if not one.startswith("-")]
    letters = set("".join(options).replace("-", ""))
    if len(rest) != 1 or letters - set("qiEFv") or any(one.startswith("--") for one in options):
        return None
    if "F" not in letters and not re.fullmatch(r"[\w /:@-]*", rest[0]):
        return None
    needle = rest[0].lower() if "i" in letters else rest[0]
    found = [
        line for line in given.splitlines()
        if (needle in (line.lower() if "i" in letters else line)) != ("v" in letters)
    ]  # fmt: skip
    return "" if "q" in letters else "".join(f"{line}\n" for line in found), 0 if found else 1


def _count(arguments: Sequence[str], given: str) -> tuple[str, int] | None:
    counts = {"-l": given.count("\n"), "-w": len(given.split()), "-c": len(given.encode()), "-m": len(given)}
    return (f"{counts[arguments[0]]}\n", 0) if len(arguments) == 1 and arguments[0] in counts else None


_PROGRAMS: dict[str, Callable[[Sequence[str]], tuple[str, int] | None]] = {
    "echo": _echo, "printf": _printf, "basename": _basename, "dirname": _dirname, "seq": _seq,
}  # fmt: skip
_FILTERS: dict[str, Callable[[Sequence[str], str], tuple[str, int] | None]] = {
    "cat": lambda arguments, given: (given, 0) if not arguments or [*arguments] == ["-"] else None,
    "tee": lambda _, given: (given, 0),
    "tr": _tr,
    "cut": _cut,
    "head": lambda arguments, given: _ends(arguments, given, last=False),
    "tail": lambda arguments, given: _ends(arguments, given, last=True),
    "grep": _grep,
    "wc": _count,
    "xargs": lambda arguments, given: (" ".join(given.split()) + "\n", 0) if not arguments else None,
}
