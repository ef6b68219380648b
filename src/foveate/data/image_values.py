"""The forms of an entry in an images column: a path, encoded bytes, base64, a `data:` or `file:` URL, or a mapping."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from foveate.errors import DataError

MAX_BASE64 = 2**28 // 3 * 4
"""Characters of the longest base64 text that is decoded."""
BYTES_KEYS = ("bytes", "base64", "data")
PATH_KEYS = ("path", "image", "image_url", "url", "filename", "file_name")
"""The keys of a mapping that hold its image, in the order in which they count: bytes first."""
DESCRIBING_KEYS = ("type", "width", "height", "detail", "format", "id", "name", "caption", "alt")
"""The keys that say something about an image without asking for another treatment of it."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_DATA_URL = re.compile(r"data:[^,]{0,200}?(;base64)?,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+=*\s*")
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|BM.{4}\0\0\0\0|II\*\0|MM\0\*|....ftyp(?:avif|avis|mif1)",
    re.DOTALL,
)
_SUFFIX = re.compile(r"\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif)$", re.IGNORECASE)
_SHOWN = 120


def image_source(value: Any) -> tuple[Path | bytes, tuple[str, ...]]:
    """The path or the encoded bytes of an image, and remarks on what of the entry nobody reads.

    value: a path, `file:` URL, `data:` URL or base64 text; encoded bytes; or a mapping with one of them under a key of
    `BYTES_KEYS` or `PATH_KEYS` (bytes count before a path, which is then only a name). Raises DataError, without a
    place, for anything else, and for addresses on the network, which are never fetched.
    """
    if not isinstance(value, Mapping):
        return _plain(value), ()
    for key in (*BYTES_KEYS, *PATH_KEYS):
        inner = value.get(key)
        if isinstance(inner, Mapping) and not any(isinstance(one, Mapping) for one in inner.values()):
            if is_no_image(dict(inner)):
                continue
            return image_source(inner)  # OpenAI's {image_url: {url}}, or an image of its own: {image: {bytes}}
        if inner is None or (isinstance(inner, str | bytes) and not inner):
            continue
        found = decoded_base64(inner) if key in BYTES_KEYS and isinstance(inner, str) else _plain(inner)
        known = (*BYTES_KEYS, *PATH_KEYS, *DESCRIBING_KEYS)
        unread = [str(name) for name, given in value.items() if name not in known and given is not None]
        remark = f"has {', '.join(unread)}, which nobody reads; the limits of images are settings of the model"
        return found, (remark,) if unread else ()
    raise DataError(f"an image must have one of {', '.join((*BYTES_KEYS, *PATH_KEYS))}, not {_shown_keys(value)}")


def is_no_image(value: Any) -> bool:
    """Whether a column without an image in this row says so: null, an empty text, list or bytes, or a mapping of
    nothing but such (a null of the Image feature of `datasets`)."""
    if value is None or isinstance(value, str | bytes | list):
        return not value
    if isinstance(value, dict):
        return all(is_no_image(inner) for inner in value.values())
    return value != value  # NaN


def looks_like_image(value: Any) -> bool:
    """Whether a value is an image, or a list of some, by what it is and not by the name of its column."""
    if isinstance(value, list):
        return bool(value) and looks_like_image(value[0])
    if isinstance(value, dict):
        return "bytes" in value and ("path" in value or isinstance(value["bytes"], bytes)) and not is_no_image(value)
    if isinstance(value, bytes):
        return _SIGNATURES.match(value[:16]) is not None
    if not isinstance(value, str):
        return False
    return value[:11].lower() == "data:image/" or _is_base64(value) or _SUFFIX.search(value[-6:]) is not None


def decoded_base64(text: str) -> bytes:
    """The bytes of base64 text, with or without a `data:` header. Raises DataError for what is none, or too long."""
    if len(text) > MAX_BASE64:
        raise DataError(f"base64 of {len(text)} characters is too long; at most {MAX_BASE64} are decoded")
    header = _DATA_URL.match(text[:300])
    if header is not None and header[1] is None:
        raise DataError(f"{shorten_source(text)} is no base64; of data: URLs those with ;base64 are read")
    body = text[header.end() :] if header is not None else text
    try:
        plain = "".join(body.split()).replace("-", "+").replace("_", "/").rstrip("=")
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{shorten_source(text)} is no valid base64 ({error})") from None


def shorten_source(source: str | Path) -> str:
    """A path or an address for a message."""
    text = str(source)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def _plain(value: Any) -> Path | bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, Path) or (isinstance(value, str) and value):
        return _path_or_bytes(value) if isinstance(value, str) else value
    found = "an empty text" if isinstance(value, str) else type(value).__name__
    raise DataError(f"an image must be a path, bytes, base64, or a mapping with one of them, not {found}")


def _path_or_bytes(text: str) -> Path | bytes:
    scheme = found[1].lower() if (found := _SCHEME.match(text[:40])) else ""
    if scheme == "data":
        return decoded_base64(text)
    if scheme == "file":
        host, slash, path = text[7:].partition("/") if text[5:7] == "//" else ("", "", text[5:])
        if host not in ("", "localhost"):
            raise DataError(f"{shorten_source(text)} names a file of another machine; give a path of this one")
        return Path(unquote(slash + path))
    if scheme and text[len(scheme) :].startswith("://"):
        raise DataError(
            f"{shorten_source(text)} is an address on the network ({scheme}:), and images are not downloaded; "
            "download it and give the path"
        )
    return decoded_base64(text) if _is_base64(text) else Path(text)


def _is_base64(text: str) -> bool:
    """Whether a text begins like an image in base64; a path to a file is no image."""
    if len(text) < 32 or not _BASE64.fullmatch(text[:32]):
        return False
    try:
        start = base64.b64decode("".join(text[:32].split())[:24].replace("-", "+").replace("_", "/"))
    except binascii.Error:
        return False
    return _SIGNATURES.match(start) is not None


def _shown_keys(value: Mapping[Any, Any]) -> str:
    return f"a mapping with {', '.join(map(str, value)) or 'nothing'}"[:_SHOWN]
