"""The stages of training as calls: from a model, rows and a reward, or from a recipe."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from foveate.api.inputs import (
    Environment,
    Reward,
    checked_call,
    data_files,
    environment_settings,
    reward_settings,
)
from foveate.api.run import Run
from foveate.config.recipe import read_recipe, settings_of
from foveate.config.runs import (
    STAGES,
    CascadeSettings,
    MPOSettings,
    RLSettings,
    SFTSettings,
    StageName,
    VicoSettings,
    VirSettings,
)
from foveate.errors import ConfigError
from foveate.log import setup_logging
from foveate.run_folder import RunFolder

logger = logging.getLogger(__name__)
AnySettings = SFTSettings | MPOSettings | RLSettings | CascadeSettings | VicoSettings | VirSettings
SettingsT = TypeVar("SettingsT", SFTSettings, MPOSettings, RLSettings, CascadeSettings, VicoSettings, VirSettings)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a whole run, ready to train."""

    settings: Any

    def train(self, *, accept_changes: bool = False) -> Run:
        """Run the stage of the settings, or the rest of one that was interrupted: the same run folder resumes it.

        A run whose data, code, model folder or settings changed since its last checkpoint is refused unless
        `accept_changes`. Where `model.path` is a checkpoint of a run, a new run begins from its weights."""
        return finished(_stage(prepared(self.settings), accept_changes))

    def dry_run(self, *, accept_changes: bool = False) -> str:
        """The beginning of the run in words: its size, its first prompt as tokens and text, what is trained of it, or a
        sampled answer with its reward. Raises what `train` would refuse; nothing is written."""
        from foveate.tools.dry_run import describe_run

        return describe_run(self.settings, accept_changes=accept_changes)


def from_recipe(name: str | Path, *overrides: str, stage: StageName | None = None) -> Recipe:
    """A recipe, a YAML file or the name of a shipped one, with `group.name=value` overrides.

    Its settings are `SFTSettings`, `MPOSettings`, `RLSettings` or `CascadeSettings`: those of `stage`, or of the first
    stage that has all settings which are given.
    """
    return Recipe(read_recipe(name, overrides, stage))


@checked_call
def train_rl(
    model: str | Path,
    train_data: Any,
    reward: Reward | Mapping[str, Any],
    *,
    eval_data: Any = None,
    algorithm: str | Mapping[str, Any] = "gspo",
    environment: Environment | None = None,
    config: str | Path | None = None,
    run_dir: str | Path | None = None,
    accept_changes: bool = False,
    **overrides: Any,
) -> Run:
    """Online reinforcement learning.

    Args:
        model: a model folder, or "demo" for the small one that is shipped.
        train_data: rows (a list of dicts, a `datasets.Dataset`, a DataFrame) or paths of files.
        eval_data: held-out rows, likewise; without them, and without `hold_out=0.05`, which keeps some of `train_data`
            aside, nothing is evaluated.
        reward: a function, the name of a known reward, or a list of (function or name, weight). A function takes
            `(answer, ground_truth, **columns)`, or TRL's `(completions, **columns) -> list`, or `(text, task)`, and
            returns a number, a dict of parts, or a `Score`.
        algorithm: a name (`gspo`, `grpo`, `dapo`, ...), or settings, `{"name": "gspo", "correction": ...}`.
        environment: for answers of several turns: a name, a function that returns a `foveate.environments.Environment`,
            or settings, `{"name": "tools", "settings": {"tools": ["zoom"]}}`.
        config: a recipe whose settings these arguments change.
        run_dir: folder of the run, which the same call resumes; by default a new one, `runs/rl-1`.
        accept_changes: resume it with other data, code or settings, too; the run records that.
        overrides: settings by group (`optim={"lr": 1e-5}`), by path (`**{"optim.lr": 1e-5}`) or, where only one group
            has it, by name (`lr=1e-5`).

    Raises UserError for anything that the caller can fix, before the run begins.
    """
    return Recipe(
        rl_settings(
            model,
            train_data,
            reward,
            eval_data=eval_data,
            algorithm=algorithm,
            environment=environment,
            config=config,
            run_dir=run_dir,
            overrides=overrides,
        )
    ).train(accept_changes=accept_changes)


def rl_settings(
    model: str | Path,
    train_data: Any,
    reward: Reward | Mapping[str, Any],
    *,
    eval_data: Any,
    algorithm: str | Mapping[str, Any],
    environment: Environment | None = None,
    config: str | Path | None,
    run_dir: str | Path | None,
    overrides: Mapping[str, Any],
) -> RLSettings:
    """The settings of `train_rl` with these arguments; rows are written beside the run folder."""
    rows = {"train": train_data} if eval_data is None else {"train": train_data, "test": eval_data}
    given = {"algorithm": algorithm, "reward": reward_settings(reward), **overrides}
    if environment is not None:
        given["environment"] = environment_settings(environment)
    return _settings("rl", model, rows, config, run_dir, given)


@checked_call
def train_sft(
    model: str | Path,
    train_data: Any,
    *,
    eval_data: Any = None,
    config: str | Path | None = None,
    run_dir: str | Path | None = None,
    accept_changes: bool = False,
    **overrides: Any,
) -> Run:
    """Supervised fine-tuning on demonstrations; arguments as those of `train_rl`. Of `eval_data` the loss is taken."""
    return _offline("sft", model, (train_data, eval_data), config, run_dir, overrides, accept_changes)


