"""Images: where they are, how large they are shown, whether their file is whole, and their pixels.

Sizes come from headers, and wholeness from the structure of the file; pixels are decoded by `load_image` alone.
"""

from __future__ import annotations

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
from PIL import ExifTags, UnidentifiedImageError
from PIL.Image import Transpose

from foveate.errors import DataError, join_where
from foveate.records import Image

# The transpose that undoes each EXIF orientation (CIPA DC-008, tag 0x0112); 1 and unknown values mean upright.
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_TURNED = frozenset({5, 6, 7, 8})

# The errors of Pillow for a file whose header or pixels are broken.
_BOMBS = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error, *_BOMBS
)  # fmt: skip

_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RST0..7 and SOI: markers without a length
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_image(value: Any, folders: Sequence[Path]) -> Image:
    """One entry of an images column as a record, without decoding pixels.

    value: a path, encoded bytes, or a mapping with `path`, `bytes` or both (then the bytes count, and the path is only
    a name). A relative path is looked up in `folders`, in order. Raises DataError, without a place, for a missing,
    empty or truncated file, for something that is no image and for a value of another type.
    """
    path, data = _source(value)
    if data is not None:
        width, height = read_size(data)
        return Image(path=None, data=data, width=width, height=height)
    assert path is not None
    found, about = _find(path, folders)
    width, height = _size_of_file(found, about.st_mtime_ns, about.st_size)
    return Image(path=found, data=None, width=width, height=height)


def _source(value: Any) -> tuple[Path | None, bytes | None]:
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return None, value["bytes"]
        value = value.get("path")
    if isinstance(value, bytes):
        return None, value
    if isinstance(value, str | Path) and str(value):
        return Path(value), None
    found = "an empty text" if value == "" else type(value).__name__
    raise DataError(f"an image must be a path, bytes, or a mapping with path or bytes, not {found}")


def _find(path: Path, folders: Sequence[Path]) -> tuple[Path, os.stat_result]:
    places = [path] if path.is_absolute() else list(dict.fromkeys(folder / path for folder in folders))
    for place in places:
        try:
            about = place.stat()
        except (OSError, ValueError):  # not there; no name that a file can have
            continue
        if stat.S_ISREG(about.st_mode):
            return place, about
    looked = "" if path.is_absolute() else f" (looked in {', '.join(str(place.parent) for place in places)})"
    raise DataError(f"no such file: {path}{looked}; mend the path or give the folder of the images")


@lru_cache(maxsize=2**18)
def _size_of_file(path: Path, changed_ns: int, size: int) -> tuple[int, int]:  # noqa: ARG001 - they make the key
    """`read_size`, once for all rows that show the same image, and again when its file has changed."""
    return read_size(path)


def read_size(source: Path | bytes) -> tuple[int, int]:
    """Width and height in pixels as shown, after the EXIF rotation, from the header of a file or of encoded bytes.

    Also walks the structure of JPEG, PNG and WebP files to their end, which costs no decoding and finds files that were
    cut off. Raises DataError, without a place, for what is not a whole image, and for more pixels than Pillow takes
    for sane (`PIL.Image.MAX_IMAGE_PIXELS`, 89 million): a small file can unfold to all memory there is.
    """
    name = _name(source)
    try:
        with _open_bytes(source) as file:
            if not file.read(1):
                raise DataError(f"{name} is empty (0 bytes)")
            file.seek(0)
            with _no_bombs(), PIL.Image.open(file) as picture:
                fault = _structure_fault(picture, file)
                width, height = picture.size
                turned = _orientation(picture) in _TURNED
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image of a known format") from None
    except DataError:
        raise
    except _BOMBS as error:
        raise DataError(f"{name} has too many pixels ({one_line(error)}); make the image smaller") from error
    except _BROKEN as error:
        raise DataError(f"{name} is damaged or truncated ({one_line(error)})") from error
    if fault:
        raise DataError(f"{name} is truncated: {fault}")
    return (height, width) if turned else (width, height)


