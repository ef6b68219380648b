from __future__ import annotations

import base64
import contextlib
import importlib
import json
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image

from foveate.config.recipe import settings_of
from foveate.config.runs import RLSettings
from foveate.data.images import load_image
from foveate.environments import ENVIRONMENTS
from foveate.environments.build import build_environment, schema_of
from foveate.environments.calls import hermes_call
from foveate.environments.observe import encoded
from foveate.environments.pool import Environments
from foveate.environments.protocol import Environment, EnvironmentFailure, Opened, Step
from foveate.errors import ConfigError, DataError
from foveate.records import Message, Task
from foveate.registry import resolve
from foveate.train.algorithm import build_algorithm, check_run

TRL = '''
from PIL import Image

class Doors:
    """Three doors, as a class for TRL's environment_factory."""

    def reset(self, answer=None, **row):
        self.right, self.opened, self.row = int(answer), None, row
        return f"Row {row['width']}."

    def open_door(self, number: int) -> list:
        """Opens a door.

        Args:
            number: Which one.
        """
        self.opened = number
        return [{"type": "image", "image": Image.new("RGB", (8, 8))}, {"type": "text", "text": f"door {number}"}]

    async def wait(self) -> str:
        """Waits."""
        return "waited"

    def _private(self):
        return 1

    async def get_reward(self):
        return float(self.opened == self.right)

class Painted:
    """Its reset shows an image of which the row knows nothing."""

    def reset(self):
        return [{"type": "image", "image": Image.new("RGB", (20, 20), (255, 0, 0))}]

class Silent:
    def reset(self):
        pass

class NoReset:
    pass
'''

GYM = """
import numpy as np

class Walk:
    def __init__(self, goal=2):
        self.goal = goal

    def reset(self, seed=None):
        self.place = 0
        return np.zeros((6, 5, 3), np.uint8), {}

    def step(self, action):
        if action == "text":
            return "some text", 0.0, False, False, {}
        self.place += action
        shown = {"place": np.int64(self.place), "<image>": 1}
        return shown, float(self.place), self.place >= self.goal, False, {}

    def render(self):
        return np.full((4, 4, 3), 255, np.uint8)

    def close(self):
        pass

def words(text):
    return len(text.split())
"""

TASK = Task("t", "doors", (Message("user", "Find it."),), (), "2", {"width": 7}, "x.parquet, row 1")


def step_of(pool, key, answer):
    step = pool.step(key, answer).result(60)
    assert isinstance(step, Step), step
    return step


def begun(name, settings, task=TASK):
    pool = Environments(name, settings, workers=0)
    opened = pool.open(task, 5, "a").result(60)
    assert isinstance(opened, Opened), opened
    return pool, opened


# ----------------------------------------------------------------------------------------------------------------- TRL


@pytest.fixture
def doors(tmp_path):
    (tmp_path / "doors.py").write_text(TRL)
    return str(tmp_path / "doors.py")


