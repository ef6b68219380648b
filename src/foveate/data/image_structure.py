"""Whether an image file is whole, from its structure: where JPEG, PNG and WebP say that they end."""

from __future__ import annotations

from typing import BinaryIO

import PIL.Image

_JPEG_END = b"\xff\xd9"
_JPEG_SCAN = 0xDA
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # TEM, RST0..7 and SOI: markers without a length
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def structure_fault(picture: PIL.Image.Image, file: BinaryIO) -> str:
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
