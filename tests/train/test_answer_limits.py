"""Answers that are trained on as they stand are measured before the run, as prompts are."""

from __future__ import annotations

import json

import pytest
from toy import mpo_settings, sft_settings

from foveate.errors import DataError
from foveate.run_folder import RunFolder
from foveate.train.mpo import run_mpo
from foveate.train.sft import run_sft

LONG = "the small red circle left of " * 60


def rows_of(folder, *extras):
    path = folder / "rows.jsonl"
    rows = [
        {"data_source": "x", "prompt": [{"role": "user", "content": "Q"}], "extra_info": {"id": str(i), **extra}}
        for i, extra in enumerate(extras)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_demonstration_that_fits_no_forward_pass_is_refused_by_row(tmp_path, tiny_folder):
    path = rows_of(tmp_path, {"response": "short"}, {"response": LONG})
    settings = sft_settings(tmp_path / "run", tiny_folder, tmp_path, data={"train": [str(path)]})
    with pytest.raises(DataError, match=r"row 1 \(line 2\), field extra_info\.response: \d+ tokens, and \d+ of the "):
        run_sft(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["chosen", "rejected"])
def test_so_is_either_answer_of_a_pair(tmp_path, tiny_folder, name):
    pair = {"chosen": "yes", "rejected": "no", name: LONG}
    path = rows_of(tmp_path, {"chosen": "a", "rejected": "b"}, pair)
    with pytest.raises(DataError, match=rf"\(line 2\), field extra_info\.{name}: \d+ tokens, and .*raise train\."):
        run_mpo(mpo_settings(tmp_path / "run", tiny_folder, path))


def test_two_answers_of_a_pair_need_not_fit_together(tmp_path, tiny_folder):
    half = "the small red circle left of " * 20
    path = rows_of(tmp_path, *[{"chosen": half, "rejected": half + "big"}] * 4)
    run = run_mpo(mpo_settings(tmp_path / "run", tiny_folder, path, train={"steps": 1}))
    assert isinstance(run, RunFolder)


def test_a_longest_answer_can_be_set(tmp_path, tiny_folder):
    path = rows_of(tmp_path, {"response": "red " * 40})
    changes = {"data": {"train": [str(path)]}, "train": {"max_answer_tokens": 20, "samples_per_step": 1}}
    with pytest.raises(
        DataError, match=r"row 0 \(line 1\), field extra_info\.response: \d+ tokens, the limit is 20; raise train\."
    ):
        run_sft(sft_settings(tmp_path / "run", tiny_folder, tmp_path, **changes))


def test_rows_with_long_answers_can_be_left_out(tmp_path, tiny_folder):
    path = rows_of(tmp_path, {"response": "short"}, {"response": LONG}, {"response": "left"})
    data = {"train": [str(path)], "on_bad_row": "skip"}
    train = {"steps": 1, "samples_per_step": 2}
    run = run_sft(sft_settings(tmp_path / "run", tiny_folder, tmp_path, data=data, train=train))
    assert "row 1 (line 2), field extra_info.response" in run.skipped.read_text()
