"""Answers of several turns from servers and in process, and how they are kept."""

from __future__ import annotations

import asyncio
import json

import pytest
from toy import make_data
from worlds import HERE, with_short_turns

from foveate.config.rollout import EnvironmentSettings
from foveate.data.answers import AnswerTurn, GeneratedAnswer, GeneratedRow, ImageReference, row_line
from foveate.data.table import open_tasks
from foveate.environments.pool import Environments
from foveate.errors import DataError
from foveate.evaluate.client import messages_of
from foveate.evaluate.client_turns import converse
from foveate.evaluate.evaluate_models import EvalRequest, run_eval
from foveate.evaluate.generate import GenerateRequest, RowsRequest, run_generate
from foveate.evaluate.predictions import read_evaluations
from foveate.evaluate.shards import read_generated
from foveate.records import SamplingParams
from foveate.report.gallery import gallery_cards

CORNERS = EnvironmentSettings(name=f"{HERE}:Corners", workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_folder):
    return with_short_turns(tiny_folder, tmp_path_factory.mktemp("models") / "short")


def test_a_server_is_asked_for_each_turn_with_all_that_was_said_and_shown(data):
    task, asked = open_tasks(data / "test.parquet")[0], []

    async def ask(talk, number, left):
        asked.append((number, left, messages_of(talk, None, verbatim=True)))
        return GeneratedAnswer(f"turn {len(talk.messages)} <image>", "stop", 7)

    with Environments(CORNERS.name, {"rewards": True}, workers=0) as pool:
        answers = asyncio.run(converse(pool, task, 0, SamplingParams(2, 30), ask))
    assert len(answers) == 2
    for answer in answers:
        assert answer.tokens == 21
        assert [turn.role for turn in answer.turns] == ["assistant", "tool", "assistant", "tool", "assistant"]
        assert answer.turns[1] == AnswerTurn("tool", "corner 1", images=(ImageReference(None, 28, 28),))
        assert answer.text == answer.turns[-1].text == "turn 5 <image>"
        assert all(len(turn.calls) == 1 for turn in answer.turns if turn.role == "assistant")
    last = max(asked, key=lambda one: len(one[2]))
    assert last[1] == 16
    assert [message["role"] for message in last[2]] == ["user", "assistant", "user", "assistant", "user"]
    pictures = [part for message in last[2] for part in message["content"] if part == {**part, "type": "image_url"}]
    assert len(pictures) == 3
    assert "<tool_response>" in json.dumps(last[2][2])
    assert last[2][1]["content"] == "turn 1 <image>"


def test_an_environment_that_fails_refuses_its_row(data):
    async def ask(_talk, _number, _left):
        return GeneratedAnswer("abc", "stop", 1)

    task, refused = open_tasks(data / "test.parquet")[0], "environment: RuntimeError: no such corner"
    with Environments(CORNERS.name, {"fails_at": 1}, workers=0) as pool, pytest.raises(DataError, match=refused):
        asyncio.run(converse(pool, task, 0, SamplingParams(1, 30), ask))


def test_generate_and_eval_run_environments_in_process_and_the_gallery_shows_them(tmp_path, data, model):
    files = (str(data / "test.parquet"),)
    request = GenerateRequest(
        RowsRequest(files, rows=2), tmp_path / "out", SamplingParams(2, 200, 1.0), str(model), environment=CORNERS
    )
    assert run_generate(request)["answered"] == 2
    rows = [*read_generated(tmp_path / "out")]
    assert sum(len(answer.turns) > 2 for row in rows for answer in row.answers) > 1
    run_eval(EvalRequest((str(model),), files, tmp_path / "eval", max_tokens=200, rows=4, environment=CORNERS))
    [evaluation] = read_evaluations(tmp_path / "eval")
    talked = [row for row in evaluation.predictions if len(row.shown.turns) > 2]
    assert talked
    for card in gallery_cards(tmp_path / "eval", [row.id for row in talked], [evaluation]):
        [frame] = card.frames
        assert [turn.role for turn in frame.turns][:3] == ["assistant", "tool", "assistant"]
        assert frame.turns[1].pictures[0].startswith("data:image/jpeg;base64,")
        assert all(look[2:] == (500, 500) for look in frame.looks)


def test_a_line_of_an_answer_without_turns_is_as_before():
    row = GeneratedRow("a", "s", "w", "?", (), (), None, (GeneratedAnswer("b", "stop", 1),), 0, 1, 1, 0.1, 1, "x")
    assert b"turns" not in row_line(row)
