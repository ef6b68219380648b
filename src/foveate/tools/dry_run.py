"""The beginning of a run without the run: its size, its first example, and one graded answer; nothing is written."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from foveate.config.run_base import RunSettings
from foveate.config.runs import CascadeSettings, MPOSettings, RLSettings, SFTSettings, VicoSettings, VirSettings
from foveate.data.demos import CHOSEN, REJECTED, RESPONSE, check_pair, check_response
from foveate.encoding.dataset import build_encoder, build_stream, read_data
from foveate.encoding.encode import Encoder
from foveate.errors import ConfigError, counted
from foveate.evaluate.predict import answer_all
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.flash_routes import with_router
from foveate.models.matmul import use_threads
from foveate.models.policy import load_policy
from foveate.plan.hardware import GIB
from foveate.plan.memory import memory_of, sizes_of
from foveate.plan.workload import workload_of
from foveate.records import Prompt, SamplingParams, Score, Task
from foveate.rollout.conversations import Conversed, open_conversations, tools_of_environment
from foveate.rollout.credit import FUNCTION_ALONE, scored
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.seeds import seed_of
from foveate.run_folder import RunFolder, check_folder
from foveate.train.algorithm import build_algorithm, check_run
from foveate.train.cascade import check_cascade
from foveate.train.checkpoint import checkpoints
from foveate.train.export import export_checkpoint, model_folder_of, with_model_folders
from foveate.train.mpo import build_preference_loss
from foveate.train.optim import check_optimizer
from foveate.train.rl import build_graders, check_of_truth, new_engine
from foveate.train.session import answer_limits, check_cluster, check_offline
from foveate.train.vico import require_flash

MOST_TOKENS, MOST_CHARACTERS = 120, 4000
"""Token ids and characters that are shown of a text; the middle of longer ones is left out."""


def describe_run(
    settings: SFTSettings | MPOSettings | RLSettings | CascadeSettings, *, accept_changes: bool = False
) -> str:
    """All that a run refuses before its first step is refused here: its folder, settings, rows, the reward's own
    settings. Then the run in words, the memory that `foveate plan` expects where it knows the model, the first prompt
    as tokens and as text, and what is trained of it, or for RL a sampled answer with its score."""
    with _model_folder(settings.model.path) as path:
        _check_folder(settings, accept_changes)
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"path": path})})
        return "\n".join(["dry run: nothing is written", *_stages(settings)])


def _check_folder(settings: SFTSettings | MPOSettings | RLSettings | CascadeSettings, accept_changes: bool) -> None:
    """Raise what the run says about its folder; where it begins from checkpoints, with their model folders."""
    begun = with_model_folders(settings, model_folder_of)
    check_folder(settings.run, begun, frozen=isinstance(settings, CascadeSettings), accept_changes=accept_changes)


@contextmanager
def _model_folder(path: str) -> Iterator[str]:
    """The folder of a model; a checkpoint of a run as one that is gone afterwards."""
    if not (Path(path) / "state.json").is_file():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        export_checkpoint(Path(path), Path(folder) / "model")
        yield f"{folder}/model"


def _stages(settings: SFTSettings | MPOSettings | RLSettings | CascadeSettings) -> Iterator[str]:
    if not isinstance(settings, CascadeSettings):
        yield from _run(settings)
        return
    check_cascade(settings)
    if settings.sft is not None:
        yield from _run(settings.stage("sft", settings.model.path))
    pairs, train = settings.pairs, settings.mpo.train
    yield (
        f"\npairs and mpo: {pairs.samples} answers to {pairs.prompts} prompts make the pairs; {train.steps} steps of "
        f"{train.pairs_per_step} pairs, loss {settings.mpo.loss.name}"
    )
    yield from _run(settings.stage("rl", settings.model.path))
    if settings.vico is not None and settings.vir is not None:
        rows, train = settings.vico.train, settings.vir.train
        yield (
            f"\nvico: {rows.steps} steps of {rows.samples_per_step} demonstrations; vir: {train.steps} steps of "
            f"{train.samples_per_step}"
        )


def _run(settings: SFTSettings | MPOSettings | RLSettings) -> Iterator[str]:
    """The lines about a run of one stage."""
    check_optimizer(settings.optim, settings.cluster)
    use_threads(settings.train.threads)
    stage, per_step, step, check, fields = _step(settings)
    model = inspect_model_folder(settings.model.path)
    if stage in ("vico", "vir"):
        require_flash(settings.model.path, model.family)
    tools = () if isinstance(settings, MPOSettings) else tools_of_environment(settings.environment)
    encoder = build_encoder(model.tokenizer, model.family, settings.model, settings.data, tools)
    limits = None if isinstance(settings, RLSettings) else answer_limits(settings, fields)
    train, test, left_out = read_data(settings, encoder, check, limits)
    [first] = build_stream(train, settings.data, settings.seed, per_step).draw(1)
    task, prompt = encoder.for_graders(train[first]), encoder(train[first])
    sampled = _answered(settings, task, prompt, encoder) if isinstance(settings, RLSettings) else None
    if sampled is not None:
        task, prompt = sampled[0].task, sampled[0].prompt
    evaluation = "none" if test is None else f"{len(test):,} held-out rows, every {settings.eval.every} steps"
    yield f"\n{stage}: {settings.train.steps} steps of {step}"
    yield f"folder: {settings.run}{_resumes(settings)}"
    yield f"rows: {len(train):,}, {settings.train.steps * per_step / len(train):.1f} epochs; evaluation: {evaluation}"
    yield from (f"left out: {problem}" for problem in left_out[:3])
    if not isinstance(settings, VirSettings):  # which trains a few layers alone
        yield f"memory of a device: {_memory(settings, prompt)}"
    yield f"first prompt, {task.where}: {len(prompt)} tokens, {counted(len(task.images), 'image')} among them"
    yield f"  tokens: {_tokens(prompt.token_ids)}"
    yield _text(str(encoder.tokenizer.decode(list(prompt.engine_ids))))
    if isinstance(settings, RLSettings) and sampled is not None:
        yield from _graded_answer(settings, *sampled)
    for name in fields:
        ids = encoder.answer_ids(task.meta[name])
        yield f"{name}, {'trained' if name == RESPONSE else 'compared'}: {len(ids)} tokens"
        yield f"  tokens: {_tokens(ids)}"
        yield _text(str(encoder.tokenizer.decode(list(ids))))


def _step(settings: RunSettings) -> tuple[str, int, str, Any, tuple[str, ...]]:
    """The name of a stage, its rows per step, a step in words, the check of a row, and the answers in it. Raises what
    the stage refuses."""
    if isinstance(settings, RLSettings):
        check_cluster(settings)
        check_run(build_algorithm(settings.algorithm, settings.rollout.max_tokens), settings)
        new_engine(settings)
        train, count = settings.train, settings.train.prompts_per_step
        updates = train.updates_per_step * train.epochs_per_step
        words = (
            f"{count} prompts with {settings.rollout.samples} answers of up to {settings.rollout.max_tokens} tokens, "
            f"{updates} update{'s' if updates > 1 else ''} each, algorithm {settings.algorithm.name}"
        )
        return "rl", count, words, check_of_truth(settings), ()
    check_offline(settings.cluster)
    if isinstance(settings, MPOSettings):
        build_preference_loss(settings.loss)
        count = settings.train.pairs_per_step
        return "mpo", count, f"{count} pairs, loss {settings.loss.name}", check_pair, (CHOSEN, REJECTED)
    assert isinstance(settings, SFTSettings)
    count = settings.train.samples_per_step
    name = "vico" if isinstance(settings, VicoSettings) else "vir" if isinstance(settings, VirSettings) else "sft"
    return name, count, f"{count} demonstrations, by {settings.train.weighting}", check_response, (RESPONSE,)


def _resumes(settings: RunSettings) -> str:
    found = checkpoints(RunFolder(Path(settings.run)).checkpoints)
    return f", which has a run that continues after step {found[-1][0]}" if found else ""


def _memory(settings: SFTSettings | MPOSettings | RLSettings, prompt: Prompt) -> str:
    """The memory that `foveate plan` expects, with the first prompt for the mean one."""
    tiles = 0 if prompt.pixels is None else len(prompt.pixels)
    try:
        work = workload_of(settings, len(prompt), None, tiles)
        memory, sizes = memory_of(work), sizes_of(work.config, work.trainable, work.lora)
    except (ConfigError, AttributeError) as error:  # a family whose shapes the planner does not know
        return f"not planned ({' '.join(str(error).split())})"
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    parts |= {"in all while training": memory.training}
    if isinstance(settings, RLSettings):
        parts |= {"while generating": memory.generating}
    told = ", ".join(f"{name} {value / GIB:.2f} GiB" for name, value in parts.items())
    return f"{told}; {sizes.total:,} parameters, {sizes.trained:,} trained"


def _answered(settings: RLSettings, task: Task, prompt: Prompt, encoder: Encoder) -> tuple[Conversed, Score]:
    """One answer of the start to the first prompt, sampled and graded as in the run, by the native engine; with an
    environment it begins as in the run, too."""
    rollout, cluster, model = settings.rollout, settings.cluster, settings.model
    options = {"attention": model.attention, "dtype": cluster.dtype or model.dtype, "device": cluster.kind}
    policy = load_policy(model.path, **options, quantization=model.quantization)
    encoder = with_router(encoder, policy)
    engine, [prompt] = NativeEngine(policy, encoder.decode), encoder.routed([prompt])
    sampling = SamplingParams(1, rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    discount, requests = settings.algorithm.turn_discount, [Request(prompt, seed_of("train", settings.seed, 1, 0))]
    with (
        build_graders(settings.reward) as graders,
        open_conversations(settings.environment, lambda _: encoder, turn_discount=discount) as (_, talks),
    ):
        [found] = answer_all(engine, [task], requests, sampling, talks)
        credit = FUNCTION_ALONE if talks is None else talks.credit
        [score] = scored(graders, [(found.answers[0], found.task)], found.outcomes or [None], credit)
    return found, score


def _graded_answer(settings: RLSettings, found: Conversed, score: Score) -> Iterator[str]:
    [answer], outcomes = found.answers, found.outcomes
    temperature = settings.rollout.temperature
    yield f"sampled answer at temperature {temperature:g}: {len(answer)} tokens, finish {answer.finish}"
    for turn in outcomes[0].turns if outcomes else ():
        images = f", {counted(len(turn.images), 'image')}" if turn.images else ""
        yield f"{turn.role}{images}:"
        yield _text(turn.text)
    if not outcomes:
        yield _text(answer.text)
    yield f"ground truth: {found.task.answer!r:.400}"
    parts = "".join(f", {name} {value:g}" for name, value in score.parts.items())
    value = "not graded" if score.value is None else f"{score.value:g}"
    by = _scored_by(settings)
    yield f"{by}: {value}{parts}{f' ({score.note})' if score.note else ''}"


def _scored_by(settings: RLSettings) -> str:
    """A few words for where the score of an answer comes from."""
    name, own = f"reward {settings.reward.name}", settings.environment
    if own is None or own.reward == "function":
        return name
    return f"reward of environment {own.name}" if own.reward == "environment" else f"{name} and environment {own.name}"


def _tokens(ids: Sequence[int]) -> str:
    """Token ids; those that repeat, as an image's do, with their number."""
    runs = [(token, len(list(same))) for token, same in groupby(ids)]
    shown = [f"{token} x {count}" if count > 1 else str(token) for token, count in runs]
    if len(shown) > MOST_TOKENS:
        shown[MOST_TOKENS // 2 : -MOST_TOKENS // 2] = ["..."]
    return ", ".join(shown)


def _text(text: str) -> str:
    """A text of any number of lines, marked as such; the middle of a long one is left out."""
    if len(text) > MOST_CHARACTERS:
        text = f"{text[: MOST_CHARACTERS // 2]} ... {text[-MOST_CHARACTERS // 2 :]}"
    return textwrap.indent(text.removesuffix("\n") or " ", "  | ", lambda _: True)
