"""`foveate generate --model`: the answers of a model in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence

from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.data.table import TaskTable
from foveate.encoding.dataset import RowCheck, build_encoder
from foveate.encoding.encode import Encoder
from foveate.evaluate.answers import Generated, GeneratedAnswer
from foveate.evaluate.generate import Deliver, GenerateRequest, Produce
from foveate.evaluate.predict import BATCH
from foveate.models.policy import best_place, load_policy
from foveate.rollout.engine import Engine, Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.seeds import seed_of


def prepare_model(request: GenerateRequest) -> tuple[RowCheck, Produce]:
    """What says which rows the model can be asked, and what asks it."""
    assert request.model is not None
    policy = load_policy(request.model, **best_place())
    data = DataSettings(train=request.source.data, max_prompt_tokens=request.max_prompt_tokens, system=request.system)
    model = ModelSettings(path=request.model, max_tiles=request.max_tiles)
    encoder = build_encoder(policy.tokenizer, policy.family, model, data)
    return RowCheck(None, encoder), _producer(request, NativeEngine(policy, encoder.decode), encoder)


def _producer(request: GenerateRequest, engine: Engine, encoder: Encoder) -> Produce:
    def produce(table: TaskTable, todo: Sequence[int], deliver: Deliver) -> None:
        for begin in range(0, len(todo), BATCH):
            some = todo[begin : begin + BATCH]
            tasks = [table[index] for index in some]
            prompts = [encoder(task) for task in tasks]
            asked = [Request(p, seed_of("eval", request.seed, i)) for p, i in zip(prompts, some, strict=True)]
            start = time.monotonic()
            replies = engine.generate(asked, request.sampling)
            seconds = round(time.monotonic() - start, 4)  # of the whole wave: an answer is there when all are
            for index, task, prompt, reply in zip(some, tasks, prompts, replies, strict=True):
                answers = tuple(
                    GeneratedAnswer(
                        one.text, len(one.token_ids), one.finish,
                        tuple(zip(encoder.pieces(one.token_ids), one.logprobs.round(4).tolist(), strict=True))
                        if request.logprobs else (),
                    )
                    for one in reply
                )  # fmt: skip
                tokens = sum(len(one.token_ids) for one in reply)
                deliver(Generated(index, task.id, answers, len(prompt), tokens, seconds, 1, "in process"))

    return produce
