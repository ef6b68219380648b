"""Which layout a checkpoint folder has, its configuration in the Hugging Face form, and whether its tensors are whole.

Only small files and the headers of the weights are read, and no code that comes with a checkpoint is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, InternVLConfig, PreTrainedTokenizerBase

from foveate.errors import DataError
from foveate.models.checkpoint.configs import Json, chat_to_hf, tied
from foveate.models.checkpoint.names import CheckpointFormat, from_hf, split_parts, to_hf
from foveate.models.checkpoint.quiet import quiet_transformers
from foveate.models.checkpoint.safetensors_io import Stored, read_headers, weight_files
from foveate.models.families.internvl import read_json
from foveate.models.sizes import meta_model

MODEL_TYPES = {"internvl": "Hugging Face", "internvl_chat": "GitHub"}
"""What `model_type` of config.json is for InternVL, and the format that it stands for."""

OTHER_TYPES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2", "qwen3", "qwen3_moe", "gpt_oss")
"""`model_type` of the other models that are known; each has one format, transformers' own."""

IMAGE_WORDS = ("<img>", "<IMG_CONTEXT>", "</img>")


def detect_format(folder: Path) -> CheckpointFormat:
    """The layout of a checkpoint folder: `chat` (GitHub), `hf`, or `hf-old`.

    The two Hugging Face layouts have the same configuration and are told apart by the names of their tensors.
    Raises DataError for anything else, and for weights that are not safetensors.
    """
    config, files = read_config(folder), weight_files(folder)
    if config["model_type"] != "internvl":
        return "chat" if config["model_type"] == "internvl_chat" else "hf"
    names = read_headers(files[:1])
    return "hf" if any(name.startswith(("model.", "lm_head.")) for name in names) else "hf-old"


def read_config(folder: Path) -> Json:
    """config.json of a known model. Raises DataError where there is none, or another model's."""
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(
            f"{folder}: no config.json; a local model folder in the Hugging Face or GitHub format is expected "
            "(download a model of the Hub first)"
        )
    config = read_json(path)
    kind = config.get("model_type")
    if kind not in MODEL_TYPES and kind not in OTHER_TYPES:
        known = ", ".join([*(f"{name} ({form} format)" for name, form in MODEL_TYPES.items()), *OTHER_TYPES])
        why = ", a model that exists only as code of its checkpoint, which is never run" if "auto_map" in config else ""
        raise DataError(f"{path}: model_type is {kind!r}{why}; known are: {known}")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if quantised := part.get("quantization_config"):
            how = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise DataError(
                f"{path}: the weights are quantised ({how}), which cannot be trained; take the bfloat16 ones"
            )
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with its chat template. Raises DataError for one that is damaged."""
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions
        raise unreadable(folder, error) from error
    older = folder / "chat_template.json"  # where processors kept it, which tokenizers do not look for
    if not tokenizer.chat_template and older.is_file():
        tokenizer.chat_template = read_json(older).get("chat_template")
    return tokenizer


def read_image_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an InternVL. Raises DataError also for one that has no tokens for images."""
    tokenizer = read_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    missing = [word for word in IMAGE_WORDS if word not in vocabulary]
    if missing:
        raise DataError(f"{folder}: the tokenizer lacks {', '.join(missing)}; InternVL cannot see images without them")
    return tokenizer


def unreadable(path: Path, error: Exception) -> DataError:
    """What a user reads when no sense can be made of a folder, or of a file of it."""
    reason = " ".join(str(error).split())
    return DataError(f"{path}: cannot be loaded ({type(error).__name__}: {reason}); replace it")


def hf_form(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Json:
    """config.json of a checkpoint of any layout, in the Hugging Face form.

    Raises DataError, with the file, for a language model that is not known and for what that form cannot express.
    """
    config = read_config(folder)
    if config["model_type"] in OTHER_TYPES:
        kind = config["model_type"]
        raise DataError(
            f"{folder / 'config.json'}: model_type is {kind!r}, which has one layout; convert InternVL only"
        )
    if config["model_type"] == "internvl":
        return {**config, "tie_word_embeddings": tied(config)}
    return mapped(folder, chat_to_hf, config, tokenizer.get_vocab()["<IMG_CONTEXT>"])


def mapped(folder: Path, mapping: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
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
            found[part] = Stored(stored.dtype, shape, (stored.pieces[0].part(i, parts),))
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


def _check_shape(folder: Path, name: str, stored: Stored, parts: list[tuple[int, ...]]) -> None:
    rows = sum(part[0] for part in parts) if parts[0] else 0
    wanted = (rows, *parts[0][1:]) if parts[0] else ()
    if stored.shape != wanted:
        raise DataError(f"{folder}: {name} has shape {stored.shape}, config.json asks for {wanted}")


def expected_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a checkpoint of this configuration holds, by hf name.

    Checkpoints of Qwen3-MoE hold every expert's matrices on their own; transformers 5 joins them as it loads.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    text: Any = config.text_config
    if text.model_type != "qwen3_moe":
        return shapes
    apart: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        apart |= _experts(name, shape) or {name: shape}
    return apart


def _experts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]] | None:
    match = re.fullmatch(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)", name)
    if match is None:
        return None
    prefix, matrix = match.groups()
    count, rows, columns = shape
    if matrix == "down_proj":
        return {f"{prefix}.{i}.down_proj.weight": (rows, columns) for i in range(count)}
    halves = ("gate_proj", "up_proj")
    return {f"{prefix}.{i}.{half}.weight": (rows // 2, columns) for i in range(count) for half in halves}


def hf_state_dict(folder: Path, layout: CheckpointFormat) -> dict[str, Tensor]:
    """The weights of a checkpoint by their hf names, mapped into memory from disk: pages are read when used."""
    state: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                names = to_hf(name, layout)
                parts: Iterable[Tensor] = split_parts(tensors.get_tensor(name), len(names))
                state |= zip(names, parts, strict=True)
    return state
