"""Labels of the steps of answers by Monte Carlo, for process reward models (`foveate prepare steps`).

VisualPRM (arXiv 2503.10291), after Math-Shepherd (arXiv 2312.08935): the model continues an answer from behind each
step several times; the share of right continuations is the value of the step, and a step is right where that is above
0. The value of the last step is whether the answer is right. All continuations of all answers to a prompt are one tree
in the native engine: the prompt and the answers go through the model once, and each continuation only with its own
tokens (`foveate.rollout.native.prefixes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from foveate.config.data import DataSettings
from foveate.data.answers import RIGHT, CorrectnessRule, ScoredAnswer, answers_by_id, score_fields
from foveate.data.demos import RESPONSE
from foveate.data.table import TaskTable
from foveate.data.validate import AS_IS, ReadOptions
from foveate.datasets.prepared import Prepared, infer_schema, publish, rollout_hashes, rows_by_id, task_row
from foveate.encoding.dataset import RowCheck
from foveate.encoding.encode import Encoder
from foveate.encoding.steps import MOST_STEPS, RIGHT_STEP, WRONG_STEP, check_one_turn, judged_steps, split_steps
from foveate.errors import require
from foveate.evaluate.predict import BATCH, load_engine
from foveate.log import progress
from foveate.records import Answer, SamplingParams, Score, Segment, Task
from foveate.rewards.build import TruthCheck, truth_check
from foveate.rewards.pool import Graders
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.seeds import seed_of

STEP_VALUES = "step_values"
"""Field of extra_info with the values of the steps of a row."""


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How steps are labelled. `continuations` of each; `answers` of a prompt, the first ones (None: all), whose texts
    differ; `max_tokens` of a whole answer; `most_steps` of one, as in `split_steps`. A row ends with the first wrong
    step, because scores are taken behind steps that were judged right, or, with `all_steps`, with the last one. A step
    is right where the share of its continuations that are right is `above` a limit: 0 as in VisualPRM, or more where
    continuations often find back from a wrong step."""

    continuations: int = 16
    answers: int | None = None
    max_tokens: int = 1024
    temperature: float = 1.0
    most_steps: int = MOST_STEPS
    max_prompt_tokens: int = 8192
    max_tiles: int | None = None
    system: str | None = None
    seed: int = 0
    all_steps: bool = False
    above: float = 0.0


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """The steps of an answer with their values, in 0..1, and the tokens that its continuations would cost apart."""

    steps: tuple[str, ...]
    values: tuple[float, ...]
    tokens_apart: int


def prepare_steps(
    sources: Sequence[Path],
    out: Path,
    *,
    model: str,
    rollouts: Sequence[Path],
    reward: str,
    settings: Mapping[str, Any] = {},
    options: StepOptions = StepOptions(),
    correctness_rule: CorrectnessRule = RIGHT,
    reading: ReadOptions = AS_IS,
) -> Prepared:
    """Conversations that judge the steps of the answers in `rollouts` as steps.parquet with a manifest: a row for each
    answer, for `foveate sft` with `train.trained_turns: all`; extra_info.step_values holds the values of its steps.
    `model` continues the answers, and `reward` with its settings says which continuations are right.

    An answer with a step of which no continuation could be graded, or none has room, is left out and counted. Raises
    DataError for bad rows, ids that are not unique, and if no answer is left.
    """
    require(options.continuations >= 1, f"setting continuations: must be at least 1, not {options.continuations}")
    require(0 <= options.above < 1, f"setting above: must be at least 0 and less than 1, not {options.above:g}")
    data = DataSettings(
        train=tuple(map(str, sources)), max_prompt_tokens=options.max_prompt_tokens, system=options.system or "none"
    )
    engine, encoder = load_engine(model, data, options.max_tiles)
    table, found = reading(sources, check=RowCheck(_StepCheck(truth_check(reward, settings)), encoder))
    given = answers_by_id(rollouts)
    rows = {index: _chosen(given.get(task_id, ()), options) for task_id, index in rows_by_id(table).items()}
    labelled: dict[int, list[LabelledAnswer]] = {}
    with Graders(reward, settings) as graders, progress("continuing answers", len(rows)) as advance:
        label = _Labels(engine, encoder, graders, correctness_rule, options)
        places = [*rows]
        for begin in range(0, len(places), BATCH):
            some = places[begin : begin + BATCH]
            tasks = [encoder.for_graders(table[index]) for index in some]
            asked = [(index, task, rows[index]) for index, task in zip(some, tasks, strict=True)]
            labelled |= {index: own for index, own in label(asked).items() if own}
            advance(len(some))
    answers = [one for own in labelled.values() for one in own]
    require(bool(answers), f"{table.names}: no answer in the rollouts belongs to one of its rows and could be labelled")
    return publish(
        out,
        {"steps": _rows(table, labelled, options)},
        infer_schema(_rows(table, labelled, options, images=False)),
        total=len(answers),
        sources=table.files,
        settings={
            **asdict(options),
            "model": model,
            "reward": {"name": reward, **settings},
            "right": asdict(correctness_rule),
            "rollouts": rollout_hashes(rollouts),
            **({"columns": dict(reading.columns)} if reading.columns else {}),
        },
        problems=found.problems,
        counts=_counts(engine, answers, sum(map(len, rows.values())), options),
        notes=[*found.lines(), *_one_sided(answers, options)],
    )


def _chosen(answers: Sequence[ScoredAnswer], options: StepOptions) -> list[ScoredAnswer]:
    """The answers that are labelled, one of each text."""
    return [*{answer.text: answer for answer in answers if answer.text.strip()}.values()][: options.answers]


