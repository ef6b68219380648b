"""The options of `foveate eval` that a run says itself: its model, its held-out rows, how they are read, its reward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.config.recipe import read_recipe
from foveate.config.runs import CascadeSettings, RLSettings
from foveate.errors import ConfigError
from foveate.run_folder import RunFolder

logger = logging.getLogger(__name__)


def options_of_run(
    run: str | Path, system: str | None = None, *, data: Sequence[str | Path] = (), asks: bool = True
) -> dict[str, Any]:
    """The fields of an `EvalRequest` by the settings of a run: `models` is its trained model, `data` its held-out rows
    (data.test, or those that data.hold_out kept aside). Only a run with a reward says one, and the length of answers,
    and one with an environment that.
    system: a message in place of the run's, which may have switched thoughts by its own. data: files of rows in place
    of the held-out ones; a warning names those that the run was trained on. asks: whether the model is to answer.

    Raises ConfigError for a folder that is none of a run, and for a run without held-out rows that
    `asks` without `data`.
    """
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise ConfigError(f"{run} is not a run folder: it has no {folder.config.name}; give one, or --model")
    settings = read_recipe(folder.config, ())
    own, final = settings.data, folder.final
    if asks and not (data or own.test or own.hold_out):
        raise ConfigError(
            f"{run} has no held-out rows (data.test is empty, and data.hold_out is 0): name rows that it was not "
            "trained on, with --data FILE, or in Python run.evaluate(FILE)"
        )
    if seen := sorted(set(map(_resolved, data)) & set(map(_resolved, own.train))):
        logger.warning("%s: these are rows that the run was trained on, not held-out ones", ", ".join(seen))
    if isinstance(settings, CascadeSettings):
        final = folder.model
    found: dict[str, Any] = {
        "models": (str(final),),
        "data": tuple(map(str, data)) or own.test or own.train,
        "hold_out": 0.0 if data or own.test else own.hold_out,
        "max_prompt_tokens": own.max_prompt_tokens,
        "max_tiles": settings.model.max_tiles,
        "max_pixels": settings.model.max_pixels,
        "system": system or own.system,
        "thinking": None if system else own.thinking,
        "video": own.video,
        "columns": own.columns,
        "image_root": own.image_root,
        "on_bad_row": own.on_bad_row,
    }
    if isinstance(settings, RLSettings):
        found |= {"environment": settings.environment, "turn_discount": settings.algorithm.turn_discount}
    if isinstance(settings, RLSettings | CascadeSettings):
        reward = {"reward": settings.reward.name, "settings": settings.reward.settings}
        found |= {**reward, "max_tokens": settings.rollout.max_tokens}
    return found


def _resolved(path: str | Path) -> str:
    return str(Path(path).resolve())
