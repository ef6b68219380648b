"""Peak memory of real updates on the CPU against what `foveate plan` says: three sizes of model, three shapes of batch.

Each case runs in a fresh process: baseline after a small model has done the same, one update to fill the optimizer's
state, then the peak of resident memory during a second one (VmHWM, cleared in between). Large blocks go back to the
system at once (MALLOC_MMAP_THRESHOLD_), so that resident memory is what is in use. Linux only; minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers.toy_sizes import sized

MIB = 2**20
SIZES = {
    "12 M": {"width": 192, "layers": 6, "heads": 6, "kv_heads": 2, "head_dim": 32, "ffn": 576, "vocabulary": 8192},
    "40 M": {"width": 384, "layers": 8, "heads": 6, "kv_heads": 2, "head_dim": 64, "ffn": 1152, "vocabulary": 16384},
    "99 M": {"width": 640, "layers": 10, "heads": 10, "kv_heads": 2, "head_dim": 64, "ffn": 1920, "vocabulary": 24576},
}
SHAPES = {  # prompt tokens, tiles of 16 tokens, answers, tokens of an answer, gradient checkpointing
    "mostly image": (340, 20, 8, 32, False),
    "mostly answers": (128, 4, 4, 192, False),
    "checkpointed": (512, 24, 8, 128, True),
}
SIZES, SHAPES = sized((SIZES, SHAPES), toy=({"12 M": SIZES["12 M"]}, {"toy": (40, 2, 2, 8, False)}))


def case(size: str, shape: str) -> tuple[float, float]:
    """Measured and planned peak in bytes."""
    import torch

    from foveate.config.cluster import ClusterSettings
    from foveate.config.train import OptimSettings
    from foveate.models.tiny import TinySize
    from foveate.plan.memory import memory_of
    from foveate.plan.workload import Workload

    torch.set_num_threads(1)
    prompt, tiles, answers, length, checkpointing = SHAPES[shape]
    sizes = {name: value for name, value in SIZES[size].items() if name != "vocabulary"}
    tiny = TinySize(vision_width=192, vision_layers=6, vision_ffn=768, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        _updated(Path(folder) / "warm", TinySize(), 0, (20, 1, 2, 4, checkpointing))  # loads what code is needed
        baseline = resident("VmRSS")
        worker = _updated(Path(folder) / "model", tiny, SIZES[size]["vocabulary"], SHAPES[shape])
        measured = resident("VmHWM") - baseline
    work = Workload(
        config=worker.policy.model.config, trainable=("vision", "projector", "language"), dtype=torch.float32,
        checkpointing=checkpointing, cluster=ClusterSettings(device="cpu"), budget=prompt + answers * length, steps=1,
        groups=2, answers=answers, updates=1, prompt=prompt, answer=length, tiles=tiles, longest=length, generates=True,
        forwards=0, reference=False, optim=OptimSettings(lr=1e-3),
    )  # fmt: skip
    return measured, memory_of(work).training


def _updated(folder: Path, tiny: Any, vocabulary: int, shape: tuple[int, int, int, int, bool]) -> Any:
    """A worker after two updates on two groups each, a micro-batch per group; the mark of the peak is that of the
    second update."""
    import torch

    from foveate.algorithms.policy_losses import gspo
    from foveate.algorithms.targets import Totals
    from foveate.config.model import ModelSettings
    from foveate.config.train import OptimSettings
    from foveate.models.tiny import build_tiny
    from foveate.records import ImageSlot, PackedGroup, Prompt
    from foveate.train.targets import PolicyRow
    from foveate.train.worker import Worker

    prompt, tiles, answers, length, checkpointing = shape
    build_tiny(folder, tiny, padded_vocabulary=vocabulary)
    settings = ModelSettings(path=str(folder), gradient_checkpointing=checkpointing)
    worker = Worker(settings, OptimSettings(lr=1e-6), prompt + answers * length)
    image = worker.policy.family.image_token_id
    groups = []
    for _ in range(2):
        ids = (image,) * 16 * tiles + (7,) * (prompt - 16 * tiles)
        full = Prompt(ids, (ImageSlot(0, 16 * tiles, tiles),), torch.randn(tiles, 3, 112, 112), ())
        packed = PackedGroup.of_tokens(
            full, tuple(tuple(torch.randint(0, 300, (length,)).tolist()) for _ in range(answers))
        )
        advantage = torch.tensor((1.0, -1.0) * (answers // 2)).repeat_interleave(length)
        groups.append(PolicyRow(packed, torch.zeros(answers * length), advantage, None, None, None))
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")
        worker.update_policy(groups, gspo, Totals(2 * answers * length, 2 * answers, 2), 1e-6)
    return worker


def resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    print("| model | batch | measured MiB | planned MiB | planned / measured |\n|---|---|---|---|---|")
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    for size in SIZES:
        for shape in SHAPES:
            command = [sys.executable, __file__, size, shape]
            out = subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True, text=True)
            measured, planned = json.loads(out.stdout.splitlines()[-1])
            print(
                f"| {size} | {shape} | {measured / MIB:.0f} | {planned / MIB:.0f} | {planned / measured:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(case(sys.argv[1], sys.argv[2])))
    else:
        main()
