"""Callable objects, classes of such, partials and methods as plain functions, which rewards are."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from foveate.errors import ConfigError

_PLAIN = str | int | float | bool | None


def as_function(found: Any, where: str) -> Callable[..., Any]:
    """A function with the signature of `found`: itself, or one that calls an object, a method, a `functools.partial`,
    or an object of a class (as ms-swift names its rewards). It holds their source and plain values, by which
    `registry.name_of` tells whether code changed. Raises ConfigError for what cannot be called, and for async code."""
    if inspect.isclass(found):
        try:
            found = found()
        except TypeError as error:
            raise ConfigError(f"{where}: {found.__name__} cannot be made without arguments ({error})") from None
    if not callable(found):
        raise ConfigError(f"{where} must be a function, or an object that can be called, found {found!r:.60}")
    target = _target(found)
    if inspect.iscoroutinefunction(target):
        raise ConfigError(
            f"{where}: {_name(found)} is async, and rewards are called one by one; write it "
            "with def (the rewards judge and endpoint ask servers side by side)"
        )
    if inspect.isfunction(found):
        return found
    identity = _identity(found)

    def reward(*args: Any, **kwargs: Any) -> Any:
        assert identity is not None  # it is held, so that the name of the function changes with it
        return found(*args, **kwargs)

    reward.__name__ = reward.__qualname__ = _name(found)
    reward.__module__ = target.__module__
    reward.__annotations__ = dict(inspect.get_annotations(target))
    reward.__signature__ = inspect.signature(found)  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def _target(found: Any) -> Any:
    """The function whose code runs."""
    found = _whole(found)
    if inspect.isfunction(found):
        return found
    method = found if inspect.ismethod(found) else type(found).__call__
    return method.__func__ if inspect.ismethod(method) else method


def _whole(found: Any) -> Any:
    """Without the arguments that are filled in."""
    while isinstance(found, functools.partial):
        found = found.func
    return found


def _name(found: Any) -> str:
    found = _whole(found)
    return found.__name__ if inspect.isfunction(found) or inspect.ismethod(found) else type(found).__name__


def _identity(found: Any) -> str:
    """The source of the code and the plain values that it is called with, or that its object holds."""
    parts: list[str] = []
    while isinstance(found, functools.partial):
        parts += [repr(one) for one in found.args if isinstance(one, _PLAIN)]
        parts += [f"{name}={one!r}" for name, one in found.keywords.items() if isinstance(one, _PLAIN)]
        found = found.func
    owner = found.__self__ if inspect.ismethod(found) else found
    with suppress(TypeError):  # an object with slots
        parts += [f"{name}={one!r}" for name, one in vars(owner).items() if isinstance(one, _PLAIN)]
    code = found if inspect.isfunction(found) else type(owner)
    try:
        parts.append(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError):  # typed into python -i, or made by exec
        parts.append(_target(found).__code__.co_code.hex())
    return "\n".join(parts)
