"""A process reward model chooses among eight answers, from random weights to a table, in ten minutes on one core.

    python benchmarks/process_rewards.py --seed 0    # everything goes to runs/process-0

A question is a chain of three to five sums and differences, worked out from left to right on a clock of ten hours:
`5+3-4+8=?`. An answer writes a line for each, `5+3=8`, `8-4=4`, `4+8=12-10=2`, and then the result in a box. A tiny
text model learns to answer from worked examples that share a slip: half of the steps that go round the clock count one
hour too many, `4+8=12-9=3`. So wrong answers to a question agree with one another, and a majority often takes them. The
model's answers to other questions are labelled step by step by its own continuations, a copy of it learns to judge
steps from these labels, and chooses among eight answers to each of 1,000 new questions. No label knows of the slip.
What it reaches is in docs/log.md.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from peers.toy_sizes import sized

import foveate as fv
from foveate.evaluate.evaluate_models import EvalRequest
from foveate.evaluate.steps import StepOptions, prepare_steps

WORDS = ("### Question:", "### Solution Process:", r"\boxed{", "}", "user", "assistant", "\n", *"0123456789+-=?")
COUNTS = sized({"worked": 16000, "asked": 1500, "test": 1000}, toy={"worked": 100, "asked": 8, "test": 4})
"""Questions: with worked answers, to label the model's answers to, and to choose on."""
HOURS = 10
SLIP = 0.5
"""Share of the demonstrated steps round the clock that count one hour too many."""
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WARM_UP = sized(20, toy=0)
"""Steps in which a learning rate grows."""


def tiny_model(folder: Path, seed: int) -> str:
    """A Qwen3 of 0.2 million random parameters, which knows the words of these questions and no others."""
    import torch
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from foveate.encoding.chat import CORRECTED_TEMPLATE

    words = {word: number for number, word in enumerate((*SPECIALS, "<|unknown|>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, "<|unknown|>"))
    pieces = r"### [A-Za-z ]+:|\\boxed\{|[a-z]+|.|\n"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[2], pad_token=SPECIALS[0])
    fast.chat_template = CORRECTED_TEMPLATE
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=False,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def worked(draw: random.Random) -> dict[str, Any]:
    """A question with its result, and an answer that works it out, with slips."""
    true = value = draw.randint(0, HOURS - 1)
    question, steps = str(value), []
    for _ in range(draw.randint(3, 5)):
        sign, other = draw.choice("+-"), draw.randint(2, 6)
        change = other if sign == "+" else -other
        before, moved = value, value + change
        back = HOURS if moved < 0 else -HOURS if moved >= HOURS else 0
        back += back != 0 and draw.random() < SLIP
        true, value = (true + change) % HOURS, (moved + back) % HOURS
        steps.append(f"{before}{sign}{other}={moved}" + (f"{back:+}={value}" if back else ""))
        question += f"{sign}{other}"
    answer = "\n".join([*steps, rf"\boxed{{{value}}}"])
    return {"question": f"{question}=?", "answer": str(true), "response": answer}


def rows(seed: int, *counts: int) -> list[list[dict[str, Any]]]:
    """So many questions of each kind, all of them different."""
    draw, found = random.Random(seed), dict[str, dict[str, Any]]()
    while len(found) < sum(counts):
        one = worked(draw)
        found.setdefault(one["question"], {**one, "id": str(len(found))})
    made = iter(found.values())
    return [[next(made) for _ in range(count)] for count in counts]


def train(model: str, rows: Path, run: Path, seed: int, **settings: Any) -> str:
    """A short run of supervised training on one core; returns the folder of its model."""
    optim = {"lr": settings.pop("lr"), "weight_decay": 0.05, "betas": [0.9, 0.95], "warmup_steps": WARM_UP}
    made = fv.train_sft(
        model, [rows], run_dir=run, seed=seed, samples_per_step=32, trainable=["language"],
        optim={**optim, "schedule": settings.pop("schedule")}, train={"threads": 1, "save_every": 0},
        cluster={"device": "cpu"}, **settings,
    )  # fmt: skip
    return str(made.model)


def figures(model: str, rows: Path, out: Path, **options: Any) -> dict[str, Any]:
    """What `foveate eval` says of a model."""
    asked: dict[str, Any] = {"models": (model,), "data": (str(rows),), "reward": "exact", "max_tokens": 80}
    fv.evaluate(EvalRequest(out=out, threads=1, gallery=0, **asked, **options))
    [found] = json.loads((out / "summary.json").read_text())["models"].values()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where everything goes (runs/process-SEED)")
    parser.add_argument("--steps", type=int, default=500, help="of the model that answers")
    parser.add_argument("--judge-steps", type=int, default=500, help="of the one that judges")
    given = parser.parse_args()
    folder, seed = given.folder or Path(f"runs/process-{given.seed}"), given.seed
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, made in zip(COUNTS, rows(seed, *COUNTS.values()), strict=True):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in made))

    model = train(
        tiny_model(folder / "random", seed), files["worked"], folder / "answers", seed, steps=given.steps, lr=2e-3,
        schedule="cosine",
    )  # fmt: skip
    right = figures(model, files["asked"], folder / "asked", samples=4, seed=seed)["accuracy"]["value"]
    print(f"{right:.1%} of the answers are right", flush=True)
    labelled = prepare_steps(
        [files["asked"]], folder / "steps", model=model, rollouts=[folder / "asked/predictions.jsonl"],
        reward="exact", options=StepOptions(continuations=8, max_tokens=80, seed=seed),
    )  # fmt: skip
    print("\n".join(labelled.summary()), flush=True)
    judge = train(
        model, folder / "steps/steps.parquet", folder / "judge", seed, steps=given.judge_steps, lr=1e-3,
        schedule="cosine", trained_turns="all",
    )  # fmt: skip
    ways = figures(model, files["test"], folder / "table", samples=8, seed=seed, critic=f"prm:{judge}")["parallel"]
    for name, way in ways.items():
        more, (low, high) = way["over_majority"]["value"], way["over_majority"]["interval"]
        print(f"{name}: {way['value']:.1%}, over majority {more:+.1%} [{low:+.1%}, {high:+.1%}]", flush=True)


if __name__ == "__main__":
    main()
