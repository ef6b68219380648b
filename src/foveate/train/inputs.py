"""The inputs of a run, named by content: data, code, model folder and settings.

Each checkpoint holds these fingerprints. A run that continues with others would be neither the run that it was nor a
new one, so it is refused, unless the change is accepted; then it is written down in `changes.jsonl` of the run.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveate.config.run_base import RunSettings
from foveate.config.runs import RLSettings, VirSettings
from foveate.data.table import TaskTable
from foveate.errors import DataError
from foveate.files import add_json_line
from foveate.log import read_metrics
from foveate.models.adapters import adapter_folder
from foveate.models.checkpoint.inspect import resolve_folder
from foveate.models.checkpoint.small_files import content_of
from foveate.records import Task
from foveate.run_folder import RunFolder, change_in_words, lasting_settings, settings_changes

logger = logging.getLogger(__name__)

SAMPLED_ROWS = 256
_MODEL_FILES = (".json", ".jinja", ".model", ".safetensors", ".txt")
MOST_CODE_FILES = 1000
_INSTALLED = ("site-packages", "dist-packages", f"python{sys.version_info[0]}.{sys.version_info[1]}")
"""Folders whose packages are no code of the run."""
_CODE = ("algorithm", "environment", "loss", "optim", "reward", "rollout")
"""Groups of settings that name code."""

Fingerprints = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a run as they are now, by name, and whether others than before are accepted."""

    found: Fingerprints
    accept_changes: bool

    @classmethod
    def of(cls, settings: RunSettings, tables: Mapping[str, TaskTable | None], *, accept_changes: bool) -> Inputs:
        """tables: the rows that the run reads, by the setting that names their files."""
        found: dict[str, Any] = {f"setting {name}": value for name, value in lasting_settings(settings).items()}
        for name, table in tables.items():
            if table is not None:
                found |= _data(name, table)
        for name, file in sorted(set(_code(settings))):
            key = f"code {name}"
            found[f"{key} ({file.parent.name})" if key in found else key] = content_of(file)
        found |= _folder("model", resolve_folder(settings.model.path))
        if settings.model.lora is not None and settings.model.lora.adapter is not None:
            found |= _folder("adapter", adapter_folder(settings.model.lora.adapter))
        if isinstance(settings, VirSettings):
            found |= _folder("reference", resolve_folder(settings.train.reference))
        teacher = settings.algorithm.teacher if isinstance(settings, RLSettings) else None
        for number, path in enumerate(teacher.folders if teacher is not None else (), start=1):
            found |= _folder(f"teacher {number}", resolve_folder(path))
        return cls(json.loads(json.dumps(found)), accept_changes)

    def check(self, run: RunFolder, step: int, before: Any) -> bool:
        """Compare with the inputs `before` of a checkpoint of `step`. Returns whether there are changes, which were
        accepted, now or by an earlier start. Raises DataError for changes that were not."""
        if not isinstance(before, dict):
            raise DataError(f"{run.checkpoints}: the checkpoint of step {step} does not say what it was made from")
        changes = [*_changes(before, self.found)]
        if not changes:
            return False
        if not self.accept_changes and self.digest not in _accepted(run):
            more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
            raise DataError(
                f"{run.path} was made from other inputs: {'; '.join(changes[:3])}{more}; bring them back, or continue "
                "with these by --accept-changes, or begin from its weights: "
                f"run=NEW model.path={run.checkpoints}/latest"
            )
        for change in changes:
            logger.warning("accepted: %s", change)
        if self.digest not in _accepted(run):
            add_json_line(run.changes, {"step": step, "inputs": self.digest, "changes": changes})
        return True

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.found, sort_keys=True).encode()).hexdigest()


def _changes(before: Fingerprints, now: Fingerprints) -> Iterator[str]:
    """The differences in words; settings by the rules of run folders."""
    prefix = "setting "
    old, new = (
        {name.removeprefix(prefix): value for name, value in one.items() if name.startswith(prefix)}
        for one in (before, now)
    )
    for name in settings_changes(old, new):
        yield change_in_words(name, old, new)
    evaluated = all(any(name.startswith("data.test ") for name in one) for one in (before, now))
    for name in sorted(before.keys() | now.keys(), key=lambda name: (" file " in name, name)):
        if name.startswith(prefix) or (name.startswith("data.test ") and not evaluated):
            continue
        if before.get(name) != now.get(name):
            then, here = before.get(name, "not there"), now.get(name, "not there")
            yield f"{name} was {then}, now {here}"


