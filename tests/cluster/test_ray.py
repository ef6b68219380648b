"""Runs over Ray on this machine: they learn what one process learns, and survive the loss of a rank."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import HERE, Sleeper, make_data, rl_settings

from foveate.config.cluster import ClusterSettings
from foveate.config.recipe import to_yaml
from foveate.errors import RankLost
from foveate.log import read_metrics
from foveate.train.rl import run_rl

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of ray itself
ray = pytest.importorskip("ray")
HERE_IS = Path(HERE).parent
TWO = {"gpus_per_node": 2, "device": "cpu", "timeout": 240}


@pytest.fixture(scope="module", autouse=True)
def _patience():
    """Ray gives up within half a minute on a machine that is busy with other tests."""
    os.environ["RAY_raylet_start_wait_time_s"] = "240"  # noqa: SIM112
    os.environ["PYTHONPATH"] = os.pathsep.join([p for p in sys.path if p])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder, data):
    """A run on two ranks that nothing disturbed."""
    return run_rl(rl_settings(tmp_path_factory.mktemp("runs") / "whole", tiny_folder, data, cluster=TWO))


def weights(run):
    return load_file(run.final / "model.safetensors")


def trained_ids(run):
    """The tasks of each step in the final history."""
    files = sorted(run.rollouts.glob("step_*.jsonl"))
    return [[json.loads(line)["id"] for line in file.read_text().splitlines()] for file in files]


def test_two_ranks_answer_and_learn_as_one_process(tmp_path, tiny_folder, data, whole):
    alone = run_rl(rl_settings(tmp_path / "alone", tiny_folder, data))
    first, other = read_metrics(whole.metrics)[0], read_metrics(alone.metrics)[0]
    for name in ("reward/mean", "answer/length", "loss/policy", "optim/grad_norm", "loss/entropy"):
        assert first[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)
    assert trained_ids(whole) == trained_ids(alone)


def lose_a_rank_at(patch, moments):
    """SIGKILL the last rank right after it was asked for its n-th piece of work, for each n of `moments`."""
    from foveate.cluster.ray import RayWorkers

    asked, call, results = [0], RayWorkers.call, RayWorkers._results
    lost = []

    def killing_results(self, refs):
        asked[0] += 1
        if asked[0] in moments and len(refs) == self.size:
            process = int(re.search(r"\d+", str(pids(self)[-1]))[0])
            os.kill(process, signal.SIGKILL)
            lost.append(process)
        return results(self, refs)

    def pids(self):
        return results(self, [actor.process.remote() for actor in self._actors])

    def counted(self, method, arguments):
        return call(self, method, arguments)

    patch.setattr(RayWorkers, "call", counted)
    patch.setattr(RayWorkers, "_results", killing_results)
    return lost


def test_a_run_that_loses_ranks_ends_as_the_one_that_did_not(tmp_path, tiny_folder, data, whole, monkeypatch):
    lost = lose_a_rank_at(monkeypatch, {6, 18, 27})
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, cluster=TWO))
    assert len(lost) >= 2
    ids = [one for step in trained_ids(run) for one in step]
    assert trained_ids(run) == trained_ids(whole)
    assert len(set(ids)) == len(ids) == 12
    assert [record["step"] for record in read_metrics(run.metrics)] == [1, 2, 3]
    own, other = weights(run), weights(whole)
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_a_run_that_keeps_losing_ranks_ends_with_an_error(tmp_path, tiny_folder, data, monkeypatch):
    lose_a_rank_at(monkeypatch, set(range(4, 1000)))
    begin = time.monotonic()
    with pytest.raises(RankLost, match=r"rank 1 died"):
        run_rl(rl_settings(tmp_path / "run", tiny_folder, data, cluster={**TWO, "retries": 1}))
    assert time.monotonic() - begin < 240


def test_a_rank_that_hangs_is_an_error_with_the_stacks_of_all(caplog):
    from foveate.cluster.ray import RayWorkers

    with RayWorkers(ClusterSettings(**TWO), Sleeper) as workers:
        assert workers.call(Sleeper.sleep, [(0.0,), (0.0,)]) == [None, None]
        workers._cluster = ClusterSettings(**{**TWO, "timeout": 10})
        with pytest.raises(RankLost, match=r"rank 1 did not answer for 10 s"):
            workers.call(Sleeper.sleep, [(0.0,), (1000.0,)])
    assert "rank 0:" in caplog.text
    assert "time.sleep(seconds)" in caplog.text


def test_engines_apart_answer_ranks_that_learn_as_one_process(tmp_path, tiny_folder, data, whole):
    cluster = {**TWO, "engines": 2}
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, cluster=cluster, rollout={"check_every": 1}))
    assert trained_ids(run) == trained_ids(whole)
    for record, other in zip(read_metrics(run.metrics), read_metrics(whole.metrics), strict=True):
        assert record["engine/check"] < 1e-5
        assert record["engine/logprob_difference_max"] < 1e-4
        if record["step"] == 1:
            for name in ("reward/mean", "answer/length", "optim/grad_norm", "loss/entropy"):
                assert record[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)


def test_ranks_learn_while_engines_apart_answer_as_in_one_process(tmp_path, tiny_folder, data):
    algorithm = {"name": "grpo", "correction": {"mode": "token-truncate"}}
    changes = {"rollout": {"staleness": 1}, "algorithm": algorithm}
    alone = run_rl(rl_settings(tmp_path / "alone", tiny_folder, data, **changes))
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, **changes, cluster={**TWO, "engines": 1}))
    assert trained_ids(run) == trained_ids(alone)
    first, second, _ = zip(read_metrics(run.metrics), read_metrics(alone.metrics), strict=True)
    for record, other in (first, second):  # what the second learns from was answered before the first had learned
        assert record["reward/mean"] == pytest.approx(other["reward/mean"], rel=1e-6)
        assert record["optim/grad_norm"] == pytest.approx(other["optim/grad_norm"], rel=1e-3)


def test_an_engine_that_is_killed_is_started_again_and_changes_nothing(tmp_path, tiny_folder, data, monkeypatch):
    from foveate.cluster.ray import RayEngineProcesses

    ask, asked, lost = RayEngineProcesses.ask, [], []

    def killing(self, number, method, *arguments):
        name = method.__name__
        asked.append(name)
        moments = {"begin": (2, 5), "publish": (3,), "take": (4,)}
        if asked.count(name) in moments.get(name, ()) and name not in lost[-1:]:
            lost.append(name)
            os.kill(ray.get(self._actors[number].process.remote()), signal.SIGKILL)
        return ask(self, number, method, *arguments)

    cluster = {"engines": 1, "timeout": 240}
    undisturbed = run_rl(rl_settings(tmp_path / "undisturbed", tiny_folder, data, cluster=cluster))
    monkeypatch.setattr(RayEngineProcesses, "ask", killing)
    run = run_rl(rl_settings(tmp_path / "run", tiny_folder, data, cluster=cluster))
    assert len(lost) >= 3
    assert read_metrics(run.metrics)[-1]["engine/lost"] >= 3
    assert trained_ids(run) == trained_ids(undisturbed)
    own, other = weights(run), weights(undisturbed)
    assert all(torch.equal(own[name], other[name]) for name in other)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_two_nodes_started_by_three_commands_learn(tmp_path, tiny_folder, data):
    settings = rl_settings(
        tmp_path / "run",
        tiny_folder,
        data,
        cluster={"nodes": 2, "device": "cpu", "timeout": 240, "engines": 1},
        reward={"name": f"{HERE}:text_length", "workers": 0},
        train={"steps": 12, "prompts_per_step": 4, "save_every": 12},
        optim={"lr": 3e-3},
        eval={"every": 0},
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(settings))
    port, dashboard = free_port(), free_port()
    foveate = [sys.executable, "-c", "from foveate.cli.app import main; main()"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    up = [
        *foveate,
        "cluster",
        "up",
        "--host=127.0.0.2",
        f"--port={port}",
        f"--dashboard={dashboard}",
        "--cpus=2",
        "--block",
    ]
    join = [*foveate, "cluster", "join", f"127.0.0.2:{port}", "--host=127.0.0.3", "--cpus=1", "--block"]
    submit = [*foveate, "submit", str(recipe), "--head", f"http://127.0.0.1:{dashboard}"]
    nodes = []
    try:
        nodes.append(subprocess.Popen(up, env=environment))
        wait_for(port, "127.0.0.2")
        nodes.append(subprocess.Popen(join, env=environment))
        wait_for(dashboard)
        ended = subprocess.run(submit, env=environment, capture_output=True, text=True, timeout=560)
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(60)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert "2 ranks on 2 nodes" in ended.stdout
    assert "an engine on 127.0.0.2" in ended.stdout
    rewards = [record["reward/mean"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.2


def test_a_job_that_is_stopped_saves_and_leaves(tmp_path, tiny_folder, data):
    train = {"steps": 100_000, "prompts_per_step": 4, "save_every": 0}
    reward = {"name": "toy:text_length", "workers": 0}
    settings = rl_settings(tmp_path / "run", tiny_folder, data, train=train, eval={"every": 0}, reward=reward)
    (tmp_path / "recipe.yaml").write_text(to_yaml(settings))
    port, dashboard = free_port(), free_port()
    foveate = [sys.executable, "-c", "from foveate.cli.app import main; main()"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment["PYTHONPATH"] = str(HERE_IS.parent)  # the reward is found by what the job is given
    up = [*foveate, "cluster", "up", f"--port={port}", f"--dashboard={dashboard}", "--cpus=1", "--block"]
    given = ["--env", f"PYTHONPATH={environment['PYTHONPATH']}:{HERE_IS}", "--upload", str(tmp_path / "copied")]
    (tmp_path / "copied").mkdir()
    submit = [*foveate, "submit", str(tmp_path / "recipe.yaml"), "--head", f"http://127.0.0.1:{dashboard}", *given]
    node = subprocess.Popen(up, env=environment)
    try:
        wait_for(dashboard)
        job = subprocess.Popen(submit, env=environment, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)
        job.send_signal(signal.SIGINT)
        said, _ = job.communicate(timeout=240)
    finally:
        node.terminate()
        node.wait(60)
    assert job.returncode not in (0, None)
    assert "SIGTERM: saving after this step" in said
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    state = json.loads((tmp_path / "run" / "checkpoints" / "latest" / "state.json").read_text())
    assert state["step"] == records[-1]["step"] > 0
    assert not (tmp_path / "run" / "final").exists()


def wait_for(port, host="127.0.0.1"):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), 1).close()
            return
        except OSError:
            time.sleep(1)
    raise TimeoutError(port)
