"""The small files of a model folder, read without running any code that comes with it, and what families check in them.
Every refusal is a DataError that names the file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import resource
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from foveate.encoding.chat import render
from foveate.encoding.control import without_panics
from foveate.errors import DataError, one_line
from foveate.records import Message

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".msgpack", ".h5")
"""Suffixes of files that are not small."""
TEMPLATE_BYTES = 2**30
"""Memory for a chat template that says a few words."""
_IN_PARTS = (
    "{%- set all = namespace(messages=[], parts=[]) -%}{%- for message in messages -%}{%- set all.parts = [] -%}"
    "{%- for text in message['content'].split('<image>') -%}"
    "{%- if not loop.first -%}{%- set all.parts = all.parts + [{'type': 'image'}] -%}{%- endif -%}"
    "{%- if text -%}{%- set all.parts = all.parts + [{'type': 'text', 'text': text}] -%}{%- endif -%}{%- endfor -%}"
    "{%- set all.messages = all.messages + [{'role': message['role'], 'content': all.parts}] -%}{%- endfor -%}"
    "{%- set messages = all.messages -%}"
)
"""Stands before a chat template that knows contents as lists of parts alone (SmolVLM, Idefics3): it makes them."""
MOST_JSON_BYTES, MOST_TILES = 200_000_000, 1024
MOST_GROWTH, MOST_PARTS, MOST_PADDING = 64, 64, 2**20
"""How many times longer a tokenizer may make a text, in how many parts, and to how many tokens it may fill it."""
_ONLY = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
"""Settings of the image processor that have one value: pixels resized, in 0..1, normalised."""

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are hashed whole, of larger ones `BLOCKS` blocks from the first to the last."""
BLOCKS, BLOCK_BYTES = 64, 2**16


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports of transformers while a model is read or written; as it was afterwards."""
    level = transformers_logging.get_verbosity()
    hook = transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.set_tqdm_hook(hook)


@contextmanager
def bounded(more_bytes: int) -> Iterator[None]:
    """Within it the process gets a MemoryError when it allocates more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    if used is not None:
        limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([1024 * int(used[1]) + more_bytes, *limits]), hard))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {more_bytes / 2**30:g} GiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def unreadable(path: Path, error: Exception) -> DataError:
    """The refusal of a folder, or of a file of it, that makes no sense."""
    return DataError(f"{path}: cannot be loaded ({type(error).__name__}: {one_line(error)}); replace it")


def refuse_links(folder: Path, without: Collection[str] = ()) -> None:
    """Raise DataError for a link in a folder that leads out of it, but for files with the suffixes `without`: what is
    saved of the folder would hold files from elsewhere."""
    for path, target in links_out(folder):
        if path.suffix not in without:
            raise DataError(f"{path}: is a link out of its folder, to {target}; put the file itself there")


def links_out(folder: Path) -> Iterator[tuple[Path, Path]]:
    """The links in a folder that lead out of it, with their targets. Those of the Hub's cache lead to the blobs beside
    its snapshots, which count as inside."""
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    for path in folder.rglob("*"):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in inside):
                yield path, target


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file. Raises DataError for anything else."""
    try:
        size = path.stat().st_size
        if size > MOST_JSON_BYTES:
            raise DataError(f"{path}: has {size:,} bytes; a JSON file of a checkpoint has {MOST_JSON_BYTES:,} at most")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_nan)
    except RecursionError:
        raise DataError(f"{path}: not valid JSON (nested too deep)") from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({str(error)[:300]})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def _no_nan(name: str) -> float:
    """Infinite settings exist, as limits of a step; what is no number sets nothing."""
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file of a checkpoint; one that already says the same stays as it is."""
    if not path.is_file() or read_json(path) != content:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, with its chat template. Raises DataError for one that is damaged."""
    require_bounded_tokenizer(folder)
    try:
        with quiet_transformers(), without_panics():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare exceptions
        raise unreadable(folder, error) from error
    older = folder / "chat_template.json"  # where processors kept it, which tokenizers do not look for
    if not tokenizer.chat_template and older.is_file():
        tokenizer.chat_template = read_json(older).get("chat_template")
    if isinstance(tokenizer.chat_template, str) and not _says(tokenizer) and _says(tokenizer, _IN_PARTS):
        tokenizer.chat_template = _IN_PARTS + tokenizer.chat_template
    return tokenizer


def require_bounded_tokenizer(folder: Path) -> None:
    """Raise DataError for a tokenizer.json that makes much of little: normalizers and decoders that replace a letter by
    a long text, again and again, and padding to a length of its own."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    content = read_json(path)
    for part in ("normalizer", "decoder"):
        times = _growth(content.get(part))
        if times > MOST_GROWTH:
            raise DataError(
                f"{path}: its {part} makes a text {times:,.0f} times as long; {MOST_GROWTH} times are allowed"
            )
    padding = content.get("padding")
    strategy = padding.get("strategy") if isinstance(padding, dict) else None
    if isinstance(strategy, dict) and not _is_padding(strategy.get("Fixed", 1)):
        raise DataError(f"{path}: padding to {strategy['Fixed']!r:.40} tokens; {MOST_PADDING:,} are allowed")


