"""Lists of what there is to choose from, told from the code: settings, recipes, rewards, environments, algorithms."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from foveate.algorithms.table import ADVANTAGES, ALGORITHMS, POLICY_LOSSES, PREFERENCE_LOSSES
from foveate.config.base import Settings
from foveate.config.recipe import SHIPPED, find_recipe, read_values
from foveate.config.runs import STAGES, is_group, walk
from foveate.environments import ENVIRONMENTS, TOOLS
from foveate.environments.build import schema_of
from foveate.environments.protocol import EnvironmentLimits
from foveate.errors import ConfigError
from foveate.registry import resolve, suggestion
from foveate.rewards import REWARDS


@dataclass(frozen=True, slots=True)
class ListEntry:
    """One line of a list: its name, what it may be and is by default (empty where that says nothing), what it does."""

    name: str
    kind: str
    default: str
    text: str

    def __str__(self) -> str:
        given = ", ".join(part for part in (self.kind, self.default) if part)
        return f"{self.name}{f'  ({given})' if given else ''}\n    {self.text}"


def only(listed: Sequence[ListEntry], name: str | None, kind: str) -> list[ListEntry]:
    """The entries of one name, or of one after a word such as `loss`; all without one. Raises ConfigError for an
    unknown name."""
    if name is None:
        return list(listed)
    words = ("algorithm", "advantage", "loss", "preference loss", "tool")
    names = [name.lower(), *(f"{word} {name.lower()}" for word in words)]
    found = [entry for entry in listed if entry.name in names]
    if not found:
        known = dict.fromkeys(entry.name.rpartition(" ")[2] for entry in listed)
        raise ConfigError(f"no {kind} {name!r}{suggestion(name.lower(), known, then='known')}: {', '.join(known)}")
    return found


# ------------------------------------------------------------------------------------------------------------ settings


def settings_list(stage: str = "rl", group: str | None = None) -> list[ListEntry]:
    """The settings of a stage, or of one group or setting of it. Raises ConfigError for an unknown one."""
    listed = [(path, field) for path, field in walk(STAGES[stage]) if not is_group(field)]
    if group is not None:
        chosen = [one for one in listed if one[0] == group or one[0].startswith(f"{group}.")]
        if not chosen:
            groups = {path.partition(".")[0] for path, _ in listed}
            raise ConfigError(
                f"no setting {group!r} in stage {stage}{suggestion(group, [*groups, *dict(listed)], then='groups')}: "
                f"{', '.join(sorted(groups))}"
            )
        listed = chosen
    return [line for path, field in listed for line in _setting(path, field)]


def _setting(path: str, field: FieldInfo) -> Iterator[ListEntry]:
    yield ListEntry(path, _kind(field.annotation), _default(field), field.description or "")
    for model in _optional_groups(field.annotation):  # `algorithm.critic` and the like: null, or a group
        for name, inner in walk(model, f"{path}."):
            if not is_group(inner):
                yield ListEntry(name, _kind(inner.annotation), _default(inner), inner.description or "")


def _optional_groups(annotation: Any) -> list[type[Settings]]:
    return [one for one in get_args(annotation) if isinstance(one, type) and issubclass(one, Settings)]


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default.model_dump(mode="json") if isinstance(field.default, Settings) else field.default
    return f"default {json.dumps(value, default=list, ensure_ascii=False)}"


def _kind(annotation: Any) -> str:
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin is tuple:
        return f"list of {_kind(get_args(annotation)[0])}"
    if origin is dict or annotation is dict:
        return "mapping"
    if origin in (Union, type(int | None)):
        return " or ".join(_kind(one) for one in get_args(annotation))
    if get_args(annotation):
        return _kind(get_args(annotation)[0])
    is_settings = isinstance(annotation, type) and issubclass(annotation, Settings)
    return "group" if is_settings else names.get(annotation, str(annotation))


def settings_page() -> str:
    """`docs/settings.md`: the settings of all stages, those of `rl` first and of the others what differs."""
    parts = [
        "# Settings\n\n    foveate settings rollout     # one group, in the terminal\n\n"
        "All settings, written by `foveate settings --markdown`. A recipe sets them by group, the "
        "command line by\npath (`train.steps=100`), Python by either.\n"
    ]
    known: dict[str, ListEntry] = {}
    for stage in ("rl", "sft", "mpo", "cascade", "vico", "vir"):
        own = [one for one in settings_list(stage) if known.get(one.name) != one]
        known |= {one.name: one for one in own}
        parts.append(f"\n## foveate {stage}\n")
        if stage != "rl":
            parts.append("\nWhere it differs from the stages above.\n")
        parts.append("\n| setting | values | default | meaning |\n| --- | --- | --- | --- |\n")
        for one in own:
            cells = (f"`{one.name}`", one.kind, f"`{one.default.removeprefix('default ')}`", one.text)
            parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(parts)


# ------------------------------------------------------------------------------------- recipes, rewards and algorithms


def recipes_list(name: str | None = None) -> list[ListEntry] | str:
    """The shipped recipes with the first sentence of each, or the text of one. Raises ConfigError for an unknown."""
    if name is not None:
        return find_recipe(name).read_text(encoding="utf-8")
    return [
        ListEntry(path.stem, _stage_of(read_values(path)), "", _comment(path.read_text("utf-8"))) for path in _shipped()
    ]


def _shipped() -> list[Any]:
    return sorted(SHIPPED.glob("*.yaml"))


def _stage_of(values: Mapping[str, Any]) -> str:
    return f"from {values['base']}" if "base" in values else ""


def _comment(text: str) -> str:
    """The first sentence of the comment at the top."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    return _sentence(" ".join(lines))


