"""The native engine against transformers' `generate` on n copies of the prompt: same model, prompt and lengths.

python benchmarks/generation.py [--pairs 5]

Both sample at temperature 1 in float32 on one thread, with the stop token out of the way so that every answer has the
full length. The two run alternately, and the ratio is that of each neighbouring pair. Seconds are of processor time,
so that other programs on the machine disturb little.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.toy_sizes import sized
from PIL import Image as Picture
from transformers import InternVLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from foveate.encoding.encode import Encoder
from foveate.models.policy import Policy, load_policy
from foveate.models.tiny import TinySize, build_tiny
from foveate.records import Image, Message, Prompt, SamplingParams, Task
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine

COLUMNS, ROWS = 5, 3
SIZE = sized(
    TinySize(
        tile=224, vision_width=128, width=256, layers=6, heads=8, kv_heads=4, head_dim=32, ffn=768,
        max_tiles=COLUMNS * ROWS,
    ),
    toy=TinySize(tile=56, width=64, layers=2, max_tiles=COLUMNS * ROWS),
)  # fmt: skip
VOCABULARY = sized(32_768, toy=1024)
SAMPLES, NEW_TOKENS, PHRASES = sized((16, 64, 98), toy=(3, 4, 5))


def picture(seed: int = 0) -> bytes:
    """A PNG of noise that is cut into 5 x 3 tiles."""
    file = BytesIO()
    shape = (ROWS * SIZE.tile, COLUMNS * SIZE.tile, 3)
    Picture.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def image_prompt(policy: Policy, seed: int = 0) -> Prompt:
    """A picture of 5 x 3 tiles and a thumbnail, 64 tokens each, and a question."""
    image = Image(None, picture(seed), COLUMNS * SIZE.tile, ROWS * SIZE.tile)
    return _encode(policy, "<image>\nWhat is shown?", (image,))


def text_prompt(policy: Policy) -> Prompt:
    """A prompt of text alone, about as long."""
    return _encode(policy, "the small red circle left of the big blue square " * PHRASES, ())


def _encode(policy: Policy, text: str, images: tuple[Image, ...]) -> Prompt:
    encoder = Encoder(policy.tokenizer, policy.family, SIZE.max_tiles, 4096)
    return encoder(Task("0", "benchmark", (Message("user", text),), images, None))


def native(policy: Policy, prompt: Prompt) -> Callable[[], int]:
    engine = NativeEngine(policy, lambda _: "")
    sampling = SamplingParams(samples=SAMPLES, max_tokens=NEW_TOKENS)

    def run() -> int:
        (answers,) = engine.generate([Request(prompt, seed=0)], sampling)
        return sum(len(answer.token_ids) for answer in answers)

    return run


def copies(policy: Policy, prompt: Prompt) -> Callable[[], int]:
    model: Any = InternVLForConditionalGeneration.from_pretrained(policy.folder, dtype=torch.float32).eval()
    token_ids = torch.tensor([prompt.token_ids]).repeat(SAMPLES, 1)
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    if prompt.pixels is not None:
        inputs["pixel_values"] = prompt.pixels.repeat(SAMPLES, 1, 1, 1)

    def run() -> int:
        with torch.inference_mode():
            out = model.generate(
                **inputs, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0
            )
        return out[:, len(prompt) :].numel()

    return run


def seconds(run: Callable[[], int]) -> float:
    started = time.process_time()
    tokens = run()
    assert tokens == SAMPLES * NEW_TOKENS, tokens
    return time.process_time() - started


def compare(name: str, policy: Policy, prompt: Prompt, pairs: int) -> dict[str, Any]:
    """Seconds of each pair."""
    ours, theirs = native(policy, prompt), copies(policy, prompt)
    for warm_up in (ours, theirs):
        warm_up()
    times = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    return {"prompt": name, "prompt_tokens": len(prompt), "pairs": times}


def say(found: dict[str, Any]) -> None:
    """Medians, the ratio of each pair and their spread."""
    times = found["pairs"]
    ratios = [copied / shared for shared, copied in times]
    print(f"{found['prompt']}: {found['prompt_tokens']} prompt tokens, {SAMPLES} answers of {NEW_TOKENS} tokens")
    print(f"  native engine            {statistics.median(shared for shared, _ in times):8.2f} s (median)")
    print(f"  transformers, {SAMPLES} copies  {statistics.median(copied for _, copied in times):8.2f} s")
    print(f"  ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs per prompt (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        policy = load_policy(str(build_tiny(Path(folder), SIZE, padded_vocabulary=VOCABULARY)))
        policy = replace(policy, family=replace(policy.family, stop_ids=(VOCABULARY,)))
        prompts = (("image", image_prompt(policy)), ("text", text_prompt(policy)))
        found = [compare(name, policy, prompt, options.pairs) for name, prompt in prompts]
    if options.json:
        print(json.dumps({"samples": SAMPLES, "new_tokens": NEW_TOKENS, "vocabulary": VOCABULARY, "prompts": found}))
        return
    for one in found:
        say(one)


if __name__ == "__main__":
    main()
