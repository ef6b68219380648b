"""The card of a trained model: made of the run's files, without paths of this machine, and the same each time."""

from __future__ import annotations

from pathlib import Path

import yaml
from fake_run import make_run

from foveate.config.recipe import load_recipe, to_yaml
from foveate.config.runs import MPOSettings, RLSettings
from foveate.report.card import write_card

TASK = "image-text-to-text"
BASE = "---\nlicense: apache-2.0\nbase_model: acme/first\nlicense_link: https://x\n---\n# Base\n"


def settled(folder: Path, *overrides: str, recipe: str = "shapes_gspo", kind: type = RLSettings) -> Path:
    """A run that has ended, with these settings."""
    run = make_run(folder / "run", steps=10, rows=3)
    (run / "config.yaml").write_text(to_yaml(load_recipe(recipe, overrides, kind)))
    (run / "final").mkdir()
    return run


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_a_card_says_base_licence_data_settings_curve_and_evaluation(tmp_path):
    run = settled(
        tmp_path, "model.path=acme/base@v1", "data.train=[acme/rows@train, /home/me/secret/mine.parquet]",
        "data.test=[acme/rows@test]", "model.lora={rank: 8}", "model.quantization=nf4",
    )  # fmt: skip
    (run / "final/README.md").write_text(BASE)
    text = write_card(run, run / "final", TASK).read_text()
    assert front(text) == {
        "base_model": "acme/base", "license": "apache-2.0", "library_name": "transformers",
        "pipeline_tag": TASK, "tags": ["foveate", "rl", "gspo"], "datasets": ["acme/rows"],
    }  # fmt: skip
    for said in (
        "| base model | acme/base, licence apache-2.0 |",
        "| trained by | online reinforcement learning |",
        "| training data | acme/rows@train, secret/mine.parquet |",
        "| optim.lr | 0.0003 |",
        "| model.lora.rank | 8 |",
        "| model.quantization | nf4 |",
        "| reward.name | grounding |",
        "| torch | 2.13.0 |",
        "| 1 to 2 | ",
        "| Greedy accuracy at IoU 0.5 | 3 | ",
        "on 3 held-out questions after",
    ):
        assert said in text
    assert "/home" not in text


def test_a_card_says_the_task_of_its_model(tmp_path):
    run = settled(tmp_path)
    assert front(write_card(run, run / "final", "text-generation").read_text())["pipeline_tag"] == "text-generation"


def test_a_card_is_the_same_when_it_is_written_again_and_keeps_licence_and_base(tmp_path):
    run = settled(tmp_path)
    (run / "final/README.md").write_text(BASE)
    first = write_card(run, run / "final", TASK).read_text()
    assert write_card(run, run / "final", TASK).read_text() == first
    assert (front(first)["base_model"], front(first)["license"]) == ("acme/first", "apache-2.0")


def test_what_a_base_says_beside_its_licence_does_not_reach_the_card(tmp_path):
    run = settled(tmp_path)
    (run / "final/README.md").write_text("---\nlicense: [a, b]\nbase_model: '<b>x'\ntags: [evil]\n---\n")
    assert front(write_card(run, run / "final", TASK).read_text()).keys() == {"library_name", "pipeline_tag", "tags"}


def test_the_card_of_a_preference_run_names_its_loss(tmp_path):
    run = settled(tmp_path, "data.train=[a|b/`x`.parquet]", recipe="internvl3_5_1b_mpo", kind=MPOSettings)
    text = write_card(run, run / "final", TASK).read_text()
    assert "| trained by | preference optimisation |" in text
    assert "| loss.name | mpo |" in text
    assert "| training data | a\\|b/\\`x\\`.parquet |" in text
