"""The folder that a run leaves behind: who may write to it, when a run continues in it, and whole files or none.

config.yaml  versions.json  metrics.jsonl  rollouts/  checkpoints/  final/  report.html
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import foveate
from foveate.config.base import Settings
from foveate.config.recipe import flatten, read_values, values_to_yaml
from foveate.errors import ConfigError, DataError
from foveate.files import (
    LOCK_FILES,
    OtherSchema,
    atomic_write_text,
    disk_error,
    held,
    keep,
    read_sealed,
    remove,
    require_held,
    sealed,
    set_disk_wait,
)
from foveate.log import MASK, masked_values
from foveate.registry import shown_names

logger = logging.getLogger(__name__)

FREE = (
    "run", "eval.*", "cluster.*", "log.*", "train.save_every", "train.save_async", "train.keep_checkpoints",
    "train.disk_wait", "data.workers", "data.image_workers", "reward.workers",
)  # fmt: skip
"""Settings that may differ when a run continues: none of them reaches the weights, so that it stays bitwise equal to an
uninterrupted one. Evaluation draws from generators of its own. Threads and micro-batches are not here: they change the
order in which floats are summed. cluster.* is free although ranks add up floats in another order: a run goes on with
the machines that there are. train.steps has a rule of its own."""

NEVER = (
    "model.lora", "model.quantization", "model.trainable", "model.dtype", "optim.name", "optim.settings",
    "algorithm.critic",
)  # fmt: skip
"""Settings without which a checkpoint cannot be restored. All others may differ where the user accepts it."""

SCHEMA = 2
"""The layout of run folders: counted on when folders that were made before cannot be continued or read any more."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of a run. `open_run` makes the folder and gives the right to write to it."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved settings, themselves a recipe."""
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        """A JSON object with the versions of foveate, its libraries and the folder's layout at the last start."""
        return self.path / "versions.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per step (`foveate.log.MetricsWriter`)."""
        return self.path / "metrics.jsonl"

    @property
    def changes(self) -> Path:
        """The changes of its inputs that were accepted, one JSON object per start that had any."""
        return self.path / "changes.jsonl"

    @property
    def skipped(self) -> Path:
        """The rows that were left out as bad, one per line."""
        return self.path / "skipped.txt"

    @property
    def warnings(self) -> Path:
        """The kinds of waste that the run has shown, each a JSON object with the step (`foveate.train.waste`)."""
        return self.path / "warnings.jsonl"

    @property
    def rollouts(self) -> Path:
        """Folder of sampled answers with their scores."""
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """Folder of everything that a continued run needs, one entry per saved step."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Folder of the trained model; of a cascade that of its last stage."""
        stages = (self, *(RunFolder(self.path / name) for name in ("vir", "rl")))
        return next((run.final for run in stages if run.final.exists()), stages[-1].final)

    @property
    def final(self) -> Path:
        """Folder of the trained model, in the format it came in."""
        return self.path / "final"

    @property
    def report(self) -> Path:
        return self.path / "report.html"


@contextmanager
def open_run(
    path: str | Path,
    settings: Settings,
    *,
    frozen: bool = False,
    accept_changes: bool = False,
    disk_wait: float = 0.0,
) -> Iterator[RunFolder]:
    """Make the folder of a run, or enter that of a run that continues, and hold it alone until the block ends.

    A run continues with the settings that it began with; one that has left nothing yet may still change all of them.
    Free to change later are those of FREE and, where the learning rate does not depend on it, a larger train.steps;
    with `accept_changes` all but those of NEVER; nothing where `frozen`. What fails before it has left anything leaves
    no folder. Within the block this process waits up to `disk_wait` seconds for room on a full disk.

    Raises:
        ConfigError: the folder belongs to something else, to a run with other settings or of another version of
            foveate, or is in use by a process.
        DiskError: the folder cannot be written.
    """
    if any(ord(character) < 32 for character in str(path)):
        raise ConfigError(f"run={str(path)[:100]!r}: holds control characters; choose another name")
    run, values = RunFolder(Path(path)), _values_of(settings)
    _refuse_foreign(run)
    _make_folders(run)
    with held(run.path, "another run="):
        for folder in (run.path, run.rollouts, run.checkpoints):
            for leftover in folder.glob(".*.tmp"):
                remove(leftover)
        last = _continued(run, values, frozen, accept_changes)
        former = set_disk_wait(disk_wait)
        try:
            atomic_write_text(run.config, values_to_yaml(values))
            _record_versions(run, last)
            keep(run.config)
            yield run
        except BaseException:
            with suppress(OSError):  # which would hide the error; a folder that is another one by now is left alone
                require_held(run.path)
                if not _has_begun(run):
                    _remove_start(run)
            raise
        finally:
            set_disk_wait(former)


