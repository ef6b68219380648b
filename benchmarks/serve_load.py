"""`foveate serve` under load: short requests beside long ones, and throughput at many clients.

    python benchmarks/serve_load.py [--seconds 60] [--pairs 3] [--vllm PYTHON] [--json]

A random model of the size of benchmarks/generation.py in float32 on one thread. First the time of requests of 16 new
tokens, one after the other, on an idle server; then the same beside eight streams of 2,000 new tokens each, which begin
again when they end; last the tokens per second of 32 clients that each ask for 128. Both servers ignore stop tokens.
With `--vllm`, the interpreter of an environment that has vLLM, the same against vLLM's own server on the same weights:
the servers take turns at the 32 clients, and the ratio is that of each round (median, least, most). Seconds are of the
clock, where nothing else should run; tokens are also counted by the processor's, of all processes of a server. Prints
one JSON object.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from compare import vllm_python
from generation import SIZE, VOCABULARY
from peers.toy_sizes import sized
from soak_serve import PATH, body

from foveate.models.tiny import build_tiny
from foveate.rollout.server.process import free_port

LONG, STREAMS, SHORT = sized((2000, 8, 16), toy=(40, 2, 4))
CLIENTS, THROUGHPUT = sized((32, 128), toy=(3, 6))
SECONDS, WARM_UP = sized((60.0, 3.0), toy=(2.0, 0.5))
FOVEATE = ["-m", "foveate", "serve"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
VLLM = ["-m", "vllm.entrypoints.cli.main"]
VLLM_OPTIONS = [
    *("--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "4096"),
    *("--limit-mm-per-prompt", json.dumps({"video": 0})),  # or it asks for a token of videos
]
VLLM_ENVIRONMENT = {**ONE_THREAD, "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Load:
    """Clients of one server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.is_over = threading.Event()
        self.streamed = 0

    def _ask(self, text: str, tokens: int, **more: Any) -> http.client.HTTPConnection:
        one = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        content = json.dumps(body(text, tokens, ignore_eos=True, **more)).encode()
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
        while self.streamed < 5 * STREAMS:
            time.sleep(0.1)
        found = self.times(seconds)
        self.is_over.set()
        for stream in streams:
            stream.join()
        return found

    def many(self) -> int:
        """The new tokens of `CLIENTS` clients at once, two requests each."""
        counts: list[int] = []
        clients = [
            threading.Thread(target=lambda n=n: counts.extend(self.short(n + 100 * i, THROUGHPUT) for i in range(2)))
            for n in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert counts == [THROUGHPUT] * 2 * CLIENTS
        return sum(counts)


@contextmanager
def started(command: Sequence[str], port: int, environment: Mapping[str, str]) -> Iterator[int]:
    """A server that answers; its process."""
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ, **environment))
        try:
            _wait(server, port)
            yield server.pid
        except BaseException:
            log.seek(0)
            print(log.read()[-3000:])
            raise
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(30)


def latencies(port: int, seconds: float) -> dict[str, float]:
    Load(port).times(WARM_UP)
    idle = Load(port).times(seconds)
    beside = Load(port).times_beside_streams(seconds)
    time.sleep(2)
    found: dict[str, float] = {}
    for name, times in (("idle", idle), ("beside streams", beside)):
        steps = statistics.quantiles(times, n=100)
        found |= {f"{name}: requests": len(times), f"{name}: p50": steps[49], f"{name}: p99": steps[98]}
    found["p99 ratio"] = found["beside streams: p99"] / found["idle: p99"]
    return found


def throughput(port: int, pid: int) -> dict[str, float]:
    before, began = processor_seconds(pid), time.monotonic()
    tokens = Load(port).many()
    wall, busy = time.monotonic() - began, processor_seconds(pid) - before
    return {"tokens a second": tokens / wall, "tokens a processor second": tokens / busy}


def processor_seconds(pid: int) -> float:
    """Of a process and those below it, as far as they still run."""
    parents: dict[int, tuple[int, int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    found, ticks = [pid], 0
    for one in found:
        ticks += parents.get(one, (0, 0))[1]
        found += [child for child, (parent, _) in parents.items() if parent == one]
    return ticks / os.sysconf("SC_CLK_TCK")


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
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of short requests, idle and beside streams")
    parser.add_argument("--pairs", type=int, default=3, help="rounds of the 32 clients")
    parser.add_argument("--vllm", help="interpreter of an environment that has vLLM")
    parser.add_argument("--json", action="store_true", help="on one line, with vLLM's server")
    asked = parser.parse_args()
    program = asked.vllm or (vllm_python() if asked.json else None)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = build_tiny(Path(folder) / "model", SIZE, padded_vocabulary=VOCABULARY)
        settings = json.loads((model / "tokenizer_config.json").read_text())
        lent = {"video_token": settings["eos_token"]}  # vLLM asks for one, whatever the model knows
        (model / "tokenizer_config.json").write_text(json.dumps(settings | lent))
        ours = [sys.executable, *FOVEATE, str(model), "--name", "demo", "--no-key", "--threads", "1"]
        servers: dict[str, tuple[list[str], dict[str, str]]] = {"foveate": (ours, ONE_THREAD)}
        if program:
            theirs = [program, *VLLM, "serve", str(model), *VLLM_OPTIONS]
            servers["vllm"] = (theirs, VLLM_ENVIRONMENT)
        places: dict[str, tuple[int, int]] = {}
        for name, (command, environment) in servers.items():
            port = free_port("127.0.0.1")
            places[name] = port, stack.enter_context(started([*command, "--port", str(port)], port, environment))
        for name, (port, _) in places.items():
            found[name] = latencies(port, asked.seconds) if asked.seconds else {}
        rounds = [{name: throughput(*place) for name, place in places.items()} for _ in range(asked.pairs)]
        for measure in ("tokens a second", "tokens a processor second"):
            for name in places:
                found[name][measure] = statistics.median(each[name][measure] for each in rounds)
            if program:
                ratios = [each["foveate"][measure] / each["vllm"][measure] for each in rounds]
                found.setdefault("ratio", {})[measure] = statistics.median(ratios), min(ratios), max(ratios)
    shape = {"streams": STREAMS, "long": LONG, "short": SHORT, "clients": CLIENTS, "tokens": THROUGHPUT}
    whole = {"shape": shape, "rounds": asked.pairs, "servers": found}
    print(json.dumps(whole) if asked.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
