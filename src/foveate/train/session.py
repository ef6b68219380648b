"""Shared by the pages of all stages: settings that are refused, the step to resume from, and when to save."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from foveate.cluster.base import WorkerGroup, broadcast
from foveate.config.base import has_gpu
from foveate.config.cluster import ClusterSettings
from foveate.config.runs import MPOSettings, RLSettings, SFTSettings
from foveate.config.train import TrainSettings
from foveate.data.stream import Stream
from foveate.encoding.dataset import AnswerLimits
from foveate.errors import ConfigError, DataError, RankLost
from foveate.log import MetricsWriter, console
from foveate.run_folder import RunFolder
from foveate.train.checkpoint import checkpoints, read_state
from foveate.train.inputs import Inputs
from foveate.train.worker import Worker

logger = logging.getLogger(__name__)


Result = TypeVar("Result")


def retry_on_lost_rank(retries: int, run: Callable[[bool], Result]) -> Result:
    """The result of `run`. Where it has lost a process it is run again, which resumes from its last checkpoint, at
    most `retries` times. It is told whether it runs again."""
    for left in range(retries, 0, -1):
        try:
            return run(left < retries)
        except RankLost as error:
            logger.warning("%s; going on from the last checkpoint, %d more tries", error, left - 1)
    return run(retries > 0)


class GracefulShutdown:
    """Within it, SIGTERM, SIGHUP and Ctrl-C let a step end and be saved before the process leaves; a second SIGTERM or
    Ctrl-C ends it at once. Ctrl-C does so already before `begin`, when there is nothing to save. The process leaves by
    SystemExit, with a line in the log and no traceback. When it ends, no checkpoint of `workers` is under way."""

    def __init__(self, workers: WorkerGroup[Worker]) -> None:
        self._asked: signal.Signals | None = None
        self._has_begun, self._is_left = False, False
        self._workers = workers
        self._former: dict[signal.Signals, Any] = {}

    @property
    def is_asked(self) -> bool:
        return self._asked is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
            ignored = (signal.SIG_IGN, None)  # by nohup, or a shell for what runs in its background
            heard = [number for number in numbers if signal.getsignal(number) not in ignored]
            self._former = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind in (None, SystemExit) or self._workers.size == 1:  # else some ranks may be gone already
                broadcast(self._workers, Worker.finish_saving)
        except Exception as error:
            if kind in (None, SystemExit):
                raise
            logger.warning("the last checkpoint was not written: %s", error)  # and the first error is passed on
        except KeyboardInterrupt:  # a third Ctrl-C, which waits for no checkpoint
            raise SystemExit(128 + signal.SIGINT) from None
        finally:
            for number, former in self._former.items():
                signal.signal(number, former)
        if kind is KeyboardInterrupt and self._is_left:
            raise SystemExit(128 + signal.SIGINT) from None
        if kind is RankLost:  # the machine may be going down, which told the ranks first
            self.check()

    def _ask(self, number: int, _: object) -> None:
        if number == signal.SIGINT and (self.is_asked or not self._has_begun):
            if not self._is_left:
                logger.warning("Ctrl-C: leaving at once, with what was saved before")
            self._is_left = True
            raise KeyboardInterrupt
        if number == signal.SIGHUP and console.is_terminal:  # it is gone, and writing to it would end the run
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if not self.is_asked:
            self._asked = signal.Signals(number)
            name = "Ctrl-C" if number == signal.SIGINT else self._asked.name
            again = "; once more leaves at once, with what was saved before" if number == signal.SIGINT else ""
            logger.warning(
                "%s: saving after this step, then leaving; the same command continues the run%s", name, again
            )
        elif number == signal.SIGTERM:
            signal.signal(number, self._former[signal.SIGTERM])
            signal.raise_signal(number)

    def begin(self) -> None:
        """From here on there is something to save. Leave if asked to before."""
        self._has_begun = True
        self.check()

    def check(self) -> None:
        """Leave, with the exit code of the signal, if asked to."""
        if self._asked is not None:
            raise SystemExit(128 + self._asked)


_OF_ENGINES = {"engines", "engine_tensor_parallel", "engine_memory", "timeout", "retries"}
"""Settings of a cluster that act where engines have processes of their own."""


_OF_ONE_RANK = {"device", "dtype"}


def require_one_process(cluster: ClusterSettings) -> None:
    """Refuse settings of a cluster where they would not act, and a GPU that is not there."""
    if cluster.device == "cuda" and not has_gpu():
        raise ConfigError("cluster.device=cuda: PyTorch sees no GPU here; foveate doctor shows what it sees")
    acting = _OF_ONE_RANK | (_OF_ENGINES if cluster.engines else set())
    given = cluster.model_dump(exclude_defaults=True, exclude=acting)
    differing = [f"cluster.{name}={value}" for name, value in given.items()]
    if differing:
        raise ConfigError(
            f"{', '.join(differing)}: runs of one rank compute in one process, where of the settings of a cluster "
            "device and dtype act; leave the others out, or set cluster.gpus_per_node"
        )


def answer_limits(settings: SFTSettings | MPOSettings, fields: tuple[str, ...]) -> AnswerLimits:
    """The limits of the answers in the rows of a run that generates nothing."""
    train = settings.train
    budget = train.tokens_per_micro_batch * settings.cluster.sequence_parallel
    return AnswerLimits(fields, budget, train.max_answer_tokens)


def check_offline(cluster: ClusterSettings) -> None:
    """Raise ConfigError for settings of a cluster that would not act in a run that generates nothing."""
    if cluster.engines:
        raise ConfigError(
            f"cluster.engines={cluster.engines}: this run generates nothing and has no engine; leave it out"
        )
    if cluster.ranks == 1:
        require_one_process(cluster)


def check_cluster(settings: RLSettings) -> None:
    """Raise ConfigError for what a run on several ranks cannot do yet, and for settings that would not act."""
    cluster = settings.cluster
    if cluster.ranks == 1:
        require_one_process(cluster)
        if cluster.dtype and not cluster.engines and settings.rollout.engine in ("vllm", "sglang"):
            raise ConfigError(
                f"cluster.dtype={cluster.dtype}: a server beside a trainer in one process computes in model.dtype; "
                "leave it out, or give the server a process of its own: cluster.engines=1"
            )
        return
    if not cluster.engines:
        _check_ranks_answer(settings)


def _check_ranks_answer(settings: RLSettings) -> None:
    """Refuse settings that several ranks with colocated engines cannot have."""
    advice = "with several ranks that takes processes of its own: set cluster.engines to their number"
    if settings.rollout.staleness:
        raise ConfigError(f"rollout.staleness={settings.rollout.staleness}: {advice}, or use 0")
    if settings.rollout.time_limit is not None:
        raise ConfigError(f"rollout.time_limit={settings.rollout.time_limit:g}: {advice}, or leave it out")
    if settings.rollout.engine != "native":
        raise ConfigError(f"rollout.engine={settings.rollout.engine}: {advice}, or use native")


class Stateful(Protocol):
    """Something that resumes where its `state()` was taken."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


