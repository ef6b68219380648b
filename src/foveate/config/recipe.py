"""Recipes: YAML files of settings, one optional `base:` each, changed by `a.b=value` overrides on the command line.

Values follow YAML 1.2: `1e-6` is a number, and only `true` and `false` are booleans. Every value remembers the line or
the override that it came from, so that a message can name it. Aliases and tags are refused.
"""

from __future__ import annotations

import importlib.resources
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
import yaml.composer
from pydantic import ValidationError

from foveate.config.base import Settings
from foveate.config.layers import merged_layers
from foveate.config.problems import PYTHON, Entry, first_problem
from foveate.config.runs import STAGES, StageName, walk
from foveate.errors import ConfigError, one_line
from foveate.registry import suggestion

MOST_CHARACTERS, MOST_DEPTH, MOST_DIGITS = 1_000_000, 32, 300
"""Bounds of a recipe."""
SHIPPED = Path(str(importlib.resources.files("foveate"))) / "recipes"

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False, ".inf": math.inf, "-.inf": -math.inf}

logger = logging.getLogger(__name__)
SettingsT = TypeVar("SettingsT", bound=Settings)


def load_recipe(path: str | Path, overrides: Sequence[str], cls: type[SettingsT]) -> SettingsT:
    """The settings of a recipe, a file or the name of a shipped one (`shapes_gspo`): its base, its own, and each
    override (`group.name=value`, see `read_value`) in turn. Raises ConfigError with the file and line, or the override,
    of the first problem."""
    layers, own = _layers(path, overrides)
    return _combined(layers, own, cls, str(path))


def read_recipe(path: str | Path, overrides: Sequence[str], stage: StageName | None = None) -> Any:
    """`load_recipe` with the settings of `stage`; None: of the first stage that has all groups, and all settings of
    `data` and `train`, that are given."""
    layers, own = _layers(path, overrides)
    return _combined(layers, own, STAGES[stage] if stage else _first_fitting(layers), str(path))


def _first_fitting(layers: Sequence[Entry]) -> type[Settings]:
    given: set[str] = set()
    for values in map(_plain, layers):
        given |= values.keys() | {name for name in flatten(values) if name.startswith(("data.", "train.", "eval."))}
    return next((cls for cls in STAGES.values() if given <= {known for known, _ in walk(cls)}), STAGES["rl"])


def settings_of(values: Mapping[str, Any], cls: type[SettingsT], base: str | Path | None = None) -> SettingsT:
    """The settings that are given as Python values, over those of a recipe where one is the `base`.

    A key is a group (`optim={"lr": 1e-5}`), a dotted path ("optim.lr"), or the name of a setting where only one group
    has it (`lr`). Raises ConfigError as `load_recipe`, for a key that names nothing, and for one that names several.
    """
    given = [_python_layer(key, value, cls) for key, value in values.items()]
    layers = [*(_layers(base, ())[0] if base is not None else ()), *given]
    return _combined(*_with_shorter_warmups(layers, len(given)), cls, PYTHON)


def _python_layer(key: str, value: Any, cls: type[Settings]) -> Entry:
    where = f"argument {key}"
    known = [path for path, _ in walk(cls)]
    alike = [path for path in known if path.rpartition(".")[2] == key]
    if key not in known and len(alike) > 1:
        raise ConfigError(
            f"{where}: is the name of several settings: {', '.join(alike)}; write one of them out, as in "
            f"**{{{alike[0]!r}: ...}}"
        )
    path = key if key in known or not alike else alike[0]
    return _nested(path.split("."), _python_entry(value, where))


def _python_entry(value: Any, where: str) -> Entry:
    if isinstance(value, Mapping):
        return Entry({str(key): _python_entry(one, f"{where}: {key}") for key, one in value.items()}, where)
    return Entry(str(value) if isinstance(value, Path) else value, where)


def find_recipe(name: str | Path, shipped: Path = SHIPPED) -> Path:
    """The file of a recipe: a path, else one in the folder `shipped`, with or without `recipes/` and `.yaml`."""
    _refuse_data(Path(name))
    return Path(name) if os.path.isfile(name) else _find_shipped(Path(str(name)[:300]), shipped)


def _refuse_data(name: Path) -> None:
    if name.suffix in (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".arrow", ".gz") and os.path.exists(name):
        raise ConfigError(
            f"{name} holds rows, and a recipe is wanted, a YAML file: give one, and the rows as data.train={name}"
        )


