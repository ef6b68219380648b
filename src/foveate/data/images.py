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
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import PIL.Image
from PIL import ExifTags, UnidentifiedImageError, features
from PIL.Image import Transpose
from PIL.ImageFile import ImageFile

from foveate.config.data import MAX_PIXELS, MOST_PIXELS
from foveate.data.image_structure import structure_fault
from foveate.data.image_values import image_source, shorten_source
from foveate.errors import DataError, join_where, one_line
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
_BROKEN = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, zlib.error,
    PIL.Image.DecompressionBombError, MemoryError,
)  # fmt: skip

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if features.check("avif") else []))
"""The formats that are read, by their names in Pillow."""
MAX_BYTES = 2**28
"""Bytes of the largest encoded image that is read."""

_SMALLER = "make the image smaller, or raise data.max_image_pixels"
SEVERAL = "holds several images (an animation, or pages), of which the first counts"
_SIXTEEN_BITS = "is a grey image of 16 bits: values above 255 become white, as in the official code"


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Where the images of a dataset lie (None: beside its files), and the most pixels of one."""

    root: Path | None = None
    max_pixels: int = MAX_PIXELS


def read_image(value: Any, folders: Sequence[Path], max_pixels: int = MAX_PIXELS) -> Image:
    """One entry of an images column as a record, without decoding pixels.

    value: see `image_values.image_source`. A relative path is looked up in `folders`, in order. Raises DataError,
    without a place, for a missing, empty or truncated file, for something that is no image, for one of more than
    `max_pixels`, and for a value of another type.
    """
    return inspect_image(value, folders, max_pixels)[0]


def inspect_image(value: Any, folders: Sequence[Path], max_pixels: int = MAX_PIXELS) -> tuple[Image, tuple[str, ...]]:
    """`read_image`, and remarks: what the image or its entry holds that the model does not get to see."""
    source, remarks = image_source(value)
    if isinstance(source, bytes):
        header = _header(source, max_pixels)
        return Image(path=None, data=source, width=header.width, height=header.height), remarks + header.remarks
    found, about = _find(source, folders)
    header = _header_of_file(found, about.st_mtime_ns, about.st_size, max_pixels)
    return Image(path=found, data=None, width=header.width, height=header.height), remarks + header.remarks


def find_file(path: Path, folders: Sequence[Path]) -> Path:
    """The file of a path, looked up in `folders`, in order, where it is relative. Raises DataError, without a place."""
    return _find(path, folders)[0]


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
    raise DataError(f"no such file: {shorten_source(path)}{looked}; fix the path or give the folder of the images")


@dataclass(frozen=True, slots=True)
class _Header:
    """The size as shown, after the EXIF rotation, and remarks on what decoding will lose."""

    width: int
    height: int
    remarks: tuple[str, ...]


@lru_cache(maxsize=2**18)
def _header_of_file(path: Path, changed_ns: int, size: int, max_pixels: int) -> _Header:  # noqa: ARG001 - a key
    """`_header`, once for all rows that show the same image, and again when its file has changed."""
    return _header(path, max_pixels)


def read_size(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height in pixels as shown, after the EXIF rotation, from the header of a file or of encoded bytes.

    Also walks the structure of JPEG, PNG and WebP files to their end, which costs no decoding and finds files that were
    cut off. Raises DataError, without a place, for what is not a whole image of one of `FORMATS`, and for more than
    `max_pixels` pixels or `MAX_BYTES` bytes: a small file can unfold to all memory there is.
    """
    header = _header(source, max_pixels)
    return header.width, header.height


def _header(source: Path | bytes, max_pixels: int) -> _Header:
    name = name_of_source(source)
    try:
        with open_picture(source, max_pixels) as (picture, file):
            fault = structure_fault(picture, file)
            width, height = picture.size
            turned = _orientation(picture) in _TURNED
            remarks = (_SIXTEEN_BITS,) if has_16_bits(picture) else ()
            remarks += (SEVERAL,) if _has_several(picture) else ()
    except DataError as error:
        raise DataError(f"{name} {error}") from error
    except _BROKEN as error:
        raise DataError(f"{name} is damaged or truncated ({one_line(error)})") from error
    if fault:
        raise DataError(f"{name} is truncated: {fault}")
    return _Header(height, width, remarks) if turned else _Header(width, height, remarks)