def resume(
    run: RunFolder,
    workers: WorkerGroup[Worker],
    stream: Stream,
    metrics: MetricsWriter,
    inputs: Inputs,
    others: Mapping[str, Stateful] = {},
) -> int:
    """Restore weights, optimizer, data position and `others` from the newest checkpoint, and cut the metrics back to
    its step. Returns that step, 0 for a run that begins. Raises DataError where it was made from other inputs, unless
    these are accepted: what they do not fit begins anew then."""
    found = checkpoints(run.checkpoints)
    state: dict[str, Any] = {"step": 0}
    if found:
        path = found[-1][1]
        saved = read_state(path)
        are_others = inputs.check(run, saved["step"], saved.get("inputs"))
        state = broadcast(workers, Worker.restore, path)[0]
        for name, thing in {"stream": stream, **others}.items():
            _restore(path, name, thing, state, are_others)
        logger.info("continuing %s after step %d", run.path, state["step"])
    metrics.truncate_after(state["step"] or -1)  # an evaluation before the first step is done again
    return state["step"]


def _restore(path: Path, name: str, thing: Stateful, state: Mapping[str, Any], may_begin_anew: bool) -> None:
    try:
        thing.restore(state[name])
    except DataError as error:
        if not may_begin_anew:
            raise
        logger.warning("%s begins anew: %s", name, error)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path / 'state.json'}: {name} is not what a run saves ({type(error).__name__})") from error


def save(
    workers: WorkerGroup[Worker],
    run: RunFolder,
    step: int,
    state: dict[str, Any],
    train: TrainSettings,
    inputs: Inputs,
) -> None:
    """All workers write a checkpoint together, beside the next steps where `train.save_async` says so."""
    state = {**state, "inputs": inputs.found}
    broadcast(workers, Worker.save, run.checkpoints, step, state, train.keep_checkpoints, train.save_async)


def save_is_due(step: int, train: TrainSettings, leaving: GracefulShutdown) -> bool:
    """Every `train.save_every` steps, after the last one, and before the run leaves."""
    return leaving.is_asked or step == train.steps or (train.save_every > 0 and step % train.save_every == 0)
