"""Faults of slots that hold a short prompt with its only answer, and of the places of prompts whose answers wait."""

from __future__ import annotations

import pytest
import torch
from test_sequence_state import AttentionLayer, Batch

from foveate.records import SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native import shelves
from foveate.rollout.native.batch import DecodeJob
from foveate.rollout.native.engine import NativeEngine


def recording(policy, encode):
    """An engine that does what one does on a GPU, and how many of its steps were recorded."""
    engine, replayed = NativeEngine(policy, encode.decode), []

    def record(step, *_):
        return lambda *given: replayed.append(1) or step(*given)

    engine._record = record
    return engine, replayed


def prompts(encode, make_task, count):
    return [encode(make_task("Where is it? " + "far " * (3 * i))) for i in range(count)]


@pytest.mark.parametrize("short", [0, 512])
def test_an_answer_of_one_token_joins_others_where_steps_are_recorded(
    tiny_policy, encode, make_task, monkeypatch, short
):
    """It is done at once, and has no place for another token."""
    monkeypatch.setattr(shelves, "SHORT", short)
    tiny_policy.model.eval()
    engine, _ = recording(tiny_policy, encode)
    batch = engine.open()
    batch.waiting += [
        DecodeJob(i, Request(prompt, i), SamplingParams(1, 30 if i else 1))
        for i, prompt in enumerate(prompts(encode, make_task, 6))
    ]
    found = {}
    while batch.busy:
        found |= {job.key: job.group for job in engine.step(batch)}
    assert sorted(found) == [*range(6)]


@pytest.mark.parametrize("short", [0, 512])
def test_steps_of_different_prompts_of_one_answer_each_are_recorded(tiny_policy, encode, make_task, monkeypatch, short):
    """Answers that are begun together fill their slots together, however long their prompts are."""
    monkeypatch.setattr(shelves, "SHORT", short)
    tiny_policy.model.eval()
    engine, replayed = recording(tiny_policy, encode)
    requests = [Request(prompt, i) for i, prompt in enumerate(prompts(encode, make_task, 32))]
    batch = engine.open()
    batch.waiting += [DecodeJob(i, one, SamplingParams(1, 200), ignores_stop=True) for i, one in enumerate(requests)]
    while batch.busy:
        engine.step(batch)
    assert len(replayed) >= 0.9 * engine.stats.decode_steps, f"{len(replayed)} of {engine.stats.decode_steps}"


def test_rows_of_other_prompts_are_in_order_beside_a_prompt_whose_answers_wait():
    batch = Batch([AttentionLayer()], torch.Generator().manual_seed(0))
    batch.join([([40], []), ([5], []), ([6], [])], 9, samples=2)
    batch.drop([0, 2, 3, 5])  # one answer to the long prompt, two to the second, one to the third
    lengths = [one.prompt.length for one in batch.cache.rows.kept if one.prompt is not None]
    live, park = ([row for row, n in enumerate(lengths) if (n == 5) == waits] for waits in (False, True))
    batch.reorder(batch.cache.drop(live, park))
    batch.step()
