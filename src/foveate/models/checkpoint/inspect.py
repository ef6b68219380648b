"""What a model folder is, from its small files alone: format, configuration, tokenizer, family. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from transformers import AutoConfig, PreTrainedTokenizerBase

from foveate.encoding.chat import render
from foveate.errors import DataError
from foveate.models.checkpoint.configs import hf_preprocessor, tied
from foveate.models.checkpoint.formats import (
    MODEL_TYPES,
    detect_format,
    hf_form,
    mapped,
    model_config,
    read_config,
    read_image_tokenizer,
    read_tokenizer,
    unreadable,
)
from foveate.models.checkpoint.names import CheckpointFormat
from foveate.models.checkpoint.quiet import quiet_transformers
from foveate.models.families.internvl import Family, internvl_family
from foveate.models.families.qwen_vl import qwen_family
from foveate.models.families.text import text_family
from foveate.records import Message

LANGUAGE_MODELS = (
    "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text",
)  # fmt: skip
"""Language models whose attention the forest kernels compute, sliding windows and sinks included."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A recognised folder. `config` is transformers' configuration."""

    folder: Path
    format: CheckpointFormat
    config: Any
    tokenizer: PreTrainedTokenizerBase
    family: Family


def resolve_folder(path: str) -> Path:
    """The folder of a checkpoint: `demo` is the cold start that is shipped with foveate."""
    return Path(str(files("foveate") / "assets" / "demo")) if path == "demo" else Path(path)


def inspect_model_folder(path: str) -> ModelFolder:
    """What is in a model folder of any family and layout. Raises DataError, naming the file, for what is none, for
    weights that are not safetensors, for a model that is not known, and for parts that do not fit each other. No code
    that comes with a checkpoint is run."""
    folder = resolve_folder(path)
    layout = detect_format(folder)
    if read_config(folder)["model_type"] in MODEL_TYPES:
        return _internvl(folder, layout)
    tokenizer = read_tokenizer(folder)
    try:
        with quiet_transformers():
            config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        raise unreadable(folder, error) from error
    form = read_config(folder)
    if "tie_word_embeddings" not in form and "tie_word_embeddings" in (form.get("text_config") or {}):
        config.tie_word_embeddings = tied(form)  # what only the text model says counts for the whole
    text = config.get_text_config()
    _check_language(folder, text.model_type)
    family = text_family if text is config else qwen_family
    return _with_template(ModelFolder(folder, layout, config, tokenizer, family(folder, config, tokenizer)))


def _internvl(folder: Path, layout: CheckpointFormat) -> ModelFolder:
    tokenizer = read_image_tokenizer(folder)
    form = hf_form(folder, tokenizer)
    _check_language(folder, (form.get("text_config") or {}).get("model_type"))
    config: Any = model_config(folder, form)
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise DataError(f"{folder / 'config.json'}: images are taken from layer {layer} of a tower of {layers} layers")
    processor = mapped(folder, hf_preprocessor, read_config(folder)) if layout == "chat" else None
    family = internvl_family(folder, config, tokenizer, processor)
    return _with_template(ModelFolder(folder, layout, config, tokenizer, family))


def _with_template(found: ModelFolder) -> ModelFolder:
    """Refuse a chat template that cannot be used, and a tokenizer without one where the one that would stand in has
    words it does not know."""
    if not found.tokenizer.chat_template and "<|im_start|>" not in found.tokenizer.get_vocab():
        raise DataError(
            f"{found.folder}: no chat template, and the tokenizer has no <|im_start|>; add chat_template.jinja"
        )
    try:
        render((Message("user", "?"),), found.tokenizer)
    except (TemplateError, TypeError) as error:
        raise DataError(f"{found.folder}: the chat template cannot be used ({error}); mend it") from error
    return found


def _check_language(folder: Path, kind: str | None) -> None:
    """Refuse attention that the forest kernels lack."""
    if kind not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        raise DataError(
            f"{folder / 'config.json'}: text_config.model_type is {kind!r}; the forest kernels know {known}"
        )