def _one_sided(answers: Sequence[LabelledAnswer], options: StepOptions) -> list[str]:
    """A line about labels that are all alike, or none."""
    labels = {value > options.above for one in answers for value in one.values}
    if len(labels) > 1:
        return []
    alike, judged = ("right", RIGHT_STEP) if True in labels else ("wrong", WRONG_STEP)
    return [f"every step is {alike}: a model that is trained on these rows alone judges all steps {judged}"]


def _counts(
    engine: NativeEngine, answers: Sequence[LabelledAnswer], asked: int, options: StepOptions
) -> dict[str, int]:
    values = [value for one in answers for value in one.values]
    return {
        "steps": len(values),
        "right steps": sum(value > options.above for value in values),
        "answers without labels": asked - len(answers),
        "tokens computed": engine.stats.prefill_tokens + engine.stats.decode_tokens,
        "tokens of separate continuations": sum(one.tokens_apart for one in answers),
    }


def _rows(
    table: TaskTable, labelled: Mapping[int, Sequence[LabelledAnswer]], options: StepOptions, images: bool = True
) -> Iterator[dict[str, Any]]:
    for task, own in zip(table.select(list(labelled)), labelled.values(), strict=True):
        for number, one in enumerate(own):
            wrong = [place for place, value in enumerate(one.values, start=1) if value <= options.above]
            values = one.values if options.all_steps or not wrong else one.values[: wrong[0]]
            *before, last = [RIGHT_STEP if value > options.above else WRONG_STEP for value in values]
            judged = replace(judged_steps(task, one.steps[: len(values)], before), id=f"{task.id}-{number}")
            more = {RESPONSE: last, STEP_VALUES: list(values), "prompt_id": task.id}
            yield task_row(judged, images=images, **more)


@dataclass(frozen=True, slots=True)
class _StepCheck:
    """The faults of a row whose answers cannot be labelled."""

    truth: TruthCheck | None

    def __call__(self, task: Task) -> list[tuple[str, str]]:
        return [*(self.truth(task) if self.truth is not None else ()), *check_one_turn(task)]


class _Labels:
    """Labels the steps of answers to some prompts together."""

    def __init__(
        self, engine: NativeEngine, encoder: Encoder, graders: Graders, rule: CorrectnessRule, options: StepOptions
    ) -> None:
        self._engine, self._encoder, self._graders = engine, encoder, graders
        self._rule, self._options = rule, options

    def __call__(self, asked: Sequence[tuple[int, Task, Sequence[ScoredAnswer]]]) -> dict[int, list[LabelledAnswer]]:
        """By row the answers whose steps all have values."""
        options, tree = self._options, [(*one, [*self._split(one[2])]) for one in asked]
        requests, tasks = list[Request](), list[Task]()
        for index, task, _, own in tree:
            begun = tuple(_begun(ids) for *_, several in own for ids in several for _ in range(options.continuations))
            if begun:  # or an answer would be sampled
                requests.append(Request(self._encoder(task), seed_of("steps", options.seed, index), begun))
                tasks += [task] * len(begun)
        sampling = SamplingParams(1, options.max_tokens, options.temperature)
        groups = self._engine.generate(requests, sampling) if requests else []
        made = [one for group in groups for one in group]
        scores = self._graders.grade_many([(one.text, task) for one, task in zip(made, tasks, strict=True)])
        apart = [len(one.prompt) + len(own) - 1 for one, group in zip(requests, groups, strict=True) for own in group]
        rest = iter(zip(map(self._is_right, scores), apart, strict=True))
        found: dict[int, list[LabelledAnswer]] = {}
        for index, _, _, own in tree:
            for answer, steps, several in own:
                drawn = [next(rest) for _ in range(options.continuations * len(several))]
                values = _shares([right for right, _ in drawn], options.continuations)
                if values is not None:
                    whole = (*values, float(self._rule(answer)))
                    cost = sum(tokens for _, tokens in drawn)
                    found.setdefault(index, []).append(LabelledAnswer(steps, whole, cost))
        return found

    def _split(
        self, answers: Sequence[ScoredAnswer]
    ) -> Iterator[tuple[ScoredAnswer, tuple[str, ...], list[tuple[int, ...]]]]:
        """Answers with their steps and what is continued of them. Those that leave no room for that are left out."""
        for answer in answers:
            steps = split_steps(answer.text, self._options.most_steps)
            begun = step_prefixes(self._encoder, steps)
            if not begun or len(begun[-1]) < self._options.max_tokens:
                yield answer, steps, begun

    def _is_right(self, score: Score) -> float | None:
        if score.value is None:
            return None
        return float(self._rule(ScoredAnswer("", "stop", None, **score_fields(score))))


def _shares(right: Sequence[float | None], count: int) -> list[float] | None:
    """Of each `count` continuations the share that is right, of those that were graded; None where none was."""
    groups = [[one for one in right[at : at + count] if one is not None] for at in range(0, len(right), count)]
    return [sum(own) / len(own) for own in groups] if all(groups) else None


def step_prefixes(encoder: Encoder, steps: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens of an answer up to behind each of its steps but the last. All are beginnings of one another: the
    answer becomes tokens as a whole, and a token that spans two steps belongs to the first of them."""
    ids = encoder.answer_ids("".join(steps))[:-1]
    behind = [sum(map(len, steps[number:])) for number in range(1, len(steps))]  # characters, from the end
    length = len(encoder.decode(ids))
    found: list[tuple[int, ...]] = []
    low = 1
    for rest in behind:
        high = len(ids)
        while low < high:
            middle = (low + high) // 2
            if len(encoder.decode(ids[:middle])) >= length - rest:
                high = middle
            else:
                low = middle + 1
        found.append(ids[:low])
    return found


def _begun(ids: Sequence[int]) -> Answer:
    """An answer to be continued."""
    return Answer((Segment.sampled(ids, [0.0] * len(ids), 0),), "", "abort")
