"""What it costs to bring weights to another process, in units of copying their bytes there once.

    python benchmarks/publish.py transfer [--mb 500] [--buckets 8 32 128 512] [--pairs 7]
    python benchmarks/publish.py engine --program ENV/bin/vllm [--pairs 5]

`transfer`: gloo on the loopback between two processes of one thread each. The unit is one broadcast of as many bytes in
one piece. Against it stand our buckets, filled, with their checksums, compared and copied into the receiver's own
tensors; both in turn, so that the machine's state is the same for both. `engine`: whole publishes into a real vLLM
server, whose loading of the weights is vLLM's own. Memory: how far the use of this process rises while it sends.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from foveate.rollout.server.weights import TRAILER, Bucket, Sender, plan_buckets

PATIENCE = timedelta(seconds=600)
Rounds = list[tuple[str, int]]


def model_like(megabytes: int) -> list[tuple[str, Tensor]]:
    """Tensors in the proportions of a small language model: layers of width 1,024, the rest in one embedding."""
    shapes = [(1024, 1024), (512, 1024), (512, 1024), (1024, 1024), (3072, 1024), (3072, 1024), (1024, 3072), (1024,)]
    layer = sum(4 * torch.Size(shape).numel() for shape in shapes)
    layers = max(1, int(0.75 * (megabytes << 20) / layer))
    weights = [(f"layers.{i}.{j}", torch.randn(shape)) for i in range(layers) for j, shape in enumerate(shapes)]
    rows = max(1, ((megabytes << 20) - layers * layer) // 4096)
    return [*weights, ("embedding", torch.randn(rows, 1024))]


def rounds_of(buckets_mb: list[int], pairs: int) -> Rounds:
    """What happens in order: each kind of bucket, once to warm up, with the unit before it."""
    return [one for _ in range(pairs + 1) for mb in buckets_mb for one in (("plain", 0), ("ours", mb))]


def measure_transfer(megabytes: int, buckets_mb: list[int], pairs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights = model_like(megabytes)
    total = sum(4 * tensor.numel() for _, tensor in weights)
    sender = Sender("127.0.0.1", 2, torch.device("cpu"), 600)
    arguments = {"port": sender.port, "megabytes": megabytes, "rounds": rounds_of(buckets_mb, pairs)}
    command = [sys.executable, __file__, "receive", json.dumps(arguments)]
    found: dict[int, dict[str, list[float]]] = {mb: {"plain": [], "ours": [], "memory_mb": []} for mb in buckets_mb}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "started\n"  # the sender waits for two minutes at most
        sender.connect("weights")
        flat, of = torch.randint(0, 255, (total,), dtype=torch.uint8), buckets_mb[0]
        for number, (kind, mb) in enumerate(arguments["rounds"]):
            of = mb or arguments["rounds"][number + 1][1]
            assert receiver.stdout.readline() == "ready\n"
            before = resident_mb()
            begin = time.perf_counter()
            if kind == "plain":
                sender.broadcast([flat])
            else:
                sender.send(plan_buckets(weights, mb << 19))
            assert receiver.stdout.readline() == "done\n"
            seconds = time.perf_counter() - begin
            if number >= 2 * len(buckets_mb):
                found[of][kind].append(seconds)
                if kind == "ours":
                    found[of]["memory_mb"].append(peak_mb() - before)
            reset_peak()
    assert receiver.returncode == 0
    return {"bytes": total, "by_bucket_mb": found}


def receive(port: int, megabytes: int, rounds: Rounds) -> None:
    torch.set_num_threads(1)
    weights = model_like(megabytes)
    total = sum(4 * tensor.numel() for _, tensor in weights)
    print("started", flush=True)
    group: Any = ProcessGroupGloo(
        PrefixStore("weights", TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)), 1, 2, PATIENCE
    )
    for kind, mb in rounds:
        print("ready", flush=True)
        if kind == "plain":
            group.broadcast(torch.empty(total, dtype=torch.uint8), 0).wait()
        else:
            load(group, plan_buckets(weights, mb << 19))
        print("done", flush=True)


def load(group: Any, buckets: list[Bucket]) -> None:
    """As `Receiver.receive_weights` of the plug-in, with a plain copy for vLLM's loading."""
    coming = (begin(group, bucket) for bucket in buckets)
    ahead = next(coming)
    for number, bucket in enumerate(buckets):
        flat, works = ahead
        for work in works:
            work.wait()
        ahead = next(coming, ahead)
        words = flat.view(torch.int64)
        assert (int(words[:-2].sum()), number) == (int(words[-2]), int(words[-1]))
        for _, tensor, at in bucket.tensors:
            size = tensor.numel() * tensor.element_size()
            tensor.copy_(flat[at : at + size].view(tensor.dtype).view(tensor.shape))


