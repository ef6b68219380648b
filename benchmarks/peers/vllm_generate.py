"""vLLM's side of generation: all prompts at once through its own `LLM`, in this process, on the CPU. With VLLM_EAGER in
the environment it does not compile.

vllm_generate.py run MODEL WORK THREADS      WORK is a file that benchmarks/engine.py writes
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # its seconds are those of this process
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
)

import torch
from PIL import Image
from work import Done, serve


def prompt_of(token_ids: list[int], picture: str | None, max_patches: int) -> dict[str, Any]:
    """Token ids with one placeholder for the picture, which vLLM cuts and expands itself."""
    if picture is None:
        return {"prompt_token_ids": token_ids}
    return {
        "prompt_token_ids": token_ids,
        "multi_modal_data": {"image": Image.open(picture).convert("RGB")},
        "mm_processor_kwargs": {"max_patches": max_patches},
    }


def run(folder: str, path: str, threads: int) -> None:
    from vllm import LLM, SamplingParams

    torch.set_num_threads(threads)
    work = json.loads(Path(path).read_text())
    model: Any = LLM(
        folder, dtype="float32", max_model_len=work["longest"], max_num_seqs=work["prompts"] * work["samples"],
        max_num_batched_tokens=8192, enforce_eager=bool(os.environ.get("VLLM_EAGER")),
        enable_prefix_caching=work["images"], limit_mm_per_prompt={"image": int(work["images"]), "video": 0},
        disable_log_stats=True,
    )  # fmt: skip
    prompts = [
        prompt_of(ids, picture, work["max_patches"])
        for ids, picture in zip(work["prompt_ids"], work["pictures"], strict=True)
    ]
    shared: dict[str, Any] = {"logprobs": 0, "ignore_eos": True, "detokenize": False}
    sampling = SamplingParams(n=work["samples"], temperature=1.0, max_tokens=work["answer_tokens"], **shared)

    def forget() -> None:
        """Prompts and features of images, which other weights would not have given."""
        assert model.reset_prefix_cache()
        model.llm_engine.reset_encoder_cache()

    def step() -> Done:
        forget()
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        return Done(0.0, 0.0, counts={"answer_tokens": tokens})

    def check() -> dict[str, Any]:
        """Greedy answers without the tokens that foveate never samples."""
        forget()
        greedy = SamplingParams(
            temperature=0.0, max_tokens=work["compared"], allowed_token_ids=work["allowed"], **shared
        )
        outputs = model.generate(prompts, greedy, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        return {
            "prompt_tokens": [len(output.prompt_token_ids) for output in outputs],
            "token_ids": [list(answer.token_ids) for answer in answers],
            "logprobs": [
                [places[token].logprob for token, places in zip(answer.token_ids, answer.logprobs, strict=True)]
                for answer in answers
            ],
        }

    serve(step, more={"check": check})


if __name__ == "__main__":
    run(sys.argv[2], sys.argv[3], int(sys.argv[4]))
