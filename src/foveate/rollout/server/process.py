"""One server process on this machine: started, asked over HTTP, and killed with everything that it started."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import EngineError

HOST = "127.0.0.1"
PORT = "{port}"
"""Stands in a command line for the port that the server gets at its start."""
_GUARD = Path(__file__).with_name("guard.py")


@dataclass(slots=True)
class Counts:
    """Counters of the servers of an engine since it was made; publish_bytes: what the last publish sent to each."""

    groups: int = 0
    tokens: int = 0
    regenerated: int = 0
    restarts: int = 0
    publishes: int = 0
    publish_seconds: float = 0.0
    publish_bytes: int = 0


class ServerLostError(Exception):
    """A server that does not answer any more; whoever asked starts it again."""


class Server:
    """A server by its command line, in which PORT stands for its port; `starts` counts how often it was started.

    It ends with everything that it has started, also when this process is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path | None,
        health: str,
        *,
        name: str = "the server",
        host: str = HOST,
        port: int | None = None,
    ) -> None:
        """`log`: the file of its output, None: that of this process; `health`: the path that says whether it is well;
        `name`: for messages; `port`: None for a free one at each start."""
        self.starts = 0
        self.log, self.name, self.host, self.port = log, name, host, port or 0
        self._command, self._environment, self._health = command, environment, health
        self._takes_any_port = port is None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, patience_s: float) -> None:
        """Start the server, or start it again, and wait until it answers. Raises EngineError with the last lines of
        its log where it ends or takes longer than `patience_s`."""
        self.kill()
        self.starts += 1
        if self._takes_any_port:
            self.port = free_port(self.host)
        command = [str(self.port) if word == PORT else word for word in self._command]
        with ExitStack() as opened:
            output = None
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                output = opened.enter_context(self.log.open("ab"))
            self._process = process = subprocess.Popen(
                [sys.executable, "-IS", str(_GUARD), *command],
                stdin=subprocess.PIPE,
                bufsize=0,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        give_up = time.monotonic() + patience_s
        while not self.healthy():
            if process.poll() is not None:
                raise EngineError(
                    f"{self.name} ended with code {process.returncode} while it started; {self.last_words()}"
                )
            if time.monotonic() > give_up:
                self.kill()
                where = self.log or "its lines above"
                raise EngineError(f"{self.name} was not ready after {patience_s:g} s; see {where}, or wait longer")
            time.sleep(0.2)

    def wait(self) -> int:
        """Return when a server that was started has ended: its exit code."""
        assert self._process is not None
        return self._process.wait()

    def healthy(self) -> bool:
        """Whether the server runs and says that it is well."""
        try:
            self.call("GET", self._health, timeout_s=10)
        except (ServerLostError, EngineError):
            return False
        return True

    def kill(self, grace_s: float = 0.0) -> None:
        """End the server and all its processes: at once, or after `grace_s` seconds in which it may end by itself."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with process.stdin, suppress(OSError, subprocess.TimeoutExpired):  # has ended already, or does not end
            if grace_s:
                process.stdin.write(b"!")
                process.wait(grace_s)
        process.wait()

    def call(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        """One request; returns the decoded JSON, or the text of anything else.

        Raises ServerLostError when there is no answer or the server says that it is broken (5xx), EngineError when it
        refuses the request (4xx)."""
        payload = None if body is None else json.dumps(body)
        headers = {} if payload is None else {"Content-Type": "application/json"}
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)) as connection:
            try:
                connection.request(method, path, payload, headers)
                answer = connection.getresponse()
                status, text = answer.status, answer.read().decode()
            except (OSError, http.client.HTTPException) as error:
                raise ServerLostError(f"{path}: {type(error).__name__} {error}") from error
        if status >= 500:
            raise ServerLostError(f"{path}: status {status}: {text[:500]}")
        if status >= 400:
            raise EngineError(f"the server refused {path} (status {status}): {text[:500]}")
        return json.loads(text) if text[:1] in ("{", "[") else text

    def last_words(self) -> str:
        """The end of the log, for messages."""
        if self.log is None:
            return "its last lines stand above"
        return "\n".join([f"the end of {self.log}:", *self.log.read_text(errors="replace").splitlines()[-12:]])


@contextmanager
def meanwhile(server: Server, path: str, body: Any, timeout_s: float) -> Iterator[None]:
    """Post a request that the server answers, within `timeout_s`, when the block has done its part. Where both fail,
    the server's reason is raised, since the other is its consequence. Whoever fails first ends the server, for which
    the other might wait."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.call, "POST", path, body, timeout_s=timeout_s)
        answer.add_done_callback(lambda done: server.kill() if done.exception() else None)
        try:
            yield
        except RuntimeError as error:
            if not answer.done():
                wait([answer], timeout=5)
            if not answer.done():
                server.kill()
            failure = answer.exception()
            raise failure if failure is not None else ServerLostError(f"{path}: {error}") from error
        answer.result()


def free_port(host: str = "") -> int:
    """A port of this machine that is free now, at this address of it or at all."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]
