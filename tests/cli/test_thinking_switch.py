"""`--thinking` of `foveate generate` and `foveate eval`: the switch of the model's own family."""

from __future__ import annotations

import json

import pytest
from family_cases import build_family
from typer.testing import CliRunner

from foveate.cli.app import app
from foveate.encoding.chat import CORRECTED_TEMPLATE, THINKING_SYSTEM
from foveate.evaluate.shards import read_generated

SWITCH = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = build_family(tmp_path_factory.mktemp("switch") / "model", "qwen3")
    (made / "chat_template.jinja").write_text(CORRECTED_TEMPLATE + SWITCH)
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"data_source": "t", "prompt": [{"role": "user", "content": "1+1"}], "reward_model": {"ground_truth": "2"}}
    path.write_text(json.dumps(row | {"extra_info": {"id": "0"}}) + "\n")
    return path


def invoke(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def generated(out, folder, rows, *more):
    result = invoke("generate", "--data", rows, "--out", out, "--model", folder, "--max-tokens", 4, *more)
    assert result.exit_code == 0, result.output + str(result.exception)
    [row] = read_generated(out)
    return row


def test_generate_switches_the_template_of_the_family(folder, rows, tmp_path):
    assert generated(tmp_path / "off", folder, rows, "--no-thinking").opened == "<think>\n\n</think>\n\n"
    assert generated(tmp_path / "on", folder, rows, "--thinking").opened == ""
    again = invoke("generate", "--data", rows, "--out", tmp_path / "on", "--model", folder, "--max-tokens", 4,
                   "--temperature", 0.6)  # fmt: skip
    assert "thinking was True, now None" in str(again.exception)


def test_generate_sets_the_message_of_internvl_alone(tiny_folder, rows, tmp_path):
    plain = generated(tmp_path / "plain", tiny_folder, rows)
    thinking = generated(tmp_path / "thinking", tiny_folder, rows, "--thinking")
    named = generated(tmp_path / "named", tiny_folder, rows, "--system", "thinking")
    assert thinking.prompt_tokens == named.prompt_tokens > plain.prompt_tokens + len(THINKING_SYSTEM.split())


def test_a_family_without_a_switch_and_a_server_are_refused(rows, tmp_path):
    folder = build_family(tmp_path / "model", "qwen3")
    (folder / "chat_template.jinja").write_text(CORRECTED_TEMPLATE)
    refused = invoke("generate", "--data", rows, "--out", tmp_path / "a", "--model", folder, "--thinking")
    assert "the chat template of qwen3 does not ask for enable_thinking" in str(refused.exception)
    served = invoke("generate", "--data", rows, "--out", tmp_path / "b", "--endpoint", "http://x/v1", "--thinking")
    assert "--thinking needs --model" in str(served.exception)


def test_eval_switches_too(folder, rows, tmp_path):
    found = {}
    for switch in ((), ("--thinking",), ("--no-thinking",)):
        out = tmp_path / "-".join(("eval", *switch))
        result = invoke("eval", "--out", out, "--model", folder, "--data", rows, "--reward", "math", "--max-tokens", 4,
                        *switch)  # fmt: skip
        assert result.exit_code == 0, result.output + str(result.exception)
        found[switch] = (out / "predictions.jsonl").read_text()
    assert found[()] == found["--thinking",] != found["--no-thinking",]
