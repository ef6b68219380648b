"""Checkpoints from one layout into another, as a stream of bytes: `foveate convert`.

Files that only one of the two formats has (config.json, the image preprocessing, the Python files of the GitHub
format) travel in a folder `chat_format` or `hf_format` of the other one, so that the way back restores it.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import InternVLConfig, PreTrainedTokenizerBase

from foveate.encoding.family import ServedAs
from foveate.errors import DataError, DiskError
from foveate.files import atomic_path
from foveate.log import progress
from foveate.models.checkpoint.configs import (
    Json,
    chat_preprocessor,
    chat_to_hf,
    hf_preprocessor,
    hf_to_chat,
    patched,
    with_tied,
)
from foveate.models.checkpoint.formats import (
    detect_format,
    hf_form,
    hf_tensors,
    mapped,
    model_config,
    read_config,
    read_image_tokenizer,
)
from foveate.models.checkpoint.names import CHECKPOINT_FORMATS, CheckpointFormat, from_hf
from foveate.models.checkpoint.safetensors_io import Stored, write_weights
from foveate.models.checkpoint.small_files import WEIGHTS, read_json, refuse_links, require_tiles, write_json

logger = logging.getLogger(__name__)

SHARD_BYTES = 5 * 10**9
_OWN = ("config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files that the two formats write differently, besides the Python files of the GitHub format."""
_SIDE = {"chat": "chat_format", "hf": "hf_format"}
_TOKENIZER = "tokenizer_config.json"
"""Copied, but for the names of image tokens that the Hugging Face format adds."""
_TEMPLATES = "additional_chat_templates"
_IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
"""The tokens that transformers' InternVL processor asks its tokenizer for. Vocabularies without <video> get it where
the embedding has a row for it."""
_DEFAULT_TILES = 12


@dataclass(frozen=True, slots=True)
class Conversion:
    """The result of a conversion: the layouts, the numbers of tensors, of their bytes, and of weight files."""

    source: CheckpointFormat
    target: CheckpointFormat
    tensors: int
    bytes: int
    files: int

    def __str__(self) -> str:
        return (
            f"{CHECKPOINT_FORMATS[self.source]} -> {CHECKPOINT_FORMATS[self.target]}, {self.tensors:,} tensors, "
            f"{self.bytes / 1e9:.2f} GB in {self.files} file{'s' if self.files > 1 else ''}"
        )


