"""One packed forest against n padded copies: forward and backward of two groups of answers on one thread.

The copies go through plain transformers with SDPA attention, as systems do that know nothing of groups: prompt, image
placeholders and pixel values repeated for each answer, one group after the other (up to 10 GB of memory). Both ways
compute the same loss; the benchmark checks that too.

    python benchmarks/group_packing.py [--size wide-head] [--turns 3] [--pairs 3] [--json]

With several turns an answer has so many of `ANSWER_TOKENS` sampled tokens, each with an image of `SEEN_TILES` tiles
that is only read behind it, as a tool shows one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.toy_sizes import sized
from transformers import InternVLForConditionalGeneration

from foveate.models.checkpoint.small_files import quiet_transformers
from foveate.models.forward import token_logprobs
from foveate.models.policy import Policy, load_policy
from foveate.models.tiny import TinySize, build_tiny
from foveate.parallel.packing import pack, trained_places
from foveate.records import Answer, ImageSlot, PackedGroup, Prompt, Segment

TILE = 112
_TEXT = {"width": 256, "layers": 4, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 768}
SIZES = {
    "like-1b": (
        TinySize(tile=TILE, patch=14, vision_width=192, vision_layers=4, vision_heads=4, vision_ffn=768, **_TEXT),
        4_096,
    ),
    "wide-head": (
        TinySize(tile=TILE, patch=14, vision_width=128, vision_layers=3, vision_heads=4, vision_ffn=384, **_TEXT),
        32_768,
    ),
}
"""Widths and vocabulary. `like-1b` divides the work nearly as InternVL3.5-1B does: an image tile costs the vision tower
2.3 times what it costs the language model (there 2.8), and the head has 0.33 times the parameters of the layers below
it (there 0.35). In `wide-head` these are 0.8 and 2.7: the answers' logits, which no packing can share and which the
packed way computes once more in backward, are then most of its work."""
GROUPS, ANSWERS, PROMPT_TOKENS, TILES, ANSWER_TOKENS, SEEN_TILES = sized(
    (2, 16, 1024, 60, 64, 4), toy=(2, 3, 48, 2, 8, 1)
)
TOLERANCE = 1e-4


def make_groups(policy: Policy, vocabulary: int, generator: torch.Generator, turns: int) -> list[PackedGroup]:
    """Groups of random tokens: an image of `TILES` tiles with text around it, and `ANSWERS` answers."""

    family: Any = policy.family

    def observed() -> Segment:
        ids = np.full(SEEN_TILES * family.tokens_per_tile, family.image_token_id, np.int64)
        slots = (ImageSlot(0, len(ids), SEEN_TILES),)
        tiles = torch.randn(SEEN_TILES, 3, TILE, TILE, generator=generator)
        return Segment(ids, ids, np.zeros(0, np.float32), False, slots, tiles)

    def answer() -> Answer:
        if turns == 1:
            return Answer.written(words(ANSWER_TOKENS))
        pairs = [(Segment.written(words(ANSWER_TOKENS)), observed()) for _ in range(turns)]
        return Answer(tuple(segment for pair in pairs for segment in pair), "", "stop")

    def words(count: int) -> list[int]:
        return torch.randint(len(policy.tokenizer), vocabulary, (count,), generator=generator).tolist()

    image_tokens = TILES * family.tokens_per_tile
    packed_groups = []
    for _ in range(GROUPS):
        before = words(8)
        after = words(PROMPT_TOKENS - image_tokens - len(before))
        ids = (*before, *[policy.family.image_token_id] * image_tokens, *after)
        pixels = torch.randn(TILES, 3, TILE, TILE, generator=generator)
        prompt = Prompt(ids, (ImageSlot(len(before), image_tokens, TILES),), pixels, ids)
        packed_groups.append(PackedGroup(prompt, tuple(answer() for _ in range(ANSWERS))))
    return packed_groups


def packed_step(policy: Policy, packed_groups: list[PackedGroup]) -> float:
    """Loss of one packed row, after its backward pass."""
    logp_M, _ = token_logprobs(policy, pack(packed_groups))
    loss = -logp_M.mean()
    loss.backward()
    return loss.item()


def padded_step(model: InternVLForConditionalGeneration, packed_groups: list[PackedGroup]) -> float:
    """Loss of all copies, a group at a time to spare memory, after its backward pass."""
    total = 0.0
    for packed in packed_groups:
        assert packed.prompt.pixels is not None
        input_ids = torch.tensor([(*packed.prompt.token_ids, *answer.token_ids) for answer in packed.answers])
        length, trained = len(packed.answers[0]), trained_places(packed.answers[0])
        pixels = [
            one
            for answer in packed.answers
            for one in (packed.prompt.pixels, *(s.tiles for s in answer.segments))
            if one is not None
        ]
        out = model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            pixel_values=torch.cat(pixels),
            logits_to_keep=length + 1,
            use_cache=False,
        )
        logp = torch.log_softmax(out.logits[:, :-1].float(), -1)
        loss = -logp.gather(2, input_ids[:, -length:, None])[:, trained].mean() / len(packed_groups)
        loss.backward()
        total += loss.item()
    return total


def timed(step: Callable[[], float], model: torch.nn.Module) -> tuple[float, float]:
    """CPU seconds (the wall time of an idle core) and loss of one forward and backward pass."""
    model.zero_grad(set_to_none=True)
    begin = time.process_time()
    loss = step()
    return time.process_time() - begin, loss


def gradient_norm(model: torch.nn.Module) -> float:
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()


def run(size_name: str, turns: int, pairs: int, *, packed_only: bool) -> dict[str, Any]:
    """Seconds of each way; SystemExit where losses or norms of gradients differ."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    size, vocabulary = SIZES[size_name]
    with tempfile.TemporaryDirectory() as name:
        folder = build_tiny(Path(name), size, padded_vocabulary=vocabulary)
        policy = load_policy(str(folder))
        with quiet_transformers():
            plain = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    packed_groups = make_groups(policy, vocabulary, generator, turns)
    seconds: dict[str, list[float]] = {"packed": [], "copies": []}
    timed(lambda: packed_step(policy, packed_groups), policy.model)
    for _ in range(pairs):
        took, packed_loss = timed(lambda: packed_step(policy, packed_groups), policy.model)
        seconds["packed"].append(took)
        if packed_only:
            continue
        took, padded_loss = timed(lambda: padded_step(plain, packed_groups), plain)
        seconds["copies"].append(took)
        norms = gradient_norm(policy.model), gradient_norm(plain)
        for what, ours, theirs in (("losses", packed_loss, padded_loss), ("norms of gradients", *norms)):
            if not abs(ours - theirs) <= TOLERANCE * abs(theirs):
                raise SystemExit(f"{what} differ: {ours} packed, {theirs} of copies")
    answer_tokens = len(packed_groups[0].answers[0])
    seen = turns * SEEN_TILES if turns > 1 else 0
    return {
        "size": size_name, "turns": turns, "groups": GROUPS, "prompt_tokens": PROMPT_TOKENS, "tiles": TILES,
        "answer_tokens": answer_tokens, "answers": ANSWERS, "seconds": seconds,
        "parameters": {part: sum(p.numel() for p in policy.part(part).parameters()) for part in policy.family.parts},
        "ideal_tokens": ANSWERS * (PROMPT_TOKENS + answer_tokens) / (PROMPT_TOKENS + ANSWERS * answer_tokens),
        "ideal_tiles": ANSWERS * (TILES + seen) / (TILES + ANSWERS * seen),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="like-1b", help="widths of the model")
    parser.add_argument("--turns", type=int, default=1, help="turns of each answer, with an image behind each")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of timed runs")
    parser.add_argument("--packed-only", action="store_true", help="skip the copies: for work on the packed way")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args()
    found = run(options.size, options.turns, options.pairs, packed_only=options.packed_only)
    if options.json:
        print(json.dumps(found))
        return
    print("parameters:", ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items()))
    print(f"{GROUPS} groups, P = {PROMPT_TOKENS} ({TILES} tiles), R = {found['answer_tokens']}, n = {ANSWERS}", end="")
    print(", one thread")
    for way, seconds in found["seconds"].items():
        if seconds:
            print(f"{way}: median {statistics.median(seconds):.2f} s ({min(seconds):.2f} .. {max(seconds):.2f})")
    if options.packed_only:
        return
    ratios = [slow / fast for fast, slow in zip(*found["seconds"].values(), strict=True)]
    print(f"ratio: {statistics.median(ratios):.1f} ({min(ratios):.1f} .. {max(ratios):.1f})")
    print(f"ideal by language tokens: n(P+R)/(P+nR) = {found['ideal_tokens']:.1f}", end="; ")
    print(f"by image tiles: {found['ideal_tiles']:.1f}")


if __name__ == "__main__":
    main()
