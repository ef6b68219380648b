"""`foveate demo`: the start that is shipped for tools, at toy size."""

from __future__ import annotations

import pytest

import foveate as fv
from foveate.errors import ConfigError
from foveate.tools import demo

SMALL = (
    "train.steps=1",
    "train.prompts_per_step=2",
    "rollout.samples=4",
    "eval.prompts=8",
    "eval.samples=0",
    "eval.gallery=8",
)


def test_the_demo_with_tools_looks_at_held_out_scenes_and_says_how_it_began(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SCENES", {"train": 4, "test": 8})
    run = fv.demo(tmp_path / "run", *SMALL, tools=True)
    assert "tool/zoom" in run.metrics.column_names
    assert "is never told to look" in (tmp_path / "run" / "notes.txt").read_text()


def test_a_demo_with_tools_and_a_cascade_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="two demos"):
        fv.demo(tmp_path / "run", cascade=True, tools=True)
