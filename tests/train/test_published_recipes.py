"""Published recipes: each has a tiny twin that differs from it in sizes alone, and runs from start to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from family_cases import build_family

from foveate.config.recipe import flatten, load_recipe
from foveate.config.runs import RLSettings
from foveate.data.table import open_tasks, write_rows
from foveate.datasets.mixed import mixed_rows
from foveate.datasets.prepared import infer_schema
from foveate.log import read_metrics
from foveate.models.tiny import TinySize, build_tiny
from foveate.train.rl import run_rl

TWINS = Path(__file__).parents[1] / "data/twins"
RECIPES = {
    "vero_qwen3vl_8b": "qwen3_vl",
    "vero_internvl3_5_8b": "internvl",
    "openmmreasoner_7b": "qwen2_5_vl",
    "geo3k_internvl3_5_1b_lora": "internvl",
}
SIZES = {
    "run", "model.path", "model.max_pixels", "model.max_tiles", "model.gradient_checkpointing",
    "data.train", "data.test", "data.max_prompt_tokens", "data.image_workers",
    "rollout.engine", "rollout.samples", "rollout.max_tokens",
    "optim.warmup_steps",
    "train.steps", "train.prompts_per_step", "train.updates_per_step", "train.tokens_per_micro_batch",
    "train.save_every", "train.threads",
    "eval.every", "eval.prompts", "eval.gallery",
    "cluster.nodes", "cluster.gpus_per_node", "cluster.engines", "cluster.device", "cluster.dtype",
}  # fmt: skip
"""Settings that say how large a run is, where its files lie, and on which machine it runs."""
DOMAINS = (
    "chart_ocr",
    "counting_grounding_search",
    "knowledge_recognition",
    "spatial_action",
    "stem",
    "visual_alignment",
)


def differing(name: str) -> set[str]:
    one, other = (
        flatten(load_recipe(path, [], RLSettings).model_dump()) for path in (name, TWINS / f"tiny_{name}.yaml")
    )
    return {path for path in one.keys() | other.keys() if one.get(path) != other.get(path)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_differs_from_its_recipe_in_sizes_alone(name):
    assert differing(name) <= SIZES
    assert {"model.path", "rollout.max_tokens", "train.steps"} <= differing(name)


def rows_for(name: str) -> list[dict[str, Any]]:
    """Drawn rows in the form that the recipe expects."""
    rows = []
    for index, row in enumerate(row for row in mixed_rows(0, "train", 36, 56) if row["data_source"] != "list"):
        domain = DOMAINS[index % len(DOMAINS)] if name.startswith("vero") else row["data_source"]
        rows.append({**row, "data_source": domain})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_twin_runs_from_start_to_end(name, tmp_path):
    if RECIPES[name] == "internvl":
        build_tiny(tmp_path / "model", TinySize(tile=56, max_tiles=2))
    else:
        build_family(tmp_path / "model", RECIPES[name])
    rows = rows_for(name)
    write_rows(tmp_path / "rows.parquet", rows, infer_schema({**row, "images": []} for row in rows))
    overrides = [
        f"run={tmp_path}/run", f"model.path={tmp_path}/model",
        f"data.train=[{tmp_path}/rows.parquet]", f"data.test=[{tmp_path}/rows.parquet]",
    ]  # fmt: skip
    settings = load_recipe(TWINS / f"tiny_{name}.yaml", overrides, RLSettings)
    run = run_rl(settings)
    metrics = read_metrics(run.metrics)
    assert metrics[-1]["step"] == settings.train.steps
    assert (run.final / "config.json").is_file() or (run.final / "adapter_config.json").is_file()
    if name.startswith("vero"):
        counts = [sum(row.get(f"source/{domain}/answers", 0) for row in metrics) for domain in DOMAINS]
        assert len(set(counts)) == 1
    assert json.dumps(metrics[-1])
    assert len(open_tasks(tmp_path / "rows.parquet")) == len(rows)
