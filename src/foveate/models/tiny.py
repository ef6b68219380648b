"""A small InternVL of the real architecture, for laptops, tests and the demo: an ordinary Hugging Face folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from foveate.datasets.patterns import PATTERNS
from foveate.datasets.shapes import COLOURS, QUESTION, RELATIONS, SHAPES
from foveate.datasets.zoom import ASKED, ASKED_AT
from foveate.encoding.chat import CORRECTED_TEMPLATE
from foveate.environments.calls import hermes_call
from foveate.errors import DataError
from foveate.models.checkpoint.configs import tile_preprocessor
from foveate.models.checkpoint.inspect import inspect_model_folder
from foveate.models.checkpoint.small_files import quiet_transformers, write_json

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
CALL_WORDS = (
    "<tool_call>", "</tool_call>", '<tool_call>\n{"name": "zoom", "arguments": {"image": 1, "box": [', ", ",
    "]}}\n</tool_call>", '<tool_call>\n{"name": "click", "arguments": {"x": ', ', "y": ', "}}\n</tool_call>",
)  # fmt: skip
"""Tokens for calls of tools, the whole beginning and end of a look and a click among them: a call is short enough for a
laptop."""
PREPROCESSOR = "preprocessor_config.json"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen's pre-tokenisation: words with their space, single digits, runs of punctuation."""


@dataclass(frozen=True, slots=True)
class TinySize:
    """Widths and depths. `tile` is the side of an image tile in pixels; a tile gives (tile / patch / 2)**2 tokens."""

    tile: int = 112
    patch: int = 14
    vision_width: int = 96
    vision_layers: int = 3
    vision_heads: int = 4
    vision_ffn: int = 256
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 320
    vocabulary: int = 640
    max_tiles: int = 12


SMALL = TinySize(vision_width=56, vision_ffn=112, width=64, layers=3, head_dim=16, ffn=120)
"""A quarter of the parameters: the student of `shapes_distill`."""


def tiny_tokenizer(vocabulary: int, *, calls: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about `vocabulary` tokens, trained on the language of the shapes; it can spell any text.
    `calls`: also `CALL_WORDS`, and the language of questions about plates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [*COLOURS, *SHAPES, *RELATIONS, "small", "big", "above", "below", "of", "the"]
    corpus = [QUESTION.format(" ".join(words)), "the " + " ".join(words)] * 40
    corpus += ["Please provide the bounding box coordinate of the region this sentence describes: the"] * 40
    corpus += [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES] * 10
    corpus += ["system\nYou are a helpful assistant.", "user\nWhat is shown?", "assistant\n[[1,2,3,4]]"] * 20
    if calls:
        call = hermes_call("zoom", {"image": 1, "box": []})
        inside = call.removeprefix(CALL_WORDS[0]).removesuffix(CALL_WORDS[1])
        corpus += ["Which pattern is on the square?", *PATTERNS] * 40
        corpus += [inside, "tool\nImage 2", ASKED.format("red"), ASKED_AT.format("digit", [125, 250])] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIALS])
    if calls:
        tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in CALL_WORDS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=8192,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
        },
    )
    fast.chat_template = CORRECTED_TEMPLATE
    return fast


