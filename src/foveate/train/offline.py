"""Runs that generate nothing: what all training on given answers does alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from foveate.cluster.base import WorkerGroup, broadcast, start_workers
from foveate.config.runs import MPOSettings, SFTSettings
from foveate.data.augment import Augment
from foveate.data.stream import Stream
from foveate.data.table import TaskTable
from foveate.data.validate import Check
from foveate.encoding.dataset import build_stream, read_data
from foveate.encoding.encode import Encoder
from foveate.encoding.reader import Reader
from foveate.evaluate.predictions import write_skipped
from foveate.log import MetricsWriter, progress
from foveate.models.checkpoint.inspect import ModelFolder, inspect_model_folder
from foveate.models.matmul import use_threads
from foveate.run_folder import RunFolder, open_run
from foveate.train.clock import Clock
from foveate.train.held_out import HeldOutLoss
from foveate.train.inputs import Inputs
from foveate.train.optim import check_optimizer, learning_rate
from foveate.train.session import (
    GracefulShutdown,
    Stateful,
    answer_limits,
    check_offline,
    resume,
    save,
    save_is_due,
)
from foveate.train.trackers import Trackers
from foveate.train.worker import Worker

_Settings = SFTSettings | MPOSettings
_W = TypeVar("_W", bound=Worker)
Learned = tuple[dict[str, float], dict[str, int]]
"""The metrics of a step, and the tokens of its phases (`Clock.metrics`)."""
Learn = Callable[[int, float, Reader, Clock], Learned]
"""One step: its number, learning rate, the reader of its rows and the clock of its phases."""


def begin_offline(settings: _Settings) -> ModelFolder:
    """The model folder of a run, once its settings are known to act."""
    check_offline(settings.cluster)
    check_optimizer(settings.optim, settings.cluster)
    use_threads(settings.train.threads)
    return inspect_model_folder(settings.model.path)


def augmentation(settings: SFTSettings) -> Augment | None:
    """The change of the images of the rows that are trained on; None where they stay as they are."""
    chosen = settings.train.augment
    return Augment(settings.seed, chosen.jpeg, chosen.resize) if chosen.jpeg or chosen.resize else None


@dataclass(frozen=True, slots=True)
class OfflineRun(Generic[_W]):
    """A run whose folder is held, whose workers are there and whose rows are read."""

    settings: _Settings
    run: RunFolder
    workers: WorkerGroup[_W]
    encoder: Encoder
    table: TaskTable
    test: TaskTable | None
    stream: Stream
    leaving: GracefulShutdown
    accept_changes: bool

    def train(
        self,
        learn: Learn,
        held_out: HeldOutLoss,
        *,
        others: Mapping[str, Stateful] = {},
        augment: Augment | None = None,
        measures_start: bool = True,
    ) -> RunFolder:
        """Every step of the run that is left, and the model that they end with. `others`: what is restored and saved
        beside the weights and the place in the data; `measures_start`: whether a run without a step is evaluated."""
        settings, train, stream = self.settings, self.settings.train, self.stream
        metrics = MetricsWriter(self.run.metrics, Trackers(settings, self.run.path).log)
        tables = {"data.train": self.table, "data.test": self.test}
        inputs = Inputs.of(settings, tables, accept_changes=self.accept_changes)
        step = resume(self.run, self.workers, stream, metrics, inputs, others)
        if step == 0 and measures_start and held_out.is_due(step):
            metrics.write(step, held_out.measure(step))

        reader = Reader(self.table, stream, self.encoder, settings.data.image_workers, augment)
        with reader, progress("training", train.steps, done=step) as advance:
            self.leaving.begin()
            while step < train.steps:
                step += 1
                clock, rate = Clock(), learning_rate(step, train.steps, settings.optim)
                learned, tokens = learn(step, rate, reader, clock)
                record = {**learned, "optim/lr": rate, **stream.metrics()}
                if held_out.is_due(step):
                    with clock.phase("evaluate"):
                        record |= held_out.measure(step)
                record |= clock.metrics(**tokens)
                metrics.write(step, record)
                if save_is_due(step, train, self.leaving):
                    state = {name: thing.state() for name, thing in {"stream": stream, **others}.items()}
                    save(self.workers, self.run, step, state, train, inputs)
                advance(1, record)
                self.leaving.check()
        broadcast(self.workers, Worker.export, self.run.final)
        return self.run


@contextmanager
def offline_run(
    settings: _Settings,
    encoder: Encoder,
    kind: Callable[..., _W],
    check: Check,
    fields: tuple[str, ...],
    rows_per_step: int,
    *,
    accept_changes: bool,
    again: bool,
) -> Iterator[OfflineRun[_W]]:
    """The folder, the workers, each made by `kind` as a `Worker` is, and the rows of a run. `check` finds what is wrong
    with a row, whose answers stand in `fields`. accept_changes, again: as in `run_sft` and `retry_on_lost_rank`."""
    build = partial(
        kind,
        settings.model,
        settings.optim,
        settings.train.tokens_per_micro_batch,
        cluster=settings.cluster,
        seed=settings.seed,
        threads=settings.train.threads,
        disk_wait=settings.disk_wait,
    )
    with (
        open_run(settings.run, settings, accept_changes=accept_changes, disk_wait=settings.disk_wait) as run,
        start_workers(settings.cluster, build, again=again) as workers,
        GracefulShutdown(workers) as leaving,
    ):
        table, test, left_out = read_data(settings, encoder, check, answer_limits(settings, fields))
        write_skipped(run.path, [str(problem) for problem in left_out])
        stream = build_stream(table, settings.data, settings.seed, rows_per_step)
        yield OfflineRun(settings, run, workers, encoder, table, test, stream, leaving, accept_changes)
