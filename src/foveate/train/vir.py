"""Training of a visual resolution router (ViR; InternVL3.5, arXiv 2508.18265): which tiles can do with 64 tokens.

Everything but the router is frozen. For each row, the divergence from the start of visual consistency learning is taken
with all tiles compressed and with none; their ratio says what compression loses. Tiles of rows whose ratio is below a
quantile of the latest ones are taught as compressible, all others as not, by cross-entropy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from foveate.algorithms.metrics import Metrics
from foveate.cluster.base import WorkerGroup, scatter, scatter_gather
from foveate.config.runs import VirSettings
from foveate.data.demos import RESPONSE, check_response
from foveate.data.table import TaskTable
from foveate.encoding.dataset import build_encoder
from foveate.encoding.encode import Encoder
from foveate.encoding.family import Family
from foveate.encoding.reader import Reader
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.flash import route_by
from foveate.models.policy import DTYPES
from foveate.parallel.balance import Costs
from foveate.records import Prompt, Task
from foveate.run_folder import RunFolder
from foveate.train.clock import Clock
from foveate.train.consistency import ConsistencyRow, RouterRow, RouterWorker
from foveate.train.held_out import HeldOutLoss
from foveate.train.offline import Learned, augmentation, begin_offline, offline_run
from foveate.train.session import retry_on_lost_rank
from foveate.train.teacher import require_same_input
from foveate.train.vico import consistency_row, require_flash, require_images

LEAST = 1e-4
"""Nats per token below which a divergence is rounding: ratios do not grow by it."""


class SlidingQuantile:
    """The quantile of the latest ratios, of which it has a `state`."""

    def __init__(self, share: float, window: int) -> None:
        self._share, self._latest = share, deque[float](maxlen=window)

    def add(self, ratios: Sequence[float]) -> float:
        """Take in ratios; the threshold over the latest ones, these included."""
        self._latest.extend(ratios)
        return self.value

    @property
    def value(self) -> float:
        """The threshold; above every ratio while there is none."""
        return float(np.quantile([*self._latest], self._share)) if self._latest else np.inf

    def state(self) -> dict[str, Any]:
        return {"latest": [*self._latest]}

    def restore(self, state: dict[str, Any]) -> None:
        self._latest.clear()
        self._latest.extend(state["latest"])


def run_vir(settings: VirSettings, *, accept_changes: bool = False) -> RunFolder:
    """A whole run, or the rest of one that was interrupted. Returns its folder, with `final/` and metrics in it.
    `accept_changes`: also with other data, code, model folder or settings than before (`foveate.train.inputs`)."""
    return retry_on_lost_rank(settings.cluster.retries, partial(_run, settings, accept_changes))


def _run(settings: VirSettings, accept_changes: bool, again: bool) -> RunFolder:
    model = begin_offline(settings)
    require_flash(settings.model.path, model.family)
    reference = settings.train.reference
    require_same_input("train.reference", reference, inspect_model_folder(reference), model)
    costs, train = Costs.of(model.config), settings.train
    encoder = build_encoder(model.tokenizer, model.family, settings.model, settings.data)
    kind = partial(RouterWorker, start=reference)
    of_rows = kind, check_response, (RESPONSE,), train.samples_per_step
    with offline_run(settings, encoder, *of_rows, accept_changes=accept_changes, again=again) as its:
        require_images(its.table)
        quantile = SlidingQuantile(train.quantile, train.window)
        rows_of = partial(_rows, encoder, model.family, its.workers, costs)

        def learn(_: int, rate: float, reader: Reader, clock: Clock) -> Learned:
            with clock.phase("encode"):
                asked = [one for one in reader.take() if one[1].pixels is not None]
            with clock.phase("label"):
                prompts, ratios = rows_of(asked)
                threshold = quantile.add(ratios)
            with clock.phase("update"):
                learned = _update(its.workers, _labelled(prompts, ratios, threshold), rate)
            return {**learned, **_said(ratios, threshold)}, {}

        held_out = _held_out(settings, its.test, its.workers, rows_of, encoder, quantile)
        others = {"quantile": quantile}  # of which there is no value before the first step
        return its.train(learn, held_out, others=others, augment=augmentation(settings), measures_start=False)


def _rows(
    encoder: Encoder,
    family: Family,
    workers: WorkerGroup[RouterWorker],
    costs: Costs,
    asked: Sequence[tuple[Task, Prompt]],
) -> tuple[list[Prompt], list[float]]:
    """The prompts of rows with images, and for each how many times as far from the reference its answer is with all
    tiles compressed as with none."""
    rows: list[ConsistencyRow] = []
    for task, prompt in asked:
        compressed = consistency_row(encoder, family, task, prompt, [[True] * slot.tiles for slot in prompt.slots])
        rows += [compressed, ConsistencyRow(compressed.reference, compressed.reference)]
    found = scatter_gather(workers, RouterWorker.divergences, rows, [costs(row.policy) for row in rows])
    means = [max(kl_M.double().mean().item(), LEAST) for kl_M in found]
    return [prompt for _, prompt in asked], [
        small / whole for small, whole in zip(means[::2], means[1::2], strict=True)
    ]


def _labelled(prompts: Sequence[Prompt], ratios: Sequence[float], threshold: float) -> list[RouterRow]:
    rows = []
    for prompt, ratio in zip(prompts, ratios, strict=True):
        assert prompt.pixels is not None
        rows.append(RouterRow(prompt.pixels, ratio < threshold))
    return rows


def _update(workers: WorkerGroup[RouterWorker], rows: Sequence[RouterRow], rate: float) -> dict[str, float]:
    """One update; none where no row of the step has an image."""
    tiles = sum(len(row.pixels) for row in rows)
    if not rows:
        return {}
    return next(scatter(workers, RouterWorker.update_router, rows, _sizes(rows), tiles, rate))[1]


def _sizes(rows: Sequence[RouterRow]) -> list[float]:
    """The costs of rows: their tiles."""
    return [float(len(row.pixels)) for row in rows]


def _said(ratios: Sequence[float], threshold: float) -> dict[str, float]:
    """The threshold, and the mean ratio of the step."""
    return {"vir/threshold": threshold, **({"vir/ratio": float(np.mean(ratios))} if ratios else {})}


def _held_out(
    settings: VirSettings,
    test: TaskTable | None,
    workers: WorkerGroup[RouterWorker],
    rows_of: Any,
    encoder: Encoder,
    quantile: SlidingQuantile,
) -> HeldOutLoss:
    """On held-out rows, by the threshold of the moment: `eval/loss`, the cross-entropy of a tile, and `eval/accuracy`,
    how often the router says the more probable of both rightly. And the share of the image tokens that it leaves, of
    all rows and of those of each data source."""
    sides, thresholds = encoder.family.sides, encoder.family.router_thresholds
    assert sides is not None
    assert thresholds is not None

    def metrics_of(tasks: Sequence[Task]) -> Metrics:
        asked = [(task, prompt) for task in tasks if (prompt := encoder(task)).pixels is not None]
        prompts, ratios = rows_of(asked)
        rows = _labelled(prompts, ratios, quantile.value)
        found = scatter_gather(workers, RouterWorker.routed_right, rows, _sizes(rows))
        tiles = float(sum(len(said) for _, _, said in found))
        seen: dict[str, tuple[float, float]] = {}
        for (task, _), (_, _, said) in zip(asked, found, strict=True):
            route = route_by(said.to(DTYPES[settings.model.dtype]), thresholds)
            kept = sum(sides[is_compressed] ** 2 for is_compressed in route)
            for name in ("eval/image_tokens", f"source/{task.source}/image_tokens"):
                tokens, weight = seen.get(name, (0.0, 0.0))
                seen[name] = tokens + kept, weight + len(said) * sides[0] ** 2
        return {
            "eval/loss": (sum(loss for loss, _, _ in found), tiles),
            "eval/accuracy": (sum(right for _, right, _ in found), tiles),
            **seen,
        }

    return HeldOutLoss(settings.eval, test, settings.train.steps, settings.train.samples_per_step, metrics_of)
