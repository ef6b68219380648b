"""What turns tasks into prompts for a checkpoint, read from its small files alone: no weights are loaded."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from foveate.encoding.encode import Encoder
from foveate.encoding.family import budget_of
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.families.internvl import Family


def load_encoder(
    path: str,
    *,
    max_tiles: int | None,
    max_pixels: int | None = None,
    max_prompt_tokens: int,
    system: str | None = None,
) -> Encoder:
    """The encoder of a model folder; see `Encoder` for the limits. Raises DataError for what is no model folder."""
    tokenizer, family = read_prompt_parts(path)
    budget = budget_of(family, max_tiles=max_tiles, max_pixels=max_pixels)
    return Encoder(tokenizer, family, budget, max_prompt_tokens, system)


def read_prompt_parts(path: str) -> tuple[PreTrainedTokenizerBase, Family]:
    """The tokenizer and the family of a model folder of any layout. Raises DataError for what is none."""
    found = inspect_model_folder(path)
    return found.tokenizer, found.family