def test_a_class_of_trl_is_an_environment(doors):
    pool, opened = begun("trl", {"factory": f"{doors}:Doors", "tools": ["calculator"]})
    assert [tool["function"]["name"] for tool in pool.tools] == ["calculator", "open_door", "wait"]
    assert opened.messages[0].content == "Find it.\nRow 7."
    step = step_of(pool, "a", hermes_call("open_door", {"number": 2}))
    assert step.messages[0].content == "<image>\nImage 1\ndoor 2"
    assert step_of(pool, "a", hermes_call("wait", {})).messages[0].content == "waited"
    last = step_of(pool, "a", "It is door 2.")
    assert (last.done, last.reward) == (True, 1.0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_answer_of_trl_that_a_limit_ends_has_the_reward_of_its_state(doors, workers):
    with Environments("trl", {"factory": f"{doors}:Doors", "max_turns": 1}, workers=workers) as pool:
        assert pool.has_last_reward
        rewards = []
        for number in (1, 2):
            pool.open(TASK, 0, number).result(60)
            step = step_of(pool, number, hermes_call("open_door", {"number": number}))
            assert (step.done, step.reward) == (True, None)
            rewards.append(pool.last_reward(number).result(60).reward)
            assert len(pool.state(number).answers) == 1
        assert rewards == [0.0, 1.0]


@pytest.mark.parametrize("number", [1, 2])
def test_images_that_reset_shows_are_numbered_behind_those_of_the_row(doors, number):
    row = replace(TASK, messages=(Message("user", "<image>\nLook."),), images=(encoded(Image.new("RGB", (20, 20))),))
    pool, opened = begun("trl", {"factory": f"{doors}:Painted", "tools": ["zoom"]}, row)
    assert len(opened.messages[0].images) == 2
    step = step_of(pool, "a", hermes_call("zoom", {"image": number, "box": [0, 0, 500, 500]}))
    assert step.messages[0].content == "<image>\nImage 3"
    assert load_image(step.messages[0].images[0]).getpixel((0, 0)) == ((0, 0, 0), (255, 0, 0))[number - 1]


def test_a_class_of_trl_without_a_reward_leaves_it_to_the_run(doors):
    pool, opened = begun("trl", {"factory": f"{doors}:Silent"})
    assert opened.messages[0].content == "Find it."
    assert step_of(pool, "a", "done").reward is None
    with pytest.raises(ConfigError, match="has no method reset"):
        Environments("trl", {"factory": f"{doors}:NoReset"}, workers=0)


# ----------------------------------------------------------------------------------------------------------- gymnasium


@pytest.fixture
def walk(tmp_path):
    (tmp_path / "walk.py").write_text(GYM)
    return str(tmp_path / "walk.py")


def test_an_environment_of_gymnasium_is_walked_by_actions(walk):
    pool, opened = begun("gymnasium", {"make": f"{walk}:Walk", "action": "integer", "settings": {"goal": 3}})
    assert opened.messages[0].content == "Find it.\n<image>"
    assert (opened.messages[0].images[0].width, opened.messages[0].images[0].height) == (5, 6)
    step = step_of(pool, "a", "<think>9</think>I go 1.")
    assert (step.reward, step.done) == (1.0, False)
    assert json.loads(step.messages[0].content.replace("\ufdd0image\ufdd1", "mark")) == {"place": 1, "mark": 1}
    wrong = step_of(pool, "a", "nowhere")
    assert "no whole number" in wrong.messages[0].content
    assert wrong.info["calls"] == [{"name": "action", "error": True}]
    last = step_of(pool, "a", "2")
    assert (last.reward, last.done, last.messages) == (3.0, True, ())


def test_the_steps_of_an_environment_of_gymnasium_are_its_reward_where_a_limit_ends_it(walk):
    settings = {"make": f"{walk}:Walk", "action": "integer", "settings": {"goal": 9}, "max_turns": 2}
    pool, _ = begun("gymnasium", settings)
    assert not pool.has_last_reward
    steps = [step_of(pool, "a", "1"), step_of(pool, "a", "1")]
    assert [step.reward for step in steps] == [1.0, 2.0]
    assert steps[-1].info["turn_limit"]


@pytest.mark.parametrize(
    ("action", "answer", "content"),
    [("text", " text ", "some text"), ("json", "so:\n1", '{"place": 1'), ("words", "a b", "")],
)
def test_an_answer_becomes_an_action_as_the_settings_say(walk, action, answer, content):
    form = f"{walk}:{action}" if action == "words" else action
    pool, _ = begun("gymnasium", {"make": f"{walk}:Walk", "action": form, "render": True})
    step = step_of(pool, "a", answer)
    if content:
        assert content in step.messages[0].content
        assert step.messages[0].images[0].width == 4
    else:
        assert step.done


@pytest.mark.parametrize("answer", [r'"\ud83d"', r'{"a": ["\udc00"]}', "[" * 100_000, "so"])
def test_an_action_is_json_of_whole_characters(walk, answer):
    pool, _ = begun("gymnasium", {"make": f"{walk}:Walk", "action": "json"})
    assert "its last line is no JSON" in step_of(pool, "a", answer).messages[0].content


GYMS = """
import numpy as np

class Space:
    def contains(self, action):
        return isinstance(action, int) and 0 <= action < 2

    def __str__(self):
        return "Discrete(2)"

class Room:
    action_space = Space()

    def __init__(self, what="picture"):
        self.what = what

    def reset(self, seed=None):
        return self.shown(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        if self.what == "old":
            return self.shown(), 1.0, False, {}
        return self.shown(), np.float32(0.5), np.bool_(False), np.bool_(self.what == "late"), {"info": object()}

    def shown(self):
        return {
            "picture": {"view": np.full((4, 6, 3), 9, np.uint8), "mission": "go", "place": np.array([1, 2])},
            "grey": np.full((4, 6, 1), 9, np.uint8), "alpha": {"a": np.full((4, 6, 4), 9, np.uint8)},
            "object": {"a": object()},
        }.get(self.what, "text")

    def close(self):
        pass
"""


@pytest.fixture
def room(tmp_path):
    (tmp_path / "room.py").write_text(GYMS)
    return lambda what: {"make": f"{tmp_path / 'room.py'}:Room", "action": "integer", "settings": {"what": what}}


@pytest.mark.parametrize(
    ("what", "content"),
    [("picture", '<image>\n{"mission": "go", "place": [1, 2]}'), ("grey", "<image>"), ("alpha", "<image>")],
)
def test_pictures_among_the_observations_of_gymnasium_are_images(room, what, content):
    pool, opened = begun("gymnasium", room(what))
    assert opened.messages[0].content == f"Find it.\n{content}"
    step = step_of(pool, "a", "1")
    assert (step.messages[0].content, step.reward) == (content, 0.5)
    assert (step.messages[0].images[0].width, step.messages[0].images[0].height) == (6, 4)


def test_an_action_that_is_none_of_the_space_is_told_to_the_model(room):
    pool, _ = begun("gymnasium", room("text"))
    step = step_of(pool, "a", "I go 7.")
    assert step.messages[0].content == "Error: the answer is no action: 7 is not one of Discrete(2)."
    assert step.info["calls"][0]["error"]
    assert step_of(pool, "a", "1").messages[0].content == "text"


def test_an_environment_of_gymnasium_that_truncates_is_done(room):
    pool, _ = begun("gymnasium", room("late"))
    step = step_of(pool, "a", "1")
    assert (step.done, step.reward, step.info.get("turn_limit")) == (True, 0.5, None)


@pytest.mark.parametrize(
    ("what", "answer", "message"),
    [
        ("old", "1", r"gymnasium: step returned 4 values; it must return \(observation, reward, terminated, truncated"),
        ("object", None, "gymnasium: reset returned a dict with an object in it; allowed: "),
    ],
)
def test_what_is_no_environment_of_gymnasium_ends_the_run_by_name(room, what, answer, message):
    with Environments("gymnasium", room(what), workers=0) as pool:
        opened = pool.open(TASK, 0, "a")
        with pytest.raises(DataError, match=message):
            (opened if answer is None else pool.step("a", answer)).result()


def test_an_id_needs_gymnasium(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match="run pip install gymnasium"):
        Environments("gymnasium", {"make": "CartPole-v1"}, workers=0)
    monkeypatch.setitem(sys.modules, "gymnasium", SimpleNamespace(make=lambda _id, **_: 1 / 0))
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="'CartPole-v1' cannot be made"):
        Environments("gymnasium", {"make": "CartPole-v1"}, workers=0)


