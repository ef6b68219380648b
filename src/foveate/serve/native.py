"""The native engine as a server: load, listen, answer until told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import torch
import uvicorn

from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.encoding.dataset import build_encoder
from foveate.errors import ConfigError
from foveate.models.policy import best_place, load_policy
from foveate.rollout.native.engine import NativeEngine
from foveate.serve.app import Chat
from foveate.serve.batcher import Batcher

GRACE = 5
"""Seconds that requests under way get after the signal to stop."""


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """The options of `foveate serve`; see its `--help`."""

    model: str
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    max_prompt_tokens: int = 8192
    max_tokens: int = 4096
    max_tiles: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None
    token_budget: int = 32_768
    threads: int | None = None


def serve_native(request: ServeRequest, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, and return when both the server and the engine have ended. `ready` is called once
    with the address of the API when the server answers. Raises ConfigError for an address that cannot be had."""
    listener = _listen(request.host, request.port)
    with listener:
        if request.threads is not None:
            torch.set_num_threads(request.threads)
        asked = {"dtype": request.dtype, "device": request.device}
        policy = load_policy(request.model, **best_place() | {name: value for name, value in asked.items() if value})
        model = ModelSettings(path=request.model, max_tiles=request.max_tiles)
        data = DataSettings(train=(request.model,), max_prompt_tokens=request.max_prompt_tokens)
        encoder = build_encoder(policy.tokenizer, policy.family, model, data)
        batcher = Batcher(NativeEngine(policy, encoder.decode, token_budget=request.token_budget))
        chat = Chat(request.name, encoder, batcher, request.max_tokens, request.key)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        config = uvicorn.Config(
            chat.app(), lifespan="off", access_log=False, log_config=None, timeout_graceful_shutdown=GRACE
        )
        address = f"http://{request.host}:{listener.getsockname()[1]}/v1"
        former = signal.signal(signal.SIGTERM, _interrupt)
        try:
            asyncio.run(_serve(uvicorn.Server(config), listener, lambda: ready(address)))
        except KeyboardInterrupt:  # uvicorn has ended in good order and passes the signal on
            pass
        finally:
            signal.signal(signal.SIGTERM, former)
            batcher.close()


async def _serve(server: uvicorn.Server, listener: socket.socket, ready: Callable[[], None]) -> None:
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    if server.started:
        ready()
    await serving


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket: taken before the model is loaded, so that a port in use is told at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port (0: any free one)"
        ) from error
    return listener


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
