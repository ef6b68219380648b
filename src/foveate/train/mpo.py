"""Mixed preference optimisation: learn from pairs of a better and a worse answer, before any online step.

`run_mpo` reads like the algorithm: reference log-probs once, then take pairs, update, move the reward shift, save, log.
The loss is MPO's mixture, or one of its terms alone (`foveate.algorithms.preference_losses`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from foveate.algorithms.aggregate import sum_by_sample
from foveate.algorithms.checks import dry_run_pairs
from foveate.algorithms.metrics import Metrics, to_metrics
from foveate.algorithms.preference_losses import RewardShift
from foveate.algorithms.table import PREFERENCE_LOSSES
from foveate.algorithms.targets import Totals
from foveate.cluster.base import WorkerGroup, scatter, scatter_gather
from foveate.config.algorithm import PreferenceSettings
from foveate.config.runs import MPOSettings
from foveate.data.demos import CHOSEN, REJECTED, check_pair, pair_of
from foveate.data.table import TaskTable
from foveate.encoding.dataset import build_encoder
from foveate.encoding.encode import Encoder
from foveate.encoding.reader import Reader
from foveate.files import sha256
from foveate.models.adapters import ADAPTER_WEIGHTS, adapter_folder
from foveate.parallel.balance import Costs
from foveate.parallel.packing import pack
from foveate.records import PackedGroup, Pair, Prompt, Task
from foveate.registry import bind, resolve
from foveate.run_folder import RunFolder
from foveate.train.clock import Clock
from foveate.train.held_out import HeldOutLoss
from foveate.train.offline import Learned, begin_offline, offline_run
from foveate.train.reference import PreferenceLoss, Reference, TrainPair, pair_targets, reference_key
from foveate.train.session import retry_on_lost_rank
from foveate.train.worker import Worker

WITHOUT_REFERENCE = ("sft",)
TIE = 1e-3
"""Nats by which an answer has to gain more than the other one to be preferred: less is rounding."""


def run_mpo(settings: MPOSettings, *, accept_changes: bool = False) -> RunFolder:
    """A whole run, or the rest of one that was interrupted. Returns its folder, with `final/` and metrics in it.
    `accept_changes`: also with other data, code, model folder or settings than before (`foveate.train.inputs`)."""
    return retry_on_lost_rank(settings.cluster.retries, partial(_run, settings, accept_changes))


def _run(settings: MPOSettings, accept_changes: bool, again: bool) -> RunFolder:
    loss = build_preference_loss(settings.loss)
    model = begin_offline(settings)
    costs = Costs.of(model.config)
    encoder = build_encoder(model.tokenizer, model.family, settings.model, settings.data)
    of_rows = Worker, check_pair, (CHOSEN, REJECTED), settings.train.pairs_per_step
    with offline_run(settings, encoder, *of_rows, accept_changes=accept_changes, again=again) as its:
        logprobs = partial(_logprobs, its.workers, costs)
        reference_of = partial(_reference, its.run, settings, model.folder, encoder, logprobs)
        reference = reference_of(its.table, "train")  # by the start, not yet replaced
        asked = None if its.test is None else its.test.of_each_source(settings.eval.prompts)
        test_reference = None if asked is None else reference_of(asked, "test")
        shift = RewardShift()

        def learn(step: int, rate: float, reader: Reader, clock: Clock) -> Learned:
            with clock.phase("encode"):
                pairs = [_train_pair(*row, encoder, reference) for row in reader.take()]
            with clock.phase("update"):
                rest, estimates = (loss, _totals(pairs), shift.mean, rate), [costs(pair.group) for pair in pairs]
                learned = next(scatter(its.workers, Worker.update_preference, pairs, estimates, *rest))[1]
            record = {**learned, "reward/shift": shift.mean}
            if reference is not None and step == 1:
                record["time/reference"] = reference.seconds
            _move(shift, learned, len(pairs))
            return record, {"update": sum(pair.group.tokens for pair in pairs)}

        held_out = _held_out(settings, asked, its.workers, costs, encoder, test_reference, loss, shift)
        others = {"shift": shift} if reference is None else {"shift": shift, "reference": reference}
        return its.train(learn, held_out, others=others)


def build_preference_loss(settings: PreferenceSettings) -> PreferenceLoss:
    """A loss with its settings filled in. Raises ConfigError or DataError for whatever it refuses, before a run."""
    function = resolve(PREFERENCE_LOSSES, settings.name, "preference loss")
    loss = bind(function, settings.settings, f"preference loss {settings.name}")
    dry_run_pairs(function, settings.settings, reference=settings.name not in WITHOUT_REFERENCE)
    return loss


# --------------------------------------------------------------------------------------------------- the reference


def _logprobs(workers: WorkerGroup[Worker], costs: Costs, groups: Sequence[PackedGroup]) -> list[Tensor]:
    return scatter_gather(workers, Worker.logprobs, groups, [*map(costs, groups)])


def _reference(
    run: RunFolder,
    settings: MPOSettings,
    model: Path,
    encoder: Encoder,
    logprobs: Callable[[Sequence[PackedGroup]], list[Tensor]],
    table: TaskTable,
    part: str,
) -> Reference | None:
    """The log-probs of all pairs under the start, read from disk or computed; None for a loss that needs none. `part`:
    the rows of the table among those of its files (train, test)."""
    if settings.loss.name in WITHOUT_REFERENCE:
        return None
    cache = settings.train.reference_cache
    also = {
        "rows": len(table),
        **({"hold_out": f"{settings.data.hold_out:g} {part}"} if settings.data.hold_out else {}),
        "columns": settings.data.columns,
        "system": settings.data.system,
        "budget": encoder.budget,
        "dtype": settings.model.dtype,
        "attention": settings.model.attention,
    }
    if settings.cluster.dtype is not None:
        also["computed"] = settings.cluster.dtype
    if settings.model.quantization is not None:
        also["quantization"] = settings.model.quantization
    if settings.model.lora is not None and settings.model.lora.adapter is not None:
        weights = adapter_folder(settings.model.lora.adapter) / ADAPTER_WEIGHTS
        also["adapter"] = sha256(weights)
    key = reference_key(model, table.files, also)
    reference = Reference(run.path / "reference" if cache is None else Path(cache), key)
    reference.complete(
        len(table),
        settings.train.pairs_per_step,
        encode=lambda row: _group(encoder, pair_of(table[row]), encoder(table[row])),
        logprobs=logprobs,
    )
    return reference


# ------------------------------------------------------------------------------------------------------- evaluation


def _held_out(
    settings: MPOSettings,
    test: TaskTable | None,
    workers: WorkerGroup[Worker],
    costs: Costs,
    encoder: Encoder,
    reference: Reference | None,
    loss: PreferenceLoss,
    shift: RewardShift,
) -> HeldOutLoss:
    """`eval/loss`: the training loss on the held-out pairs, with the shift as it is then; and with a reference
    `eval/accuracy`: the share of pairs whose chosen answer gained more log-prob over it than the rejected one, where a
    tie, as before the first step, counts half."""
    lengths = [len(encoder.answer_ids(pair_of(task).chosen)) for task in test or ()]
    totals = Totals(tokens=sum(lengths), samples=2 * len(lengths), groups=len(lengths))

    def metrics_of(tasks: Sequence[Task]) -> Metrics:
        pairs = [_train_pair(task, encoder(task), encoder, reference) for task in tasks]
        groups, targets = [pair.group for pair in pairs], pair_targets(pairs, shift.mean)
        logp_M, batch = torch.cat(_logprobs(workers, costs, groups)), pack(groups)
        found = {"eval/loss": (loss(logp_M, batch, targets, totals).loss, len(pairs) / totals.groups)}
        if targets.ref_S is not None:
            gain_S = sum_by_sample(logp_M.double(), batch.sample_M, batch.samples) - targets.ref_S
            margin_P = gain_S[::2] - gain_S[1::2]
            won = (margin_P > TIE).sum() + 0.5 * (margin_P.abs() <= TIE).sum()
            found["eval/accuracy"] = (won, float(len(pairs)))
        return to_metrics(found)

    return HeldOutLoss(settings.eval, test, settings.train.steps, settings.train.pairs_per_step, metrics_of)


# ------------------------------------------------------------------------------------------------------- the pairs


def _train_pair(task: Task, prompt: Prompt, encoder: Encoder, reference: Reference | None) -> TrainPair:
    group = _group(encoder, pair_of(task), prompt)
    return TrainPair(group, None if reference is None else reference(group, task.where))


def _group(encoder: Encoder, pair: Pair, prompt: Prompt) -> PackedGroup:
    """Both answers as children of one prompt, which is computed once, with its images."""
    return PackedGroup.of_tokens(prompt, (encoder.answer_ids(pair.chosen), encoder.answer_ids(pair.rejected)))


def _move(shift: RewardShift, learned: Mapping[str, float], pairs: int) -> None:
    """Count a step into the shift. One that was skipped moves nothing: its rewards may not be finite."""
    if not learned["optim/update_skipped"] and "reward/chosen" in learned:
        shift.add(learned["reward/chosen"], learned["reward/rejected"], pairs)


def _totals(pairs: Sequence[TrainPair]) -> Totals:
    """The denominators of a preference loss: pairs, and the tokens of the chosen answers."""
    chosen_tokens = sum(pair.group.lengths[0] for pair in pairs)
    return Totals(tokens=chosen_tokens, samples=2 * len(pairs), groups=len(pairs))
