"""The native engine against a real vLLM on the CPU, one thread: different prompts, and the groups of RL.

    python benchmarks/engine.py [--works different-prompts image-groups ...] [--pairs 3] [--eager also] [--json]

`different-prompts`: 64 prompts of text at once, one answer each. `image-groups`: 8 prompts of 1,039 tokens with a
picture each, 16 answers to each, and `image-groups-long` the same with longer answers. vLLM gets the pictures
themselves, keeps prompts in its prefix cache, and forgets prompts and images before each step, as it must when the
weights have changed; so does the engine here. Both are given images that are read and cut already. vLLM runs compiled,
as it does by default, and eager (--eager: also, only, not). Nothing is timed unless prompts have the same number of
tokens and greedy answers the same tokens, or, where two tokens are as likely, the same log-probs to 1e-4.

vLLM runs in an environment of its own (scripts/install_vllm_cpu.sh), whose folder FOVEATE_VLLM names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from compare import System, vllm_python
from generation import COLUMNS, ROWS, SIZE, VOCABULARY, image_prompt, picture
from peers.toy_sizes import sized

from foveate.models.policy import Policy, load_policy
from foveate.models.tiny import build_tiny
from foveate.records import Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.rollout.server.launch import banned_ids

TOLERANCE = 1e-4
WAYS = {"also": ("vllm", "vllm-eager"), "only": ("vllm-eager",), "not": ("vllm",)}
"""The ways of vLLM by `--eager`."""
Steps = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class EngineWork:
    """So many prompts at once, of random words or with a picture each, and answers of one length to each. The first
    `compared` tokens of greedy answers are held against vLLM's."""

    prompts: int
    samples: int
    answer_tokens: int
    images: bool = False
    compared: int = 16


WORKS = sized(
    {
        "different-prompts": EngineWork(64, 1, 64),
        "image-groups": EngineWork(8, 16, 64, images=True),
        "image-groups-long": EngineWork(8, 16, 512, images=True),
    },
    toy={
        "different-prompts": EngineWork(4, 1, 8),
        "image-groups": EngineWork(2, 3, 8, images=True),
        "image-groups-long": EngineWork(2, 3, 12, images=True),
    },
)
PROMPT_TOKENS = sized(128, toy=16)
"""Of a prompt without a picture."""


def run(name: str, program: str | None, pairs: int, ways: Sequence[str]) -> dict[str, Any]:
    """Steps of both engines, in turn; without `program` of ours alone."""
    work = WORKS[name]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        if work.images:
            build_tiny(folder / "model", SIZE, padded_vocabulary=VOCABULARY)
        else:
            build_tiny(folder / "model")
        policy = load_policy(str(folder / "model"))
        prompts = make_prompts(policy, work)
        ours = Ours(policy, prompts, work)
        systems: dict[str, System] = {}
        if program is not None:
            lent = _for_vllm(folder, policy, prompts, work)
            for way in ways:
                eager = {"VLLM_EAGER": "1" if way == "vllm-eager" else ""}
                system = System(way, program, "vllm_generate.py", ["run", *map(str, lent), "1"], 1, eager)
                systems[way] = stack.enter_context(system)
        mine = ours.check()
        differences = [check(f"{name}, {way}", mine, one.ask("check")) for way, one in systems.items()]
        steps: Steps = {way: [] for way in ("foveate", *systems)}
        for pair in range(pairs + 1):
            turns = ["foveate", *systems]
            for way in turns if pair % 2 else reversed(turns):
                record = ours.step() if way == "foveate" else systems[way].ask("step")
                assert record["answer_tokens"] == work.prompts * work.samples * work.answer_tokens, record
                if pair:
                    steps[way].append(record)
    shape = {**asdict(work), "prompt_tokens": len(prompts[0])}
    return {"work": name, **shape, "largest_difference": max(differences, default=None), "steps": steps}


def make_prompts(policy: Policy, work: EngineWork) -> list[Prompt]:
    if work.images:
        return [image_prompt(policy, seed) for seed in range(work.prompts)]
    generator = torch.Generator().manual_seed(0)
    shape = (work.prompts, PROMPT_TOKENS)
    ids = torch.randint(20, len(policy.tokenizer), shape, generator=generator).tolist()
    return [Prompt(tuple(one), (), None, tuple(one)) for one in ids]


