"""Answers with their scores: one record and one JSONL form, a row for each prompt, wherever answers are kept.

The rollouts of a run, the predictions of an evaluation and the rows of `foveate generate` are written and read here;
filters and preference pairs read them. Fields at their default (no box, no log-probs, ...) are left out of a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from foveate.data.conversations import with_words
from foveate.errors import DataError
from foveate.files import atomic_write_bytes

if TYPE_CHECKING:
    from foveate.records import Score, Task

RIGHT_PARTS = ("accuracy", "hit")
_STRICT: dict[str, Any] = {"extra": "forbid", "ser_json_inf_nan": "constants"}


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image of a prompt or of an answer: its path (None where its bytes stand in the row of the data; within the
    folder of a run that of a small copy), and its size in pixels."""

    path: str | None
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class AnswerTurn:
    """One turn of an answer as it is kept: said by the policy (role "assistant", in so many `tokens`, with the reward
    of the environment and the calls of tools), or by its environment, with images. A call is {name, error}, and where
    it looked at an image also {image: its number, box: in thousandths}."""

    role: str
    text: str
    tokens: int | None = None
    reward: float | None = None
    calls: tuple[Mapping[str, Any], ...] = ()
    images: tuple[ImageReference, ...] = ()


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """One answer: its text, why it ended ("stop", "length", "abort", or "missing" for an answer that was never given),
    its length in tokens (None where a server does not say), and its tokens as (text, log-prob in nats) where they were
    asked for. Of an answer with several `turns` these are what the model wrote, and `text` is its last turn."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    text: str
    finish: str
    tokens: int | None
    logprobs: tuple[tuple[str, float], ...] = ()
    turns: tuple[AnswerTurn, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer(GeneratedAnswer):
    """An answer with its `Score`: value (None: it is not graded), named parts, and a note where there is one.

    greedy: it took the likeliest token each time; box: x1, y1, x2, y2 in thousandths of the image, where one was asked
    for and could be read; rank: the value that best-of-N goes by; version, versions: the weights that sampled it, the
    oldest, and (version, tokens) of each in order; advantage: the mean over its tokens, where it was trained on.
    """

    score: float | None
    parts: Mapping[str, float]
    note: str
    greedy: bool = False
    box: tuple[float, float, float, float] | None = None
    rank: float | None = None
    version: int | None = None
    versions: tuple[tuple[int, int], ...] = ()
    advantage: float | None = None

    @property
    def iou(self) -> float | None:
        """The overlap with the true box, 0 for an answer without a box; None where no box was asked for."""
        return self.parts.get("iou")

    @property
    def hit(self) -> bool | None:
        """Right or wrong; None where that is not defined."""
        return bool(self.parts["hit"]) if "hit" in self.parts else None

    @property
    def right(self) -> float | None:
        """The part of the score that says how right the answer is, hit or accuracy; None where it has neither."""
        if self.hit is not None:
            return float(self.hit)
        return self.parts.get("accuracy")

    @property
    def correctness(self) -> float:
        """How right the answer is, the score where that is not defined; 0 for an answer that is not graded."""
        return self.score or 0.0 if self.right is None else self.right

    @property
    def graded(self) -> bool:
        return self.score is not None


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt that was answered. `where` names file and row of the data; `question` is the question alone, `prompt`
    the messages with role and content; `ground_truth` any JSON value, the true box in thousandths for grounding."""

    __pydantic_config__: ClassVar[dict[str, Any]] = _STRICT
    id: str
    source: str
    where: str
    question: str
    prompt: tuple[Mapping[str, str], ...]
    images: tuple[ImageReference, ...]
    ground_truth: Any


@dataclass(frozen=True, slots=True)
class GeneratedRow(PromptRow):
    """The answers to row `index` of the data, not graded yet. `opened` is what the chat template had opened for them
    (`<think>`), as far as it is known, and is graded in front of their texts. `seconds` is the time of the request that
    succeeded, `tries` counts it and those before it, `answer_tokens` are those of all answers together."""

    answers: tuple[GeneratedAnswer, ...]
    index: int
    prompt_tokens: int | None
    answer_tokens: int | None
    seconds: float
    tries: int
    server: str
    opened: str = ""


@dataclass(frozen=True, slots=True)
class ScoredRow(PromptRow):
    """The answers to a prompt with their scores. A greedy answer stands first. `tags` group rows in the report
    (`relation: left`); `model` names the model where a file holds several; `look_box` is the part of the first image,
    in thousandths, that an answer should look at, where the task says one; `image_tokens` is the share of the image
    tokens that a model which compresses tiles has seen."""

    answers: tuple[ScoredAnswer, ...]
    tags: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    look_box: tuple[float, float, float, float] | None = None
    image_tokens: float | None = None

    @property
    def shown(self) -> ScoredAnswer:
        """The answer that stands for the row: the greedy one, else the first."""
        return self.answers[0]

    @property
    def sampled(self) -> tuple[ScoredAnswer, ...]:
        """The answers that were drawn at a temperature."""
        return tuple(answer for answer in self.answers if not answer.greedy)

    @property
    def value(self) -> float:
        """How right the row is: its greedy answer, or the mean of its sampled ones where there is no greedy one."""
        if self.shown.greedy:
            return self.shown.correctness
        return sum(answer.correctness for answer in self.answers) / len(self.answers)


