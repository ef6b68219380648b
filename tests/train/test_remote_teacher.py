"""A teacher behind a server: asked in vLLM's words, tokens in and log-probs out, it teaches what it teaches in process.

The server is a thread of this process; `tests/rollout/test_engine_conformance.py` asks a real one."""

from __future__ import annotations

import json
import threading
from base64 import b64decode
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
import torch
from msgspec import msgpack
from quiet_server import QuietServer
from test_distillation import algorithm_of, data, groups, refusal, settings_of, teachers, worker_of  # noqa: F401

from foveate.cluster.local import LocalWorkers
from foveate.config.algorithm import TeacherSettings
from foveate.config.model import ModelSettings
from foveate.config.train import OptimSettings
from foveate.errors import ConfigError, EngineError
from foveate.models.forward import hidden_states
from foveate.models.policy import load_policy
from foveate.parallel.balance import Costs
from foveate.parallel.packing import pack
from foveate.records import Answer, ImageSlot, PackedGroup, Prompt, Segment
from foveate.train.remote_teacher import RemoteTeacher
from foveate.train.update import compute_advantages
from foveate.train.worker import Worker


class Handler(BaseHTTPRequestHandler):
    """Two routes of vLLM, for the policy of the server."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        found = self.text if self.path == "/detokenize" else self.logprobs
        said = {} if self.server.fails else found(asked)
        body = (json.dumps(said) if self.server.garble is None else self.server.garble(said)).encode()
        self.send_response(503 if self.server.fails else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def text(self, asked):
        return {"prompt": self.server.policy.tokenizer.decode(asked["tokens"], skip_special_tokens=False)}

    def logprobs(self, asked):
        assert asked["sampling_params"]["prompt_logprobs"] == 0
        ids, pixels, slots = tuple(asked["token_ids"]), None, ()
        if "features" in asked:
            items = [msgpack.decode(b64decode(item)) for item in asked["features"]["kwargs_data"]["image"]]
            tiles = [tiles_of(item) for item in items]
            places = asked["features"]["mm_placeholders"]["image"]
            assert len(set(asked["features"]["mm_hashes"]["image"])) == len(tiles)
            slots = tuple(ImageSlot(at["offset"], at["length"], len(t)) for at, t in zip(places, tiles, strict=True))
            pixels = torch.cat(tiles)
        policy = self.server.policy
        batch = pack([PackedGroup.of_tokens(Prompt(ids, slots, pixels, ids), [(0,)])])
        with torch.no_grad():
            logits = hidden_states(policy, batch)[: len(ids) - 1] @ policy.part("head").weight.T
        logp = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        entries = [{str(token): {"logprob": value}} for token, value in zip(ids[1:], logp, strict=True)]
        return {"prompt_logprobs": [None, *entries], "choices": []}

    def log_message(self, *_):
        pass


def tiles_of(item):
    dtype, shape, raw = max((value["data"] for value in item.values()), key=lambda one: len(one[2].data))
    return torch.frombuffer(bytearray(raw.data), dtype=getattr(torch, dtype)).reshape(shape)


@pytest.fixture
def serve():
    servers = []

    def start(folder):
        server = QuietServer(("127.0.0.1", 0), Handler)
        server.policy, server.asked, server.fails, server.garble = load_policy(str(folder)), [], False, None
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def advantages(folder, groups, **teacher):  # noqa: F811
    algorithm = algorithm_of(term="advantage", **teacher)
    model, optim = ModelSettings(path=str(folder)), OptimSettings(lr=1.0)
    worker = Worker(model, optim, 4096, teacher=algorithm.teacher)
    batch, metrics = compute_advantages(LocalWorkers(worker), groups, algorithm, 1, Costs(0.01, 2.0))
    return [row.advantage for row in batch.policy_rows.values()], metrics["reward/teacher_kl"]


def with_an_image_in_an_answer(group):
    """The group with a first answer of three segments: sampled, a picture that it has observed, sampled."""
    slot, tiles = group.prompt.slots[0], group.prompt.pixels.flip(0) * 0.5
    placeholder = group.prompt.token_ids[slot.position]
    seen = np.array([7, *[placeholder] * slot.count, 8])
    segments = (
        group.answers[0].segments[0],
        Segment(seen, seen, np.zeros(0, np.float32), False, (replace(slot, position=1),), tiles),
        Segment.sampled((5, 6, 9), (-1.0,) * 3, 0),
    )
    return replace(group, answers=(Answer(segments, "", "stop"), *group.answers[1:]))


def test_a_teacher_behind_a_server_teaches_what_it_teaches_in_process(tiny_folder, teachers, groups, serve):  # noqa: F811
    groups = [with_an_image_in_an_answer(groups[0]), *groups[1:]]
    server = serve(teachers[1])
    found, kl = advantages(tiny_folder, groups, path=teachers[0], sources={"geometry": server.url})
    wanted, wanted_kl = advantages(tiny_folder, groups, path=teachers[0], sources={"geometry": teachers[1]})
    other, _ = advantages(tiny_folder, groups, path=serve(teachers[0]).url, sources={"geometry": teachers[1]})
    assert len(server.asked) == len(groups[2].answers)
    for one in (found, other):
        for advantage, right in zip(one, wanted, strict=True):
            torch.testing.assert_close(advantage, right, rtol=1e-4, atol=1e-5)
    assert kl == pytest.approx(wanted_kl, rel=1e-5)


def test_what_a_server_cannot_teach_is_refused(tmp_path, tiny_folder, teachers, data, groups, serve):  # noqa: F811
    server = serve(teachers[0])
    with pytest.raises(
        ValueError, match=r"algorithm.teacher.term is loss, but http.* tells log-probs of sampled tokens"
    ):
        TeacherSettings(path=server.url)

    def said(url, temperature=1.0):
        settings = settings_of(tmp_path / "run", tiny_folder, data, teachers[0], rollout={"temperature": temperature})
        teacher = TeacherSettings(path=url, term="advantage")
        algorithm = settings.algorithm.model_copy(update={"teacher": teacher})
        return refusal(settings.model_copy(update={"algorithm": algorithm}))

    assert "rollout.temperature is 0.7, but the log-probs of the teacher at http" in said(server.url, 0.7)
    assert "does not answer" in said("http://127.0.0.1:9")
    server.fails = True
    assert "replied 503" in said(server.url)
    family, group = server.policy.family, PackedGroup(groups[0].prompt, groups[0].answers)
    with pytest.raises(EngineError, match="replied 503"):
        RemoteTeacher(server.url, family, torch.float32, patience=0).logprobs([group])
    server.fails, own = False, load_policy(str(tiny_folder)).tokenizer
    server.policy.tokenizer.add_tokens(["<another>"])
    RemoteTeacher(server.url, family, torch.float32, patience=0).check(own)
    own.add_tokens(["<one more>"])
    with pytest.raises(ConfigError, match=r"the tokenizer of http://.* is another than the model's"):
        RemoteTeacher(server.url, family, torch.float32, patience=0).check(own)


def with_logprob(value):
    def garble(said):
        return json.dumps(
            {"prompt_logprobs": [one and {k: {"logprob": value} for k in one} for one in said["prompt_logprobs"]]}
        )

    return garble


@pytest.mark.parametrize(
    ("garble", "said"),
    [
        (with_logprob(None), "gave None as a log-prob"),
        (with_logprob("-1"), "gave '-1' as a log-prob"),
        (with_logprob(float("nan")), "gave nan as a log-prob"),
        (with_logprob(float("-inf")), "gave -inf as a log-prob"),
        (with_logprob(0.5), "gave 0.5 as a log-prob"),
        (lambda _: "<html>busy</html>", "replied what is no mapping in JSON: '<html>busy</html>'"),
        (lambda _: "[1, 2]", r"replied what is no mapping in JSON: '\[1, 2\]'"),
        (lambda _: '{"prompt_logprobs": [null, 7]}', "has read other tokens"),
        (lambda _: "{}", "has read other tokens"),
    ],
)
def test_log_probs_that_are_none_end_a_run_with_the_reason(teachers, groups, serve, garble, said):  # noqa: F811
    server = serve(teachers[0])
    server.garble = garble
    teacher = RemoteTeacher(server.url, server.policy.family, torch.float32, patience=0)
    with pytest.raises(EngineError, match=said):
        teacher.logprobs([PackedGroup(groups[0].prompt, groups[0].answers)])


@pytest.mark.parametrize("reply", ["[1, 2]", "<html>", "null", '{"prompt": 3}'])
def test_a_server_that_is_no_teacher_is_refused_before_the_run(teachers, serve, reply):  # noqa: F811
    server = serve(teachers[0])
    server.garble = lambda _: reply
    teacher = RemoteTeacher(server.url, server.policy.family, torch.float32, patience=0)
    with pytest.raises(ConfigError, match=r"algorithm.teacher: "):
        teacher.check(server.policy.tokenizer)
