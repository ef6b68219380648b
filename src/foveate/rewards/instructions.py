"""Instruction following: the verifiable instructions of IFEval (Zhou et al. 2023), checked by `if-verifiable`.

The library comes with `pip install 'foveate[ifeval]'`. Nothing is downloaded: instructions that need data of NLTK are
faults of the check until that data is there, and those of other collections are not known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from foveate.errors import ConfigError, DataError, one_line
from foveate.records import Score, Task
from foveate.registry import suggestion
from foveate.rewards import GROUND_TRUTH
from foveate.rewards.actions import mapping_in
from foveate.rewards.plain_text import behind_thoughts, tagged_answer

try:
    import nltk
    from if_verifiable.ifeval import instructions as _library
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    from langdetect import DetectorFactory
except ImportError:
    raise ConfigError(
        "the instruction_following reward needs the if-verifiable library, which is not installed; "
        "install it with: pip install 'foveate[ifeval]'"
    ) from None

DetectorFactory.seed = 0  # else the language of a short text is drawn at random
_PUNKT = "punkt_tab"
_NEEDS_PUNKT = frozenset(("NumberOfSentences", "CapitalWordFrequencyChecker"))
_CLASSES: dict[str, Any] = {kind.__name__: kind for kind in INSTRUCTION_DICT.values()}
_CLASSES |= {name: vars(_library)[name] for name in ("ConstrainedStartChecker", "KeySentenceChecker")}


class Instruction(NamedTuple):
    """An instruction of a row: its name (IFEval's, or that of the class that checks it) and its arguments."""

    name: str
    arguments: Mapping[str, Any]


def instruction_following(
    text: str, task: Task, *, aggregate: Literal["mean", "all"] = "mean", loose: bool = False
) -> Score:
    """The share of a row's instructions that the answer follows, or with "all" 1 if it follows each and else 0.

    The ground truth is a mapping, also as JSON or Python text: IFEval's `instruction_id_list` and `kwargs`, or
    `instructions`, a list of `{class, args}` as Vero and MM-IFEval write it. What is checked stands behind `</think>`,
    inside the last `<answer>` where there is one. With `loose` an instruction is also followed if it is without the
    first line, the last one, or the asterisks of the answer, IFEval's loose accuracy.

    Parts: accuracy, 1 if all are followed; followed, the share. An answer that is empty follows none. Raises DataError
    for a ground truth of another form, an instruction that is not known and one without its arguments.
    """
    wanted = instructions_of(task.answer)
    if not wanted:
        raise DataError(f"{task.where}, field {GROUND_TRUTH}: {_no_instructions(task.answer)}")
    said = behind_thoughts(text)
    tagged = tagged_answer(said)
    answer = (said if tagged is None else tagged).strip()
    forms = [*_loosely(answer)] if loose else [answer]
    followed = [_is_followed(task, one, forms) for one in wanted]
    share = sum(followed) / len(followed)
    every = float(all(followed))
    return Score(share if aggregate == "mean" else every, {"accuracy": every, "followed": share})


def _is_followed(task: Task, one: Instruction, forms: Sequence[str]) -> bool:
    if fault := _fault(one):
        raise DataError(f"{task.where}, field {GROUND_TRUTH}: {fault}")
    checker = _class_of(one.name)(one.name)
    checker.build_description(**one.arguments)
    return any(form.strip() and bool(checker.check_following(form)) for form in forms)


def _loosely(answer: str) -> Iterator[str]:
    lines = answer.split("\n")
    for form in (answer, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))):
        yield form
        yield form.replace("*", "")


def instructions_of(value: Any) -> list[Instruction]:
    """The instructions of a ground truth; none for a value of another form."""
    found = _lower(value)
    names, given = found.get("instruction_id_list"), found.get("kwargs")
    if names is None:
        listed = _listed(found.get("instructions"))
        names = [one.get("class", one.get("id")) if isinstance(one, Mapping) else None for one in listed]
        given = [one.get("args", one.get("kwargs")) if isinstance(one, Mapping) else None for one in listed]
    names, given = _listed(names), [_arguments(one) for one in _listed(given)]
    if not names or len(given) != len(names) or not all(isinstance(name, str) and name for name in names):
        return []
    if any(arguments is None for arguments in given):
        return []
    return [
        Instruction(name, {k: v for k, v in arguments.items() if v is not None})
        for name, arguments in zip(names, given, strict=True)
    ]


def _arguments(value: Any) -> Mapping[str, Any] | None:
    """The arguments of an instruction, also as JSON text; None for something else."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError):
            return None
    return {} if value is None else value if isinstance(value, Mapping) else None


def _lower(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            inner = json.loads(value)
        except (ValueError, RecursionError):
            inner = value
        value = inner if isinstance(inner, str | Mapping) else None
    return {key.lower(): entry for key, entry in (mapping_in(value) or {}).items()}


def _listed(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else []


def _class_of(name: str) -> Any:
    return INSTRUCTION_DICT.get(name) or _CLASSES.get(name)


@lru_cache(maxsize=1)
def _has_punkt() -> bool:
    try:
        nltk.data.find(f"tokenizers/{_PUNKT}/english")
    except LookupError:
        return False
    return True


def _fault(one: Instruction) -> str:
    """Why an instruction cannot be checked here; empty if it can. Without all arguments the library would draw them at
    random."""
    kind = _class_of(one.name)
    if kind is None:
        known = [*INSTRUCTION_DICT, *_CLASSES]
        return (
            f"instruction {one.name!r:.60} is not known{suggestion(one.name, known, then='known')} are those of IFEval"
        )
    if kind.__name__ in _NEEDS_PUNKT and not _has_punkt():
        return (
            f"instruction {one.name} needs NLTK's {_PUNKT}, which is not here; get it with: "
            f"python -m nltk.downloader {_PUNKT}, or leave the row out"
        )
    wanted = set(kind(one.name).get_instruction_args_keys())
    missing, odd = sorted(wanted - one.arguments.keys()), sorted(one.arguments.keys() - wanted)
    if missing:
        return f"instruction {one.name} lacks its arguments {', '.join(missing)}"
    if odd:
        return f"instruction {one.name} has no arguments {', '.join(odd)}"
    for name in ("keywords", "forbidden_words"):  # the library would look for the letters of a text
        if isinstance(one.arguments.get(name), str):
            return (
                f"instruction {one.name}, argument {name}: {one.arguments[name]!r:.60} is a text; write a list of them"
            )
    try:
        checker = kind(one.name)
        checker.build_description(**one.arguments)
        checker.check_following("An answer.")
    except Exception as error:  # the library raises what it likes for a value that it does not know
        return f"instruction {one.name} cannot be checked with {dict(one.arguments)!r:.80} ({one_line(error)[:100]})"
    return ""


def check_instructions(task: Task) -> list[tuple[str, str]]:
    """The faults of a task with instructions, as (field, what is wrong)."""
    wanted = instructions_of(task.answer)
    if not wanted:
        return [(GROUND_TRUTH, _no_instructions(task.answer))]
    return [(GROUND_TRUTH, fault) for one in wanted if (fault := _fault(one))]


def _no_instructions(value: Any) -> str:
    return (
        f"{value!r:.80} holds no instructions: it must be a mapping with instruction_id_list and kwargs of one length, "
        "or instructions, a list of {class, args}"
    )
