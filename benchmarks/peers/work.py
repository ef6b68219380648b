"""What every system of the comparison does, in any environment that has torch: the shapes of work, and the loop that
runs one measured step at a time."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from toy_sizes import is_toy

TILE, PATCH, TOKENS_PER_TILE = 112, 14, 16
Prints = dict[str, tuple[float, float]]
CLIP = 0.2
"""All systems compute the GRPO loss (mean over answers of the mean over tokens) with this clip range."""


@dataclass(frozen=True, slots=True)
class PendingGroup:
    """One update: `groups` prompts of `prompt` tokens, `tiles` x 16 of them for each entry of `images`, and `answers`
    answers of `answer` tokens to each. The peers take `micro` answers at a time: a whole group (0) needs too much
    memory where prompts and answers are long."""

    groups: int
    prompt: int
    images: tuple[int, ...]
    answer: int
    answers: int
    micro: int = 0

    @property
    def rows(self) -> int:
        """Answers in one forward pass of a peer."""
        return self.micro or self.answers

    @property
    def tokens(self) -> int:
        """Trained tokens."""
        return self.groups * self.answers * self.answer


WORKS = {
    "check": PendingGroup(groups=2, prompt=96, images=(2, 1), answer=8, answers=4, micro=2),
    "grounding-short": PendingGroup(groups=2, prompt=1024, images=(60,), answer=64, answers=16),
    "grounding-reasoning": PendingGroup(groups=1, prompt=1792, images=(108,), answer=256, answers=16, micro=4),
    "reasoning": PendingGroup(groups=1, prompt=512, images=(28,), answer=1024, answers=8),
    "text": PendingGroup(groups=2, prompt=128, images=(), answer=512, answers=8),
    "several-images": PendingGroup(groups=1, prompt=1024, images=(15, 15, 15, 15), answer=64, answers=16),
}
if is_toy():
    WORKS = {name: replace(work, prompt=96, images=(1,) * len(work.images), answer=8, answers=4, micro=2)
             for name, work in WORKS.items()}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Done:
    """What a step gives: its loss and the norm of its gradient, to be compared; where it has phases, the processor
    seconds of each; and counts of what it did."""

    loss: float
    grad_norm: float
    phases: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


clock = time.process_time


def serve(
    step: Callable[[], Done],
    gradients: Callable[[], tuple[Done, Prints]] | None = None,
    more: Mapping[str, Callable[[], dict[str, Any]]] | None = None,
) -> None:
    """Answer each line on standard input with one JSON line. `step`: a step's loss, gradient norm, seconds by wall
    clock, seconds of processor time and its peak of memory above what the process had before its first step (MB), so
    that gradients, moments and what an allocator keeps count. `gradients`: loss, gradient norm and their prints. The
    names of `more`: what its functions give."""
    print("ready", flush=True)
    loaded = reset_peak()
    for line in sys.stdin:
        if line.strip() == "gradients" and gradients is not None:
            done, prints = gradients()
            print(json.dumps({"loss": done.loss, "grad_norm": done.grad_norm, "gradients": prints}), flush=True)
            continue
        if more and line.strip() in more:
            print(json.dumps(more[line.strip()]()), flush=True)
            continue
        reset_peak()
        wall, cpu = time.perf_counter(), clock()
        done = step()
        say(done, time.perf_counter() - wall, clock() - cpu, peak() - loaded)


def say(done: Done, wall: float, cpu: float, peak_mb: float) -> None:
    """The line that answers `step`."""
    record = {"loss": done.loss, "grad_norm": done.grad_norm, "wall": wall, "cpu": cpu, "peak_mb": peak_mb}
    print(json.dumps({**record, **done.phases, **done.counts}), flush=True)


def prints_of(model: torch.nn.Module) -> Prints:
    """Two numbers for the gradient of each parameter that has one: its norm, and its product with a fixed wave."""
    prints = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        grad: Any = parameter.grad
        grad = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).double().flatten()
        wave = torch.cos(torch.arange(len(grad), dtype=torch.float64))
        prints[name] = (grad.norm().item(), (grad @ wave).item() / wave.norm().item())
    return prints


def reset_peak() -> float:
    """Set the peak of this process' memory back to what it holds now, and return that in MB (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Largest resident memory since `reset_peak`, in MB."""
    return _status("VmHWM") / 1024


def _status(key: str) -> float:
    lines: Iterable[str] = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(key)))
