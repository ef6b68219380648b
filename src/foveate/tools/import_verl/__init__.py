"""A launch script of verl or EasyR1 as a recipe.

The script is read as bash reads it (`bash/`), and never run. Every setting of the launch is mapped, of no effect here,
or named as one that cannot be honoured; verl's defaults are filled in and named; what was not read is never written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from foveate.errors import ConfigError
from foveate.tools.import_verl.algorithm import algorithm_of
from foveate.tools.import_verl.defaults import EASYR1, find_version, own_defaults
from foveate.tools.import_verl.easyr1 import KL, NAMES, PROGRAM, in_verls_names
from foveate.tools.import_verl.given import Given, UnreadSetting, shown
from foveate.tools.import_verl.keys import fate, mapping_table
from foveate.tools.import_verl.launch import Launch, read_launch
from foveate.tools.import_verl.overrides import LaunchSettings, read_overrides
from foveate.tools.import_verl.recorded import record_launch
from foveate.tools.import_verl.settings import recipe_settings

__all__ = ["Imported", "easyr1_table", "import_script", "mapping_table"]


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe as YAML, and a line for each key of the launch: how it is mapped, why it has no effect, or why it is
    refused. `filled`: defaults that settings were taken from; `notes`: what was taken for granted while reading."""

    recipe: str
    mapped: list[str]
    filled: list[str]
    no_effect: list[str]
    refused: list[str]
    notes: list[str]

    @property
    def account(self) -> str:
        parts = (
            ("mapped", self.mapped), ("defaults filled in", self.filled), ("of no effect here", self.no_effect),
            ("cannot be honoured", self.refused), ("taken for granted", self.notes),
        )  # fmt: skip
        return "\n".join(
            f"{title} ({len(lines)}):\n" + "".join(f"  {line}\n" for line in lines) for title, lines in parts
        )


def import_script(
    path: Path,
    environment: Mapping[str, str],
    rows: int | None,
    *,
    arguments: Sequence[str] = (),
    version: str | None = None,
    launch: int = 1,
    run: bool = False,
) -> Imported:
    """The recipe that a script stands for, under an environment and with the arguments given to it.

    `launch`: which one of a script with several. `run`: execute the script in bash, with its launchers replaced. Raises
    DataError for a file without a launch command, ConfigError where a needed value is missing.
    """
    find = record_launch if run else read_launch
    return _import_launch(path, find(path, environment, arguments, launch), rows, version)


def _import_launch(path: Path, launch: Launch, rows: int | None, version: str | None) -> Imported:
    where = f"{path}, line {launch.line}"
    overrides = read_overrides(launch, path)
    if launch.program == PROGRAM:
        title, forked = "EasyR1", False
        values, names = in_verls_names(overrides.values)
        unread = {NAMES.get(key, key): reason for key, reason in overrides.unread.items()}
        passed, _ = in_verls_names(overrides.passed)
        given = Given(where, values, unread, EASYR1, {**{name: key for key, name in NAMES.items()}, **names}, passed)
        notes = list(launch.notes)
    else:
        found = find_version(version, (path.resolve().parent, Path(launch.directory or ".")), overrides.values)
        title, forked = found.title, found.name == "internvl"
        configuration = overrides.configuration
        own = own_defaults(configuration.folder) if configuration.folder else {}
        given = Given(where, overrides.values, overrides.unread, found.defaults | own, passed=overrides.passed)
        given.megatron = any("megatron" in name for name in configuration.names)
        notes = [f"defaults are those of {title} ({found.why})", *launch.notes]
        if configuration.folder:
            notes.append(f"settings are also those of {configuration.folder / configuration.names[0]}.yaml")
        if not launch.program.startswith("verl"):
            given.refused.append(
                f"{launch.program}: a program of its own; where its code does other than verl.trainer.main_ppo, the "
                "recipe does not follow it"
            )
    try:
        settings = recipe_settings(given, path, launch.program, rows, forked)
    except UnreadSetting as unread:
        raise ConfigError(f"{where}: {unread.key} was not read ({unread.reason}), and decides others") from None
    return _accounted(given, overrides, settings, title, notes)


def _accounted(
    given: Given, overrides: LaunchSettings, settings: Mapping[str, Any], title: str, notes: list[str]
) -> Imported:
    """Every key of the launch once, as what became of it."""
    try:
        critic = algorithm_of(given) == "ppo"
    except UnreadSetting:
        critic = True
    told = {line.partition("=")[0].partition(":")[0] for line in given.refused}
    lines: dict[str, list[str]] = {"mapped": [], "no effect": [], "refused": []}
    for key, value in overrides.values.items():
        if key in told:
            continue
        name = NAMES.get(key, key) if title == "EasyR1" else key
        kind, text = ("mapped", KL[key]) if title == "EasyR1" and key in KL else fate(name, value, critic)
        lines[kind].append(f"{key}={shown(value)}" + (f" -> {text}" if kind == "mapped" else f": {text}"))
    refused = [*given.refused, *lines["refused"], *overrides.refused]
    refused += [f"{key}: {reason}" for key, reason in overrides.unread.items() if key not in told]
    filled = [f"{given.called(key)}={shown(value)}" for key, value in given.filled.items()]
    header = f"# From a launch script of {title} by `foveate import-verl`.\n"
    return Imported(header + _yaml(settings), lines["mapped"], filled, lines["no effect"], refused, notes)


def easyr1_table() -> str:
    """The second table of docs/recipes.md."""
    return mapping_table(NAMES | dict(KL))


def _yaml(settings: Mapping[str, Any]) -> str:
    packed: dict[str, Any] = {}
    for path, value in settings.items():
        *groups, name = path.split(".")
        inner = packed
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[name] = value
    return yaml.safe_dump(packed, sort_keys=False, width=120, allow_unicode=True)