# ---------------------------------------------------------------------------------------------------------------- HTTP


class _Server(BaseHTTPRequestHandler):
    replies: dict = {}  # noqa: RUF012 - set by each test
    asked: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        reply = self.replies.get(body["op"], {})
        status, text = reply if isinstance(reply, tuple) else (200, json.dumps(reply))
        if isinstance(text, bytes):  # all that is sent
            with contextlib.suppress(OSError):
                self.wfile.write(text)
            return
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:1/")
        data = text.encode()
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    running = HTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    _Server.replies, _Server.asked = {}, []
    yield f"http://127.0.0.1:{running.server_port}/env"
    running.shutdown()
    running.server_close()


PICTURE = base64.b64encode(encoded(Image.new("RGB", (6, 4))).data or b"").decode()


def test_a_server_is_an_environment(server):
    _Server.replies = {
        "reset": {"session": 9, "messages": [{"role": "user", "content": "Look.", "images": [PICTURE]}]},
        "step": {"messages": [{"role": "user", "content": "no <image>"}], "reward": 0.5, "info": {"seen": 1}},
    }
    pool, opened = begun("http", {"url": server})
    assert opened.messages[0].content == "<image>\nLook."
    assert opened.messages[0].images[0].width == 6
    step = step_of(pool, "a", "left")
    assert (step.messages[0].content, step.reward, step.done) == ("no \ufdd0image\ufdd1", 0.5, False)
    assert step.info == {"seen": 1}
    pool.close("a")
    assert [body["op"] for body in _Server.asked] == ["reset", "step", "close"]
    assert _Server.asked[0]["task"]["ground_truth"] == "2"
    assert _Server.asked[1] == {"op": "step", "session": 9, "answer": "left"}


