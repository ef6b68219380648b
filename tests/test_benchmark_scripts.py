"""Every script of benchmarks/ runs, at toy sizes, and prints its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
VLLM = os.environ.get("FOVEATE_VLLM")
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import bench  # noqa: E402
import page_engine  # noqa: E402

PARTS = {
    "update": (["--works", "text"], "The update of one identical batch", ["update-text"]),
    "threads": (["--works", "text"], "The same with two threads", ["threads-text"]),
    "memory": ([], "Memory with a large vocabulary", ["memory"]),
    "step": ([], "The whole GRPO step", ["step"]),
    "real_step": ([], "The whole GRPO step of a real model", ["real_step"]),
    "generation": ([], "Generation against transformers", ["generation"]),
    "engine": ([], "Generation against vLLM", [f"engine-{work}" for work in page_engine.ENGINE_WORKS]),
    "turns": ([], "Answers of several turns", ["turns"]),
    "gated_delta_net": ([], "Qwen3.5", ["gated_delta_net"]),
    "serve_load": ([], "The server under load", ["serve_load"]),
    "start": ([], "How soon a command does its work", ["start"]),
    "scaling": ([], "How time and memory grow", ["scaling"]),
    "limit": ([], "How far from the machine's limit", ["limit"]),
}
"""Arguments of each part of `make bench`, its section of the page, and its files."""

SCRIPTS = {
    "compare": (["--works", "text", "--pairs", "1"], "| text | foveate |"),
    "convert_memory": ([], "bitwise equal after the round trip: True"),
    "data_memory": (["--rows", "2000", "--batches", "4", "--batch", "16"], "64 rows in"),
    "data_validation": (["--rows", "60", "--workers", "1", "--one"], "prepare filter:"),
    "engine_cycles": (["native", "--cycles", "3", "--out", "{folder}/cycles"], "largest difference of log-probs"),
    "judge": (["--answers", "20", "--seconds", "0.02", "--alone", "2"], "20 at once"),
    "kills": (
        ["--on", "one", "--kills", "1", "--steps", "16", "--within", "1"],
        "0 of them not as the",
    ),
    "load_memory": ([], "2 ranks, filled"),
    "plan_memory": ([], "| 12 M | toy |"),
    "plan_recipes": (["gspo"], "| `1b_gspo` |"),
    "process_rewards": (["--folder", "{folder}/out", "--steps", "20", "--judge-steps", "2"], "over majority"),
    "publish": (["transfer", "--mb", "8", "--buckets", "2", "4", "--pairs", "1"], "bucket_mb 4:"),
    "quick": (["--repeats", "1", "--works", "text"], "| update: text, share of the matrix speed |"),
    "rewards": (
        ["--answers", "32", "--hostile", "0", "--workers", "1", "--time-limit", "60"],
        "grounding  32 answers in",
    ),
    "soak_serve": (["--minutes", "0.05", "--clients", "2"], "at the end:"),
    "soak_train": (["--steps", "4", "--early", "2"], "step 4:"),
    "staleness": (["curves", "--steps", "1", "--seeds", "0", "--staleness", "1", "--out", "{folder}"], "held out"),
}
"""Arguments of the others, and a part of what each prints."""

MORE = {
    "staleness": [
        (["time", "--seconds", "0.05", "--steps", "2"], "staleness 2:"),
        (["tail", "--tick", "0.001", "--steps", "3"], "time_limit 0.04:"),
    ],
}
ELSEWHERE = {"bench", "chart", "gpu", "page", "page_engine", "page_figures", "page_gpu", "page_limit", "page_readme"}
ELSEWHERE |= {"first_step"}  # in the recipe of `start`
ELSEWHERE |= {"two_nodes"}  # tests/cluster/test_ray_benchmark.py
CASES = [(name, *case) for name, first in SCRIPTS.items() for case in (first, *MORE.get(name, []))]


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """Toy sizes, foveate alone."""
    monkeypatch.setenv("FOVEATE_BENCHMARK_TOY", "1")
    monkeypatch.setenv("FOVEATE_PEERS", str(tmp_path / "no-peers"))
    monkeypatch.delenv("FOVEATE_VLLM", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(name, arguments, folder, **environment):
    """What a script prints."""
    words = [argument.format(folder=folder) for argument in arguments]
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_measure_writes_its_figures_and_its_section(part, tmp_path, monkeypatch):
    arguments, section, files = PARTS[part]
    monkeypatch.setattr(bench, "LARGE_VOCABULARY", 5000)
    bench.main([part, "--pairs", "1", "--results", str(tmp_path), *arguments])
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted(files)
    text = (tmp_path / "performance.md").read_text().split(f"## {section}")[1].split("\n## ")[0]
    assert "\n| " in text
    assert "\nNot measured.\n" not in text


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments", "printed"), CASES)
def test_a_script_runs_and_prints_its_figures(name, arguments, printed, tmp_path):
    assert printed in run(name, arguments, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_measures_on_a_gpu_run(tmp_path):
    lines = run("gpu", ["update", "generate", "--steps", "1", "--warm", "1"], tmp_path).splitlines()
    assert [json.loads(line)["part"] for line in lines if line.startswith("{")] == ["update", "generate"] * 2


@pytest.mark.slow
def test_the_real_vllm_computes_what_the_engine_computes(tmp_path):
    if not VLLM:
        pytest.skip("FOVEATE_VLLM does not name the environment of a vLLM")
    works = ["--works", "different-prompts", "image-groups"]
    printed = run("engine", [*works, "--eager", "only", "--pairs", "1", "--json"], tmp_path, FOVEATE_VLLM=VLLM)
    for found in json.loads(printed.splitlines()[-1])["works"]:
        assert len(found["steps"]["vllm-eager"]) == 1
        assert found["largest_difference"] < 1e-4


def test_every_script_is_run():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    measured_by_parts = {"engine", "gated_delta_net", "generation", "group_packing", "limit", "scaling", "serve_load"}
    measured_by_parts |= {"start", "turns"}
    assert scripts == {*SCRIPTS, *measured_by_parts, *ELSEWHERE}
    assert {*PARTS} == {*bench.PARTS}


def test_the_page_knows_the_works_of_the_engines():
    assert [*page_engine.ENGINE_WORKS] == [*bench.engine.WORKS]


def test_figures_of_toy_sizes_are_not_kept_as_measured(capsys):
    with pytest.raises(SystemExit):
        bench.main(["generation"])
    assert "toy sizes do not belong there" in capsys.readouterr().err
