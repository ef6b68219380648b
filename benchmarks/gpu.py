"""foveate on one real GPU, with models of published sizes and random weights: the update, sampling, and where the time
goes. One JSON object a line.

    python benchmarks/gpu.py PART ... [--size 1B] [--steps 3] [--set model.compile=true ...] [--model FOLDER]

Parts: update, generate, profile (tables of kernels of those two, on standard error); trl: the same update by TRL's
GRPOTrainer (its own loss, sdpa, bfloat16 by autocast, `--rows` answers at a time) where TRL is installed; transformers:
the same answers by its `generate` on copies of the prompts, 64 rows at a time.

Arithmetic is counted as in `foveate plan`: products of matrices and attention, forward once and backward twice that;
what is computed again does not count, so that it lowers the share of the data sheet's speed. A step is timed between
synchronisations, the median of `--steps` after `--warm` that warm up; memory is the peak that PyTorch allocated.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers.toy_sizes import is_toy, sized
from torch.profiler import ProfilerActivity, profile

from foveate.algorithms.policy_losses import grpo
from foveate.algorithms.targets import Totals
from foveate.config.cluster import ClusterSettings
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.models.policy import Policy, load_policy
from foveate.models.sizes import PUBLISHED_SIZES
from foveate.models.tiny import TinySize, build_tiny
from foveate.plan.hardware import GPUS
from foveate.plan.time import language_flops, vision_flops
from foveate.records import ImageSlot, PackedGroup, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine
from foveate.train.targets import PolicyRow
from foveate.train.worker import Worker

VOCABULARY, CLIP = 151_936, 0.2


@dataclass(frozen=True, slots=True)
class PendingGroup:
    """`groups` prompts of `prompt` tokens, 256 of them for each tile, and `answers` answers of `answer` tokens each."""

    groups: int
    prompt: int
    tiles: int
    answer: int
    answers: int

    @property
    def tokens(self) -> int:
        """Trained tokens."""
        return self.groups * self.answers * self.answer


WORKS = sized(
    {
        "grounding-short": PendingGroup(16, 1088, 4, 64, 16),
        "grounding-reasoning": PendingGroup(8, 1856, 7, 256, 16),
        "reasoning": PendingGroup(4, 512, 1, 1024, 8),
        "text": PendingGroup(16, 128, 0, 512, 8),
    },
    toy={"grounding-short": PendingGroup(2, 300, 1, 8, 4), "text": PendingGroup(2, 16, 0, 8, 4)},
)


def size_of(name: str) -> TinySize:
    """The published size with the tokenizer of the tiny model, whose vocabulary is filled up."""
    vision, text = PUBLISHED_SIZES[name]
    if is_toy():
        return TinySize(tile=448)
    return TinySize(
        tile=448, vision_width=vision["hidden_size"], vision_layers=vision["num_hidden_layers"],
        vision_heads=vision["num_attention_heads"], vision_ffn=vision["intermediate_size"], width=text["hidden_size"],
        layers=text["num_hidden_layers"], heads=text["num_attention_heads"], kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"], ffn=text["intermediate_size"],
    )  # fmt: skip


def prompt_of(policy: Policy, work: PendingGroup, generator: torch.Generator) -> Prompt:
    """Random words, the tiles of one picture behind the first eight."""
    ids = words(8, generator)
    slots: tuple[ImageSlot, ...] = ()
    pixels = None
    if work.tiles:
        family: Any = policy.family
        count = work.tiles * family.tokens_per_tile
        slots = (ImageSlot(len(ids), count, work.tiles),)
        ids += [family.image_token_id] * count
        pixels = torch.randn(work.tiles, 3, 448, 448, generator=generator)
    ids += words(work.prompt - len(ids), generator)
    return Prompt(tuple(ids), slots, pixels, tuple(ids))


def words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(1000, VOCABULARY, (count,), generator=generator).tolist()  # none that means something


def groups_of(policy: Policy, work: PendingGroup) -> list[PolicyRow]:
    generator = torch.Generator().manual_seed(0)
    groups = []
    for _ in range(work.groups):
        answers = tuple(tuple(words(work.answer, generator)) for _ in range(work.answers))
        packed = PackedGroup.of_tokens(prompt_of(policy, work, generator), answers)
        advantage = torch.randn(work.answers, generator=generator).repeat_interleave(work.answer)
        old = torch.full((work.answers * work.answer,), -11.9)  # near what a random model says
        groups.append(PolicyRow(packed, old, advantage, old, None, None))
    return groups


def updating(worker: Worker, work: PendingGroup) -> Callable[[], dict[str, float]]:
    groups = groups_of(worker.policy, work)
    totals = Totals(work.tokens, work.groups * work.answers, work.groups)
    loss = partial(grpo, clip_low=CLIP, clip_high=CLIP, aggregate="seq-mean-token-mean")
    return lambda: worker.update_policy(groups, loss, totals, 0.0)


def sampling_of(policy: Policy, work: PendingGroup) -> Callable[[], int]:
    """No stop token, so that every answer has the full length."""
    generator = torch.Generator().manual_seed(1)
    engine = NativeEngine(replace(policy, family=replace(policy.family, stop_ids=(-1,))), lambda _: "")
    requests = [Request(prompt_of(policy, work, generator), i) for i in range(work.groups)]
    sampling = SamplingParams(work.answers, work.answer)
    return lambda: sum(len(one.token_ids) for group in engine.generate(requests, sampling) for one in group)


def timed(run: Callable[[], Any], steps: int, warm: int) -> tuple[float, list[float], float, Any]:
    """The first call's seconds, the seconds of each measured one, and the peak of memory in GiB."""
    took = []
    out = None
    for number in range(steps + warm):
        if number == warm:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.perf_counter()
        out = run()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
    return took[0], took[warm:], torch.cuda.max_memory_allocated() / 2**30, out