def check_folder(path: str | Path, settings: Settings, *, frozen: bool = False, accept_changes: bool = False) -> None:
    """Raise what `open_run` would raise about what lies in the folder, and write nothing."""
    run, values = RunFolder(Path(path)), _values_of(settings)
    _refuse_foreign(run)
    _continued(run, values, frozen, accept_changes)


def _continued(
    run: RunFolder, values: Mapping[str, Any], frozen: bool, accept_changes: bool
) -> Mapping[str, Any] | None:
    """The versions that a run which has begun was last done with, if its settings let it continue; None for others."""
    if not (run.config.is_file() and _has_begun(run)):
        return None
    last = _last_versions(run)
    _refuse_other_settings(run, values, frozen, accept_changes)
    return last


# ------------------------------------------------------------------------------------------------ whose folder it is


def _refuse_foreign(run: RunFolder) -> None:
    """A folder with files of something else is left alone; a start that was killed at once leaves only our own."""
    if run.path.exists() and not run.path.is_dir():
        raise ConfigError(f"{run.path} is a file, not a folder; choose another run=")
    if run.config.is_file() or not run.path.is_dir():
        return
    ours = {run.rollouts.name, run.checkpoints.name}
    foreign = [entry.name for entry in run.path.iterdir() if entry.name not in ours and not entry.name.startswith(".")]
    if foreign:
        raise ConfigError(
            f"{run.path} is not the folder of a run: it holds {min(foreign)} and no config.yaml; choose another run="
        )


def _values_of(settings: Settings) -> dict[str, Any]:
    """The settings as they are written down: keys and passwords masked. Raises ConfigError for one that is a mask, as
    in the config.yaml of a run."""
    values = settings.model_dump(mode="json")
    for name, value in flatten(values).items():
        if isinstance(value, str) and MASK in value:
            raise ConfigError(f"{name} is {value!r}: a key that was masked in a config.yaml; give the key itself")
    return masked_values(values)


