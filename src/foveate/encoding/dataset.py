"""The data of a run as it will be used: the encoder with the run's limits, and files with every row checked by it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.config.run_base import RunSettings
from foveate.data.rlcs import LeaningStream
from foveate.data.rows import Problem, fault_of
from foveate.data.shares import StratifiedStream
from foveate.data.statistics import shared_lines
from foveate.data.stream import Curriculum, Stream, ranks
from foveate.data.table import TaskTable
from foveate.data.validate import Check, ReadOptions
from foveate.encoding.encode import Encoder
from foveate.encoding.family import Family, budget_of
from foveate.encoding.thinking import with_thinking
from foveate.errors import ConfigError, DataError
from foveate.records import Task
from foveate.rewards.combine import LOOKED_AT, frame_doubts, unread_sources

logger = logging.getLogger(__name__)


def build_encoder(
    tokenizer: PreTrainedTokenizerBase,
    family: Family,
    model: ModelSettings,
    data: DataSettings,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Encoder:
    """The encoder of a run: what the checkpoint makes of images, with the run's limits. Every prompt shows `tools`."""
    budget = budget_of(family, max_tiles=model.max_tiles, max_pixels=model.max_pixels)
    system = system_message(family, data.system)
    if data.thinking is not None:
        tokenizer, system = with_thinking(tokenizer, family, system, thinking=data.thinking)
    return Encoder(tokenizer, family, budget, data.max_prompt_tokens, system, tuple(tools), data.video)


def system_message(family: Family, system: str) -> str | None:
    """The system message that `data.system` asks for. Raises ConfigError for the default of a family without one."""
    if system == "none":
        return None
    if system != "default":
        return system
    if family.default_system is None:
        raise ConfigError(
            f"data.system=default: {family.name} has no system message of its own beside what its chat template "
            "writes; "
            "set data.system=none, or to the text"
        )
    return family.default_system


@dataclass(frozen=True, slots=True)
class AnswerLimits:
    """The limits of answers that are trained on as they stand in the rows: `fields` of extra_info, each of `most`
    tokens (None: any number), and of `budget` tokens, those of one forward pass, together with the prompt."""

    fields: tuple[str, ...]
    budget: int
    most: int | None

    def validation_errors(self, task: Task, prompt: int, encoder: Encoder) -> list[tuple[str, str]]:
        """The faults of the answers of a task whose prompt, of so many tokens, has none, as (field, fault)."""
        return [
            (f"extra_info.{name}", fault) for name in self.fields if (fault := self._fault(task, name, prompt, encoder))
        ]

    def _fault(self, task: Task, name: str, prompt: int, encoder: Encoder) -> str:
        try:
            length = len(encoder.answer_ids(task.meta[name]))
        except DataError as error:
            return str(error)
        if self.most is not None and length > self.most:
            return f"{length} tokens, the limit is {self.most}; raise train.max_answer_tokens, or shorten the answer"
        if prompt + length > self.budget:
            return (
                f"{length} tokens, and {prompt} of the prompt, do not fit into a forward pass of {self.budget}; raise "
                "train.tokens_per_micro_batch, or leave the row out with data.on_bad_row=skip"
            )
        return ""


@dataclass(frozen=True, slots=True)
class RowCheck:
    """The checks of a row before a run: its ground truth, its length as prompt from text and image headers, and the
    lengths of answers that it is trained on. None leaves one of them out."""

    truth: Check | None
    encoder: Encoder | None
    answers: AnswerLimits | None = None

    def __call__(self, task: Task) -> list[tuple[str, str]]:
        faults = list(self.truth(task)) if self.truth is not None else []
        if self.encoder is None:
            return faults
        try:
            prompt = self.encoder.checked_length(task)
        except DataError as error:
            return [*faults, fault_of(error, task.where)]
        if self.answers is not None and not faults:
            faults += self.answers.validation_errors(task, prompt, self.encoder)
        return faults


