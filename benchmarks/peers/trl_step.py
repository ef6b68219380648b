"""TRL's side of the comparison: GRPOTrainer's own loss on the shared batch, a group of padded copies at a time, then
its gradient clipping and AdamW. Runs in an environment of its own (see compare.py).

    trl_step.py run MODEL BATCH THREADS
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, InternVLForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer
from work import CLIP, Done, serve


def trainer(folder: str, answer_tokens: int, answers: int) -> GRPOTrainer:
    """The trainer with TRL's defaults but for what the work fixes; it computes log-probs with its fused head."""
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=answers, num_generations=answers, loss_type="grpo",
        epsilon=CLIP, beta=0.0, temperature=1.0, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        max_completion_length=answer_tokens,
    )  # fmt: skip
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 8),
    )


def inputs_of(group: dict[str, Any], totals: torch.Tensor) -> dict[str, Any]:
    """A group as TRL's trainer hands it to its loss: the prompt and its pixels once for each answer."""
    answers, length = group["answers"].shape
    prompt = torch.tensor(group["prompt"]).repeat(answers, 1)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": group["answers"],
        "completion_mask": torch.ones(answers, length, dtype=torch.long),
        "advantages": group["advantage"],
        "old_per_token_logps": group["old"],
        "num_items_in_batch": totals,
    }
    if group["pixels"] is not None:
        inputs["pixel_values"] = group["pixels"].repeat(answers, 1, 1, 1)
        inputs["num_images"] = [len(group["tiles"])] * answers
        inputs["num_tiles"] = [sum(group["tiles"])] * answers
    return inputs


def run(folder: str, path: str, threads: int) -> None:
    torch.set_num_threads(threads)
    groups = torch.load(path)["groups"]
    answers, length = groups[0]["answers"].shape
    trl = trainer(folder, length, answers)
    trl.current_gradient_accumulation_steps = len(groups)
    model = trl.model
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    totals = torch.tensor(float(len(groups) * answers * length))

    def step() -> Done:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for group in groups:
            loss = trl._compute_loss(model, inputs_of(group, totals))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        return Done(total, norm.item())

    serve(step)


if __name__ == "__main__":
    run(sys.argv[2], sys.argv[3], int(sys.argv[4]))
