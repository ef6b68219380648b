"""Images are not trusted: which formats are tried, and what is known before anything is decoded."""

from __future__ import annotations

import re
import struct
import tracemalloc
import zlib
from io import BytesIO
from pathlib import Path

import PIL.Image
import pytest
from PIL import EpsImagePlugin

from foveate.config.data import MAX_PIXELS
from foveate.data import image_values
from foveate.data.images import FORMATS, load_image, read_image
from foveate.errors import DataError
from foveate.records import Image

PACKAGE = Path(__file__).parent.parent.parent / "src" / "foveate"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"


def saved(fmt, size=(30, 20)):
    buffer = BytesIO()
    PIL.Image.new("RGB", size).save(buffer, fmt)
    return buffer.getvalue()


def png_of(width, height):
    """A small PNG whose header says so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (header, b"IDAT" + zlib.compress(bytes(1000)), b"IEND")
    body = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_images_are_opened_in_one_place():
    openings = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if re.search(r"\b(?:Image|Picture|PIL)\.open\(|imread\(", path.read_text("utf-8"))
    }
    assert openings == {"data/images.py"}
    calls = re.findall(r"PIL\.Image\.open\(.*", (PACKAGE / "data" / "images.py").read_text("utf-8"))
    assert len(calls) == 1
    assert "formats=FORMATS" in calls[0]


def test_nothing_that_datasets_decodes_is_asked_of_it():
    """An Image feature is read as its bytes and path; `datasets` would decode it with every plugin of Pillow."""
    users = [
        path for path in PACKAGE.rglob("*.py") if re.search(r"^\s*(?:import|from) datasets\b", path.read_text(), re.M)
    ]
    assert not users


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_format_of_the_list_is_read(fmt):
    assert load_image(read_image(saved(fmt), ())).size == (30, 20)


@pytest.mark.parametrize("fmt", ["ICNS", "PPM", "PCX", "TGA", "SGI", "ICO", "DDS", "PDF", "JPEG2000", "XBM"])
def test_another_format_is_refused_even_where_pillow_knows_it(fmt, tmp_path):
    mode, size = ("1" if fmt == "XBM" else "RGB"), (128, 128)
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        PIL.Image.new(mode, size).save(file, fmt)
    for value in (path.read_bytes(), str(path)):
        with pytest.raises(DataError, match="is not an image of a known format"):
            read_image(value, ())


def test_eps_starts_no_program(monkeypatch):
    def started(*_args, **_options):
        raise AssertionError("Ghostscript was asked for")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    with pytest.raises(DataError, match="is not an image of a known format"):
        read_image(EPS, ())
    with pytest.raises(DataError, match="is not an image of a known format"):
        load_image(Image(None, EPS, 41, 41))


@pytest.mark.parametrize(("width", "height"), [(9000, 10_000), (13_000, 13_000), (100_000, 100_000), (2**31 - 1, 1)])
def test_pixels_are_counted_before_any_is_decoded(width, height):
    data = png_of(width, height)
    tracemalloc.start()
    with pytest.raises(DataError, match="too many pixels"):
        read_image(data, ())
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_the_limit_of_pixels_is_an_argument():
    assert read_image(png_of(100, 50), (), 5000).width == 100
    with pytest.raises(DataError, match=r"too many pixels \(100 x 50, at most 4999 are read\)"):
        read_image(png_of(100, 50), (), 4999)
    assert read_image(png_of(9000, 10_000), (), 2 * MAX_PIXELS).height == 10_000


def test_a_file_that_grew_since_it_was_read_is_not_decoded():
    with pytest.raises(DataError, match="is now 9000 x 9000 pixels, but was 30 x 20"):
        load_image(Image(None, png_of(9000, 9000), 30, 20))


def test_base64_is_bounded_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(image_values, "MAX_BASE64", 1000)
    for value in ("data:image/png;base64," + "A" * 1001, {"bytes": "A" * 1001}):
        with pytest.raises(DataError, match="is too long; at most 1000 are decoded"):
            read_image(value, ())


def test_an_encoded_image_is_bounded_in_bytes(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff")
        file.truncate(2**28 + 1)  # takes no room on the disk
    with pytest.raises(DataError, match="has 268435457 bytes; at most 268435456 are read"):
        read_image("a.jpg", (tmp_path,))
