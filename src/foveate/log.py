"""Log lines, progress bars and metrics.jsonl.

Bars and lines share one console on standard error, so that they never tear each other apart; standard output is left to
results.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from foveate.errors import ConfigError, printable
from foveate.files import atomic_write_text, disk_error, read_inside, require_file, require_held, strict_json, with_room


class _SafeConsole(Console):
    """Shows control characters of what it prints instead of sending them to the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            is_plain = segment.control is not None or segment.text.isprintable()
            yield segment if is_plain else Segment(printable(segment.text), segment.style)


console = _SafeConsole(stderr=True)
_results = _SafeConsole()
logger = logging.getLogger(__name__)
LINE_CHARACTERS = 20_000
"""Most characters of a log line."""

Metric = float | int | str | None
_MOST_STEPS, _MOST_BYTES = 2**53, 2**30


def setup_logging(level: int = logging.INFO) -> None:
    """Send foveate's log lines to standard error: with colours in a terminal, plain with date and time elsewhere.

    Call it once per process, from the command line; a second call replaces the first.
    """
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, rich_tracebacks=False, log_time_format="[%X]")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(_clean)
    package = logging.getLogger("foveate")
    package.handlers[:] = [handler]
    package.setLevel(level)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # advises a kernel that is not used here


def _clean(record: logging.LogRecord) -> bool:
    """Make the message of a log line safe to show."""
    text = masked(record.getMessage())
    more = len(text) - LINE_CHARACTERS
    record.msg = printable(text if more <= 0 else f"{text[:LINE_CHARACTERS]} ... ({more:,} more characters)")
    record.args = None
    return True


_SECRET_NAME = re.compile(
    r"(^|_)(api_?key|access_?key|secret_?key|private_?key|secret|token|password|passwd|credentials?|authorization)$",
    re.IGNORECASE,
)
_SECRETS = re.compile(
    r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user and password in an address
    r"|\bsk-[\w-]{20,}|\bhf_[A-Za-z0-9]{30,}|\bgh[op]_\w{30,}|\bglpat-[\w-]{20,}|\bxox[bp]-[\w-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|(?<=[Bb]earer )[\w.~+/=-]{8,}|(?<=[?&]token=)[^&\s]+|(?<=[?&]key=)[^&\s]+"
    r"|(?<=api_key=)[^&\s]+|(?<=password=)[^&\s]+"
)
MASK = "***"


def masked(text: str) -> str:
    """Text without keys and passwords: what looks like one, and the values of environment variables named like one."""
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= 8 and value in text:
            text = text.replace(value, MASK)
    return _SECRETS.sub(MASK, text)


def is_secret(name: str) -> bool:
    """Whether a setting or variable of this name holds a secret: `api_key`, `HF_TOKEN`; not `max_tokens`."""
    return _SECRET_NAME.search(name) is not None


