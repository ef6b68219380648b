"""Proof that an engine computes with the trainer's weights: the same probe prompts through both, compared in order of
cause: the token ids that the model reads, the number of image tokens, and then the log-probs of sampled answers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from foveate.encoding.encode import Encoder
from foveate.errors import DataError, EngineError
from foveate.models.forward import token_terms
from foveate.models.policy import Policy
from foveate.parallel.packing import engine_logprobs, pack
from foveate.records import Answer, Image, Message, PackedGroup, Prompt, SamplingParams, Task
from foveate.rollout.engine import Engine, Request

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Largest mean difference of log-probs, nats, between the kernels of a trainer and an engine with equal weights."""
_ANSWERS = SamplingParams(samples=2, max_tokens=8)
_SIZES = ((448, 448), (896, 448), (1792, 1344))


def check_engine(engine: Engine, policy: Policy, encoder: Encoder, temperature: float, version: int) -> float:
    """`compare_engine` with a policy in this process."""
    dtype = next(policy.model.parameters()).dtype
    return compare_engine(
        engine.generate,
        engine.prompt_ids,
        partial(_logprobs, policy, temperature),
        encoder,
        dtype,
        temperature,
        version,
    )


def compare_engine(
    generate: Callable[[Sequence[Request], SamplingParams], list[tuple[Answer, ...]]],
    prompt_ids: Callable[[Prompt], tuple[int, ...]],
    trainer: Callable[[list[PackedGroup]], list[Tensor]],
    encoder: Encoder,
    dtype: torch.dtype,
    temperature: float,
    version: int,
) -> float:
    """Compare an engine, by its methods, with the trainer on the probe prompts; returns the mean difference of
    log-probs, nats. The prompts are the same each time, so that anything stale in a cache of the engine shows. trainer:
    the log-probs of the answers of each group, one vector each; dtype: the coarsest that engine and trainer compute in.

    Raises EngineError that names the first thing that differs.
    """
    prompts = probe_prompts(encoder)
    _compare_prompts(prompt_ids, prompts, encoder.family.image_token_id)
    sampling = SamplingParams(_ANSWERS.samples, _ANSWERS.max_tokens, temperature)
    groups = generate([Request(prompt, seed) for seed, prompt in enumerate(prompts)], sampling)
    for group in groups:
        for answer in group:
            if answer.version != version:
                raise EngineError(f"the engine answers with weights {answer.version}, the trainer is at {version}")
    differences = _differences(trainer, prompts, groups)
    for prompt, difference in zip(prompts, differences, strict=True):
        mean = float(difference.mean())
        if not mean <= TOLERANCE[dtype]:
            raise EngineError(
                f"at weights {version} the engine's log-probs of answers to a prompt with {len(prompt)} tokens and "
                f"{len(prompt.slots)} images differ from the trainer's by {mean:.2g} nats on the mean; the limit is "
                f"{TOLERANCE[dtype]:g} in {str(dtype).removeprefix('torch.')}. Token ids agree: the weights, a cache "
                "or a kernel differ"
            )
    return float(torch.cat(differences).mean())


def logprob_differences(
    policy: Policy, prompts: Sequence[Prompt], groups: Sequence[Sequence[Answer]], temperature: float
) -> list[Tensor]:
    """Absolute differences between the engine's log-probs and the trainer's, a vector over the answer tokens of each
    prompt."""
    return _differences(partial(_logprobs, policy, temperature), prompts, groups)


def _differences(
    trainer: Callable[[list[PackedGroup]], list[Tensor]], prompts: Sequence[Prompt], groups: Sequence[Sequence[Answer]]
) -> list[Tensor]:
    packed = [PackedGroup(prompt, tuple(group)) for prompt, group in zip(prompts, groups, strict=True)]
    pairs = zip(map(engine_logprobs, packed), trainer(packed), strict=True)
    return [(sampled.to(expected) - expected).abs() for sampled, expected in pairs]


@torch.no_grad()
def _logprobs(policy: Policy, temperature: float, packed_groups: list[PackedGroup]) -> list[Tensor]:
    return [
        token_terms(policy, pack([packed]).to(policy.device), ("logp",), temperature)[0] for packed in packed_groups
    ]


def probe_prompts(encoder: Encoder) -> list[Prompt]:
    """Text alone, and images of noise of one and of more tiles: as many of them as the encoder takes."""
    tasks = [Task("probe", "probe", (Message("user", "What is 2 + 2?"),), (), None, where="the probe")]
    for seed, (width, height) in enumerate(_SIZES):
        image = _noise(seed, width, height)
        message = Message("user", "<image>\nWhat is shown?")
        tasks.append(Task("probe", "probe", (message,), (image,), None, where="the probe"))
    prompts: list[Prompt] = []
    for task in tasks:
        if not encoder.validation_errors(task):
            prompts.append(encoder(task))
    if not prompts:
        limit = encoder.max_prompt_tokens
        raise DataError(f"data.max_prompt_tokens={limit} has no room for the prompts that probe the engine")
    return prompts


def _noise(seed: int, width: int, height: int) -> Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 32, width // 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).resize((width, height)).save(file, "PNG")
    return Image(None, file.getvalue(), width, height)


def _compare_prompts(
    prompt_ids: Callable[[Prompt], tuple[int, ...]], prompts: Sequence[Prompt], image_token_id: int
) -> None:
    for prompt in prompts:
        found = prompt_ids(prompt)
        if found == prompt.token_ids:
            continue
        images, expected = found.count(image_token_id), prompt.token_ids.count(image_token_id)
        if images != expected:
            raise EngineError(
                f"the engine gives {len(prompt.slots)} images {images} tokens, the trainer {expected}: they tile "
                "differently"
            )
        pairs = zip(found, prompt.token_ids, strict=False)
        place = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(found), len(prompt)))
        raise EngineError(
            f"the engine reads {len(found)} prompt tokens and the trainer {len(prompt)}; they first differ at token "
            f"{place}: {found[place : place + 4]} against {prompt.token_ids[place : place + 4]}"
        )
