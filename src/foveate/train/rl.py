"""Online reinforcement learning: sample a group of answers per prompt, score them, learn from the differences.

`run_rl` reads like the algorithm: take tasks, generate, score, advantages, update, publish, evaluate, log, save.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from foveate.cluster.base import WorkerGroup, broadcast, ray_backend, scatter_gather, start_workers, startup_timeout
from foveate.cluster.colocated_engines import ColocatedEngines
from foveate.cluster.remote_engines import RemoteEngines
from foveate.config.algorithm import RewardSettings
from foveate.config.rollout import RolloutSettings
from foveate.config.runs import RLSettings
from foveate.data.stream import Stream
from foveate.data.table import TaskTable
from foveate.data.validate import Check
from foveate.encoding.dataset import build_encoder, build_stream, read_data
from foveate.encoding.encode import Encoder
from foveate.encoding.reader import Reader
from foveate.evaluate.predict import Evaluator
from foveate.evaluate.predictions import write_skipped
from foveate.log import Metric, MetricsWriter, progress
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.lora import with_adapters
from foveate.models.matmul import use_threads
from foveate.models.policy import DTYPES, load_policy
from foveate.parallel.balance import Costs
from foveate.records import Group, SamplingParams
from foveate.rewards.build import truth_check
from foveate.rewards.pool import Graders
from foveate.rollout.build import choose_engine, keeps_adapters, place_of_policy
from foveate.rollout.conversations import Conversations, open_conversations
from foveate.rollout.engine import Engine
from foveate.rollout.seeds import seed_of
from foveate.run_folder import RunFolder, open_run
from foveate.train.algorithm import ResolvedAlgorithm, build_algorithm, check_run
from foveate.train.async_rollouts import AsyncRollouts
from foveate.train.clock import Clock
from foveate.train.inputs import Inputs
from foveate.train.optim import check_optimizer, learning_rate
from foveate.train.rollout_records import rollout_metrics, write_rollouts
from foveate.train.rollouts import SyncRollouts
from foveate.train.session import (
    GracefulShutdown,
    check_cluster,
    resume,
    retry_on_lost_rank,
    save,
    save_is_due,
)
from foveate.train.teacher import check_sources
from foveate.train.trackers import Trackers
from foveate.train.update import compute_advantages, update
from foveate.train.waste import WasteWatch
from foveate.train.worker import Worker


def run_rl(settings: RLSettings, *, accept_changes: bool = False) -> RunFolder:
    """A whole run, or the rest of one that was interrupted. Returns its folder, with `final/` and metrics in it.
    `accept_changes`: also with other data, code, model folder or settings than before (`foveate.train.inputs`)."""
    return retry_on_lost_rank(settings.cluster.retries, partial(_run, settings, accept_changes))


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step of a run: its metrics, and its groups with their answers and scores. Until the next step the
    engine has the weights of this one; `save` writes a checkpoint of it."""

    number: int
    metrics: Mapping[str, Metric]
    groups: Sequence[Group]
    engine: Engine
    encoder: Encoder
    evaluator: Evaluator
    save: Callable[[], None]


def _run(settings: RLSettings, accept_changes: bool, again: bool) -> RunFolder:
    for _ in rl_steps(settings, accept_changes=accept_changes, again=again):
        pass
    return RunFolder(Path(settings.run))


