"""Checkpoint folders in and out: a Policy is a model with everything that turns tasks into its tokens and back."""

from __future__ import annotations

import ctypes
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from foveate.config.base import has_gpu
from foveate.encoding.family import Family, Features
from foveate.errors import DataError
from foveate.models.attention.gated_delta_net import replace_layers
from foveate.models.attention.kernels import KERNELS
from foveate.models.checkpoint.configs import with_dtype
from foveate.models.checkpoint.convert import write_hf_weights_as, write_other_files
from foveate.models.checkpoint.formats import hf_state_dict, hf_tensors, read_config, require_finite, require_fit
from foveate.models.checkpoint.inspect import ModelFolder, inspect_model_folder
from foveate.models.checkpoint.names import CheckpointFormat
from foveate.models.checkpoint.safetensors_io import add_weights, read_headers, weight_files
from foveate.models.checkpoint.small_files import quiet_transformers, unreadable, write_json
from foveate.models.flash import internvl_class
from foveate.models.matmul import use_fast_linear
from foveate.models.norms import use_fast_norms
from foveate.models.quantize import Quantization, quantize_layers
from foveate.models.sizes import meta_model
from foveate.records import ImageSource

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNREADABLE = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, ArithmeticError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for folders that are damaged or contradict themselves."""
_UNTRAINED = "model-untrained.safetensors"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BYTES = 1 << 26
"""Freed memory that a process keeps for its next buffers: much less than what untrusted templates are given."""
_FILES = {"use_safetensors": True, "local_files_only": True}


class KnownFeatures(Protocol):
    """Features of images that need not be computed again (`foveate.models.features`)."""

    def of(self, policy: Policy, images: Sequence[ImageSource]) -> Features:
        """Those of some images, one after the other, as `Family.features` gives them."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """A model on one device, its tokenizer, its family, the folder that it came from, and the layout of that folder.
    `features`: where those of images are kept that a frozen tower sees."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    family: Family
    folder: Path
    format: CheckpointFormat
    features: KnownFeatures | None = None

    def part(self, name: str) -> nn.Module:
        """The submodule `vision`, `projector`, `language` or `head`."""
        return self.model.get_submodule(self.family.parts[name][0])

    def tensors(self, name: str) -> list[str]:
        """The names of the tensors of that part."""
        return [f"{self.family.parts[name][0]}.{own}" for own in self.part(name).state_dict()]

    @property
    def is_meta(self) -> bool:
        """Whether the model has no memory yet (`foveate.models.sharded`)."""
        return self.device.type == "meta"

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        model: Any = self.model
        return self.part("head").weight is model.get_input_embeddings().weight

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def best_place() -> dict[str, Any]:
    """Device and dtype by default for a model that only answers: arguments of `load_policy`."""
    return {"device": "cuda", "dtype": "bfloat16"} if has_gpu() else {"device": "cpu", "dtype": "float32"}


def load_policy(
    path: str,
    *,
    attention: str = "auto",
    dtype: str = "float32",
    device: str = "cpu",
    quantization: Quantization | None = None,
) -> Policy:
    """Load a model folder of any family and layout, in evaluation mode; with a `quantization`, its linear layers frozen
    in few bits (`foveate.models.quantize`), which are made layer by layer from weights in host memory.

    Raises DataError for anything that is not one, or incomplete, and for weights that are not finite; errors in the
    small files and in the headers of the weights are found before the weights are read. No code that comes with a
    checkpoint is run.
    """
    found = inspect_model_folder(path)
    keep_float32(device)
    keep_freed_memory(device)
    options = {**model_options(found, attention, dtype), **_FILES}
    with load_errors(found.folder), quiet_transformers():
        model = _read_mapped(found, options) if found.family.github_type else _read(found, options)
    for name, parameter in model.named_parameters():
        require_finite(found.folder, name, parameter.detach())
    if quantization is None:
        model = model.to(device)
    model = use_fast_norms(use_fast_linear(replace_layers(model.eval()), device), device)
    if quantization is not None:
        quantize_layers(model, found.family, quantization, device)
    return Policy(model.to(device), found.tokenizer, found.family, found.folder, found.format)


def keep_float32(device: str) -> None:
    """On a GPU, the convolution that cuts images into patches would have 10 bits in float32, by PyTorch's default."""
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.allow_tf32 = False


def keep_freed_memory(device: str) -> None:
    """On a processor, the buffers of a step are the memory of those before: glibc would give large ones back to the
    system at once and clear their pages anew, a tenth of the time of sampling. Elsewhere nothing changes."""
    if torch.device(device).type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return
    mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 2)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def model_options(found: ModelFolder, attention: str, dtype: str) -> dict[str, Any]:
    """The arguments by which transformers makes a model."""
    kernels: Any = KERNELS[attention]
    if "vision" in found.family.parts:
        kernels = {"text_config": kernels, "vision_config": "sdpa"}
    return {"config": found.config, "dtype": DTYPES[dtype], "attn_implementation": kernels}


def load_on_meta(path: str) -> Policy:
    """A checkpoint as `load_policy` finds it, with the same checks, but with its weights on the meta device: shapes
    without memory. Where foveate maps the layouts (InternVL), only headers are read. The other families need accelerate
    for that, and are loaded where it is missing. Raises DataError as `load_policy` does."""
    found = inspect_model_folder(path)
    with load_errors(found.folder), quiet_transformers():
        if found.family.github_type:
            hf_tensors(found.folder, found.format, found.config)
            model: Any = meta_model(found.config)
        else:
            there = {"device_map": "meta"} if find_spec("accelerate") else {}
            model = _read(found, {"config": found.config, **_FILES, **there})
    return Policy(replace_layers(model.to("meta").eval()), found.tokenizer, found.family, found.folder, found.format)


