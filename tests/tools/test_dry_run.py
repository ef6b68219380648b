"""Dry runs: what they say of each stage, and that they leave nothing behind."""

from __future__ import annotations

import re

import pytest
from toy import cascade_settings, make_data, make_pairs, mpo_settings, rl_settings, sft_settings

from foveate.errors import ConfigError, DataError
from foveate.run_folder import open_run
from foveate.tools.dry_run import describe_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("shapes"))
    make_pairs(folder)
    return folder


def said_of(settings, folder):
    before = sorted(folder.rglob("*"))
    said = describe_run(settings)
    assert sorted(folder.rglob("*")) == before
    assert said.startswith("dry run: nothing is written\n")
    return said


def test_rl_shows_its_first_prompt_and_a_sampled_and_graded_answer(tmp_path, tiny_folder, data):
    said = said_of(rl_settings(tmp_path / "run", tiny_folder, data), tmp_path)
    assert "rl: 3 steps of 4 prompts with 4 answers of up to 8 tokens, 1 update each, algorithm gspo" in said
    assert "rows: 16, 0.8 epochs; evaluation: 6 held-out rows, every 2 steps" in said
    assert "memory of a device: weights 0.0" in said
    assert "tokens, 1 image among them\n  tokens: " in said
    assert " x 4, " in said
    assert "  | <|im_start|>user\n  | <img><IMG_CONTEXT></img>" in said
    assert "sampled answer at temperature 1: " in said
    assert "ground truth: " in said
    assert "toy.py:text_length: " in said
    assert ", characters " in said


def test_sft_shows_what_is_trained(tmp_path, tiny_folder, data):
    said = said_of(sft_settings(tmp_path / "run", tiny_folder, data), tmp_path)
    assert "evaluation: none" in said
    assert "response, trained: " in said
    assert "</box><|im_end|>" in said
    assert "sampled answer" not in said


def test_preference_learning_shows_both_answers(tmp_path, tiny_folder, data):
    said = said_of(mpo_settings(tmp_path / "run", tiny_folder, data / "pairs.parquet", loss="dpo"), tmp_path)
    assert "mpo: 3 steps of 4 pairs, loss dpo" in said
    assert said.index("chosen, compared: ") < said.index("rejected, compared: ")


def test_a_cascade_shows_each_stage(tmp_path, data):
    said = said_of(cascade_settings(tmp_path / "run", data), tmp_path)
    places = [said.index(one) for one in ("\nsft: ", "response, trained", "\npairs and mpo: 4 answers to 12", "\nrl: ")]
    assert places == sorted(places)


def test_what_a_run_would_refuse_is_refused(tmp_path, tiny_folder, data):
    with pytest.raises(ConfigError, match="unknown algorithm 'gspp'; did you mean 'gspo'"):
        describe_run(rl_settings(tmp_path / "run", tiny_folder, data, algorithm={"name": "gspp"}))
    with pytest.raises(DataError, match="no column holds the chosen"):
        describe_run(mpo_settings(tmp_path / "run", tiny_folder, data / "test.parquet"))


def test_a_dry_run_refuses_the_folder_that_the_run_would_refuse(tmp_path, tiny_folder, data):
    begun = rl_settings(tmp_path / "run", tiny_folder, data)
    with open_run(begun.run, begun) as run:
        (run.path / "metrics.jsonl").write_text('{"step": 1}\n')
    hotter = begun.model_copy(update={"rollout": begun.rollout.model_copy(update={"temperature": 0.5})})
    with pytest.raises(ConfigError, match=r"with other settings: rollout\.temperature was 1\.0, now 0\.5"):
        describe_run(hotter)
    assert describe_run(hotter, accept_changes=True).startswith("dry run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"other is not the folder of a run: it holds thesis\.tex"):
        describe_run(begun.model_copy(update={"run": str(tmp_path / "other")}))


LONG = """
class Long:
    def reset(self, seed=None):
        return "red " * 2000, {}
"""


def test_an_environment_that_begins_with_too_long_a_prompt_is_told(tmp_path, tiny_folder, data, monkeypatch):
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (tmp_path / "long.py").write_text(LONG)
    own = {"name": "gymnasium", "settings": {"make": f"{tmp_path / 'long.py'}:Long"}}
    said = said_of(rl_settings(tmp_path / "run", tiny_folder, data, environment=own), tmp_path)
    assert re.search(r"not graded \(environment: .*field prompt: \d+ tokens with its images, the limit is \d+; ", said)
