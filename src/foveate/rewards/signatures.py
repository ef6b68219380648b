"""The signatures of reward functions that are understood: plain ones, TRL's, verl's and EasyR1's.

The names of the positional parameters of a function choose its form when the reward is built, before anything runs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from foveate.data.conversations import with_words
from foveate.errors import ConfigError, DataError
from foveate.records import Answer, Score, Task
from foveate.registry import shown_name
from foveate.rewards.text import question

logger = logging.getLogger(__name__)

_Function = Callable[..., Any]
_Adapted = Callable[[Any, Task], Any]
_Parameters = Mapping[str, inspect.Parameter]


class WrongResult(DataError):
    """A reward returned what is no score: it is wrong for every answer."""


@dataclass(frozen=True, slots=True)
class Form:
    """A signature that is understood. fits: whether the positional parameters of a function have it; adapt: from the
    name of a reward, the function with its settings and its parameters to (text or answer, task) -> result. columns:
    further parameters are columns of the row, by name. called_with: the names that the function is called with; further
    parameters, and `**kwargs`, are settings."""

    written: str
    fits: Callable[[list[str]], bool]
    adapt: Callable[[str, _Function, _Parameters], _Adapted]
    reads_text: bool = True
    columns: bool = False
    called_with: tuple[str, ...] = ()

    @property
    def arguments(self) -> bool:
        """Whether further parameters are settings."""
        return bool(self.called_with)


VERL = ("data_source", "solution_str", "ground_truth", "extra_info")
VERL_BATCH = ("data_sources", "solution_strs", "ground_truths", "extra_infos")


def ground_truth_of(task: Task) -> Any:
    """The value of the columns of `ROW_COLUMNS` that are the ground truth."""
    return task.answer


ROW_COLUMNS: dict[str, Callable[[Task], Any]] = {
    "data_source": lambda task: task.source,
    "ground_truth": ground_truth_of,
    "solution": ground_truth_of,
    "answer": ground_truth_of,
}
"""Columns that every row has, beside the fields of its `extra_info`."""


def _as_it_is(_name: str, function: _Function, _: _Parameters) -> _Adapted:
    return function


def _plain(_name: str, function: _Function, parameters: _Parameters) -> _Adapted:
    wanted = _selector(parameters, leave_out=("answer", "ground_truth"))
    return lambda text, task: function(text, task.answer, **wanted(task))


def _trl(name: str, function: _Function, parameters: _Parameters) -> _Adapted:
    """TRL's functions take a batch; they get one of a single answer. Prompts and completions are texts, or messages
    where the row has its prompt as TRL's messages, or the annotation of `completions` says so
    (`list[list[dict[str, str]]]`, as in `trl.rewards`; `list[str]`: texts). None for an answer says that the reward
    does not apply to its row, so that it is not graded."""
    wanted = _selector(parameters, leave_out=("completions", "prompts"))
    annotation = parameters["completions"].annotation
    written = "" if annotation is inspect.Parameter.empty else str(annotation)
    with_prompts = "prompts" in parameters or _takes_any(parameters)

    def reward(text: str, task: Task) -> Any:
        as_messages = "dict" in written or (task.conversational and "str" not in written)
        batch: dict[str, Any] = {column: [value] for column, value in wanted(task).items()}
        if with_prompts:
            messages = [{"role": message.role, "content": with_words(message.content)} for message in task.messages]
            batch["prompts"] = [messages if as_messages else question(task)]
        result = function(completions=[[{"role": "assistant", "content": text}] if as_messages else text], **batch)
        found = _only(result, name, "completion")
        return Score(None, note="the reward does not apply to this row") if found is None else found

    return reward


def _verl(_name: str, function: _Function, _: _Parameters) -> _Adapted:
    return lambda text, task: function(
        data_source=task.source, solution_str=text, ground_truth=task.answer, extra_info=dict(task.meta)
    )


def _only(result: Any, name: str, of: str) -> Any:
    """The score of the only answer of a batch."""
    if not isinstance(result, list | tuple) or len(result) != 1:
        raise WrongResult(f"reward {shown_name(name)} returned {result!r:.60} for one {of}; it must return [score]")
    return result[0]


def _verl_batch(name: str, function: _Function, _: _Parameters) -> _Adapted:
    return lambda text, task: _only(
        function(
            data_sources=[task.source],
            solution_strs=[text],
            ground_truths=[task.answer],
            extra_infos=[dict(task.meta)],
        ),
        name,
        "solution",
    )


def _easyr1(_name: str, function: _Function, _: _Parameters) -> _Adapted:
    return lambda answer, task: function(_easyr1_input(answer, task))


def _easyr1_batch(name: str, function: _Function, _: _Parameters) -> _Adapted:
    return lambda answer, task: _only(function([_easyr1_input(answer, task)]), name, "reward input")


def _easyr1_input(answer: Answer, task: Task) -> dict[str, Any]:
    return {"response": answer.text, "response_length": len(answer.token_ids), "ground_truth": task.answer}


FORMS = (
    Form("(answer, task)", lambda names: names == ["answer", "task"], _as_it_is, reads_text=False),
    Form("(text, task)", lambda names: len(names) == 2 and names[0].lstrip("_") == "text", _as_it_is),
    Form(
        "(answer, ground_truth, **columns)", lambda names: names[:2] == ["answer", "ground_truth"], _plain, columns=True
    ),
    Form("TRL's (completions, **columns)", lambda names: "completions" in names, _trl, columns=True),
    Form(f"verl's ({', '.join(VERL)})", lambda names: set(VERL) <= set(names), _verl, called_with=VERL),
    Form(
        f"verl's batch ({', '.join(VERL_BATCH)})",
        lambda names: set(VERL_BATCH) <= set(names),
        _verl_batch,
        called_with=VERL_BATCH,
    ),
    Form(
        "EasyR1's (reward_input)",
        lambda names: names[:1] == ["reward_input"],
        _easyr1,
        reads_text=False,
        called_with=("reward_input",),
    ),
    Form(
        "EasyR1's batch (reward_inputs)",
        lambda names: names[:1] == ["reward_inputs"],
        _easyr1_batch,
        reads_text=False,
        called_with=("reward_inputs",),
    ),
)

NOT_PASSED = {
    "completion_ids": "a function (answer, task) has them as answer.token_ids",
    "completions_ids": "a function (answer, task) has them as answer.token_ids",
    "prompt_ids": "a function (answer, task) is given the answer's tokens alone",
    "images": "a function (text, task) has them as task.images",
    "image": "a function (text, task) has them as task.images",
    "trainer_state": "a reward does not depend on the step",
    "log_extra": "return a dict of parts, each of which has a curve",
    "log_metric": "return a dict of parts, each of which has a curve",
    "environments": "the rewards of an environment count with environment.reward=environment, or both",
    "reward_router_address": "the reward judge asks a model",
    "reward_model_tokenizer": "the reward judge asks a model",
}
"""Parameters that other trainers pass and foveate does not, and what to do instead."""


def reward_form(where: str, function: Any) -> Form:
    """The form of a function. Raises ConfigError for a signature of none, and for parameters that are not passed."""
    names = list(positional(inspect.signature(function).parameters))
    for form in FORMS:
        if form.fits(names):
            _tell_not_passed(where, form, function)
            return form
    known = ", ".join(form.written for form in FORMS)
    raise ConfigError(
        f"{where}: parameters ({', '.join(names)}) fit no known signature; write {known}, with settings as "
        "keyword-only parameters"
    )


def positional(parameters: _Parameters) -> dict[str, inspect.Parameter]:
    """The parameters that are no settings."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in kinds}


def _takes_any(parameters: _Parameters) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _selector(parameters: _Parameters, leave_out: tuple[str, ...]) -> Callable[[Task], dict[str, Any]]:
    """From a task to the columns that a function takes: those that it names, or all."""
    named, takes_any = positional(parameters), _takes_any(parameters)

    def is_taken(name: str) -> bool:  # a setting is not overwritten by a column of its name
        return name not in leave_out and (name in named or (takes_any and name not in parameters))

    def select(task: Task) -> dict[str, Any]:
        columns = {name: read(task) for name, read in ROW_COLUMNS.items()} | dict(task.meta)
        return {name: value for name, value in columns.items() if is_taken(name)}

    return select


def _tell_not_passed(where: str, form: Form, function: _Function) -> None:
    """Refuse parameters that other trainers pass, and foveate does not, unless they may be columns; warn of those with
    a default."""
    for name, parameter in positional(inspect.signature(function).parameters).items():
        if name in NOT_PASSED and name not in form.called_with:
            said = f"{where}: {name} is not passed by foveate: {NOT_PASSED[name]}"
            if parameter.default is not parameter.empty:
                _warn_once(f"{said}; where no column is called so, the function gets its default")
            elif not form.columns:
                raise ConfigError(said)


@cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
