"""TRL's side of the comparison: GRPOTrainer's own loss on the shared batch, a group of padded copies at a time, then
its gradient clipping and AdamW. Runs in an environment of its own (see compare.py).

    trl_step.py run MODEL BATCH THREADS ROWS
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, InternVLForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer
from work import CLIP, Done, Prints, prints_of, serve


def trainer(folder: str, answer_tokens: int, answers: int, rows: int) -> GRPOTrainer:
    """The trainer with TRL's defaults but for what the work fixes; it computes log-probs with its fused head."""
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, steps_per_generation=answers // rows,
        num_generations=answers, loss_type="grpo",
        epsilon=CLIP, beta=0.0, temperature=1.0, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        max_completion_length=answer_tokens,
    )  # fmt: skip
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda answers, **_: [0.0] * len(answers),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
    )


def inputs_of(group: dict[str, Any], part: slice, totals: torch.Tensor) -> dict[str, Any]:
    """Some answers of a group as TRL's trainer hands them to its loss: prompt and pixels once for each."""
    answers, length = group["answers"][part].shape
    prompt = torch.tensor(group["prompt"]).repeat(answers, 1)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": group["answers"][part],
        "completion_mask": torch.ones(answers, length, dtype=torch.long),
        "advantages": group["advantage"][part],
        "old_per_token_logps": group["old"][part],
        "num_items_in_batch": totals,
    }
    if group["pixels"] is not None:
        inputs["pixel_values"] = group["pixels"].repeat(answers, 1, 1, 1)
        inputs["num_images"] = [len(group["tiles"])] * answers
        inputs["num_tiles"] = [sum(group["tiles"])] * answers
    return inputs


def run(folder: str, path: str, threads: int, rows: int) -> None:
    torch.set_num_threads(threads)
    groups = torch.load(path)["groups"]
    answers, length = groups[0]["answers"].shape
    trl = trainer(folder, length, answers, rows)
    parts = [slice(first, first + rows) for first in range(0, answers, rows)]
    trl.current_gradient_accumulation_steps = len(groups) * len(parts)
    model = trl.model
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    totals = torch.tensor(float(len(groups) * answers * length))

    def step() -> Done:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for group in groups:
            for part in parts:
                loss = trl._compute_loss(model, inputs_of(group, part, totals))
                loss.backward()
                total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        return Done(total, norm.item())

    def gradients() -> tuple[Done, Prints]:
        done = step()
        return done, prints_of(model)  # a step clears those of the step before it

    serve(step, gradients)


if __name__ == "__main__":
    run(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