@pytest.mark.parametrize(
    ("reply", "kind", "note"),
    [
        ((500, "broken"), "raised", "replied 500: broken"),
        ((302, ""), "raised", "replied 302"),
        ((200, "[1]"), "invalid", "it must be a JSON object"),
        ((200, "no json"), "invalid", "it must be a JSON object"),
        ({"messages": [{"role": "user", "content": "", "images": ["file:///x"]}]}, "invalid", "no valid base64"),
        ({"messages": [{"role": "user", "content": "", "images": ["AAAA"]}]}, "invalid", "not an image"),
        ({"messages": [{"role": "boss", "content": ""}]}, "invalid", "has the role 'boss'"),
        ({"messages": "hello"}, "invalid", "must be a list of"),
        ({"reward": "much"}, "invalid", "the reward of a step is 'much'"),
        ({"done": "yes"}, "invalid", "done or info of another type"),
        ({"rewards": 1.0}, "invalid", "replied with the unknown field 'rewards'; did you mean 'reward'?"),
        ((200, ""), "invalid", "replied to a step with none of messages, reward and done"),
        ((200, b"GARBAGE\r\n\r\n"), "raised", "does not answer: GARBAGE"),
        ((200, b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000), "raised", "does not answer: got more than 65536 bytes"),
        ((200, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "raised", "not answer: Incomplete"),
        ((200, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), "invalid", "it must be a JSON object"),
        ((200, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (2**25 + 1)), "invalid", "with more than 33,554,432 bytes"),
    ],
)  # fmt: skip
def test_a_bad_reply_costs_one_answer(server, reply, kind, note):
    _Server.replies = {"reset": {"messages": [{"role": "user", "content": "?"}]}, "step": reply}
    pool, _ = begun("http", {"url": server})
    failure = pool.step("a", "x").result(60)
    assert isinstance(failure, EnvironmentFailure)
    assert failure.kind == kind
    assert note in failure.note


def test_a_server_that_does_not_answer_costs_one_answer():
    with Environments("http", {"url": "http://127.0.0.1:1/", "timeout": 1.0}, workers=0) as pool:
        failure = pool.open(TASK, 0, "a").result()
        assert isinstance(failure, EnvironmentFailure)
        assert failure.note.startswith("ConnectionError: http://127.0.0.1:1/ does not answer")


def test_a_server_that_has_hung_is_not_waited_for_again_to_be_closed(server):
    release = threading.Event()

    class Hanging(dict):
        def get(self, name, default=None):
            if name == "step":
                release.wait(60)
            return super().get(name, default)

    _Server.replies = Hanging(reset={"session": 1, "messages": [{"role": "user", "content": "?"}]})
    pool, _ = begun("http", {"url": server, "timeout": 0.2})
    failure = pool.step("a", "x").result(60)
    release.set()
    assert "does not answer: timed out" in failure.note
    pool.close("a")
    assert [body["op"] for body in _Server.asked] == ["reset", "step"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "file:///etc/passwd"}, "must begin with http:// or https://"),
        ({"url": "http://x", "timeout": 0.0}, "timeout must be greater than 0"),
        ({}, "setting 'url' is missing"),
    ],
)
def test_an_address_is_refused_when_a_run_starts(settings, message):
    with pytest.raises(ConfigError, match=message):
        Environments("http", settings, workers=0)