@checked_call
def train_mpo(
    model: str | Path,
    train_data: Any,
    *,
    eval_data: Any = None,
    config: str | Path | None = None,
    run_dir: str | Path | None = None,
    accept_changes: bool = False,
    **overrides: Any,
) -> Run:
    """Preference optimisation on pairs of answers; arguments as those of `train_rl`. Of `eval_data` the loss is taken,
    and the share of pairs whose better answer the policy prefers."""
    return _offline("mpo", model, (train_data, eval_data), config, run_dir, overrides, accept_changes)


@checked_call
def train_vico(
    model: str | Path,
    train_data: Any,
    *,
    eval_data: Any = None,
    config: str | Path | None = None,
    run_dir: str | Path | None = None,
    accept_changes: bool = False,
    **overrides: Any,
) -> Run:
    """Visual consistency learning of a Flash model on demonstrations; arguments as those of `train_rl`. Of `eval_data`
    the divergence is taken, at the routes of training and with every tile compressed."""
    return _offline("vico", model, (train_data, eval_data), config, run_dir, overrides, accept_changes)


@checked_call
def train_vir(
    model: str | Path,
    train_data: Any,
    *,
    eval_data: Any = None,
    config: str | Path | None = None,
    run_dir: str | Path | None = None,
    accept_changes: bool = False,
    **overrides: Any,
) -> Run:
    """Training of the router of a Flash model that `train_vico` has made from `train.reference`; arguments as those of
    `train_rl`. Of `eval_data` it is taken how often the router is right."""
    return _offline("vir", model, (train_data, eval_data), config, run_dir, overrides, accept_changes)


def _offline(
    stage: StageName,
    model: str | Path,
    data: tuple[Any, Any],
    config: str | Path | None,
    run_dir: str | Path | None,
    overrides: Mapping[str, Any],
    accept_changes: bool,
) -> Run:
    rows = {part: own for part, own in zip(("train", "test"), data, strict=True) if own is not None or part == "train"}
    settings = _settings(stage, model, rows, config, run_dir, overrides)
    return Recipe(settings).train(accept_changes=accept_changes)


def _settings(
    stage: StageName,
    model: str | Path,
    rows: Mapping[str, Any],
    config: str | Path | None,
    run_dir: str | Path | None,
    given: Mapping[str, Any],
) -> Any:
    """The settings of a stage with what was `given`. Rows that were passed are written beside the run folder."""
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(
            f"argument model: must be a model folder or a name, found {type(model).__name__}; write a model in memory "
            "with save_pretrained, together with its processor, and give that folder"
        )
    with _run_of(stage, run_dir, given) as run:
        folder = run.with_name(run.name + "-data")
        files = {f"data.{part}": data_files(data, folder / f"{part}.parquet") for part, data in rows.items()}
        return settings_of({"run": str(run), "model.path": str(model), **files, **given}, STAGES[stage], config)


@contextmanager
def _run_of(stage: StageName, given: str | Path | None, overrides: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of the run of a call. One that was made for it goes again where its arguments are refused."""
    if "run" in overrides:
        raise ConfigError("argument run: from Python the folder of a run is run_dir")
    if given is not None and ("\0" in str(given) or len(str(given)) > 1000):
        raise ConfigError("run_dir: must be the path of a folder, of at most 1,000 characters and none of them 0")
    folder = _run_folder(given, stage)
    try:
        yield folder
    except BaseException:
        if given is None:
            folder.rmdir()
        raise


def _run_folder(given: str | Path | None, stage: str) -> Path:
    """The folder of a run; without a name a new one, which is made here and now, so that no other call takes it."""
    if given is not None:
        return Path(given)
    for number in itertools.count(1):
        folder = Path(f"runs/{stage}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    raise AssertionError


def prepared(settings: SettingsT) -> SettingsT:
    """Settings just before a run: where `model.path`, or that of a teacher, names a checkpoint of another run, with the
    model folder that is made of it. A script that has set up no logging gets foveate's lines, or it would be silent."""
    if not logging.getLogger().handlers and not logging.getLogger("foveate").handlers:
        setup_logging()
    from foveate.train.export import with_model_folders

    return with_model_folders(settings)


def _stage(settings: AnySettings, accept_changes: bool) -> RunFolder:
    if not settings.data.test and not settings.data.hold_out:
        logger.info(
            "no evaluation, since there are no held-out rows: name them in data.test, or set data.hold_out=0.05"
        )
    if isinstance(settings, VicoSettings):
        from foveate.train.vico import run_vico

        return run_vico(settings, accept_changes=accept_changes)
    if isinstance(settings, VirSettings):
        from foveate.train.vir import run_vir

        return run_vir(settings, accept_changes=accept_changes)
    if isinstance(settings, SFTSettings):
        from foveate.train.sft import run_sft

        return run_sft(settings, accept_changes=accept_changes)
    if isinstance(settings, MPOSettings):
        from foveate.train.mpo import run_mpo

        return run_mpo(settings, accept_changes=accept_changes)
    if isinstance(settings, RLSettings):
        from foveate.train.rl import run_rl

        return run_rl(settings, accept_changes=accept_changes)
    from foveate.train.cascade import run_cascade

    return run_cascade(settings, accept_changes=accept_changes)


def finished(folder: RunFolder) -> Run:
    """A run that has ended, with its report and the card of its model written."""
    from foveate.models.checkpoint.inspect import hub_task
    from foveate.report.card import write_card
    from foveate.report.page import write_report

    run = Run(folder.path)
    write_report(run.path)
    write_card(run.path, run.model, hub_task(run.model))
    return run
