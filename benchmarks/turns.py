"""Sampling of answers with several turns by the native engine: keys and values kept between turns, against every turn
as a request of its own, whose tokens go through the model again.

    python benchmarks/turns.py [--turns 3]

Both ways sample the same answers; the benchmark checks that too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from group_packing import SIZES, TILE, make_groups

from foveate.models.policy import load_policy
from foveate.models.tiny import build_tiny
from foveate.records import Answer, ImageSlot, SamplingParams, Segment
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.rounds import stream_in_rounds

ANSWERS, TURN_TOKENS, SEEN_TILES = 16, 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="turns of each answer, with an image between them")
    turns = parser.parse_args().turns
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
    found = {}
    for way in ("kept", "again", "kept", "again"):
        engine = NativeEngine(policy, lambda ids: f"{len(ids)} tokens")
        begin = time.process_time()
        if way == "kept":
            [answers] = engine.generate(requests, sampling, observe)
        else:
            [(_, answers)] = stream_in_rounds(engine.stream, requests, sampling, observe, stop_ids)
        seconds = time.process_time() - begin
        found[way] = [answer.token_ids for answer in answers]
        stats = asdict(engine.stats)
        tokens = sum(stats[name] for name in ("prefill_tokens", "decode_tokens", "turn_tokens"))
        print(f"{way}: {seconds:.2f} s of one core, {tokens:,} tokens through the model, {stats}")
    sampled = sum(answer.trained_tokens for answer in answers)
    same = found["kept"] == found["again"]
    print(f"{ANSWERS} answers, {sampled:,} sampled tokens, prompt {len(group.prompt):,}; equal: {same}")


if __name__ == "__main__":
    main()