AnswerRow = TypeVar("AnswerRow", GeneratedRow, ScoredRow)


def prompt_fields(task: Task) -> dict[str, Any]:
    """The fields of a `PromptRow` for a task."""
    last = next((message.content for message in reversed(task.messages) if message.role == "user"), "")
    return {
        "id": task.id,
        "source": task.source,
        "where": task.where,
        "question": str(task.meta.get("question") or with_words(last)),
        "prompt": tuple({"role": message.role, "content": with_words(message.content)} for message in task.messages),
        "images": tuple(ImageReference(str(i.path) if i.path else None, i.width, i.height) for i in task.images),
        "ground_truth": _plain(task.answer),
    }


def score_fields(score: Score) -> dict[str, Any]:
    """The fields of a `ScoredAnswer` that come from its score."""
    parts = {name: float(value) for name, value in score.parts.items()}
    return {"score": None if score.value is None else float(score.value), "parts": parts, "note": score.note}


def _plain(value: Any) -> Any:
    """A value as JSON holds it: arrays and numbers of NumPy become lists and numbers, other objects their text."""
    return json.loads(
        json.dumps(value, default=lambda one: one.tolist() if isinstance(one, np.ndarray | np.generic) else str(one))
    )


# --------------------------------------------------------------------------------------------------------- files


@cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def row_line(row: PromptRow) -> bytes:
    """The row as a line of JSON; halves of surrogate pairs, which UTF-8 cannot hold, become question marks."""
    content = _adapter(type(row)).dump_python(row, mode="json", exclude_defaults=True)
    return (json.dumps(content, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def write_answers(path: Path, rows: Iterable[PromptRow]) -> None:
    """Write a whole file or nothing; see `atomic_path`."""
    atomic_write_bytes(path, b"".join(map(row_line, rows)))


def read_answers(path: Path, kind: type[AnswerRow], *, appending: bool = False) -> Iterator[AnswerRow]:
    """The rows of a file in order. `appending`: a last line without its line break is still being written, or torn by
    a kill, and is left out. Raises DataError that names file, row and field for a line that is no such row."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is not a regular file; name one of rows")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if appending and not line.endswith(b"\n"):
                return
            if line.strip():
                yield _row(line, kind, f"{path}, row {number}")


def _row(line: bytes, kind: type[AnswerRow], where: str) -> AnswerRow:
    try:
        return _adapter(kind).validate_json(line, strict=True)
    except ValueError as error:
        [first, *_] = error.errors()  # pyright: ignore[reportAttributeAccessIssue]
        name = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{where}{f', field {name}' if name else ''}: no {kind.__name__} of this version ({first['msg']}); "
            "delete the file and write it again"
        ) from error


# ------------------------------------------------------------------------------------------------- filters and pairs


@dataclass(frozen=True, slots=True)
class CorrectnessRule:
    """Which answers are right: those whose named part of the score (None: accuracy or hit where the reward has one,
    else the score itself) is at least `threshold`."""

    part: str | None = None
    threshold: float = 0.5

    def __call__(self, answer: ScoredAnswer) -> bool:
        if self.part is None:
            known = (answer.parts[name] for name in RIGHT_PARTS if name in answer.parts)
            return next(known, answer.correctness) >= self.threshold
        if self.part not in answer.parts:
            raise DataError(
                f"setting part: an answer has no part {self.part!r}; it has {', '.join(answer.parts) or 'none'}"
            )
        return answer.parts[self.part] >= self.threshold


RIGHT = CorrectnessRule()


def answers_by_id(paths: Sequence[Path]) -> dict[str, list[ScoredAnswer]]:
    """Answers by the id of their row, over all files; those that could not be graded are left out.

    paths: rollouts of a run, predictions of an evaluation, or folders: of a run, or with such files. Sampled answers
    count, a greedy one only where there are none. Raises DataError for rows that are no scored answers, and if there
    is nothing.
    """
    found: dict[str, list[ScoredAnswer]] = {}
    for path in paths:
        for file in answer_files(path):
            for row in read_answers(file, ScoredRow):
                graded = [answer for answer in row.sampled or row.answers if answer.graded]
                found.setdefault(row.id, []).extend(graded)
    if not any(found.values()):
        raise DataError(f"{', '.join(map(str, paths))}: no graded answers in there")
    return found


def answer_files(path: Path) -> list[Path]:
    """The file itself, or the files of scored answers in a folder. Raises DataError for a folder without any."""
    if path.is_file():
        return [path]
    inside = next((path / name for name in ("rollouts", "evals") if (path / name).is_dir()), path)
    files = sorted(inside.glob("step_*.jsonl"))
    if not files:
        raise DataError(f"{path}: no rollouts there; give step_*.jsonl files or the folder of a run")
    return files
