"""One signature for rewards, `reward(answer, task) -> Score`, made from a name and settings.

A function may have another signature: plain ones, TRL's, verl's and EasyR1's are adapted (`signatures.FORMS`). The
names of its positional parameters choose the adapter when the reward is built, before anything runs; its keyword-only
parameters are the schema of its settings.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from foveate.data.videos import NO_VIDEO_FILES
from foveate.errors import ConfigError, DataError, printable
from foveate.records import Answer, Score, Task
from foveate.registry import bind, resolve, shown_name
from foveate.rewards import GROUND_TRUTH, REWARDS
from foveate.rewards.callables import as_function
from foveate.rewards.requests import Session
from foveate.rewards.signatures import (
    NOT_PASSED,
    ROW_COLUMNS,
    Form,
    WrongResult,
    ground_truth_of,
    positional,
    reward_form,
)

logger = logging.getLogger(__name__)

FAILED = "grader failed"
"""How the note of an answer begins that could not be graded."""

TruthCheck = Callable[[Task], Sequence[tuple[str, str]]]
"""The faults of a task that a reward cannot score, as (field, what is wrong)."""
RewardJob = tuple[Any, Task, tuple[Any, ...]]
"""An answer, as `Reward.read` gives it, its task, and further arguments of the reward's function."""
TRACE_FRAMES = 8
"""The last frames of a traceback that are kept."""


WHOLE = ("score", "overall")
"""The entries of a dict that are the score itself, in verl and in EasyR1."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward of the one signature. `name` is for messages; `function` takes what `read` gives of an answer, and the
    task; it returns what `as_score` takes. reads_text: it takes the text of an answer and not the record. fetch: for a
    reward that asks a server, the request, which runs beside others; `function` takes its result as a third argument.
    together: for a reward that reads several answers at once, with a model say: it is given those of a call, in this
    process and those to one task together, and gives the further arguments of `function` for each.
    copies: the function gets a task of its own for each answer, so that what it changes in it reaches no other answer.
    """

    name: str
    function: Callable[..., Any]
    reads_text: bool = True
    fetch: Callable[[Session, Any, Task], Awaitable[Any]] | None = None
    copies: bool = False
    together: Callable[[Sequence[RewardJob]], Sequence[tuple[Any, ...]]] | None = None

    def read(self, answer: Answer | str) -> Answer | str:
        """The part of an answer that the reward needs, and a worker process is sent: its text, or the record.
        Raises DataError where only the text is known and the record is needed."""
        if self.reads_text:
            return answer if isinstance(answer, str) else answer.text
        if isinstance(answer, str):
            raise DataError(f"reward {self.name} takes (answer, task), but only the text of the answers is known here")
        return answer

    def score(self, answer: Answer | str, task: Task, *fetched: Any) -> Score:
        """The score of an answer. What the function raises is passed on. fetched: the result of `fetch` and `together`,
        where they have run; else they run now."""
        read, alone = self.read(answer), not fetched
        if self.fetch is not None and alone:
            fetched = (asyncio.run(self._fetch_alone(read, task)),)
        if self.together is not None and alone:
            fetched = self.together([(read, task, fetched)])[0]
        if self.copies:
            task = replace(task, answer=deepcopy(task.answer), meta=deepcopy(dict(task.meta)))
        return as_score(self.function(read, task, *fetched), self.name)

    async def _fetch_alone(self, read: Any, task: Task) -> Any:
        assert self.fetch is not None
        async with Session() as session:
            return await self.fetch(session, read, task)

    def __call__(self, answer: Answer | str, task: Task, *fetched: Any) -> Score:
        """The score of an answer, as `score`, also where the function fails: one that raises or gives no finite number
        is not graded, with the reason as a note. Raises WrongResult for a result that is no score."""
        read = self.read(answer)
        try:
            score = self.score(read, task, *fetched)
        except WrongResult:
            raise
        except Exception as error:
            score = grader_failed(error)
            logger.warning("%s: %s; the answer is not graded", task.where, score.note)
            return score
        if score.value is not None and not math.isfinite(score.value):
            return not_graded(f"gave {score.value}")
        return score


def grader_failed(error: BaseException) -> Score:
    """The score of an answer whose grader has raised the exception that is being handled, with its traceback; of a
    server that is down or refuses, the message says all."""
    trace = "" if isinstance(error, ConnectionError) else traceback.format_exc(limit=-TRACE_FRAMES)
    return replace(not_graded(f"{type(error).__name__}: {error}"), trace=trace)


def not_graded(reason: str) -> Score:
    """The score of an answer that could not be graded."""
    return Score(None, note=f"{FAILED}: {reason}")


def as_score(result: Any, name: str) -> Score:
    """The result of a reward as a Score: a number, a Score, or a dict of parts. The value of a dict is its entry
    "score" (verl) or "overall" (EasyR1), and its other numbers are the parts; without them it is the sum of the
    entries. Raises WrongResult for anything else."""
    if isinstance(result, Score):
        parts = {printable(str(part)[:100]): float(value) for part, value in result.parts.items()}
        if result.value is None:
            return Score(None, parts, result.note or f"{FAILED}: gave no value", result.trace)
        return Score(float(result.value), parts, result.note)
    if is_number(result):
        return Score(float(result))
    if isinstance(result, Mapping):
        parts = {printable(str(part)[:100]): float(value) for part, value in result.items() if is_number(value)}
        if whole := next((name for name in WHOLE if name in parts), ""):
            return Score(parts.pop(whole), parts)
        if parts and len(parts) == len(result):
            return Score(sum(parts.values()), parts)
    raise WrongResult(
        f"reward {shown_name(name)} returned {type(result).__name__} {result!r:.60}; it must return a number, a dict "
        'of numbers (with "score" or "overall" the score itself), or a foveate.records.Score'
    )


