"""A model folder told by its small files alone: format, configuration, tokenizer, family. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from foveate.data.hub import is_hub_name, model_folder
from foveate.encoding.chat import render
from foveate.encoding.encode import Encoder
from foveate.encoding.family import Family, budget_of
from foveate.errors import DataError, one_line
from foveate.models.checkpoint.formats import detect_format, read_config
from foveate.models.checkpoint.names import CheckpointFormat
from foveate.models.checkpoint.small_files import (
    TEMPLATE_BYTES,
    WEIGHTS,
    bounded,
    read_json,
    read_tokenizer,
    refuse_links,
)
from foveate.models.families import family_class
from foveate.records import Message

SHIPPED_MODELS = ("demo", "demo-tools")
"""The cold starts that are shipped with foveate, by the names under which settings take them."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A recognised folder. `config` is transformers' configuration."""

    folder: Path
    format: CheckpointFormat
    config: Any
    tokenizer: PreTrainedTokenizerBase
    family: Family


def resolve_folder(path: str) -> Path:
    """The folder of a checkpoint: one of `SHIPPED_MODELS`; a name of the Hugging Face Hub (`owner/name`,
    `owner/name@revision`) that is no folder here is downloaded, unless it has been already."""
    if path in SHIPPED_MODELS:
        return Path(str(files("foveate") / "assets" / path))
    return model_folder(path) if is_hub_name(path) else Path(path)


def inspect_model_folder(path: str) -> ModelFolder:
    """Recognise a model folder of any family and layout. Raises DataError, naming the file, for what is none, for
    weights that are not safetensors, for a model that is not known, for parts that do not fit each other, for a chat
    template that cannot be used, and for small files that are links out of the folder. No code that comes with a
    checkpoint is run."""
    folder = resolve_folder(path)
    layout = detect_format(folder)
    refuse_links(folder, WEIGHTS)
    tokenizer = read_tokenizer(folder)
    config, family = family_class(read_config(folder)["model_type"]).read(folder, tokenizer)
    if not tokenizer.chat_template and family.template_token not in tokenizer.get_vocab():
        raise DataError(
            f"{folder}: no chat template, and the tokenizer has no {family.template_token}; add chat_template.jinja"
        )
    try:
        with bounded(TEMPLATE_BYTES):
            render((Message("user", "?"),), tokenizer, template=family.template)
    except Exception as error:  # a template is a program, and may raise anything
        reason = one_line(error)[:300]
        raise DataError(f"{folder}: the chat template cannot be used ({reason}); fix it") from error
    return ModelFolder(folder, layout, config, tokenizer, family)


def hub_task(folder: Path) -> str:
    """The task of a model, as the Hub calls it, by the family of its folder; of an adapter, that of the model that it
    is for. Raises DataError for what is neither."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file() and not (folder / "config.json").is_file():
        folder = resolve_folder(str(read_json(adapter).get("base_model_name_or_path")))
    parts = family_class(read_config(folder)["model_type"]).parts
    return "image-text-to-text" if "vision" in parts else "text-generation"


def load_encoder(
    path: str,
    *,
    max_tiles: int | None,
    max_pixels: int | None = None,
    max_prompt_tokens: int,
    system: str | None = None,
) -> Encoder:
    """The encoder of a model folder; see `Encoder` for the limits. Raises DataError for what is no model folder."""
    found = inspect_model_folder(path)
    budget = budget_of(found.family, max_tiles=max_tiles, max_pixels=max_pixels)
    return Encoder(found.tokenizer, found.family, budget, max_prompt_tokens, system)
