"""What `foveate generate` costs its own process: memory, and processor time per request.

    python benchmarks/client.py [--requests 2000] [--concurrency 256] [--delay 0.05]

A server in another process answers every request after a delay; each request carries a picture of a grounding scene.
Prints the processor time of the client per request, start-up excluded, and its peak memory (VmHWM) with and without.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import socket
import tempfile
import time
from pathlib import Path

from foveate.datasets.shapes import prepare_shapes
from foveate.evaluate.client import ClientSettings
from foveate.evaluate.generate import GenerateRequest, RowsRequest, run_generate
from foveate.records import SamplingParams


def serve(port: int, delay: float) -> None:
    """A server that reads a request, waits, and gives an answer of 19 tokens."""
    import asyncio

    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def models(_):
        return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "x"}]})

    async def complete(request):
        await request.body()
        await asyncio.sleep(delay)
        message = {"role": "assistant", "content": "<box>[[60,260,390,610]]</box>"}
        usage = {"prompt_tokens": 35, "completion_tokens": 19, "total_tokens": 54}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return JSONResponse(
            {"id": "c", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        )

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", complete, methods=["POST"])]
    uvicorn.run(Starlette(routes=routes), port=port, log_level="warning")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--delay", type=float, default=0.05)
    chosen = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port, chosen.delay), daemon=True)
    server.start()
    os.environ.setdefault("OPENAI_API_KEY", "none")
    with tempfile.TemporaryDirectory() as folder:
        prepare_shapes(Path(folder) / "data", {"test": chosen.requests}, side=224)
        source = (str(Path(folder) / "data" / "test.parquet"),)

        def ask(rows: int, out: str) -> tuple[float, float]:
            client = ClientSettings((f"http://127.0.0.1:{port}/v1",), concurrency=chosen.concurrency)
            request = GenerateRequest(
                RowsRequest(source, rows), Path(folder) / out, SamplingParams(1, 32, 0.0), client=client
            )
            processor, wall = time.process_time(), time.monotonic()
            run_generate(request)
            return time.process_time() - processor, time.monotonic() - wall

        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        start, _ = ask(1, "warm")
        before = peak_mb()
        processor, wall = ask(chosen.requests, "out")
        each = 1000 * (processor - start) / chosen.requests
        print(f"{chosen.requests} requests, {chosen.concurrency} at a time: {each:.2f} ms of processor time each")
        print(f"{wall:.1f} s, {chosen.requests / wall:.0f} requests/s; peak memory {before:.0f} -> {peak_mb():.0f} MB")
    server.terminate()


if __name__ == "__main__":
    main()