# ----------------------------------------------------------------------------------------------------------- the table


def test_every_line_of_the_table_leads_to_an_environment_with_settings():
    for name, path in ENVIRONMENTS.items():
        found = resolve({}, path, "environment")
        assert (found.__doc__ or "").strip(), name
        assert schema_of(found) is not None


@pytest.fixture
def conforming(doors, walk, server):
    _Server.replies = {"reset": {"messages": [{"role": "user", "content": "?"}]}, "step": {"done": False}}
    return {
        "tools": {"tools": ["zoom", "calculator"]},
        "gui": {"side": 112},
        "trl": {"factory": f"{doors}:Doors"},
        "gymnasium": {"make": f"{walk}:Walk", "action": "integer"},
        "http": {"url": server},
    }


def test_every_environment_keeps_to_the_protocol(conforming):
    """The same prompt for the same seed, a reply to any text, a rebuilt one that shows the same, and nothing shared."""
    assert conforming.keys() == ENVIRONMENTS.keys()
    answers = [
        "",
        "1",
        "<tool_call>{}</tool_call>",
        hermes_call("click", {"x": 500, "y": 500}),
        "\ud83d\ude00",
        "<image>",
    ]
    for name, settings in conforming.items():
        make, _ = build_environment(name, settings)
        assert isinstance(make(), Environment)
        pool, opened = begun(name, settings)
        assert pool.open(TASK, 5, "b").result() == opened, name
        taken = 0
        for answer in answers:
            step = step_of(pool, "a", answer)
            taken += 1
            if step.done:
                break
        record = pool.state("a")
        assert len(record.answers) == taken
        json.dumps(record.state)
        assert isinstance(pool.restore(TASK, record, "c").result(), Opened), name
        assert pool.state("b").answers == ()
        for key in "abc":
            pool.close(key)
        assert not pool.failures, name


@pytest.mark.parametrize("reward", ["environment", "both"])
def test_rewards_of_an_environment_that_has_none_are_refused(reward):
    environment = {"name": "tools", "settings": {"tools": ["zoom"]}, "reward": reward}
    values = {"run": "r", "model.path": "demo", "data.train": ["a"], "steps": 1, "environment": environment}
    settings = settings_of(values, RLSettings)
    with pytest.raises(ConfigError, match=f"reward is {reward}, but the environment tools gives no rewards"):
        check_run(build_algorithm(settings.algorithm, settings.rollout.max_tokens), settings)


@pytest.mark.parametrize("reward", ["function", "environment", "both"])
def test_a_class_with_get_reward_beside_a_reward_function_needs_a_word_which_counts(doors, reward):
    def check(factory, **more):
        environment = {"name": "trl", "settings": {"factory": f"{doors}:{factory}"}, **more}
        values = {"run": "r", "model.path": "demo", "data.train": ["a"], "steps": 1, "environment": environment}
        settings = settings_of(values, RLSettings)
        check_run(build_algorithm(settings.algorithm, settings.rollout.max_tokens), settings)

    with pytest.raises(ConfigError, match=r"Doors has get_reward\(\), .*: set environment\.reward=environment, both"):
        check("Doors")
    check("Doors", reward=reward)
    check("Silent")