def read_options(data: DataSettings) -> ReadOptions:
    """How the settings of a run have its files read."""
    root = Path(data.image_root) if data.image_root is not None else None
    return ReadOptions(root, data.columns, data.on_bad_row, data.workers, data.max_image_pixels)


def read_checked(
    paths: Sequence[str],
    data: DataSettings,
    encoder: Encoder,
    truth: Check | None,
    answers: AnswerLimits | None = None,
) -> tuple[TaskTable, list[Problem]]:
    """The usable rows of some files, every row checked from its text and image headers before anything else runs:
    ground truth, images, marks, length as prompt, and the lengths of `answers` that it holds. Raises DataError unless
    bad rows are to be skipped."""
    table, found = read_options(data)(paths, check=RowCheck(truth, encoder, answers))
    if found.problems:
        left_out = len({problem.where for problem in found.problems})
        total = len(table) + left_out
        logger.warning("%d of %d rows are left out; the first: %s", left_out, total, found.problems[0])
    for line in frame_doubts(truth, table.of_each_source(LOOKED_AT)):
        logger.warning("%s", line)
    return table, found.problems


def read_data(
    settings: RunSettings, encoder: Encoder, truth: Check | None, answers: AnswerLimits | None = None
) -> tuple[TaskTable, TaskTable | None, list[Problem]]:
    """The rows to train on, those held out (None for a run without evaluation), and what was left out of both; checked
    as by `read_checked`."""
    data = settings.data
    every, left_out = read_checked(data.train, data, encoder, truth, answers)
    for line in unread_sources(truth, every.source_names()):
        logger.warning("%s", line)
    train, test = keep_aside(every, data.hold_out)
    if not settings.eval.every:
        return train, None, left_out
    if test is None:
        test, more = read_checked(data.test, data, encoder, truth, answers)
        left_out += more
    warn_if_shared(train, test)
    return train, test, left_out


def keep_aside(table: TaskTable, share: float) -> tuple[TaskTable, TaskTable | None]:
    """A table without a share of its rows, and these, at least one; None for a share of 0. Which ones depends on the
    number of rows alone, so that runs with other seeds and stages of a cascade hold out the same. Raises DataError
    where none would be left."""
    if not share:
        return table, None
    count = max(1, round(share * len(table)))
    if count >= len(table):
        raise DataError(
            f"data.hold_out={share:g}: keeps all {len(table)} rows of {table.names} aside; use a smaller share, or "
            "name held-out files in data.test"
        )
    order = np.random.default_rng(0).permutation(len(table))
    return table.select(np.sort(order[count:])), table.select(np.sort(order[:count]))


def warn_if_shared(train: TaskTable, test: TaskTable) -> None:
    """Warn of rows and images of `test` that stand in `train`, too, where both were checked."""
    if train.statistics is not None and test.statistics is not None:
        for line in shared_lines({"data.train": train.statistics, "data.test": test.statistics}):
            logger.warning("%s; accuracy on them says little about others", line)


def build_stream(table: TaskTable, data: DataSettings, seed: int, batch: int) -> Stream:
    """The order of a run over its rows: weights of the files, curriculum, shares of the sources and choice by success
    as set. Raises DataError for a difficulty that is no number, and for shares that do not fit the sources."""
    curriculum = None
    if data.curriculum is not None:
        chosen = data.curriculum
        values = table.values(chosen.key)
        for index, value in enumerate(values):
            if not isinstance(value, int | float) or not math.isfinite(value):
                where = table[index].where
                raise DataError(
                    f"{where}, field {chosen.key}: is {value!r}; data.curriculum needs a number in every row"
                )
        curriculum = Curriculum(ranks(values, chosen.descending), chosen.epochs, chosen.mixing)
    how: dict[str, Any] = {"weights": data.weights, "source_of": table.path_of, "curriculum": curriculum}
    if data.shares:
        stream: Stream = StratifiedStream(table.source_names(), data.shares, seed, batch, **how)
    else:
        stream = Stream(len(table), seed, batch, **how)
    if data.rlcs is None:
        return stream
    return LeaningStream(stream, smoothing=data.rlcs.smoothing, floor=data.rlcs.floor)