def is_number(value: Any) -> bool:
    """Whether a value counts as a number in the result of a reward; a truth value does."""
    return isinstance(value, int | float | np.number | np.bool_)


def adapt(name: str, function: Any, settings: Mapping[str, Any]) -> Reward:
    """A function of any form as a Reward, with its settings filled in. Raises ConfigError for what cannot be
    called, a signature of no form, and settings that the function does not take, misses or has of another type."""
    where = f"reward {shown_name(name)}"
    function = as_function(function, where)
    form = reward_form(where, function)
    parameters = inspect.signature(function).parameters
    keywords = {key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    arguments = {key: value for key, value in settings.items() if form.arguments and key not in keywords}
    if form.arguments:
        try:
            inspect.signature(function).bind(**dict.fromkeys(form.called_with), **settings)
        except TypeError as error:
            raise ConfigError(
                f"{where} cannot be called with {', '.join((*form.called_with, *settings))} ({error})"
            ) from None
    bound = bind(function, {key: value for key, value in settings.items() if key not in arguments}, where)
    return Reward(name, form.adapt(name, partial(bound, **arguments), parameters), form.reads_text)


# ------------------------------------------------------------------------------------------------------------- by name


def build_reward(name: str, settings: Mapping[str, Any]) -> Reward:
    """A reward from the table or by import path, with its settings filled in. Raises ConfigError for an unknown name
    or setting, and for a function of an unknown signature."""
    function = _resolve(name)
    if name in REWARDS and REWARDS[name].builds:
        built = bind(function, settings, f"reward {name}")()
        return built if isinstance(built, Reward) else adapt(name, built, {})
    reward = adapt(name, function, settings)
    return reward if name in REWARDS else replace(reward, copies=True)


def truth_check(name: str, settings: Mapping[str, Any] | None = None) -> TruthCheck | None:
    """The faults of a task that a reward with these settings cannot score, or None for one that takes any task.
    Raises ConfigError for an unknown name, and for a missing setting of a reward that is made of others."""
    known, given = REWARDS.get(name), settings or {}
    if known is None:
        function = as_function(_resolve(name), f"reward {shown_name(name)}")
        return _needs(reward_form(f"reward {shown_name(name)}", function), inspect.signature(function).parameters)
    if not known.check:  # of those, a judge alone is shown the ground truth
        if name != "judge":
            return None
        reads_truth, sees = "{truth}" in given.get("prompt", "{truth}"), bool(given.get("images"))
        return NeedsColumns((), reads_truth, images=sees) if reads_truth or sees else None
    check = resolve({}, known.check, "check")
    if known.builds:
        return bind(check, given, f"reward {name}")()
    read = {key: given[key] for key in inspect.signature(check).parameters if key in given}
    return NeedsTruth(bind(check, read, f"reward {name}"), name)


def _needs(form: Form, given: Mapping[str, inspect.Parameter]) -> TruthCheck | None:
    """The check of a function's own: for the columns of a row that are its parameters, its ground truth among them."""
    names = [key for key, parameter in positional(given).items() if parameter.default is parameter.empty]
    names = names[1:] if names[:2] == ["answer", "ground_truth"] else names  # the first one is the answer of the model
    columns = tuple(key for key in names if key not in ("completions", "prompts", *ROW_COLUMNS)) if form.columns else ()
    truth = (form.columns or form.arguments) and any(
        key == "ground_truths" or ROW_COLUMNS.get(key) is ground_truth_of for key in names
    )
    return NeedsColumns(columns, truth) if columns or truth else None


def _resolve(name: str) -> Any:
    return resolve({known: entry.function for known, entry in REWARDS.items()}, name, "reward")


@dataclass(frozen=True, slots=True)
class NeedsColumns:
    """The check of a reward that names columns of a row as its parameters; truth: its ground truth, too; images: it is
    shown images, and no video files. It can be sent to other processes."""

    columns: tuple[str, ...]
    truth: bool = False
    images: bool = False

    def __call__(self, task: Task) -> list[tuple[str, str]]:
        faults = [(f"extra_info.{column}", _missing(column)) for column in self.columns if column not in task.meta]
        if self.truth and task.answer is None:
            faults.append((GROUND_TRUTH, "is missing; the reward compares answers with it"))
        if self.images and task.videos:
            faults.append(("videos", f"the judge {NO_VIDEO_FILES}"))
        return faults


def _missing(column: str) -> str:
    if column in NOT_PASSED:
        return f"is no column, and not passed by foveate: {NOT_PASSED[column]}"
    return "is missing; the reward has a parameter of this name"


@dataclass(frozen=True, slots=True)
class NeedsTruth:
    """The check of a known reward, with one fault for a row that has no ground truth at all."""

    check: TruthCheck
    name: str

    def __call__(self, task: Task) -> Sequence[tuple[str, str]]:
        faults = self.check(task)
        if task.answer is not None or not any(field.startswith(GROUND_TRUTH) for field, _ in faults):
            return faults
        default = " (the default) compares answers with a box; name another one with reward.name"
        hint = default if self.name == "grounding" else " compares answers with it"
        others = [fault for fault in faults if not fault[0].startswith(GROUND_TRUTH)]
        return [(GROUND_TRUTH, f"is missing; the reward {self.name}{hint}"), *others]
