"""Scores of the steps of answers under a process reward model, and the reward that is made of them.

VisualPRM (arXiv 2503.10291): the score of a step is the probability of `+` where the model judges it, against `-`, in
the conversation of `foveate.encoding.steps` in which all steps before it were judged `+`; that of an answer is the mean
over its steps. All answers to a prompt are one tree: what their conversations begin with, images included, goes
through the model once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.encoding.dataset import build_encoder
from foveate.encoding.encode import Encoder
from foveate.encoding.steps import MOST_STEPS, RIGHT_STEP, WRONG_STEP, judged_steps, split_steps
from foveate.encoding.turns import Turns, encode_trace
from foveate.errors import ConfigError, DataError
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.flash_routes import with_router
from foveate.models.forward import evaluating, hidden_states
from foveate.models.logprobs import logits_of
from foveate.models.policy import Policy, best_place, load_policy
from foveate.parallel.packing import micro_batches, pack, split_answers
from foveate.records import Answer, PackedGroup, Prompt, Score, Segment, Task
from foveate.rewards.build import Reward, RewardJob, not_graded
from foveate.rewards.pool import OPENED

PACKED_TOKENS = 16_384
"""Tokens of a forward pass; one conversation may be longer."""
StepScores = tuple[float, ...] | str
"""The scores of the steps of an answer, each in 0..1, or the reason why it has none."""
Summary = Literal["mean", "min", "last"]


class ProcessModel:
    """A process reward model in this process."""

    def __init__(self, policy: Policy, encoder: Encoder, most_steps: int = MOST_STEPS) -> None:
        """Raises DataError for a tokenizer or a chat template that cannot judge steps."""
        self._policy, self._turns, self._most = policy, Turns(encoder), most_steps
        self._judgement, self._place, self._pair = judgement_tokens(encoder)

    def step_scores(self, asked: Sequence[tuple[str, Task]]) -> list[StepScores]:
        """The scores of the steps of answers to tasks, in order. Those to one task share a pass where they stand
        together."""
        found: list[StepScores] = [""] * len(asked)
        groups: list[PackedGroup] = []
        places: list[int] = []
        for _, run in groupby(range(len(asked)), lambda place: _asked(asked[place][1])):
            own = [*run]
            try:
                group = self.conversations(asked[own[0]][1], [asked[place][0] for place in own])
            except DataError as error:
                for place in own:
                    found[place] = str(error)
                continue
            groups += [PackedGroup(group.prompt, group.answers[part]) for part in split_answers(group, PACKED_TOKENS)]
            places += own
        scores = (
            one for part in micro_batches(groups, PACKED_TOKENS) for one in self._judge([groups[i] for i in part])
        )
        for place, own in zip(places, scores, strict=True):
            found[place] = own
        return found

    def conversations(self, task: Task, texts: Sequence[str]) -> PackedGroup:
        """The conversations about several answers to a task as one group: the prompt is what all begin with, and of
        each answer the judgements are trained. Raises DataError where one of them cannot be encoded."""
        prompts: list[Prompt] = []
        traces: list[Answer] = []

        def encode(one: Task) -> Prompt:
            encoder = self._turns.encoder
            prompts.append(encoder.beside(one, prompts[0]) if prompts else encoder(one))
            return prompts[-1]

        for text in texts:
            steps = split_steps(text, self._most)
            whole = judged_steps(task, steps, [RIGHT_STEP] * (len(steps) - 1))
            traces.append(encode_trace(self._turns, whole, RIGHT_STEP, encode)[1])
        ids = [prompt.token_ids for prompt in prompts]
        common = _common(ids)
        root = Prompt(ids[0][:common], prompts[0].slots, prompts[0].pixels, ())
        return PackedGroup(root, tuple(self._judged(own[common:], one) for own, one in zip(ids, traces, strict=True)))

    def _judged(self, before: Sequence[int], trace: Answer) -> Answer:
        """A conversation behind the common beginning, with nothing trained but the tokens that judge."""
        segments = [_read(before)]
        for segment in trace.segments:
            if segment.trained:
                ids = self._judgement
                segments += [_read(ids[: self._place])] * bool(self._place)
                segments += [Segment.written(ids[self._place : self._place + 1]), _read(ids[self._place + 1 :])]
            else:
                segments.append(segment)
        return Answer(tuple(segments), "", "stop")

    @torch.inference_mode()
    def _judge(self, groups: Sequence[PackedGroup]) -> Iterator[tuple[float, ...]]:
        """The scores of the steps of each answer."""
        batch = pack(groups).to(self._policy.device)
        with evaluating(self._policy.model):
            hidden = hidden_states(self._policy, batch)[batch.source_M]
        weight = self._policy.part("head").weight
        assert isinstance(weight, Tensor)
        logits = logits_of(hidden, weight[list(self._pair)])
        score_M = torch.sigmoid(logits[:, 0] - logits[:, 1])
        counts = [length for group in groups for length in group.lengths]
        return iter([tuple(own.tolist()) for own in score_M.split(counts)])


def judgement_tokens(encoder: Encoder) -> tuple[tuple[int, ...], int, tuple[int, int]]:
    """The tokens of a turn that judges a step as right, the place in it of the token that does, and that token with the
    one that stands there in the turn of a wrong step. Raises DataError where more than one token differs."""
    right, wrong = encoder.answer_ids(RIGHT_STEP), encoder.answer_ids(WRONG_STEP)
    differ = [place for place, pair in enumerate(zip(right, wrong, strict=False)) if pair[0] != pair[1]]
    if len(right) != len(wrong) or len(differ) != 1:
        raise DataError(
            f"the tokenizer does not write {RIGHT_STEP} and {WRONG_STEP} as one token each, by which a process reward "
            "model judges; take another model"
        )
    return right, differ[0], (right[differ[0]], wrong[differ[0]])


def load_process_model(
    model: str, *, system: str | None, max_tiles: int | None, max_prompt_tokens: int
) -> ProcessModel:
    """The process reward model in a folder, on a GPU where there is one; settings as in `process`."""
    policy = load_policy(model, **best_place())
    data = DataSettings(train=(model,), max_prompt_tokens=max_prompt_tokens, system=system or "none")
    encoder = build_encoder(policy.tokenizer, policy.family, ModelSettings(path=model, max_tiles=max_tiles), data)
    return ProcessModel(policy, with_router(encoder, policy))


def process(
    *,
    model: str,
    score: Summary = "mean",
    system: str | None = None,
    max_tiles: int | None = None,
    max_prompt_tokens: int = 8192,
) -> Reward:
    """The mean score of the steps of an answer under a process reward model, which is loaded into this process.

    A step is a paragraph, or a line of an answer of one paragraph. Its score is p(+) / (p(+) + p(-)) where the model
    judges it, after judging all steps before it `+` (VisualPRM, arXiv 2503.10291).

    Args:
        model: folder of the process reward model.
        score: the score of an answer: the mean over its steps (as in the paper), the least, or that of the last step.
        system: system message of its conversations, as it was trained with; VisualPRM's stands on its model card.
        max_tiles: most tiles of an image, by default as the folder says.
        max_prompt_tokens: longest question with images and first step; answers to a longer one are not graded.

    Parts: mean, min, last; steps, their number. Raises ConfigError for a folder that is no model, and one whose
    tokenizer cannot judge.
    """
    folder = inspect_model_folder(model)
    try:
        judgement_tokens(Encoder(folder.tokenizer, folder.family, 1, max_prompt_tokens))
    except DataError as error:
        raise ConfigError(f"reward process, setting model: {model}: {error}") from error

    @cache
    def loaded() -> ProcessModel:
        return load_process_model(model, system=system, max_tiles=max_tiles, max_prompt_tokens=max_prompt_tokens)

    def together(jobs: Sequence[RewardJob]) -> list[tuple[Any, ...]]:
        own = [(text.removeprefix(task.meta.get(OPENED, "")), task) for text, task, _ in jobs]
        return [(scores,) for scores in loaded().step_scores(own)]

    def summarised(_text: str, _task: Task, scores: StepScores) -> Score:
        if isinstance(scores, str):
            return not_graded(scores)
        parts = {"mean": sum(scores) / len(scores), "min": min(scores), "last": scores[-1]}
        return Score(parts[score], {**parts, "steps": float(len(scores))})

    return Reward("process", summarised, together=together)


def _asked(task: Task) -> tuple[Any, ...]:
    """That by which tasks have one prompt."""
    return task.id, task.where, task.messages, task.images, task.videos


def _common(ids: Sequence[Sequence[int]]) -> int:
    """With how many tokens all begin, so that each has one more."""
    first, most = ids[0], min(map(len, ids)) - 1
    return next((place for place in range(most) if any(own[place] != first[place] for own in ids)), most)


def _read(ids: Sequence[int]) -> Segment:
    own = np.asarray(ids, np.int64)
    return Segment(own, own, np.zeros(0, np.float32), False)