def rl_steps(settings: RLSettings, *, accept_changes: bool = False, again: bool = False) -> Generator[Step]:
    """The steps of a run, or of the rest of one, as they are done. The run ends where nobody asks for the next one; the
    same settings continue it after its last checkpoint."""
    check_optimizer(settings.optim, settings.cluster)
    check_cluster(settings)
    use_threads(settings.train.threads)
    method = build_algorithm(settings.algorithm, settings.rollout.max_tokens, dropout=settings.model.has_dropout)
    check_run(method, settings)
    make_engine = new_engine(settings)
    updates, epochs = settings.train.updates_per_step, settings.train.epochs_per_step
    model = inspect_model_folder(settings.model.path)
    costs = Costs.of(model.config)
    make_encoder = partial(build_encoder, model.tokenizer, model.family, settings.model, settings.data)
    with (
        build_graders(settings.reward) as graders,
        _conversations(settings, make_encoder) as (encoder, conversations),
        open_run(settings.run, settings, accept_changes=accept_changes, disk_wait=settings.disk_wait) as run,
        start_workers(settings.cluster, _worker(settings, method), again=again) as workers,
        _engines(settings, workers, again=again) as engine,
        GracefulShutdown(workers) as leaving,
    ):
        table, held_out = _read_data(run, settings, encoder)
        stream = build_stream(table, settings.data, settings.seed, settings.train.prompts_per_step)
        trackers = Trackers(settings, run.path)
        metrics, waste = MetricsWriter(run.metrics, trackers.log), WasteWatch(run.warnings, settings)
        others = {} if method.reward_kl is None else {"reward_kl": method.reward_kl}
        inputs = Inputs.of(settings, {"data.train": table, "data.test": held_out}, accept_changes=accept_changes)
        step = resume(run, workers, stream, metrics, inputs, others)
        engine.start(make_engine, encoder, settings.rollout, step)
        encoder = routed_by_engine(encoder, engine)
        evaluator = _evaluator(run, settings, held_out, encoder, graders, conversations)
        if step == 0 and evaluator.is_due(step):
            evaluator.evaluate(engine, step)
        asking = _sampler(settings, method, table, stream, encoder, engine, graders, conversations, step)
        with asking as sampler, progress("training", settings.train.steps, done=step) as advance:
            leaving.begin()
            while step < settings.train.steps:
                step += 1
                clock = Clock()
                groups, drawn = sampler.draw(step, settings.train.prompts_per_step, method.resample_rounds, clock)
                if not settings.rollout.staleness:
                    engine.sleep()
                with clock.phase("logprobs"):
                    batch, prepared = compute_advantages(workers, groups, method, updates * epochs, costs)
                with clock.phase("update"):
                    rates, seed = _rates(step, settings), seed_of("choice", settings.seed, step)
                    learned = update(workers, batch, method, updates, rates, costs, epochs=epochs, seed=seed)
                with sampler.at_rest(clock):
                    with clock.phase("publish"):
                        checked = engine.publish(step)
                    record = {**rollout_metrics(drawn), **sampler.metrics(), **prepared, **learned, **checked, **rates}
                    paces = clock.metrics(generate=record["rollout/tokens"], update=record["optim/tokens"])
                    record |= {**paces, **stream.metrics()}
                    write_rollouts(run.rollouts, step, groups, batch.answer_advantages)
                    if evaluator.is_due(step):
                        record |= evaluator.evaluate(engine, step)
                    metrics.write(step, record)
                    trackers.show(step, groups)
                    waste.observe(step, record, groups)
                    state = {name: thing.state() for name, thing in {"stream": stream, **others}.items()}
                    state["score"] = record.get("eval/greedy_score")
                    save_now = partial(save, workers, run, step, state, settings.train, inputs)
                    if save_is_due(step, settings.train, leaving):
                        save_now()
                advance(1, record)
                yield Step(step, record, groups, engine, encoder, evaluator, save_now)
                leaving.check()
        broadcast(workers, Worker.export, run.final)


# ------------------------------------------------------------------------------------------------- around the step


def new_engine(settings: RLSettings) -> Callable[..., Any]:
    """A function that makes an engine. An engine in its own process reads its own policy, which is not trained."""
    rollout, cluster, longest = settings.rollout, settings.cluster, settings.data.max_prompt_tokens
    given: dict[str, Any] = {"record_experts": True} if settings.algorithm.router_replay else {}
    if not cluster.engines:
        dtype = cluster.dtype if cluster.ranks == 1 else None  # several ranks make the model of an engine themselves
        return choose_engine(rollout, longest, asynchronous=rollout.staleness > 0, dtype=dtype, given=given)
    given |= {
        "device": cluster.kind,
        "tensor_parallel": cluster.engine_tensor_parallel,
        "memory_fraction": cluster.engine_memory,
    }
    return choose_engine(rollout, longest, given=given)


def _engines(settings: RLSettings, workers: WorkerGroup[Worker], *, again: bool) -> ColocatedEngines | RemoteEngines:
    """The engines: those of the ranks, or remote ones in processes of their own."""
    cluster, model = settings.cluster, settings.model
    if not cluster.engines:
        return ColocatedEngines(workers)
    dtype = cluster.dtype or model.dtype
    place = place_of_policy(settings.rollout, cluster.kind)
    load = partial(load_policy, model.path, attention=model.attention, dtype=dtype, device=place)
    lora = model.lora if keeps_adapters(settings.rollout) else None
    if lora is not None:
        load = partial(with_adapters, load, model.trainable, lora)
    return RemoteEngines(
        ray_backend(cluster, "engines")(cluster, startup_timeout(cluster, again)),
        workers,
        load,
        lambda packed: scatter_gather(workers, Worker.logprobs, packed, [float(one.tokens) for one in packed]),
        timeout=cluster.timeout,
        asynchronous=settings.rollout.staleness > 0,
        dtype=DTYPES[dtype],
        adapters=lora is not None,
    )