def _has_several(picture: ImageFile) -> bool:
    """Whether a file holds a second image that can be reached."""
    try:
        picture.seek(1)
    except _BROKEN:  # also where the first one is the last
        return False
    return True


@contextmanager
def open_picture(source: Path | bytes, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[ImageFile, BinaryIO]]:
    """An image file or encoded image, opened and not decoded, with the file that it is read from. The only place where
    one is opened: other formats than `FORMATS`, for which Pillow may start other programs, are never tried.

    Raises DataError, without a name in front, for an empty one, another format, and more than `max_pixels` pixels or
    `MAX_BYTES` bytes; errors of Pillow pass through. What Pillow warns of (damaged metadata) is left out: the pixels
    count.
    """
    with _open_bytes(source) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        size = file.seek(0, 2)
        file.seek(0)
        if not 0 < size <= MAX_BYTES:
            raise DataError("is empty (0 bytes)" if size == 0 else f"has {size} bytes; at most {MAX_BYTES} are read")
        try:
            picture = PIL.Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise DataError(f"is not an image of a known format; allowed: {', '.join(FORMATS)}") from None
        except PIL.Image.DecompressionBombError as error:
            raise DataError(f"has too many pixels ({one_line(error)}); {_SMALLER}") from error
        with picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise DataError(f"has too many pixels ({width} x {height}, at most {max_pixels} are read); {_SMALLER}")
            yield picture, file


def load_image(image: Image, where: str = "") -> PIL.Image.Image:
    """Decode an image to 8-bit RGB, upright.

    EXIF rotation is applied. All else is Pillow's `convert("RGB")`, as in the official code of InternVL and in
    transformers: transparency is dropped, 16-bit greys are cut at 255, palettes, CMYK and other modes are converted.
    `where` names the row for errors. Raises DataError if the pixels cannot be decoded, if they are 32-bit floats, or if
    the size is no longer the one in the record, which is known before anything is decoded. Of an animation the first
    image counts.
    """
    name = "embedded bytes" if image.path is None else str(image.path)
    place = join_where([where, "field images"])
    source = source_of(image)
    try:
        with open_picture(source, MOST_PIXELS) as (picture, _):
            if sorted(picture.size) != sorted((image.width, image.height)):
                raise DataError(_changed(image, picture.size))
            rgb = upright_rgb(picture)
    except DataError as error:
        raise DataError(f"{place}: {name} {error}") from error
    except _BROKEN as error:
        raise DataError(f"{place}: {name} cannot be decoded ({one_line(error)}); replace the file") from error
    if rgb.size != (image.width, image.height):
        raise DataError(f"{place}: {name} {_changed(image, rgb.size)}")
    return rgb


def upright_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture in 8-bit RGB, upright, and without metadata, by which others would turn it a second time. Raises
    DataError, without a name in front, for 32-bit floats."""
    if picture.mode == "F":
        raise DataError("has 32-bit float pixels, which have no agreed white; save it with 8 bits")
    rgb, orientation = picture.convert("RGB"), _orientation(picture)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    elif rgb is picture:
        rgb = picture.copy()
    rgb.info.clear()
    return rgb


def _changed(image: Image, size: tuple[int, int]) -> str:
    return (
        f"is now {size[0]} x {size[1]} pixels, but was {image.width} x {image.height} when the data were read; "
        "do not change images during a run"
    )


def has_16_bits(picture: PIL.Image.Image) -> bool:
    return picture.mode == "I" or picture.mode.startswith("I;16")


def _orientation(picture: PIL.Image.Image) -> int:
    """The EXIF orientation that is still to be undone. The base class's reader is used because PNG's own would decode
    the pixels. Metadata that cannot be read leave an image as it lies, which is how viewers show it."""
    if picture.format == "TIFF":  # Pillow turns these itself, their size included
        return 1
    try:
        return PIL.Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except _BROKEN:
        return 1


def _open_bytes(source: Path | bytes) -> BinaryIO:
    return BytesIO(source) if isinstance(source, bytes) else open(str(source), "rb")


def source_of(image: Image) -> Path | bytes:
    """The file of an image or a video, or its bytes."""
    source = image.data if image.path is None else image.path
    assert source is not None, "an image has a path or bytes"
    return source


def name_of_source(source: Path | bytes) -> str:
    return f"embedded bytes ({len(source)})" if isinstance(source, bytes) else str(source)
