"""The settings of a launch: what it gives, what was not read, and verl's default for the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foveate.errors import ConfigError

LARGEST = 1_000_000_000
_MOST_REFERENCES = 20
_INTERPOLATION = re.compile(r"\$\{([\w.]+)\}")


class UnreadSetting(Exception):
    """A setting whose value was not read."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key)
        self.key, self.reason = key, reason


@dataclass(slots=True)
class Given:
    """Values by key; `unread` has the keys whose value was not read, with the reason. The account of what becomes of
    them is written in `refused` (lines) and `filled` (defaults that a recipe's setting was taken from)."""

    where: str
    values: Mapping[str, Any]
    unread: Mapping[str, str]
    defaults: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    """The name of a key in the script, where that is another name."""
    passed: Mapping[str, Any] = field(default_factory=dict)
    """Values that hold variables which are set nowhere, as bash passes them: with nothing in their place."""
    megatron: bool = False
    """Whether the launch takes its defaults from a configuration for Megatron-LM."""
    refused: list[str] = field(default_factory=list)
    filled: dict[str, Any] = field(default_factory=dict)

    def called(self, key: str) -> str:
        return self.names.get(key, key)

    def has(self, *keys: str) -> bool:
        return any(key in self.values or key in self.unread for key in keys)

    def get(self, key: str, depth: int = 0) -> Any:
        """A value as it stands, or that of the key it refers to; a default is noted. Raises UnreadSetting."""
        if key in self.unread:
            raise UnreadSetting(self.called(key), self.unread[key])
        if key not in self.values:
            default = self.defaults.get(key)
            if default is not None:
                self.filled[key] = default
            return default
        value = self.values[key]
        if isinstance(value, str) and "${" in value:
            match = _INTERPOLATION.fullmatch(value)
            if match and depth < _MOST_REFERENCES and (match[1] in self.values or match[1] in self.defaults):
                return self.get(match[1], depth + 1)
            raise UnreadSetting(self.called(key), f"{value} is resolved by Hydra, not by the script")
        return value

    def first(self, *keys: str) -> Any:
        """The value of the first key that is given, else the default of the first one."""
        return self.get(next((key for key in keys if self.has(key)), keys[0]))

    def whole(self, *keys: str, least: int | None = None) -> int:
        value = self.first(*keys)
        good = (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, float) and value.is_integer()
        )
        if not good or abs(value) > LARGEST or (least is not None and value < least):
            bounds = f" of at least {least}" if least is not None else f" up to {LARGEST}"
            raise self._wrong(keys, f"a whole number{bounds}")
        return int(value)

    def number(self, *keys: str) -> float:
        value = self.first(*keys)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or value != value
            or abs(value) == float("inf")
        ):
            raise self._wrong(keys, "a number")
        return float(value)

    def numbers(self, key: str, count: int) -> list[float]:
        value = self.get(key)
        kinds = isinstance(value, list) and len(value) == count and all(type(one) in (int, float) for one in value)
        if not kinds:
            raise self._wrong((key,), f"a list of {count} numbers")
        return [float(one) for one in value]

    def flag(self, *keys: str) -> bool:
        value = self.first(*keys)
        if value is None:
            return False
        if value not in (True, False):
            raise self._wrong(keys, "true or false")
        return bool(value)

    def text(self, *keys: str) -> str:
        value = self.first(*keys)
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise self._wrong(keys, "a text")
        return str(value)

    def texts(self, *keys: str) -> list[str]:
        """A list of texts, or the list of a single one."""
        value = self.first(*keys)
        return [str(one) for one in value] if isinstance(value, list) else [] if value is None else [str(value)]

    def path(self, key: str) -> str:
        """A text, also one that holds variables which are set nowhere, which is named."""
        return self.text(key) if self.passed.get(key) in (None, "") else str(self._as_passed(key))

    def paths(self, key: str) -> list[str]:
        if self.passed.get(key) in (None, ""):
            return self.texts(key)
        value = self._as_passed(key)
        return [str(one) for one in value] if isinstance(value, list) else [str(value)]

    def _as_passed(self, key: str) -> Any:
        line = f"{self.called(key)}: {self.unread[key]}; the recipe has what bash passes, {shown(self.passed[key])}"
        if line not in self.refused:
            self.refused.append(line)
        return self.passed[key]

    def refuse(self, key: str, why: str) -> None:
        """Name a setting that is given, or a default, and cannot be honoured."""
        value = self.values.get(key, self.defaults.get(key))
        line = f"{self.called(key)}={shown(value)}: {why}"
        if line not in self.refused:
            self.refused.append(line)

    def _wrong(self, keys: tuple[str, ...], kind: str) -> ConfigError:
        key = next((key for key in keys if self.has(key)), keys[0])
        value = self.values.get(key, self.defaults.get(key))
        return ConfigError(f"{self.where}: {self.called(key)}={shown(value)} is not {kind}")


def shown(value: Any) -> str:
    """A value as a script has it."""
    if isinstance(value, list):
        return "[" + ",".join(shown(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{shown(key)}:{shown(one)}" for key, one in value.items()) + "}"
    return {None: "null"}.get(value, str(value)) if not isinstance(value, str) else value
