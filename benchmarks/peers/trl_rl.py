"""TRL's whole GRPO step on `picture_task`: GRPOTrainer.train() itself, which waits before each step until it is asked.

trl_rl.py run MODEL THREADS
"""

from __future__ import annotations

import sys
import tempfile
import time
from io import BytesIO
from typing import Any

import picture_task as task
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, InternVLForConditionalGeneration, TrainerCallback
from transformers.models.internvl import InternVLProcessor, InternVLVideoProcessor
from trl import GRPOConfig, GRPOTrainer
from work import CLIP, Done, clock, peak, reset_peak, say

STEPS = 1000


class Timed(GRPOTrainer):
    """Counts the seconds and tokens of sampling, of a step."""

    spent = 0.0
    prompt_tokens = answer_tokens = 0

    def _generate_single_turn(self, prompt_ids: Any, *rest: Any, **more: Any) -> Any:
        started = clock()
        out = super()._generate_single_turn(prompt_ids, *rest, **more)
        self.spent += clock() - started
        self.prompt_tokens += sum(map(len, prompt_ids))
        self.answer_tokens += sum(map(len, out[0]))
        return out


class Turns(TrainerCallback):
    """Waits for a line before each step and reports the step before it."""

    def __init__(self) -> None:
        self.trainer: Timed | None = None
        self.gradient_norm = self.loss = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        if self.trainer.state.global_step == 0:
            print("ready", flush=True)
            self.loaded = reset_peak()
        if not sys.stdin.readline():
            raise SystemExit
        self.trainer.spent, self.trainer.prompt_tokens, self.trainer.answer_tokens = 0.0, 0, 0
        reset_peak()
        self.wall, self.cpu = time.perf_counter(), clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        wall, cpu = time.perf_counter() - self.wall, clock() - self.cpu
        generate = self.trainer.spent
        counts = {
            "prompt_tokens": self.trainer.prompt_tokens // task.ANSWERS,
            "answer_tokens": self.trainer.answer_tokens,
        }
        phases = {"generate": generate, "update": cpu - generate}
        say(Done(0.0, 0.0, phases, counts), wall, cpu, peak() - self.loaded)


def processor_of(folder: str) -> InternVLProcessor:
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    for name, token in {**names, "video_token": "<video>"}.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    images = AutoImageProcessor.from_pretrained(folder)
    per_tile = (task.TILE // 28) ** 2
    template = tokenizer.chat_template.replace("<image>", "<IMG_CONTEXT>")  # which the processor expands
    return InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=per_tile, chat_template=template
    )


def run(folder: str, threads: int) -> None:
    torch.set_num_threads(threads)
    processor = processor_of(folder)
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=task.ANSWERS, num_generations=task.ANSWERS,
        gradient_accumulation_steps=task.GROUPS, steps_per_generation=task.GROUPS, loss_type="grpo", epsilon=CLIP,
        beta=0.0, temperature=1.0, top_k=0, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        max_completion_length=task.ANSWER_TOKENS, learning_rate=task.LEARNING_RATE, lr_scheduler_type="constant",
        max_steps=STEPS, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        generation_kwargs={
            "min_new_tokens": task.ANSWER_TOKENS,  # random weights stop by chance
            "suppress_tokens": [processor.image_token_id],
        },
    )  # fmt: skip
    rows = [
        {
            "prompt": [{"role": "user", "content": task.QUESTION}],
            "image": Image.open(BytesIO(task.picture(i))).convert("RGB"),
        }
        for i in range(task.GROUPS)
    ]
    turns = Turns()
    turns.trainer = Timed(
        model=model,
        reward_funcs=lambda completion_ids, **_: [task.reward(ids) for ids in completion_ids],
        args=config,
        processing_class=processor,
        train_dataset=Dataset.from_list(rows),
        callbacks=[turns],
    )
    turns.trainer.train()


if __name__ == "__main__":
    run(sys.argv[2], int(sys.argv[3]))
