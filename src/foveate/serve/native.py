"""The native engine as a server: load, listen, answer until told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
import uvicorn

from foveate.config.data import DataSettings
from foveate.config.model import ModelSettings
from foveate.encoding.dataset import build_encoder
from foveate.errors import ConfigError
from foveate.models.flash_routes import with_router
from foveate.models.policy import Policy, best_place, load_policy
from foveate.rollout.native.engine import NativeEngine, cache_tokens
from foveate.serve.app import Chat
from foveate.serve.batcher import Batcher
from foveate.serve.connections import BACKLOG, KEEP_ALIVE_S, Connection, most_connections
from foveate.serve.hosts import LOCAL_HOSTS

GRACE_S = 2
"""Seconds that connections get to take their last reply after the signal to stop, and the engine to end its step."""


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
    token_budget: int | None = None
    threads: int | None = None
    allow_hosts: tuple[str, ...] = ()
    max_connections: int = 1000

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """The names by which it may be called. A server for other machines has names that it cannot know, and a key."""
        return (self.host, *self.allow_hosts) if self.host in LOCAL_HOSTS else None


def serve_native(request: ServeRequest, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, and return when both the server and the engine have ended. `ready` is called once
    with the address of the API when the server answers. Raises ConfigError for an address that cannot be had, and for
    limits that the model or the memory has no room for."""
    listener = _listen(request.host, request.port)
    with listener:
        if request.threads is not None:
            torch.set_num_threads(request.threads)
        asked: dict[str, Any] = {"dtype": request.dtype, "device": request.device}
        policy = load_policy(request.model, **best_place() | {name: value for name, value in asked.items() if value})
        model = ModelSettings(path=request.model, max_tiles=request.max_tiles)
        data = DataSettings(train=(request.model,), max_prompt_tokens=request.max_prompt_tokens)
        encoder = with_router(build_encoder(policy.tokenizer, policy.family, model, data), policy)
        budget = cache_tokens(policy) if request.token_budget is None else request.token_budget
        _require_room(request, policy, budget)
        batcher = Batcher(NativeEngine(policy, encoder.decode), budget)
        chat = Chat(request.name, encoder, batcher, request.max_tokens, request.key, request.hosts)
        former = signal.signal(signal.SIGTERM, _interrupt)
        try:
            asyncio.run(
                _serve(_Server(_config(chat, request), chat), listener, lambda: ready(_address(request, listener)))
            )
        except KeyboardInterrupt:  # uvicorn has ended in good order and passes the signal on
            pass
        finally:
            signal.signal(signal.SIGTERM, former)
            chat.close()
            batcher.close(GRACE_S)


def _config(chat: Chat, request: ServeRequest) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # of what clients do wrong, they are told
    kind = type("Connection", (Connection,), {"most": most_connections(request.max_connections)})
    return uvicorn.Config(
        chat.app(), lifespan="off", access_log=False, log_config=None, http=kind, ws="none", backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=GRACE_S,
    )  # fmt: skip


class _Server(uvicorn.Server):
    """A server that answers what is under way with an error when it is told to stop."""

    def __init__(self, config: uvicorn.Config, chat: Chat) -> None:
        super().__init__(config)
        self._chat = chat

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._chat.stop()
        await super().shutdown(sockets)


async def _serve(server: uvicorn.Server, listener: socket.socket, ready: Callable[[], None]) -> None:
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.02)
    if server.started:
        ready()
    await serving


def _address(request: ServeRequest, listener: socket.socket) -> str:
    host = f"[{request.host}]" if ":" in request.host else request.host
    return f"http://{host}:{listener.getsockname()[1]}/v1"


def _require_room(request: ServeRequest, policy: Policy, budget: int) -> None:
    """Raises ConfigError for answers or prompts that no request could ever have."""
    config: Any = policy.model.config
    context = config.get_text_config().to_dict().get("max_position_embeddings", budget)
    rooms = ((context, "the model's context has"), (budget, "the engine holds (--token-budget)"))
    for option, tokens in (("--max-tokens", request.max_tokens), ("--max-prompt-tokens", request.max_prompt_tokens)):
        for room, whose in rooms:
            if tokens > room:
                raise ConfigError(f"{option} {tokens} is more than the {room} tokens that {whose}; give a smaller one")


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
