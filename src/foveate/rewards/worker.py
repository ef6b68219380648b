"""What runs in a worker process of `foveate.rewards.pool`."""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from foveate.records import FAILED, DataError, Score, Task
from foveate.rewards.grade import build_reward


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is to do: a reward by name with its settings, the folder that relative paths start from, the time
    limit of an answer in seconds and the memory limit in bytes."""

    name: str
    settings: Mapping[str, Any]
    folder: str
    time_limit: float
    memory_limit: int


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker's last word: the reward itself is wrong, not an answer."""

    message: str


def serve(job: Job, pipe: Connection) -> None:
    """Grade `(text, task)` pairs from the pipe until it closes; a task of None is the one before. Sends None when it is
    ready, then a Score for each pair, or a `Failure` at any time."""
    # What goes wrong travels back as the note of a score. The terminal belongs to the run, and so does Ctrl-C; SIGTERM
    # goes to all processes of a job that is stopped, and is the run's as well.
    logging.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.chdir(job.folder)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (job.memory_limit, hard))
    try:
        reward = build_reward(job.name, job.settings)
    except Exception as error:
        pipe.send(Failure(f"reward {job.name} cannot be built in a worker process: {type(error).__name__}: {error}"))
        return
    pipe.send(None)
    own = os.getpid()
    current: Task | None = None
    while True:
        try:
            text, task = pipe.recv()
        except EOFError:
            return
        current = current if task is None else task
        assert current is not None
        # Should the owner be gone while a grader hangs, nobody else would end it: SIGALRM does.
        signal.setitimer(signal.ITIMER_REAL, 2 * job.time_limit + 1)
        score = _graded(reward, text, current)
        if os.getpid() != own:  # the grader forked, and this is the copy: its scores would be taken for other answers'
            os._exit(0)
        pipe.send(score)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _graded(reward: Any, text: str, task: Task) -> Score | Failure:
    try:
        return reward(text, task)
    except DataError as error:
        return Failure(str(error))
    except (Exception, KeyboardInterrupt) as error:
        return Score(0.0, note=f"{FAILED}: {type(error).__name__}: {error}")
