"""InternVL over InternLM2, which is a llama in transformers' format: InternVL2.5-2B, 8B and 26B, InternVL3-9B."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_cases import write_chat_folder
from conftest import TINY
from family_cases import build_internvl
from toy import make_data, rl_settings
from transformers import InternVLForConditionalGeneration

from foveate.encoding.encode import Encoder
from foveate.errors import DataError
from foveate.log import read_metrics
from foveate.models.checkpoint.convert import convert
from foveate.models.forward import token_logprobs
from foveate.models.policy import load_policy, save_policy
from foveate.parallel.packing import pack
from foveate.records import PackedGroup
from foveate.train.rl import run_rl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}  # as InternVL2.5-8B has it
    text = {"model_type": "llama", "rope_parameters": rope, "max_position_embeddings": 4096}
    return build_internvl(folder, TINY, text=text, vision={})


def test_packed_answers_have_the_logprobs_and_gradients_of_plain_rows(folder, make_task, make_image):
    policy = load_policy(str(folder))
    encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 1024)
    prompt = encode(make_task("<image> and <image>, which?", make_image(130, 70), make_image(60, 90, 1)))
    answers = [tuple(range(20 + 7 * i, 33 + 9 * i)) for i in range(3)]
    got, _ = token_logprobs(policy, pack([PackedGroup.of_tokens(prompt, answers)]))
    plain = InternVLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    rows = []
    for answer in answers:
        ids = torch.tensor([[*prompt.token_ids, *answer]])
        logp = plain(input_ids=ids, pixel_values=prompt.pixels).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        rows.append(logp.gather(1, torch.tensor(answer)[:, None])[:, 0])
    torch.testing.assert_close(got, torch.cat(rows), rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    torch.cat(rows).square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in policy.model.named_parameters():
        grad = theirs[name].grad
        assert (parameter.grad is None) == (grad is None), name
        if grad is not None:
            assert (parameter.grad - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-5, name


def test_a_run_gives_it_back_in_its_own_layout(folder, tmp_path):
    run = run_rl(rl_settings(tmp_path / "run", folder, make_data(tmp_path / "data"), train={"steps": 2}))
    records = read_metrics(run.metrics)
    assert all(record["optim/grad_norm"] > 0 for record in records)
    assert all(record["engine/logprob_difference_max"] < 1e-4 for record in records)
    again = load_policy(str(run.final))
    assert again.model.config.text_config.model_type == "llama"
    save_policy(again, tmp_path / "saved")
    assert load_policy(str(tmp_path / "saved")).family == again.family


def test_internlm2_in_the_github_format_is_refused_with_what_to_do(tmp_path, folder):
    chat = write_chat_folder(tmp_path / "chat", "300M-qwen2")
    config = json.loads((chat / "config.json").read_text())
    config["llm_config"] |= {"architectures": ["InternLM2ForCausalLM"], "auto_map": {"AutoConfig": "x"}}
    (chat / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"never runs such code\); take the same model in transformers' format.*-hf"):
        load_policy(str(chat))
    with pytest.raises(DataError, match=r"text_config\.model_type is 'llama'; known are: qwen2"):
        convert(folder, tmp_path / "out", "chat")
