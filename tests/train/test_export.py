"""A checkpoint of a run becomes a model folder, in either layout, adapters merged."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from toy import make_data, sft_settings
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.errors import ConfigError, DataError
from foveate.models.checkpoint.formats import detect_format
from foveate.models.policy import load_policy
from foveate.train.export import export_checkpoint
from foveate.train.sft import run_sft


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module", params=["whole", "adapters"])
def run(request, tmp_path_factory, tiny_folder, data):
    lora = {"lora": {"rank": 2}} if request.param == "adapters" else {}
    model = {"model": {"path": str(tiny_folder), **lora}}
    return run_sft(sft_settings(tmp_path_factory.mktemp("runs") / "run", tiny_folder, data, **model))


def test_the_last_checkpoint_gives_the_final_model(run, tmp_path):
    assert export_checkpoint(run.checkpoints / "latest", tmp_path / "out") == 3
    own, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run.final))
    assert own.keys() == final.keys()
    assert all(torch.equal(own[name], final[name]) for name in final)


def test_an_earlier_one_gives_other_weights_in_the_layout_that_is_asked_for(run, tmp_path):
    step = run.checkpoints / "step_000002"
    result = CliRunner().invoke(app, ["export", str(step), str(tmp_path / "chat"), "--to", "chat"])
    assert result.exit_code == 0, result.output
    assert "the model after step 2" in result.output
    assert detect_format(tmp_path / "chat") == "chat"
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]
    export_checkpoint(step, tmp_path / "hf")
    chat, hf = (load_policy(str(tmp_path / name)).model.state_dict() for name in ("chat", "hf"))
    assert all(torch.equal(chat[name], hf[name]) for name in hf)
    final = load_policy(str(run.final)).model.state_dict()
    assert not all(torch.equal(final[name], hf[name]) for name in hf)


def test_what_is_no_checkpoint_or_not_as_it_was_written_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"is no checkpoint of a run; name RUN/checkpoints/step_"):
        export_checkpoint(run.path, tmp_path / "out")
    with pytest.raises(ConfigError, match="is there already"):
        export_checkpoint(run.checkpoints / "latest", tmp_path)
    state = run.checkpoints / "step_000002" / "state.json"
    before = state.read_text()
    try:
        content = json.loads(before)
        content["hashes"] = dict.fromkeys(content["hashes"], "0" * 64)
        state.write_text(json.dumps(content))
        with pytest.raises(DataError, match="is not as it was written"):
            export_checkpoint(state.parent, tmp_path / "out")
    finally:
        state.write_text(before)
    assert not (tmp_path / "out").exists()
