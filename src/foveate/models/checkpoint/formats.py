"""The layout of a checkpoint folder, its configuration in the Hugging Face form, and whether its tensors are complete.

Only small files and the headers of the weights are read, and no code that comes with a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, InternVLConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from foveate.errors import DataError
from foveate.models.checkpoint.configs import Json, chat_to_hf, tied
from foveate.models.checkpoint.names import CheckpointFormat, from_hf, to_hf
from foveate.models.checkpoint.safetensors_io import Stored, read_headers, weight_files
from foveate.models.checkpoint.small_files import (
    quiet_transformers,
    read_json,
    read_tokenizer,
    require_words,
    unreadable,
)
from foveate.models.families import FAMILIES, family_class, is_known
from foveate.models.sizes import meta_model

Mapped = TypeVar("Mapped")

IMAGE_WORDS = ("<img>", "<IMG_CONTEXT>", "</img>")
_QUANTISED = ("F8_", "F6_", "F4", "I8", "U8")
"""How dtypes of numbers begin that mean nothing without their scales."""
_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Settings of config.json that change what a model returns, and their defaults."""
_GROWING = ("dynamic", "longrope")


def detect_format(folder: Path) -> CheckpointFormat:
    """The layout of a checkpoint folder: `chat` (GitHub), `hf`, or `hf-old`.

    The two Hugging Face layouts have the same configuration and are told apart by the names of their tensors.
    Raises DataError for anything else, and for weights that are not safetensors: the headers of all files are looked
    at, so that a folder that one reader refuses is refused by every other.
    """
    model_type, names = read_config(folder)["model_type"], read_headers(weight_files(folder))
    for name, stored in names.items():
        if stored.dtype.startswith(_QUANTISED):
            raise DataError(
                f"{folder}: {name} is {stored.dtype}; quantised weights cannot be trained, take the bfloat16 ones"
            )
    github_type = family_class(model_type).github_type
    if github_type is None or model_type == github_type:
        return "hf" if github_type is None else "chat"
    return "hf" if any(name.startswith(("model.", "lm_head.")) for name in names) else "hf-old"


def read_config(folder: Path) -> Json:
    """config.json of a known model. Raises DataError where there is none, or another model's."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() and not path.is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise DataError(
            f"{folder}: is an adapter of {base}; name that model (model.path) and this folder as model.lora.adapter, "
            "or train with model.lora.save=both, whose final/ is a whole model"
        )
    if not path.is_file():
        raise DataError(
            f"{folder}: no config.json; a local model folder in the Hugging Face or GitHub format is expected "
            "(download a model of the Hub first)"
        )
    config = read_json(path)
    kind = config.get("model_type")
    if not is_known(kind):
        known = ", ".join(_with_format(name) for name in FAMILIES)
        why = ", a model that exists only as code of its checkpoint, which is never run" if "auto_map" in config else ""
        raise DataError(
            f"{path}: model_type is {kind!r}{why}; known are: {known}, and causal text models of transformers"
        )
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if quantised := part.get("quantization_config"):
            how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise DataError(
                f"{path}: the weights are quantised ({how}), which cannot be trained; take the bfloat16 ones"
            )
        for name, usual in _OUTPUTS.items():
            if part.get(name, usual) not in (usual, None):
                raise DataError(f"{path}: {name} is {part[name]}; it changes what the model returns: leave it out")
        for name, value in part.items():
            is_small = value is None or (isinstance(value, int | float) and 0 <= value < 1)
            if name.endswith(("_eps", "_epsilon")) and not is_small:
                raise DataError(f"{path}: {name} is {value!r}; it must be a small number, such as 1e-06")
    return config


def _with_format(model_type: str) -> str:
    """A `model_type`, with the format that it stands for in a family of several."""
    github_type = family_class(model_type).github_type
    if github_type is None:
        return model_type
    return f"{model_type} ({'GitHub' if model_type == github_type else 'Hugging Face'} format)"


def read_hf_config(folder: Path, towers: Collection[str]) -> Any:
    """The configuration of a folder in transformers' own format. Raises DataError where it cannot be read, and for a
    language model that is none of `towers`."""
    try:
        with quiet_transformers():
            config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        raise unreadable(folder, error) from error
    form = read_config(folder)
    if "tie_word_embeddings" not in form and "tie_word_embeddings" in (form.get("text_config") or {}):
        config.tie_word_embeddings = tied(form)  # what only the text model says counts for the whole
    if towers:
        check_tower(folder, config.get_text_config().model_type, towers)
        if grows_with_length(form):
            raise DataError(
                f"{folder / 'config.json'}: rotary positions of type {' or '.join(_GROWING)} depend on the longest row "
                "of a batch, which packed rows cannot be held to"
            )
    return config


def grows_with_length(form: Any) -> bool:
    """Whether rotary positions somewhere in a configuration depend on the length of the longest row."""
    if not isinstance(form, dict):
        return False
    return (form.get("rope_type") or form.get("type")) in _GROWING or any(map(grows_with_length, form.values()))


def check_tower(folder: Path, kind: str | None, towers: Collection[str]) -> None:
    """Refuse a language model that a family does not stand on: the forest kernels compute its attention, or lack it."""
    if kind not in towers:
        known = ", ".join(towers)
        raise DataError(
            f"{folder / 'config.json'}: text_config.model_type is {kind!r}; the forest kernels know {known}"
        )


def read_image_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an InternVL. Raises DataError also for one that has no tokens for images."""
    tokenizer = read_tokenizer(folder)
    require_words(folder, tokenizer, IMAGE_WORDS, "InternVL")
    return tokenizer


