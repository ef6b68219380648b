"""Engines in processes of their own: dealing, streaming, publishing, proof and loss, with threads in place of them."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from family_cases import build_family

from foveate.cluster.engine_process import EngineLostError, EngineProcess
from foveate.cluster.local import LocalWorkers
from foveate.cluster.rank_engine import RankEngine
from foveate.cluster.remote_engines import RemoteEngines
from foveate.cluster.weights import Incoming, Outgoing
from foveate.config.model import LoraSettings, ModelSettings
from foveate.config.rollout import RolloutSettings
from foveate.encoding.encode import Encoder
from foveate.errors import DataError, EngineError, RankLost
from foveate.models.lora import train_parts, with_adapters
from foveate.models.policy import load_policy
from foveate.records import SamplingParams
from foveate.rollout import check
from foveate.rollout.engine import Request
from foveate.rollout.native.engine import NativeEngine

SAMPLING = SamplingParams(samples=2, max_tokens=6)


def nothing(_number, _method):
    return False


class ThreadProcesses:
    """Engine processes that are threads here. `dies` says, before each call, whether one dies instead of answering."""

    def __init__(self, size, dies=nothing):
        self.size, self.dies = size, dies
        self.engines, self.starts, self.ended, self.packets = {}, [], [], []
        self._pool = ThreadPoolExecutor(16)
        self.lost = {}

    def start(self, number, build):
        self.starts.append(number)
        self.engines[number], self.lost[number] = build(), threading.Event()
        done = Future()
        done.set_result(None)
        return done

    def ask(self, number, method, *arguments):
        engine, lost = self.engines[number], self.lost[number]
        if self.dies(number, method.__name__):
            lost.set()
        return self._pool.submit(self._call, engine, lost, number, method, arguments)

    def _call(self, engine, lost, number, method, arguments):
        if not lost.is_set():
            result = method(engine, *arguments)
        if lost.is_set():
            raise EngineLostError(f"process {number} was killed")
        return result

    def share(self, packet):
        self.packets.append(weakref.ref(packet.data))
        return packet

    def end(self, number):
        self.ended.append(number)
        self.lost[number].set()

    def close(self):
        for engine in self.engines.values():
            engine.close()
        self._pool.shutdown()


@pytest.fixture
def trainer(tiny_folder):
    """A rank that trains, whose weights are others than those of the model's folder."""
    policy = load_policy(str(tiny_folder))
    learn(policy, 0)
    engine = RankEngine(policy, ModelSettings(path=str(tiny_folder)), None)
    engine._outgoing = Outgoing(policy.model, limit=100_000)
    return SimpleNamespace(policy=policy, engine=engine)


