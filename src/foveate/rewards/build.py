"""One signature for rewards, `reward(answer, task) -> Score`, made from a name and settings.

A function may have another signature: plain ones, TRL's and verl's are adapted (`FORMS`). The names of its positional
parameters choose the adapter when the reward is built, before anything runs; its keyword-only parameters are the schema
of its settings.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from foveate.errors import ConfigError, DataError, printable
from foveate.records import Answer, Score, Task
from foveate.registry import bind, resolve
from foveate.rewards import GROUND_TRUTH, REWARDS
from foveate.rewards.requests import Session
from foveate.rewards.text import question

logger = logging.getLogger(__name__)

FAILED = "grader failed"
"""How the note of an answer begins that could not be graded."""

TruthCheck = Callable[[Task], list[tuple[str, str]]]
"""The faults of a task that a reward cannot score, as (field, what is wrong)."""
_Function = Callable[..., Any]
_Adapted = Callable[[Any, Task], Any]
_Parameters = Mapping[str, inspect.Parameter]


TRACE_FRAMES = 8
"""The last frames of a traceback that are kept."""


WHOLE = ("score", "overall")
"""The entries of a dict that are the score itself, in verl and in EasyR1."""


class WrongResult(DataError):
    """A reward returned what is no score: it is wrong for every answer."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward of the one signature. `name` is for messages; `function` takes what `read` gives of an answer, and the
    task; it returns what `as_score` takes. reads_text: it takes the text of an answer and not the record. fetch: for a
    reward that asks a server, the request, which runs beside others; `function` takes its result as a third argument.
    """

    name: str
    function: Callable[..., Any]
    reads_text: bool = True
    fetch: Callable[[Session, Any, Task], Awaitable[Any]] | None = None

    def read(self, answer: Answer | str) -> Answer | str:
        """The part of an answer that the reward needs, and a worker process is sent: its text, or the record.
        Raises DataError where only the text is known and the record is needed."""
        if self.reads_text:
            return answer if isinstance(answer, str) else answer.text
        if isinstance(answer, str):
            raise DataError(f"reward {self.name} takes (answer, task), but only the text of the answers is known here")
        return answer

    def score(self, answer: Answer | str, task: Task, *fetched: Any) -> Score:
        """The score of an answer. What the function raises is passed on. fetched: the result of `fetch`, where it has
        run; else it runs now."""
        read = self.read(answer)
        if self.fetch is not None and not fetched:
            fetched = (asyncio.run(self._fetch_alone(read, task)),)
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
            reason = f"{type(error).__name__}: {error}"
            logger.warning("%s: the grader failed (%s); the answer is not graded", task.where, reason)
            return not_graded(reason, raised=True)
        if score.value is not None and not math.isfinite(score.value):
            return not_graded(f"gave {score.value}")
        return score


def not_graded(reason: str, *, raised: bool = False) -> Score:
    """The score of an answer that could not be graded. raised: the exception that is being handled is the cause."""
    return Score(None, note=f"{FAILED}: {reason}", trace=traceback.format_exc(limit=-TRACE_FRAMES) if raised else "")


def as_score(result: Any, name: str) -> Score:
    """The result of a reward as a Score: a number, a Score, or a dict of parts. The value of a dict is its entry
    "score" (verl) or "overall" (EasyR1), and its other numbers are the parts; without them it is the sum of the
    entries. Raises WrongResult for anything else."""
    if isinstance(result, Score):
        parts = {printable(str(part)[:100]): float(value) for part, value in result.parts.items()}
        if result.value is None:
            return Score(None, parts, result.note or f"{FAILED}: gave no value", result.trace)
        return Score(float(result.value), parts, result.note)
    if _is_number(result):
        return Score(float(result))
    if isinstance(result, Mapping):
        parts = {printable(str(part)[:100]): float(value) for part, value in result.items() if _is_number(value)}
        if whole := next((name for name in WHOLE if name in parts), ""):
            return Score(parts.pop(whole), parts)
        if parts and len(parts) == len(result):
            return Score(sum(parts.values()), parts)
    raise WrongResult(
        f"reward {name} returned {type(result).__name__} {result!r:.60}; it must return a number, a dict of numbers "
        '(with "score" or "overall" the score itself), or a foveate.records.Score'
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_)


# --------------------------------------------------------------------------------------------------------- signatures


@dataclass(frozen=True, slots=True)
class Form:
    """A signature that is understood. fits: whether the positional parameters of a function have it; adapt: from the
    name of a reward, the function with its settings and its parameters to (text or answer, task) -> result. columns:
    further parameters are columns of the row, by name. arguments: further parameters, and `**kwargs`, are settings."""

    written: str
    fits: Callable[[list[str]], bool]
    adapt: Callable[[str, _Function, _Parameters], _Adapted]
    reads_text: bool = True
    columns: bool = False
    arguments: bool = False


VERL = ("data_source", "solution_str", "ground_truth", "extra_info")


def _truth(task: Task) -> Any:
    return task.answer


ROW_COLUMNS: dict[str, Callable[[Task], Any]] = {
    "data_source": lambda task: task.source,
    "ground_truth": _truth,
    "solution": _truth,
    "answer": _truth,
}
"""Columns that every row has, beside the fields of its `extra_info`."""


def _as_it_is(_name: str, function: _Function, _: _Parameters) -> _Adapted:
    return function


def _plain(_name: str, function: _Function, parameters: _Parameters) -> _Adapted:
    wanted = _selector(parameters, leave_out=("answer", "ground_truth"))
    return lambda text, task: function(text, task.answer, **wanted(task))


def _trl(name: str, function: _Function, parameters: _Parameters) -> _Adapted:
    """TRL's functions take a batch; they get one of a single answer. Prompts and completions are texts, or messages
    where the annotation of `completions` says so (`list[list[dict[str, str]]]`, as in `trl.rewards`). None for an
    answer says that the reward does not apply to its row, so that it is not graded."""
    wanted = _selector(parameters, leave_out=("completions", "prompts"))
    as_messages = "dict" in str(parameters["completions"].annotation)
    with_prompts = "prompts" in parameters or _takes_any(parameters)

    def reward(text: str, task: Task) -> Any:
        batch: dict[str, Any] = {column: [value] for column, value in wanted(task).items()}
        if with_prompts:
            messages = [{"role": message.role, "content": message.content} for message in task.messages]
            batch["prompts"] = [messages if as_messages else question(task)]
        result = function(completions=[[{"role": "assistant", "content": text}] if as_messages else text], **batch)
        if not isinstance(result, list | tuple) or len(result) != 1:
            raise WrongResult(f"reward {name} returned {result!r:.60} for one completion; it must return [score]")
        return Score(None, note="the reward does not apply to this row") if result[0] is None else result[0]

    return reward


def _verl(_name: str, function: _Function, _: _Parameters) -> _Adapted:
    return lambda text, task: function(
        data_source=task.source, solution_str=text, ground_truth=task.answer, extra_info=dict(task.meta)
    )


FORMS = (
    Form("(answer, task)", lambda names: names == ["answer", "task"], _as_it_is, reads_text=False),
    Form("(text, task)", lambda names: len(names) == 2 and names[0].lstrip("_") == "text", _as_it_is),
    Form(
        "(answer, ground_truth, **columns)", lambda names: names[:2] == ["answer", "ground_truth"], _plain, columns=True
    ),
    Form("TRL's (completions, **columns)", lambda names: "completions" in names, _trl, columns=True),
    Form(f"verl's ({', '.join(VERL)})", lambda names: set(VERL) <= set(names), _verl, arguments=True),
)


def adapt(name: str, function: Any, settings: Mapping[str, Any]) -> Reward:
    """A function of any form as a Reward, with its settings filled in. Raises ConfigError for what is no plain
    function, a signature of no form, and settings that the function does not take, misses or has of another type."""
    where = f"reward {name}"
    form = _form_of(where, function)
    parameters = inspect.signature(function).parameters
    keywords = {key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    arguments = {key: value for key, value in settings.items() if form.arguments and key not in keywords}
    if form.arguments:
        try:
            inspect.signature(function).bind(**dict.fromkeys(VERL), **settings)
        except TypeError as error:
            raise ConfigError(f"{where} cannot be called with {', '.join((*VERL, *settings))} ({error})") from None
    bound = bind(function, {key: value for key, value in settings.items() if key not in arguments}, where)
    return Reward(name, form.adapt(name, partial(bound, **arguments), parameters), form.reads_text)


def _form_of(where: str, function: Any) -> Form:
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"{where} must be a plain function, found {function!r:.60}")
    names = list(_positional(inspect.signature(function).parameters))
    for form in FORMS:
        if form.fits(names):
            return form
    known = ", ".join(form.written for form in FORMS)
    raise ConfigError(
        f"{where}: parameters ({', '.join(names)}) fit no known signature; write {known}, with settings as "
        "keyword-only parameters"
    )


def _positional(parameters: _Parameters) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


def _takes_any(parameters: _Parameters) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _selector(parameters: _Parameters, leave_out: tuple[str, ...]) -> Callable[[Task], dict[str, Any]]:
    """From a task to the columns that a function takes: those that it names, or all."""
    named, takes_any = _positional(parameters), _takes_any(parameters)

    def is_taken(name: str) -> bool:  # a setting is not overwritten by a column of its name
        return name not in leave_out and (name in named or (takes_any and name not in parameters))

    def select(task: Task) -> dict[str, Any]:
        columns = {name: read(task) for name, read in ROW_COLUMNS.items()} | dict(task.meta)
        return {name: value for name, value in columns.items() if is_taken(name)}

    return select


# ------------------------------------------------------------------------------------------------------------- by name


def build_reward(name: str, settings: Mapping[str, Any]) -> Reward:
    """A reward from the table or by import path, with its settings filled in. Raises ConfigError for an unknown name
    or setting, and for a function of an unknown signature."""
    function = _resolve(name)
    if name in REWARDS and REWARDS[name].builds:
        built = bind(function, settings, f"reward {name}")()
        return built if isinstance(built, Reward) else adapt(name, built, {})
    return adapt(name, function, settings)


def truth_check(name: str, settings: Mapping[str, Any] | None = None) -> TruthCheck | None:
    """The faults of a task that a reward with these settings cannot score, or None for one that takes any task.
    Raises ConfigError for an unknown name, and for a missing setting of a reward that is made of others."""
    known, given = REWARDS.get(name), settings or {}
    if known is None:
        function = _resolve(name)
        return _needs(_form_of(f"reward {name}", function), inspect.signature(function).parameters)
    if not known.check:
        return None
    check = resolve({}, known.check, "check")
    if known.builds:
        return bind(check, given, f"reward {name}")()
    read = {key: given[key] for key in inspect.signature(check).parameters if key in given}
    return bind(check, read, f"reward {name}")


def _needs(form: Form, given: _Parameters) -> TruthCheck | None:
    """The check of a function's own: for the columns of a row that are its parameters, its ground truth among them."""
    names = [key for key, parameter in _positional(given).items() if parameter.default is parameter.empty]
    names = names[1:] if form.adapt is _plain else names  # where the first one is the answer of the model
    columns = tuple(key for key in names if key not in ("completions", "prompts", *ROW_COLUMNS)) if form.columns else ()
    truth = (form.columns or form.arguments) and any(ROW_COLUMNS[key] is _truth for key in names if key in ROW_COLUMNS)
    return NeedsColumns(columns, truth) if columns or truth else None


def _resolve(name: str) -> Any:
    return resolve({known: entry.function for known, entry in REWARDS.items()}, name, "reward")


@dataclass(frozen=True, slots=True)
class NeedsColumns:
    """The check of a reward that names columns of a row as its parameters; truth: its ground truth, too. It can be sent
    to other processes."""

    columns: tuple[str, ...]
    truth: bool = False

    def __call__(self, task: Task) -> list[tuple[str, str]]:
        missing = [f"extra_info.{column}" for column in self.columns if column not in task.meta]
        faults = [(field, "is missing; the reward has a parameter of this name") for field in missing]
        if self.truth and task.answer is None:
            faults.append((GROUND_TRUTH, "is missing, and the reward compares answers with it"))
        return faults
