"""The forms of an entry in a videos column that is a file: a path, encoded bytes, or a mapping with one of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.config.data import MAX_PIXELS
from foveate.data.image_values import decoded_base64, image_source, looks_like_image
from foveate.data.images import find_file
from foveate.data.videos import container_of, inspect_video
from foveate.errors import DataError
from foveate.records import Video

_SUFFIX = re.compile(r"\.(?:mp4|webm|mkv|avi|mov|m4v|mpe?g|flv|wmv|ts)$", re.IGNORECASE)
_KEYS = ("bytes", "path", "video", "video_url", "url")
_DESCRIBING = (*_KEYS, "type", "id", "name", "width", "height", "duration")


def is_video_entry(value: Any) -> bool:
    """Whether a value of a videos column is a video file by its suffix or by its first bytes, and no image."""
    value = _inner(value)
    if isinstance(value, bytes):
        return container_of(value[:400]) is not None
    return isinstance(value, str) and (_is_data_url(value) or _SUFFIX.search(value[-6:]) is not None)


def is_frame(value: Any) -> bool:
    """Whether a value of a videos column is an image by its suffix or by its first bytes: a frame."""
    return looks_like_image(_inner(value))


def inspect_video_entry(
    value: Any, folders: Sequence[Path], max_pixels: int = MAX_PIXELS
) -> tuple[Video, tuple[str, ...]]:
    """The video of an entry, and remarks on what of it is not read. A relative path is looked up in `folders`, in
    order. Raises DataError, without a place, as `inspect_video`, for a file that is missing and for addresses on the
    network, which are never fetched."""
    inner = _inner(value)
    if isinstance(inner, str) and _is_data_url(inner):
        inner = decoded_base64(inner)
    if not isinstance(inner, str | bytes | Path) or not inner:
        found = f"a mapping with {', '.join(map(str, value)) or 'nothing'}" if isinstance(value, Mapping) else inner
        raise DataError(f"a video must be a path, bytes, or a mapping with one of them, not {found!r:.80}")
    source = inner if isinstance(inner, bytes) else image_source(inner)[0]
    unread = [str(name) for name in value if name not in _DESCRIBING] if isinstance(value, Mapping) else []
    if unread:
        raise DataError(f"a video has {', '.join(unread)}, which is not read; frames are chosen by data.video")
    return inspect_video(source if isinstance(source, bytes) else find_file(source, folders), max_pixels)


def _inner(value: Any) -> Any:
    found = next((value[key] for key in _KEYS if value.get(key)), None) if isinstance(value, Mapping) else value
    if isinstance(found, Mapping):  # OpenAI's {video_url: {url}}
        found = found.get("url")
    return found


def _is_data_url(value: str) -> bool:
    return value[:11].lower() == "data:video/"