def _make_folders(run: RunFolder) -> None:
    try:
        for folder in (run.path, run.rollouts, run.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(run.path, error) from error


def _has_begun(run: RunFolder) -> bool:
    """Whether there is anything to continue: a file with content that every start does not write anew."""
    return any(file.is_file() and file not in _of_a_start(run) and file.stat().st_size for file in run.path.rglob("*"))


def _of_a_start(run: RunFolder) -> tuple[Path, ...]:
    return run.config, run.versions, run.skipped, *(run.path / name for name in LOCK_FILES)


def _remove_start(run: RunFolder) -> None:
    """Take back the files and folders of a start; a folder with anything else in it stays."""
    for file in (*_of_a_start(run), run.metrics):
        file.unlink(missing_ok=True)
    for folder in (run.rollouts, run.checkpoints, run.path):
        if not any(folder.iterdir()):
            folder.rmdir()


def _last_versions(run: RunFolder) -> Mapping[str, Any]:
    """The versions of the last start. Raises ConfigError for a folder of another layout, DataError for edited ones."""
    try:
        if not run.versions.is_file():
            raise OtherSchema(0)
        return read_sealed(run.versions, SCHEMA)
    except OtherSchema as other:
        raise ConfigError(
            f"{run.path} has the layout (schema {other.found}) of another version of foveate, this one continues "
            f"schema {SCHEMA}; choose another run=, delete {run.path} to start over, or continue it with that version"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{run.versions}: cannot be read ({error}); put back what the run wrote, or choose another run="
        ) from None


def _refuse_other_settings(run: RunFolder, values: Mapping[str, Any], frozen: bool, accept_changes: bool) -> None:
    old, new = flatten(read_values(run.config)), flatten(values)
    if frozen:
        changed, free = [name for name in {**new, **old} if old.get(name) != new.get(name)], "nothing may change here"
    else:
        changed = [name for name in settings_changes(old, new) if not accept_changes or _matches(name, NEVER)]
        free = (
            f"free to change are {', '.join(FREE)} and more train.steps at a constant learning rate; --accept-changes "
            f"takes all others but {', '.join(NEVER)}; `run=NEW model.path={run.checkpoints}/latest` begins from its "
            "weights under any settings"
        )
    if not changed:
        return
    name = changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    raise ConfigError(
        f"{run.path} belongs to a run with other settings: {change_in_words(name, old, new)}"
        f"{_reason(name, new)}{more}; choose another run=, or delete {run.path} to start over; {free}"
    )


def lasting_settings(settings: Settings) -> dict[str, Any]:
    """The settings by dotted path, as they are written down, without those that are free to change."""
    return {name: value for name, value in flatten(_values_of(settings)).items() if not _matches(name, FREE)}


def settings_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings that differ and are not free to."""
    changed = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    return [name for name in changed if not _may_change(name, old, new)]


def change_in_words(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How a setting differs. Of a function that Python code has passed: that its source does."""
    was, now, own = _shown(old, name), _shown(new, name), shown_names(name)
    is_key = own != name and all(any(shown_names(other) == own for other in one) for one in (old, new))
    if is_key or (was != now and shown_names(was) == shown_names(now)):
        function = own.rpartition(".")[2] if is_key else json.loads(shown_names(now))
        return f"{own}: the source of the function {function} changed, or a value that it holds"
    return f"{name} was {was}, now {now}"


def _may_change(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if name == "train.steps" and name in old and name in new:
        return new["optim.schedule"] == "constant" and new[name] > old[name]
    return _matches(name, FREE)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a setting is one of some, or lies in one of them."""
    return any(f"{name}.".startswith(f"{pattern.removesuffix('.*')}.") for pattern in patterns)


def _reason(name: str, new: Mapping[str, Any]) -> str:
    if name != "train.steps":
        return ""
    schedule = new["optim.schedule"]
    return " (it can only grow)" if schedule == "constant" else f" (the {schedule} schedule ends at the last step)"


def _shown(values: Mapping[str, Any], name: str) -> str:
    return json.dumps(values[name], ensure_ascii=False) if name in values else "not set"


# --------------------------------------------------------------------------------------------------------- versions


def _record_versions(run: RunFolder, last: Mapping[str, Any] | None) -> None:
    """Write what this start runs on; when a run continues on something else than the `last` time, say so."""
    now = _versions()
    if last is not None:
        changes = ", ".join(f"{name} {last.get(name)} -> {now[name]}" for name in now if last.get(name) != now[name])
        if changes:
            logger.warning("%s continues with other versions, so maybe not bit for bit: %s", run.path, changes)
    atomic_write_text(run.versions, sealed(now))


def _versions() -> dict[str, str | int | None]:
    return {
        "schema": SCHEMA,
        "foveate": foveate.__version__,
        "git": _git_revision(),
        "python": sys.version.split()[0],
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }


def _git_revision() -> str | None:
    """The commit of foveate's own source tree, `+changes` when files differ from it; None when it is installed."""
    root = Path(foveate.__file__).parent.parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True).stdout.strip()

    revision = git("rev-parse", "--verify", "--quiet", "HEAD")
    changes = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{revision}{changes}" if revision else None
