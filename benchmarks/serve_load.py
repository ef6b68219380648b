"""`foveate serve` under load: short requests beside long ones, and throughput at many clients.

    python benchmarks/serve_load.py [--seconds 60] [--vllm PYTHON]

A random model of the size of benchmarks/generation.py in float32 on one thread. First the time of requests of 16 new
tokens, one after the other, on an idle server; then the same beside eight streams of 2,000 new tokens each, which begin
again when they end; last the tokens per second of 32 clients that each ask for 128. With `--vllm`, the interpreter of
an environment that has vLLM, the same against vLLM's own server on the same weights. Seconds are of the clock: nothing
else should run. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from generation import SIZE, VOCABULARY
from soak_serve import PATH, body

from foveate.models.tiny import build_tiny
from foveate.rollout.server.process import free_port

LONG, STREAMS, SHORT = 2000, 8, 16
CLIENTS, THROUGHPUT = 32, 128
WITHOUT_STOP = {"ignore_eos": True}
FOVEATE = ["-m", "foveate", "serve"]


class Load:
    """Clients of one server."""

    def __init__(self, port: int, more: dict[str, Any]) -> None:
        self.port, self.more = port, more
        self.is_over = threading.Event()
        self.streamed = 0

    def _ask(self, text: str, tokens: int, **more: Any) -> http.client.HTTPConnection:
        one = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        content = json.dumps(body(text, tokens, **self.more, **more)).encode()
        one.request("POST", PATH, content, {"Content-Type": "application/json"})
        return one

    def short(self, number: int, tokens: int = SHORT) -> int:
        """Ask, wait for the whole reply; its number of new tokens."""
        with closing(self._ask(f"What is {number}?", tokens)) as one:
            reply = one.getresponse()
            content = reply.read()
        assert reply.status == 200, content[:500]
        return int(json.loads(content)["usage"]["completion_tokens"])

    def _stream(self, seed: int) -> None:
        while not self.is_over.is_set():
            with closing(self._ask(f"Count from {seed}.", LONG, stream=True)) as one:
                reply = one.getresponse()
                assert reply.status == 200, reply.read(500)
                while not self.is_over.is_set() and (line := reply.readline()):
                    self.streamed += line.startswith(b"data: {")

    def times(self, seconds: float) -> list[float]:
        """Seconds of each short request, asked one after the other for `seconds`."""
        found: list[float] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            self.short(len(found))
            found.append(time.monotonic() - began)
        return found

    def times_beside_streams(self, seconds: float) -> list[float]:
        streams = [threading.Thread(target=self._stream, args=(seed,)) for seed in range(STREAMS)]
        for stream in streams:
            stream.start()
        while self.streamed < 10 * STREAMS:
            time.sleep(0.1)
        found = self.times(seconds)
        self.is_over.set()
        for stream in streams:
            stream.join()
        return found

    def throughput(self) -> float:
        """New tokens per second of `CLIENTS` requests at once, in two rounds."""
        counts: list[int] = []
        clients = [
            threading.Thread(target=lambda n=n: counts.extend(self.short(n + 100 * i, THROUGHPUT) for i in range(2)))
            for n in range(CLIENTS)
        ]
        began = time.monotonic()
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return sum(counts) / (time.monotonic() - began)


def measure(command: Sequence[str], port: int, seconds: float, more: dict[str, Any]) -> dict[str, float]:
    environment = dict(os.environ, OMP_NUM_THREADS="1", VLLM_CPU_KVCACHE_SPACE="2", VLLM_CPU_OMP_THREADS_BIND="0")
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _wait(server, port)
            Load(port, more).times(3)
            idle = Load(port, more).times(seconds)
            beside = Load(port, more).times_beside_streams(seconds)
            time.sleep(2)
            throughput = Load(port, more).throughput()
        except BaseException:
            log.seek(0)
            print(log.read()[-3000:])
            raise
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(30)
    found: dict[str, float] = {"throughput": throughput}
    for name, times in (("idle", idle), ("beside streams", beside)):
        steps = statistics.quantiles(times, n=100)
        found |= {f"{name}: requests": len(times), f"{name}: p50": steps[49], f"{name}: p99": steps[98]}
    found["p99 ratio"] = found["beside streams: p99"] / found["idle: p99"]
    return found


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    while server.poll() is None:
        with suppress(OSError), closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as one:
            one.request("GET", "/health")
            if one.getresponse().status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError("the server ended before it answered")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of short requests, idle and beside streams each")
    parser.add_argument("--vllm", help="interpreter of an environment that has vLLM")
    asked = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny(Path(folder) / "model", SIZE, padded_vocabulary=VOCABULARY)
        port = free_port("127.0.0.1")
        ours = [sys.executable, *FOVEATE, str(model), "--name", "demo", "--port", str(port), "--no-key"]
        found["foveate"] = measure([*ours, "--threads", "1"], port, asked.seconds, {})
        if asked.vllm:
            port = free_port("127.0.0.1")
            theirs = [asked.vllm, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
            theirs += ["--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "4096"]
            found["vllm"] = measure(theirs, port, asked.seconds, WITHOUT_STOP)
            found["ratio"] = {"throughput": found["foveate"]["throughput"] / found["vllm"]["throughput"]}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