def masked_values(value: Any, name: str = "") -> Any:
    """Values of settings, nested in any way, with the secrets among them masked."""
    if isinstance(value, Mapping):
        return {key: masked_values(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked_values(inner, name) for inner in value]
    if not isinstance(value, str):
        return value
    return MASK if value and is_secret(name) else _SECRETS.sub(MASK, value)


def print_result(result: RenderableType) -> None:
    """Print a result on standard output: text as it is, never wrapped or read as markup."""
    if isinstance(result, str):
        _results.print(Text(result), soft_wrap=True)
    else:
        _results.print(result)


# --------------------------------------------------------------------------------------------------------- metrics


class MetricsWriter:
    """Appends one JSON object per step to a file; each line is on its way to disk when `write` returns.

    Attributes:
        nonfinite: values written so far that were NaN or infinite.
    """

    def __init__(self, path: Path, track: Callable[[int, Mapping[str, float]], object] | None = None) -> None:
        """`track`: takes the step and the finite numbers of each line, too."""
        self.path = path
        self.nonfinite = 0
        self._track = track

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Append `{"step": step, **metrics}`. JSON knows no NaN and no infinity: these become null, and the line lists
        their names under `nonfinite`.

        Raises:
            DiskError: the line could not be written.
        """
        bad = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        record = {"step": step, **metrics, **dict.fromkeys(bad)} | ({"nonfinite": bad} if bad else {})
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        with_room(lambda: self._append(line))
        self.nonfinite += len(bad)
        if self._track is not None:
            numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
            self._track(step, {name: value for name, value in numbers.items() if name not in bad})

    def _append(self, line: str) -> None:
        require_file(self.path)
        require_held(self.path)
        whole = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line)
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, whole)
            raise disk_error(self.path, error) from error

    def truncate_after(self, step: int) -> None:
        """Keep the lines up to and including `step`, from which a run resumes; -1 keeps none. A last line that was only
        half written goes too. The file is replaced atomically."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step] if self.path.exists() else []
        atomic_write_text(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def read_metrics(path: Path, folder: Path | None = None) -> list[dict[str, Any]]:
    """The objects of a file of metrics, or of others with a step, in the order written, without a last line that was
    only half written. folder: the one that the file must lie in, by default the one above it.

    Raises:
        ConfigError: any other line is not an object with a step, or holds a number that no float can be.
        DataError: the file is not a regular one of the folder.
    """
    records = []
    content = read_inside(path, folder or path.parent, _MOST_BYTES)
    # What follows the last newline is a torn line, or nothing.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = strict_json(line)
            step = record["step"]
            if type(step) is not int or not 0 <= step < _MOST_STEPS:
                raise ValueError
            records.append(record)
        except (ValueError, TypeError, KeyError):
            raise ConfigError(
                f"{path}:{number}: not a JSON object with a step: {line[:60]!r}; delete this line to continue"
            ) from None
    return records


# -------------------------------------------------------------------------------------------------------- progress


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(_rate(task.speed) if task.speed else "", style="progress.data.speed")


class Advance(Protocol):
    def __call__(self, units: int, metrics: Mapping[str, Metric] | None = None) -> None:
        """Tell of the units just done, and of the metrics of the last one, where it has any."""
        ...


@contextmanager
def progress(description: str, total: int, interval: float = 30.0, done: int = 0) -> Iterator[Advance]:
    """Show how far a long piece of work is, with its rate and the time left.

    In a terminal this is a bar that vanishes when the work is done; bars may be nested. Elsewhere it is a log line at
    most every `interval` seconds, so that short work is silent. Steps of training pass their metrics: the bar shows the
    reward or the loss, and a log line tells of a step, in a terminal too.

    Args:
        description: what is being done ("evaluating").
        total: units of work in all.
        interval: seconds between log lines where there is no terminal.
        done: units that were there before; they count for the share, not for the rate.

    Yields:
        advance: call it with the units just done.
    """
    lines = _Lines(description, total, interval, done)
    if not console.is_terminal:
        yield lines
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)

        def advance(units: int, metrics: Mapping[str, Metric] | None = None) -> None:
            bar.advance(task, units)
            if metrics is not None:
                bar.update(task, description=f"{description}  {_told(metrics)[0]}")
                lines(units, metrics)

        yield advance


class _Lines:
    """Log lines: of work at most one in `interval` seconds, of steps with metrics the first, the last, and one in ten
    seconds."""

    def __init__(self, description: str, total: int, interval: float, before: int) -> None:
        self._description, self._total, self._interval, self._before = description, total, interval, before
        self._done, self._start = before, time.monotonic()
        self._last = self._start

    def __call__(self, units: int, metrics: Mapping[str, Metric] | None = None) -> None:
        self._done += units
        now = time.monotonic()
        is_edge = metrics is not None and (self._done == self._before + units or self._done == self._total)
        if not is_edge and now - self._last < (self._interval if metrics is None else min(self._interval, 10.0)):
            return
        self._last = now
        rate = (self._done - self._before) / max(now - self._start, 1e-9)
        pace = f", {_rate(rate)}, {_time((self._total - self._done) / rate)} left" if rate else ""
        told = "" if metrics is None else f": {', '.join(_told(metrics))}"
        logger.info("%s: %d of %d%s%s", self._description, self._done, self._total, told, pace)


_TOLD = (
    ("reward/mean", "reward {:.3f}"),
    ("reward/accuracy", "accuracy {:.1%}"),
    ("reward/hit", "hits {:.1%}"),
    ("eval/greedy_accuracy", "held-out accuracy {:.1%}"),
    ("eval/greedy_score", "held-out score {:.3f}"),
    ("loss/total", "loss {:.4f}"),
    ("eval/loss", "held-out loss {:.4f}"),
    ("eval/accuracy", "held-out accuracy {:.1%}"),
    ("answer/length", "length {:.1f}"),
    ("turns/mean", "turns {:.1f}"),
    ("answer/truncated", "truncated {:.0%}"),
    ("loss/kl_ref", "KL {:.4f}"),
    ("loss/divergence", "from the teacher {:.4f}"),
    ("reward/teacher_kl", "from the teacher {:.4f}"),
    ("loss/entropy", "entropy {:.3f}"),
    ("time/generate_tokens_per_second", "{:,.0f} tokens/s"),
    ("time/update_tokens_per_second", "{:,.0f} tokens/s trained"),
)
"""What a line says of a step: metrics, each where it was measured."""


_SOURCE = re.compile("source/(.*)/reward")


def _told(metrics: Mapping[str, Metric]) -> list[str]:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    if "eval/greedy_accuracy" in numbers:
        numbers.pop("eval/greedy_score", None)
    told = [form.format(numbers[name]) for name, form in _TOLD if name in numbers] or [""]
    sources = {found[1]: value for name, value in numbers.items() if (found := _SOURCE.fullmatch(name))}
    shown = "; ".join(f"{name} {value:.3f}" for name, value in sources.items())
    return [*told, f"reward by source: {shown}"] if len(sources) in range(2, 9) else told


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _rate(rate: float) -> str:
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
