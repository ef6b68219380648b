"""`foveate serve` under mixed traffic: its memory, open files and threads, and the time of a short request.

    python benchmarks/soak_serve.py [--minutes 30] [--clients 6] [--model demo]

Each client sends one request after the other: short ones, long ones as a stream, images of up to 4 megapixels, streams
that are abandoned, bodies that are malformed or larger than allowed, and connections that say nothing. Any status of
500 or more but 503 counts as a failure. Prints a line a minute, and at the end the memory at minute 5 and at the end,
and the 50th and 99th percentile of the short requests.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import PIL.Image

PATH = "/v1/chat/completions"


def picture(side: int) -> str:
    file = io.BytesIO()
    PIL.Image.effect_noise((side, side), 40).convert("RGB").save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def body(text: str, max_tokens: int, image: str | None = None, **more: Any) -> dict[str, Any]:
    content: Any = text
    if image is not None:
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    return {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens, **more}


MALFORMED = (
    b"", b"{", b"[]", b"\xff\xfe", b"[" * 10_000, json.dumps(body("a", 2) | {"n": True}).encode(),
    json.dumps(body("a", 2) | {"messages": []}).encode(), json.dumps(body("a", 2) | {"tools": [1]}).encode(),
    json.dumps(body("a" * 300_000, 2)).encode(), json.dumps(body("a", 2, "data:image/png;base64,AAAA")).encode(),
    json.dumps(body("a", 2, "http://127.0.0.1:1/x.png")).encode(),
)  # fmt: skip


class Traffic:
    """What the clients have seen so far."""

    def __init__(self, port: int, pictures: list[str]) -> None:
        self.port, self.pictures = port, pictures
        self.statuses: dict[str, Counter[str]] = {}
        self.short: list[float] = []
        self.is_over = threading.Event()
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        choice = random.Random(seed)
        kinds = {
            self.ask_short: 6,
            self.ask_long: 1,
            self.ask_image: 2,
            self.abandon: 2,
            self.malformed: 3,
            self.idle: 1,
        }
        while not self.is_over.is_set():
            [kind] = choice.choices([*kinds], [*kinds.values()])
            began = time.monotonic()
            try:
                found = str(kind(choice))
            except (OSError, http.client.HTTPException) as error:
                found = type(error).__name__
            with self._lock:
                self.statuses.setdefault(kind.__name__, Counter())[found] += 1
                if kind == self.ask_short and found == "200":
                    self.short.append(time.monotonic() - began)

    def post(self, content: bytes) -> int:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as one:
            one.request("POST", PATH, content, {"Content-Type": "application/json"})
            reply = one.getresponse()
            reply.read()
            return reply.status

    def ask_short(self, choice: random.Random) -> int:
        return self.post(json.dumps(body(f"What is {choice.randrange(1000)}?", 8)).encode())

    def ask_long(self, choice: random.Random) -> int:
        return self.post(json.dumps(body("Count " * choice.randrange(1, 300), 400, stream=True, n=2)).encode())

    def ask_image(self, choice: random.Random) -> int:
        return self.post(json.dumps(body("Where?", 16, choice.choice(self.pictures))).encode())

    def abandon(self, choice: random.Random) -> int:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)) as one:
            image = choice.choice([None, *self.pictures])
            one.request("POST", PATH, json.dumps(body("Tell", 1000, image, stream=True)).encode())
            reply = one.getresponse()
            reply.read(choice.randrange(1, 2000))
            return reply.status

    def malformed(self, choice: random.Random) -> int:
        if choice.random() < 0.3:  # larger than allowed, by its header
            with socket.create_connection(("127.0.0.1", self.port), timeout=60) as one:
                one.sendall(f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**10}\r\n\r\n".encode())
                one.sendall(b"a" * 10_000)
                return int(one.recv(1000).split(b" ")[1])
        return self.post(choice.choice(MALFORMED))

    def idle(self, choice: random.Random) -> str:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as one:
            one.sendall(
                choice.choice([b"", b"GET /health HTTP", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"])
            )
            time.sleep(choice.uniform(0, 2))
        return "left"


def state_of(pid: int) -> dict[str, int]:
    """Memory in MiB, open files and threads of a process."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"MiB": int(lines["VmRSS"].split()[0]) // 1024, "files": files, "threads": int(lines["Threads"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--model", default="demo")
    asked = parser.parse_args()
    command = [sys.executable, "-m", "foveate", "serve", asked.model, "--name", "demo", "--port", "0", "--no-key"]
    server = subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    port = int(server.stdout.readline().rpartition(":")[2].split("/")[0])
    traffic = Traffic(port, [picture(side) for side in (64, 200, 448, 1000, 2000)])
    clients = [threading.Thread(target=traffic.client, args=(seed,), daemon=True) for seed in range(asked.clients)]
    for client in clients:
        client.start()
    states, begin = [state_of(server.pid)], time.monotonic()
    while time.monotonic() - begin < 60 * asked.minutes and server.poll() is None:
        time.sleep(60 * min(1, asked.minutes))
        states.append(state_of(server.pid))
        print(f"minute {len(states) - 1}: {states[-1]}, {len(traffic.short)} short requests", flush=True)
    traffic.is_over.set()
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(300)  # it answers what it has begun
    for kind, found in sorted(traffic.statuses.items()):
        print(kind, dict(found))
    if len(traffic.short) > 1:
        steps = statistics.quantiles(traffic.short, n=100)
        print(f"short requests: {len(traffic.short)}, 50 % within {steps[49]:.3f} s, 99 % within {steps[98]:.3f} s")
    early, late = states[min(5, len(states) - 1)], states[-1]
    print(f"at minute 5: {early}, at the end: {late}, {late['MiB'] / early['MiB'] - 1:+.1%}")
    failed = [one for found in traffic.statuses.values() for one in found if one[0] == "5" and one != "503"]
    sys.exit(bool(failed) or server.returncode != 0)


if __name__ == "__main__":
    main()
