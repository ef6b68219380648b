"""Layers of settings, one over the other. What names another one of a kind drops the settings of the former."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, get_args

from pydantic.fields import FieldInfo

from foveate.config.base import Named, Settings
from foveate.config.problems import Entry

BARE = {"model": "path", "data": "train"}
"""The groups that a bare value may stand for, and its setting in them."""


@dataclass(frozen=True, slots=True)
class NamedChoice:
    """A setting of a group that names something which has settings of its own. key: the setting; default: the name that
    stands when none is given, or None; own: the setting that holds those of what is named, None where all others of the
    group are."""

    key: str
    default: str | None
    own: str | None


def choices_of(cls: type[Settings], path: str = "") -> Iterator[tuple[str, NamedChoice]]:
    """Every choice by name, with the dotted path of its group."""
    fields = cls.model_fields
    for name, field in fields.items():
        group = _group_of(field)
        if group is not None:
            yield from choices_of(group, _join(path, name))
        own = "settings" if name == "name" else f"{name}_settings"
        if own in fields or (name == "name" and issubclass(cls, Named)):
            default = None if field.is_required() else field.default
            yield path, NamedChoice(name, default, None if issubclass(cls, Named) else own)


def _group_of(field: FieldInfo) -> type[Settings] | None:
    """The group that a field holds, also one that may be left out."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), None)


def merged_layers(layers: Sequence[Entry], own: int, cls: type[Settings], where: str) -> Entry:
    """Layers of `cls`, each of which adds to those before it. Lists are replaced whole. A choice that names another one
    drops the settings of the former; but the last `own` layers were given in one go, and none of them drops what
    another one gives. where: the place of what no layer has."""
    choices = dict(choices_of(cls))
    spelled = [_spell_out(layer, choices, "") for layer in layers]
    first = len(spelled) - own
    given = spelled[:first]
    if own:
        given.append(reduce(lambda lower, upper: _merge(lower, upper, {}, ""), spelled[first:]))
    return reduce(lambda lower, upper: _merge(lower, upper, choices, ""), given, Entry({}, where))


def _spell_out(entry: Entry, choices: Mapping[str, NamedChoice], path: str) -> Entry:
    """Bare names as mappings: `algorithm: gspo` becomes `algorithm: {name: gspo}`, `model: demo` `{path: demo}`."""
    choice = choices.get(path)
    bare = choice.key if choice is not None and choice.own is None else BARE.get(path)
    if bare is not None and isinstance(entry.value, str | list):
        return Entry({bare: entry}, entry.where)
    if not isinstance(entry.value, dict):
        return entry
    return Entry({key: _spell_out(e, choices, _join(path, key)) for key, e in entry.value.items()}, entry.where)


def _merge(lower: Entry, upper: Entry, choices: Mapping[str, NamedChoice], path: str) -> Entry:
    if not (isinstance(lower.value, dict) and isinstance(upper.value, dict)):
        return upper
    merged, choice = dict(lower.value), choices.get(path)
    if choice is not None and choice.key in upper.value:
        former = lower.value[choice.key].value if choice.key in lower.value else choice.default
        if former is not None and _same_case(upper.value[choice.key].value) != _same_case(former):
            if choice.own is None:
                return upper
            merged.pop(choice.own, None)
    for key, entry in upper.value.items():
        merged[key] = _merge(merged[key], entry, choices, _join(path, key)) if key in merged else entry
    return Entry(merged, lower.where)


def _same_case(name: Any) -> Any:
    return name.lower() if isinstance(name, str) and ":" not in name else name


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
