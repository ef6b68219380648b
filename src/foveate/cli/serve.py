"""`foveate serve`: a model behind the HTTP interface that OpenAI's clients speak."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from foveate.cli.options import MOST_TOKENS, not_empty
from foveate.errors import ConfigError

if TYPE_CHECKING:
    from foveate.serve.native import ServeRequest

SERVER_KEY = "FOVEATE_API_KEY"

Device = Annotated[
    Literal["cpu", "cuda"] | None, typer.Option(help="Device of the native engine; a GPU if there is one.")
]
TokenBudget = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens that the native engine holds at a time; 32,768, or what fits on the GPU."),
]


def serve_command(
    model: Annotated[str, typer.Argument(help="Model folder, or demo.")],
    engine: Annotated[Literal["native", "vllm", "sglang"], typer.Option(help="What answers.")] = "native",
    host: Annotated[str, typer.Option(callback=not_empty, help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 (native engine only): any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name for clients; by default the folder's.")] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Ask for no API key.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer, in tokens.")] = 4096,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest prompt, with images.")] = 8192,
    max_tiles: Annotated[int | None, typer.Option(min=1, max=1000, help="Most tiles of an image (native).")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"] | None, typer.Option(help="Type of weights.")] = None,
    device: Device = None,
    token_budget: TokenBudget = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="CPU threads of the native engine.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name by which clients may call it.")] = None,
    engine_python: Annotated[str | None, typer.Option(help="Interpreter that has vLLM or SGLang.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices of vLLM or SGLang.")] = 1,
    memory_share: Annotated[float, typer.Option(min=0.05, max=1, help="Their share of the device memory.")] = 0.85,
    engine_argument: Annotated[list[str] | None, typer.Option(help="An argument for them, as it stands.")] = None,
) -> None:  # fmt: skip
    """Serve a model: /v1/chat/completions with images, /v1/models and /health, on this machine only by default.

    The API key is that of the environment variable FOVEATE_API_KEY, or a new one that is printed."""
    from foveate.log import print_result
    from foveate.serve.engines import EngineRequest, default_name, serve_engine
    from foveate.serve.hosts import LOCAL_HOSTS

    key = None if no_key else _server_key()
    if key is None and host not in LOCAL_HOSTS:
        raise ConfigError(f"--no-key with --host {host} would let everybody in; leave one of them out")
    chosen = name or default_name(model)

    def ready(address: str) -> None:
        if key is not None and SERVER_KEY not in os.environ:
            print_result(f"API key: {key}")
        print_result(f"Serving {chosen} at {address}")
        sys.stdout.flush()

    if engine == "native":
        _refuse(engine_python=engine_python, engine_argument=engine_argument)
        request_type, serve_native = _native()
        serve_native(
            request_type(
                model, chosen, host, port, key, max_prompt_tokens, max_tokens, max_tiles, dtype, device,
                token_budget, threads, tuple(allow_host or ()),
            ),
            ready,
        )  # fmt: skip
    else:
        _refuse(max_tiles=max_tiles, threads=threads, token_budget=token_budget, allow_host=allow_host)
        if port == 0:
            raise ConfigError(f"--port 0 is for the native engine; give {engine} a port")
        serve_engine(
            EngineRequest(
                engine, model, chosen, engine_python or sys.executable, host, port, key, dtype or "bfloat16",
                max_prompt_tokens + max_tokens, tensor_parallel, memory_share, tuple(engine_argument or ()),
            ),
            ready,
        )  # fmt: skip
    print_result("stopped")


def _native() -> tuple[type[ServeRequest], Callable[[ServeRequest, Callable[[str], None]], None]]:
    """The native server, whose HTTP library is optional."""
    try:
        from foveate.serve.native import ServeRequest, serve_native
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ConfigError(f"{error.name} is not installed; run pip install 'foveate[serve]'") from None
    return ServeRequest, serve_native


def _refuse(**unused: object) -> None:
    """Options that the chosen engine does not read."""
    for option, value in unused.items():
        if value is not None:
            raise ConfigError(f"--{option.replace('_', '-')} means nothing to the chosen --engine; leave it out")


def _server_key() -> str:
    """The key of the environment, or a new one. Raises ConfigError for an empty one, which is a mistake of a script."""
    key = os.environ.get(SERVER_KEY)
    if key is not None and not key.strip():
        raise ConfigError(f"{SERVER_KEY} is set and empty; set a key, unset it for a new one, or say --no-key")
    return key or secrets.token_urlsafe(24)
