"""Supervised fine-tuning: imitate demonstrated answers, image and text packed, the loss on answers only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from foveate.algorithms.metrics import Metrics
from foveate.algorithms.supervised import sft_loss, sft_total
from foveate.cluster.base import WorkerGroup, scatter, scatter_gather
from foveate.config.runs import SFTSettings
from foveate.data.demos import RESPONSE, check_response, demo_of
from foveate.data.table import TaskTable
from foveate.encoding.dataset import build_encoder
from foveate.encoding.encode import Encoder
from foveate.encoding.reader import Reader
from foveate.encoding.turns import Turns, encode_trace
from foveate.parallel.balance import Costs
from foveate.records import Demo, PackedGroup, Prompt, Task
from foveate.rollout.conversations import tools_of_environment
from foveate.run_folder import RunFolder
from foveate.train.clock import Clock
from foveate.train.held_out import HeldOutLoss
from foveate.train.offline import Learned, augmentation, begin_offline, offline_run
from foveate.train.session import retry_on_lost_rank
from foveate.train.worker import Worker


def run_sft(settings: SFTSettings, *, accept_changes: bool = False) -> RunFolder:
    """A whole run, or the rest of one that was interrupted. Returns its folder, with `final/` and metrics in it.
    `accept_changes`: also with other data, code, model folder or settings than before (`foveate.train.inputs`)."""
    return retry_on_lost_rank(settings.cluster.retries, partial(_run, settings, accept_changes))


def _run(settings: SFTSettings, accept_changes: bool, again: bool) -> RunFolder:
    model = begin_offline(settings)
    costs, train = Costs.of(model.config), settings.train
    tools = tools_of_environment(settings.environment)
    encoder = build_encoder(model.tokenizer, model.family, settings.model, settings.data, tools)
    of_rows = Worker, check_response, (RESPONSE,), train.samples_per_step
    with offline_run(settings, encoder, *of_rows, accept_changes=accept_changes, again=again) as its:
        group_of = partial(_group, encoder, Turns(encoder) if train.trained_turns == "all" else None)

        def learn(_: int, rate: float, reader: Reader, clock: Clock) -> Learned:
            with clock.phase("encode"):
                groups = [group_of(demo_of(task), prompt) for task, prompt in reader.take()]
            with clock.phase("update"):
                rest = train.weighting, sft_total(groups, train.weighting), rate
                learned = next(scatter(its.workers, Worker.update_sft, groups, [*map(costs, groups)], *rest))[1]
            return learned, {"update": sum(group.tokens for group in groups)}

        held_out = _held_out(settings, its.test, its.workers, costs, encoder)
        return its.train(learn, held_out, augment=augmentation(settings))


def _held_out(
    settings: SFTSettings, test: TaskTable | None, workers: WorkerGroup[Worker], costs: Costs, encoder: Encoder
) -> HeldOutLoss:
    """`eval/loss`: the training loss, with its weighting, on the held-out rows."""

    turns = Turns(encoder) if settings.train.trained_turns == "all" else None

    def metrics_of(tasks: Sequence[Task]) -> Metrics:
        groups = [_group(encoder, turns, demo_of(task), encoder(task)) for task in tasks]
        logps = scatter_gather(workers, Worker.logprobs, groups, [*map(costs, groups)])
        return {"eval/loss": sft_loss(groups, logps, settings.train.weighting)}

    return HeldOutLoss(settings.eval, test, settings.train.steps, settings.train.samples_per_step, metrics_of)


def _group(encoder: Encoder, turns: Turns | None, demo: Demo, prompt: Prompt) -> PackedGroup:
    """A demonstration to imitate in its last turn, or, with `turns`, in all of them."""
    if turns is not None and any(message.role == "assistant" for message in demo.task.messages):
        whole, answer = encode_trace(turns, demo.task, demo.response)
        return PackedGroup(whole, (answer,))
    return PackedGroup.of_tokens(prompt, (encoder.answer_ids(demo.response),))
