"""Sampling of answers with several turns by the native engine: keys and values kept between turns, against every turn
as a request of its own, whose tokens go through the model again.

    python benchmarks/turns.py [--turns 3] [--pairs 2] [--json]

Both ways sample the same answers; the benchmark ends if they do not. Seconds are of processor time, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from group_packing import SIZES, TILE, make_groups
from peers.toy_sizes import sized

from foveate.models.policy import load_policy
from foveate.models.tiny import build_tiny
from foveate.records import Answer, ImageSlot, SamplingParams, Segment
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.rounds import stream_in_rounds

ANSWERS, TURN_TOKENS, SEEN_TILES = sized((16, 64, 4), toy=(3, 8, 1))


def run(turns: int, pairs: int) -> dict[str, Any]:
    """Seconds of each pair, (keys and values kept, every turn again), and the tokens through the model of both ways."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    size, vocabulary = SIZES["like-1b"]
    with tempfile.TemporaryDirectory() as name:
        policy = load_policy(str(build_tiny(Path(name), size, padded_vocabulary=vocabulary)))
    stop_ids = tuple(range(20, len(policy.tokenizer), TURN_TOKENS))
    policy = replace(policy, family=replace(policy.family, stop_ids=stop_ids))
    [group, _] = make_groups(policy, vocabulary, generator, 1)
    family: Any = policy.family
    ids = np.full(SEEN_TILES * family.tokens_per_tile, family.image_token_id, np.int64)
    tiles = torch.randn(SEEN_TILES, 3, TILE, TILE, generator=generator)
    slots = (ImageSlot(0, len(ids), SEEN_TILES),)
    seen = Segment(ids, ids, np.zeros(0, np.float32), False, slots, tiles)

    def observe(_index: int, _number: int, answer: Answer) -> Future[Segment | None]:
        future: Future[Segment | None] = Future()
        said = sum(segment.trained for segment in answer.segments)
        future.set_result(seen if said < turns else None)
        return future

    requests, sampling = [Request(group.prompt, 0)], SamplingParams(ANSWERS, 4 * turns * (TURN_TOKENS + len(ids)))
    seconds: dict[str, list[float]] = {"kept": [], "again": []}
    tokens: dict[str, int] = {}
    for pair in range(pairs + 1):
        answers: dict[str, tuple[Answer, ...]] = {}
        for way in seconds:
            engine = NativeEngine(policy, lambda ids: f"{len(ids)} tokens")
            begin = time.process_time()
            if way == "kept":
                [answers[way]] = engine.generate(requests, sampling, observe)
            else:
                [(_, answers[way])] = stream_in_rounds(engine.stream, requests, sampling, observe, stop_ids)
            if pair:
                seconds[way].append(time.process_time() - begin)
            stats = asdict(engine.stats)
            tokens[way] = sum(stats[name] for name in ("prefill_tokens", "decode_tokens", "turn_tokens"))
        kept, again = ([answer.token_ids for answer in answers[way]] for way in seconds)
        if kept != again:
            raise SystemExit("the two ways sample different answers")
    sampled = sum(answer.trained_tokens for answer in answers["kept"])
    shape = {"turns": turns, "answers": ANSWERS, "prompt_tokens": len(group.prompt), "sampled_tokens": sampled}
    return {**shape, "seen_tokens": len(ids), "model_tokens": tokens, "pairs": [*zip(*seconds.values(), strict=True)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="turns of each answer, with an image between them")
    parser.add_argument("--pairs", type=int, default=2, help="measured pairs")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args()
    found = run(options.turns, options.pairs)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{ANSWERS} answers, {found['sampled_tokens']:,} sampled tokens, prompt {found['prompt_tokens']:,}")
    for way, seconds in zip(("kept", "again"), zip(*found["pairs"], strict=True), strict=True):
        print(f"{way}: {statistics.median(seconds):.2f} s, {found['model_tokens'][way]:,} tokens through the model")


if __name__ == "__main__":
    main()
