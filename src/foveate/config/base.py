"""The base of all groups of settings."""

from __future__ import annotations

from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

# YAML has lists only; strict types would ask for a tuple.


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


ONE_OR_MORE = BeforeValidator(_listed)
"""One string alone need not stand in a list."""
Strings = Annotated[tuple[str, ...], ONE_OR_MORE, Field(strict=False)]
"""Several strings; one alone need not stand in a list."""


class Settings(BaseModel):
    """The base of all settings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class Named(Settings):
    """Something chosen by name. A bare string stands for the name with default settings: `algorithm: gspo`."""

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """Names of the tables are in lower case, whatever the writer's; import paths, with a colon, are as they are."""
        named = {"name": value} if isinstance(value, str) else value
        name = named.get("name") if isinstance(named, dict) else None
        return {**named, "name": name.lower()} if isinstance(name, str) and ":" not in name else named


def is_http_address(text: str) -> bool:
    """Whether a text is the address of a server: http or https, a host, and a port that can be one."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # which is read now
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and text.isprintable() and " " not in text


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU here."""
    import torch  # settings are read without it wherever this is not asked

    return torch.cuda.is_available()


def refuse(path: str, text: str) -> NoReturn:
    """Raise for settings that do not fit together; `foveate.config.recipe` finds the line of `path`."""
    raise PydanticCustomError("together", "{path} {text}", {"path": path, "text": text})


def refuse_any(*rules: tuple[bool, str, str]) -> None:
    """Refuse the first of some rules (is it broken, the setting, the rest of the sentence) that is broken."""
    for is_broken, path, text in rules:
        if is_broken:
            refuse(path, text)
