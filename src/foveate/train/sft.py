"""Supervised fine-tuning: imitate demonstrated answers, image and text packed, the loss on answers only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from foveate.algorithms.metrics import Metrics
from foveate.algorithms.supervised import sft_loss, sft_total
from foveate.cluster.base import WorkerGroup, broadcast, scatter, scatter_gather, start_workers
from foveate.config.runs import SFTSettings
from foveate.data.augment import Augment
from foveate.data.demos import RESPONSE, check_response, demo_of
from foveate.data.table import TaskTable
from foveate.encoding.dataset import build_encoder, build_stream, read_data
from foveate.encoding.encode import Encoder
from foveate.encoding.reader import Reader
from foveate.encoding.turns import Turns, encode_trace
from foveate.evaluate.predictions import write_skipped
from foveate.log import MetricsWriter, progress
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.parallel.balance import Costs
from foveate.records import Demo, PackedGroup, Prompt, Task
from foveate.rollout.conversations import tools_of_environment
from foveate.run_folder import RunFolder, open_run
from foveate.train.clock import Clock
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
from foveate.train.trackers import Trackers
from foveate.train.worker import Worker, use_threads


def run_sft(settings: SFTSettings, *, accept_changes: bool = False) -> RunFolder:
    """A whole run, or the rest of one that was interrupted. Returns its folder, with `final/` and metrics in it.
    `accept_changes`: also with other data, code, model folder or settings than before (`foveate.train.inputs`)."""
    return retry_on_lost_rank(settings.cluster.retries, partial(_run, settings, accept_changes))


def _run(settings: SFTSettings, accept_changes: bool, again: bool) -> RunFolder:
    check_offline(settings.cluster)
    check_optimizer(settings.optim, settings.cluster)
    use_threads(settings.train.threads)
    model = inspect_model_folder(settings.model.path)
    costs = Costs.of(model.config)
    tools = tools_of_environment(settings.environment)
    encoder = build_encoder(model.tokenizer, model.family, settings.model, settings.data, tools)
    budget = settings.train.tokens_per_micro_batch
    more = {"cluster": settings.cluster, "seed": settings.seed, "threads": settings.train.threads}
    build = partial(Worker, settings.model, settings.optim, budget, **more, disk_wait=settings.disk_wait)
    with (
        open_run(settings.run, settings, accept_changes=accept_changes, disk_wait=settings.disk_wait) as run,
        start_workers(settings.cluster, build, again=again) as workers,
        GracefulShutdown(workers) as leaving,
    ):
        limits = answer_limits(settings, (RESPONSE,))
        table, test, left_out = read_data(settings, encoder, check_response, limits)
        write_skipped(run.path, [str(problem) for problem in left_out])
        stream = build_stream(table, settings.data, settings.seed, settings.train.samples_per_step)
        metrics = MetricsWriter(run.metrics, Trackers(settings, run.path).log)
        inputs = Inputs.of(settings, {"data.train": table, "data.test": test}, accept_changes=accept_changes)
        step = resume(run, workers, stream, metrics, inputs)
        held_out = _held_out(settings, test, workers, costs, encoder)
        if step == 0 and held_out.is_due(step):
            metrics.write(step, held_out.measure(step))

        group_of = partial(_group, encoder, Turns(encoder) if settings.train.trained_turns == "all" else None)
        reader = Reader(table, stream, encoder, settings.data.image_workers, augmentation(settings))
        with reader, progress("training", settings.train.steps, done=step) as advance:
            leaving.begin()
            while step < settings.train.steps:
                step += 1
                clock = Clock()
                with clock.phase("encode"):
                    groups = [group_of(demo_of(task), prompt) for task, prompt in reader.take()]
                with clock.phase("update"):
                    rate = learning_rate(step, settings.train.steps, settings.optim)
                    weighting = settings.train.weighting
                    rest = weighting, sft_total(groups, weighting), rate
                    learned = next(scatter(workers, Worker.update_sft, groups, [*map(costs, groups)], *rest))[1]
                record = {**learned, "optim/lr": rate, **stream.metrics()}
                if held_out.is_due(step):
                    with clock.phase("evaluate"):
                        record |= held_out.measure(step)
                record |= clock.metrics(update=sum(group.tokens for group in groups))
                metrics.write(step, record)
                if save_is_due(step, settings.train, leaving):
                    save(workers, run, step, {"stream": stream.state()}, settings.train, inputs)
                advance(1, record)
                leaving.check()
        broadcast(workers, Worker.export, run.final)
    return run


def augmentation(settings: SFTSettings) -> Augment | None:
    """The change of the images of the rows that are trained on; None where they stay as they are."""
    chosen = settings.train.augment
    return Augment(settings.seed, chosen.jpeg, chosen.resize) if chosen.jpeg or chosen.resize else None


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
