"""Short runs of every stage, at another commit and at this one, compared number by number: the net under a refactor.

    python scripts/compare_runs.py PARENT [--only gspo ppo] [--ranks 1 2]

Ten steps each of GSPO with a KL, PPO with a critic, GSPO with staleness 1, SFT, MPO and a small cascade, on one rank
and on two (over Ray), one thread, both commits in one sitting on one machine. Steps 1 and 2 must be bitwise equal,
later ones to 1e-6. `METRICS` and `SETTINGS` map names that differ between the commits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

HEAD = Path(__file__).resolve().parent.parent
EXACT_STEPS, TOLERANCE = 2, 1e-6

METRICS: dict[str, str] = {
    "policy_loss": "loss/policy",
    "approx_kl": "loss/approx_kl",
    "clip_fraction": "loss/clip_fraction",
    "kl_ref": "loss/kl_ref",
    "ratio_min": "loss/ratio_min",
    "ratio_max": "loss/ratio_max",
    "nll": "loss/nll",
    "logp/chosen": "loss/logp_chosen",
    "logp/rejected": "loss/logp_rejected",
    "mismatch_cut": "engine/correction_truncated",
    "mismatch_kl": "engine/correction_kl",
    "mismatch_weight_max": "engine/correction_weight_max",
    "mismatch_weight": "engine/correction_weight",
    "engine_kl_k1": "engine/kl_k1",
    "engine_kl_k3": "engine/kl_k3",
    "engine_logprob_difference_max": "engine/logprob_difference_max",
    "engine_logprob_difference": "engine/logprob_difference",
    "engine_ratio_beyond_2": "engine/ratio_beyond_2",
    "engine_check": "engine/check",
    "engines_lost": "engine/lost",
    "staleness/mean": "rollout/staleness_mean",
    "staleness/max": "rollout/staleness_max",
    "groups_dropped": "rollout/groups_dropped",
    "groups_waiting": "rollout/groups_waiting",
    "groups_without_advantage": "rollout/groups_without_advantage",
    "tokens/generate": "rollout/tokens",
    "tokens/update": "optim/tokens",
    "answer/cut": "answer/truncated",
    "reward_kl": "reward/kl",
    "reward_kl_coefficient": "reward/kl_coefficient",
    "grad_norm": "optim/grad_norm",
    "update_skipped": "optim/update_skipped",
    "loss": "loss/total",
    "entropy": "loss/entropy",
    "lr": "optim/lr",
    "epoch": "data/epoch",
    "updates": "optim/updates",
    "groups": "rollout/groups",
}
"""Name of a metric at the parent -> name at this commit, where they differ."""
SETTINGS: dict[str, str] = {
    "model.train": "model.trainable",
    "train.passes": "train.epochs_per_step",
    "algorithm.refills": "algorithm.resample_rounds",
}
"""Path of a setting at the parent -> path at this commit, where they differ."""
FORMER: dict[str, dict[str, Any]] = {
    "mpo": {"loss": {"settings": {"generation_mean": "token"}}},
    "cascade": {"mpo": {"loss": {"settings": {"generation_mean": "token"}}}},
}
"""Run -> settings by which this commit computes what parents compute by default."""
ADDED = {"rollout/groups_not_graded"}
"""Metrics that parents do not have."""
IGNORED = ("seconds", "tokens_per_second", "time/")
"""Metrics that measure time, by the beginnings of their names at either commit."""

TRAIN = {"steps": 10, "tokens_per_micro_batch": 1024, "threads": 1, "save_every": 0}
RL: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"train": ["data/train.parquet"], "test": ["data/test.parquet"], "max_prompt_tokens": 128},
    "rollout": {"samples": 4, "max_tokens": 20},
    "reward": {"name": "grounding", "settings": {"kind": "mix", "alpha": 0.5, "threshold": 0.5}},
    "optim": {"lr": 1e-4, "warmup_steps": 2},
    "train": {**TRAIN, "prompts_per_step": 8, "updates_per_step": 2},
    "eval": {"every": 5, "samples": 2, "gallery": 2},
    "cluster": {"device": "cpu"},
}
OFFLINE: dict[str, Any] = {
    "model": {"path": "model"},
    "data": {"train": ["data/train.parquet"], "max_prompt_tokens": 128},
    "optim": {"lr": 1e-4},
    "cluster": {"device": "cpu"},
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gspo": ("rl", {**RL, "algorithm": {"name": "gspo", "loss": {"kl_coefficient": 0.05}}}),
    "ppo": ("rl", {**RL, "algorithm": {"name": "ppo", "critic": {"lr": 1e-3, "warmup_steps": 2}}}),
    "async": (
        "rl",
        {
            **RL,
            "algorithm": {"name": "gspo", "correction": {"mode": "token-truncate"}},
            "rollout": {**RL["rollout"], "staleness": 1},
        },
    ),
    "sft": ("sft", {**OFFLINE, "train": {**TRAIN, "samples_per_step": 8}}),
    "mpo": (
        "mpo",
        {
            **OFFLINE,
            "data": {**OFFLINE["data"], "train": ["data/pairs.parquet"]},
            "train": {**TRAIN, "pairs_per_step": 8},
        },
    ),
    "cascade": (
        "cascade",
        {
            **{name: RL[name] for name in ("model", "data", "rollout", "reward", "cluster")},
            "pairs": {"prompts": 32, "samples": 4, "max_per_prompt": 2},
            "mpo": {"optim": {"lr": 1e-4}, "train": {**TRAIN, "steps": 5, "pairs_per_step": 8}},
            "rl": {"optim": {"lr": 1e-4}, "train": {**TRAIN, "steps": 5, "prompts_per_step": 8}},
            "eval": {"every": 0, "samples": 2, "gallery": 2},
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", help="the commit to compare with")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=[*RUNS])
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2])
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="compare-runs-"))
    parent = folder / "parent"
    try:
        _git("worktree", "add", "--detach", str(parent), chosen.parent)
        _make_inputs(parent, folder)
        worst = [_compare(name, ranks, parent, folder) for ranks in chosen.ranks for name in chosen.only]
    finally:
        _git("worktree", "remove", "--force", str(parent))
        shutil.rmtree(folder, ignore_errors=True)
    if not all(worst):
        sys.exit(1)


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(HEAD), *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _root_of(checkout: Path) -> Path:
    """The folder from which a checkout's package is imported."""
    return checkout / "src" if (checkout / "src").exists() else checkout


