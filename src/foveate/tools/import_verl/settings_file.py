"""Settings in YAML, as OmegaConf reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from foveate.errors import ConfigError

_LARGEST, _MOST_KEYS = 1_000_000, 5_000


class _Loader(yaml.SafeLoader):
    """Takes 1e-6 for a number, as OmegaConf does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+0123456789.")
)


def yaml_value(text: str) -> Any:
    """The value of a text, as of an override of OmegaConf."""
    return yaml.load(text, Loader=_Loader)


def read_flat(path: Path, where: str) -> dict[str, Any]:
    """The settings of a file by dotted key. Raises ConfigError for one that cannot be read."""
    return read_with_defaults(path, where)[0]


def read_with_defaults(path: Path, where: str) -> tuple[dict[str, Any], list[Any]]:
    """The settings of a file, and its list `defaults` of the files that Hydra composes with it."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{where}: {path} has more than {_LARGEST} bytes")
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        said = str(error).splitlines()[0]
        raise ConfigError(f"{where}: the launch takes its settings from {path}, which cannot be read: {said}") from None
    flat = dict[str, Any]()
    _flatten(values if isinstance(values, dict) else {}, "", flat)
    defaults = flat.pop("defaults", None)
    own = {key: value for key, value in flat.items() if not key.startswith("hydra.")}
    return own, defaults if isinstance(defaults, list) else []


def _flatten(values: dict[Any, Any], prefix: str, flat: dict[str, Any], depth: int = 0) -> None:
    if depth > 30 or len(flat) > _MOST_KEYS:
        raise ConfigError(f"{prefix}: a file of settings that is too deep, or has more than {_MOST_KEYS} of them")
    for key, value in values.items():
        if isinstance(value, dict) and value:
            _flatten(value, f"{prefix}{key}.", flat, depth + 1)
        else:
            flat[f"{prefix}{key}"] = value
