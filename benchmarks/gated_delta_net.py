"""Qwen3.5 in the forest against plain transformers on n copies of the prompt: an update, and sampling.

    python benchmarks/gated_delta_net.py [--pairs 3] [--json]

A small random model of that architecture, three of four layers Gated DeltaNet, float32, one thread. An update is the
forward and backward of a group of 16 answers of 64 tokens to a prompt of 1,024; the copies are rows of one length, so
that they need no padding. Sampling gives as many answers, by `generate` on 16 copies. Seconds are of processor time, so
that other programs on the machine disturb little. Memory is the largest resident memory of a process of its own, less
what it had before the step.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers.toy_sizes import sized
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from foveate.models.attention.gated_delta_net import replace_layers
from foveate.models.attention.kernels import KERNELS
from foveate.models.families.qwen_vl import Qwen35
from foveate.models.forward import token_logprobs
from foveate.models.policy import Policy
from foveate.models.tiny import tiny_tokenizer
from foveate.parallel.packing import pack
from foveate.records import PackedGroup, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine

PROMPT_TOKENS, ANSWER_TOKENS, ANSWERS = sized((1024, 64, 16), toy=(48, 6, 3))
VOCABULARY = 4096
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64, "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256}


def plain_model(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = Qwen3_5Config(text_config=TEXT, vision_config=VISION)
    kernels: Any = {"text_config": attention, "vision_config": "sdpa"}
    model = Qwen3_5ForConditionalGeneration._from_config(config, attn_implementation=kernels)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-4, 1)
    return model.float().eval()


def policy_of(model: Any) -> Policy:
    none = {"patch": 16, "merge": 2, "repeats": 2, "min_pixels": 1, "mean": (), "std": ()}
    family = Qwen35(name="qwen3_5", stop_ids=(VOCABULARY,), **none)
    tokenizer: Any = tiny_tokenizer(640)
    return Policy(replace_layers(model), tokenizer, family, Path(), "hf")


def group() -> PackedGroup:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 600, (PROMPT_TOKENS + ANSWERS * ANSWER_TOKENS,), generator=generator)
    prompt, answers = ids[:PROMPT_TOKENS].tolist(), ids[PROMPT_TOKENS:].view(ANSWERS, -1).tolist()
    return PackedGroup.of_tokens(Prompt(tuple(prompt), (), None, tuple(prompt)), map(tuple, answers))


def packed_update() -> Callable[[], float]:
    policy, packed = policy_of(plain_model(KERNELS["auto"])), group()

    def step() -> float:
        loss = -token_logprobs(policy, pack([packed]))[0].mean()
        loss.backward()
        return loss.item()

    return step


def copied_update() -> Callable[[], float]:
    model, packed = plain_model(), group()
    ids = torch.tensor([(*packed.prompt.token_ids, *answer.token_ids) for answer in packed.answers])

    def step() -> float:
        logits = model(input_ids=ids, logits_to_keep=ANSWER_TOKENS + 1, use_cache=False).logits[:, :-1]
        loss = -torch.log_softmax(logits, -1).gather(2, ids[:, -ANSWER_TOKENS:, None]).mean()
        loss.backward()
        return loss.item()

    return step


def native_sampling() -> Callable[[], float]:
    engine = NativeEngine(policy_of(plain_model(KERNELS["auto"])), lambda _: "")
    sampling = SamplingParams(samples=ANSWERS, max_tokens=ANSWER_TOKENS)
    request = Request(group().prompt, seed=0)
    return lambda: float(sum(len(answer) for answer in engine.generate([request], sampling)[0]))


def copied_sampling() -> Callable[[], float]:
    model = plain_model()
    ids = torch.tensor([group().prompt.token_ids]).repeat(ANSWERS, 1)
    length = {"max_new_tokens": ANSWER_TOKENS, "min_new_tokens": ANSWER_TOKENS, "pad_token_id": 0}

    @torch.inference_mode()
    def step() -> float:
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, **length)
        return float(out[:, PROMPT_TOKENS:].numel())

    return step


def measured(make: Callable[[], Callable[[], float]], pairs: int, sent: Any) -> None:
    """Seconds of each step, the first of which is not counted, the bytes of the first one, and what it gave."""
    torch.set_num_threads(1)
    step = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = step()
    taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    seconds = []
    for _ in range(pairs):
        begin = time.process_time()
        step()
        seconds.append(time.process_time() - begin)
    sent.send((seconds, taken, result))


def apart(make: Callable[[], Callable[[], float]], pairs: int) -> tuple[list[float], int, float]:
    """`measured` in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    received, sent = spawn.Pipe()
    process = spawn.Process(target=measured, args=(make, pairs, sent))
    process.start()
    found = received.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="measured steps of each kind (default 3)")
    parser.add_argument("--only", choices=("update", "sampling"), help="one of the two")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args()
    kinds = {"update": (packed_update, copied_update), "sampling": (native_sampling, copied_sampling)}
    shape = {"prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS, "answers": ANSWERS}
    found: dict[str, Any] = {**shape, "kinds": {}}
    for name, ways in kinds.items():
        if options.only in (None, name):
            (ours_s, ours_bytes, ours), (theirs_s, theirs_bytes, theirs) = (apart(way, options.pairs) for way in ways)
            if not abs(ours - theirs) < 1e-4:
                raise SystemExit(f"{name}: {ours} in the forest, {theirs} of copies: nothing is timed")
            found["kinds"][name] = {
                "pairs": [*zip(ours_s, theirs_s, strict=True)], "mb": [ours_bytes / 1e6, theirs_bytes / 1e6],
            }  # fmt: skip
    if options.json:
        print(json.dumps(found))
        return
    print(f"P = {PROMPT_TOKENS}, R = {ANSWER_TOKENS}, n = {ANSWERS}, one thread")
    for name, kind in found["kinds"].items():
        mine, other = (statistics.median(seconds) for seconds in zip(*kind["pairs"], strict=True))
        ours_mb, theirs_mb = kind["mb"]
        print(f"{name}: {mine:.2f} s, {ours_mb:,.0f} MB; copies {other:.2f} s, {theirs_mb:,.0f} MB", end=": ")
        print(f"{other / mine:.2f} times as fast, memory {ours_mb / max(theirs_mb, 1e-9):.2f}")


if __name__ == "__main__":
    main()
