"""Rollouts from vLLM: `vllm serve` processes in an environment of their own, driven over HTTP.

Prompts go in as token ids with every image expanded, and images as the tiles that the trainer sees: vLLM neither
tokenises nor resizes anything. The endpoint is vLLM's own for tokens in and tokens out, the weights come by its own
weight-transfer API; foveate adds a small plug-in (`plugin.py`), and nothing of vLLM is imported here.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from msgspec import msgpack
from torch import Tensor

from foveate.encoding.family import NO_PREFIXES, Family, ServedAs
from foveate.errors import ConfigError
from foveate.models.families import served_as
from foveate.models.policy import Policy
from foveate.records import Answer, Prompt, SamplingParams
from foveate.rollout.engine import Request
from foveate.rollout.native.cache import cached_numbers
from foveate.rollout.server.adapters import (
    AdapterTransfer,
    SeparateAdapters,
    adapter_name,
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
from foveate.rollout.server.weights import TRANSFER_S, Bucket, handles, plan_buckets, served_weights

_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes for weights, caches and sleep
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # those for adapters
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the plug-in's log-probs are those of the other one
    "HF_HUB_OFFLINE": "1",
}
_ON_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # or every server takes the first core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler and worker in one process: half the time to start
    "TORCH_COMPILE_DISABLE": "1",
}
_TELL_EXPERTS = ("--enable-return-routed-experts", "--no-async-scheduling")
"""It was not tried with steps that begin before the tokens of the one before are counted."""
_ASK_PLUGIN = {"FOVEATE_TELL_EXPERTS": "1"}
"""What has the plug-in join vLLM's recorder of experts; without it vLLM's runner stays as it is."""
GENERATE = "/inference/v1/generate"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The sizes that vLLM has for adapters."""
_RAW = 3
"""vLLM's MessagePack extension type for the bytes of a tensor."""