def tiny_config(size: TinySize, tokenizer: PreTrainedTokenizerFast, padded_vocabulary: int = 0) -> InternVLConfig:
    """The configuration of a tiny InternVL3.5 (Qwen3 language model, untied head). `padded_vocabulary` widens the
    embedding and the head beyond the tokenizer, as large models do."""
    vocabulary = tokenizer.get_vocab()
    vision = InternVLVisionConfig(
        hidden_size=size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        intermediate_size=size.vision_ffn,
        image_size=[size.tile, size.tile],
        patch_size=[size.patch, size.patch],
        attention_bias=True,
        use_qk_norm=False,
        norm_type="layer_norm",
        layer_scale_init_value=1.0,
    )
    text = Qwen3Config(
        vocab_size=max(len(tokenizer), padded_vocabulary),
        hidden_size=size.width,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        eos_token_id=vocabulary["<|im_end|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_id=vocabulary["<IMG_CONTEXT>"],
        image_seq_length=(size.tile // size.patch // 2) ** 2,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def build_tiny(folder: Path, size: TinySize | None = None, *, seed: int = 0, padded_vocabulary: int = 0) -> Path:
    """Write a randomly initialised tiny InternVL as a Hugging Face folder. The same seed gives the same weights."""
    size = size or TinySize()
    tokenizer = tiny_tokenizer(size.vocabulary)
    config = tiny_config(size, tokenizer, padded_vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config).float()
    positions = model.model.vision_tower.embeddings.position_embeddings
    with torch.no_grad():  # transformers starts them at 0; a model this small finds places much sooner from waves
        positions[0, 1:] = position_waves(size.tile // size.patch, size.vision_width)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    write_json(folder / PREPROCESSOR, tile_preprocessor(size.tile, size.max_tiles))
    return folder


def retile(model_path: str, folder: Path, tile: int, max_tiles: int) -> Path:
    """Write an InternVL for image tiles of another size, its weights otherwise the same: the positions of the vision
    tower are interpolated (bicubic), as InternViT does for larger images. Raises DataError for a folder that holds no
    InternVL in the layout of transformers."""
    found = inspect_model_folder(model_path)
    source, config = found.folder, found.config
    if found.format == "chat" or not isinstance(found.config, InternVLConfig):
        raise DataError(f"{source}: must hold an InternVL in the Hugging Face layout (`foveate convert` writes it)")
    patch = config.vision_config.patch_size[0]
    config.vision_config.image_size = [tile, tile]
    config.image_seq_length = (tile // patch // 2) ** 2
    with quiet_transformers():
        old = InternVLForConditionalGeneration.from_pretrained(source)
        model = InternVLForConditionalGeneration(config).float()
        weights = old.state_dict()
        name = "model.vision_tower.embeddings.position_embeddings"
        weights[name] = _resized_positions(weights[name].float(), tile // patch)
        model.load_state_dict(weights)
        model.generation_config = old.generation_config
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    write_json(folder / PREPROCESSOR, tile_preprocessor(tile, max_tiles))
    return folder


def add_call_words(folder: Path) -> None:
    """Give the tiny InternVL in a folder of transformers a tokenizer with tokens for calls of tools. The embedding of a
    new token, and its row of the head, is the mean of those of the tokens that spelled it before; calls
    begin, go on and end like a box in an answer."""
    with quiet_transformers():
        old, model = AutoTokenizer.from_pretrained(folder), InternVLForConditionalGeneration.from_pretrained(folder)
        own: Any = model.config.text_config
        tokenizer = tiny_tokenizer(TinySize().vocabulary, calls=True)
        known: dict[str, int] = old.get_vocab()
        like: dict[str, str] = dict(zip(CALL_WORDS[2:], ("[[", ",", "]]") * 2, strict=True))
        words = ((like.get(word, word), number) for word, number in tokenizer.get_vocab().items())
        spelled = [
            [known[word]] if word in known else old.encode(tokenizer.decode([number]), add_special_tokens=False)
            for word, number in sorted(words, key=lambda pair: pair[1])
        ]
        weights = model.state_dict()
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.stack([weights[name][pieces].mean(0) for pieces in spelled])
        ids = tokenizer.get_vocab()
        own.vocab_size, own.eos_token_id, own.pad_token_id = len(spelled), ids["<|im_end|>"], ids["<|endoftext|>"]
        model.config.image_token_id = ids["<IMG_CONTEXT>"]
        grown = InternVLForConditionalGeneration(model.config).float()
        grown.load_state_dict(weights)
        grown.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
        grown.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _resized_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """Positions (1, 1 + n * n, D) for a grid of `side` x `side` patches; the first one, of the class token, stays."""
    first, grid = positions[:, :1], positions[:, 1:]
    before = math.isqrt(grid.shape[1])
    image = grid.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([first, image.permute(0, 2, 3, 1).reshape(1, side * side, -1)], 1)


def position_waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of rows, then of columns, of a `side` x `side` grid of patches: (side * side, width), within
    +-0.5. Their wavelengths run from four grids down to two patches."""
    frequency = (math.pi / side) * torch.exp(torch.linspace(math.log(0.5), math.log(side), width // 4))
    angle = (torch.arange(side) + 0.5)[:, None] * frequency
    waves = 0.5 * torch.cat([angle.sin(), angle.cos()], -1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)