@contextmanager
def load_errors(folder: Path) -> Iterator[None]:
    """Turns every refusal of a folder of weights into a DataError about it."""
    try:
        yield
    except _UNREADABLE as error:
        raise error if isinstance(error, DataError) else unreadable(folder, error) from error


def _read_mapped(found: ModelFolder, options: dict[str, Any]) -> Any:
    """A model whose layouts foveate maps itself, which are those of InternVL."""
    hf_tensors(found.folder, found.format, found.config)
    in_memory = found.format == "chat"
    return internvl_class(found.config).from_pretrained(
        None if in_memory else found.folder,
        state_dict=hf_state_dict(found.folder, found.format) if in_memory else None,
        **options,
    )


def _read(found: ModelFolder, options: dict[str, Any]) -> Any:
    """A model whose layouts transformers knows itself."""
    held = read_headers(weight_files(found.folder))  # a truncated file is reported here, by its name
    auto = found.family.auto_class
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in auto.from_config(found.config).parameters())
    if wanted > 2 * sum(math.prod(tensor.shape) for tensor in held.values()):  # transformers would make up the rest
        raise DataError(f"{found.folder}: the weights hold less than half of the {wanted:,} parameters of config.json")
    model, report = auto.from_pretrained(
        found.folder, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False, **options
    )
    for name, there, wanted in sorted(report["mismatched_keys"]):
        raise DataError(f"{found.folder}: {name} has shape {tuple(there)}, config.json asks for {tuple(wanted)}")
    require_fit(found.folder, "lack", report["missing_keys"])
    require_fit(found.folder, "also hold", report["unexpected_keys"])
    return model


def parameters_by_part(policy: Policy) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of each part of the model by name; one that lies in a part of a part belongs to the inner one."""
    found: dict[str, dict[str, nn.Parameter]] = {part: {} for part in policy.family.parts}
    for name, parameter in policy.model.named_parameters():
        found[policy.family.part_of(name)][name] = parameter
    return found


def freeze_except(policy: Policy, modules: Sequence[str]) -> None:
    """Let only the named modules train: `vision`, `projector`, `language`; `language` includes the head."""
    parts = parameters_by_part(policy)
    unknown = [name for name in modules if name not in parts]
    if unknown:
        trainable = ", ".join(part for part in parts if part != "head")
        raise DataError(
            f"cannot train {unknown[0]!r}: the parts of {policy.family.name} are {', '.join(parts)}; set "
            f"model.trainable=[{trainable}], or some of them"
        )
    trained = {*modules, *(["head"] if "language" in modules else [])}
    for part, parameters in parts.items():
        for parameter in parameters.values():
            parameter.requires_grad_(part in trained and parameter.is_floating_point())  # few bits have no gradient


def save_policy(policy: Policy, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Write the model in the layout that it came in, with the weights `state` in place of its own where given.
    Everything beside the weights (tokenizer, template, image preprocessing, the Python files of the GitHub format) is
    that of the folder that the policy was loaded from."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = policy.model
    state = None if state is None else _without_tied_head(model, state)
    if policy.format == "chat":
        with tempfile.TemporaryDirectory(prefix=".hf-", dir=folder) as hf, quiet_transformers():
            # the modules of Flash models, which transformers does not know, lose their names in its former format
            model.save_pretrained(hf, state_dict=state, save_original_format=policy.family.sides is None)
            write_hf_weights_as(Path(hf), model.config, folder, "chat")
    else:
        turned, stored = _turned_as_stored(policy, state), read_headers(weight_files(policy.folder))
        is_renamed = not (model.state_dict().keys() - {"lm_head.weight"} <= stored.keys())
        with quiet_transformers():  # in the layout that transformers has read
            model.save_pretrained(
                folder, state_dict=turned or state, save_original_format=is_renamed and turned is None
            )
        _copy_untrained(policy, folder)
    write_other_files(policy.folder, folder, policy.format, policy.format)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    write_json(folder / "config.json", with_dtype(read_config(folder), dtype))


def _copy_untrained(policy: Policy, folder: Path) -> None:
    """Tensors of the folder that the policy was loaded from which are no part of the model, in a shard of their own."""
    stored = read_headers(weight_files(policy.folder)) if policy.family.untrained else {}
    copied = {name: tensor for name, tensor in stored.items() if name.startswith(policy.family.untrained)}
    if copied:
        add_weights(folder, copied, _UNTRAINED)
        logger.warning(
            "%s: %d tensors (%s*) are copied from %s and stale: training does not reach them. Generation without "
            "speculative decoding does not use them",
            folder, len(copied), ", ".join(policy.family.untrained), policy.folder,
        )  # fmt: skip


def _without_tied_head(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without the head where it is the embedding. Tensors that were gathered from ranks share no memory, by
    which transformers would see that."""
    if not model.config.tie_word_embeddings:
        return state
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    head, other = state.get("lm_head.weight"), state.get(f"{embedding}.weight")
    if head is None or other is None or not torch.equal(head, other):
        return state
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


def _turned_as_stored(policy: Policy, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """The weights with the matrices of experts transposed where the folder that the model came from has them so, or
    None where it does not: transformers 5 turns them as it loads and does not turn them back."""
    if not policy.family.transposed_experts:
        return None
    stored = read_headers(weight_files(policy.folder))
    state = dict(policy.model.state_dict() if state is None else state)
    turned = {
        name: tensor.transpose(1, 2)
        for name, tensor in state.items()
        if ".experts." in name and name in stored and stored[name].shape != tuple(tensor.shape)
    }
    return {**state, **turned} if turned else None