def _is_padding(length: Any) -> bool:
    return is_count(length) and length <= MOST_PADDING


def _growth(spec: Any) -> float:
    """How many times longer a normalizer or decoder of tokenizer.json can make a text."""
    if not isinstance(spec, dict):
        return 1.0
    lists = [spec[name] for name in ("normalizers", "decoders") if isinstance(spec.get(name), list)]
    inner = [one for parts in lists for one in parts]
    times = math.prod((_growth(one) for one in inner[:MOST_PARTS]), start=1.0)
    if len(inner) > MOST_PARTS:
        return math.inf
    kind, pattern, content = (spec.get(name) for name in ("type", "pattern", "content"))
    if kind == "Replace" and isinstance(content, str):
        found = pattern.get("String") if isinstance(pattern, dict) else None
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        found = found if isinstance(found, str) else ""
        finds_nothing = not found and _finds_nothing(regex)  # and so the content stands between any two letters
        times *= max(1.0, len(content) / len(found or "x")) + float(finds_nothing)
    if kind == "Prepend" and isinstance(spec.get("prepend"), str):
        times *= len(spec["prepend"]) + 1.0
    if kind == "Precompiled" and isinstance(charsmap := spec.get("precompiled_charsmap"), str):
        times *= _longest_replacement(charsmap)
    return times


def _finds_nothing(regex: Any) -> bool:
    """Whether a regular expression can match no text, as far as it is one of Python's, too."""
    try:
        return re.compile(regex).match("") is not None
    except (re.error, TypeError, ValueError, RecursionError):
        return True


def _longest_replacement(charsmap: str) -> float:
    """Of a map of SentencePiece: the size of a trie in four bytes, the trie, and its texts, each ended by a zero. The
    longest of usual ones has 33 bytes."""
    try:
        data = base64.b64decode(charsmap, validate=True)
    except ValueError:
        return math.inf
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(1.0, max(map(len, texts)) / 8)


def _says(tokenizer: PreTrainedTokenizerBase, before: str = "") -> bool:
    """Whether the chat template, with something before it, writes what a message of text says."""
    said = "It is so."
    template: Any = tokenizer.chat_template
    try:
        tokenizer.chat_template = before + template
        with bounded(TEMPLATE_BYTES):
            return said in render((Message("user", said),), tokenizer)
    except Exception:  # a template is a program, and may raise anything; it is told elsewhere
        return False
    finally:
        tokenizer.chat_template = template


def require_words(folder: Path, tokenizer: PreTrainedTokenizerBase, words: Collection[str], model: str) -> None:
    """Raise DataError for a tokenizer without the tokens by which `model` is shown images."""
    vocabulary = tokenizer.get_vocab()
    if missing := [word for word in words if word not in vocabulary]:
        raise DataError(f"{folder}: the tokenizer lacks {', '.join(missing)}; {model} cannot see images without them")


def check_image_token(folder: Path, token_id: Any, tokenizer: PreTrainedTokenizerBase, word: str) -> None:
    """Raise DataError where config.json and the tokenizer disagree about the token of images."""
    expected = tokenizer.get_vocab()[word]
    if token_id != expected:
        raise DataError(
            f"{folder}/config.json: image_token_id is {token_id}, but the tokenizer's {word} is {expected}; correct "
            "image_token_id"
        )


