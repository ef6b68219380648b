"""foveate's side of the comparison, and the maker of the batch that all sides read.

foveate_step.py make MODEL BATCH WORK VOCABULARY      foveate_step.py run MODEL BATCH THREADS [ROWS]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from work import CLIP, PATCH, TILE, WORKS, Done, PendingGroup, Prints, prints_of, serve

from foveate.algorithms.metrics import reduce_metrics
from foveate.algorithms.policy_losses import grpo
from foveate.algorithms.targets import Totals
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.models.policy import Policy, load_policy
from foveate.models.tiny import TinySize, build_tiny
from foveate.records import ImageSlot, PackedGroup, Prompt
from foveate.train.targets import PolicyRow
from foveate.train.worker import Worker

SIZE = TinySize(
    tile=TILE, patch=PATCH, vision_width=192, vision_layers=4, vision_heads=4, vision_ffn=768, width=256, layers=4,
    heads=8, kv_heads=4, head_dim=32, ffn=768,
)  # fmt: skip
"""Proportions of InternVL3.5-1B: see benchmarks/group_packing.py."""
BUDGET = 16_384


def make(folder: str, path: str, work: PendingGroup, vocabulary: int) -> None:
    """A model folder, and a file with random prompts, pictures, answers, advantages and old log-probs (the current
    ones and some noise, so that clipping acts)."""
    build_tiny(Path(folder), SIZE, padded_vocabulary=vocabulary)
    policy = load_policy(folder)
    generator = torch.Generator().manual_seed(0)
    groups = [_group(policy, work, vocabulary, generator) for _ in range(work.groups)]
    worker = Worker(ModelSettings(path=folder), OptimSettings(lr=1e-9), BUDGET)
    for group, logp in zip(groups, worker.logprobs([_tree(group) for group in groups]), strict=True):
        noise = 0.2 * torch.randn(logp.shape, generator=generator)
        group["old"] = (logp + noise).view(work.answers, work.answer)
    torch.save({"groups": groups, "vocabulary": vocabulary}, path)


def _group(policy: Policy, work: PendingGroup, vocabulary: int, generator: torch.Generator) -> dict[str, Any]:
    def words(count: int) -> list[int]:
        return torch.randint(len(policy.tokenizer), vocabulary, (count,), generator=generator).tolist()

    family: Any = policy.family
    ids: list[int] = words(8)
    for tiles in work.images:
        ids += [*[family.image_token_id] * (tiles * family.tokens_per_tile), *words(2)]
    ids += words(work.prompt - len(ids))
    tiles = sum(work.images)
    return {
        "prompt": ids,
        "tiles": list(work.images),
        "pixels": torch.randn(tiles, 3, TILE, TILE, generator=generator) if tiles else None,
        "answers": torch.tensor([words(work.answer) for _ in range(work.answers)]),
        "advantage": torch.randn(work.answers, generator=generator),
        "image_token_id": family.image_token_id,
    }


def _tree(group: dict[str, Any]) -> PackedGroup:
    ids, token = group["prompt"], group["image_token_id"]
    slots, position = [], 0
    for tiles in group["tiles"]:
        position = ids.index(token, position)
        count = next((i for i, found in enumerate(ids[position:]) if found != token), len(ids) - position)
        slots.append(ImageSlot(position, count, tiles))
        position += count
    return PackedGroup.of_tokens(
        Prompt(tuple(ids), tuple(slots), group["pixels"], tuple(ids)), tuple(map(tuple, group["answers"].tolist()))
    )


def steps_of(folder: str, path: str) -> tuple[Callable[[], Done], Callable[[], tuple[Done, Prints]]]:
    """A step on a batch, and the gradients of one."""
    worker = Worker(ModelSettings(path=folder), OptimSettings(lr=1e-9, max_grad_norm=1e9), BUDGET)
    groups = []
    for group in torch.load(path)["groups"]:
        old = group["old"].flatten()
        advantage = group["advantage"].repeat_interleave(group["answers"].shape[1])
        groups.append(PolicyRow(_tree(group), old, advantage, old, None, None))
    totals = Totals(
        tokens=sum(group.group.trained_tokens for group in groups),
        samples=sum(len(group.group.answers) for group in groups),
        groups=len(groups),
    )
    loss = partial(grpo, clip_low=CLIP, clip_high=CLIP, aggregate="seq-mean-token-mean")

    def step() -> Done:
        found = worker.update_policy(groups, loss, totals, 0.0)
        return Done(found["loss/policy"], found["optim/grad_norm"])

    def gradients() -> tuple[Done, Prints]:
        metrics = reduce_metrics(worker.policy_gradients(groups, loss, totals))
        prints = prints_of(worker.policy.model)
        worker.optimizer.zero_grad()
        return Done(metrics["loss/policy"], math.hypot(*(norm for norm, _ in prints.values()))), prints

    return step, gradients


def run(folder: str, path: str, threads: int) -> None:
    torch.set_num_threads(threads)
    serve(*steps_of(folder, path))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2], sys.argv[3], WORKS[sys.argv[4]], int(sys.argv[5]))
    else:
        run(sys.argv[2], sys.argv[3], int(sys.argv[4]))
