"""Tasks -> answers of a model in this process, with their scores: for an evaluation in a run or outside of one, and for
`foveate generate --model`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.config.rollout import EnvironmentSettings
from foveate.config.train import RLEvalSettings
from foveate.data.answers import GeneratedAnswer, GeneratedRow, ScoredAnswer, ScoredRow, prompt_fields, score_fields
from foveate.data.images import load_image
from foveate.data.table import TaskTable
from foveate.encoding.dataset import build_encoder
from foveate.encoding.encode import Encoder
from foveate.encoding.routes import seen_share
from foveate.evaluate.draw import save_thumbnail
from foveate.evaluate.metrics import BoxReader, model_box, warn_of_lost_answers
from foveate.evaluate.predictions import (
    BOX_SIZES,
    EXPRESSION_LENGTHS,
    thumbnail_path,
    write_evaluation,
    write_gallery,
)
from foveate.evaluate.turns import kept_turns, place_to_look, turn_metrics
from foveate.log import progress
from foveate.models.flash_routes import Tiles, with_router
from foveate.models.policy import best_place, load_policy
from foveate.records import Answer, SamplingParams, Score, Task
from foveate.rewards.boxes import Box, truth_box
from foveate.rewards.pool import Graders
from foveate.rollout.conversations import Conversations, Conversed, tools_of_environment
from foveate.rollout.credit import FUNCTION_ALONE, Outcome, scored
from foveate.rollout.engine import Engine, Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.seeds import seed_of

logger = logging.getLogger(__name__)

TAGS = ("relation", "kind", "dataset")
"""Fields of a task's meta by whose values accuracy is broken down."""
BATCH = 64


def load_engine(
    path: str,
    data: DataSettings,
    max_tiles: int | None,
    max_pixels: int | None = None,
    environment: EnvironmentSettings | None = None,
    tiles: Tiles = "routed",
) -> tuple[NativeEngine, Encoder]:
    """The native engine with the weights of a model folder, and the encoder of its prompts, which show the tools of the
    environment. `tiles`: of a Flash model."""
    policy = load_policy(path, **best_place())
    model = ModelSettings(path=path, max_tiles=max_tiles, max_pixels=max_pixels)
    encoder = build_encoder(policy.tokenizer, policy.family, model, data, tools_of_environment(environment))
    return NativeEngine(policy, encoder.decode), with_router(encoder, policy, tiles)


def generate_rows(
    engine: Engine,
    encoder: Encoder,
    table: TaskTable,
    rows: Sequence[int],
    sampling: SamplingParams,
    *,
    seed: int,
    logprobs: bool,
    conversations: Conversations | None = None,
) -> Iterator[GeneratedRow]:
    """The answers to `rows` of a table in order, with their environments, if there are any. `seconds` are those of a
    batch: an answer is there when all are."""
    for begin in range(0, len(rows), BATCH):
        some = rows[begin : begin + BATCH]
        tasks = [encoder.for_graders(table[index]) for index in some]
        prompts = [encoder(task) for task in tasks]
        requests = [Request(p, seed_of("eval", seed, i)) for p, i in zip(prompts, some, strict=True)]
        start = time.monotonic()
        found = answer_all(engine, tasks, requests, sampling, conversations)
        seconds = round(time.monotonic() - start, 4)
        for index, one in zip(some, found, strict=True):
            turns = one.outcomes or [None] * len(one.answers)
            yield GeneratedRow(
                **prompt_fields(one.task),
                answers=tuple(
                    generated_answer(answer, encoder, logprobs, outcome)
                    for answer, outcome in zip(one.answers, turns, strict=True)
                ),
                index=index,
                prompt_tokens=len(one.prompt),
                answer_tokens=sum(answer.trained_tokens for answer in one.answers),
                seconds=seconds,
                tries=1,
                server="in process",
                opened=encoder.opened,
            )


