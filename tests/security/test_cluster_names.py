"""A cluster that cannot start says so soon, and leaves nothing behind."""

from __future__ import annotations

import socket
import sys
import threading
import time

import pytest

from foveate.cluster import commands
from foveate.cluster.commands import own_address, resolved, start_node
from foveate.errors import ConfigError

START = {"port": 0, "cpus": 1, "gpus": 0, "dashboard": 0, "block": False}


def unknown(*_, **__):
    raise socket.gaierror(-2, "Name or service not known")


@pytest.fixture
def no_ray(monkeypatch):
    def started(*_, **__):
        raise AssertionError("ray was started")

    monkeypatch.setattr(commands.subprocess, "Popen", started)
    monkeypatch.setattr(commands.subprocess, "run", started)


@pytest.mark.parametrize("name", ["no-such-host.invalid", "", "a" * 300, "x..y", "\ud800", "1.2.3.4.5", "a b"])
@pytest.mark.usefixtures("no_ray")
def test_a_name_that_does_not_resolve_starts_nothing(monkeypatch, name):
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(ConfigError, match="this name does not resolve; give an address"):
        start_node(head=None, host=name, **START)
    monkeypatch.setattr(commands, "own_address", lambda host: host)
    with pytest.raises(ConfigError, match=r"the head .* does not resolve"):
        start_node(head=f"{name}:6379", host="127.0.0.1", **START)


def test_a_resolver_that_takes_minutes_is_not_waited_for(monkeypatch):
    ended = threading.Event()

    def slow(*_, **__):
        ended.wait(60)
        unknown()

    monkeypatch.setattr(commands, "RESOLVE_S", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(ConfigError, match="does not resolve"):
        resolved("slow.example", "--host")
    ended.set()


@pytest.mark.usefixtures("no_ray")
def test_the_address_of_another_machine_is_refused():
    with pytest.raises(ConfigError, match=r"--host 192.0.2.1: is no address of this machine"):
        start_node(head=None, host="192.0.2.1", **START)
    assert own_address("127.0.0.1") == "127.0.0.1"


def test_a_start_that_fails_leaves_nothing_that_listens(monkeypatch, tmp_path):
    """As ray does, which starts its servers one after the other."""
    ray = tmp_path / "ray"
    ray.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\n"
        "code = 'import socket; s = socket.create_server((\"127.0.0.1\", 0)); '\n"
        "code += 'print(s.getsockname()[1], flush=True); s.accept()'\n"
        f"server = subprocess.Popen([{sys.executable!r}, '-c', code], stdout=subprocess.PIPE, text=True)\n"
        f"open({str(tmp_path / 'port')!r}, 'w').write(server.stdout.readline())\n"
        "print('the head did not answer')\nsys.exit(1)\n"
    )
    ray.chmod(0o755)
    monkeypatch.setattr(commands, "_ray", lambda: [str(ray)])
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    for variable in ("RAY_AUTH_MODE", "RAY_worker_niceness", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(variable, "")
    with pytest.raises(ConfigError, match=r"ray did not start \(exit code 1\): the head did not answer"):
        start_node(head=None, host="127.0.0.1", **START)
    port = int((tmp_path / "port").read_text())
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)
    raise AssertionError("something still listens")
