"""Settings of a cluster fit together, and a run that cannot honour them says so before it starts."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from toy import rl_settings, sft_settings

from foveate.cluster.commands import job_command, runtime_env, start_node
from foveate.cluster.network import interface_of, set_network_interface
from foveate.config.cluster import ClusterSettings
from foveate.errors import ConfigError, RankLost
from foveate.train.rl import run_rl
from foveate.train.session import GracefulShutdown, require_one_process
from foveate.train.sft import run_sft

CORRECTED = {"name": "grpo", "correction": {"mode": "token-truncate"}}


@pytest.mark.parametrize(("shard", "shards"), [("full", 16), ("hybrid", 8), ("none", 1)])
def test_a_copy_of_the_weights_is_cut_over_all_ranks_a_machine_or_none(shard, shards):
    cluster = ClusterSettings(nodes=2, gpus_per_node=8, shard=shard)
    assert (cluster.ranks, cluster.shards) == (16, shards)


def test_ranks_that_talk_in_every_layer_fit_on_a_machine():
    with pytest.raises(ValidationError, match=r"sequence_parallel is 3 but must divide cluster.gpus_per_node=8"):
        ClusterSettings(gpus_per_node=8, sequence_parallel=3)


@pytest.mark.parametrize("setting", [{"engine_tensor_parallel": 2}, {"engine_memory": 0.5}])
def test_settings_of_engines_apart_need_such_engines(setting):
    with pytest.raises(ValidationError, match=r"acts only on engines in separate processes: set cluster.engines"):
        ClusterSettings(gpus_per_node=8, **setting)
    assert ClusterSettings(gpus_per_node=8, engines=2, **setting).gpus == 8 + 2 * setting.get(
        "engine_tensor_parallel", 1
    )


@pytest.mark.parametrize(
    ("run", "settings", "changes", "message"),
    [
        (run_sft, sft_settings, {"cluster": {"shard": "none"}}, "cluster.shard=none: runs of one rank compute in one"),
        (run_rl, rl_settings, {"cluster": {"shard": "none"}}, "cluster.shard=none: runs of one rank compute in one"),
        (
            run_sft,
            sft_settings,
            {"cluster": {"gpus_per_node": 2, "engines": 1}},
            "cluster.engines=1: this run generates",
        ),
        (
            run_rl,
            rl_settings,
            {"cluster": {"engines": 1, "offload": True}},
            "cluster.offload=True: runs of one rank",
        ),
        (
            run_rl,
            rl_settings,
            {"cluster": {"gpus_per_node": 2}, "rollout": {"engine": "vllm"}},
            "rollout.engine=vllm: with several ranks that takes processes of its own: set cluster.engines",
        ),
        (
            run_rl,
            rl_settings,
            {"cluster": {"gpus_per_node": 2}, "rollout": {"staleness": 1}, "algorithm": CORRECTED},
            "rollout.staleness=1: with several ranks that takes processes of its own: set cluster.engines",
        ),
    ],
)
def test_a_run_that_cannot_honour_a_cluster_refuses_before_it_reads_anything(tmp_path, run, settings, changes, message):
    asked = settings(tmp_path / "run", tmp_path / "no-model", tmp_path, **changes)
    with pytest.raises(ConfigError, match=f"^{message}"):
        run(asked)
    assert not (tmp_path / "run").exists()


def test_a_run_on_one_process_is_not_refused():
    require_one_process(ClusterSettings())
    require_one_process(ClusterSettings(nodes=1, shard="full"))


def test_tokens_of_a_row_are_counted_over_the_devices_that_share_it(tmp_path):
    train = {"steps": 1, "tokens_per_micro_batch": 68}
    rl_settings(tmp_path, tmp_path, tmp_path, train=train, cluster={"gpus_per_node": 2, "sequence_parallel": 2})
    with pytest.raises(ValidationError, match=r"is 67 on 2 devices, less than .* use 68 or more"):
        rl_settings(
            tmp_path, tmp_path, tmp_path,
            train={**train, "tokens_per_micro_batch": 67},
            cluster={"gpus_per_node": 2, "sequence_parallel": 2},
        )  # fmt: skip


def test_ranks_talk_through_the_interface_of_their_node_unless_the_environment_says_otherwise(monkeypatch):
    loopback = interface_of("127.0.0.1")
    assert loopback in [name for _, name in socket.if_nameindex()]
    assert interface_of("203.0.113.7") is None
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is put back
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    set_network_interface("203.0.113.7")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    set_network_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"


def test_a_job_is_given_what_the_nodes_lack(tmp_path):
    prepared = runtime_env(["A=1", "B=x=y"], ["einops"], tmp_path)
    assert prepared["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "A": "1", "B": "x=y"}
    assert (prepared["pip"], prepared["working_dir"]) == (["einops"], str(tmp_path))
    assert runtime_env(["RAY_JOB_STOP_WAIT_TIME_S=5"], [], None) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "5"}}
    here = job_command("rl", "my recipe.yaml", ["seed=3"], uploaded=False, installs=False)
    assert here.startswith(f"cd {os.getcwd()} && exec {sys.executable} -c ")
    assert here.endswith(" rl 'my recipe.yaml' seed=3")
    assert job_command("mpo", "r.yaml", [], uploaded=True, installs=True).startswith("exec python -c ")


@pytest.mark.parametrize(
    ("arguments", "said"), [((["=1"], [], None), r"--env =1: write"), (([], [], Path("no")), "no is not a folder")]
)
def test_what_no_job_can_be_given_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        runtime_env(*arguments)


def test_a_machine_joins_a_head_elsewhere_by_an_address_that_reaches_it():
    with pytest.raises(ConfigError, match=r"--host 127\.0\.0\.1: the head at 10\.1\.2\.3:6379 could not reach"):
        start_node(head="10.1.2.3:6379", host="127.0.0.1", port=0, cpus=1, gpus=0, dashboard=0, block=False)


class Workers:
    """A group whose ranks are told to end what they save."""

    size = row = 1

    def call(self, _, per_rank_arguments):
        return [None for _ in per_rank_arguments]


def test_a_machine_that_goes_down_ends_the_run_though_it_took_a_rank_first():
    def lost(asked):
        with GracefulShutdown(Workers()) as leaving:
            if asked:
                os.kill(os.getpid(), signal.SIGTERM)
            assert leaving.is_asked == asked
            raise RankLost("rank 1 died")

    with pytest.raises(SystemExit, match="143"):
        lost(True)
    with pytest.raises(RankLost):
        lost(False)
