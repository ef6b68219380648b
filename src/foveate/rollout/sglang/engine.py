"""Rollouts from SGLang: `sglang.launch_server` processes in an environment of their own, driven over HTTP.

SGLang knows InternVL in the GitHub layout only, and cuts images into other tiles than InternVL's own processor; so the
model's small files and the names of its weights are those of that layout, and images go in as the trainer's tiles or
patches.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import threading
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from foveate.errors import ConfigError, EngineError
from foveate.models.checkpoint.names import from_hf
from foveate.models.families import served_as
from foveate.models.policy import Policy
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.server.adapters import (
    AdapterTransfer,
    SeparateAdapters,
    adapter_name,
    is_matrix,
    loaded_adapters,
    served_adapters,
)
from foveate.rollout.server.engine import ServedEngine
from foveate.rollout.server.experts import told_layers, with_told_experts
from foveate.rollout.server.launch import (
    BAN,
    DEFAULT_MEMORY_FRACTION,
    banned_ids,
    dtype_name,
    python_path,
    write_launch_files,
)
from foveate.rollout.server.process import HOST, PORT, Server, ServerLostError, meanwhile
from foveate.rollout.server.weights import TRANSFER_S, plan_buckets, served_weights

_GROUP = "weights"
_ON_CPU = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--mm-attention-backend", "sdpa"),
    *("--sampling-backend", "pytorch", "--disable-overlap-schedule", "--disable-cuda-graph"),
    "--sleep-on-idle",  # or its scheduler keeps a core busy that the trainer needs
)
_CPU_ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "TORCH_COMPILE_DISABLE": "1"}
"""Compiling takes longer there than it saves."""


class SGLangEngine(ServedEngine):
    """The `Engine` seam on SGLang servers that start with random weights and get the trainer's by `publish`.

    The seeds of requests are not followed: SGLang's seeded sampling excludes top-p and top-k, and needs its kernels."""

    SALT = "extra_key"
    """The field of a request that keeps prefixes of different versions apart."""

    def __init__(
        self,
        policy: Policy,
        decode: Callable[[tuple[int, ...]], str],
        *,
        version: int = 0,
        program: str = "python",
        longest: int | None = None,
        servers: int = 1,
        tensor_parallel: int = 1,
        device: str | None = None,
        memory_fraction: float | None = None,
        cache_tokens: int | None = None,
        devices: list[str] | None = None,
        shared: bool = False,
        transfer: Literal["broadcast", "disk"] = "broadcast",
        bucket_mb: int = 64,
        adapters: AdapterTransfer = "auto",
        record_experts: bool = False,
        start_s: float = 600.0,
        stall_s: float = 120.0,
        logs: str | None = None,
        arguments: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`program` is the Python of SGLang's environment; `longest` the tokens of prompt and answer together (None: as
        the model's configuration says); `memory_fraction` the part of the device's memory for weights and key-value
        cache (None: 0.8, or 0.4 where it is `shared`), `cache_tokens` the size of that cache in tokens (None: as fits);
        the others are those of `foveate.rollout.vllm.engine.VLLMEngine`."""
        self._served = served_as(policy.family, "sglang")
        if shutil.which(program) is None:
            raise ConfigError(f"engine sglang: no program {program!r}; name the Python of an environment with SGLang")
        super().__init__(
            "sglang", policy, decode, servers=servers, start_s=start_s, stall_s=stall_s, devices=devices, shared=shared,
            tensor_parallel=tensor_parallel, transfer=transfer, bucket_mb=bucket_mb, logs=logs,
        )  # fmt: skip
        plugin_file = Path(__file__).with_name("plugin.py")
        model, plugin = write_launch_files(
            self.folder, policy, self._served, plugin_file, "sglang", "sglang.srt.plugins"
        )
        self._banned, self._routers = banned_ids(policy), told_layers(policy, record_experts)
        self.adapters = served_adapters(policy, "sglang", self._served, adapters)
        memory_fraction = memory_fraction or (DEFAULT_MEMORY_FRACTION if shared else 0.8)
        self._counters, self._cached, self._lock = dict[Server, Path](), Counter[Server](), threading.Lock()
        on_cpu = (device or policy.device.type) == "cpu"
        self.environment = {"HF_HUB_OFFLINE": "1", **(_CPU_ENVIRONMENT if on_cpu else {})}
        self.environment |= {**(environment or {}), "PYTHONPATH": python_path(plugin)}
        self.command = [
            *(str(shutil.which(program)), "-m", "sglang.launch_server", "--model-path", str(model)),
            *("--host", HOST, "--port", PORT),
            *("--load-format", "dummy", "--dtype", dtype_name(next(policy.model.parameters())), "--trust-remote-code"),
            *("--tp-size", str(tensor_parallel), "--mem-fraction-static", str(memory_fraction)),
            *("--grammar-backend", "none", "--skip-server-warmup", "--log-level", "warning"),
            *(_ON_CPU if on_cpu else ("--enable-memory-saver",) if shared else ()),
            *_model_options(self.adapters, record_experts, on_cpu, shared),
            *(("--context-length", str(longest)) if longest else ()),
            *(("--max-total-tokens", str(cache_tokens)) if cache_tokens else ()),
            *(arguments or ()),
        ]
        self.start(version, served_weights(policy.model, self.adapters))

    # --------------------------------------------------------------------------------------------------- the server

    def new_server(self, number: int, **environment: str) -> Server:
        counter = self.folder / f"tokens-{number}"
        counter.mkdir()
        server = super().new_server(number, FOVEATE_TOKENS=str(counter), **environment)
        self._counters[server] = counter
        return server

    def connect(self, server: Server) -> None:
        if self._transfer == "disk":
            return
        sender = self.new_sender(server)
        where = {"master_address": HOST, "master_port": sender.port, "world_size": sender.world_size, "rank_offset": 1}
        init = {**where, "group_name": _GROUP, "backend": sender.backend}
        with meanwhile(server, "/init_weights_update_group", init, TRANSFER_S):
            sender.connect(_GROUP, f"{_GROUP}/", f"{sender.device.type}/")  # where torch's own groups meet

    def send(self, server: Server, version: int, weights: list[tuple[str, Tensor]]) -> None:
        try:
            self._send(server, version, weights)
        except EngineError as error:  # what goes wrong with weights is a refusal here
            raise ServerLostError(str(error)) from error

    def _send(self, server: Server, version: int, weights: list[tuple[str, Tensor]]) -> None:
        self.abort(server)
        matrices = {name: tensor for name, tensor in weights if is_matrix(name)}
        own = [(self._served.weight_name(name), tensor) for name, tensor in weights if name not in matrices]
        named = [*single_experts(chat_weights(own) if self._served.layout == "chat" else own)]
        if not named:
            pass
        elif self._transfer == "disk":
            update = {
                "model_path": str(self._file.write(version, named)),
                "load_format": "auto",
                "weight_version": str(version),
            }
            _succeed(server.call("POST", "/update_weights_from_disk", update, timeout_s=TRANSFER_S))
        else:
            self._broadcast(server, version, named)
        if self.adapters is not None:
            self._load_adapter(server, version, matrices, self.adapters)
        server.call("POST", "/flush_cache", timeout_s=self._stall_s)

    def _broadcast(self, server: Server, version: int, named: list[tuple[str, Tensor]]) -> None:
        _succeed(server.call("POST", "/begin_weight_update", {}, timeout_s=self._stall_s))
        for bucket in plan_buckets(named, self._bucket):
            tensors = [tensor for _, tensor, _ in bucket.tensors]
            update = {
                "names": [name for name, _, _ in bucket.tensors],
                "dtypes": [dtype_name(tensor) for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
                "group_name": _GROUP,
                "weight_version": str(version),
                "load_format": "foveate",  # of the plug-in: a bucket with a trailer
            }
            with meanwhile(server, "/update_weights_from_distributed", update, TRANSFER_S):
                self._senders[server].send([bucket])
        _succeed(server.call("POST", "/end_weight_update", {}, timeout_s=TRANSFER_S))

    def _load_adapter(
        self, server: Server, version: int, matrices: dict[str, Tensor], adapters: SeparateAdapters
    ) -> None:
        """Put an adapter in place of the one before, each of its matrices compared by its checksum."""
        for former in loaded_adapters(server, self._stall_s):
            _succeed(server.call("POST", "/unload_lora_adapter", {"lora_name": former}, timeout_s=self._stall_s))
        held = {name: tensor.detach().cpu().clone() for name, tensor in matrices.items()}
        adapter = {
            "lora_name": adapter_name(version),
            "config_dict": adapters.config,
            "serialized_named_tensors": [b64encode(pickle.dumps(held)).decode()] * self._workers,
            "expected_checksums": {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in held.items()},
        }
        _succeed(server.call("POST", "/load_lora_adapter_from_tensors", adapter, timeout_s=TRANSFER_S))
        stamp = {"new_version": str(version), "abort_all_requests": False}
        _succeed(server.call("POST", "/update_weight_version", stamp, timeout_s=self._stall_s))

    def abort(self, server: Server) -> None:
        server.call("POST", "/abort_request", {"abort_all": True}, timeout_s=10)

    def tokens_made(self, server: Server) -> float:
        """As the plug-in counts them: SGLang itself does so in its metrics only, which need a second library."""
        return float(sum(int.from_bytes(file.read_bytes(), "little") for file in self._counters[server].iterdir()))

    def tokens_cached(self, server: Server) -> float:
        """As its answers say."""
        return float(self._cached[server])

    def sleep_server(self, server: Server) -> None:
        self.abort(server)
        tags = {"tags": ["kv_cache", "weights"]}
        server.call("POST", "/release_memory_occupation", tags, timeout_s=self._stall_s)

    def wake_server(self, server: Server, what: Literal["weights", "kv_cache"]) -> None:
        server.call("POST", "/resume_memory_occupation", {"tags": [what]}, timeout_s=self._stall_s)

    # ------------------------------------------------------------------------------------------------- the requests

    def read(self, server: Server, prompt: Prompt) -> tuple[int, ...]:
        """The token ids that were sent, if the server counts as many tokens: it does not show their ids."""
        sampling = SamplingParams(max_tokens=1)
        found = self._generate(server, Request(prompt, 0), sampling)[0]["meta_info"]["prompt_tokens"]
        return prompt.token_ids if found == len(prompt) else prompt.token_ids[:found]

    def ask(self, server: Server, request: Request, sampling: SamplingParams) -> tuple[Answer, ...]:
        answers = self._generate(server, request, sampling)
        if any(answer["meta_info"]["finish_reason"]["type"] not in self.finishes for answer in answers):
            raise ServerLostError("an answer was cut off")
        found = tuple(map(self._completion, answers))
        if not self._routers:
            return found
        told = (answer["meta_info"].get("routed_experts") for answer in answers)
        return with_told_experts(request.prompt, found, [text and self._experts(text) for text in told])

    def _experts(self, text: str) -> np.ndarray:
        """The experts (tokens, layers with a router, experts per token), of which SGLang tells the numbers one behind
        the other, of all layers."""
        model: Any = self._policy.model
        config = model.config.get_text_config()
        rows = np.frombuffer(b64decode(text), np.int32)
        return rows.reshape(-1, config.num_hidden_layers, config.num_experts_per_tok)[:, self._routers]

    def _completion(self, answer: dict[str, Any]) -> Answer:
        token_ids, about = tuple(answer["output_ids"]), answer["meta_info"]
        logprobs = tuple(entry[0] for entry in about["output_token_logprobs"])
        version = int(about["weight_version"])
        return Answer.sampled(token_ids, logprobs, self._decode(token_ids), about["finish_reason"]["type"], version)

    def _generate(self, server: Server, request: Request, sampling: SamplingParams) -> list[dict[str, Any]]:
        answers = server.call("POST", "/generate", self._body(request, sampling))
        answers = answers if isinstance(answers, list) else [answers]
        with self._lock:
            self._cached[server] += sum(answer["meta_info"]["cached_tokens"] for answer in answers)
        return answers

    def _body(self, request: Request, sampling: SamplingParams) -> dict[str, Any]:
        params = {
            "n": sampling.samples,
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "logit_bias": {str(token): BAN for token in self._banned},
            "stop_token_ids": list(self._policy.family.stop_ids),
            "skip_special_tokens": False,
        }
        version = str(self.version)
        body: dict[str, Any] = {
            "input_ids": list(request.prompt.token_ids),
            "sampling_params": params,
            "return_logprob": True,
            self.SALT: version,
        }
        if self._routers:
            body["return_routed_experts"] = True
        if self.adapters is not None:
            body["lora_path"] = adapter_name(self.version)
        if request.prompt.pixels is not None:
            images = self._images(request.prompt, version)
            body["image_data"] = images if sampling.samples == 1 else [images]  # several samples: a list of requests
        return body

    def _images(self, prompt: Prompt, version: str) -> list[str]:
        """The images as the model eats them and their places, for the plug-in. Their names hold the weights, too:
        features of another version are never taken from a cache."""
        assert prompt.pixels is not None
        dtype = next(self._policy.model.parameters()).dtype
        images = prompt.pixels.to(dtype).split([slot.tiles for slot in prompt.slots])
        items = []
        for image, slot in zip(images, prompt.slots, strict=True):
            fields = {name: _text(tensor) for name, tensor in self._policy.family.sglang_fields(image, slot).items()}
            digest = hashlib.sha256(json.dumps([fields, version]).encode()).digest()[:7]
            place = [slot.position, slot.position + slot.count - 1]
            items.append(json.dumps({"name": int.from_bytes(digest, "big"), "place": place, "fields": fields}))
        return items


def _model_options(
    adapters: SeparateAdapters | None, record_experts: bool, on_cpu: bool, shared: bool
) -> tuple[str, ...]:
    """Whether experts are told; and one adapter at a time, in the layers that have one. With adapters, a server that
    sleeps keeps its weights in host memory, since they are not published again."""
    experts = ("--enable-return-routed-experts",) if record_experts else ()
    if adapters is None:
        return experts
    return (
        *experts,
        *("--enable-lora", "--max-loras-per-batch", "1", "--max-lora-rank", str(adapters.rank)),
        *("--lora-target-modules", *adapters.targets, "--lora-strict-loading"),
        *(("--lora-backend", "torch_native") if on_cpu else ("--enable-weights-cpu-backup",) if shared else ()),
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def chat_weights(weights: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Weights by their names in transformers -> by those of the GitHub layout, fused where that fuses them."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights:
        target, part, _ = from_hf(name, "chat")
        parts.setdefault(target, {})[part] = tensor.detach()
    joined = (found[0] if len(found) == 1 else torch.cat([found[i] for i in sorted(found)]) for found in parts.values())
    return list(zip(parts, joined, strict=True))


def single_experts(weights: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights, the experts of a layer one by one, as checkpoints hold them: transformers has them in one tensor, a name
    that SGLang drops without a word."""
    for name, tensor in weights:
        base, _, last = name.rpartition(".")
        if not base.endswith(".experts") or last not in ("gate_up_proj", "down_proj"):
            yield name, tensor
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for number, expert in enumerate(tensor.detach()):
            for part, own in zip(parts, expert.chunk(len(parts)), strict=True):
                yield f"{base}.{number}.{part}.weight", own


def _text(tensor: Tensor) -> tuple[str, list[int], str]:
    """Type, shape and, as base64, the bytes of a tensor."""
    return dtype_name(tensor), list(tensor.shape), b64encode(_bytes(tensor)).decode()


def _succeed(answer: Any) -> None:
    if not answer["success"]:
        raise EngineError(f"the server refused new weights: {answer.get('message') or answer.get('error_message')}")