def load_image(image: Image, where: str = "") -> PIL.Image.Image:
    """Decode an image to 8-bit RGB, upright.

    EXIF rotation is applied; transparency is laid over white; 16-bit greys keep their upper byte; palettes, CMYK and
    other modes are converted. `where` names the row for errors. Raises DataError if the pixels cannot be decoded, if
    they are 32-bit floats, or if the size is no longer the one in the record. Of an animation the first image counts.
    """
    name = "embedded bytes" if image.path is None else str(image.path)
    try:
        source = image.data if image.path is None else image.path
        with _open_bytes(source) as file, _no_bombs(), PIL.Image.open(file) as picture:
            rgb = _rgb(picture)
            orientation = _orientation(picture)
    except DataError as error:
        raise DataError(join_where([where, "field images"]) + f": {name}: {error}") from error
    except _BROKEN as error:
        place = join_where([where, "field images"])
        raise DataError(f"{place}: {name} cannot be decoded ({one_line(error)}); replace the file") from error
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    if rgb.size != (image.width, image.height):
        raise DataError(
            f"{join_where([where, 'field images'])}: {name} is now {rgb.width} x {rgb.height} pixels, but was "
            f"{image.width} x {image.height} when the data were read; do not change images during a run"
        )
    return rgb


@contextmanager
def _no_bombs() -> Iterator[None]:
    """Pillow only warns of up to twice its limit; here that is an error. What it says of damaged metadata is left out:
    the pixels count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        yield


def _rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode == "F":
        raise DataError("32-bit float pixels have no agreed white; save the image with 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.int64)
        return PIL.Image.fromarray((grey.clip(0, 0xFFFF) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", layer.size, "white")
        return PIL.Image.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def _orientation(picture: PIL.Image.Image) -> int:
    """The EXIF orientation that is still to be undone. The base class's reader is used because PNG's own would decode
    the pixels. Metadata that cannot be read leave an image as it lies, which is how viewers show it."""
    if picture.format == "TIFF":  # Pillow turns these itself, their size included
        return 1
    try:
        return PIL.Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except _BROKEN:
        return 1


def _open_bytes(source: Path | bytes | None) -> BinaryIO:
    return BytesIO(source) if isinstance(source, bytes) else open(str(source), "rb")


def _name(source: Path | bytes) -> str:
    return f"embedded bytes ({len(source)})" if isinstance(source, bytes) else str(source)


def one_line(error: BaseException) -> str:
    """The message of an error in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------ file structure


def _structure_fault(picture: PIL.Image.Image, file: BinaryIO) -> str:
    """The fault at the end of a file, or "". Formats without a cheap check are left to the decoder."""
    size = file.seek(0, 2)
    file.seek(0)
    if picture.format == "PNG":
        return _png_fault(picture, file, size)
    if picture.format in ("JPEG", "MPO"):
        return _jpeg_fault(file, size)
    if picture.format == "WEBP":
        declared = int.from_bytes(file.read(8)[4:], "little") + 8
        return "" if size >= declared else f"it has {size} of {declared} bytes"
    return ""


def _png_fault(picture: PIL.Image.Image, file: BinaryIO, size: int) -> str:
    """Walk the chunks to IEND. An eXIf chunk behind the pixels, which Pillow meets only when it decodes, is handed to
    `picture` on the way."""
    file.seek(len(_PNG_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if file.tell() + length + 4 > size:
            return f"its {kind.decode('latin-1')} chunk ends behind the end of the file"
        if kind == b"IEND":
            return ""
        if kind == b"eXIf" and "exif" not in picture.info:
            picture.info["exif"] = b"Exif\x00\x00" + file.read(length)
            file.seek(4, 1)
        else:
            file.seek(length + 4, 1)
    return "it has no IEND chunk"


def _jpeg_fault(file: BinaryIO, size: int) -> str:
    """Look for the end-of-image marker: at the very end, where it normally stands, else behind the start of the scan
    (some cameras append data). Thumbnails in the header have end markers of their own and must not count."""
    file.seek(-2, 2)
    if file.read(2) == _JPEG_END:
        return ""
    file.seek(2)
    while len(head := file.read(2)) == 2 and head[0] == 0xFF:
        if head[1] == 0xFF:  # a fill byte before the marker
            file.seek(-1, 1)
        elif head[1] not in _JPEG_BARE:
            file.seek(int.from_bytes(file.read(2), "big") - 2, 1)
            if head[1] == _JPEG_SCAN:
                break
    return "" if _JPEG_END in file.read() else f"no end-of-image marker in its {size} bytes"
