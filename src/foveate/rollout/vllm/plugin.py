"""foveate's additions to the vLLM processes that it starts: weights and adapters by broadcast, the trainer's log-probs.

This file is copied beside each server (see `foveate.rollout.vllm.engine`), runs in vLLM's own environment, and imports
nothing of foveate. It is the only one that imports vLLM. Written for vLLM 0.32; the parity check at the start of a run
finds out where another version differs.
"""

# pyright: reportMissingImports=false, reportPrivateImportUsage=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import logging
import os
import pickle
from base64 import b64decode
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from types import SimpleNamespace
from typing import Any, get_type_hints
from weakref import WeakKeyDictionary

import numpy as np
import torch
from safetensors import safe_open
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform
from vllm.v1.sample.sampler import Sampler

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def register() -> None:
    """The entry point `vllm.general_plugins`, called once in every process of a server."""
    WeightTransferEngineFactory.register_engine("foveate", Receiver)
    _load_received_adapters()
    # vLLM warns of each layer without new weights: beside adapters most have none, else `Receiver` raises
    logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)
    _report_trainers_logprobs()
    if current_platform.is_cpu():
        _recur_in_float32()
    if "FOVEATE_TELL_EXPERTS" in os.environ:
        _tell_experts()


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Where the trainer, rank 0, waits ("": nowhere, weights come in files); `rank_offset` is the rank of the server's
    first worker. Over the backend gloo weights travel from and to the memory of the host."""

    host: str
    port: int
    world_size: int
    rank_offset: int
    backend: str
    timeout_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The buckets of an update: one (bytes, tensors as (name, dtype, shape, offset)) per bucket, in order; or one
    bucket and the `handle` of its memory on this GPU, and its number; or a safetensors file. `adapter`: the name and
    the configuration of the adapter whose matrices are among the tensors."""

    buckets: list[tuple[int, list[tuple[str, str, list[int], int]]]]
    file: str = ""
    handle: str = ""
    number: int = 0
    adapter: dict[str, Any] | None = None


@dataclass
class Adapter:
    """The adapter of the last update: matrices by name, in host memory, and their configuration as peft has it."""

    name: str
    config: dict[str, Any]
    matrices: dict[str, torch.Tensor]


ADAPTERS: WeakKeyDictionary[torch.nn.Module, Adapter] = WeakKeyDictionary()
"""By the model that they are for."""


