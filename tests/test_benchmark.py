"""The comparison with other trainers: what is timed is the same computation, and disagreement stops it."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PEERS = Path(os.environ.get("FOVEATE_PEERS", ROOT / "build" / "peers"))
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import bench  # noqa: E402
import compare  # noqa: E402
import engine  # noqa: E402
import foveate_step  # noqa: E402
import page  # noqa: E402
import page_readme  # noqa: E402
from work import WORKS  # noqa: E402

RECORDED = json.loads(gzip.decompress((Path(__file__).parent / "data" / "peer_updates.json.gz").read_bytes()))
"""Of TRL 1.16.0 and verl 0.9.1, written by `python benchmarks/compare.py --record`: loss, gradient norm, and for each
parameter the norm of its gradient and the product with a fixed wave, on the work `check`."""


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """foveate's loss, gradient norm and gradients on `check`: images in two groups, clipped ratios."""
    folder = tmp_path_factory.mktemp("check")
    foveate_step.make(str(folder / "model"), str(folder / "batch.pt"), WORKS["check"], 4096)
    _, gradients = foveate_step.steps_of(str(folder / "model"), str(folder / "batch.pt"))
    done, prints = gradients()
    return {"loss": done.loss, "grad_norm": done.grad_norm, "gradients": prints}


def assert_equal(ours, theirs):
    """Loss and norm, and the gradient of every parameter, within 1e-4. A gradient that is rounding alone (the biases of
    keys have none in exact arithmetic) is compared with the whole."""
    for key in ("loss", "grad_norm"):
        assert math.isclose(ours[key], theirs[key], rel_tol=1e-4), key
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, (norm, product) in theirs["gradients"].items():
        near = max(1e-4 * norm, 1e-6 * theirs["grad_norm"])
        assert ours["gradients"][name] == pytest.approx((norm, product), rel=0, abs=near), name


@pytest.mark.parametrize("peer", ["trl", "verl"])
def test_loss_and_gradients_are_those_that_the_peers_computed(peer, ours):
    assert_equal(ours, RECORDED[peer])


def test_a_wrong_gradient_of_one_parameter_is_noticed(ours):
    name, (norm, product) = max(ours["gradients"].items(), key=lambda item: item[1][0])
    wrong = {**ours, "gradients": {**ours["gradients"], name: (norm, product + 1e-3 * norm)}}
    with pytest.raises(AssertionError):
        assert_equal(wrong, RECORDED["trl"])


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["trl", "verl"])
def test_loss_and_gradients_equal_those_of_the_peers_now(peer, monkeypatch):
    if not (PEERS / peer / "ready").exists():
        pytest.skip(f"no environment of {peer} in {PEERS}: benchmarks/peers/install.sh makes one")
    monkeypatch.setenv("FOVEATE_PEERS", str(PEERS))
    with compare.running("check", ["foveate", peer], 1, 4096) as systems:
        ours, theirs = (system.ask("gradients") for system in systems)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [1.0002, float("nan")])
def test_nothing_is_timed_when_a_peer_computes_something_else(key, value):
    same = {"loss": 1.0, "grad_norm": 1.0}
    compare.check_agreement("check", {"foveate": same, "trl": {"loss": 1.00005, "grad_norm": 0.99995}})
    with pytest.raises(SystemExit, match=f"{key} of trl"):
        compare.check_agreement("check", {"foveate": same, "trl": {**same, key: value}})


def test_systems_take_turns_and_the_first_round_is_not_timed():
    asked = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def ask(self, _what):
            asked.append(self.name)
            return {"loss": 1.0, "grad_norm": 1.0, "number": len(asked)}

    steps = compare.alternate("check", [Fake("foveate"), Fake("trl")], 2)
    assert asked == ["foveate", "trl", "foveate", "trl", "trl", "foveate"]
    assert [record["number"] for record in steps["foveate"]] == [3, 6]


def test_every_work_has_room_for_its_images():
    for work in WORKS.values():
        assert sum(work.images) * 16 + 10 <= work.prompt
        assert work.answers % work.rows == 0


def said(token_ids=(4, 5, 6), logprobs=(-1.0, -2.0, -3.0), prompt_tokens=7):
    """What an engine says of one prompt and its greedy answer."""
    return {"prompt_tokens": [prompt_tokens], "token_ids": [[*token_ids]], "logprobs": [[*logprobs]]}


