"""foveate: reinforcement learning for vision-language models."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    **{
        name: f"foveate.api:{name}"
        for name in (
            "from_recipe", "train_sft", "train_mpo", "train_rl", "train_vico", "train_vir", "Recipe", "Run", "demo",
            "generate", "evaluate", "report", "compare_runs", "prepare_upload", "summary", "plan", "plan_report",
            "plan_table", "doctor", "convert", "write_flash", "export", "import_verl",
            "settings_list", "settings_page", "recipes_list", "rewards_list", "environments_list",
            "algorithms_list", "serve", "view",
        )
    },
    "RLTrainer": "foveate.api.trainer:RLTrainer",
    "prepare_filter": "foveate.datasets.filter:prepare_filter",
    "prepare_geo3k": "foveate.datasets.geo3k:prepare_geo3k",
    "prepare_grounding": "foveate.datasets.grounding:prepare_grounding",
    "prepare_mmpr": "foveate.datasets.mmpr:prepare_mmpr",
    "prepare_mmpr_tiny": "foveate.datasets.mmpr:prepare_mmpr_tiny",
    "prepare_pairs": "foveate.datasets.pairs:prepare_pairs",
    "prepare_rows": "foveate.datasets.prepared:prepare_rows",
    "prepare_gui": "foveate.datasets.gui:prepare_gui",
    "prepare_shapes": "foveate.datasets.shapes:prepare_shapes",
    "prepare_zoom": "foveate.datasets.zoom:prepare_zoom",
    "GenerateRequest": "foveate.evaluate.generate:GenerateRequest",
    "RowsRequest": "foveate.evaluate.generate:RowsRequest",
    "ClientSettings": "foveate.evaluate.client:ClientSettings",
    "SamplingParams": "foveate.records:SamplingParams",
    "EvalRequest": "foveate.evaluate.evaluate_models:EvalRequest",
    "ServeRequest": "foveate.serve.native:ServeRequest",
    "EngineRequest": "foveate.serve.engines:EngineRequest",
    "RLSettings": "foveate.config.runs:RLSettings",
    "SFTSettings": "foveate.config.runs:SFTSettings",
    "MPOSettings": "foveate.config.runs:MPOSettings",
    "CascadeSettings": "foveate.config.runs:CascadeSettings",
    "RunFolder": "foveate.run_folder:RunFolder",
    "Task": "foveate.records:Task",
    "Score": "foveate.records:Score",
    "UserError": "foveate.errors:UserError",
}  # fmt: skip
"""Public names and where each is defined; a name is imported when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    return vars(import_module(module))[attribute]


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]


class _Module(ModuleType):
    def __reduce__(self) -> Any:
        return import_module, (self.__name__,)


class _Part(_Module):
    """A part of the package with the name of a public function, which a call of it calls: `foveate.evaluate`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Foveate(_Module):
    def __setattr__(self, name: str, value: Any) -> None:
        """An import of `foveate.evaluate.metrics` sets `foveate.evaluate`, which stays what it is for users."""
        if name in PUBLIC and isinstance(value, ModuleType):
            value.__class__ = _Part
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Foveate