def said(
    part: str, name: str, work: PendingGroup, config: Any, found: tuple[float, list[float], float, Any]
) -> dict[str, Any]:
    first, took, peak, out = found
    seconds = statistics.median(took)
    forward = language_flops(config, work.prompt, work.answer, work.answers) + vision_flops(config, work.tiles)
    record = {
        "part": part, "work": name, "first_seconds": first, "seconds": seconds, "all": took,
        "trained_tokens_per_second": work.tokens / seconds, "peak_gib": peak,
        "forward_tflop": work.groups * forward / 1e12,
    }  # fmt: skip
    if part in ("update", "trl"):
        names = torch.cuda.get_device_name().split()
        gpu = next((gpu for key, gpu in GPUS.items() if key.split("-")[0] in names), None)
        record["share_of_data_sheet"] = 3 * work.groups * forward / seconds / gpu.flops if gpu else None
        record["metrics"] = {key: out[key] for key in ("loss/policy", "optim/grad_norm", "loss/entropy") if key in out}
    return record


def worker_of(folder: Path, settings: dict[str, Any], budget: int) -> Worker:
    own: dict[str, dict[str, Any]] = {"model": {}, "cluster": {"dtype": "bfloat16"}}
    for name, value in settings.items():
        group, key = name.split(".")
        own[group][key] = value
    model = ModelSettings(path=str(folder), **own["model"])
    return Worker(model, OptimSettings(lr=1e-6), budget, cluster=ClusterSettings(device="cuda", **own["cluster"]))


