"""A judge that takes half a second for each answer: a step's answers at once, against one after the other.

    python benchmarks/judge.py [--answers 2000] [--seconds 0.5] [--alone 10]

The judge is a server in a thread of this process. `--alone` answers are judged one after the other, and their mean is
taken for all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
import time
from contextlib import suppress

from foveate.records import Message, Task
from foveate.rewards.build import build_reward
from foveate.rewards.pool import Graders

TASK = Task("t", "vqa", (Message("user", "How many?"),), (), "seven", {}, "row 1")


class Judge(threading.Thread):
    """A server of chat completions that thinks for `seconds` about each request."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self._seconds, self._ready = seconds, threading.Event()
        self.start()
        self._ready.wait()

    def run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        self._ready.set()
        await server.serve_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # the client has closed the connection
            await self._answer_all(reader, writer)
        writer.close()

    async def _answer_all(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        message = {"role": "assistant", "content": "score: 5"}
        body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        while not reader.at_eof():
            lines = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in lines.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            await asyncio.sleep(self._seconds)
            writer.write(head + body)
            await writer.drain()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--alone", type=int, default=10)
    parser.add_argument("--concurrency", type=int, default=64)
    options = parser.parse_args()
    settings = {"url": Judge(options.seconds).url, "model": "m", "concurrency": options.concurrency}
    alone = build_reward("judge", settings)
    alone("warm up", TASK)
    begin = time.monotonic()
    for number in range(options.alone):
        assert alone(f"alone {number}", TASK).value == 0.5
    each = (time.monotonic() - begin) / options.alone
    with Graders("judge", settings) as graders:
        begin, used = time.monotonic(), time.process_time()
        scores = graders.grade_many([(f"answer {number}", TASK) for number in range(options.answers)])
        together, used = time.monotonic() - begin, time.process_time() - used
    assert all(score.value == 0.5 for score in scores)
    ratio = each * options.answers / together
    print(f"one after the other {each:.3f} s each; {options.answers} at once in {together:.1f} s: {ratio:.1f} times")
    print(f"processor time {1e3 * used / options.answers:.1f} ms for each")


if __name__ == "__main__":
    main()
