"""What holds for engines in server processes of any kind: nothing is lost or doubled when one dies or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from slow_cases import slow_but

from foveate.errors import EngineError
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.server.engine import ServedEngine
from foveate.rollout.server.process import PORT, Server, ServerLostError, meanwhile
from foveate.rollout.server.routes import routes

HERE = Path(__file__).parent.parent / "support"


class FakeEngine(ServedEngine):
    """Answers come from `fake_server.py`, later ones for larger seeds; `published` lists what was sent."""

    def __init__(self, servers=1, *, seconds=0.1, stall_s=5.0, command=None, shared=False):
        self.seconds, self.command = seconds, command or [sys.executable, str(HERE / "fake_server.py"), PORT]
        self.published, self.asked = [], []
        policy = SimpleNamespace(device=torch.device("cpu"))
        settings = {"servers": servers, "start_s": 60, "stall_s": stall_s, "shared": shared}
        super().__init__("fake", policy, lambda token_ids: f"{len(token_ids)} tokens", **settings)
        self.environment = {}
        self.start(7, [("w", torch.ones(2))])

    def connect(self, server):
        pass

    def send(self, server, version, weights):
        self.published.append((version, [name for name, _ in weights]))
        server.call("POST", "/publish", {"version": version})

    def ask(self, server, request, sampling):
        seconds = self.seconds * (1 + request.seed) if request.seed < 1000 else self.seconds
        answer = server.call("POST", "/generate", {"seconds": seconds, "seed": request.seed})
        if answer["finish"] not in self.finishes:
            raise ServerLostError("cut")
        if answer["finish"] == "abort":
            made = answer["tokens"]
            answer = Answer.sampled((-1,) * made, (-0.5,) * made, "", "abort", answer["version"])
        else:
            answer = Answer.sampled((request.seed,), (0.0,), "", "stop", answer["version"])
        self.asked.append((request, sampling))
        return (answer,) * sampling.samples

    def abort(self, server):
        server.call("POST", "/abort", {})

    def tokens_made(self, server):
        return server.call("GET", "/state", timeout_s=1)["tokens"]

    def tokens_cached(self, _server):
        return 0.0

    def state(self, number=0):
        return self.servers[number].call("GET", "/state")

    def read(self, _server, prompt):
        return prompt.token_ids

    def sleep_server(self, server):
        server.call("POST", "/sleep", {})

    def wake_server(self, server, what):
        server.call("POST", "/wake", {"what": what})


@pytest.fixture
def engine_of():
    engines = []

    def make(*args, **settings):
        engines.append(FakeEngine(*args, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def requests_of(count):
    return [Request(Prompt((i, i), (), None, (i, i)), seed=i) for i in range(count)]


def ends(pid):
    """Whether a process is gone soon, or waits for a parent to ask how it ended."""
    for _ in range(400):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def seeds_of(groups):
    return [group[0].token_ids[0] for group in groups]


def test_every_group_comes_once_and_in_order(engine_of):
    groups = engine_of(2).generate(requests_of(20), SamplingParams(3))
    assert seeds_of(groups) == list(range(20))
    assert {len(group) for group in groups} == {3}
    assert {answer.version for group in groups for answer in group} == {7}


@pytest.mark.parametrize("moment", slow_but((0, 4), [0, 1, 4, 9]))
def test_a_server_that_is_killed_is_started_again_and_no_group_is_lost_or_doubled(engine_of, moment):
    engine = engine_of(2)
    engine.publish(8, [("w", torch.ones(2))])
    requests = requests_of(12)
    last = routes([request.prompt for request in requests], 2)[11]
    server = engine.state(last)["pid"]
    found = []
    if moment == 0:
        os.kill(server, signal.SIGKILL)
    for index, group in engine.stream(requests, SamplingParams()):
        found.append((index, group[0].token_ids[0], group[0].version))
        if len(found) == moment:
            os.kill(server, signal.SIGKILL)
    assert sorted(found) == [(i, i, 8) for i in range(12)]
    assert engine.healthy()
    assert engine.counts.restarts == 1
    assert engine.published[-1] == (8, ["w"])


def test_a_server_that_hangs_is_killed_and_started_again(engine_of):
    engine = engine_of(seconds=0.3, stall_s=1.0)
    engine.servers[0].call("POST", "/hang", {})
    assert seeds_of(engine.generate(requests_of(3), SamplingParams())) == [0, 1, 2]
    assert engine.counts.restarts == 1


def test_a_server_that_is_stopped_by_the_system_is_killed_and_started_again(engine_of):
    engine = engine_of(seconds=0.3, stall_s=1.0)
    os.kill(engine.state()["pid"], signal.SIGSTOP)
    assert seeds_of(engine.generate(requests_of(2), SamplingParams())) == [0, 1]
    assert engine.counts.restarts == 1


def test_slow_answers_are_no_reason_to_kill_while_tokens_are_made(engine_of):
    engine = engine_of(seconds=2.5, stall_s=0.8)
    assert seeds_of(engine.generate(requests_of(1), SamplingParams())) == [0]
    assert engine.counts.restarts == 0


def test_a_server_that_dies_while_weights_are_published_gets_them_at_its_start(engine_of):
    engine = engine_of()
    os.kill(engine.state()["pid"], signal.SIGKILL)
    engine.publish(9, [("w", torch.ones(2))])
    assert engine.state()["version"] == 9
    assert engine.generate(requests_of(1), SamplingParams())[0][0].version == 9


def test_a_server_that_refuses_a_transfer_is_ended_so_that_its_sender_does_not_wait(engine_of):
    server = engine_of().servers[0]

    def transfer():
        with meanwhile(server, "/no-such-path", {}, 30):
            while server.healthy():
                time.sleep(0.05)
            raise RuntimeError("the connection is closed")

    with pytest.raises(ServerLostError, match="/no-such-path: Remote"):
        transfer()


def test_closing_the_stream_aborts_what_is_unfinished(engine_of):
    engine = engine_of(seconds=0.1)
    stream = engine.stream(requests_of(2), SamplingParams())
    next(stream)
    engine.seconds = 60
    stream.close()
    started = time.monotonic()
    slow = engine.stream(requests_of(1), SamplingParams())
    engine._pool.submit(time.sleep, 0).result()
    slow.close()
    assert time.monotonic() - started < 30
    engine.seconds = 0.01
    assert seeds_of(engine.generate(requests_of(3), SamplingParams())) == [0, 1, 2]


def paused_after(engine, requests, sampling, groups):
    """What a stream gives that is paused when some groups have come."""
    found = {}
    for index, group in engine.stream(requests, sampling):
        found[index] = group
        engine.seconds = 0.01
        if len(found) == groups:
            engine.pause()
    engine.resume()
    return found


def test_a_pause_gives_what_is_unfinished_and_it_goes_on_under_new_weights(engine_of):
    engine, sampling = engine_of(2), SamplingParams(2, 50_000)
    requests = [replace(request, seed=i and 600 + i) for i, request in enumerate(requests_of(4))]
    found = paused_after(engine, requests, sampling, 1)
    assert [group[0].finish for _, group in sorted(found.items())] == ["stop", "abort", "abort", "abort"]
    engine.publish(8, [("w", torch.ones(2))])
    engine.asked.clear()
    again = [replace(request, partial_answers=found[i]) for i, request in enumerate(requests)]
    groups = engine.generate(again, sampling)
    assert groups[0] == found[0]
    assert len(engine.asked) == 6
    for request, group in zip(again[1:], groups[1:], strict=True):
        for before, after in zip(request.partial_answers, group, strict=True):
            made = len(before.token_ids)
            assert after.token_ids[:-1] == before.token_ids
            assert after.logprobs.tolist() == [*before.logprobs.tolist(), 0.0]
            assert (after.finish, after.version, after.text) == ("stop", 7, f"{made + 1} tokens")
            assert after.versions == ((7, made), (8, 1))
            asked = [(r.prompt.token_ids, r.prompt.engine_ids, s) for r, s in engine.asked]
            longer = request.prompt.token_ids + before.token_ids
            assert (longer, longer, SamplingParams(1, 50_000 - made)) in asked
    assert len({request.seed for request, _ in engine.asked}) == 6
    assert engine.counts.restarts == 0


def test_answers_of_a_group_that_were_finished_stay_when_the_others_go_on(engine_of):
    engine = engine_of(seconds=0.01)
    done, open_ = Answer.sampled((5, 6), (-1.0, -2.0), "", "stop", 3), Answer.sampled((5,), (-1.0,), "", "abort", 4)
    request = replace(requests_of(1)[0], partial_answers=(done, open_, done))
    [(first, second, third)] = engine.generate([request], SamplingParams(3, 10))
    assert (first, third) == (done, done)
    assert (second.finish, second.version, second.versions) == ("stop", 4, ((4, 1), (7, 1)))
    assert len(engine.asked) == 1


def test_a_server_that_dies_while_answers_go_on_answers_them_again_from_the_same_tokens(engine_of):
    engine = engine_of(seconds=60)
    open_ = Answer.sampled((5,), (-1.0,), "", "abort", 4)
    requests = [replace(requests_of(1)[0], partial_answers=(open_, open_))]
    with ThreadPoolExecutor(1) as pool:
        groups = pool.submit(engine.generate, requests, SamplingParams(2, 10))
        while engine.state()["asked"] < 2:
            time.sleep(0.01)
        engine.seconds = 0.01
        os.kill(engine.state()["pid"], signal.SIGKILL)
        [group] = groups.result()
    assert [answer.versions for answer in group] == [((4, 1), (7, 1))] * 2
    assert engine.counts.restarts == 1


def test_an_engine_that_is_paused_begins_nothing(engine_of):
    engine = engine_of()
    engine.pause()
    assert [*engine.stream(requests_of(3), SamplingParams())] == []
    engine.resume()
    assert len(engine.generate(requests_of(3), SamplingParams())) == 3


def test_a_server_that_never_answers_ends_the_run_with_its_log(engine_of):
    with pytest.raises(
        EngineError, match=r"(?s)the server ended with code 1 while it started; the end of .*\.log:\nno model here"
    ):
        engine_of(command=[sys.executable, "-c", "raise SystemExit('no model here')"])


def test_a_server_that_dies_again_and_again_ends_the_run(engine_of):
    engine = engine_of()
    engine.ask = lambda *_: (_ for _ in ()).throw(ServerLostError("broken"))
    with pytest.raises(EngineError, match="lost 3 times without a finished group between"):
        engine.generate(requests_of(1), SamplingParams())


def test_a_server_that_does_not_start_again_at_once_is_tried_once_more(engine_of, monkeypatch):
    engine = engine_of()
    start, tried = Server.start, []

    def failing(server, patience_s):
        tried.append(1)
        if len(tried) == 1:
            server.kill()
            server.starts += 1
            raise EngineError("the server ended while it started")
        start(server, patience_s)

    monkeypatch.setattr(Server, "start", failing)
    os.kill(engine.state()["pid"], signal.SIGKILL)
    assert seeds_of(engine.generate(requests_of(2), SamplingParams())) == [0, 1]
    assert len(tried) == 2


def test_a_server_that_is_lost_between_answers_reads_prompts_again(engine_of):
    engine = engine_of()
    read = engine.read
    engine.read = lambda server, prompt: (server.call("GET", "/state"), read(server, prompt))[1]
    os.kill(engine.state()["pid"], signal.SIGKILL)
    assert engine.prompt_ids(requests_of(1)[0].prompt) == (0, 0)
    assert engine.counts.restarts == 1


def test_a_server_that_does_not_stop_when_it_is_told_is_killed(engine_of):
    engine = engine_of(seconds=60, stall_s=1.0)
    engine.abort = lambda _: None  # it says that it has
    pid = engine.state()["pid"]
    with ThreadPoolExecutor(1) as pool:
        groups = pool.submit(engine.generate, requests_of(2), SamplingParams())
        while engine.state()["asked"] < 2:
            time.sleep(0.01)
        engine.pause()
        with pytest.raises(KeyError):  # nothing has come of any
            groups.result(timeout=60)
    assert ends(pid)


def test_a_refused_request_ends_the_run_and_nothing_is_started_again(engine_of):
    engine = engine_of()
    engine.ask = lambda *_: (_ for _ in ()).throw(EngineError("the server refused /generate (status 400): too long"))
    with pytest.raises(EngineError, match="too long"):
        engine.generate(requests_of(1), SamplingParams())
    assert engine.counts.restarts == 0


def test_equal_prompts_go_to_the_same_server_and_no_server_gets_much_more_than_its_share():
    prompts = [Prompt(tuple(range(i, i + 50)), (), None, ()) for i in range(40)]
    assert abs(sum(routes(prompts, 2)) - 20) <= 6
    assert routes(prompts[:1] * 2, 2)[0] == routes(prompts[:1], 2)[0]
    assert max(routes(prompts[:1] * 9, 2).count(number) for number in (0, 1)) <= 7


def test_closing_ends_the_servers_and_may_be_done_twice(engine_of):
    engine = engine_of()
    pid = engine.state()["pid"]
    engine.close()
    engine.close()
    assert ends(pid)
    assert not engine.folder.exists()


@pytest.mark.slow
def test_a_trainer_that_is_killed_leaves_no_server_behind():
    code = f"""
