"""Memory of log-probs and entropy over a large vocabulary: chunked against all logits at once.

Each way runs in a process of its own; its peak is the growth of the process's resident memory beyond the inputs and
the libraries, as the kernel counts it (VmHWM, Linux). The chunked way must need at most a fifth. The plain way needs
about 13 GB for the full size; `--tokens 1024` asks for a quarter of it.

    python benchmarks/logprobs_memory.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from foveate.models.logprobs import chunked_logprobs, plain_logprobs

WIDTH, VOCABULARY = 1024, 151_936
WAYS = {"plain": plain_logprobs, "chunked": chunked_logprobs}


def memory_gb(field: str) -> float:
    """A field of /proc/self/status in GB: VmRSS (now) or VmHWM (the peak since it was last reset)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e9


def measure(way: str, tokens: int, result: Path) -> None:
    """Run one way, forward and backward, and save its values, gradients, peak memory and time."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5 * 3).requires_grad_()
    token_ids = torch.randint(VOCABULARY, (tokens,), generator=generator)
    torch.mm(torch.randn(8, 8), torch.randn(8, 8))  # what the first product loads is not counted
    before = memory_gb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    begin = time.process_time()
    logp, entropy = WAYS[way](hidden, weight, token_ids, 1.0)
    (-logp.mean() - 0.01 * entropy.mean()).backward()
    seconds = time.process_time() - begin
    peak = memory_gb("VmHWM") - before
    torch.save([peak, seconds, logp.detach(), entropy.detach(), hidden.grad, weight.grad], result)


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        measure(arguments.way, arguments.tokens, arguments.result)
        return
    print(f"T = {arguments.tokens:,}, D = {WIDTH:,}, V = {VOCABULARY:,}, float32, forward and backward, one thread")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            result = Path(folder) / way
            command = [
                sys.executable,
                __file__,
                "--tokens",
                str(arguments.tokens),
                "--way",
                way,
                "--result",
                str(result),
            ]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found[way] = torch.load(result)
            print(f"{way:8} peak {found[way][0]:6.2f} GB, {found[way][1]:6.1f} CPU seconds")
    names = ("log-probs", "entropy", "gradient of hidden", "gradient of weight")
    for name, got, wanted in zip(names, found["chunked"][2:], found["plain"][2:], strict=True):
        print(f"relative difference of {name}: {difference(got, wanted):.1e}")
    print(f"peak memory: 1 / {found['plain'][0] / found['chunked'][0]:.1f} of the plain way (aim: at most 1 / 5)")


if __name__ == "__main__":
    main()