@torch.no_grad()
def learn(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.model.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def requests(encode, make_task, make_image):
    """Prompts of several lengths, two of them with a picture."""
    tasks = [make_task("one " * (1 + i)) for i in range(6)]
    tasks += [make_task("<image>\nWhere?", make_image(56, 56, seed)) for seed in range(2)]
    return [Request(encode(task), seed) for seed, task in enumerate(tasks)]


@pytest.fixture
def started(tiny_folder, trainer, encode):
    """started(size, ...) -> engines apart with the weights of the trainer, and their processes."""
    opened = []

    def start(size, *, dies=nothing, make=NativeEngine, timeout=60.0, asynchronous=False, check_every=0):
        processes = ThreadProcesses(size, dies)
        load = partial(load_policy, str(tiny_folder))
        workers = LocalWorkers(trainer)
        engines = RemoteEngines(
            processes, workers, load, partial(check._logprobs, trainer.policy, 1.0),
            timeout=timeout, asynchronous=asynchronous, dtype=torch.float32,
        )  # fmt: skip
        opened.append(engines)
        engines.start(make, encode, RolloutSettings(check_every=check_every), 3)
        return engines, processes

    yield start
    for engines in opened:
        engines.__exit__()


def alone(trainer, encode, version):
    """The engine of a run in one process."""
    return NativeEngine(trainer.policy, encode.decode, version=version)


@pytest.mark.parametrize("size", [1, 3])
def test_engines_apart_answer_as_the_trainers_own_engine_also_after_publishes(started, trainer, encode, requests, size):
    engines, _ = started(size)
    for version in (3, 4):
        answers = engines.generate(requests, SAMPLING)
        expected = alone(trainer, encode, version).generate(requests, SAMPLING)
        assert [[(one.token_ids, one.version) for one in group] for group in answers] == [
            [(one.token_ids, one.version) for one in group] for group in expected
        ]
        learn(trainer.policy, version)
        engines.publish(version + 1)


def test_each_group_comes_as_it_finishes(started, requests):
    gate = threading.Event()

    class Waiting(NativeEngine):
        """Gives its first group at once, and the others when the gate opens."""

        def stream(self, requests, sampling):
            for index, request in enumerate(requests):
                yield index, next(NativeEngine.stream(self, [request], sampling))[1]
                assert gate.wait(60)

    engines, _ = started(2, make=Waiting)
    groups = engines.stream(requests, SAMPLING)
    first = {next(groups)[0], next(groups)[0]}
    gate.set()
    rest = {index for index, _ in groups}
    assert len(first) == 2
    assert first | rest == {*range(len(requests))}
    assert not first & rest


def once(number, method, at):
    """What dies: this engine, when it is asked this for the `at`-th time."""
    left = [at]

    def dies(asked, what):
        if (asked, what) == (number, method):
            left[0] -= 1
            return left[0] == 0
        return False

    return dies


@pytest.mark.parametrize("method", ["begin", "more", "take", "publish"])
def test_an_engine_that_dies_is_started_again_and_no_group_is_lost_or_doubled(started, trainer, requests, method):
    engines, processes = started(2, dies=once(1, method, at=2 if method in ("take", "publish") else 1))
    learn(trainer.policy, 9)
    engines.publish(4)
    indices, groups = zip(*sorted(engines.stream(requests, SAMPLING)), strict=True)
    assert processes.starts == [0, 1, 1]
    assert engines.publish(5)["engine/lost"] == 1
    undisturbed, _ = started(2)
    undisturbed.publish(4)
    assert indices == (*range(len(requests)),)
    assert list(groups) == undisturbed.generate(requests, SAMPLING)  # log-probs too, bit for bit


def test_where_trainers_learn_meanwhile_the_weights_come_from_another_engine(started, trainer, requests):
    engines, processes = started(2, dies=once(1, "more", 1), asynchronous=True)
    expected = started(2)[0].generate(requests, SAMPLING)
    learn(trainer.policy, 9)
    assert engines.generate(requests, SAMPLING) == expected
    assert processes.starts == [0, 1, 1]


def test_the_only_engine_of_trainers_that_learn_meanwhile_takes_the_run_back_with_it(started, requests):
    engines, _ = started(1, dies=once(0, "more", 1), asynchronous=True)
    with pytest.raises(RankLost, match="engine 0 died, and its weights with it"):
        engines.generate(requests, SAMPLING)


@pytest.mark.parametrize("dies", [nothing, once(1, "more", 2)])
def test_a_pause_ends_a_stream_and_what_was_begun_goes_on_after_it(started, requests, dies):
    gate = threading.Event()

    class Gated(NativeEngine):
        """Waits at the gate after its first group."""

        def stream(self, requests, sampling):
            for number, found in enumerate(NativeEngine.stream(self, requests, sampling)):
                yield found
                assert number or gate.wait(60)

    engines, _ = started(2, make=partial(Gated, token_budget=100), dies=dies)
    groups = engines.stream(requests, SAMPLING)
    found = dict([next(groups), next(groups)])
    engines.pause()
    gate.set()
    found |= dict(groups)
    assert any(one.finish == "abort" for group in found.values() for one in group) or len(found) < len(requests)
    engines.resume()
    again = [replace(request, partial_answers=found.get(i, ())) for i, request in enumerate(requests)]
    answers = engines.generate(again, SAMPLING)
    expected = started(1)[0].generate(requests, SAMPLING)
    assert [[one.token_ids for one in group] for group in answers] == [
        [one.token_ids for one in group] for group in expected
    ]


def test_an_engine_that_keeps_dying_ends_the_tries(started, requests):
    engines, processes = started(2, dies=lambda number, method: (number, method) == (0, "more"))
    with pytest.raises(RankLost, match="engine 0 was lost 3 times without a finished group: process 0 was killed"):
        engines.generate(requests, SAMPLING)
    assert processes.starts.count(0) == 3


def test_an_engine_that_finishes_nothing_is_started_again(started, requests):
    hangs = [True]

    class Hanging(NativeEngine):
        def stream(self, requests, sampling):
            while hangs[0]:
                hangs[0] = processes.ended == []
            yield from NativeEngine.stream(self, requests, sampling)

    engines, processes = started(1, make=Hanging)
    end = processes.end

    def patient_again(number):
        engines._timeout = 60.0
        end(number)

    processes.end, engines._timeout = patient_again, 0.5
    assert len(engines.generate(requests, SAMPLING)) == len(requests)
    assert (processes.starts, processes.ended) == ([0, 0], [0])


def test_what_an_engine_refuses_ends_the_run(started, requests):
    class Refusing(NativeEngine):
        def stream(self, _requests, _sampling):
            raise EngineError("no")
            yield

    engines, processes = started(2, make=Refusing)
    with pytest.raises(EngineError, match=r"^no$"):
        engines.generate(requests, SAMPLING)
    assert processes.starts == [0, 1]


@pytest.mark.slow
def test_at_most_two_packets_of_weights_are_in_memory(started):
    engines, processes = started(2)
    alive = []
    share = processes.share

    def counted(packet):
        shared = share(packet)
        gc.collect()
        alive.append(sum(one() is not None for one in processes.packets))
        return shared

    processes.share = counted
    engines.publish(4)
    assert len(alive) >= 4
    assert max(alive) <= 2


@pytest.mark.slow
def test_the_proof_notices_weights_that_did_not_arrive(started, trainer):
    engines, processes = started(1, check_every=1)
    assert engines.publish(4)["engine/check"] < 1e-5
    incoming = processes.engines[0]._incoming
    incoming.take = lambda packet: incoming._taken.update(name for name, *_ in packet.tensors)
    learn(trainer.policy, 5)
    with pytest.raises(EngineError, match=r"at weights 5 the engine's log-probs .* differ"):
        engines.publish(5)


def test_weights_that_are_not_whole_or_of_another_model_are_refused(trainer, tiny_folder):
    incoming, outgoing = Incoming(load_policy(str(tiny_folder)).model), Outgoing(trainer.policy.model, limit=100_000)
    first = outgoing.packet(True)
    assert first is not None
    incoming.take(first)
    with pytest.raises(DataError, match=r"published weights lack .* and \d+ more"):
        incoming.finish()
    with pytest.raises(DataError, match=r"has shape .*, the engine's model none of that name"):
        Incoming(torch.nn.Linear(2, 2)).take(first)


def test_an_engine_that_is_no_trainer_keeps_its_weights_until_the_next_publish(trainer, tiny_folder, encode):
    process = EngineProcess(partial(load_policy, str(tiny_folder)), NativeEngine, encode.decode)
    sent = Outgoing(trainer.policy.model)
    first = sent.packet(True)
    assert first is not None
    process.take(first)
    process.publish(1)
    kept, original = process.packet(True), sent.packet(True)
    assert kept is not None
    assert original is not None
    assert kept.tensors == original.tensors
    assert (kept.data == original.data).all()
    assert sent.packet(False) is None


@pytest.mark.parametrize("name", ["qwen2", "qwen3_vl"])
def test_tied_weights_reach_an_engine_of_its_own_once_and_stay_tied(name, make_task, tmp_path):
    folder = str(build_family(tmp_path, name, tie_word_embeddings=True))
    policy = load_policy(folder)
    encode = Encoder(policy.tokenizer, policy.family, policy.family.budget, 1024)
    process, outgoing = EngineProcess(partial(load_policy, folder), NativeEngine, encode.decode), Outgoing(policy.model)
    requests = [Request(encode(make_task("Where is the circle?")), 0)]
    for version in (3, 4):
        learn(policy, version)
        packet = outgoing.packet(True)
        names = [name for name, *_ in packet.tensors]
        assert names == [name for name, _ in policy.model.named_parameters()]
        process.take(packet)
        process.publish(version)
        expected = NativeEngine(policy, encode.decode, version=version).generate(requests, SAMPLING)
        assert process._engine.generate(requests, SAMPLING) == expected
    process.close()


def test_engines_with_the_trainers_adapters_get_the_base_once_and_then_what_training_changes(
    tiny_folder, trainer, encode, requests
):
    """As those of servers do, which apply adapters by themselves; an engine that is started again gets all."""
    lora, parts = LoraSettings(rank=2), ("language",)
    train_parts(trainer.policy, parts, lora)
    processes = ThreadProcesses(2)
    load = partial(with_adapters, partial(load_policy, str(tiny_folder)), parts, lora)
    logprobs = partial(check._logprobs, trainer.policy, 1.0)
    how = {"timeout": 60.0, "asynchronous": False, "dtype": torch.float32, "adapters": True}
    with RemoteEngines(processes, LocalWorkers(trainer), load, logprobs, **how) as engines:
        engines.start(NativeEngine, encode, RolloutSettings(check_every=0), 3)
        trained = [one for one in trainer.policy.model.parameters() if one.requires_grad]
        for version in (4, 5):
            with torch.no_grad():
                for one in trained:
                    one += 0.1
            assert engines.publish(version)["engine/publish_bytes"] == sum(one.nbytes for one in trained)
            if version == 5:
                processes.lost[0].set()
            found = engines.generate(requests, SAMPLING)
            wanted = alone(trainer, encode, version).generate(requests, SAMPLING)
            for ours, theirs in zip(chain(*found), chain(*wanted), strict=True):
                assert (ours.token_ids, ours.finish, ours.version) == (theirs.token_ids, theirs.finish, theirs.version)
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)  # batches differ
        assert processes.starts == [0, 1, 0]
