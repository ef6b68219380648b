"""Conversations of several turns with images, imitated in all turns of the assistant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import make_data, sft_settings

from foveate.encoding.turns import Turns, encode_trace
from foveate.models.forward import token_logprobs
from foveate.parallel.packing import pack
from foveate.records import Demo, Message, PackedGroup, Task
from foveate.tools.dry_run import describe_run
from foveate.train.sft import _group


def test_prompts_show_the_tools_of_the_environment_that_is_imitated(tmp_path, tiny_folder):
    environment = {"name": "tools", "settings": {"tools": ["zoom"]}}
    data = make_data(tmp_path / "data")
    changes = {"data": {"max_prompt_tokens": 800}, "train": {"tokens_per_micro_batch": 1024, "trained_turns": "all"}}
    told = describe_run(sft_settings(tmp_path / "run", tiny_folder, data, environment=environment, **changes))
    assert '"name": "zoom"' in told


@pytest.fixture
def trace(make_image):
    messages = (
        Message("user", "<image>\nWhich letter is it?"),
        Message("assistant", "I look closer."),
        Message("tool", "<image>\nhere"),
        Message("assistant", "And closer."),
        Message("user", "go on <image>"),
    )
    return Task("t", "s", messages, tuple(make_image(56, 56, i) for i in range(3)), None, where="a.jsonl, row 1")


def test_all_turns_of_the_assistant_are_trained_and_what_others_say_is_read(encode, trace, tiny_policy):
    prompt, answer = encode_trace(Turns(encode), trace, "It is K.")
    assert [segment.trained for segment in answer.segments] == [True, False, True, False, True]
    assert [len(segment.slots) for segment in answer.segments] == [0, 1, 0, 1, 0]
    said = [encode.decode(tuple(segment.token_ids.tolist())) for segment in answer.segments if segment.trained]
    assert said == ["I look closer.", "And closer.", "It is K."]
    whole = encode(trace)
    last = encode.answer_ids("It is K.")
    assert (*prompt.token_ids, *answer.token_ids) == (*whole.token_ids, *last)
    assert torch.equal(torch.cat([prompt.pixels, *(s.tiles for s in answer.segments if s.slots)]), whole.pixels)
    with torch.no_grad():
        got, _ = token_logprobs(tiny_policy, pack([PackedGroup(prompt, (answer,))]))
        expected, _ = token_logprobs(tiny_policy, pack([PackedGroup.of_tokens(whole, (last,))]))
    torch.testing.assert_close(got[-len(last) :], expected, rtol=1e-5, atol=1e-5)


def test_the_last_turn_alone_is_trained_unless_all_are_asked_for(encode, trace):
    demo = Demo(trace, "It is K.")
    last, every = (_group(encode, turns, demo, encode(trace)) for turns in (None, Turns(encode)))
    assert last.tokens == every.tokens
    assert last.trained_tokens == len(encode.answer_ids("It is K.")) < every.trained_tokens
    single = Demo(replace(trace, messages=trace.messages[:1], images=trace.images[:1]), "It is K.")
    prompt = encode(single.task)
    assert _group(encode, Turns(encode), single, prompt).prompt is prompt
