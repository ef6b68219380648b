"""Tasks with the answers that supervised training imitates, or that preference learning compares."""

from __future__ import annotations

from foveate.data.recognise import SCHEMA_FIELDS
from foveate.records import Demo, Pair, Task

RESPONSE = "response"
CHOSEN, REJECTED = "chosen", "rejected"
MAKE_PAIRS = "`foveate prepare pairs FILE --out FOLDER --rollouts RUN`"


def demo_of(task: Task) -> Demo:
    """The demonstration of a row: `extra_info.response`. Use `check_response` before."""
    return Demo(task, task.meta[RESPONSE])


def pair_of(task: Task) -> Pair:
    """The preference pair of a row: `extra_info.chosen` and `extra_info.rejected`. Use `check_pair` before."""
    return Pair(task, task.meta[CHOSEN], task.meta[REJECTED])


def check_answered(task: Task) -> list[tuple[str, str]]:
    """The fault of a row that neither is scored nor imitated, as (field, what is wrong): it has no answer at all."""
    if task.answer is not None or any(task.meta.get(name) for name in (RESPONSE, CHOSEN)):
        return []
    return [(SCHEMA_FIELDS["answer"], "is missing; the row has no answer to be scored against")]


def check_response(task: Task) -> list[tuple[str, str]]:
    """The faults of a row as a demonstration, as (field, what is wrong)."""
    return _check_text(task, RESPONSE, "supervised training needs the answer as text")


def check_pair(task: Task) -> list[tuple[str, str]]:
    """The faults of a row as a preference pair, as (field, what is wrong)."""
    need = f"a preference pair needs both answers as text; {MAKE_PAIRS} makes them from the answers of a run"
    faults = _check_text(task, CHOSEN, need) + _check_text(task, REJECTED, need)
    if not faults and task.meta[CHOSEN] == task.meta[REJECTED]:
        return [(f"extra_info.{REJECTED}", "is the chosen answer; there is nothing to prefer")]
    return faults


def _check_text(task: Task, name: str, need: str) -> list[tuple[str, str]]:
    answer = task.meta.get(name)
    return [] if isinstance(answer, str) and answer.strip() else [(f"extra_info.{name}", f"is {answer!r:.80}; {need}")]
