"""The tables of docs/planning.md: counts, memory and GPU hours of the recipes of the published sizes. Minutes."""

from __future__ import annotations

import sys
from dataclasses import replace

from peers.toy_sizes import sized

from foveate.config.recipe import read_recipe
from foveate.plan.hardware import GIB, parse_machines
from foveate.plan.memory import memory_of, sizes_of
from foveate.plan.time import active_parameters, seconds_of
from foveate.plan.workload import workload_of

SIZES = sized(("1b", "2b", "4b", "8b", "14b", "30b_a3b", "38b", "241b_a28b"), toy=("1b",))
COLUMNS = (
    "recipe", "GPUs", "parameters", "active", "trained", "weights", "gradients", "optimizer", "gathered", "activations",
    "log-prob chunk", "while training", "while generating", "GPU hours",
)  # fmt: skip


def main(stage: str) -> None:
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for size in SIZES:
        settings = read_recipe(f"internvl3_5_{size}_{stage}", [])
        cluster = settings.cluster
        machines = parse_machines(f"{cluster.gpus // 8}x8xH100-80")
        trainers = replace(machines, nodes=cluster.nodes, per_node=cluster.gpus_per_node)
        work = workload_of(settings, None, None, None)
        memory, sizes = memory_of(work), sizes_of(work.config, work.trainable, work.lora)
        hours = seconds_of(work, trainers, memory).step * work.steps * machines.count / 3600
        parts = (
            memory.weights, memory.gradients, memory.optimizer, memory.gathered, memory.activations + memory.features,
            memory.chunk, memory.training, memory.generating,
        )  # fmt: skip
        cells = [f"{part / GIB:.1f}" for part in parts]
        active = (
            active_parameters(work.config) + work.config.text_config.vocab_size * work.config.text_config.hidden_size
        )
        counts = [f"{sizes.total:,}", f"{active / 1e9:.2f} B", f"{sizes.trained:,}"]
        print(f"| `{size}_{stage}` | {machines.count} | {' | '.join([*counts, *cells])} | {hours:,.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
