"""foveate's additions to the SGLang processes that it starts: images over HTTP, tied embeddings, buckets with
checksums, the trainer's log-probs, counted tokens.

This file is copied beside each server (see `foveate.rollout.sglang.engine`), runs in SGLang's own environment, and
imports nothing of foveate. It is the only one that imports SGLang. Written for SGLang 0.5.23; the parity check at the
start of a run finds out where another version differs.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import mmap
import os
from base64 import b64decode
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.internvl import InternVLChatConfig
from sglang.srt.layers.logprob_processor import OutputLogprobProcessor
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.mem_cache.pool_host import common
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.models.internvl import InternVLChatModel
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.int64)}


def register() -> None:
    """The entry point `sglang.srt.plugins`, called once in every process of a server."""
    _take_images()
    _tie_embeddings()
    _check_buckets()
    _report_trainers_logprobs()
    _keep_experts_without_cuda()
    _adapt_the_language_model()


def _take_images() -> None:
    """The images of a prompt come as base64 in text, for over HTTP SGLang takes pictures as text only. Each is an item
    with a name and a place of its own: where SGLang is given features itself, all images of a request are one item, and
    an image that is added changes the name of those before it, which are then not found in the cache of prefixes."""

    plain = BaseMultimodalProcessor.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        async def process(*_: Any, image_data: list[str], input_text: list[int], **__: Any) -> Any:
            items = [_item(**json.loads(text)) for text in image_data]
            positions, delta = self.compute_mrope_positions(input_text, items)
            return MultimodalProcessorOutput(
                input_ids=input_text,
                padded_input_ids=MultimodalProcessorOutput.build_padded_input_ids(input_text, items),
                mm_items=items,
                mrope_positions=positions,
                mrope_position_delta=delta,
            )

        plain(self, *args, **kwargs)
        self.process_mm_data_async = process

    BaseMultimodalProcessor.__init__ = init


def _item(*, name: int, place: list[int], fields: dict[str, Any]) -> MultimodalDataItem:
    tensors = {name: _tensor(*field) for name, field in fields.items()}
    feature = tensors.pop("feature")
    offsets = [(place[0], place[1])]
    item = MultimodalDataItem(modality=Modality.IMAGE, feature=feature, offsets=offsets, model_specific_data=tensors)
    item.set_hash(name)
    return item


def _tensor(dtype: str, shape: list[int], data: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(b64decode(data)), dtype=DTYPES[dtype]).view(shape)


def _tie_embeddings() -> None:
    """The head of an InternVL or a mixture is the embedding where config.json says so: SGLang takes none to be."""
    plain, plain_mixture = InternVLChatConfig.__init__, Qwen3MoeForCausalLM.__init__

    def init(self: Any, *args: Any, llm_config: Any = None, **kwargs: Any) -> None:
        plain(self, *args, llm_config=llm_config, **kwargs)
        is_tied = bool(llm_config) and llm_config["tie_word_embeddings"]
        self.tie_word_embeddings = self.llm_config.tie_word_embeddings = is_tied

    def init_mixture(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain_mixture(self, config, *args, **kwargs)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    InternVLChatConfig.__init__ = init
    Qwen3MoeForCausalLM.__init__ = init_mixture


def _check_buckets() -> None:
    """Weights come in buckets of `foveate.rollout.server.weights`, each with a trailer that is compared before it is
    loaded."""
    plain = WeightUpdater.receive_weights_from_distributed

    def receive(self: Any, *, load_format: Any = None, **about: Any) -> Any:
        if load_format != "foveate":
            return plain(self, load_format=load_format, **about)
        names, dtypes, shapes = about["names"], about["dtypes"], about["shapes"]
        sizes = [DTYPES[name].itemsize * torch.Size(shape).numel() for name, shape in zip(dtypes, shapes, strict=True)]
        places = [*accumulate((-(-size // 16) * 16 for size in sizes), initial=0)]
        group = self._model_update_group[about["group_name"]]
        device = self.device if torch.distributed.get_backend(group) == "nccl" else "cpu"
        flat = torch.empty(places[-1] + 16, dtype=torch.uint8, device=device)
        for part in (flat[:-16], flat[-16:]) if sizes == places[1:] else (flat,):  # a lone tensor has its trailer apart
            torch.distributed.broadcast(part, 0, group=group)
        words = flat.view(torch.int64)
        found, sent = int(words[:-2].sum()), int(words[-2])
        if found != sent:
            raise RuntimeError(f"the bucket of {names[0]} arrived with checksum {found}, not {sent}")
        pieces = [flat[place : place + size] for place, size in zip(places, sizes, strict=False)]
        return [(n, p.view(DTYPES[d]).view(s)) for n, p, d, s in zip(names, pieces, dtypes, shapes, strict=True)]

    WeightUpdater.receive_weights_from_distributed = receive


def _report_trainers_logprobs() -> None:
    """Log-probs under softmax(logits / temperature) over the whole vocabulary, as a trainer computes them, where SGLang
    reports those after the bias that bans tokens. The logits are seen before it."""
    plain_bias, plain_report = SamplingBatchInfo.apply_logits_bias, OutputLogprobProcessor.compute_logprobs
    seen: list[torch.Tensor] = []
    count = _counter()

    def bias(self: Any, logits: torch.Tensor) -> None:
        count(len(logits))
        seen[:] = [torch.log_softmax(logits.float() / self.temperatures, -1)]
        plain_bias(self, logits)

    def report(self: Any, logprobs: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain_report(self, seen[0] if seen else logprobs, *args, **kwargs)

    SamplingBatchInfo.apply_logits_bias = bias
    OutputLogprobProcessor.compute_logprobs = report


def _counter() -> Callable[[int], None]:
    """Adds to this process's count of sampled tokens, 8 bytes in a file of the folder FOVEATE_TOKENS. Of the workers of
    one server, which all sample the same, the first counts."""
    shared: list[mmap.mmap] = []

    def add(tokens: int) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        if not shared:
            path = Path(os.environ["FOVEATE_TOKENS"]) / str(os.getpid())
            path.write_bytes(bytes(8))
            with path.open("r+b") as file:
                shared.append(mmap.mmap(file.fileno(), 8))
        shared[0][:8] = (int.from_bytes(shared[0][:8], "little") + tokens).to_bytes(8, "little")

    return add


def _keep_experts_without_cuda() -> None:
    """The memory in which SGLang keeps the experts of tokens is made known to CUDA, also where there is none."""
    if not torch.accelerator.is_available():
        common._cuda_host_register = lambda *_: None


def _adapt_the_language_model() -> None:
    """SGLang's InternVL says neither that adapters are of its language model nor which configuration that has."""
    InternVLChatModel.should_apply_lora = lambda _, name: name.startswith("language_model.")
    plain = InternVLChatConfig.get_text_config  # for a configuration that is being made
    InternVLChatConfig.get_text_config = lambda self, *_, **__: vars(self).get("llm_config") or plain(self)
