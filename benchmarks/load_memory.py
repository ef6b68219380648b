"""Peak host memory of each rank while a sharded model is read, against reading it whole and cutting it.

    python benchmarks/load_memory.py [--folder /scratch]

The checkpoint has the widths of InternVL3.5-1B in bfloat16 in the GitHub format, with 8 layers in each tower, random
bytes. Every rank is a process of its own on the CPU; what it takes is its largest resident memory less what it had
before (Python, torch and transformers). That must stay below its share of the weights plus twice the largest tensor
plus 150 MB.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from convert_memory import synthesise, tiny
from peers.toy_sizes import sized
from transformers import InternVLConfig

from foveate.config.cluster import ClusterSettings
from foveate.models.policy import load_policy
from foveate.models.sharded import allocate, load_sharded, meta_policy
from foveate.models.sizes import IMAGE_TOKEN_ID, PUBLISHED_SIZES
from foveate.parallel.fsdp import LogProbs, mesh_of, shard

LAYERS = 8
RANKS, MARGIN = sized(((1, 2, 4), 150 * 10**6), toy=((2,), 10**9))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where to put the 1 GB; else a temporary folder")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as name:
        folder, failed = Path(name), False
        largest, total = synthesise(folder / "chat", sized(shallow, toy=tiny)())
        print(f"checkpoint {total / 1e6:,.0f} MB, largest tensor {largest / 1e6:,.0f} MB")
        for ranks in RANKS:
            for how in ("whole", "filled"):
                meeting = folder / f"{how}-{ranks}"
                mp.start_processes(on_rank, (ranks, how, str(folder), str(meeting)), ranks, start_method="spawn")  # pyright: ignore[reportPrivateImportUsage]
                found = [torch.load(f"{meeting}.{rank}") for rank in range(ranks)]
                peak, seconds = max(one[0] for one in found), max(one[1] for one in found)
                limit = total / ranks + 2 * largest + MARGIN
                failed |= how == "filled" and peak > limit
                print(f"{ranks} ranks, {how:6}: {peak / 1e6:7,.0f} MB a rank, {seconds:5.1f} s; {limit / 1e6:,.0f} MB")
        if failed:
            raise SystemExit("too much memory")


def shallow() -> InternVLConfig:
    vision, text = ({**one, "num_hidden_layers": LAYERS} for one in PUBLISHED_SIZES["1B"])
    return InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN_ID, tie_word_embeddings=False
    )


def on_rank(rank: int, ranks: int, how: str, folder: str, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    cluster, path = ClusterSettings(gpus_per_node=ranks), f"{folder}/chat"
    meta_policy(path, dtype="bfloat16")  # imports what a model needs
    gc.collect()
    before, start = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    policy = (load_policy if how == "whole" else meta_policy)(path, dtype="bfloat16")
    root = shard(LogProbs(policy), mesh_of(cluster, "cpu"), cluster)
    if how == "filled":
        allocate(policy, root, "cpu")
        load_sharded(policy)
    torch.save((resident("VmHWM") - before, time.perf_counter() - start), f"{meeting}.{rank}")
    dist.destroy_process_group()


def resident(line: str) -> int:
    """Bytes of resident memory, as the line of that name says."""
    text = Path("/proc/self/status").read_text()
    return int(next(own for own in text.splitlines() if own.startswith(f"{line}:")).split()[1]) * 1024


if __name__ == "__main__":
    main()
