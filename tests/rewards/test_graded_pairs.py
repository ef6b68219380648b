"""Answers that two readings labelled right or wrong before any grader saw them: `data/graded_pairs.jsonl`."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest

from foveate.records import Image, Message, Task
from foveate.rewards.build import build_reward
from foveate.rewards.math import same_answer

DATA = Path(__file__).parent.parent / "data"


def pairs_of(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


PAIRS = pairs_of("graded_pairs.jsonl")
FRESH = pairs_of("fresh_pairs.jsonl")
"""Further pairs, labelled by one reader in search of disagreements."""
KINDS = sorted({pair["kind"] for pair in PAIRS})


def is_right(pair):
    images = (Image(None, b"", 1000, 1000),) if pair["reward"] == "grounding" else ()
    asked = (Message("user", pair.get("question", "")),)
    task = Task("t", "s", asked, images, pair["truth"], pair.get("meta", {}), "row 0")
    score = build_reward(pair["reward"], pair.get("settings", {}))(pair["text"], task)
    return score.parts.get("hit", score.value) == 1.0


def test_there_are_enough_pairs_of_every_kind_and_both_labels():
    assert len(PAIRS) > 450
    for kind in KINDS:
        labels = [pair["right"] for pair in PAIRS if pair["kind"] == kind]
        assert len(labels) >= 20
        assert 0.2 < sum(labels) / len(labels) < 0.95, kind


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_graded_as_two_readers_did(kind):
    pairs = [pair for pair in PAIRS if pair["kind"] == kind]
    wrong = [pair for pair in pairs if is_right(pair) is not pair["right"]]
    assert len(wrong) <= 0.03 * len(pairs), wrong


@pytest.mark.parametrize("kind", ["boxes", "choices", "math"])
def test_fresh_answers_of_these_kinds_are_graded_right(kind):
    pairs = [pair for pair in FRESH if pair["kind"] == kind]
    wrong = [pair for pair in pairs if is_right(pair) is not pair["right"]]
    assert len(wrong) <= 0.03 * len(pairs), wrong


NAMES = [
    "SAS",
    "AAS",
    "ABCD",
    "PQR",
    "HL",
    r"\overrightarrow{XY}",
    r"\triangle ABC",
    "stop",
    "tea",
    "star",
    "now",
    "god",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_other_order_of_the_letters_of_a_name_or_word_is_right(name):
    *mark, letters = name.replace("}", "").replace("{", " ").split()
    dress = (lambda word: rf"{mark[0]}{{{word}}}") if mark else (lambda word: word)
    assert same_answer(dress(letters), name)
    for order in {"".join(one) for one in permutations(letters)} - {letters}:
        assert not same_answer(dress(order), name), order