def test_engines_that_do_the_same_are_timed():
    assert engine.check("w", said(), said(logprobs=(-1.0, -2.00005, -3.0))) == pytest.approx(5e-5)
    parted = said(token_ids=(4, 9, 1), logprobs=(-1.0, -2.00005, -8.0))  # two tokens as likely; what follows differs
    assert engine.check("w", said(), parted) == pytest.approx(5e-5)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (said(prompt_tokens=8), r"w: prompts have \[8\] tokens, in foveate \[7\]: nothing is timed"),
        (said(logprobs=(-1.0, -2.001, -3.0)), "w: answer 0, place 1: token 5 with -2.001000, of foveate 5"),
        (said(token_ids=(4, 9, 6), logprobs=(-1.0, -2.5, -3.0)), "w: answer 0, place 1: token 9 with -2.500000"),
    ],
)
def test_engines_that_do_something_else_are_not_timed(theirs, message):
    with pytest.raises(SystemExit, match=message):
        engine.check("w", said(), theirs)


# ------------------------------------------------------------------------------------------------------------ the page


def measured(**seconds):
    """A result of one round in which each system took so long."""
    steps = {name: [{"cpu": cpu, "wall": cpu, "peak_mb": 100.0}] for name, cpu in seconds.items()}
    conditions = {"date": "2026-01-01", "cores": 2, "load": 0.5, "torch": "2.13.0", "machine": "a processor"}
    return {"work": "text", "threads": 1, "vocabulary": 4096, "steps": steps, **conditions}


@pytest.fixture
def written(tmp_path):
    """written(results) -> the page and its chart."""

    def write(results):
        for name, result in results.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
        page.write_page(tmp_path, tmp_path)
        return (tmp_path / "performance.md").read_text(), (tmp_path / "performance.svg").read_text()

    return write


def test_the_page_says_what_was_measured_and_what_was_not(written):
    text, chart = written({"update-text": measured(foveate=2.0, trl=3.0, verl=1.0)})
    assert "| update, text, one thread: at least 1.5 times TRL | 1.50 | yes |" in text
    assert "| update, text, one thread: at least 1.35 times verl | 0.50 | **no** |" in text
    assert "4,096" in text.split("trained tokens")[1]
    assert "Not measured: grounding-short, grounding-reasoning, reasoning, several-images." in text
    assert text.count("\nNot measured.") == 13
    assert "a processor" in text
    assert "TRL 1.5" in chart


def test_the_page_has_the_goals_of_another_processor(written, tmp_path):
    other = measured(foveate=2.0, trl=5.0) | {"machine": "another processor"}
    (tmp_path / "another").mkdir()
    (tmp_path / "another" / "update-text.json").write_text(json.dumps(other))
    text, _ = written({"update-text": measured(foveate=2.0, trl=3.0)})
    here, there = text.split("## The goals on another processor: another processor")
    assert "| update, text, one thread: at least 1.5 times TRL | 1.50 | yes |" in here
    assert "another processor" in there
    assert "| update, text, one thread: at least 1.5 times TRL | 2.50 | yes |" in there


def test_the_page_compares_the_best_of_ours_on_a_gpu(written, tmp_path):
    about = {"size": "1B", "gpu": "a GPU", "torch": "2.13.0", "work": "text", "machine": 1, "peak_gib": 3.2}
    rows = [
        {"part": "update", "seconds": 3.0, "answer_tokens_per_second": 7.0, "set": {}, **about},
        {"part": "update", "seconds": 2.0, "answer_tokens_per_second": 9.0, "set": {"model.compile": True}, **about},
        {
            "part": "trl",
            "seconds": 5.0,
            "answer_tokens_per_second": 1.0,
            "set": {},
            "share_of_data_sheet": 0.1,
            **about,
        },
    ]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = written({})
    assert "| foveate, update `model.compile=true` | text | 2.00 | 9 | 3 |  | 1 |" in text
    assert "TRL, update, text: 2.5 times foveate's seconds" in text


def test_the_page_that_is_kept_is_that_of_the_results_that_are_kept(tmp_path):
    root = Path(page.__file__).parent.parent
    page.write_page(root / "benchmarks" / "results", tmp_path)
    assert (tmp_path / "performance.md").read_text() == (root / "docs" / "performance.md").read_text()


def test_readme_says_what_the_page_says(tmp_path):
    root = Path(page.__file__).parent.parent
    shutil.copy(root / "README.md", tmp_path)
    found = page.read_results(root / "benchmarks" / "results")
    page_readme.write_section(found, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (root / "README.md").read_text()
    figures = re.findall(r"\d[\d,]*\.?\d*", page_readme.section(found).split("| --- |\n")[1])
    text = (root / "docs" / "performance.md").read_text()
    assert [figure for figure in figures if figure.strip(",") not in text] == []


def test_a_page_of_nothing_claims_nothing(written):
    text, chart = written({})
    assert "Nothing has been measured." in text
    assert "yes" not in text.split("## The goals")[1]
    assert chart.startswith("<svg")


def test_an_unknown_part_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as refused:
        bench.main(["generatoin"])
    assert refused.value.code == 2
    assert "unknown part 'generatoin'; known are update, threads, memory" in capsys.readouterr().err
