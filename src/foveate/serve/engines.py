"""vLLM and SGLang behind `foveate serve`: their command lines, and a server process from its start to its end.

They live in an environment of their own, since each pins its own torch; `python` is the interpreter of that one.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from foveate.errors import ConfigError, EngineError
from foveate.rollout.server.process import Server

EngineName = Literal["vllm", "sglang"]
INSTALL = {"vllm": "pip install vllm", "sglang": "pip install 'sglang[all]'"}
_GRACE_S = 4.0
"""Seconds that an engine gets to stop by itself."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A server of another project. `more` are arguments of its own, put at the end of its command line."""

    engine: EngineName
    model: str
    name: str
    python: str
    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = None
    dtype: str = "bfloat16"
    context: int = 40_960
    tensor_parallel: int = 1
    memory_share: float = 0.85
    more: tuple[str, ...] = field(default=())


def command(request: EngineRequest) -> list[str]:
    """The command line that starts the engine; it does not hold the key where the engine can read it otherwise."""
    if request.engine == "vllm":
        flags = {
            "--model": request.model, "--served-model-name": request.name, "--host": request.host,
            "--port": request.port, "--dtype": request.dtype, "--max-model-len": request.context,
            "--tensor-parallel-size": request.tensor_parallel, "--gpu-memory-utilization": request.memory_share,
        }  # fmt: skip
        module = "vllm.entrypoints.openai.api_server"
    else:
        flags = {
            "--model-path": request.model, "--served-model-name": request.name, "--host": request.host,
            "--port": request.port, "--dtype": request.dtype, "--context-length": request.context,
            "--tp-size": request.tensor_parallel, "--mem-fraction-static": request.memory_share,
        }  # fmt: skip
        flags |= {"--api-key": request.key} if request.key else {}
        module = "sglang.launch_server"
    return [request.python, "-m", module, *(str(part) for flag in flags.items() for part in flag), *request.more]


def serve_engine(request: EngineRequest, ready: Callable[[str], None], timeout: float = 1800.0) -> None:
    """Start the engine, call `ready` with the address of its API when it answers, and stay until it ends or this
    process is told to; then the engine and its children are ended too.

    Raises ConfigError where the engine is not installed, EngineError where it ends by itself, or does not answer within
    `timeout` seconds.
    """
    _require_installed(request)
    key = {"VLLM_API_KEY": request.key} if request.key else {}
    server = Server(command(request), key, None, "/health", name=request.engine, host=request.host, port=request.port)
    former = signal.signal(signal.SIGTERM, _interrupt)
    try:
        server.start(timeout)
        ready(f"http://{request.host}:{request.port}/v1")
        code = server.wait()
        raise EngineError(f"{request.engine} ended by itself with code {code}; {server.last_words()}")
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, former)
        server.kill(_GRACE_S)


def _require_installed(request: EngineRequest) -> None:
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({request.engine!r}) is None)"
    try:
        found = subprocess.run([request.python, "-c", look], capture_output=True).returncode == 0
    except OSError as error:
        raise ConfigError(f"--engine-python {request.python} cannot be run: {error.strerror or error}") from error
    if not found:
        raise ConfigError(
            f"{request.engine} is not installed for {request.python}; install it in an environment of its own "
            f"(python -m venv ENV; ENV/bin/{INSTALL[request.engine]}) and give --engine-python ENV/bin/python, "
            "or use --engine native"
        )


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def default_name(model: str) -> str:
    """The name that a model is served under: that of its folder."""
    return Path(model).resolve().name if Path(model).exists() else model