def _foveate(checkout: Path, folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(_root_of(checkout)), "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    start = ["-m", "foveate"]
    if not (_root_of(checkout) / "foveate" / "__main__.py").exists():
        start = ["-c", "from foveate.cli import main; main()"]
    command = [sys.executable, *start, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{checkout.name}: foveate {' '.join(arguments)} failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def _make_inputs(parent: Path, folder: Path) -> None:
    """The demo's model, scenes, and preference pairs of the right box against another one."""
    shutil.copytree(_root_of(parent) / "foveate" / "assets" / "demo", folder / "model")
    _foveate(parent, folder, "prepare", "shapes", "data", "--train", "48", "--test", "12")
    rows = pq.read_table(folder / "data" / "train.parquet").to_pylist()
    wrong = ["no", "<box>[[0,0,10,10]]</box>", "<box>[[500,500,900,900]]</box>"]
    for number, row in enumerate(rows):
        chosen = row["extra_info"].pop("response")
        row["extra_info"] |= {"chosen": chosen, "rejected": wrong[number % 3]}
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "pairs.parquet")


def _compare(name: str, ranks: int, parent: Path, folder: Path) -> bool:
    _, settings = RUNS[name]
    if ranks > 1:
        engines = {"engines": 1} if name == "async" else {}
        settings = {**settings, "cluster": {**settings["cluster"], "gpus_per_node": ranks, **engines}}
    before, after = (
        _metrics(name, settings, f"{name}-{ranks}-{checkout.name}", checkout, folder) for checkout in (parent, HEAD)
    )
    problems = _differences(before, after)
    print(f"{name} on {ranks} rank{'s' * (ranks > 1)}: {len(after)} steps, " + (problems[0] if problems else "equal"))
    for problem in problems[1:6]:
        print(f"    {problem}")
    return not problems


def _merged(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The settings with `others` set in them, group by group."""
    groups = {key: _merged(settings.get(key, {}), value) for key, value in others.items() if isinstance(value, dict)}
    return {**settings, **others, **groups}


def _metrics(name: str, settings: dict[str, Any], run: str, checkout: Path, folder: Path) -> list[dict[str, float]]:
    is_head = checkout == HEAD
    settings = {"run": run, **json.loads(json.dumps(settings))}
    if is_head:
        settings = _merged(settings, FORMER.get(name, {}))
    for old, new in SETTINGS.items() if is_head else ():
        *path, last = old.split(".")
        group = settings
        for key in path:
            group = group.get(key, {})
        if last in group:
            value = group.pop(last)
            *path, last = new.split(".")
            group = settings
            for key in path:
                group = group.setdefault(key, {})
            group[last] = value
    recipe = folder / f"{run}.yaml"
    recipe.write_text(json.dumps(settings))  # JSON is YAML
    _foveate(checkout, folder, RUNS[name][0], str(recipe))
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _differences(before: list[dict[str, float]], after: list[dict[str, float]]) -> list[str]:
    """What differs, the first step first. A step of either commit that the other lacks differs, and so does a name."""
    problems = [] if len(before) == len(after) else [f"{len(before)} rows of metrics before, {len(after)} after"]
    for old, new in zip(before, after, strict=False):
        old = {METRICS.get(name, name): value for name, value in old.items() if not name.startswith(IGNORED)}
        new = {name: value for name, value in new.items() if not name.startswith(IGNORED)}
        step = old["step"]
        for name in sorted((old.keys() ^ new.keys()) - ADDED):
            problems.append(f"step {step}: {name} is there {'before' if name in old else 'after'} alone")
        for name in sorted(old.keys() & new.keys()):
            allowed = 0.0 if step <= EXACT_STEPS else TOLERANCE * max(1.0, abs(old[name]))
            if not abs(old[name] - new[name]) <= allowed:
                problems.append(f"step {step}: {name} was {old[name]!r}, is {new[name]!r}")
    return problems


if __name__ == "__main__":
    main()