import sys, time
sys.path[:0] = [{str(HERE)!r}, {str(Path(__file__).parent)!r}]
from test_server_engine import FakeEngine
engine = FakeEngine()
print(engine.state()["pid"], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        server = int(trainer.stdout.readline())
        trainer.kill()
    assert ends(server)


def test_a_server_that_shares_a_device_gives_its_memory_back_until_the_next_publish(engine_of):
    engine = engine_of(shared=True)
    engine.generate(requests_of(2), SamplingParams())
    for version in (8, 9):
        engine.sleep()
        engine.sleep()
        engine.publish(version, [("w", torch.ones(2))])
        assert engine.generate(requests_of(1), SamplingParams())[0][0].version == version
    assert engine.state()["memory"] == ["publish", *["sleep", "weights", "publish", "kv_cache"] * 2]


def test_a_server_with_a_device_of_its_own_does_not_sleep(engine_of):
    engine = engine_of(2)
    engine.sleep()
    assert engine.generate(requests_of(2), SamplingParams())
    engine.publish(8, [("w", torch.ones(2))])
    assert engine.state()["memory"] == ["publish", "publish"]


def test_a_server_that_dies_while_it_should_sleep_is_started_with_the_next_weights(engine_of, caplog):
    engine = engine_of(shared=True)
    os.kill(engine.state()["pid"], signal.SIGKILL)
    engine.sleep()
    assert "does not give its memory back" in caplog.text
    engine.publish(8, [("w", torch.ones(2))])
    assert engine.generate(requests_of(3), SamplingParams())[2][0].version == 8
    assert engine.state()["memory"] == ["publish"]
    engine.sleep()
    os.kill(engine.state()["pid"], signal.SIGKILL)
    engine.publish(9, [("w", torch.ones(2))])
    assert engine.generate(requests_of(3), SamplingParams())[2][0].version == 9
    assert engine.counts.restarts == 2