class Ours:
    """foveate's side, in this process."""

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], work: EngineWork) -> None:
        torch.set_num_threads(1)
        policy = replace(policy, family=replace(policy.family, stop_ids=(-1,)))  # answers of full length
        self._engine, self._prompts, self._work = NativeEngine(policy, lambda _: ""), prompts, work
        self._number = 0

    def check(self) -> dict[str, list[Any]]:
        """Tokens of each prompt, and tokens and log-probs of a greedy answer to it."""
        requests = [Request(prompt, 0) for prompt in self._prompts]
        groups = self._engine.generate(requests, SamplingParams(1, self._work.compared, temperature=0.0))
        answers = [answer for (answer,) in groups]
        return {
            "prompt_tokens": [len(prompt) for prompt in self._prompts],
            "token_ids": [[*map(int, answer.token_ids)] for answer in answers],
            "logprobs": [[*map(float, answer.logprobs)] for answer in answers],
        }

    def step(self) -> dict[str, Any]:
        self._number += 1
        self._engine.publish(self._number)
        requests = [Request(prompt, 1000 * self._number + i) for i, prompt in enumerate(self._prompts)]
        sampling = SamplingParams(self._work.samples, self._work.answer_tokens)
        wall, started = time.perf_counter(), time.process_time()
        groups = self._engine.generate(requests, sampling)
        used = {"cpu": time.process_time() - started, "wall": time.perf_counter() - wall}
        return {**used, "answer_tokens": sum(len(answer.token_ids) for group in groups for answer in group)}


def check(name: str, ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> float:
    """The largest difference of log-probs, up to where the answers part; SystemExit if it is not the same work."""
    if theirs["prompt_tokens"] != ours["prompt_tokens"]:
        counts = f"{theirs['prompt_tokens']} tokens, in foveate {ours['prompt_tokens']}"
        raise SystemExit(f"{name}: prompts have {counts}: nothing is timed")
    largest = 0.0
    for prompt in range(len(ours["token_ids"])):
        mine, other = ([*zip(one["token_ids"][prompt], one["logprobs"][prompt], strict=True)] for one in (ours, theirs))
        for place, ((token, logprob), (their_token, their_logprob)) in enumerate(zip(mine, other, strict=True)):
            largest = max(largest, abs(logprob - their_logprob))
            if not abs(logprob - their_logprob) <= TOLERANCE:
                found = f"token {their_token} with {their_logprob:.6f}, of foveate {token} with {logprob:.6f}"
                raise SystemExit(f"{name}: answer {prompt}, place {place}: {found}: nothing is timed")
            if token != their_token:  # two that are as likely; what follows differs
                break
    return largest


def _for_vllm(folder: Path, policy: Policy, prompts: Sequence[Prompt], work: EngineWork) -> tuple[Path, Path]:
    """The model with what transformers' processor, which vLLM builds at its start, asks of a tokenizer; and the work,
    with images as files."""
    served = folder / "served"
    shutil.copytree(folder / "model", served)
    path = served / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_token": settings["eos_token"]}))
    length = json.loads((served / "config.json").read_text())["image_seq_length"]
    processor = {"image_seq_length": length, "processor_class": "InternVLProcessor"}
    (served / "processor_config.json").write_text(json.dumps(processor))
    ids = [list(prompt.engine_ids) for prompt in prompts]
    images: list[str | None] = [None] * len(prompts)
    if work.images:
        around: Any = policy.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])  # vLLM puts them there itself
        ids = [[token for token in one if token not in around] for one in ids]
        for number in range(len(prompts)):
            (folder / f"{number}.png").write_bytes(picture(number))
            images[number] = str(folder / f"{number}.png")
    said = {
        **asdict(work), "prompt_ids": ids, "pictures": images,
        "max_patches": COLUMNS * ROWS, "longest": max(map(len, prompts)) + max(work.answer_tokens, work.compared),
        "allowed": sorted({*range(len(policy.tokenizer))}.difference(banned_ids(policy))),
    }  # fmt: skip
    (folder / "work.json").write_text(json.dumps(said))
    return served, folder / "work.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--eager", choices=WAYS, default="also", help="vLLM without compilation")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line, a list of works")
    options = parser.parse_args()
    program = vllm_python()
    found = []
    for work in options.works:
        found.append(run(work, program, options.pairs, WAYS[options.eager]))
        if not options.json:
            say(found[-1])
    if options.json:
        print(json.dumps({"works": found}))


def say(found: dict[str, Any]) -> None:
    steps, shape = found["steps"], f"{found['prompts']} prompts of {found['prompt_tokens']} tokens"
    print(f"{found['work']}: {shape} x {found['samples']} answers of {found['answer_tokens']}")
    for name, records in steps.items():
        pairs = zip(records, steps["foveate"], strict=True)
        ratios = [theirs["cpu"] / ours["cpu"] for theirs, ours in pairs]
        seconds = statistics.median(record["cpu"] for record in records)
        times = f"{statistics.median(ratios):.2f} times ours ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {name}: {seconds:.2f} processor s, {times}", flush=True)


if __name__ == "__main__":
    main()
