"""A run as Python code and notebooks look at it: its numbers, its curves, its pictures, its model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import ConfigError
from foveate.run_folder import RunFolder

if TYPE_CHECKING:
    import pyarrow as pa

    from foveate.report.notebook import Picture


@dataclass(frozen=True, slots=True, init=False)
class Run:
    """A run folder, also while the run is under way."""

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "path", Path(path))

    @property
    def folder(self) -> RunFolder:
        """The paths of all that the run leaves behind."""
        return RunFolder(self.path)

    @property
    def model(self) -> Path:
        """Folder of the trained model; of a cascade that of its last stage."""
        return self.folder.model

    def push_to_hub(self, name: str) -> str:
        """Upload the trained model with its card to the repository `owner/name` of the Hugging Face Hub, a private one
        where it is new, and return its address. Raises DataError where that fails."""
        from foveate.data.hub import upload_model

        return upload_model(self.model, name)

    @property
    def report(self) -> Path:
        """The page of the run (`report.html`)."""
        return self.folder.report

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The metrics of each step: {"step": 1, "reward/mean": 0.25, ...}."""
        from foveate.log import read_metrics

        return read_metrics(self._existing().folder.metrics)

    @property
    def metrics(self) -> pa.Table:
        """The metrics as a table, a row for each step; null where a step did not measure one. `.to_pandas()` makes it a
        DataFrame."""
        import pyarrow as pa

        rows = self.rows
        names = dict.fromkeys(name for row in rows for name in row)
        return pa.table({name: [row.get(name) for row in rows] for name in names})

    def plot(self, *names: str) -> Picture:
        """The curves of some metrics over the steps, which a notebook shows, those of evaluations from step 0 on; by
        default of the reward, and of the held-out accuracy where there is one. Raises ConfigError for a metric that the
        run has not measured."""
        from foveate.report.notebook import plot
        from foveate.report.page import read_run, rows_with_start

        return plot(rows_with_start(read_run(self._existing().path)), names)

    def evaluate(self, *data: str, out: str | Path | None = None, **options: Any) -> Path:
        """Score the trained model as the run was trained: on its held-out rows or other files of rows, by its reward,
        with its lengths, columns and system message. `options`: further fields of `EvalRequest`. Returns the path of
        the report, in the folder `eval` of the run where `out` names none. Raises DataError for rows that are bad."""
        from foveate.api.of_run import options_of_run
        from foveate.evaluate.evaluate_models import EvalRequest, run_eval
        from foveate.report.page import write_report

        known = options_of_run(self.path, options.get("system"), data=data)
        request = EvalRequest(**{**known, **options}, out=Path(out or self.path / "eval"))
        run_eval(request)
        return write_report(request.out)

    def gallery(self, count: int = 8) -> Picture:
        """Held-out images with the answers of the last evaluation, which a notebook shows. Raises DataError where
        there was none."""
        from foveate.report.notebook import gallery

        return gallery(self._existing().path, count)

    def _existing(self) -> Run:
        if not self.path.is_dir():
            raise ConfigError(f"{self.path}: no such run folder")
        return self

    def __fspath__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        return self.plot()._repr_html_()
