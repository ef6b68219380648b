"""From a name and settings to a function that makes environments, checked before anything runs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any

from foveate.environments import ENVIRONMENTS
from foveate.environments.protocol import Environment, EnvironmentLimits
from foveate.errors import ConfigError, one_line
from foveate.registry import bind, resolve, suggestion

MakeEnvironment = Callable[[], Environment]
_DEFAULT = EnvironmentLimits()


def build_environment(name: str, settings: Mapping[str, Any]) -> tuple[MakeEnvironment, EnvironmentLimits]:
    """A function that makes the environment of an answer, and the limits, which stand among its settings.

    The object of a name is a subclass of `Environment`, or a function that returns one. Raises ConfigError for an
    unknown name or setting, a value of the wrong type, and an object of another kind."""
    found, where = resolve(ENVIRONMENTS, name, "environment"), f"environment {name}"
    is_class = inspect.isclass(found) and issubclass(found, Environment)
    if not is_class and not inspect.isfunction(found):
        raise ConfigError(
            f"{where} must be a subclass of foveate.environments.Environment, or a function that returns one, "
            f"found {found!r:.60}; others are adapted by the environments trl, gymnasium and http"
        )
    schema = _schema(found) if is_class else found
    own = [p.name for p in inspect.signature(schema).parameters.values() if p.kind is p.KEYWORD_ONLY]
    shared = [field.name for field in fields(EnvironmentLimits) if field.name not in own]
    for key in settings:
        if key not in (known := [*own, *shared]):
            what = f"unknown setting {key!r}{suggestion(key, known, then='its settings')}"
            raise ConfigError(f"{where}: {what}: {', '.join(known)}")
    bound = bind(schema, {key: value for key, value in settings.items() if key not in shared}, where)
    limits = bind(_limits, {key: value for key, value in settings.items() if key in shared}, where)()

    def make() -> Environment:
        made = found(**bound.keywords)
        if not isinstance(made, Environment):
            raise ConfigError(f"{where} returned {made!r:.60}; it must return a foveate.environments.Environment")
        if made.shows_images and not limits.max_images:
            raise ConfigError(f"{where}: max_images is 0, but {made.shows_images} shows images; leave one of them out")
        made.step_limits = limits
        return made

    return make, limits


def schema_of(found: Any) -> Any:
    """The function whose keyword-only arguments are the settings of an object of the table."""
    return _schema(found) if inspect.isclass(found) else found


def _schema(kind: Any) -> Any:
    if inspect.isfunction(kind.__init__):
        return kind.__init__

    def no_settings() -> None: ...

    return no_settings


def _limits(
    *,
    max_turns: int = _DEFAULT.max_turns,
    max_text: int = _DEFAULT.max_text,
    max_images: int = _DEFAULT.max_images,
    max_pixels: int = _DEFAULT.max_pixels,
) -> EnvironmentLimits:
    limits = EnvironmentLimits(max_turns, max_text, max_images, max_pixels)
    for field in fields(limits):
        value, least = asdict(limits)[field.name], 0 if field.name == "max_images" else 1
        if value < least:
            raise ConfigError(f"environment: {field.name} must be at least {least}, found {value}")
    return limits


def _checked_schema(name: str, schema: Any) -> Mapping[str, Any]:
    """The schema of a function for prompts. Raises ConfigError for anything else, which a template would write into
    every prompt as it is."""
    function = schema.get("function") if isinstance(schema, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ConfigError(
            f"environment {name}: tools() gives {schema!r:.80}; it must give schemas of functions, as "
            "transformers.utils.get_json_schema makes them: {type: function, function: {name, description, parameters}}"
        )
    try:
        json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"environment {name}: the schema of {function['name']} is no JSON ({error})") from None
    return schema


def made_once(name: str, make: MakeEnvironment) -> tuple[tuple[Mapping[str, Any], ...], bool]:
    """The schemas that an environment shows in prompts, and whether it has a `last_reward` of its own. Raises
    ConfigError where it cannot be made."""
    try:
        made = make()
        shown = tuple(_checked_schema(name, one) for one in made.tools())
        with suppress(Exception):  # of one that was not reset, as later of all
            made.close()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"environment {name} cannot be made with these settings: {type(error).__name__}: {one_line(error)}"
        ) from error
    return shown, type(made).last_reward is not Environment.last_reward