def predict(
    engine: Engine,
    tasks: TaskTable,
    encoder: Encoder,
    graders: Graders,
    *,
    samples: int,
    max_tokens: int,
    seed: int,
    detailed: Container[str] = (),
    read_box: BoxReader = model_box,
    advance: Callable[[int], None],
    conversations: Conversations | None = None,
    folder: Path | None = None,
    critic: Graders | None = None,
) -> list[ScoredRow]:
    """One row per task: the greedy answer, and `samples` answers drawn at temperature 1. The draws depend on `seed` and
    the index of the task alone, so that two models are asked with the same luck. Rows whose ids are in
    `detailed` keep the log-probs of their greedy answers, which the report shows. `conversations`: the environments of
    the answers; `folder`: of the run, where images that they have shown in greedy answers are kept; `critic`: gives the
    values that best-of-N goes by, of the sampled answers."""
    rows: list[ScoredRow] = []
    for begin in range(0, len(tasks), BATCH):
        some = [encoder.for_graders(tasks[i]) for i in range(begin, min(begin + BATCH, len(tasks)))]
        requests = [Request(encoder(task), seed_of("eval", seed, begin + i)) for i, task in enumerate(some)]
        ways = [SamplingParams(1, max_tokens, temperature=0.0)]
        ways += [SamplingParams(samples, max_tokens, temperature=1.0)] if samples else []
        found = [answer_all(engine, some, requests, way, conversations) for way in ways]
        some, prompts = [one.task for one in found[0]], [one.prompt for one in found[0]]
        answers = [tuple(chain(*(one.answers for one in own))) for own in zip(*found, strict=True)]
        outcomes = [tuple(chain(*(one.outcomes for one in own))) for own in zip(*found, strict=True)]
        asked = [(one, task) for task, own in zip(some, answers, strict=True) for one in own]
        became = [one for own, talks in zip(answers, outcomes, strict=True) for one in talks or [None] * len(own)]
        credit = FUNCTION_ALONE if conversations is None else conversations.credit
        scores = iter(zip(scored(graders, asked, became, credit), became, strict=True))
        drawn = [(one.text, task) for task, own in zip(some, answers, strict=True) for one in own[1:]]
        values = iter(critic.grade_many(drawn)) if critic is not None else None
        for task, prompt, own in zip(some, prompts, answers, strict=True):
            keep = task.id in detailed
            graded = []
            for one, (score, outcome) in zip(own, scores, strict=False):
                is_shown = one is own[0]
                made = generated_answer(one, encoder, keep and is_shown, outcome, folder if is_shown else None)
                graded.append((made, score))
            ranks = None if values is None else [None, *(next(values).value for _ in own[1:])]
            row = scored_row(task, graded, greedy=True, detailed=keep, ranks=ranks, read_box=read_box)
            rows.append(replace(row, image_tokens=seen_share([prompt], encoder.family.sides)))
        advance(len(some))
    return rows


def answer_all(
    engine: Engine,
    tasks: Sequence[Task],
    requests: Sequence[Request],
    sampling: SamplingParams,
    conversations: Conversations | None,
) -> list[Conversed]:
    """The answers to each request, with their environments, if there are any."""
    if conversations is not None:
        return conversations.generate(engine, tasks, requests, sampling)
    groups = engine.generate(requests, sampling)
    return [Conversed(task, r.prompt, own) for task, r, own in zip(tasks, requests, groups, strict=True)]


def generated_answer(
    answer: Answer, encoder: Encoder, logprobs: bool, outcome: Outcome | None = None, folder: Path | None = None
) -> GeneratedAnswer:
    ids = tuple(token for segment in answer.segments if segment.trained for token in segment.token_ids.tolist())
    values = (round(float(value), 4) for value in answer.logprobs)
    tokens = tuple(zip(encoder.pieces(ids), values, strict=True)) if logprobs else ()
    turns = () if outcome is None else kept_turns(outcome.turns, folder)
    return GeneratedAnswer(answer.text, answer.finish, len(ids), tokens, turns)


# ----------------------------------------------------------------------------------------------------------- scores