def begin(group: Any, bucket: Bucket) -> tuple[Tensor, list[Any]]:
    flat = torch.empty(bucket.size + TRAILER, dtype=torch.uint8)
    parts = (flat[:-TRAILER], flat[-TRAILER:]) if bucket.alone else (flat,)
    return flat, [group.broadcast(part, 0) for part in parts]


def measure_engine(program: str, megabytes: int, bucket_mb: int, pairs: int) -> dict[str, Any]:
    """Seconds of whole publishes, and of the parts that are calls to the server."""
    from foveate.encoding.encode import Encoder
    from foveate.models.policy import load_policy
    from foveate.models.tiny import TinySize, build_tiny
    from foveate.rollout.vllm.engine import VLLMEngine

    torch.set_num_threads(1)
    layers = max(1, round(megabytes / 63))
    size = TinySize(width=1024, ffn=3072, layers=layers, heads=8, kv_heads=4, head_dim=128, tile=56)
    with tempfile.TemporaryDirectory() as folder:
        policy = load_policy(str(build_tiny(Path(folder) / "model", size)))
        encoder = Encoder(policy.tokenizer, policy.family, 12, 1024)
        total = sum(4 * parameter.numel() for parameter in policy.model.parameters())
        engine = VLLMEngine(policy, encoder.decode, program=program, longest=2048, memory_mb=256, bucket_mb=bucket_mb)
        server, call = engine.servers[0], engine.servers[0].call
        calls: dict[str, list[float]] = {}

        def timed(method: str, path: str, *rest: Any, **more: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(method, path, *rest, **more)
            finally:
                calls.setdefault(path.split("?")[0], []).append(time.perf_counter() - started)

        server.call = timed  # type: ignore[method-assign]
        whole, memory = [], []
        for version in range(1, pairs + 2):
            reset_peak()
            before, started = resident_mb(), time.perf_counter()
            engine.publish(version, policy.model.named_parameters())
            whole.append(time.perf_counter() - started)
            memory.append(peak_mb() - before)
        engine.close()
    parts = {path: statistics.median(seconds[1:]) for path, seconds in calls.items()}
    return {"bytes": total, "bucket_mb": bucket_mb, "seconds": whole[1:], "calls": parts, "memory_mb": memory[1:]}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_mb() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    transfer = parts.add_parser("transfer")
    transfer.add_argument("--mb", type=int, default=500)
    transfer.add_argument(
        "--buckets", type=int, nargs="+", default=[8, 32, 128, 512], help="MB, as rollout's bucket_mb"
    )
    transfer.add_argument("--pairs", type=int, default=7)
    engine = parts.add_parser("engine")
    engine.add_argument("--program", required=True)
    engine.add_argument("--mb", type=int, default=500)
    engine.add_argument("--bucket", type=int, default=64)
    engine.add_argument("--pairs", type=int, default=5)
    receiver = parts.add_parser("receive")
    receiver.add_argument("arguments", type=json.loads)
    chosen = parser.parse_args()
    if chosen.part == "receive":
        receive(**chosen.arguments)
        return
    if chosen.part == "engine":
        print(json.dumps(measure_engine(chosen.program, chosen.mb, chosen.bucket, chosen.pairs)))
        return
    found = measure_transfer(chosen.mb, chosen.buckets, chosen.pairs)
    for mb, one in found["by_bucket_mb"].items():
        ratios = [ours / plain for plain, ours in zip(one["plain"], one["ours"], strict=True)]
        seconds = {kind: statistics.median(one[kind]) for kind in ("ours", "plain")}
        print(
            f"bucket_mb {mb}: {seconds['ours']:.3f} s, the unit {seconds['plain']:.3f} s, "
            f"{statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f}); "
            f"memory of the sender +{max(one['memory_mb']):.0f} MB"
        )


if __name__ == "__main__":
    main()