def check_vocabulary(folder: Path, rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError for a tokenizer with more tokens than the embedding has rows."""
    if len(tokenizer) > rows:
        raise DataError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows; they must fit"
        )


def stop_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer, the one that ends a turn first: <|im_end|> (GPT-OSS: <|return|>), else what the
    chat template writes behind an answer; the tokenizer's own end token, and those of generation_config.json. Raises
    DataError where there is none."""
    vocabulary = tokenizer.get_vocab()
    words = ("<|im_end|>", "<|return|>", _turn_end(tokenizer), tokenizer.eos_token)
    ids = dict.fromkeys(vocabulary[word] for word in words if word in vocabulary)
    ids |= dict.fromkeys(_generation_ends(folder, len(tokenizer)))
    if not ids:
        raise DataError(f"{folder}: the tokenizer has no end token; name one in tokenizer_config.json as eos_token")
    return tuple(ids)


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the chat template writes right behind an answer; "" where there is none, or where it takes
    no such conversation. Whether it can be used at all is found elsewhere."""
    said = "It is so."
    try:
        with bounded(TEMPLATE_BYTES):
            text = render((Message("user", "?"), Message("assistant", said), Message("user", "?")), tokenizer)
    except Exception:  # a template is a program, and may raise anything
        return ""
    after = text.rpartition(said)[2].lstrip(" ")
    found = [token.content for token in tokenizer.added_tokens_decoder.values() if after.startswith(token.content)]
    return max(found, key=len, default="")


def _generation_ends(folder: Path, tokens: int) -> list[int]:
    """The end tokens of generation_config.json, which other programs stop at."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.is_file() else None
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if any(not isinstance(end, int) or isinstance(end, bool) for end in ends):
        raise DataError(f"{path}: eos_token_id is {found!r:.60}; it must be a token id, or a list of them")
    return [end for end in ends if 0 <= end < tokens]


def read_preprocessor(folder: Path, needed: Sequence[str], *, resample: int = 3) -> dict[str, Any]:
    """The settings of transformers' image processor, refused where they lack something or ask for what is not built:
    another resize than that of PIL's number `resample` (3: bicubic), or pixels that are not in 0..1 and normalised."""
    path, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    content = read_json(path) if path.is_file() else {}
    if not content and joint.is_file():
        path, content = joint, read_json(joint).get("image_processor")
    if not isinstance(content, dict) or not path.is_file():
        raise DataError(f"{folder}: no preprocessor_config.json; images cannot be prepared as the model expects")
    absent = [key for key in (*needed, "image_mean", "image_std") if key not in content]
    if absent:
        raise DataError(f"{path}: lacks {', '.join(absent)}; images cannot be prepared as the model expects")
    for key, only in {**_ONLY, "resample": resample}.items():
        if content.get(key, only) != only:
            raise DataError(f"{path}: {key} is {content[key]}; only {only} is known")
    for key, above in (("image_mean", -math.inf), ("image_std", 0.0)):
        value = content[key]
        numbers = [v for v in value if isinstance(v, int | float) and v > above] if isinstance(value, list) else []
        if len(numbers) != 3 or len(value) != 3:
            raise DataError(f"{path}: {key} is {value!r}; it must be three numbers{' above 0' if above == 0 else ''}")
    return content


def read_video_preprocessor(folder: Path) -> dict[str, Any]:
    """The settings of transformers' video processor; empty where a folder has none."""
    path, joint = folder / "video_preprocessor_config.json", folder / "processor_config.json"
    inside = read_json(joint).get("video_processor") if joint.is_file() else None
    return inside if isinstance(inside, dict) else read_json(path) if path.is_file() else {}


def is_count(value: Any) -> bool:
    """Whether a value of a JSON file is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def require_tiles(where: str, value: Any) -> int:
    """A number of tiles in a JSON file. Raises DataError for one that is none, or too large."""
    if not is_count(value) or value > MOST_TILES:
        raise DataError(f"{where} is {value!r:.60}; it must be a whole number, {MOST_TILES} at most")
    return value


def content_of(file: Path) -> str:
    """The size of a file, and a digest of all of it, or of some blocks of a large one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            digest = hashlib.file_digest(stream, "sha256")
        else:
            digest = hashlib.sha256()
            for start in np.linspace(0, size - BLOCK_BYTES, BLOCKS).astype(int):
                stream.seek(int(start))
                digest.update(stream.read(BLOCK_BYTES))
    return f"{size:,} bytes, {digest.hexdigest()[:16]}"
