"""Cascade RL (InternVL3.5, arXiv 2508.18265, section 3): offline preference optimisation, then online RL, in one run.

`run_cascade` reads like the paper's figure: (cold start) -> answers of the model -> pairs -> MPO -> online RL. Each
stage is an ordinary run in a folder of its own, with the model of the one before; what is finished is not repeated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from foveate.cluster.base import start_workers
from foveate.cluster.colocated_engines import ColocatedEngines
from foveate.cluster.rank_engine import InferenceWorker
from foveate.config.runs import CascadeSettings, RLSettings
from foveate.data.answers import CorrectnessRule, ScoredRow, read_answers
from foveate.data.stream import Stream
from foveate.data.table import TaskTable
from foveate.datasets.pairs import prepare_pairs
from foveate.datasets.prepared import MANIFEST
from foveate.encoding.dataset import build_encoder, keep_aside, read_checked, read_options
from foveate.encoding.encode import Encoder
from foveate.encoding.reader import Reader
from foveate.errors import ConfigError
from foveate.evaluate.predict import Evaluator
from foveate.evaluate.predictions import predictions_path, write_evaluation
from foveate.files import atomic_write_text
from foveate.log import MetricsWriter, progress, read_metrics
from foveate.models.checkpoint.flash_folder import write_flash
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.matmul import use_threads
from foveate.records import SamplingParams
from foveate.report.stages import Stage, write_stages
from foveate.rewards.build import build_reward, truth_check
from foveate.rollout.build import choose_engine
from foveate.rollout.seeds import seed_of
from foveate.run_folder import RunFolder, open_run
from foveate.train.algorithm import build_algorithm, check_run
from foveate.train.clock import Clock
from foveate.train.mpo import build_preference_loss, run_mpo
from foveate.train.optim import check_optimizer
from foveate.train.rl import build_graders, new_engine, routed_by_engine, run_rl
from foveate.train.rollout_records import rollout_metrics, write_rollouts
from foveate.train.rollouts import SyncRollouts
from foveate.train.session import check_cluster, retry_on_lost_rank
from foveate.train.sft import run_sft
from foveate.train.vico import run_vico
from foveate.train.vir import run_vir

CHUNK = 64
"""Prompts whose sampled answers become one file: what an interruption can lose."""


def run_cascade(settings: CascadeSettings, *, accept_changes: bool = False) -> RunFolder:
    """All stages, or the rest of them. Returns the folder, with the evaluations and metrics of all stages in a row.
    `accept_changes`: as of `run_rl`, for what a stage reads; settings stay as they are."""
    check_cascade(settings)
    use_threads(settings.rl.train.threads)
    wait = settings.stage("rl", "model").disk_wait
    with open_run(settings.run, settings, frozen=True, disk_wait=wait) as run:
        model = settings.model.path
        if not (run.path / "pairs" / MANIFEST).exists():
            _asked_rows(settings, _encoder(settings, model))  # else the first stage would find what is wrong with them
        evaluate(settings, model, run.path / "start", step=0)
        if settings.sft is not None:
            model = _trained(run_sft, accept_changes, settings.stage("sft", model))
            evaluate(settings, model, run.path / "sft", step=settings.sft.train.steps)
            gather(settings, run)
        pairs = make_pairs(settings, model, run)
        model = _trained(run_mpo, accept_changes, settings.stage("mpo", model, (str(pairs),)))
        gather(settings, run)
        # The last stage evaluates the model that MPO made before its first step.
        model = _trained(run_rl, accept_changes, settings.stage("rl", model))
        gather(settings, run)
        if settings.vico is not None and settings.vir is not None:
            start = _flash_model(model, run.path / "flash", settings.seed)
            model = _trained(run_vico, accept_changes, settings.stage("vico", start))
            gather(settings, run)
            model = _trained(run_vir, accept_changes, settings.stage("vir", model, reference=start))
            evaluate(settings, model, run.path / "vir", step=settings.vir.train.steps)
            gather(settings, run)
    return run


def _flash_model(model: str, folder: Path, seed: int) -> str:
    """The folder of a model as one of Flash, which it may be already."""
    if inspect_model_folder(model).family.sides is not None:
        return model
    if not folder.exists():
        write_flash(model, folder, seed=seed)
    return str(folder)


def check_cascade(settings: CascadeSettings) -> None:
    """Refuse what a later stage would refuse, before the first one starts."""
    rl = settings.stage("rl", settings.model.path)
    assert isinstance(rl, RLSettings)
    check_cluster(rl)
    check_optimizer(rl.optim, rl.cluster)
    check_optimizer(settings.mpo.optim, rl.cluster)
    check_run(build_algorithm(rl.algorithm, rl.rollout.max_tokens), rl)
    build_preference_loss(settings.mpo.loss)
    build_reward(settings.reward.name, settings.reward.settings)
    new_engine(rl)
    family = inspect_model_folder(settings.model.path).family
    if settings.vico is not None and family.github_type is None:
        raise ConfigError(f"vico: {family.name} at {settings.model.path} cannot compress tiles; leave vico and vir out")


def _trained(page: Callable[..., RunFolder], accept_changes: bool, stage: Any) -> str:
    """The folder of the model that a stage makes; a stage that has made it is not entered again."""
    final = RunFolder(Path(stage.run)).final
    if not final.exists():
        page(stage, accept_changes=accept_changes)
    return str(final)


# ------------------------------------------------------------------------------------------- evaluation and answers


def evaluate(settings: CascadeSettings, model: str, folder: Path, step: int) -> None:
    """Ask a model the held-out rows, with the same luck for every stage; nothing is done that is there already."""
    if not predictions_path(folder, step).with_suffix(".summary.json").exists():
        retry_on_lost_rank(settings.cluster.retries, partial(_evaluate, settings, model, folder, step))


def _evaluate(settings: CascadeSettings, model: str, folder: Path, step: int, again: bool) -> None:
    encoder = _encoder(settings, model)
    truth = truth_check(settings.reward.name, settings.reward.settings)
    every, _ = read_checked(settings.data.test or settings.data.train, settings.data, encoder, truth)
    held_out = keep_aside(every, settings.data.hold_out)[1] or every
    tokens = settings.rollout.max_tokens
    with _engine(settings, model, encoder, step, again) as engine, build_graders(settings.reward) as graders:
        routed = routed_by_engine(encoder, engine)
        evaluator = Evaluator(
            folder, settings.eval, held_out, routed, graders, seed=settings.seed, max_tokens=tokens, last_step=step
        )
        evaluator.evaluate(engine, step)


def make_pairs(settings: CascadeSettings, model: str, run: RunFolder) -> Path:
    """`pairs/pairs.parquet`: right against wrong answers of the model to some of the training prompts."""
    folder, chosen, data = run.path / "pairs", settings.pairs, settings.data
    if not (folder / MANIFEST).exists():
        retry_on_lost_rank(settings.cluster.retries, partial(answer_prompts, settings, model, run))
        prepare_pairs(
            [Path(path) for path in data.train],
            folder,
            rollouts=[run.rollouts],
            max_per_prompt=chosen.max_per_prompt,
            correctness_rule=CorrectnessRule(chosen.part, chosen.threshold),
            seed=settings.seed,
            reading=read_options(data),
        )
    return folder / "pairs.parquet"


def answer_prompts(settings: CascadeSettings, model: str, run: RunFolder, again: bool = False) -> None:
    """`rollouts/step_*.jsonl`: answers with their scores to `pairs.prompts` training prompts, a file per 64 of them."""
    encoder = _encoder(settings, model)
    table = _asked_rows(settings, encoder)
    chosen, seed = settings.pairs, seed_of("pairs", settings.seed)
    rollout = settings.rollout
    sampling = SamplingParams(chosen.samples, rollout.max_tokens, chosen.temperature, rollout.top_p, rollout.top_k)
    stream = Stream(len(table), seed, CHUNK)
    prompts = min(chosen.prompts, len(table))
    metrics = MetricsWriter(run.rollouts / "metrics.jsonl")
    done = len(read_metrics(metrics.path)) if metrics.path.exists() else 0
    metrics.truncate_after(done)
    with (
        _engine(settings, model, encoder, 0, again) as engine,
        build_graders(settings.reward) as graders,
        progress("answering for pairs", prompts) as advance,
    ):
        reader = Reader(table, stream, routed_by_engine(encoder, engine))
        sampler = SyncRollouts(reader, engine, graders, sampling, seed, False, rollout.time_limit)
        for step, first in enumerate(range(0, prompts, CHUNK), start=1):
            count = min(CHUNK, prompts - first)
            if step <= done:
                stream.draw(count)
            else:
                clock = Clock()
                groups, _ = sampler.draw(step, count, 0, clock)
                write_rollouts(run.rollouts, step, groups)
                metrics.write(step, {**rollout_metrics(groups), **clock.metrics()})
            engine.publish(step)  # the same weights under the next number, which the sampler expects
            advance(count)


def _asked_rows(settings: CascadeSettings, encoder: Encoder) -> TaskTable:
    """The rows of which pairs are made, every one checked."""
    check = truth_check(settings.reward.name, settings.reward.settings)
    every, _ = read_checked(settings.data.train, settings.data, encoder, check)
    return keep_aside(every, settings.data.hold_out)[0]


def _encoder(settings: CascadeSettings, model: str) -> Encoder:
    found = inspect_model_folder(model)
    return build_encoder(found.tokenizer, found.family, settings.model, settings.data)


@contextmanager
def _engine(
    settings: CascadeSettings, model: str, encoder: Encoder, version: int, again: bool
) -> Iterator[ColocatedEngines]:
    """The engines of all ranks, with the weights of a model folder."""
    build = partial(InferenceWorker, settings.model.model_copy(update={"path": model}), settings.cluster.kind)
    new_engine = choose_engine(settings.rollout, settings.data.max_prompt_tokens)
    rollout = settings.rollout.model_copy(update={"staleness": 0})
    with start_workers(settings.cluster, build, again=again) as workers, ColocatedEngines(workers) as engine:
        engine.start(new_engine, encoder, rollout, version)
        yield engine


# ------------------------------------------------------------------------------------------------- all stages in a row


def gather(settings: CascadeSettings, run: RunFolder) -> None:
    """Put the metrics and evaluations of the stages so far into the folder above them, their steps counted on, so that
    a report can be written of it as of any run."""
    named = {"mpo": settings.mpo.loss.name, "rl": settings.rl.algorithm.name}
    labels = {name: named.get(name, name) for name in settings.stages}
    stages = [Stage("start", 0, 0.0)]
    _gather_evaluations(run, "start", 0)
    rows: list[dict[str, Any]] = []
    for name, label in labels.items():
        stage, offset = RunFolder(run.path / name), stages[-1].step
        if not stage.metrics.exists():
            continue
        own = read_metrics(stage.metrics)
        first, *_ = own
        if rows and first["step"] == 0:  # an evaluation of what the stage before has made
            rows[-1] |= {**first, "step": offset}
            own = own[1:]
        rows += [{**row, "step": offset + row["step"]} for row in own]
        seconds = sum(row.get("time/step", 0.0) + row.get("time/reference", 0.0) for row in own)
        if name == "mpo":  # its pairs are part of what it costs
            seconds += sum(row["time/step"] for row in read_metrics(run.rollouts / "metrics.jsonl"))
        _gather_evaluations(run, name, offset)
        stages.append(Stage(label, rows[-1]["step"], seconds))
    atomic_write_text(run.metrics, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_stages(run.path, stages)
    pictures = run.path / "start" / "gallery"
    if pictures.exists():  # else its rows have no images, only text or videos
        shutil.copytree(pictures, run.path / "gallery", dirs_exist_ok=True)
    shutil.copyfile(run.path / "start" / "gallery.json", run.path / "gallery.json")


def _gather_evaluations(run: RunFolder, stage: str, offset: int) -> None:
    for file in (run.path / stage / "evals").glob("step_*.jsonl"):
        write_evaluation(run.path, offset + int(file.stem.removeprefix("step_")), list(read_answers(file, ScoredRow)))
