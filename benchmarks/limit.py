"""How far the update and the sampling are from what the machine can do, and an H100 on paper by the same counts.

    python benchmarks/limit.py [--pairs 3] [--json]

Arithmetic is counted as in `foveate plan` (src/foveate/plan/time.py): products of matrices and attention, forward once
and backward twice that; what a kernel computes again does not count, so that it lowers the share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peers.toy_sizes import sized
from scaling import measure, worker_of
from torch import Tensor

from foveate.models.checkpoint.formats import hf_form, model_config
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.checkpoint.small_files import read_tokenizer
from foveate.models.matmul import matmul
from foveate.models.sizes import published_config
from foveate.models.tiny import build_tiny
from foveate.plan.hardware import BANDWIDTH_SHARE, FLOPS_SHARE, GPUS
from foveate.plan.time import active_parameters, language_flops, vision_flops

WIDE = sized(
    {"width": 1024, "n": 16, "P": 1024, "R": 64, "vocabulary": 4096},
    toy={"width": 64, "n": 2, "P": 32, "R": 8, "vocabulary": 4096},
)
SIDE, NUMBERS = sized((2048, 1 << 27), toy=(128, 1 << 16))
"""Of the square matrices whose product is timed, and numbers that are read from memory."""
PUBLISHED, PUBLISHED_TILES, PUBLISHED_PROMPT = ("1B", "8B"), 4, 1088
GROUPS, ANSWERS, ANSWER = 32, 16, 64


def matrix_speed(repeats: int, *, of: Callable[[Tensor, Tensor], Tensor] | None = None) -> float:
    """float32 operations per second of a product of square matrices, the best of some. `of`: by this function (None: by
    oneDNN where that is faster than PyTorch's own)."""
    left, right = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    functions = (torch.mm, matmul) if of is None else (of,)
    return 2 * SIDE**3 / min(_seconds(partial(one, left, right)) for _ in range(3 * repeats) for one in functions)


def memory_speed(repeats: int) -> float:
    """Bytes per second that one thread reads from memory: the sum of 512 MB, the best of some."""
    values = torch.ones(NUMBERS)
    return 4 * len(values) / min(_seconds(values.sum) for _ in range(3 * repeats))


def _seconds(run: Any) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def learning_flops(config: Any, prompt: int, tiles: int, answer: int, answers: int, *, shared: bool) -> float:
    """Forward and backward of one group: the prompt and its tiles once, or once for each answer."""
    if shared:
        forward = language_flops(config, prompt, answer, answers) + vision_flops(config, tiles)
    else:
        forward = answers * (language_flops(config, prompt, answer, 1) + vision_flops(config, tiles))
    return 3 * forward


def wide_update(repeats: int) -> dict[str, float]:
    """Arithmetic and seconds of an update at width 1,024 and what share of the machine's speed that is, matrix speed
    measured before and after each repeat."""
    worker = worker_of(WIDE["width"], WIDE["vocabulary"])
    flops = learning_flops(worker.policy.model.config, WIDE["P"], 0, WIDE["R"], WIDE["n"], shared=True)
    shares, seconds, speeds = [], [], []
    for _ in range(repeats):
        before = matrix_speed(1)
        seconds.append(measure(worker, WIDE["n"], WIDE["P"], WIDE["R"], 1)["seconds"])
        speeds.append(max(before, matrix_speed(1)))
        shares.append(flops / seconds[-1] / speeds[-1])
    return {
        "flops": flops, "seconds": statistics.median(seconds), "matrix_flops": statistics.median(speeds),
        "share": statistics.median(shares), "lowest": min(shares), "highest": max(shares),
    }  # fmt: skip


def works() -> dict[str, dict[str, float]]:
    """Arithmetic of one group of each work of the comparison, shared and with a copy of the prompt per answer."""
    from foveate_step import SIZE
    from work import WORKS

    with TemporaryDirectory() as name:
        folder = build_tiny(Path(name), SIZE, padded_vocabulary=4096)
        config: Any = model_config(folder, hf_form(folder, read_tokenizer(folder)))
    found = {}
    for name, work in WORKS.items():
        shape = (config, work.prompt, sum(work.images), work.answer, work.answers)
        found[name] = {
            "shared": work.groups * learning_flops(*shape, shared=True),
            "copies": work.groups * learning_flops(*shape, shared=False),
        }
    return found


def on_paper(size: str) -> dict[str, float]:
    """Seconds on one H100 by the same counts and the shares of its data sheet that `foveate plan` assumes: the update,
    and the tokens of all answers, for which weights are read once a step and every answer's keys and values."""
    gpu = GPUS["H100-80"]
    config: Any = published_config(size)
    speed, bandwidth = gpu.flops * FLOPS_SHARE, gpu.bandwidth * BANDWIDTH_SHARE
    shape = (config, PUBLISHED_PROMPT, PUBLISHED_TILES, ANSWER, ANSWERS)
    text = config.text_config
    weights = 2 * (active_parameters(config) + text.vocab_size * text.hidden_size)
    token = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    once = GROUPS * (PUBLISHED_PROMPT + ANSWERS * ANSWER / 2) * token
    each = GROUPS * ANSWERS * (PUBLISHED_PROMPT + ANSWER / 2) * token
    prefill = language_flops(config, PUBLISHED_PROMPT, 0, 0) + vision_flops(config, PUBLISHED_TILES)
    return {
        "update": GROUPS * learning_flops(*shape, shared=True) / speed,
        "update_copies": GROUPS * learning_flops(*shape, shared=False) / speed,
        "prefill": GROUPS * prefill / speed,
        "decode": ANSWER * (weights + once) / bandwidth,
        "decode_copies": ANSWER * (weights + each) / bandwidth,
    }


def decode_limit(bandwidth: float) -> dict[str, float]:
    """What sampling in the whole step needs: arithmetic of the prompts; then, for each token, weights, head and
    the keys and values of prompts once per group, read at the measured speed of memory."""
    import picture_task as task
    from foveate_step import SIZE
    from work import WORKS

    work = WORKS["grounding-short"]
    with TemporaryDirectory() as name:
        folder = build_tiny(Path(name), SIZE, padded_vocabulary=4096)
        config: Any = model_config(folder, hf_form(folder, read_tokenizer(folder)))
    text = config.text_config
    weights = 4 * (active_parameters(config) + text.vocab_size * text.hidden_size)
    token = 2 * 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    kept = task.GROUPS * (work.prompt + task.ANSWERS * task.ANSWER_TOKENS / 2) * token
    prefill = task.GROUPS * (language_flops(config, work.prompt, 0, 0) + vision_flops(config, task.TILES + 1))
    answers = task.GROUPS * task.ANSWERS * task.ANSWER_TOKENS
    grown = 2 * (active_parameters(config) + text.vocab_size * text.hidden_size) * answers
    return {
        "prefill_flops": prefill, "decode_flops": grown, "decode_bytes": task.ANSWER_TOKENS * (weights + kept),
        "decode_seconds": task.ANSWER_TOKENS * (weights + kept) / bandwidth,
    }  # fmt: skip


def share_of_step(folder: Path, records: list[dict[str, Any]], groups: int, answers: int) -> dict[str, float]:
    """Arithmetic of sampling and learning in a whole step of text, and what share of the machine's matrix speed the
    medians of its records are."""
    config: Any = inspect_model_folder(str(folder)).config
    prompt, answer = (
        statistics.median(r[key] for r in records) / many
        for key, many in (("prompt_tokens", groups), ("answer_tokens", groups * answers))
    )
    once = groups * language_flops(config, prompt, answer, answers)
    generate, update, whole = (statistics.median(r[key] for r in records) for key in ("generate", "update", "cpu"))
    speed = matrix_speed(3)
    return {
        "matrix_flops": speed, "torch_matrix_flops": matrix_speed(3, of=torch.mm),
        "sampling_flops": once, "update_flops": 3 * once,
        "sampling_share": once / generate / speed, "update_share": 3 * once / update / speed,
        "share": 4 * once / whole / speed,
    }  # fmt: skip


def run(repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    bandwidth = memory_speed(repeats)
    return {
        "matrix_flops": matrix_speed(repeats), "torch_matrix_flops": matrix_speed(repeats, of=torch.mm),
        "memory_bytes": bandwidth,
        "wide": WIDE, "wide_update": wide_update(repeats),
        "works": works(), "sampling": decode_limit(bandwidth), "h100": {size: on_paper(size) for size in PUBLISHED},
        "h100_shape": {
            "groups": GROUPS, "answers": ANSWERS, "answer": ANSWER, "prompt": PUBLISHED_PROMPT, "tiles": PUBLISHED_TILES
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="measured repeats")
    parser.add_argument("--json", action="store_true", help="on one line")
    options = parser.parse_args()
    print(json.dumps(run(options.pairs), indent=None if options.json else 1))


if __name__ == "__main__":
    main()
