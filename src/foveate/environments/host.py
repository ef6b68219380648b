"""Environments in a worker process: commands in, checked replies out."""

from __future__ import annotations

import os
import traceback
from copy import deepcopy
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

from foveate.environments.build import MakeEnvironment, build_environment
from foveate.environments.observe import (
    MOST_STATE,
    BeyondLimits,
    checked_opening,
    checked_step,
    digest_of,
    plain_json,
)
from foveate.environments.protocol import (
    Environment,
    EnvironmentFailure,
    EnvironmentFault,
    EnvironmentLimits,
    Opened,
    Step,
)
from foveate.errors import DataError, one_line, printable
from foveate.processes import WorkerJob, confine
from foveate.records import Task
from foveate.registry import unpickle
from foveate.rewards.build import TRACE_FRAMES

LONGEST_NOTE = 500


@dataclass(frozen=True, slots=True)
class EnvironmentCommand:
    """One call for the environment of a number: reset with (task, seed), restore with a state, step with a text,
    last_reward, close. reset makes the environment, and close ends it."""

    name: Literal["reset", "restore", "step", "last_reward", "close"]
    number: int
    argument: Any = None


@dataclass(frozen=True, slots=True)
class EnvironmentReply:
    """The result of a command with a hash of what the model sees, and the environment's state after it."""

    result: Opened | Step | None = None
    digest: str = ""
    state: Any = None


@dataclass(frozen=True, slots=True)
class CannotBuild:
    """A worker's last word: the environment itself is wrong, not an answer."""

    message: str


class EnvironmentHost:
    """The environments of a process by their numbers. A failure ends the environment and no other one."""

    def __init__(self, make: MakeEnvironment, limits: EnvironmentLimits, *, in_run: bool = False) -> None:
        """`in_run`: it is in the process of the run, where Ctrl-C is meant for the run."""
        self._make, self._limits, self._in_run = make, limits, in_run
        self._open: dict[int, Environment] = {}

    def handle(self, command: EnvironmentCommand) -> EnvironmentReply | EnvironmentFailure:
        """The reply to a command. Raises nothing but what ends the process."""
        own = os.getpid()
        try:
            reply = self._handle(command)
        except BeyondLimits as error:
            reply = EnvironmentFailure("limit", _note(error))
        except EnvironmentFault as error:
            reply = EnvironmentFailure("fault", _note(error))
        except DataError as error:
            reply = EnvironmentFailure("invalid", _note(error))
        except BaseException as error:  # SystemExit too: other environments live here
            if self._in_run and isinstance(error, KeyboardInterrupt) and os.getpid() == own:
                raise
            note = f"{type(error).__name__}: {_note(error)}"
            reply = EnvironmentFailure("raised", note, printable(traceback.format_exc(limit=-TRACE_FRAMES)[-4_000:]))
        if os.getpid() != own:  # the environment forked, and this is the copy
            os._exit(0)
        if isinstance(reply, EnvironmentFailure):
            self._close(command.number)
        return reply

    def _handle(self, command: EnvironmentCommand) -> EnvironmentReply | EnvironmentFailure:
        number = command.number
        match command.name:
            case "reset":
                task, seed = command.argument
                return self._reset(number, task, seed)
            case "restore":
                return self._restore(self._open[number], command.argument)
            case "step":
                environment = self._open[number]
                step = checked_step(environment.step(command.argument), self._limits)
                return EnvironmentReply(step, digest_of(step.messages, step.done), _state(environment))
            case "last_reward":
                last = Step(reward=self._open[number].last_reward(), done=True)
                return EnvironmentReply(checked_step(last, self._limits))
            case "close":
                self._close(number)
                return EnvironmentReply()

    def _reset(self, number: int, task: Task, seed: int) -> EnvironmentReply:
        environment = self._open[number] = self._make()
        own = replace(task, answer=deepcopy(task.answer), meta=deepcopy(dict(task.meta)))  # it may change what it gets
        messages = checked_opening(environment.reset(own, seed), task, self._limits)
        digest = digest_of(messages)
        return EnvironmentReply(Opened(messages, digest), digest)

    def _restore(self, environment: Environment, state: Any) -> EnvironmentReply | EnvironmentFailure:
        environment.restore(deepcopy(state))
        if _state(environment) != state:
            note = "the environment has another state after restore than it was given; the answer starts again"
            return EnvironmentFailure("start_again", note)
        return EnvironmentReply()

    def _close(self, number: int) -> None:
        environment = self._open.pop(number, None)
        if environment is not None:
            try:
                environment.close()
            except Exception:  # its answer has its result, or its failure, already
                return


def _note(error: BaseException) -> str:
    return printable(one_line(error)[:LONGEST_NOTE])[:LONGEST_NOTE]


def _state(environment: Environment) -> Any:
    state = environment.state()
    return None if state is None else plain_json(state, "the state", MOST_STATE)


def host_for_ever(job: WorkerJob, pipe: Connection, owner: Connection) -> None:
    """In a worker process: carry out commands from the pipe until it closes. Sends None when it is ready, then a reply
    or an `EnvironmentFailure` for each, or `CannotBuild` and nothing more."""
    confine(job, pipe, owner)
    try:
        unpickle(job.functions)
        host = EnvironmentHost(*build_environment(job.name, job.settings))
    except Exception as error:
        where = f"environment {job.name} cannot be built in a worker process"
        pipe.send(CannotBuild(f"{where}: {type(error).__name__}: {one_line(error)}"))
        return
    pipe.send(None)
    while True:
        try:
            command = pipe.recv()
        except EOFError:
            return
        pipe.send(host.handle(command))
