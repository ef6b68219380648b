"""The configuration that a launch begins with, where it is another one than verl's own, composed as Hydra does it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError
from foveate.tools.import_verl.launch import Launch
from foveate.tools.import_verl.settings_file import read_with_defaults

_BASE = re.compile(r"ppo_(?:megatron_|veomni_|torchtitan_)?trainer")
"""verl's own, whose values are its defaults."""
_KNOWN = re.compile(rf"(?:one_step_off_|fully_async_)?{_BASE.pattern}|dapo_(?:megatron_)?trainer")
"""Those that change no value which a recipe takes, where their files are not here."""
_DECLARED = re.compile(r"""hydra\.main\(\s*config_path\s*=\s*["']([^"']*)["'],\s*config_name\s*=\s*["']([^"']*)["']""")
_LONGEST_PROGRAM = 1_000_000


@dataclass(slots=True)
class Configuration:
    """Values by key; `names` of the files it is composed of, `folder` of the first one; `refused` entries of
    `defaults` that are not here."""

    values: dict[str, Any] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    folder: Path | None = None
    refused: list[str] = field(default_factory=list)


def read_configuration(options: Mapping[str, str], launch: Launch, script: Path) -> Configuration:
    """The configuration that `--config-name` and `--config-path` name, or the program itself in `hydra.main`.

    Raises ConfigError where that file is not here and not known.
    """
    where, parts = f"{script}, line {launch.line}", launch.program.split(".")
    program = Path(launch.program) if launch.program.endswith(".py") else Path(*parts).with_suffix(".py")
    folder, name = _declared_by(_find(program, launch, script))
    name = (options.get("config-name") or name).removesuffix(".yaml")
    folder = options.get("config-path") or options.get("config-dir") or folder
    found = Configuration()
    if not name or (_BASE.fullmatch(name) and not options.get("config-path")):
        found.names.append(name)
        return found
    file = Path(folder, f"{name}.yaml")
    path = _find(program.parent / file, launch, script) or _find(file, launch, script)
    if path is None:
        if not _KNOWN.fullmatch(name):
            raise ConfigError(f"{where}: the launch takes its settings from {file}, which is not here")
        found.names.append(name)
        return found
    found.folder = path.parent
    found.values = _composed(path, where, found)
    return found


def _find(path: Path, launch: Launch, script: Path) -> Path | None:
    """A file that a launch names, or one of the same path in a folder around the script, whose first parts may have
    other names there."""
    parts = Path(os.path.normpath(path)).parts
    roots = [Path(launch.directory), *script.resolve().parents]
    places = [root.joinpath(*parts[start:]) for start in range(max(1, len(parts) - 1)) for root in roots]
    return next((place for place in places if place.is_file()), None)


def _declared_by(program: Path | None) -> tuple[str, str]:
    """Folder and name of the configuration in the decorator of a program."""
    if program is None or program.stat().st_size > _LONGEST_PROGRAM:
        return "config", ""
    match = _DECLARED.search(program.read_text(encoding="utf-8", errors="replace"))
    return (match[1], match[2]) if match else ("config", "")


def _composed(path: Path, where: str, found: Configuration) -> dict[str, Any]:
    own, defaults = read_with_defaults(path, where)
    found.names.append(path.stem)
    if len(found.names) > 100:
        raise ConfigError(f"{where}: {path} is composed of more than 100 files")
    values = dict[str, Any]()
    for entry in defaults if "_self_" in defaults else ["_self_", *defaults]:
        group, name = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else ("", entry)
        group, _, package = str(group).partition("@")
        file = path.parent / group / f"{name}.yaml"
        if name == "_self_":
            values |= own
        elif not group and _BASE.fullmatch(str(name)):
            found.names.append(str(name))
        elif file.is_file():
            prefix = (package or group.replace("/", ".")) + "." if group else ""
            values |= {prefix + key: value for key, value in _composed(file, where, found).items()}
        else:
            found.refused.append(f"{path}: {file}, which its defaults name, is not here; its settings were not read")
    return values
