"""`foveate eval`: models on some files, or the answers that `foveate generate` left, outside of a run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from foveate.config.data import DataSettings, VideoSettings
from foveate.config.rollout import EnvironmentSettings
from foveate.data.answers import GeneratedAnswer, GeneratedRow, ScoredRow, prompt_fields
from foveate.data.table import TaskTable, open_tasks
from foveate.data.validate import OnBadRow, validate
from foveate.encoding.dataset import keep_aside, read_checked
from foveate.errors import ConfigError, DataError
from foveate.evaluate.generate import REQUEST, read_asked
from foveate.evaluate.metrics import box_reader, likely_frame, summary_statistics, warn_of_lost_answers
from foveate.evaluate.predict import BATCH, load_engine, predict, save_gallery, scored_row
from foveate.evaluate.predictions import Evaluation, mean, paired, write_models, write_skipped
from foveate.evaluate.shards import read_generated
from foveate.files import atomic_write_text
from foveate.log import progress
from foveate.models.flash_routes import Tiles
from foveate.records import Task
from foveate.rewards.build import truth_check
from foveate.rewards.pool import Graders, with_opened
from foveate.rollout.conversations import open_conversations

logger = logging.getLogger(__name__)

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "grounding": ("grounding", {}),
    "refcoco": ("refcoco", {"rule": "first"}),
    "geo3k": ("geo3k", {}),
    "mmpr": ("math", {"extraction": "text"}),
    "multiple_choice": ("multiple_choice", {"extraction": "text"}),
    "mathvista": ("mathvista", {}),
    "mathverse": ("math", {"extraction": "text"}),
    "mmmu": ("mmmu", {}),
    "chartqa": ("chartqa", {"rule": "published"}),
    "ocrbench": ("ocrbench", {}),
    "countbench": ("counting", {}),
    "screenspot": ("click", {}),
}
"""The reward of a `--task` with its settings."""
PROCESS_CRITIC = "prm:"
"""How the name of a critic begins that is a process reward model in a folder."""
Missing = Literal["error", "skip", "wrong"]


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """The options of `foveate eval`; see its `--help`. `models` are asked `data` in process; `generated` are folders
    of `foveate generate`, which name their data themselves."""

    models: tuple[str, ...]
    data: tuple[str, ...]
    out: Path
    reward: str = "grounding"
    samples: int = 0
    max_tokens: int = 256
    max_prompt_tokens: int = 8192
    max_tiles: int | None = None
    system: str | None = None
    rows: int | None = None
    image_root: str | None = None
    gallery: int = 40
    seed: int = 0
    threads: int | None = None
    on_bad_row: OnBadRow = "error"
    settings: Mapping[str, Any] = field(default_factory=dict)
    generated: tuple[Path, ...] = ()
    missing: Missing = "error"
    critic: str | None = None
    critic_settings: Mapping[str, Any] = field(default_factory=dict)
    text_files: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    environment: EnvironmentSettings | None = None
    turn_discount: float = 1.0
    max_pixels: int | None = None
    thinking: bool | None = None
    """As `data.thinking` of a run."""
    video: VideoSettings = field(default_factory=VideoSettings)
    """As `data.video` of a run; for models in process."""
    tiles: Tiles = "routed"
    """Of Flash models in process."""
    hold_out: float = 0.0
    """Share of the rows of `data` that a run kept aside: only these are asked."""


def run_eval(request: EvalRequest) -> None:
    """Score all answers and write `predictions.jsonl`, `summary.json`, and the gallery into `out`.

    The answers of a model in process are those of the evaluation of a run with the same weights, limits, reward and
    seed. Raises ConfigError for an `out` that is a file or the folder of something else, and for rows without an
    answer unless `missing` says what they are.
    """
    _check_out(request.out)
    if request.tiles != "routed" and not request.models:
        raise ConfigError(f"--tiles {request.tiles}: is for models in this process, and none is asked; leave it out")
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    found: list[Evaluation] = []
    costs: dict[str, dict[str, Any]] = {}
    tasks: TaskTable | None = None
    with Graders(request.reward, request.settings) as graders, _critic(request) or nullcontext() as critic:
        for model in request.models:
            rows, tasks = _in_process(request, model, graders, critic)
            found.append(Evaluation(len(found), tuple(rows), _label(Path(model), found)))
        for folder in request.generated:
            rows, tasks, cost = _from_folder(request, folder, graders, critic)
            found.append(Evaluation(len(found), tuple(rows), _label(folder, found)))
            costs[found[-1].label] = cost
    if tasks is None:
        raise ConfigError("nothing to evaluate: give the folder of a run, --model with --data, or --generated")
    write_models(request.out, found)
    summary = _summary(request, found, costs)
    atomic_write_text(request.out / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    if request.text_files:
        write_text_files(request.out, found, costs)
    save_gallery(request.out, tasks.of_each_source(request.gallery))


def _critic(request: EvalRequest) -> Graders | None:
    """The reward that best-of-N goes by, `prm:MODEL` being `process` with that model. Raises ConfigError where there
    would be one answer to a question, and where no model is named, or two."""
    if request.critic is None:
        return None
    if request.models and request.samples < 2:
        raise ConfigError(f"--critic {request.critic} chooses among several answers; give --samples 8")
    if not request.critic.startswith(PROCESS_CRITIC):
        return Graders(request.critic, request.critic_settings)
    model = request.critic.removeprefix(PROCESS_CRITIC)
    if not model:
        raise ConfigError(
            f"--critic {request.critic} names no model; give {PROCESS_CRITIC}FOLDER, a process reward model"
        )
    if "model" in request.critic_settings:
        raise ConfigError(f"--critic {request.critic} names its model; leave --critic-setting model out")
    return Graders("process", {"model": model, **request.critic_settings})


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file, not a folder; choose another one")
    for name, what in (("config.yaml", "a run"), (REQUEST, "answers")):
        if (out / name).exists():
            raise ConfigError(f"--out {out} is the folder of {what}, whose files would be replaced; choose another one")


def _label(path: Path, found: Sequence[Evaluation]) -> str:
    """The name of a folder; of several with the same name, the folder above joins it."""
    name = path.resolve().name if path.exists() else str(path)
    taken = {one.label for one in found}
    if name in taken:
        name = f"{path.resolve().parent.name}/{name}"
    return name if name not in taken else f"{name} ({len(found) + 1})"


def _in_process(
    request: EvalRequest, name: str, graders: Graders, critic: Graders | None
) -> tuple[list[ScoredRow], TaskTable]:
    data = DataSettings(
        train=request.data,
        image_root=request.image_root,
        on_bad_row=request.on_bad_row,
        max_prompt_tokens=request.max_prompt_tokens,
        system=request.system or "none",
        thinking=request.thinking,
        video=request.video,
        columns=dict(request.columns),
    )
    environment = request.environment
    engine, encoder = load_engine(name, data, request.max_tiles, request.max_pixels, environment, request.tiles)
    by_environment = environment is not None and environment.reward == "environment"
    truth = None if by_environment else truth_check(request.reward, request.settings)
    table, left_out = read_checked(request.data, data, encoder, truth)
    tasks = (keep_aside(table, request.hold_out)[1] or table).first(request.rows)
    write_skipped(request.out, [str(problem) for problem in left_out])
    with (
        open_conversations(environment, lambda _: encoder, turn_discount=request.turn_discount) as (_, conversations),
        progress("evaluating", len(tasks)) as advance,
    ):
        predictions = predict(
            engine,
            tasks,
            encoder,
            graders,
            samples=request.samples,
            max_tokens=request.max_tokens,
            seed=request.seed,
            detailed=_shown(tasks, request),
            read_box=box_reader(request.reward, request.settings),
            advance=advance,
            conversations=conversations,
            folder=request.out,
            critic=critic,
        )
    return predictions, tasks


def _shown(tasks: TaskTable, request: EvalRequest) -> frozenset[str]:
    """The ids of the rows that the report shows."""
    return frozenset(task.id for task in tasks.of_each_source(request.gallery))


def _from_folder(
    request: EvalRequest, folder: Path, graders: Graders, critic: Graders | None
) -> tuple[list[ScoredRow], TaskTable, dict[str, Any]]:
    """The rows of a folder of `foveate generate` in the order of its data, and what they cost."""
    asked = _request_of(folder)
    root = Path(asked["image_root"]) if asked["image_root"] else None
    table = open_tasks(asked["data"], image_root=root, columns=asked["columns"])
    asked_rows = sorted(set(range(len(table))) - set(asked["left_out"]))[: asked["table_rows"]]
    tasks = table.select(asked_rows).first(request.rows)
    validate(tasks, check=truth_check(request.reward, request.settings))
    rows = {row.index: row for row in read_generated(folder)}
    lacking = [index for index in range(len(tasks)) if index not in rows]
    if lacking and request.missing == "error":
        raise ConfigError(
            f"{folder}: {len(lacking)} of {len(tasks)} rows have no answer, the first is row {lacking[0]}; run the "
            "same `foveate generate` again, or say --missing skip or --missing wrong"
        )
    greedy = asked["sampling"]["temperature"] == 0
    chosen = [index for index in range(len(tasks)) if index in rows or request.missing == "wrong"]
    if greedy and critic is not None:
        raise ConfigError(
            f"{folder}: holds one greedy answer to each row, of which --critic can choose none; leave it out"
        )
    predictions: list[ScoredRow] = []
    shown = _shown(tasks, request)
    with progress(f"scoring {folder.name}", len(chosen)) as advance:
        for begin in range(0, len(chosen), BATCH):
            some = chosen[begin : begin + BATCH]
            pairs = [(tasks[index], rows.get(index) or _no_answer(index, tasks[index])) for index in some]
            predictions += _scored(request, folder, pairs, greedy, graders, critic, shown)
            advance(len(some))
    return predictions, tasks, _cost(list(rows.values()), len(lacking))


def _no_answer(index: int, task: Task) -> GeneratedRow:
    missing = (GeneratedAnswer("", "missing", 0),)
    cost: dict[str, Any] = {"prompt_tokens": None, "answer_tokens": 0, "seconds": 0.0, "tries": 0, "server": ""}
    return GeneratedRow(**prompt_fields(task), answers=missing, index=index, **cost)


def _scored(
    request: EvalRequest,
    folder: Path,
    pairs: Sequence[tuple[Task, GeneratedRow]],
    greedy: bool,
    graders: Graders,
    critic: Graders | None,
    shown: frozenset[str],
) -> Iterator[ScoredRow]:
    """Some rows graded together. Single tokens are kept of the rows that are shown."""
    for task, row in pairs:
        if row.id != task.id:
            raise DataError(f"{folder}: row {row.index} is {row.id}, but {task.where} is {task.id}; the data changed")
    asked = [(answer.text, with_opened(task, row.opened)) for task, row in pairs for answer in row.answers]
    scores = iter(graders.grade_many(asked))
    ranks = iter(critic.grade_many(asked)) if critic is not None else None
    reader = box_reader(request.reward, request.settings)
    for task, row in pairs:
        scored = [(answer, next(scores)) for answer in row.answers]
        own = None if ranks is None else [next(ranks).value for _ in row.answers]
        yield scored_row(task, scored, greedy=greedy, detailed=task.id in shown, ranks=own, read_box=reader)


_ASKED = ("data", "image_root", "columns", "left_out", "table_rows", "sampling")
"""Fields of a request that are read."""


def _request_of(folder: Path) -> dict[str, Any]:
    try:
        request = read_asked(folder)
        if missing := [name for name in _ASKED if name not in request]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        return request
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no folder of `foveate generate`: {REQUEST} cannot be read ({error})") from error


def _cost(rows: Sequence[GeneratedRow], missing: int) -> dict[str, Any]:
    tokens = [row.answer_tokens for row in rows if row.answer_tokens is not None]
    ends = [answer.finish for row in rows for answer in row.answers]
    return {
        "missing": missing,
        "seconds": sum(row.seconds for row in rows),
        "tokens": sum(tokens),
        "tokens_per_row": sum(tokens) / len(tokens) if tokens else None,
        "truncated": sum(end == "length" for end in ends) / len(ends) if ends else None,
    }


def _summary(
    request: EvalRequest, found: Sequence[Evaluation], costs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    models = {
        one.label: {**summary_statistics(one.predictions, request.seed), **costs.get(one.label, {})} for one in found
    }
    for label, one in models.items():
        other = likely_frame(one, one["rows"]) if "frames" in one else None
        frame = request.settings.get("frame", request.settings.get("answer_frame", "thousandths"))
        if other is not None and other != frame:
            logger.warning(
                "%s: the boxes look like %s: mean IoU %.3f so read, %.3f as thousandths; give --box-frame %s",
                label, other, one["frames"][other], one["frames"]["thousandths"], other,
            )  # fmt: skip
    for one in found:
        warn_of_lost_answers(one.predictions, one.label)
    first = found[0]
    return {
        "reward": request.reward,
        "settings": dict(request.settings),
        "models": models,
        "against_first": {one.label: _compared(first, one, request.seed) for one in found[1:]},
    }


def _compared(first: Evaluation, other: Evaluation, seed: int) -> dict[str, Any] | None:
    found = paired(first.predictions, other.predictions, seed)
    return None if found is None else asdict(found)


def write_text_files(out: Path, found: Sequence[Evaluation], costs: Mapping[str, Mapping[str, Any]]) -> None:
    """The predecessor's `iou.txt`, `iou_detail.json` and `latency.txt`, per model in a folder of its own where there
    are several. Its pass rate counts IoU above 0.5, not from 0.5 on."""
    for one in found:
        folder = out if len(found) == 1 else out / "text" / one.label.replace("/", "_")
        rows = [(row.question, row.shown.iou) for row in one.predictions if row.shown.iou is not None]
        if not rows:
            raise ConfigError(f"--text-files are for boxes, and {one.label} has none")
        average, rate = mean(iou for _, iou in rows), mean(float(iou > 0.5) for _, iou in rows)
        atomic_write_text(folder / "iou.txt", f"mean_iou: {average:.6f}\npass_rate@0.5: {rate:.6f}\n")
        detail = {
            str(index): {"v": iou, "hash": hashlib.sha256(question.encode()).hexdigest()}
            for index, (question, iou) in enumerate(rows)
        }
        atomic_write_text(folder / "iou_detail.json", json.dumps(detail) + "\n")
        cost = costs.get(one.label)
        if cost is not None:
            atomic_write_text(
                folder / "latency.txt",
                f"total_time_sec: {cost['seconds']:.3f}\ntotal_tokens: {cost['tokens']}\ncase_number: {len(rows)}\n",
            )