def scored_row(
    task: Task,
    answers: Sequence[tuple[GeneratedAnswer, Score]],
    *,
    greedy: bool,
    detailed: bool,
    ranks: Sequence[float | None] | None = None,
    read_box: BoxReader = model_box,
) -> ScoredRow:
    """The answers to one task with their scores, the first one decoded greedily or not; a `detailed` row keeps its
    log-probs. Best-of-N goes by `ranks`, one per answer; without them by the mean log-prob where it is known."""
    has_box = any("iou" in score.parts for _, score in answers)
    asked = prompt_fields(task)
    tags = {tag: str(task.meta[tag]) for tag in TAGS if task.meta.get(tag)}
    tags |= {"source": task.source} if task.source != tags.get("dataset") else {}
    if has_box:
        asked["ground_truth"] = list(truth_box(task))
        tags |= _box_tags(truth_box(task), asked["question"])
    scored = []
    for place, (answer, score) in enumerate(answers):
        own = answer.logprobs
        rank = ranks[place] if ranks else sum(value for _, value in own) / len(own) if own else None
        best = greedy and place == 0
        scored.append(
            ScoredAnswer(
                answer.text, answer.finish, answer.tokens, own if detailed and place == 0 else (), answer.turns,
                **score_fields(score), greedy=best,
                box=read_box(answer.text, task) if has_box else None, rank=None if best else rank,
            )
        )  # fmt: skip
    return ScoredRow(**asked, answers=tuple(scored), tags=tags, look_box=place_to_look(task))


def _box_tags(box: Box, expression: str) -> dict[str, str]:
    """The size of the true box in the image, and the length of the expression."""
    share = (box[2] - box[0]) * (box[3] - box[1]) / 1e6
    words = len(expression.replace("<image>", "").split())
    return {
        "box size": next(name for limit, name in BOX_SIZES if share < limit),
        "words": next(name for limit, name in EXPRESSION_LENGTHS if words <= limit),
    }


# ---------------------------------------------------------------------------------------------------------- in a run


class Evaluator:
    """Asks the held-out tasks of a run, when it is due. Predictions and gallery go to the run's folder."""

    def __init__(
        self,
        folder: Path,
        settings: RLEvalSettings,
        tasks: TaskTable | None,
        encoder: Encoder,
        graders: Graders,
        *,
        seed: int,
        max_tokens: int,
        last_step: int,
        conversations: Conversations | None = None,
    ) -> None:
        """`tasks` None: the run has no evaluation. `max_tokens` bounds an answer; after `last_step` one is due."""
        self.conversations = conversations
        self.folder, self.settings, self.encoder, self.graders = folder, settings, encoder, graders
        self.tasks = None if tasks is None else tasks.of_each_source(settings.prompts)
        self.seed, self.max_tokens, self.last_step = seed, max_tokens, last_step
        self._gallery_saved = False

    def is_due(self, step: int) -> bool:
        """Before the first step, every `eval.every` steps, and after the last one."""
        return self.tasks is not None and (step % self.settings.every == 0 or step == self.last_step)

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """Ask all held-out tasks with the engine's weights and write the answers; returns the headline figures."""
        assert self.tasks is not None
        if not self._gallery_saved:
            save_gallery(self.folder, self.tasks.of_each_source(self.settings.gallery))
            self._gallery_saved = True
        with progress(f"evaluating step {step}", len(self.tasks)) as advance:
            rows = predict(
                engine,
                self.tasks,
                self.encoder,
                self.graders,
                samples=self.settings.samples,
                max_tokens=self.max_tokens,
                seed=self.seed,
                advance=advance,
                conversations=self.conversations,
                folder=self.folder,
            )
        warn_of_lost_answers(rows, f"evaluation of step {step}")
        summary = write_evaluation(self.folder, step, rows)
        figures = {
            f"eval/{way}_{name}": summary[way][name]
            for way in ("greedy", "sampled")
            for name in ("accuracy", "mean_iou", "score")
            if summary[way][name] is not None
        }
        sources = summary["by_tag"].get("source", {})
        for name, found in sources.items() if len(sources) > 1 else ():
            accuracy = found.get("greedy_accuracy")
            figures |= {} if accuracy is None else {f"eval/source/{name}/greedy_accuracy": accuracy}
        if self.conversations is not None:
            own = turn_metrics([row.shown.turns for row in rows], [row.look_box for row in rows])
            figures |= {f"eval/{name}": value for name, value in own.items()}
        logger.info(
            "step %d: %s", step, ", ".join(f"{name.removeprefix('eval/')} {v:.3f}" for name, v in figures.items())
        )
        return figures


def save_gallery(folder: Path, tasks: TaskTable) -> None:
    """Small copies of the images of the tasks that the report shows."""
    shown = [task for task in tasks if task.images]
    for task in shown:
        save_thumbnail(load_image(task.images[0], task.where), thumbnail_path(folder, task.id))
    write_gallery(folder, [task.id for task in shown])
