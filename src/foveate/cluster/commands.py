"""The commands of a cluster: Ray's own command line and job server, with its ports closed to other machines."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from foveate.errors import ConfigError

LOOPBACK = "127.0.0.1"
_INSIDE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
RESOLVE_S = 5.0
STOP_S = 600
"""Seconds that a job which is stopped has to end its step and save."""


def start_node(
    *, head: str | None, host: str, port: int, cpus: int | None, gpus: int | None, dashboard: int, block: bool
) -> None:
    """Start the head of a cluster on `host`, or join the one whose `head` is at HOST:PORT.

    Raises ConfigError where a name does not resolve, or ray is not installed or does not start; nothing that it
    started is left then.
    """
    host = own_address(host)
    if head is not None:
        resolved(head.rpartition(":")[0], "the head")
    use_token()
    keep_priority()
    if head is None and "RAY_AUTH_TOKEN" not in os.environ:
        subprocess.run([*_ray(), "get-auth-token", "--generate"], check=False, capture_output=True)
    command = [*_ray(), "start", f"--node-ip-address={host}", "--disable-usage-stats"]
    if head is None:
        if host == LOOPBACK:
            bind_to_loopback()
        command += ["--head", f"--port={port}", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}"]
    else:
        if host == LOOPBACK and not head.startswith(("127.", "localhost:")):
            raise ConfigError(
                f"--host {host}: the head at {head} could not reach this machine there; give an address of it"
            )
        os.environ.pop(_INSIDE, None)
        command += [f"--address={head}"]
    command += ["--dashboard-agent-listen-port=0"]  # any that is free: without its usual one, it takes no jobs
    command += [f"--num-cpus={cpus}"] if cpus is not None else []
    command += [f"--num-gpus={gpus}"] if gpus is not None else []
    if block:  # this process becomes the node, so that what ends the one ends the other
        os.execv(command[0], [*command, "--block"])
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said, _ = started.communicate()
    finally:
        if started.returncode != 0:  # what it started is in its group, and would go on listening
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    if started.returncode:
        raise ConfigError(f"ray did not start (exit code {started.returncode}): {' '.join(said.split())[-600:]}")


def own_address(host: str) -> str:
    """The address of this machine that a name stands for. Raises ConfigError for one that does not resolve, and for
    that of another machine."""
    address = resolved(host, "--host")
    try:
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise ConfigError(f"--host {host}: is no address of this machine ({error.strerror}); give one of it") from None
    return address


def resolved(name: str, what: str) -> str:
    """The address of a host. Raises ConfigError where it is not known within `RESOLVE_S` seconds."""
    found: list[str] = []

    def ask() -> None:
        with suppress(OSError, UnicodeError):
            known = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            known.sort(key=lambda entry: entry[0] != socket.AF_INET)  # which the ranks' own network code expects
            found.append(str(known[0][4][0]))

    asking = threading.Thread(target=ask, daemon=True)  # a resolver may take minutes, and cannot be stopped
    asking.start()
    asking.join(RESOLVE_S)
    if not found:
        raise ConfigError(f"{what} {name!r}: this name does not resolve; give an address, such as 10.0.0.1")
    return found[0]


def bind_to_loopback() -> None:
    """Let Ray keep to 127.0.0.1, which it otherwise takes for this machine's outer address, and listens everywhere. It
    has a variable for systems whose firewalls ask. To be called before ray is imported."""
    os.environ.setdefault(_INSIDE, "0")


def keep_priority() -> None:
    """Let Ray start processes with the priority of any other, where it otherwise lets everything else on a machine go
    before them (niceness 15). To be called before a node starts."""
    os.environ.setdefault("RAY_worker_niceness", "0")


def use_token() -> None:
    """Let a cluster ask for a token, which Ray keeps in ~/.ray/auth_token or takes from RAY_AUTH_TOKEN, unless
    RAY_AUTH_MODE says otherwise."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")


def has_token() -> bool:
    """Whether this user has a token for clusters."""
    return "RAY_AUTH_TOKEN" in os.environ or Path("~/.ray/auth_token").expanduser().is_file()


def job_command(command: str, recipe: str, overrides: list[str], *, uploaded: bool, installs: bool) -> str:
    """The command line of a run: in this folder, since the nodes see the same files, unless it is `uploaded`, and by
    this Python, unless the job `installs` one."""
    python = "python" if installs else sys.executable
    words = shlex.join([python, "-c", "from foveate.cli.app import main; main()", command, recipe, *overrides])
    return f"exec {words}" if uploaded else f"cd {shlex.quote(str(Path.cwd()))} && exec {words}"


def runtime_env(variables: list[str], packages: list[str], upload: Path | None) -> dict[str, Any]:
    """Ray's preparations for a job on every node: environment variables (NAME=VALUE), packages, a copy of a folder. A
    job that is stopped has time to save.

    Raises ConfigError for a variable without a value, and for a folder that is none.
    """
    for variable in variables:
        if "=" not in variable.lstrip("="):
            raise ConfigError(f"--env {variable}: write it as NAME=VALUE")
    if upload is not None and not upload.is_dir():
        raise ConfigError(f"--upload {upload} is not a folder")
    given = dict(variable.split("=", 1) for variable in variables)
    prepared: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), **given}}
    if packages:
        prepared["pip"] = packages
    if upload is not None:
        prepared["working_dir"] = str(upload)
    return prepared


def _ray() -> list[str]:
    beside = Path(sys.executable).with_name("ray")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("ray")
    if found is None:
        raise ConfigError("a cluster needs ray; install it by: pip install 'foveate[ray]'")
    return [found]
