"""TRL's whole GRPO step on `picture_task` or `sums_task`: GRPOTrainer.train() itself, which waits before each step
until it is asked.

trl_rl.py run MODEL THREADS [TASK]
"""

from __future__ import annotations

import sys
import tempfile
import time
from importlib import import_module
from io import BytesIO
from typing import Any

import picture_task
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    InternVLForConditionalGeneration,
    TrainerCallback,
)
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

    def __init__(self, answers: int) -> None:
        self.answers = answers
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
            "prompt_tokens": self.trainer.prompt_tokens // self.answers,
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
    per_tile = (picture_task.TILE // 28) ** 2
    template = tokenizer.chat_template.replace("<image>", "<IMG_CONTEXT>")  # which the processor expands
    return InternVLProcessor(
        images, tokenizer, InternVLVideoProcessor(), image_seq_length=per_tile, chat_template=template
    )


def run(folder: str, threads: int, task: Any) -> None:
    torch.set_num_threads(threads)
    loading: Any = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    if task is picture_task:
        processor = processor_of(folder)
        model = InternVLForConditionalGeneration.from_pretrained(folder, **loading)
        # random weights stop by chance
        full_length = {"min_new_tokens": task.ANSWER_TOKENS, "suppress_tokens": [processor.image_token_id]}
        content, images = (
            task.QUESTION,
            [Image.open(BytesIO(task.picture(i))).convert("RGB") for i in range(task.GROUPS)],
        )
        rows = [{"prompt": [{"role": "user", "content": content}], "image": image} for image in images]
    else:
        processor = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, **loading)
        full_length = {}
        rows = [{"prompt": [{"role": "user", "content": task.question(i)}]} for i in range(task.GROUPS)]
    # where there are no pictures, several groups fit into one forward pass
    together = 1 if task is picture_task else min(4, task.GROUPS)
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=together * task.ANSWERS,
        num_generations=task.ANSWERS, gradient_accumulation_steps=task.GROUPS // together,
        steps_per_generation=task.GROUPS // together, loss_type="grpo", epsilon=CLIP,
        beta=0.0, temperature=1.0, top_k=0, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        max_completion_length=task.ANSWER_TOKENS, learning_rate=task.LEARNING_RATE, lr_scheduler_type="constant",
        max_steps=STEPS, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        generation_kwargs=full_length,
    )  # fmt: skip
    turns = Turns(task.ANSWERS)
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
    run(sys.argv[2], int(sys.argv[3]), import_module((sys.argv[4:] or ["picture_task"])[0]))
