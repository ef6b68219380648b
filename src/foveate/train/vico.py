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
from foveate.cluster.base import WorkerGroup, scatter, scatter_gather
from foveate.config.runs import VicoSettings
from foveate.data.demos import RESPONSE, check_response, demo_of
from foveate.data.table import TaskTable
from foveate.encoding.dataset import build_encoder
from foveate.encoding.encode import Encoder
from foveate.encoding.family import Family
from foveate.encoding.reader import Reader
from foveate.encoding.routes import routed
from foveate.errors import ConfigError
from foveate.parallel.balance import Costs
from foveate.records import PackedGroup, Prompt, Task
from foveate.rollout.seeds import seed_of
from foveate.run_folder import RunFolder
from foveate.train.clock import Clock
from foveate.train.consistency import ConsistencyRow, ConsistencyWorker
from foveate.train.held_out import HeldOutLoss
from foveate.train.offline import Learned, augmentation, begin_offline, offline_run
from foveate.train.session import retry_on_lost_rank


def run_vico(settings: VicoSettings, *, accept_changes: bool = False) -> RunFolder:
    """A whole run, or the rest of one that was interrupted. Returns its folder, with `final/` and metrics in it.
    `accept_changes`: also with other data, code, model folder or settings than before (`foveate.train.inputs`)."""
    return retry_on_lost_rank(settings.cluster.retries, partial(_run, settings, accept_changes))


def _run(settings: VicoSettings, accept_changes: bool, again: bool) -> RunFolder:
    model = begin_offline(settings)
    require_flash(settings.model.path, model.family)
    costs, train = Costs.of(model.config), settings.train
    encoder = build_encoder(model.tokenizer, model.family, settings.model, settings.data)
    of_rows = ConsistencyWorker, check_response, (RESPONSE,), train.samples_per_step
    with offline_run(settings, encoder, *of_rows, accept_changes=accept_changes, again=again) as its:
        require_images(its.table)

        def learn(step: int, rate: float, reader: Reader, clock: Clock) -> Learned:
            with clock.phase("encode"):
                draw = np.random.default_rng(seed_of("vico", settings.seed, step))
                asked = [(task, prompt, _route(prompt, settings, draw)) for task, prompt in reader.take()]
                rows = [consistency_row(encoder, model.family, *one) for one in asked]
            with clock.phase("update"):
                groups = [row.policy for row in rows]
                rest = train.weighting, sft_total(groups, train.weighting), rate
                update, estimates = ConsistencyWorker.update_consistency, [*map(costs, groups)]
                learned = next(scatter(its.workers, update, rows, estimates, *rest))[1]
            tokens = sum(row.policy.tokens + row.reference.tokens for row in rows)
            return {**learned, **_shares(rows)}, {"update": tokens}

        held_out = _held_out(settings, its.test, its.workers, costs, encoder, model.family)
        return its.train(learn, held_out, augment=augmentation(settings))


def require_flash(path: str, family: Family) -> None:
    """Raise ConfigError for a model that compresses no tiles."""
    if family.sides is None:
        raise ConfigError(
            f"model.path {path}: {family.name} cannot compress tiles; foveate flash FOLDER OUT makes a Flash model of "
            "an InternVL"
        )


def require_images(table: TaskTable) -> None:
    """Raise ConfigError for rows of which nothing can be compressed: the divergence of the model from itself is
    rounding, which an optimizer would follow at its full rate."""
    if not any(table[index].images or table[index].videos for index in range(len(table))):
        raise ConfigError(f"data.train: no row of {table.names} has an image, so nothing can be compressed; add some")


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
    """A row whose policy sees the tiles of its images compressed by `routes`, and whose reference sees them whole."""
    answer = (encoder.answer_ids(demo_of(task).response),)
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