class Receiver(WeightTransferEngine[InitInfo, UpdateInfo]):
    """The worker's end of `foveate.rollout.server.weights.Sender`: buckets of whole tensors, each checked before it is
    loaded."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    group: Any = None
    place: torch.device
    """Where buckets arrive."""
    missing: frozenset[str] = frozenset()
    """Parameters of the model that have not come yet since the update began."""
    is_proven = False
    """Whether every tensor of an update has found its place in the model."""
    is_reloading = False
    """Whether weights of the model itself have come since the update began."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        if not init_info.host:
            return
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        timeout = timedelta(seconds=init_info.timeout_s)
        store = TCPStore(init_info.host, init_info.port, is_master=False, timeout=timeout)
        prefixed = PrefixStore("weights", store)
        self.place = self.device if init_info.backend == "nccl" else torch.device("cpu")
        if init_info.backend == "nccl":
            from torch.distributed import ProcessGroupNCCL

            self.group = ProcessGroupNCCL(prefixed, rank, init_info.world_size, ProcessGroupNCCL.Options())
        else:
            self.group = ProcessGroupGloo(prefixed, rank, init_info.world_size, timeout)

    def start_weight_update(self) -> None:
        """All weights come, at least in the first update of a server; beside adapters, later those that have changed.
        A layer with an adapter is a base layer in one of its own, which loads weights by its own name."""
        comes_in_parts = self.is_proven and self.vllm_config.lora_config is not None
        names = () if comes_in_parts else (name for name, _ in self.model.named_parameters())
        self.missing = frozenset(name.replace(".base_layer.", ".") for name in names)
        self.is_reloading = False
        ADAPTERS.pop(self.model, None)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load bucket by bucket; the next is on its way while one is loaded."""
        if update_info.adapter is not None and self.model not in ADAPTERS:
            ADAPTERS[self.model] = Adapter(**update_info.adapter, matrices={})
        if update_info.file:
            with safe_open(update_info.file, "pt", device=str(self.device)) as file:
                self._take((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            return
        if update_info.handle:
            # a copy: the trainer fills that memory anew, and vLLM keeps tensors until it has all of a layer
            flat = _opened(update_info.handle, self.device).clone()
            torch.cuda.synchronize(self.device)
            self._load(flat, update_info.number, update_info.buckets[0][1])
            return
        coming = (self._begin(size, tensors) for size, tensors in update_info.buckets)
        ahead = next(coming, None)
        for number, (_, tensors) in enumerate(update_info.buckets):
            assert ahead is not None
            flat, works = ahead
            for work in works:
                work.wait()
            ahead = next(coming, None)
            self._load(flat, number, tensors)

    def _load(self, flat: torch.Tensor, number: int, tensors: list[tuple[str, str, list[int], int]]) -> None:
        """The tensors of a bucket, if it is the one of this number and as it was sent."""
        words = flat.view(torch.int64)
        found, sent, place = int(words[:-2].sum()), int(words[-2]), int(words[-1])
        if (found, number) != (sent, place):
            what = f"as number {place} with checksum {found}, not as {number} with {sent}"
            raise RuntimeError(f"the bucket of {tensors[0][0]} arrived {what}")
        self._take((name, _tensor(flat, *where)) for name, *where in tensors)

    def _take(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load weights, in the first update one by one: vLLM drops a tensor without a word where its model has no place
        for it, such as a bias. Raises RuntimeError for such a tensor."""
        own = self._without_matrices(weights)
        first = next(own, None)
        if first is None:
            return
        if not self.is_reloading:
            self.is_reloading = True
            _prepare_experts(self.model)
            initialize_layerwise_reload(self.model)
        if self.is_proven:
            self.missing -= self.model.load_weights(chain([first], own))
            return
        for name, tensor in chain([first], own):
            taken = self.model.load_weights([(name, tensor)])
            if not taken:
                raise RuntimeError(f"the {type(self.model).__name__} of vLLM has no place for {name}")
            self.missing -= taken

    def _without_matrices(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights of the model itself; the matrices of adapters are put aside."""
        for name, tensor in weights:
            if ".lora_" in name:
                ADAPTERS[self.model].matrices[name] = tensor.to("cpu", copy=True)
            else:
                yield name, tensor

    def _begin(self, size: int, tensors: list[tuple[str, str, list[int], int]]) -> tuple[torch.Tensor, list[Any]]:
        """A bucket with its trailer of 16 bytes on its way; the trailer of a lone tensor (`Bucket.alone` in
        `foveate.rollout.server.weights`) comes apart."""
        flat = torch.empty(size + 16, dtype=torch.uint8, device=self.place)
        alone = len(tensors) == 1 and _bytes(*tensors[0][1:3]) == size
        parts = (flat[:-16], flat[-16:]) if alone else (flat,)
        return flat, [self.group.broadcast(part, 0) for part in parts]

    def finish_weight_update(self) -> None:
        """Raises RuntimeError where a parameter of the model has not come: vLLM would go on with the old one."""
        if self.missing:
            raise RuntimeError(f"no weights came for {min(self.missing)} and {len(self.missing) - 1} more")
        if self.is_reloading:
            finalize_layerwise_reload(self.model, self.model_config)
            for layer in _tied_layers(self.model):
                layer.quant_method.process_weights_after_loading(layer)  # type: ignore[operator, union-attr]
        self.is_proven = True

    def shutdown(self) -> None:
        self.group = None


def _prepare_experts(model: torch.nn.Module) -> None:
    """Experts come as transformers holds them, (expert, out, in), which some checkpoints do not. And on CPUs vLLM packs
    them when it makes their kernel, but takes new ones of a layer that has a kernel as they are, so that the packed
    product is one of other matrices: without a kernel, it makes and packs it anew."""
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):
            layer.is_fused_checkpoint_transposed = False
            if current_platform.is_cpu():
                method: Any = layer.quant_method
                method.moe_kernel = None


def _tied_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that share a parameter, such as a head that is the embedding. vLLM loads it in one of them, and leaves
    the others with what they made of the old one: on CPUs, a packed copy."""
    layers = [(layer, {*map(id, layer.parameters(recurse=False))}) for layer in model.modules()]
    uses = Counter(parameter for _, own in layers for parameter in own)
    return [layer for layer, own in layers if any(uses[parameter] > 1 for parameter in own)]


def _load_received_adapters() -> None:
    """An adapter whose path begins with "foveate:" is the one that has come by the last update, instead of a folder:
    vLLM drops a matrix without a word where its model has no place for it."""
    plain = WorkerLoRAManager._load_adapter

    def load(self: WorkerLoRAManager, lora_request: LoRARequest) -> LoRAModel:
        if not lora_request.lora_path.startswith("foveate:"):
            return plain(self, lora_request)
        manager: Any = self._adapter_manager
        adapter = ADAPTERS.pop(manager.model, None)  # vLLM scales the matrices in place
        if adapter is None or adapter.name != lora_request.lora_name:
            raise RuntimeError(f"{lora_request.lora_name} is asked for, the last update had {adapter and adapter.name}")
        renamed = None
        with suppress(AttributeError):  # of a model that keeps the names
            renamed = manager.model.hf_to_vllm_mapper.get_rename_mapper()
        found = LoRAModel.from_lora_tensors(
            lora_request.lora_int_id,
            adapter.matrices,
            PEFTHelper.from_dict(adapter.config),
            device="cpu",
            dtype=self.lora_config.lora_dtype,
            weights_mapper=renamed,
        )
        nowhere = found.loras.keys() - {*manager.modules, *chain.from_iterable(manager.packed_modules.values())}
        if nowhere:
            raise RuntimeError(f"the {type(manager.model).__name__} of vLLM has no adapter in {min(nowhere)}")
        return found

    WorkerLoRAManager._load_adapter = load  # type: ignore[method-assign]


def _opened(handle: str, device: torch.device) -> torch.Tensor:
    """The trainer's memory on this GPU, whose number may be another here."""
    found = list(pickle.loads(b64decode(handle)))
    found[6] = device.index or 0
    return rebuild_cuda_tensor(*found)


def _tensor(flat: torch.Tensor, dtype_name: str, shape: list[int], offset: int) -> torch.Tensor:
    return flat[offset : offset + _bytes(dtype_name, shape)].view(DTYPES[dtype_name]).view(shape)


def _bytes(dtype_name: str, shape: list[int]) -> int:
    return DTYPES[dtype_name].itemsize * int(torch.Size(shape).numel())


def _report_trainers_logprobs() -> None:
    """Log-probs under softmax(logits / temperature) over the whole vocabulary, as a trainer computes them. vLLM has
    either the raw ones, which know no temperature, or the processed ones, in which bans, top-k and top-p have cut the
    vocabulary. The raw ones are taken, with the temperature (1 where greedy) put in."""
    plain = Sampler.forward

    def forward(self: Sampler, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        temperature = sampling_metadata.temperature
        if temperature is None or self.logprobs_mode != "raw_logprobs":
            return plain(self, logits, sampling_metadata, *args, **kwargs)
        divisor = torch.where(temperature < 1e-5, torch.ones_like(temperature), temperature)[:, None]
        self.compute_logprobs = lambda raw: Sampler.compute_logprobs(raw.float() / divisor)  # type: ignore[method-assign]
        try:
            return plain(self, logits, sampling_metadata, *args, **kwargs)
        finally:
            del self.compute_logprobs

    Sampler.forward = forward  # type: ignore[method-assign]


def _tell_experts() -> None:
    """With `--enable-return-routed-experts` answers say which experts their tokens were computed with. vLLM joins its
    recorder to its second model runner alone, which has another sampler, and kernels for it that CPUs lack: here the
    first one is joined to it."""
    if current_platform.is_cpu():
        import vllm.v1.worker.cpu.shm  # noqa: F401  (as vLLM's worker does, before the runner)
    from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    accept, prepare = VllmConfig._verify_aux_output_compatibility, GPUModelRunner.initialize_kv_cache
    execute, sample = GPUModelRunner.execute_model, GPUModelRunner.sample_tokens
    recorders: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def accepted(self: Any) -> None:
        second = VllmConfig.use_v2_model_runner
        VllmConfig.use_v2_model_runner = True
        try:
            accept(self)
        finally:
            VllmConfig.use_v2_model_runner = second

    def prepared(self: Any, kv_cache_config: Any, is_profiling: bool = False, **more: Any) -> None:
        prepare(self, kv_cache_config, is_profiling, **more)
        if self.vllm_config.aux_output_config.enabled and not is_profiling:
            recorders[self] = get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)

    def executed(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if self in recorders:
            recorders[self].begin_step(scheduler_output.aux_output_connector_metadata)
        return execute(self, scheduler_output, *args, **kwargs)

    def sampled(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in recorders or self.execute_model_state is None:
            return sample(self, *args, **kwargs)
        batch, scheduled = self.input_batch, self.execute_model_state.scheduler_output.num_scheduled_tokens
        ends = np.cumsum([0, *(scheduled[name] for name in batch.req_ids)])
        places = batch.num_computed_tokens_cpu[: len(batch.req_ids)].copy()
        about = SimpleNamespace(req_ids=batch.req_ids, query_start_loc_np=ends, num_computed_tokens_np=places)
        pending = recorders[self].prepare_output(about)
        output = sample(self, *args, **kwargs)
        if pending is not None:  # of the worker that answers
            tokens = np.array([len(ids) for ids in output.sampled_token_ids])
            pending.enqueue_cpu_copy(tokens, np.zeros_like(tokens))
            output.aux_output_connector_output = pending.process_output()
        return output

    VllmConfig._verify_aux_output_compatibility = accepted  # type: ignore[method-assign]
    GPUModelRunner.initialize_kv_cache = prepared  # type: ignore[method-assign]
    GPUModelRunner.execute_model, GPUModelRunner.sample_tokens = executed, sampled  # type: ignore[method-assign]


def _recur_in_float32() -> None:
    """On CPUs vLLM computes Gated DeltaNet (Qwen3.5) in bfloat16 alone; in other types, `_recur` does."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    plain = gdn_attention.cpu_gdn_attention_core

    def core(mixed_qkv: Any, b: Any, a: Any, core_attn_out: Any, layer_name: Any) -> None:
        context = gdn_attention.get_forward_context()
        if mixed_qkv.dtype == torch.bfloat16 or context.attn_metadata is None:
            return plain(mixed_qkv, b, a, core_attn_out, layer_name)
        layer = context.no_compile_layers[gdn_attention._resolve_layer_name(layer_name)]
        tails = layer.kv_cache[0].transpose(1, 2) if gdn_attention.is_conv_state_dim_first() else layer.kv_cache[0]
        return _recur(layer, context.attn_metadata[layer.prefix], tails, mixed_qkv, b.sigmoid(), a, core_attn_out)

    core.__annotations__ = {**get_type_hints(plain), "return": None}  # of which vLLM makes a schema
    gdn_attention.cpu_gdn_attention_core = core


def _recur(layer: Any, about: Any, tails: Any, mixed: Any, beta: Any, a: Any, out: Any) -> None:
    """The convolution and the gated delta rule (arXiv 2412.06464), one token after the other: rows (T, channels) and
    their gates (T, heads) to `out` (T, heads, width), from the states of each sequence to those that it leaves."""
    states = layer.kv_cache[1].view(*layer.kv_cache[1].shape[:2], layer.head_k_dim, layer.head_v_dim)
    decay = (-layer.A_log.exp() * functional.softplus(a + layer.dt_bias)).exp()[..., None, None]
    kernel, starts = layer.conv1d.weight[:, 0], about.non_spec_query_start_loc.tolist()
    for number, slot in enumerate(about.non_spec_state_indices_tensor[: len(starts) - 1].tolist()):
        if number >= about.num_decodes and not about.has_initial_state[number]:
            tails[slot], states[slot] = 0, 0
        rows, state = torch.cat([tails[slot], mixed[starts[number] : starts[number + 1]]]), states[slot]
        convolved = functional.silu((rows.unfold(0, kernel.shape[1], 1) * kernel).sum(-1))
        query, key, value = (part[0] for part in layer.rearrange_mixed_qkv(convolved))
        query, key = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + 1e-6) for part in (query, key))
        query, key = (part.repeat_interleave(value.shape[1] // part.shape[1], 1)[:, :, None] for part in (query, key))
        for t, (q, k, v) in enumerate(zip(query * query.shape[-1] ** -0.5, key, value, strict=True), starts[number]):
            state = state * decay[t]
            state = state + k.transpose(1, 2) * ((v[:, None] - k @ state) * beta[t, :, None, None])
            out[t] = (q @ state)[:, 0]
        tails[slot], states[slot] = rows[1 - kernel.shape[1] :], state
