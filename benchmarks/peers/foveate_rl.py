"""foveate's whole GRPO step on `picture_task` or `sums_task`: read the rows, answer, grade, learn, publish.

foveate_rl.py make MODEL VOCABULARY      foveate_rl.py run MODEL THREADS [TASK]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import picture_task
import torch
from foveate_step import BUDGET, SIZE
from work import CLIP, Done, clock, serve

from foveate.cluster.local import LocalWorkers
from foveate.config.algorithm import AlgorithmSettings
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.encoding.encode import Encoder
from foveate.models.tiny import build_tiny
from foveate.parallel.balance import Costs
from foveate.records import Group, Image, Message, SamplingParams, Score, Task
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.train.algorithm import build_algorithm
from foveate.train.update import compute_advantages, update
from foveate.train.worker import Worker


def tasks(task: Any) -> list[Task]:
    if task is not picture_task:
        return [Task(str(i), "bench", (Message("user", task.question(i)),), (), None) for i in range(task.GROUPS)]
    size = task.COLUMNS * task.TILE, task.ROWS * task.TILE
    text = f"<image>\n{task.QUESTION}"
    return [
        Task(str(i), "bench", (Message("user", text),), (Image(None, task.picture(i), *size),), None)
        for i in range(task.GROUPS)
    ]


def run(folder: str, threads: int, task: Any) -> None:
    torch.set_num_threads(threads)
    worker = Worker(ModelSettings(path=folder, trainable=task.TRAINABLE), OptimSettings(lr=task.LEARNING_RATE), BUDGET)
    workers, policy = LocalWorkers(worker), worker.policy
    costs = Costs.of(policy.model.config)
    encoder = Encoder(policy.tokenizer, policy.family, task.TILES, 4096)
    if task is picture_task:  # no stop token, so that every answer has the full length, as in TRL's run
        policy = replace(policy, family=replace(policy.family, stop_ids=(-1,)))
    engine = NativeEngine(policy, encoder.decode)
    loss = {"clip_low": CLIP, "clip_high": CLIP}
    method = build_algorithm(AlgorithmSettings(name="grpo", loss=loss), task.ANSWER_TOKENS)
    sampling = SamplingParams(samples=task.ANSWERS, max_tokens=task.ANSWER_TOKENS)
    rows, steps = tasks(task), 0

    def step() -> Done:
        nonlocal steps
        steps += 1
        started = clock()
        prompts = [encoder(row) for row in rows]
        encoded = clock()
        answers = engine.generate([Request(p, seed=100 * steps + i) for i, p in enumerate(prompts)], sampling)
        generated = clock()
        scores = [tuple(Score(task.reward(list(a.token_ids))) for a in group) for group in answers]
        groups = [*map(Group, rows, prompts, answers, scores)]
        batch, _ = compute_advantages(workers, groups, method, 1, costs)
        learned = update(workers, batch, method, 1, {"optim/lr": task.LEARNING_RATE}, costs)
        engine.publish(steps, ())
        return Done(
            learned["loss/policy"], learned["optim/grad_norm"],
            {"encode": encoded - started, "generate": generated - encoded, "update": clock() - generated},
            {
                "prompt_tokens": sum(map(len, prompts)),
                "answer_tokens": sum(len(answer.token_ids) for group in answers for answer in group),
            },
        )  # fmt: skip

    serve(step)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        build_tiny(Path(sys.argv[2]), replace(SIZE, max_tiles=picture_task.TILES), padded_vocabulary=int(sys.argv[3]))
    else:
        run(sys.argv[2], int(sys.argv[3]), import_module((sys.argv[4:] or ["picture_task"])[0]))