def trl_updating(folder: Path, work: PendingGroup, rows: int) -> tuple[Any, Callable[[], dict[str, float]]]:
    """An update as TRL computes it from the same groups: prompt and pixels once for each answer."""
    from datasets import Dataset
    from transformers import AutoTokenizer, InternVLForConditionalGeneration
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, steps_per_generation=work.answers // rows,
        num_generations=work.answers, loss_type="grpo", epsilon=CLIP, beta=0.0, temperature=1.0, bf16=True,
        report_to=[], gradient_checkpointing=False, max_completion_length=work.answer,
    )  # fmt: skip
    trainer: Any = GRPOTrainer(
        model=model, reward_funcs=lambda answers, **_: [0.0] * len(answers), args=config,
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
    )  # fmt: skip
    model = trainer.model.train()
    groups = groups_of(load_policy(str(folder)), work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    trainer.current_gradient_accumulation_steps = work.groups * work.answers // rows
    totals = torch.tensor(float(work.tokens), device="cuda")

    def step() -> dict[str, float]:
        total = 0.0
        for group in groups:
            for first in range(0, work.answers, rows):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = trainer._compute_loss(model, _trl_inputs(group, work, first, rows, totals))
                loss.backward()
                total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss/policy": total, "optim/grad_norm": norm}

    return model.config, step


def _trl_inputs(group: PolicyRow, work: PendingGroup, first: int, rows: int, totals: torch.Tensor) -> dict[str, Any]:
    prompt = torch.tensor(group.group.prompt.token_ids, device="cuda").repeat(rows, 1)
    answers = torch.tensor([one.token_ids for one in group.group.answers[first : first + rows]], device="cuda")
    assert group.advantage is not None
    inputs = {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": answers,
        "completion_mask": torch.ones_like(answers),
        "advantages": group.advantage.view(work.answers, -1)[first : first + rows, 0].cuda(),
        "old_per_token_logps": group.engine.view(work.answers, -1)[first : first + rows].cuda(),
        "num_items_in_batch": totals,
    }  # fmt: skip
    pixels = group.group.prompt.pixels
    if pixels is not None:
        more = {"num_images": [1] * rows, "num_tiles": [work.tiles] * rows}
        inputs |= {"pixel_values": pixels.cuda().repeat(rows, 1, 1, 1), **more}
    return inputs


def copies_sampling(folder: Path, work: PendingGroup, rows: int = 64) -> tuple[Any, Callable[[], int]]:
    """transformers' generate in bfloat16, with a copy of the prompt for each answer."""
    from transformers import InternVLForConditionalGeneration

    model: Any = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    model.cuda().eval()
    policy, generator = load_policy(str(folder)), torch.Generator().manual_seed(1)
    prompts = [p for p in (prompt_of(policy, work, generator) for _ in range(work.groups)) for _ in range(work.answers)]

    def run() -> int:
        made = 0
        for first in range(0, len(prompts), rows):
            some = prompts[first : first + rows]
            ids = torch.tensor([p.token_ids for p in some], device="cuda")
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if work.tiles:
                pixels = torch.cat([p.pixels for p in some if p.pixels is not None])
                inputs["pixel_values"] = pixels.to("cuda", torch.bfloat16)
            more = {"max_new_tokens": work.answer, "min_new_tokens": work.answer, "pad_token_id": 0}
            with torch.inference_mode():
                made += model.generate(**inputs, do_sample=True, top_k=0, **more)[:, ids.shape[1] :].numel()
        return made

    return model.config, run


def kernels_of(run: Callable[[], Any], what: str) -> None:
    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    for key in ("self_cuda_time_total", "self_cpu_time_total"):
        table = found.key_averages().table(sort_by=key, row_limit=28, max_name_column_width=60)
        print(f"{what}, by {key}\n{table}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["update", "generate", "profile", "trl", "transformers"])
    parser.add_argument("--size", default="1B", choices=PUBLISHED_SIZES)
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=WORKS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--budget", type=int, default=16_384, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="answers at a time in TRL")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the model and the cluster")
    parser.add_argument("--model", type=Path, help="a folder that is kept; without, one is made and thrown away")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or Path(made) / "model"
        if not folder.exists():
            build_tiny(folder, size_of(options.size), padded_vocabulary=VOCABULARY)
        settings = {name: json.loads(value) for name, _, value in (one.partition("=") for one in options.set)}
        where = {"size": options.size, "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "set": settings}
        for record in measured(options, folder, settings):
            print(json.dumps({**record, **where}), flush=True)


def measured(options: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for part, make in (("trl", partial(trl_updating, rows=options.rows)), ("transformers", copies_sampling)):
        for name in options.works if part in options.parts else ():
            config, run = make(folder, WORKS[name])
            yield said(part, name, WORKS[name], config, timed(run, options.steps, options.warm))
            del run
            gc.collect()
            torch.cuda.empty_cache()
    own = {"update": updating, "generate": sampling}
    if not {*own, "profile"}.intersection(options.parts):
        return
    worker = worker_of(folder, settings, options.budget)
    for name in options.works:
        for part, make in own.items():
            if part in options.parts:
                run = make(worker, WORKS[name])
                yield said(part, name, WORKS[name], worker.policy.model.config, timed(run, options.steps, options.warm))
                if "profile" in options.parts:
                    kernels_of(run, f"{part} {name}")


def sampling(worker: Worker, work: PendingGroup) -> Callable[[], int]:
    """By the engine's own policy, in the type that it computes in."""
    engine = NativeEngine.copy_of(worker.policy, lambda _: "", dtype="bfloat16")
    return sampling_of(engine.policy, work)


if __name__ == "__main__":
    main()
