"""The options of `foveate eval` that a run says itself: its model, its held-out rows, how they are read, its reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.config.recipe import read_recipe
from foveate.config.runs import CascadeSettings, RLSettings
from foveate.errors import ConfigError
from foveate.run_folder import RunFolder


def options_of_run(run: str | Path, system: str | None = None) -> dict[str, Any]:
    """The fields of an `EvalRequest` by the settings of a run: `models` is its trained model, `data` its held-out rows
    (data.test, or those that data.hold_out kept aside). Only a run with a reward says one, and the length of answers,
    and one with an environment that.
    system: a message in place of the run's, which may have switched thoughts by its own.

    Raises ConfigError for a folder that is none of a run.
    """
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise ConfigError(f"{run}: no folder of a run, as it has no {folder.config.name}; give one, or --model")
    settings = read_recipe(folder.config, ())
    data, final = settings.data, folder.final
    if isinstance(settings, CascadeSettings):
        final = folder.path / "rl" / final.name
    found: dict[str, Any] = {
        "models": (str(final),),
        "data": data.test or data.train,
        "hold_out": 0.0 if data.test else data.hold_out,
        "max_prompt_tokens": data.max_prompt_tokens,
        "max_tiles": settings.model.max_tiles,
        "max_pixels": settings.model.max_pixels,
        "system": system or data.system,
        "thinking": None if system else data.thinking,
        "columns": data.columns,
        "image_root": data.image_root,
        "on_bad_row": data.on_bad_row,
    }
    if isinstance(settings, RLSettings):
        found |= {"environment": settings.environment, "turn_discount": settings.algorithm.turn_discount}
    if isinstance(settings, RLSettings | CascadeSettings):
        reward = {"reward": settings.reward.name, "settings": settings.reward.settings}
        found |= {**reward, "max_tokens": settings.rollout.max_tokens}
    return found