class VLLMEngine(ServedEngine):
    """The `Engine` seam on vLLM servers that start with random weights and get the trainer's by `publish`.

    The model is always served in the Hugging Face layout, whatever layout the policy came in: only its small files are
    written for the server, and the published names are those of the module in memory, which vLLM knows.
    """

    SALT = "cache_salt"
    """The field of a request that keeps prefixes of different versions apart."""

    def __init__(
        self,
        policy: Policy,
        decode: Callable[[tuple[int, ...]], str],
        *,
        version: int = 0,
        program: str = "vllm",
        longest: int | None = None,
        servers: int = 1,
        tensor_parallel: int = 1,
        device: str | None = None,
        memory_fraction: float | None = None,
        memory_mb: int | None = None,
        devices: list[str] | None = None,
        shared: bool = False,
        transfer: Literal["broadcast", "ipc", "disk"] = "broadcast",
        bucket_mb: int = 64,
        adapters: AdapterTransfer = "auto",
        record_experts: bool = False,
        start_s: float = 600.0,
        stall_s: float = 120.0,
        logs: str | None = None,
        arguments: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`program` is the `vllm` command of its environment; `longest` the tokens of prompt and answer together (None:
        as the model's configuration says); `device` where the server computes (None: where the policy is);
        `memory_fraction` the part of a GPU's memory to fill, `memory_mb` the key-value cache of one worker (None:
        vLLM's choice on GPUs; on CPUs 1 GB, or four of the longest); `devices` the GPUs of each server, such as
        ["4,5", "6,7"] (None: all see what the trainer sees, and weights travel through host memory); `shared` whether
        the server computes on the trainer's GPU and gives its memory back while the trainer learns, `memory_fraction`
        0.4 then; `transfer` how weights travel: by a broadcast, within a shared GPU by `ipc`, or through a temporary
        file, where that fails; `bucket_mb` bounds the memory that publishing takes here, by `ipc` but for the largest
        tensor (a server takes as much, and that one); `adapters` are `merged` into the weights, or travel as they are
        where vLLM applies them (auto); with `record_experts` answers tell the experts of their tokens; `arguments` and
        `environment` are added to its command line and variables; `logs` is its folder of output (None: temporary)."""
        self._served = _served(policy, record_experts)
        _require(program)
        super().__init__(
            "vllm", policy, decode, servers=servers, start_s=start_s, stall_s=stall_s, tensor_parallel=tensor_parallel,
            devices=devices, shared=shared, transfer=transfer, bucket_mb=bucket_mb, logs=logs,
        )  # fmt: skip
        plugin_file, group = Path(__file__).with_name("plugin.py"), "vllm.general_plugins"
        model, plugin = write_launch_files(self.folder, policy, self._served, plugin_file, "vllm", group)
        self._banned, self._routers = banned_ids(policy), told_layers(policy, record_experts)
        self.adapters = served_adapters(policy, "vllm", self._served, adapters, _RANKS[-1])
        on_cpu = (device or policy.device.type) == "cpu"
        self.environment = {**_ENVIRONMENT, **(_ON_CPU if on_cpu else {}), **(environment or {})}
        self.environment |= {"PYTHONPATH": python_path(plugin), **(_ASK_PLUGIN if record_experts else {})}
        self.command = [
            *(str(shutil.which(program)), "serve", str(model), "--host", HOST, "--port", PORT),
            *("--load-format", "dummy", "--dtype", dtype_name(next(policy.model.parameters()))),
            *("--tensor-parallel-size", str(tensor_parallel)),
            *("--weight-transfer-config", json.dumps({"backend": "foveate"}), "--enable-scale-out"),
            *(self._served.options + _adapter_options(self.adapters) + (_TELL_EXPERTS if record_experts else ())),
            *(_cpu_options(policy, longest, memory_mb) if on_cpu else _gpu_options(memory_fraction, shared, memory_mb)),
            *(("--max-model-len", str(longest)) if longest else ()),
            *(arguments or ()),
        ]
        self.start(version, served_weights(policy.model, self.adapters))

    # ------------------------------------------------------------------------------------------------------- the server

    def connect(self, server: Server) -> None:
        if self._transfer != "broadcast":
            nobody = {"host": "", "port": 0, "world_size": 0, "rank_offset": 0, "backend": "", "timeout_s": 0}
            server.call("POST", "/init_weight_transfer_engine", {"init_info": nobody}, timeout_s=self._stall_s)
            return
        sender = self.new_sender(server)
        where = {"host": HOST, "port": sender.port, "world_size": sender.world_size, "rank_offset": 1}
        init = {"init_info": {**where, "backend": sender.backend, "timeout_s": TRANSFER_S}}
        with meanwhile(server, "/init_weight_transfer_engine", init, TRANSFER_S):
            sender.connect("weights")

    def send(self, server: Server, version: int, weights: list[tuple[str, Tensor]]) -> None:
        """vLLM's order: pause, update, version, then what `pause` has not emptied, resume."""
        soon = {"timeout_s": self._stall_s}
        server.call("POST", "/pause?mode=abort&clear_cache=true", **soon)
        server.call("POST", "/start_weight_update", **soon)
        about = {} if self.adapters is None else {"adapter": _described(self.adapters, version)}
        if self._transfer == "disk":
            file = self._file.write(version, weights) / "model.safetensors"
            update = {"update_info": {"buckets": [], "file": str(file), **about}}
            server.call("POST", "/update_weights", update, timeout_s=TRANSFER_S)
        elif self._transfer == "ipc":
            buckets = plan_buckets(weights, self._bucket)
            for number, (bucket, handle) in enumerate(handles(buckets, self._policy.device)):
                update = {"buckets": [_announced(bucket)], "handle": handle, "number": number, **about}
                server.call("POST", "/update_weights", {"update_info": update}, timeout_s=TRANSFER_S)
        else:
            buckets = plan_buckets(weights, self._bucket)
            update = {"update_info": {"buckets": [*map(_announced, buckets)], **about}}
            with meanwhile(server, "/update_weights", update, TRANSFER_S):
                self._senders[server].send(buckets)
        server.call("POST", "/finish_weight_update", {"weight_version": str(version)}, timeout_s=TRANSFER_S)
        if self.adapters is not None:
            self._load_adapter(server, adapter_name(version))
        for cache in ("prefix", "mm", "encoder"):
            server.call("POST", f"/reset_{cache}_cache", **soon)
        server.call("POST", "/resume", **soon)

    def _load_adapter(self, server: Server, name: str) -> None:
        """Let requests name the adapter that has just come, and no other. vLLM keys prefixes by its name, too."""
        for former in loaded_adapters(server, self._stall_s):
            server.call("POST", "/v1/unload_lora_adapter", {"lora_name": former}, timeout_s=self._stall_s)
        adapter = {"lora_name": name, "lora_path": f"foveate:{name}"}  # what the plug-in holds under that name
        server.call("POST", "/v1/load_lora_adapter", adapter, timeout_s=TRANSFER_S)

    def abort(self, server: Server) -> None:
        server.call("POST", "/abort_requests", {}, timeout_s=10)

    def tokens_made(self, server: Server) -> float:
        return _counted(server, "(?:generation|prompt)_tokens")

    def tokens_cached(self, server: Server) -> float:
        return _counted(server, "prefix_cache_hits")

    def sleep_server(self, server: Server) -> None:
        level = 2 if self.adapters is None else 1  # 1: the weights, which are not published again, wait in host memory
        server.call("POST", f"/sleep?level={level}", timeout_s=self._stall_s)

    def wake_server(self, server: Server, what: Literal["weights", "kv_cache"]) -> None:
        server.call("POST", f"/wake_up?tags={what}", timeout_s=self._stall_s)

    # ----------------------------------------------------------------------------------------------------- the requests

    def read(self, server: Server, prompt: Prompt) -> tuple[int, ...]:
        body = self._body(Request(prompt, 0), SamplingParams(max_tokens=1))
        answer = server.call("POST", GENERATE, {**body, "return_token_ids": True}, timeout_s=TRANSFER_S)
        return tuple(answer["prompt_token_ids"])

    def ask(self, server: Server, request: Request, sampling: SamplingParams) -> tuple[Answer, ...]:
        alike = sampling.samples if sampling.temperature == 0 else 1  # vLLM gives one greedy answer
        body = self._body(request, replace(sampling, samples=sampling.samples // alike))
        choices = sorted(server.call("POST", GENERATE, body)["choices"], key=lambda choice: choice["index"]) * alike
        if len(choices) != sampling.samples or any(choice["finish_reason"] not in self.finishes for choice in choices):
            raise ServerLostError("an answer was cut off")
        answers = tuple(map(self._completion, choices))
        if not self._routers:
            return answers
        told = (None if one["routed_experts"] is None else _array(one["routed_experts"]) for one in choices)
        experts = [rows if rows is None else rows[:, self._routers] for rows in told]
        return with_told_experts(request.prompt, answers, experts)

    def _completion(self, choice: dict[str, Any]) -> Answer:
        token_ids = tuple(choice["token_ids"])
        logprobs = tuple(token["logprob"] for token in choice["logprobs"]["content"])
        version = min((int(span["version"]) for span in choice["weight_versions"]), default=self.version)
        return Answer.sampled(token_ids, logprobs, self._decode(token_ids), choice["finish_reason"], version)

    def _body(self, request: Request, sampling: SamplingParams) -> dict[str, Any]:
        version = str(self.version)
        params = {
            "n": sampling.samples,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": request.seed,
            "logprobs": 0,
            "logit_bias": dict.fromkeys(self._banned, BAN),
            "ignore_eos": True,  # answers end where the family says
            "stop_token_ids": list(self._policy.family.stop_ids),
            "detokenize": False,
        }
        body = {"token_ids": list(request.prompt.token_ids), "sampling_params": params, self.SALT: version}
        if self.adapters is not None:
            body["model"] = adapter_name(self.version)
        if request.prompt.pixels is not None:
            dtype = next(self._policy.model.parameters()).dtype
            body["features"] = image_features(self._policy.family, request.prompt, dtype, version)
        return body


def image_features(family: Family, prompt: Prompt, dtype: torch.dtype, version: str = "") -> dict[str, Any]:
    """The images of a prompt as the model eats them, `features` of a request. Their hashes name the weights, too:
    features of another version are never taken from a cache."""
    assert prompt.pixels is not None
    images = prompt.pixels.to(dtype).split([slot.tiles for slot in prompt.slots])
    places = [{"offset": slot.position, "length": slot.count} for slot in prompt.slots]
    fields = map(family.vllm_fields, images, prompt.slots)
    items = [_image_item(one, slot.tiles) for one, slot in zip(fields, prompt.slots, strict=True)]
    hashes = [hashlib.sha256(item + version.encode()).hexdigest() for item in items]
    data = [b64encode(item).decode() for item in items]
    return {"mm_hashes": {"image": hashes}, "mm_placeholders": {"image": places}, "kwargs_data": {"image": data}}


def _array(text: str) -> np.ndarray:
    """An array as vLLM writes it: base64 of the .npy format."""
    return np.load(io.BytesIO(b64decode(text)), allow_pickle=False)


def _counted(server: Server, counters: str) -> float:
    """The sum of the server's counters whose names match."""
    text = server.call("GET", "/metrics", timeout_s=10)
    return sum(map(float, re.findall(rf"^vllm:{counters}_total\{{.*?\}} (\S+)$", text, re.MULTILINE)))


def _served(policy: Policy, record_experts: bool) -> ServedAs:
    """How vLLM takes the policy's family. Raises ConfigError where it does not, or tells no experts of it."""
    served = served_as(policy.family, "vllm")
    if record_experts and NO_PREFIXES in served.options:
        raise ConfigError(
            "algorithm.router_replay: vLLM tells experts beside its cache of prefixes alone, but it serves "
            f"{policy.family.name} without; leave it out, or set rollout.engine=native"
        )
    return served


def _require(program: str) -> None:
    """Raise ConfigError where vLLM is not there."""
    if shutil.which(program) is None:
        raise ConfigError(
            f"engine vllm: no program {program!r}; install vLLM into an environment of its own "
            "(scripts/install_vllm_cpu.sh, or its documentation) and name its bin/vllm"
        )


def _described(adapters: SeparateAdapters, version: int) -> dict[str, Any]:
    """The name of an adapter and its configuration as peft has it, for the plug-in."""
    return {"name": adapter_name(version), "config": adapters.config}


def _adapter_options(adapters: SeparateAdapters | None) -> tuple[str, ...]:
    """One adapter at a time, in the layers that have one."""
    if adapters is None:
        return ()
    rank = next(rank for rank in _RANKS if rank >= adapters.rank)
    return ("--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank),
            "--lora-target-modules", *adapters.targets)  # fmt: skip


def _gpu_options(memory_fraction: float | None, shared: bool, memory_mb: int | None) -> tuple[str, ...]:
    share = memory_fraction or (DEFAULT_MEMORY_FRACTION if shared else None)
    return (
        *(("--gpu-memory-utilization", str(share)) if share else ()),
        *(("--enable-sleep-mode",) if shared else ()),
        *(_key_values(memory_mb) if memory_mb else ()),
    )


def _key_values(memory_mb: int) -> tuple[str, str]:
    return "--kv-cache-memory-bytes", str(memory_mb << 20)


def _cpu_memory(policy: Policy, longest: int | None) -> int:
    """MB of keys and values: 1,024, or room for four of the longest. vLLM would take nearly all memory of the host, and
    fill it by and by."""
    config: Any = policy.model.config
    tokens = 4 * longest if longest else config.get_text_config().max_position_embeddings
    size = cached_numbers(policy) * next(policy.model.parameters()).itemsize
    return max(1024, -(-size * tokens >> 20))


def _cpu_options(policy: Policy, longest: int | None, memory_mb: int | None) -> tuple[str, ...]:
    """Prompts in one piece: vLLM turns back the generator of a request whose prompt is only partly read, which
    generators of CPUs cannot do."""
    config: Any = policy.model.config
    tokens = longest or config.get_text_config().max_position_embeddings
    prompts = ("--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(8192, tokens)))
    return "--enforce-eager", *prompts, *_key_values(memory_mb or _cpu_memory(policy, longest))


def _image_item(fields: dict[str, tuple[Tensor, str]], entries: int) -> bytes:
    """The fields of one image of so many entries, as vLLM's MessagePack of a `MultiModalKwargsItem`: values by name,
    each with how the values of several images are joined."""
    joined = {
        "flat": {"slices": [[0, entries, None]], "dim": 0, "keep_on_cpu": False},
        "batched": {"keep_on_cpu": True},
        "shared": {"batch_size": 1, "keep_on_cpu": True},
    }
    return msgpack.encode(
        {name: {"data": _raw(tensor), "field": [how, joined[how]]} for name, (tensor, how) in fields.items()}
    )


def _raw(tensor: Tensor) -> list[Any]:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return [dtype_name(tensor), list(tensor.shape), msgpack.Ext(_RAW, data)]


def _announced(bucket: Bucket) -> tuple[int, list[tuple[str, str, list[int], int]]]:
    return bucket.size, [(name, dtype_name(tensor), list(tensor.shape), at) for name, tensor, at in bucket.tensors]