def _accepted(run: RunFolder) -> set[str]:
    """The inputs that were accepted before."""
    return {accepted["inputs"] for accepted in read_metrics(run.changes)} if run.changes.exists() else set()


# ------------------------------------------------------------------------------------------------------ fingerprints


def _folder(name: str, folder: Path) -> dict[str, Any]:
    """The files of a model folder."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in _MODEL_FILES and file.is_file()]
    return {f"{name} {file.name}": content_of(file) for file in files if not file.name.startswith(".")}


def _data(name: str, table: TaskTable) -> dict[str, Any]:
    """Number of rows, some of the rows with their images, and the files. Their names, not their folders, count."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(table) - 1, min(len(table), SAMPLED_ROWS)).astype(int)):
        digest.update(_row(table[int(index)]))
    files = {f"{name} file {number}: {file.name}": content_of(file) for number, file in enumerate(table.files, start=1)}
    return {f"{name} rows": len(table), f"{name} sampled rows": digest.hexdigest()[:16], **files}


def _row(task: Task) -> bytes:
    """A task with the content of its images."""
    messages = [(message.role, message.content) for message in task.messages]
    images = [
        content_of(image.path) if image.path is not None else hashlib.sha256(image.data or b"").hexdigest()
        for image in (*task.images, *task.videos)
    ]
    return repr((task.id, task.source, messages, images, task.answer, task.meta)).encode("utf-8", "backslashreplace")


def _code(settings: RunSettings) -> Iterator[tuple[str, Path]]:
    """The files of the code that settings name, with what these import from their own folder."""
    values = settings.model_dump(mode="json")
    for group in _CODE:
        for text in _texts(values.get(group)):
            source = _source_of(text)
            for name, file in _with_imports(source).items() if source is not None else ():
                yield f"{group}: {name}", file


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _source_of(text: str) -> Path | None:
    """The file of code that is named `path/to/file.py:name` or `module:name`; None for any other text."""
    module, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        return None
    if module.endswith(".py"):
        return Path(module) if Path(module).is_file() else None
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None


def _with_imports(source: Path) -> dict[str, Path]:
    """A file of code and those files that it imports, themselves or through each other, each by its path from the
    folder of the first: modules and packages beside it, those of its own package, and relative ones. Code that is found
    in other ways (importlib, exec, installed packages) is not among them."""
    first = Path(os.path.realpath(source))
    found = {first: None}
    queue = [first]
    for one in queue:  # grows
        for base, parts in _imported(one):
            for name in range(len(parts)):
                place = base.joinpath(*parts[: name + 1])
                for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
                    real = Path(os.path.realpath(file))
                    if real not in found and real.is_file() and len(found) < MOST_CODE_FILES:
                        found[real] = None
                        queue.append(real)
    return {os.path.relpath(file, first.parent): file for file in found}


def _imported(file: Path) -> Iterator[tuple[Path, list[str]]]:
    """The modules that a file may import: a folder, and names below it. None of a file that is not Python 3."""
    try:
        nodes = [*ast.walk(ast.parse(file.read_bytes()))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    root = file.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    own = file.relative_to(root).parts[0]
    if own == __name__.partition(".")[0]:  # its version is written down elsewhere
        return
    is_alone = file.parent == root and root.name not in _INSTALLED
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            names = [[*module, alias.name] for alias in node.names] or [module]
        else:
            continue
        for parts in names:
            if level := node.level if isinstance(node, ast.ImportFrom) else 0:
                yield [file, *file.parents][level], parts
                continue
            if parts[0] == own or is_alone:
                yield root, parts
            if root.name not in _INSTALLED:
                yield file.parent, parts  # which the code may have put on the path
                yield file.parent, parts[-1:]
                yield file.parent, parts[-2:-1]
