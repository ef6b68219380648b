"""Answers of several turns from servers and in process, and how they are kept."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from fake_run import a_row
from toy import make_data
from worlds import HERE, with_short_turns

from foveate.cli.options import environment_of
from foveate.config.rollout import EnvironmentSettings
from foveate.data.answers import AnswerTurn, GeneratedAnswer, GeneratedRow, ImageReference, row_line
from foveate.data.images import load_image
from foveate.data.table import open_tasks
from foveate.environments.pool import Environments
from foveate.environments.turns import Turn
from foveate.errors import ConfigError, DataError
from foveate.evaluate.client import messages_of
from foveate.evaluate.client_turns import converse
from foveate.evaluate.draw import save_thumbnail
from foveate.evaluate.evaluate_models import EvalRequest, run_eval
from foveate.evaluate.generate import GenerateRequest, RowsRequest, run_generate
from foveate.evaluate.predictions import read_evaluations, thumbnail_path, write_evaluation, write_gallery
from foveate.evaluate.shards import read_generated
from foveate.evaluate.turns import kept_turns, place_to_look, turn_metrics
from foveate.records import SamplingParams
from foveate.report.gallery import gallery_cards
from foveate.report.page import write_report

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
        begun, answers = asyncio.run(converse(pool, task, 0, SamplingParams(2, 30), ask))
    assert begun.messages == task.messages
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
    assert json.dumps(last[2]).count('"type": "image_url"') == 3
    assert "<tool_response>" in json.dumps(last[2][2])
    assert last[2][1]["content"] == "turn 1 <image>"


def test_an_environment_that_fails_refuses_its_row(data):
    async def ask(_talk, _number, _left):
        return GeneratedAnswer("abc", "stop", 1)

    task, refused = open_tasks(data / "test.parquet")[0], "environment: RuntimeError: no such corner"
    with Environments(CORNERS.name, {"fails_at": 1}, workers=0) as pool, pytest.raises(DataError, match=refused):
        asyncio.run(converse(pool, task, 0, SamplingParams(1, 30), ask))


@pytest.mark.parametrize(("finish", "reward"), [("length", 7.0), ("stop", 7.0)])
def test_an_answer_of_a_server_that_a_limit_ends_has_its_environments_last_reward(tmp_path, data, finish, reward):
    (tmp_path / "ending.py").write_text(
        "from foveate.environments import Environment, Step\n"
        "from foveate.environments.observe import task_messages\n"
        "class Ending(Environment):\n"
        "    def reset(self, task, seed):\n        return task_messages(task)\n"
        "    def step(self, answer):\n        return Step()\n"
        "    def last_reward(self):\n        return 7\n"
    )

    async def ask(_talk, _number, _left):
        return GeneratedAnswer("abc", finish, 1)

    task = open_tasks(data / "test.parquet")[0]
    with Environments(f"{tmp_path / 'ending.py'}:Ending", {"max_turns": 1}, workers=0) as pool:
        _, [answer] = asyncio.run(converse(pool, task, 0, SamplingParams(1, 30), ask))
    assert answer.turns[-1].reward == reward


def test_what_is_kept_of_an_answer_is_the_prompt_that_its_environment_began_with(tmp_path, data, model):
    environment = EnvironmentSettings(name=f"{HERE}:Drawn", workers=0, reward="environment")
    files = (str(data / "test.parquet"),)

    async def ask(_talk, _number, _left):
        return GeneratedAnswer("abc", "stop", 1)

    task = open_tasks(files[0])[0]
    with Environments(environment.name, {}, workers=0) as pool:
        begun, _ = asyncio.run(converse(pool, task, 3, SamplingParams(2, 30), ask))
    assert [message.content for message in begun.messages] == ["Be brief.", "<image>\nwhat is 3?"]
    request = GenerateRequest(
        RowsRequest(files, rows=2), tmp_path / "out", SamplingParams(1, 20, 1.0), str(model), environment=environment
    )
    run_generate(request)
    asked = EvalRequest(
        (str(model),), files, tmp_path / "eval", samples=1, max_tokens=20, rows=2, environment=environment
    )
    run_eval(asked)
    [evaluation] = read_evaluations(tmp_path / "eval")
    for row in (*read_generated(tmp_path / "out"), *evaluation.predictions):
        assert row.prompt[0]["content"] == "Be brief."
        assert row.prompt[1]["content"].startswith("<image>\nwhat is ")


def test_generate_and_eval_run_environments_in_process(tmp_path, data, model):
    files = (str(data / "test.parquet"),)
    request = GenerateRequest(
        RowsRequest(files, rows=2), tmp_path / "out", SamplingParams(2, 200, 1.0), str(model), environment=CORNERS
    )
    assert run_generate(request)["answered"] == 2
    rows = [*read_generated(tmp_path / "out")]
    assert sum(len(answer.turns) > 2 for row in rows for answer in row.answers) > 0
    asked = EvalRequest((str(model),), files, tmp_path / "eval", samples=2, max_tokens=200, rows=2, environment=CORNERS)
    run_eval(asked)
    [evaluation] = read_evaluations(tmp_path / "eval")
    assert sum(len(answer.turns) > 2 for row in evaluation.predictions for answer in row.answers) > 0


def test_the_gallery_shows_the_conversation_and_where_it_looked(tmp_path, make_image):
    call = {"name": "zoom", "error": False, "image": 1, "box": (500, 500, 750, 1000)}
    other = [{**call, "image": 2}, {**call, "error": True}, {"name": "calculator", "error": False}]
    turns = [
        Turn("assistant", "<think>hm</think>closer", tokens=5, reward=0.5, calls=(call,)),
        Turn("tool", "<image>\nImage 2", (make_image(40, 30),)),
        Turn("assistant", "a box", tokens=3, calls=tuple(other)),
    ]
    answer = replace(a_row().shown, turns=kept_turns(turns, tmp_path))
    evil = replace(answer.turns[1], images=(ImageReference("../../secret.jpg", 1, 1),))
    rows = a_row("a"), a_row("b")
    rows = (
        replace(rows[0], answers=(answer,), look_box=(0, 0, 250, 500)),
        replace(rows[1], answers=(replace(answer, turns=(evil,)),)),
    )
    write_evaluation(tmp_path, 0, rows)
    [good, bad] = gallery_cards(tmp_path, ["a", "b"], read_evaluations(tmp_path))
    [first, second, third] = good.frames[0].turns
    assert (first.thought, first.said, first.calls, first.reward) == ("hm", "closer", (("zoom", False),), 0.5)
    assert second.said == "Image 2"
    assert second.pictures[0].startswith("data:image/jpeg;base64,")
    assert third.calls == (("zoom", False), ("zoom", True), ("calculator", False))
    assert good.frames[0].looks == ((500, 500, 250, 500),)
    assert row_line(rows[0]).count(b'"look_box": [0.0, 0.0, 250.0, 500.0]') == 1
    assert bad.frames[0].turns[0].pictures == ()
    write_gallery(tmp_path, ["a", "b"])
    save_thumbnail(load_image(make_image(40, 30), ""), thumbnail_path(tmp_path, "a"))
    page = write_report(tmp_path).read_text()
    assert page.count('class="talk"') == 1
    assert '<rect class="look"' in page
    assert "place to look at" not in page  # the row has a true box of its own
    read = [replace(row, answers=(replace(row.shown, parts={"accuracy": 1.0}),)) for row in rows]
    write_evaluation(tmp_path, 0, read)
    [good, bad] = gallery_cards(tmp_path, ["a", "b"], read_evaluations(tmp_path))
    assert (good.true_box, bad.true_box) == ((0, 0, 250, 500), None)
    assert "place to look at" in write_report(tmp_path).read_text()


def test_looks_are_compared_with_the_place_that_the_task_names(make_task):
    call = {"name": "zoom", "error": False, "image": 1, "box": [0, 0, 500, 1000]}
    other = [{**call, "image": 2}, {**call, "error": True}, {"name": "calculator", "error": False}]
    talks = [
        (Turn("assistant", "a", calls=(call, *other)),),
        (Turn("assistant", "b"),),
        (Turn("assistant", "c", calls=(call,)),),
    ]
    assert turn_metrics(talks)["tool/zoom"] == 4 / 3
    assert "tool/iou" not in turn_metrics(talks)
    assert turn_metrics(talks, [(0.0, 0.0, 1000.0, 1000.0), None, None])["tool/iou"] == 0.5
    assert turn_metrics(talks, [(0.0, 0.0, 500.0, 1000.0), None, (500.0, 0.0, 1000.0, 1000.0)])["tool/iou"] == 0.5
    task = replace(make_task("?"), meta={"look_box": [1, 2, 3, 4]})
    assert place_to_look(task) == (1.0, 2.0, 3.0, 4.0)
    for odd in (None, "1,2,3,4", [1, 2, 3], [1, 2, 3, "4"]):
        assert place_to_look(replace(task, meta={"look_box": odd})) is None


def test_a_line_of_an_answer_without_turns_is_as_before():
    row = GeneratedRow("a", "s", "w", "?", (), (), None, (GeneratedAnswer("b", "stop", 1),), 0, 1, 1, 0.1, 1, "x")
    assert b"turns" not in row_line(row)


def test_an_environment_is_named_on_the_command_line_with_its_settings():
    assert environment_of(None) is None
    assert environment_of("tools") == EnvironmentSettings(name="tools")
    settings = environment_of("{name: tools, settings: {tools: [zoom]}, reward: both}")
    assert (settings.settings, settings.reward) == ({"tools": ["zoom"]}, "both")
    with pytest.raises(ConfigError, match=r"^--environment .*: turns: Extra inputs"):
        environment_of("{name: tools, turns: 3}")


def test_a_tool_whose_name_is_that_of_a_metric_does_not_take_its_place():
    calls = ({"name": "calls", "error": False}, {"name": "errors", "error": True}, {"name": 7, "error": False})
    found = turn_metrics([[Turn("assistant", "x", calls=calls)]])
    assert (found["tool/calls"], found["tool/errors"], found["tool/7"]) == (3, 1, 1)
