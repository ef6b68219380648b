"""Time and memory of foveate's update over n, P, R, vocabulary and width, each alone, with the exponent fitted to it.

python benchmarks/scaling.py [--pairs 3] [--json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from foveate_step import SIZE
from toy_sizes import sized
from work import CLIP, peak, reset_peak

from foveate.algorithms.policy_losses import grpo
from foveate.algorithms.targets import Totals
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.models.tiny import build_tiny
from foveate.records import PackedGroup, Prompt
from foveate.train.targets import PolicyRow
from foveate.train.worker import Worker

BASE = sized(
    {"n": 8, "P": 512, "R": 64, "vocabulary": 4096, "width": 256},
    toy={"n": 2, "P": 16, "R": 4, "vocabulary": 4096, "width": 64},
)
CURVES = sized(
    {
        "n": (2, 4, 8, 16, 32),
        "P": (128, 256, 512, 1024, 2048),
        "R": (16, 32, 64, 128, 256),
        "vocabulary": (8192, 16_384, 32_768, 65_536, 131_072),
        "width": (128, 256, 512, 1024),
    },
    toy={"n": (2, 16), "P": (16, 128)},
)
"""One group of text, so that an image's share hides nothing; what a curve does not vary is as in `BASE`."""


def worker_of(width: int, vocabulary: int) -> Worker:
    size = replace(SIZE, width=width, heads=width // 32, kv_heads=max(1, width // 64), ffn=3 * width)
    with tempfile.TemporaryDirectory() as folder:
        build_tiny(Path(folder), size, padded_vocabulary=vocabulary)
        return Worker(ModelSettings(path=folder), OptimSettings(lr=1e-9), 1 << 20)


def measure(worker: Worker, n: int, prompt: int, answer: int, repeats: int) -> dict[str, float]:
    """Median processor seconds of forward and backward, and the peak of memory beside weights and gradients, which
    means something in a process that has done nothing else: an allocator keeps what was freed."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(700, 4096, (count,), generator=generator).tolist())

    ids = words(prompt)
    packed = PackedGroup.of_tokens(Prompt(ids, (), None, ids), tuple(words(answer) for _ in range(n)))
    engine = torch.full((n * answer,), -math.log(4096))
    group = PolicyRow(packed, engine, torch.randn(n * answer, generator=generator), None, None, None)
    totals = Totals(tokens=n * answer, samples=n, groups=1)
    loss = partial(grpo, clip_low=CLIP, clip_high=CLIP)
    seconds, loaded, gradients = [], reset_peak(), 0
    for _ in range(repeats + 1):
        started = time.process_time()
        worker.policy_gradients([group], loss, totals)
        seconds.append(time.process_time() - started)
        found = [p.grad for p in worker.policy.model.parameters() if p.grad is not None]
        gradients = sum(grad.nbytes for grad in found)
        worker.optimizer.zero_grad()
    return {"seconds": statistics.median(seconds[1:]), "mb": max(0.01, peak() - loaded - gradients / 2**20)}


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of a straight line through the logarithms."""
    x, y = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def curve(name: str, repeats: int) -> list[dict[str, float]]:
    """A process of its own for each point."""
    points = []
    for value in CURVES[name]:
        command = [sys.executable, __file__, "--pairs", str(repeats), "--point", json.dumps({**BASE, name: value})]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        points.append({"at": value, **json.loads(out.splitlines()[-1])})
        print(name, points[-1], file=sys.stderr, flush=True)
    return points


def one_point(shape: dict[str, int], repeats: int) -> dict[str, float]:
    worker = worker_of(shape["width"], shape["vocabulary"])
    small = measure(worker, 2, 16, 4, 1)  # libraries that the first step loads are not the shape's
    assert small["seconds"] > 0
    return measure(worker, shape["n"], shape["P"], shape["R"], repeats)


def marginal(points: list[dict[str, float]], tokens: int) -> float:
    """Seconds that one more answer takes, per token of `tokens`."""
    slope = statistics.linear_regression([p["at"] for p in points], [p["seconds"] for p in points]).slope
    return slope / tokens


def run(repeats: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    curves = {name: curve(name, repeats) for name in CURVES}
    exponents = {
        name: {key: exponent([(p["at"], p[key]) for p in points]) for key in ("seconds", "mb")}
        for name, points in curves.items()
    }
    # the seconds of a token of the prompt, from the curve over P, beside those of a token of an answer over n
    return {
        "base": BASE, "curves": curves, "exponents": exponents,
        "answer_token_seconds": marginal(curves["n"], BASE["R"]), "prompt_token_seconds": marginal(curves["P"], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="measured repeats of each point")
    parser.add_argument("--json", action="store_true", help="on one line")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point is not None:
        torch.set_num_threads(1)
        print(json.dumps(one_point(options.point, options.pairs)))
        return
    print(json.dumps(run(options.pairs), indent=None if options.json else 1))


if __name__ == "__main__":
    main()