def _find_shipped(name: Path, shipped: Path) -> Path:
    known = sorted(path.stem for path in shipped.glob("*.yaml"))
    stem = name.name.removesuffix(".yaml")
    if name.parent in (Path(), Path("recipes")) and stem in known:
        return shipped / f"{stem}.yaml"
    alike = [one for one in known if stem and stem in one]
    near = f"; did you mean {' or '.join(alike)}? Give" if 0 < len(alike) < 6 else suggestion(stem, known, then="give")
    raise ConfigError(
        f"no recipe {str(name)!r}{near} the path of a YAML file or one of the shipped: {', '.join(known)}"
    )


def read_values(path: Path) -> dict[str, Any]:
    """The values of one YAML file as they stand, without base, defaults or checks of the settings."""
    return _plain(_read_file(path))


def read_value(text: str, where: str) -> Any:
    """The value of an override: YAML where it starts with `[`, `{` or a quote, else one scalar to its end; no value is
    null. Raises ConfigError that begins with `where`."""
    return _plain(_written(text.strip(), where, free=True))


def to_yaml(settings: Settings) -> str:
    """Settings as YAML that `load_recipe` reads back to equal settings."""
    return values_to_yaml(settings.model_dump(mode="json"))


def values_to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read_values` reads back to equal ones."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted path; an empty mapping is a value."""
    flat = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


# -------------------------------------------------------------------------------------------------------- reading


class _Loader(yaml.BaseLoader):
    """Composes nodes whose scalars are all text, and refuses aliases, which could make a value contain itself, and
    values that are nested deeper than any setting."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed; write the value out", mark)
        if self.depth == MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_DEPTH} levels deep", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every string that would be read back as something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _layers(path: str | Path, overrides: Sequence[str]) -> tuple[list[Entry], int]:
    """The layers of a recipe with overrides, and how many of them, the last, come from these."""
    layers = [*_read_with_base(find_recipe(path), ()), *map(_read_override, overrides)]
    return _with_shorter_warmups(layers, len(overrides))


def _read_with_base(path: Path, chain: tuple[Path, ...]) -> list[Entry]:
    """The layers of a recipe file, its base first; `chain` holds the files that led here."""
    entry = _read_file(path)
    chain = (*chain, path)
    if "base" not in entry.value:
        return [entry]
    base = entry.value["base"]
    if not isinstance(base.value, str):
        raise ConfigError(f"{base.where}: base must be the path of one recipe, found {_plain(base)!r}")
    beside = path.parent / base.value
    try:
        found = beside if beside.is_file() else _find_shipped(Path(base.value), SHIPPED)
    except ConfigError as error:
        raise ConfigError(f"{base.where}: base is relative to {path.parent}/: {error}") from None
    if found.resolve() in [file.resolve() for file in chain]:
        circle = " -> ".join(str(file) for file in (*chain, found))
        raise ConfigError(f"{base.where}: base goes in a circle: {circle}; remove one of these base lines")
    own = Entry({key: value for key, value in entry.value.items() if key != "base"}, entry.where)
    return [*_read_with_base(found, chain), own]


def _read_file(path: Path) -> Entry:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe: {error}") from None
    entry = _compose(text, str(path), inline=False)
    if entry.value is None:
        return Entry({}, str(path))
    if not isinstance(entry.value, dict):
        raise ConfigError(f"{entry.where}: a recipe is a mapping of settings (name: value), found {entry.value!r:.60}")
    return entry


def _read_override(text: str) -> Entry:
    where = f"override {text!r}"
    path, equals, written = (part.strip() for part in text.partition("="))
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{where}: an override is written group.name=value, such as train.steps=100")
    return _nested(keys, _written(written, where, free=any(map(_is_free, keys))))


def _written(text: str, where: str, free: bool) -> Entry:
    inline = text.startswith(("[", "{", "'", '"'))
    return _compose(text, where, inline=True, free=free) if inline else Entry(_scalar(text), where)


def _nested(keys: Sequence[str], entry: Entry) -> Entry:
    """A value below the names that lead to it."""
    for key in reversed(keys):
        entry = Entry({key: entry}, entry.where)
    return entry


def _compose(text: str, source: str, inline: bool, free: bool = False) -> Entry:
    """YAML text as an entry; places are `source` itself for an inline value, else `source:line`. free: see `_entry`."""
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{source}: has {len(text):,} characters; a recipe has {MOST_CHARACTERS:,} at most")
    try:
        node = yaml.compose(text, Loader=_Loader)
        return Entry(None, source) if node is None else _entry(node, source, inline, free=free)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = source if inline or mark is None else f"{source}:{mark.line + 1}"
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {one_line(error)}") from None


def _entry(node: yaml.Node, source: str, inline: bool, where: str = "", free: bool = False) -> Entry:
    """`where` is the line of the key, which may stand above its value. free: names in it are not foveate's own, so
    that they may have dots, as the sources of data do."""
    where = where or _line(node, source, inline)
    if not node.tag.startswith("tag:yaml.org,2002:"):
        raise ConfigError(f"{where}: the tag {node.tag} is not allowed; write a plain value")
    if isinstance(node, yaml.ScalarNode):
        return Entry(node.value if node.style else _scalar(node.value), where)
    if isinstance(node, yaml.SequenceNode):
        return Entry([_plain(_entry(item, source, inline, free=free)) for item in node.value], where)
    entries: dict[str, Entry] = {}
    for key, value in node.value:
        line = _line(key, source, inline)
        name = _key(key, line, free)
        if name in entries:
            raise ConfigError(f"{line}: {name} is set twice, first at {entries[name].where}; keep one of them")
        entries[name] = _entry(value, source, inline, line, free or _is_free(name))
    return Entry(entries, where)


def _line(node: yaml.Node, source: str, inline: bool) -> str:
    return source if inline or node.start_mark is None else f"{source}:{node.start_mark.line + 1}"


def _is_free(name: str) -> bool:
    """Whether a setting holds those of a function or another program: `settings`, `engine_settings`."""
    return name.endswith("settings")


def _key(node: yaml.Node, where: str, free: bool) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{where}: the name of a setting must be a plain word")
    if "." in node.value and not free:
        group, _, rest = node.value.partition(".")
        raise ConfigError(f"{where}: dotted names are for the command line; write `{group}:` and, indented, `{rest}:`")
    return node.value


def _scalar(text: str) -> Any:
    """An unquoted scalar by the rules of YAML 1.2 (YAML 1.1 reads 1e-6 as text, `no` as false and 1:30 as 90)."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > MOST_DIGITS:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


# -------------------------------------------------------------------------------------------------------- merging


def _combined(layers: Sequence[Entry], own: int, cls: type[SettingsT], where: str) -> SettingsT:
    """The settings of layers, as `merged_layers`."""
    merged = merged_layers(layers, own, cls, where)
    try:
        return cls.model_validate(_plain(merged))
    except ValidationError as error:
        raise ConfigError(first_problem(error, merged, cls)) from None


def _with_shorter_warmups(layers: Sequence[Entry], own: int) -> tuple[list[Entry], int]:
    """The layers with `_shorter_warmups` behind them, and how many of them, the last, were given over a recipe."""
    shorter = _shorter_warmups(layers, own)
    return [*layers, *shorter], own + len(shorter)


def _shorter_warmups(layers: Sequence[Entry], own: int) -> list[Entry]:
    """The warm-ups of a recipe that are longer than the run which the last `own` layers ask for, as a share of it as in
    the recipe."""
    shorter = []
    for prefix in ("", *(f"{stage}." for stage in STAGES)):
        warmup, steps = f"{prefix}optim.warmup_steps", f"{prefix}train.steps"
        (old, _), (was, _) = (_last_given(layers[: len(layers) - own], path) for path in (warmup, steps))
        (mine, _), (new, where) = (_last_given(layers[len(layers) - own :], path) for path in (warmup, steps))
        if mine is None and isinstance(old, int) and isinstance(new, int) and 0 < new < old:
            value = old * new // was if isinstance(was, int) and was >= old else 0
            logger.info("%s is %d in the recipe, more than %s=%d: shortened to %d", warmup, old, steps, new, value)
            shorter.append(_nested(warmup.split("."), Entry(value, where)))
    return shorter


def _last_given(layers: Sequence[Entry], path: str) -> tuple[Any, str]:
    """The value of a setting in the last of some layers that has it, and its place; None where none has."""
    for layer in reversed(layers):
        entry = layer
        for key in path.split("."):
            if not isinstance(entry.value, dict) or key not in entry.value:
                break
            entry = entry.value[key]
        else:
            return entry.value, entry.where
    return None, ""


def _plain(entry: Entry) -> Any:
    return {key: _plain(e) for key, e in entry.value.items()} if isinstance(entry.value, dict) else entry.value