def routed_by_engine(encoder: Encoder, engine: ColocatedEngines | RemoteEngines) -> Encoder:
    """The encoder of a Flash model whose router, which is not trained, sees a prompt once, by the weights that answer
    it: every later pass reads the route in its slots. Itself for other models."""
    return encoder if encoder.family.sides is None else replace(encoder, route=engine.routed)


def _conversations(
    settings: RLSettings, make_encoder: Callable[[Sequence[Mapping[str, Any]]], Encoder]
) -> AbstractContextManager[tuple[Encoder, Conversations | None]]:
    """The encoder of the prompts, and the environments of the answers, where these have several turns."""
    return open_conversations(settings.environment, make_encoder, turn_discount=settings.algorithm.turn_discount)


@contextmanager
def _sampler(
    settings: RLSettings,
    method: ResolvedAlgorithm,
    table: TaskTable,
    stream: Stream,
    encoder: Encoder,
    engine: Engine,
    graders: Graders,
    conversations: Conversations | None,
    step: int,
) -> Iterator[SyncRollouts | AsyncRollouts]:
    """The source of each step's groups: sampled in turn with training, or, with a staleness, while it trains."""
    staleness, train = settings.rollout.staleness, settings.train
    source = copy.copy(stream) if staleness else stream  # what generates ahead also reads ahead
    with Reader(table, source, encoder, settings.data.image_workers) as reader:
        sampling, limit = _sampling(settings.rollout), settings.rollout.time_limit
        sampler = SyncRollouts(
            reader, engine, graders, sampling, settings.seed, method.needs_baseline, limit, conversations
        )
        if not staleness:
            yield sampler
            return
        place = {"count": train.prompts_per_step, "step": step, "last": train.steps}
        how = settings.rollout.model_dump(include={"staleness", "partial", "over_sample"})
        with closing(AsyncRollouts(sampler, stream, **place, **how)) as ahead:
            yield ahead


def _sampling(rollout: RolloutSettings) -> SamplingParams:
    return SamplingParams(rollout.samples, rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)


def _worker(settings: RLSettings, method: ResolvedAlgorithm) -> partial[Worker]:
    return partial(
        Worker,
        settings.model,
        settings.optim,
        settings.train.tokens_per_micro_batch,
        temperature=settings.rollout.temperature,
        reference=method.needs_reference,
        critic=method.critic,
        teacher=method.teacher,
        cluster=settings.cluster,
        seed=settings.seed,
        threads=settings.train.threads,
        disk_wait=settings.disk_wait,
        router_replay=settings.algorithm.router_replay,
    )


def _rates(step: int, settings: RLSettings) -> dict[str, float]:
    """The learning rates of a step: `optim/lr` of the policy, 0 while the critic warms up, and `critic/lr` where there
    is one."""
    rate, critic = learning_rate(step, settings.train.steps, settings.optim), settings.algorithm.critic
    if critic is None:
        return {"optim/lr": rate}
    return {"optim/lr": rate * (step > critic.warmup_steps), "critic/lr": rate / settings.optim.lr * critic.lr}


def build_graders(reward: RewardSettings) -> Graders:
    """The graders of a run with its limits."""
    return Graders(
        reward.name,
        reward.settings,
        workers=reward.workers,
        time_limit=reward.time_limit,
        memory_limit=reward.memory_limit,
    )


def check_of_truth(settings: RLSettings) -> Check | None:
    """The check of the ground truth of rows; None where nothing of the reward function counts."""
    if settings.environment is not None and settings.environment.reward == "environment":
        return None
    return truth_check(settings.reward.name, settings.reward.settings)


def _read_data(run: RunFolder, settings: RLSettings, encoder: Encoder) -> tuple[TaskTable, TaskTable | None]:
    """The tasks to learn from and those held out, every row checked; what is left out is listed in the folder."""
    truth = check_of_truth(settings)
    table, held_out, left_out = read_data(settings, encoder, truth)
    write_skipped(run.path, [str(problem) for problem in left_out])
    if settings.algorithm.teacher is not None and settings.algorithm.teacher.sources:
        check_sources(settings.algorithm.teacher, table.values("data_source"))
    return table, held_out


def _evaluator(
    run: RunFolder,
    settings: RLSettings,
    held_out: TaskTable | None,
    encoder: Encoder,
    graders: Graders,
    conversations: Conversations | None,
) -> Evaluator:
    return Evaluator(
        run.path,
        settings.eval,
        held_out,
        encoder,
        graders,
        seed=settings.seed,
        max_tokens=settings.rollout.max_tokens,
        last_step=settings.train.steps,
        conversations=conversations,
    )
