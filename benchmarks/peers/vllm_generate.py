"""vLLM's side of generation: 64 requests at once through its own `LLM`, in this process, on the CPU.

vllm_generate.py run MODEL PROMPTS ANSWER_TOKENS THREADS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # its seconds are those of this process
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_KVCACHE_SPACE="2",
    HF_HUB_OFFLINE="1",
)

import torch
from work import Done, serve


def run(folder: str, path: str, tokens: int, threads: int) -> None:
    from vllm import LLM, SamplingParams

    torch.set_num_threads(threads)
    eager = bool(os.environ.get("VLLM_EAGER"))
    model = LLM(
        folder, dtype="float32", max_model_len=1024, max_num_seqs=64, max_num_batched_tokens=8192, enforce_eager=eager,
        enable_prefix_caching=False, limit_mm_per_prompt={"image": 0, "video": 0}, disable_log_stats=True,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(path).read_text())]
    sampling = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)

    def step() -> Done:
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        return Done(0.0, 0.0, counts={"answer_tokens": sum(len(o.outputs[0].token_ids) for o in outputs)})

    serve(step)


if __name__ == "__main__":
    run(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
