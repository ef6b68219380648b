"""Visual consistency learning (ViCO; InternVL3.5, arXiv 2508.18265): the same answers from fewer image tokens.

For an answer y to a prompt with images I, the policy sees I with some tiles at 64 tokens in place of 256, and the
frozen start sees it whole: L = E [1/N sum_i KL(start(y_i | y_<i, I) || policy(y_i | y_<i, I compressed))].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from foveate.algorithms.metrics import Metrics
from foveate.algorithms.supervised import sft_total
from foveate.cluster.base import WorkerGroup, broadcast, scatter, scatter_gather, start_workers
from foveate.config.runs import VicoSettings
from foveate.data.demos import RESPONSE, check_response, demo_of
from foveate.data.table import TaskTable
from foveate.encoding.dataset import build_encoder, build_stream, read_data
from foveate.encoding.encode import Encoder
from foveate.encoding.family import Family
from foveate.encoding.reader import Reader
from foveate.encoding.routes import routed
from foveate.errors import ConfigError
from foveate.evaluate.predictions import write_skipped
from foveate.log import MetricsWriter, progress
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.parallel.balance import Costs
from foveate.records import PackedGroup, Prompt, Task
from foveate.rollout.seeds import seed_of
from foveate.run_folder import RunFolder, open_run
from foveate.train.clock import Clock
from foveate.train.consistency import ConsistencyRow, ConsistencyWorker
from foveate.train.held_out import HeldOutLoss
from foveate.train.inputs import Inputs
from foveate.train.optim import check_optimizer, learning_rate
from foveate.train.session import (
    GracefulShutdown,
    answer_limits,
    check_offline,
    resume,
    retry_on_lost_rank,
    save,
    save_is_due,
)
from foveate.train.sft import augmentation
from foveate.train.trackers import Trackers
from foveate.train.worker import use_threads


def run_vico(settings: VicoSettings, *, accept_changes: bool = False) -> RunFolder:
    """A whole run, or the rest of one that was interrupted. Returns its folder, with `final/` and metrics in it.
    `accept_changes`: also with other data, code, model folder or settings than before (`foveate.train.inputs`)."""
    return retry_on_lost_rank(settings.cluster.retries, partial(_run, settings, accept_changes))


def _run(settings: VicoSettings, accept_changes: bool, again: bool) -> RunFolder:
    check_offline(settings.cluster)
    check_optimizer(settings.optim, settings.cluster)
    use_threads(settings.train.threads)
    model = inspect_model_folder(settings.model.path)
    require_flash(settings.model.path, model.family)
    costs = Costs.of(model.config)
    encoder = build_encoder(model.tokenizer, model.family, settings.model, settings.data)
    budget = settings.train.tokens_per_micro_batch
    more = {"cluster": settings.cluster, "seed": settings.seed, "threads": settings.train.threads, "reference": True}
    build = partial(ConsistencyWorker, settings.model, settings.optim, budget, **more, disk_wait=settings.disk_wait)
    with (
        open_run(settings.run, settings, accept_changes=accept_changes, disk_wait=settings.disk_wait) as run,
        start_workers(settings.cluster, build, again=again) as workers,
        GracefulShutdown(workers) as leaving,
    ):
        table, test, left_out = read_data(settings, encoder, check_response, answer_limits(settings, (RESPONSE,)))
        write_skipped(run.path, [str(problem) for problem in left_out])
        stream = build_stream(table, settings.data, settings.seed, settings.train.samples_per_step)
        metrics = MetricsWriter(run.metrics, Trackers(settings, run.path).log)
        inputs = Inputs.of(settings, {"data.train": table, "data.test": test}, accept_changes=accept_changes)
        step = resume(run, workers, stream, metrics, inputs)
        held_out = _held_out(settings, test, workers, costs, encoder, model.family)
        if step == 0 and held_out.is_due(step):
            metrics.write(step, held_out.measure(step))

        reader = Reader(table, stream, encoder, settings.data.image_workers, augmentation(settings))
        with reader, progress("training", settings.train.steps, done=step) as advance:
            leaving.begin()
            while step < settings.train.steps:
                step += 1
                clock = Clock()
                with clock.phase("encode"):
                    draw = np.random.default_rng(seed_of("vico", settings.seed, step))
                    asked = [(task, prompt, _route(prompt, settings, draw)) for task, prompt in reader.take()]
                    rows = [consistency_row(encoder, model.family, *one) for one in asked]
                with clock.phase("update"):
                    rate = learning_rate(step, settings.train.steps, settings.optim)
                    weighting, groups = settings.train.weighting, [row.policy for row in rows]
                    rest = weighting, sft_total(groups, weighting), rate
                    train, estimates = ConsistencyWorker.update_consistency, [*map(costs, groups)]
                    learned = next(scatter(workers, train, rows, estimates, *rest))[1]
                record = {**learned, **_shares(rows), "optim/lr": rate, "data/epoch": stream.epoch}
                if held_out.is_due(step):
                    with clock.phase("evaluate"):
                        record |= held_out.measure(step)
                record |= clock.metrics(update=sum(row.policy.tokens + row.reference.tokens for row in rows))
                metrics.write(step, record)
                if save_is_due(step, settings.train, leaving):
                    save(workers, run, step, {"stream": stream.state()}, settings.train, inputs)
                advance(1, record)
                leaving.check()
        broadcast(workers, ConsistencyWorker.export, run.final)
    return run


def require_flash(path: str, family: Family) -> None:
    """Raise ConfigError for a model that compresses no tiles."""
    if family.sides is None:
        raise ConfigError(
            f"model.path {path}: {family.name} cannot compress tiles; foveate flash FOLDER OUT makes a Flash model of "
            "an InternVL"
        )


def _held_out(
    settings: VicoSettings,
    test: TaskTable | None,
    workers: WorkerGroup[ConsistencyWorker],
    costs: Costs,
    encoder: Encoder,
    family: Family,
) -> HeldOutLoss:
    """`eval/kl`: the divergence per token on the held-out rows, with every tile compressed, which is the most that a
    router can lose."""

    def metrics_of(tasks: Sequence[Task]) -> Metrics:
        prompts = [encoder(task) for task in tasks]
        asked = [
            (task, one, [[True] * slot.tiles for slot in one.slots]) for task, one in zip(tasks, prompts, strict=True)
        ]
        rows = [consistency_row(encoder, family, *one) for one in asked]
        found = scatter_gather(workers, ConsistencyWorker.divergences, rows, [costs(row.policy) for row in rows])
        return {"eval/kl": (sum(kl_M.double().sum().item() for kl_M in found), float(sum(map(len, found))))}

    return HeldOutLoss(settings.eval, test, settings.train.steps, settings.train.samples_per_step, metrics_of)


def _route(prompt: Prompt, settings: VicoSettings, draw: np.random.Generator) -> list[list[bool]]:
    """Which tiles of each image the policy sees compressed. By tiles, at a share that is uniform between none and all,
    so that each tile is compressed half of the time, and all of them together often enough; or all, or none."""
    share = draw.uniform() if settings.train.compressed == "tiles" else float(draw.uniform() < 0.5)
    return [(draw.uniform(size=slot.tiles) < share).tolist() for slot in prompt.slots]


def consistency_row(
    encoder: Encoder, family: Family, task: Task, prompt: Prompt, routes: Sequence[Sequence[bool]]
) -> ConsistencyRow:
    answer = (encoder.answer_ids(demo_of(task).response),)
    """A row whose policy sees the tiles of its images compressed by `routes`, and whose reference sees them whole."""
    assert family.sides is not None
    whole = [[False] * slot.tiles for slot in prompt.slots]
    seen, full = (routed(prompt, one, family.sides) for one in (routes, whole))
    return ConsistencyRow(PackedGroup.of_tokens(seen, answer), PackedGroup.of_tokens(full, answer))


def _shares(rows: Sequence[ConsistencyRow]) -> dict[str, float]:
    """The share of the image tokens that the policy has seen."""
    seen, whole = (sum(slot.count for one in part for slot in one.prompt.slots) for part in (
        [row.policy for row in rows], [row.reference for row in rows],
    ))  # fmt: skip
    return {"vico/image_tokens": seen / whole} if whole else {}
