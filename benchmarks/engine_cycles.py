"""Whether memory grows over many cycles of publishing and generating: every weight changes, every cycle.

    python benchmarks/engine_cycles.py ENGINE [--program PATH] [--cycles 500] [--out benchmarks/results/cycles]

ENGINE is native, vllm or sglang, with the tiny InternVL of the conformance test and its prompts of 0, 1, 4 and 13
tiles. Writes OUT-ENGINE.json and a plot: the resident memory of the trainer and of all processes of the server together
(pages shared by several counted once), by cycle. Says what grew from the first fifth to the last one.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from chart import lines

from foveate.encoding.encode import Encoder
from foveate.models.policy import Policy, load_policy
from foveate.models.tiny import TinySize, build_tiny
from foveate.records import Image, Message, SamplingParams, Task
from foveate.rollout.check import logprob_differences
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine

SIZE = TinySize(tile=56, vision_width=32, vision_layers=2, vision_ffn=64, width=64, layers=3, ffn=96)
SIDES = ((56, 56), (168, 56), (224, 168))
SAMPLING = SamplingParams(samples=4, max_tokens=16)


def measure(name: str, program: str | None, cycles: int, minutes: float) -> dict[str, Any]:
    torch.set_num_threads(1)
    records: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        policy = load_policy(str(build_tiny(Path(folder) / "model", SIZE)))
        encoder = Encoder(policy.tokenizer, policy.family, 12, 1024)
        prompts = [encoder(task) for task in tasks()]
        engine = start(name, program, policy, encoder)
        begin = time.monotonic()
        generator = torch.Generator().manual_seed(0)
        worst = 0.0
        try:
            for cycle in range(1, cycles + 1):
                if time.monotonic() - begin > 60 * minutes:
                    break
                with torch.no_grad():
                    for parameter in policy.model.parameters():
                        parameter.mul_(0.999).add_(torch.randn(parameter.shape, generator=generator), alpha=2e-3)
                engine.publish(cycle, policy.model.named_parameters())
                groups = engine.generate([Request(p, cycle * 10 + i) for i, p in enumerate(prompts)], SAMPLING)
                assert {answer.version for group in groups for answer in group} == {cycle}
                if cycle % 25 == 1:
                    found = float(torch.cat(logprob_differences(policy, prompts, groups, 1.0)).max())
                    worst = max(worst, found)
                    assert found < 1e-4, found
                trainer, server = proportional_mb(pid_tree(own=True)), proportional_mb(pid_tree(own=False))
                records.append({"cycle": cycle, "trainer_mb": trainer, "server_mb": server})
                if cycle % 50 == 0:
                    print(f"{cycle} cycles, {time.monotonic() - begin:.0f} s: {records[-1]}", flush=True)
        finally:
            engine.close()
    return {"engine": name, "seconds": time.monotonic() - begin, "largest_difference": worst, "records": records}


def start(name: str, program: str | None, policy: Policy, encoder: Encoder) -> Any:
    if name == "native":
        return NativeEngine.copy_of(policy, encoder.decode)
    if name == "vllm":
        from foveate.rollout.vllm.engine import VLLMEngine

        return VLLMEngine(policy, encoder.decode, program=program or "vllm", longest=2048, memory_mb=64, bucket_mb=1)
    from foveate.rollout.sglang.engine import SGLangEngine

    limits: dict[str, Any] = {"longest": 2048, "memory_fraction": 0.1, "cache_tokens": 65536, "bucket_mb": 1}
    return SGLangEngine(policy, encoder.decode, program=program or "python", **limits)


def tasks() -> list[Task]:
    found = [Task("0", "probe", (Message("user", "the big blue square"),), (), None, where="here")]
    for seed, (width, height) in enumerate(SIDES):
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG")
        message = Message("user", "<image>\nWhat is shown?")
        found.append(Task("1", "probe", (message,), (Image(None, file.getvalue(), width, height),), None, where="here"))
    return found


def pid_tree(*, own: bool) -> list[int]:
    """This process, or all that descend from it."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    me = int(Path("/proc/self").resolve().name)
    if own:
        return [me]
    found = [me]
    for one in found:
        found += parents.get(one, [])
    return found[1:]


def proportional_mb(pids: list[int]) -> float:
    """Their memory; a page that several processes share counts for its part in each."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def growth(records: list[dict[str, float]], key: str) -> tuple[float, float]:
    """Mean of the second tenth and of the last one: what comes before are caches that fill."""
    tenth = max(1, len(records) // 10)
    values = [record[key] for record in records]
    return statistics.mean(values[tenth : 2 * tenth]), statistics.mean(values[-tenth:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["native", "vllm", "sglang"])
    parser.add_argument("--program")
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cycles")
    parser.add_argument("--minutes", type=float, default=60, help="after which no further cycle begins")
    chosen = parser.parse_args()
    found = measure(chosen.engine, chosen.program, chosen.cycles, chosen.minutes)
    path = chosen.out.with_name(f"{chosen.out.name}-{chosen.engine}")
    path.with_suffix(".json").write_text(json.dumps(found) + "\n")
    series = {}
    for key, label in (("trainer_mb", "trainer"), ("server_mb", "server")):
        first, last = growth(found["records"], key)
        if last:
            series[label] = [(record["cycle"], record[key]) for record in found["records"]]
            print(f"{label}: {first:.1f} MB in the second tenth of the cycles, {last:.1f} MB in the last")
    title = f"{chosen.engine}: memory over {len(found['records'])} cycles of publishing and generating"
    path.with_suffix(".svg").write_text(lines(title, series, "cycle", "MB"))
    print(f"{found['seconds']:.0f} s; largest difference of log-probs to the trainer {found['largest_difference']:.1e}")


if __name__ == "__main__":
    main()
