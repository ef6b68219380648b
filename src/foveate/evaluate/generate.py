"""`foveate generate`: answers to all rows of some files, from servers or in process, resumed after a kill."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.config.rollout import EnvironmentSettings
from foveate.data.answers import GeneratedRow
from foveate.data.table import TaskTable, open_tasks
from foveate.data.validate import OnBadRow, validate
from foveate.environments.pool import Environments
from foveate.errors import ConfigError, DataError, UserError
from foveate.evaluate.client import ChatClient, ClientSettings
from foveate.evaluate.shards import AnswerStore, Failed, read_generated
from foveate.files import LOCK_FILES, atomic_write_text, held, read_inside, strict_json
from foveate.log import progress
from foveate.records import SamplingParams

if TYPE_CHECKING:
    from foveate.encoding.dataset import RowCheck

logger = logging.getLogger(__name__)

REQUEST = "generate.json"
OURS = (REQUEST, "shards", "failed.jsonl", "summary.json", *LOCK_FILES)
Deliver = Callable[[GeneratedRow | Failed], None]
Produce = Callable[[TaskTable, Sequence[int], Deliver], None]
"""Asks for some rows of a table, and delivers each outcome as it comes."""


@dataclass(frozen=True, slots=True)
class RowsRequest:
    """Which rows are asked. `columns` maps foreign column names, see `foveate.data.parsers`."""

    data: tuple[str, ...]
    rows: int | None = None
    image_root: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    on_bad_row: OnBadRow = "error"


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """The options of `foveate generate`. Exactly one of `model` (a folder: in process) and `client` is given."""

    source: RowsRequest
    out: Path
    sampling: SamplingParams
    model: str | None = None
    client: ClientSettings | None = None
    system: str | None = None
    seed: int = 0
    logprobs: bool = False
    max_prompt_tokens: int = 8192
    max_tiles: int | None = None
    shard_rows: int = 1000
    environment: EnvironmentSettings | None = None
    thinking: bool | None = None
    """As `data.thinking` of a run; only with `model`."""

    def identity(self, table: TaskTable, left_out: Sequence[int]) -> dict[str, Any]:
        """All that decides the answers: a folder is continued only by a request that is the same in it."""
        return {
            "data": list(self.source.data),
            "table_rows": len(table),
            "left_out": list(left_out),
            "image_root": self.source.image_root,
            "columns": self.source.columns,
            "model": self.model or (self.client.model if self.client else None),
            "system": self.system,
            "thinking": self.thinking,
            "sampling": asdict(self.sampling),
            "seed": self.seed,
            "logprobs": self.logprobs,
            "max_tiles": self.max_tiles,
            **({"environment": self.environment.model_dump(mode="json")} if self.environment else {}),
        }


def run_generate(request: GenerateRequest) -> dict[str, Any]:
    """Answer every row that the folder lacks, and write its summary, which is returned.

    Raises ConfigError for a folder of something else or of another request, and a UserError after the work if rows are
    without an answer: the folder then lists them in `failed.jsonl`, and the same request asks for them again.
    """
    if (request.model is None) == (request.client is None):
        raise ConfigError("give either --endpoint or --model")
    table, produce, left_out, problems = _prepare(request)
    table = table.first(request.source.rows)
    with held(request.out, "another --out"), AnswerStore(request.out, request.shard_rows) as store:
        _claim(request.out, request.identity(table, left_out), begun=bool(store.done))
        strange = store.done - set(range(len(table)))
        if strange:
            raise DataError(f"{request.out}: holds row {min(strange)}, but the data have {len(table)} rows")
        failures: dict[int, Failed] = {}
        start, before = time.monotonic(), len(store.done)
        todo = [index for index in range(len(table)) if index not in store.done]
        try:
            with progress("generating", len(table), done=before) as advance:

                def deliver(outcome: GeneratedRow | Failed) -> None:
                    if isinstance(outcome, Failed):
                        failures[outcome.index] = outcome
                    else:
                        store.write(outcome)
                    advance(1)

                if todo:
                    produce(table, todo, deliver)
        finally:
            took = time.monotonic() - start
            _list_failures(request.out, failures)
            summary = summarise_answers(request.out, len(table), failures.values(), problems)
            summary["last_start"] = {"rows": len(store.done) - before, "seconds": round(took, 3)}
            atomic_write_text(request.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    if failures:
        first = min(failures.values(), key=lambda one: one.index)
        place = f"row {first.index}, {first.id}"
        raise UserError(
            f"{len(failures)} of {len(table)} rows have no answer, the first ({place}) {first.kind}: {first.reason}; "
            f"all are in {request.out / 'failed.jsonl'}, and the same command asks for them again"
        )
    return summary


def _prepare(request: GenerateRequest) -> tuple[TaskTable, Produce, list[int], list[str]]:
    """The usable rows, the function that gets answers to them, and the rows left out: by number and in words."""
    source = request.source
    root = Path(source.image_root) if source.image_root else None
    table = open_tasks(source.data, image_root=root, columns=source.columns)
    if request.client is not None:
        check, produce = None, _from_servers(request, request.client)
    else:
        check, produce = _in_process(request, request.model or "")
    kept, problems = validate(table, on_bad_row=source.on_bad_row, check=check)
    left_out = sorted(set(range(len(table))) - set(kept))
    return table.select(kept), produce, left_out, list(map(str, problems))


def _from_servers(request: GenerateRequest, client: ClientSettings) -> Produce:
    def produce(table: TaskTable, todo: Sequence[int], deliver: Deliver) -> None:
        client_of = partial(ChatClient, client, request.sampling, request.seed, deliver)
        if request.environment is None:
            client_of().run(table, todo)
            return
        environment = request.environment
        limits = environment.model_dump(include={"workers", "time_limit", "memory_limit"})
        with Environments(environment.name, environment.settings, **limits) as pool:
            client_of(environments=pool).run(table, todo)

    return produce


def _in_process(request: GenerateRequest, model: str) -> tuple[RowCheck, Produce]:
    """The check whether the model can be asked a row, and the function that asks it."""
    from foveate.config.data import DataSettings
    from foveate.encoding.dataset import RowCheck
    from foveate.evaluate.predict import generate_rows, load_engine  # a client needs neither models nor transformers
    from foveate.rollout.conversations import open_conversations

    data = DataSettings(
        train=request.source.data,
        max_prompt_tokens=request.max_prompt_tokens,
        system=request.system or "none",
        thinking=request.thinking,
    )
    engine, encoder = load_engine(model, data, request.max_tiles, environment=request.environment)

    def produce(table: TaskTable, todo: Sequence[int], deliver: Deliver) -> None:
        how = {"seed": request.seed, "logprobs": request.logprobs}
        with open_conversations(request.environment, lambda _: encoder) as (_, conversations):
            for row in generate_rows(
                engine, encoder, table, todo, request.sampling, **how, conversations=conversations
            ):
                deliver(row)

    return RowCheck(None, encoder), produce


def read_asked(folder: Path) -> dict[str, Any]:
    """The request that the answers in a folder belong to. Raises ValueError for a file that holds no JSON object."""
    request = strict_json(read_inside(folder / REQUEST, folder))
    if not isinstance(request, dict):
        raise ValueError("it holds no JSON object")
    return request


def _claim(folder: Path, identity: dict[str, Any], *, begun: bool) -> None:
    """Write down the request. Raises ConfigError where the folder holds answers to another one, or foreign files."""
    path = folder / REQUEST
    if begun and not path.exists():
        raise ConfigError(f"--out {folder} holds answers and no {REQUEST} that says to what; choose another folder")
    if begun:
        try:
            former = read_asked(folder)
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); choose another --out") from error
        wanted = json.loads(json.dumps(identity))
        changed = [name for name in wanted if former.get(name) != wanted[name]]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"{folder} belongs to another request: {name} was {former.get(name)!r}, now {wanted[name]!r}; "
                "choose another --out"
            )
        return
    foreign = [entry.name for entry in folder.iterdir() if entry.name not in OURS]
    if foreign:
        raise ConfigError(
            f"--out {folder} holds {min(foreign)}, which is not of `foveate generate`; choose another folder"
        )
    atomic_write_text(path, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")


def _list_failures(folder: Path, failures: dict[int, Failed]) -> None:
    lines = [json.dumps(asdict(failures[index]), ensure_ascii=False) + "\n" for index in sorted(failures)]
    atomic_write_text(folder / "failed.jsonl", "".join(lines))


def summarise_answers(folder: Path, rows: int, failures: Any, left_out: Sequence[str]) -> dict[str, Any]:
    """Counts, latency and tokens of all answers in a folder. A row is answered, refused, failed, or not asked yet."""
    seconds, lengths, prompts, tries = [], [], [], []
    finishes: Counter[str] = Counter()
    answered = 0
    for row in read_generated(folder):
        answered += 1
        seconds.append(row.seconds)
        tries.append(row.tries)
        prompts += [row.prompt_tokens] if row.prompt_tokens is not None else []
        lengths += [answer.tokens for answer in row.answers if answer.tokens is not None]
        finishes.update(answer.finish for answer in row.answers)
    kinds = Counter(one.kind for one in failures)
    reasons = Counter(one.reason for one in failures)
    return {
        "rows": rows,
        "answered": answered,
        "refused": kinds["refused"],
        "failed": kinds["failed"],
        "not_asked": rows - answered - sum(kinds.values()),
        "left_out_as_bad": list(left_out),
        "reasons": dict(reasons.most_common(20)),
        "answers": sum(finishes.values()),
        "finish": dict(finishes),
        "tried_again": sum(tries) - len(tries),
        "latency_seconds": _distribution(seconds),
        "answer_tokens": _distribution(lengths),
        "prompt_tokens": _distribution(prompts),
    }


def _distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Sum, mean, quantiles and maximum; None of nothing."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = np.quantile(array, (0.5, 0.9, 0.99))
    figures = {"sum": array.sum(), "mean": array.mean(), "p50": p50, "p90": p90, "p99": p99, "max": array.max()}
    return {name: round(float(value), 4) for name, value in figures.items()}