def hf_form(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Json:
    """config.json of a checkpoint of any layout, in the Hugging Face form.

    Raises DataError, with the file, for a language model that is not known and for what that form cannot express.
    """
    config = read_config(folder)
    kind = config["model_type"]
    github_type = family_class(kind).github_type
    if github_type is None:
        raise DataError(
            f"{folder / 'config.json'}: model_type is {kind!r}, which has one layout; convert InternVL only"
        )
    if kind != github_type:
        return {**config, "tie_word_embeddings": tied(config)}
    return mapped(folder, chat_to_hf, config, tokenizer.get_vocab()["<IMG_CONTEXT>"])


def mapped(folder: Path, mapping: Callable[..., Mapped], *arguments: Any) -> Mapped:
    """A mapping of the configuration of a folder, whose refusals then say which file they are about."""
    try:
        return mapping(*arguments)
    except DataError as error:
        raise DataError(f"{folder / 'config.json'}: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise unreadable(folder / "config.json", error) from error


def model_config(folder: Path, form: Mapping[str, Any]) -> InternVLConfig:
    """The Hugging Face form as transformers' object. Raises DataError for values of a wrong type."""
    try:
        with quiet_transformers():
            return InternVLConfig.from_dict(dict(form))
    except (ValueError, TypeError, LookupError, StrictDataclassError) as error:
        raise unreadable(folder, error) from error


def hf_tensors(folder: Path, layout: CheckpointFormat, config: InternVLConfig) -> dict[str, Stored]:
    """The tensors of a checkpoint by their hf names, in the order of their bytes.

    Raises DataError, naming the tensor, where the weights lack one that the configuration asks for, hold another one,
    or have another shape.
    """
    wanted = mapped(folder, expected_shapes, config)
    found: dict[str, Stored] = {}
    strange = []
    for name, stored in read_headers(weight_files(folder)).items():
        try:
            names = to_hf(name, layout)
        except DataError:
            names = ()
        if not names or not set(names) <= wanted.keys():
            strange.append(name)
            continue
        _check_shape(folder, name, stored, [wanted[part] for part in names])
        parts = len(names)
        shape = (stored.shape[0] // parts, *stored.shape[1:]) if parts > 1 else stored.shape
        for i, part in enumerate(names):
            piece = stored.pieces[0].part(i, parts)
            found[part] = Stored(stored.dtype, shape, (piece,), name, i * shape[0] if shape else 0)
    optional = {"lm_head.weight"} if tied(config.to_dict()) else set()
    missing = sorted({from_hf(name, layout)[0] for name in wanted.keys() - found.keys() - optional})
    require_fit(folder, "lack", missing)
    require_fit(folder, "also hold", strange)
    return found


def require_fit(folder: Path, problem: str, names: Collection[str]) -> None:
    """Raise DataError if there are names of tensors that the weights of a folder `lack`, or `also hold`."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise DataError(f"{folder}: the weights {problem} {min(names)}{more}; they do not fit config.json")


def require_finite(folder: Path, name: str, tensor: Tensor) -> None:
    """Raise DataError if a tensor that was read from a folder holds NaN or infinite numbers."""
    if not is_finite(tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        why = "the weights are damaged, or too large for it"
        raise DataError(f"{folder}: {name} holds numbers that are not finite in {dtype}; {why}")


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite, in one pass: its least and largest are. Other dtypes than floats of
    two or more bytes are not looked at."""
    if not tensor.is_floating_point() or tensor.itemsize < 2 or not tensor.numel():
        return True
    return bool(torch.stack(tensor.aminmax()).isfinite().all())


def _check_shape(folder: Path, name: str, stored: Stored, parts: list[tuple[int, ...]]) -> None:
    rows = sum(part[0] for part in parts) if parts[0] else 0
    wanted = (rows, *parts[0][1:]) if parts[0] else ()
    if stored.shape != wanted:
        raise DataError(f"{folder}: {name} has shape {stored.shape}, config.json asks for {wanted}")


def expected_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of this configuration holds, by hf name.

    They are those that transformers saves: it joins the matrices of experts as it loads them, and splits them again.
    """
    model = meta_model(config)
    stored = revert_weight_conversion(model, dict(model.state_dict()))
    return {to_hf(name, "hf-old")[0]: tuple(tensor.shape) for name, tensor in stored.items()}


def hf_state_dict(folder: Path, layout: CheckpointFormat) -> dict[str, Tensor]:
    """The weights of a checkpoint by their hf names, mapped into memory from disk: pages are read when used."""
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                names = to_hf(name, layout)
                state |= zip(names, tensors.get_tensor(name).tensor_split(len(names)), strict=True)
    return state