def convert(source: Path, target: Path, to: CheckpointFormat, *, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Write the checkpoint `source` in the layout `to` as the new folder `target`, completely or not at all.

    Memory stays at one buffer of bytes for a model of any size; every tensor arrives bit for bit. Everything is
    checked against the configuration before anything is written.

    Raises:
        DataError: the source is not a complete InternVL checkpoint in safetensors, has links out of its folder, cannot
            be expressed in the other format, or the target exists.
        DiskError: the target cannot be written, or does not fit.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists; choose another folder, or remove it")
    refuse_links(source)
    layout = detect_format(source)
    form = hf_form(source, read_image_tokenizer(source))
    tensors = in_layout(hf_tensors(source, layout, model_config(source, form)), to)
    total = sum(tensor.size for tensor in tensors.values())
    _check_room(target, total)
    with atomic_path(target) as folder:
        folder.mkdir(parents=True)
        write_other_files(source, folder, layout, to)
        with _mebibytes(f"converting {source.name} (MiB)", total) as advance:
            files = write_weights(folder, tensors, shard_bytes, advance)
    return Conversion(layout, to, len(tensors), total, len(files))


def write_hf_weights_as(source: Path, config: InternVLConfig, folder: Path, to: CheckpointFormat) -> None:
    """Write the weights of a Hugging Face folder, and nothing else, in another layout."""
    tensors = in_layout(hf_tensors(source, "hf", config), to)
    with _mebibytes("saving (MiB)", sum(tensor.size for tensor in tensors.values())) as advance:
        write_weights(folder, tensors, SHARD_BYTES, advance)


def in_layout(tensors: Mapping[str, Stored], layout: CheckpointFormat) -> dict[str, Stored]:
    """Tensors by hf name -> by their names in another layout; parts of a fused tensor are joined."""
    parts: dict[str, dict[int, Stored]] = {}
    for name, stored in tensors.items():
        target, part, _ = from_hf(name, layout)
        parts.setdefault(target, {})[part] = stored
    return {target: _joined(target, [found[i] for i in sorted(found)]) for target, found in parts.items()}


def _joined(name: str, parts: list[Stored]) -> Stored:
    first = parts[0]
    if len(parts) == 1:
        return first
    dtypes = sorted({part.dtype for part in parts})
    if len(dtypes) > 1:
        raise DataError(f"{name} would join tensors of dtype {' and '.join(dtypes)}; cast them to one dtype")
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Stored(first.dtype, shape, tuple(piece for part in parts for piece in part.pieces))


def _check_room(target: Path, needed: int) -> None:
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise DiskError(
            f"cannot write {target}: {needed / 2**30:.1f} GiB needed, {free / 2**30:.1f} free in {existing}"
        )


@contextmanager
def _mebibytes(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes that counts in MiB."""
    done = 0
    with progress(description, total >> 20) as bar:

        def advance(count: int) -> None:
            nonlocal done
            bar(((done + count) >> 20) - (done >> 20))
            done += count

        yield advance


# ----------------------------------------------------------------------------------------------------- small files


def write_other_files(source: Path, target: Path, layout: CheckpointFormat, to: CheckpointFormat) -> None:
    """Everything of a checkpoint except its weights, as the layout `to` has it.

    Files that both formats share (tokenizer, chat template, generation config, licence, readme) are copied. The others
    go to the side folder, and those that came from the other format come back from there.
    """
    refuse_links(source, WEIGHTS)
    form, other = ("chat" if name == "chat" else "hf" for name in (layout, to))
    own = [path for path in _small_files(source) if path.name in _OWN or (path.suffix == ".py" and form == "chat")]
    for path in _small_files(source):
        if path not in own or form == other:
            shutil.copyfile(path, target / path.name)
    for folder in (_TEMPLATES, *(_SIDE.values() if form == other else ())):
        if (source / folder).is_dir():
            shutil.copytree(source / folder, target / folder)
    if form == other:
        return
    (target / _SIDE[form]).mkdir()
    for path in own:
        shutil.copyfile(path, target / _SIDE[form] / path.name)
    if form == "chat":
        shutil.copyfile(source / _TOKENIZER, target / _SIDE[form] / _TOKENIZER)
    side = source / _SIDE[other]
    for path in _small_files(side) if side.is_dir() else ():
        shutil.copyfile(path, target / path.name)
    _write_to_chat(source, target) if other == "chat" else _write_to_hf(source, target)


def write_served_files(
    source: Path, target: Path, layout: CheckpointFormat, served: ServedAs, end_token: Any, *, is_tied: bool
) -> None:
    """The small files of a checkpoint in the new folder `target`, as a server takes them."""
    target.mkdir()
    write_other_files(source, target, layout, served.layout)
    write_json(target / "config.json", with_tied(read_json(target / "config.json"), is_tied))
    path = target / _TOKENIZER
    if path.is_file():
        write_json(path, served.tokenizer_config(read_json(path), end_token))


def _small_files(folder: Path) -> list[Path]:
    """The files of a folder that are neither weights, nor their index, nor hidden."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return [path for path in files if path.suffix not in WEIGHTS and not path.name.endswith(".index.json")]


def _write_to_hf(source: Path, target: Path) -> None:
    """config.json, preprocessing and tokenizer settings of the Hugging Face format for a chat folder."""
    chat = read_config(source)
    tokenizer = read_image_tokenizer(source)
    now = hf_form(source, tokenizer)
    processor = mapped(source, hf_preprocessor, chat)
    side = source / _SIDE["hf"]
    if (side / "config.json").is_file():
        original = read_json(side / "config.json")
        before = hf_to_chat(original, max_tiles(side))
        now = patched(original, chat_to_hf(before, now["image_token_id"]), now)
        kept = side / "preprocessor_config.json"
        if kept.is_file():
            processor = patched(read_json(kept), hf_preprocessor(before), processor)
    write_json(target / "config.json", now)
    write_json(target / "preprocessor_config.json", processor)
    if not (target / "processor_config.json").is_file():
        length = {"image_seq_length": now["image_seq_length"]}
        write_json(target / "processor_config.json", {**length, "processor_class": "InternVLProcessor"})
    write_json(target / _TOKENIZER, _with_image_tokens(read_json(source / _TOKENIZER), now, tokenizer))


def _write_to_chat(source: Path, target: Path) -> None:
    """config.json and preprocessing of the GitHub format for a Hugging Face folder."""
    hf = read_config(source)
    now = mapped(source, hf_to_chat, hf, max_tiles(source))
    side = source / _SIDE["chat"]
    if (side / "config.json").is_file():
        original = read_json(side / "config.json")
        before = chat_to_hf(original, hf["image_token_id"])
        now = patched(original, hf_to_chat(before, hf_preprocessor(original)["max_patches"]), now)
    if not list(target.glob("modeling_*.py")):
        logger.warning(
            "%s: no Python files of the GitHub format came along; programs that run them need those of "
            "github.com/OpenGVLab/InternVL beside the weights, and auto_map in config.json",
            source,
        )
    if (side / _TOKENIZER).is_file():
        original = read_json(side / _TOKENIZER)
        before = _with_image_tokens(original, hf, read_image_tokenizer(source))
        write_json(target / _TOKENIZER, patched(original, before, read_json(source / _TOKENIZER)))
    write_json(target / "config.json", now)
    if not (target / "preprocessor_config.json").is_file():
        write_json(target / "preprocessor_config.json", chat_preprocessor(now["force_image_size"]))


def max_tiles(folder: Path) -> int:
    """Tiles of one image, as the preprocessing of a Hugging Face folder says; 12, as InternVL has, if it does not."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            inner = content.get("image_processor", content)
            tiles: Any = inner.get("max_patches", _DEFAULT_TILES) if isinstance(inner, dict) else None
            return require_tiles(f"{folder / name}: max_patches", tiles)
    return _DEFAULT_TILES


def _with_image_tokens(settings: Json, hf: Json, tokenizer: PreTrainedTokenizerBase) -> Json:
    """The settings of a tokenizer with the names of its image tokens, where they lack them."""
    room = hf["text_config"]["vocab_size"] - len(tokenizer)
    words = {key: word for key, word in _IMAGE_TOKENS.items() if word in tokenizer.get_vocab() or room > 0}
    extra = settings.get("extra_special_tokens") or {}
    lacking = {key: word for key, word in words.items() if key not in settings and key not in extra}
    if isinstance(extra, dict):
        return {**settings, "extra_special_tokens": {**extra, **lacking}}
    return {**settings, **lacking}  # transformers 5 keeps a list there, and the names beside it
