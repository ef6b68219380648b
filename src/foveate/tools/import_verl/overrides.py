"""From the arguments of a launch to settings by key: overrides, and the YAML file that they change."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from foveate.errors import ConfigError
from foveate.tools.import_verl.configuration import Configuration, read_configuration
from foveate.tools.import_verl.easyr1 import PROGRAM
from foveate.tools.import_verl.hydra import HydraFault, parse_value
from foveate.tools.import_verl.launch import Launch
from foveate.tools.import_verl.settings_file import read_flat, yaml_value

_OVERRIDE = re.compile(r"(\+{0,2})([A-Za-z_][\w./@-]*)=(.*)", re.DOTALL)
_OPTION = re.compile(r"--(config-(?:name|path|dir))(?:=(.*))?", re.DOTALL)


@dataclass(slots=True)
class LaunchSettings:
    """Settings as they are given, those that were not read with the reason, and arguments that are no settings."""

    values: dict[str, Any] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    passed: dict[str, Any] = field(default_factory=dict)
    configuration: Configuration = field(default_factory=Configuration)
    refused: list[str] = field(default_factory=list)


def read_overrides(launch: Launch, script: Path) -> LaunchSettings:
    """The settings that a launch gives. Raises ConfigError for a file of settings that is not here."""
    found, options, where = LaunchSettings(), dict[str, str](), f"{script}, line {launch.line}"
    is_easyr1 = launch.program == PROGRAM
    words = list(launch.arguments)
    while words:
        word = words.pop(0)
        option = _OPTION.fullmatch(word.text)
        if option:
            value = word if option[2] is not None or word.unread or not words else words.pop(0)
            if value.passed is None and value.unread:
                raise ConfigError(f"{where}: --{option[1]} was not read ({value.unread}), and names the other settings")
            written = value.passed or value.text
            options[option[1]] = written.removeprefix(f"--{option[1]}").removeprefix("=")
            continue
        text = word.text + "=" if word.unread and _OVERRIDE.fullmatch(word.text + "=") else word.text
        match = _OVERRIDE.fullmatch(text)
        if match is None or (word.unread and text == word.text):
            found.refused.append(f"{_shown(word.text)}: {word.unread or 'an argument that is no key=value'}")
            continue
        key = match[2]
        found.values.pop(key, None)
        found.unread.pop(key, None)
        found.passed.pop(key, None)
        if word.unread:
            found.unread[key] = word.unread
        written = (word.passed or "").partition("=")[2] if word.unread else match[3]
        try:
            value = yaml_value(written) if is_easyr1 else parse_value(written)
        except (HydraFault, yaml.YAMLError, ValueError, RecursionError) as fault:
            found.unread.setdefault(key, f"{_shown(written)!r} {str(fault).splitlines()[0]}")
        else:
            (found.passed if word.unread else found.values)[key] = value
    if is_easyr1:
        base = _easyr1_file(found, launch, where)
    else:
        found.configuration = read_configuration(options, launch, script)
        base = found.configuration.values
        found.refused += found.configuration.refused
    found.values = {key: value for key, value in base.items() if key not in found.unread} | found.values
    return found


def _shown(text: str) -> str:
    printable = "".join(one if one.isprintable() and not "\ue000" <= one <= "\uf8ff" else " " for one in text).strip()
    return printable[:100] or "an argument"


def _easyr1_file(found: LaunchSettings, launch: Launch, where: str) -> dict[str, Any]:
    if reason := found.unread.pop("config", None):
        raise ConfigError(f"{where}: config was not read ({reason}), and holds the other settings")
    name = found.values.pop("config", None)
    return {} if name is None else read_flat(Path(launch.directory, str(name)), where)