def rewards_list(name: str | None = None) -> list[ListEntry]:
    """The known rewards: their settings, and their first sentence, of one asked for all that it says; of one whose
    library is missing, what it needs."""
    listed = [_reward(known, one.function) for known, one in REWARDS.items()]
    return [_in_full(entry, REWARDS[entry.name].function, "reward", name) for entry in only(listed, name, "reward")]


def _in_full(entry: ListEntry, path: str, kind: str, asked: str | None) -> ListEntry:
    """The entry, with its whole description where it was asked for by name."""
    if asked is None:
        return entry
    try:
        text = inspect.getdoc(resolve({}, path, kind)) or ""
    except ConfigError:
        return entry
    return replace(entry, text=text.replace("\n", "\n    "))


def _reward(name: str, path: str) -> ListEntry:
    try:
        return _function(name, resolve({}, path, "reward"))
    except ConfigError as error:
        return ListEntry(name, "", "", str(error))


def environments_list(name: str | None = None) -> list[ListEntry]:
    """The known environments with their settings, the limits of all, and the tools that `tools` can use; or one."""
    found = [_function(known, schema_of(resolve({}, path, "environment"))) for known, path in ENVIRONMENTS.items()]
    described = [
        replace(entry, text=_sentence(inspect.getdoc(resolve({}, ENVIRONMENTS[entry.name], "environment")) or ""))
        for entry in found
    ]
    limits = ", ".join(f"{name}={value}" for name, value in asdict(EnvironmentLimits()).items())
    every = ListEntry("every environment", limits, "", "Limits of turns, and of the text and images of a step.")
    tools = [_function(f"tool {known}", resolve({}, path, "tool")) for known, path in TOOLS.items()]
    return only([*described, every, *tools], name, "environment or tool")


def algorithms_list(asked: str | None = None) -> list[ListEntry]:
    """The named algorithms: advantage, loss and paper of each; then the advantages and losses to combine; or those of
    one name."""
    rows = [
        ListEntry(
            f"algorithm {name}",
            f"advantage {row.advantage}, loss {row.loss}",
            "",
            f"arXiv {row.source}" if row.source else "",
        )
        for name, row in ALGORITHMS.items()
    ]
    tables = {"advantage": ADVANTAGES, "loss": POLICY_LOSSES, "preference loss": PREFERENCE_LOSSES}
    parts = [
        _function(f"{kind} {name}", resolve({}, path, kind))
        for kind, table in tables.items()
        for name, path in table.items()
    ]
    return only([*rows, *parts], asked, "algorithm")


def _function(name: str, function: Any) -> ListEntry:
    parameters = inspect.signature(function).parameters.values()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    settings = (p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in keywords)
    return ListEntry(name, ", ".join(settings), "", _sentence(inspect.getdoc(function) or ""))


def _sentence(text: str) -> str:
    head, stop, _ = " ".join(text.split("\n\n")[0].split()).partition(". ")
    return head + stop.strip()
