from __future__ import annotations

import base64
import re
import struct
import zlib
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
from PIL import ImageOps

from foveate.data.images import inspect_image, load_image, read_image, read_size
from foveate.errors import DataError
from foveate.records import Image


def saved(picture, fmt="PNG", **options):
    buffer = BytesIO()
    picture.save(buffer, fmt, **options)
    return buffer.getvalue()


def loaded(data):
    return np.asarray(load_image(read_image(data, [])))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_and_pixels_are_those_of_the_upright_picture(fmt, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = saved(PIL.Image.fromarray(noise(24, 40, 3)), fmt, exif=exif)
    with PIL.Image.open(BytesIO(data)) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    assert read_size(data) == upright.size == ((24, 40) if orientation > 4 else (40, 24))
    assert np.array_equal(loaded(data), np.asarray(upright))


def test_a_png_may_say_its_orientation_behind_the_pixels():
    plain = saved(PIL.Image.fromarray(noise(4, 9, 3)))
    tags = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    chunk = struct.pack(">I", len(tags)) + b"eXIf" + tags + struct.pack(">I", zlib.crc32(b"eXIf" + tags))
    data = plain[:-12] + chunk + plain[-12:]
    assert read_size(data) == (4, 9)
    assert loaded(data).shape == (9, 4, 3)


def test_broken_exif_leaves_a_picture_as_it_lies():
    data = saved(PIL.Image.fromarray(noise(4, 9, 3)), "JPEG", exif=b"Exif\x00\x00garbage!")
    assert read_size(data) == (9, 4)
    assert loaded(data).shape == (4, 9, 3)


def official(data):
    """The picture as the official code of InternVL and transformers read it."""
    with PIL.Image.open(BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def test_transparency_is_dropped_as_in_the_official_code():
    rgba = noise(3, 5, 4)
    assert np.array_equal(loaded(saved(PIL.Image.fromarray(rgba))), rgba[..., :3])
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putdata([0, 1])
    for data in (saved(palette, transparency=0), saved(palette)):
        assert loaded(data).tolist() == official(data).tolist() == [[[9] * 3, [200, 0, 0]]]
    grey = saved(PIL.Image.fromarray(rgba).convert("LA"))
    assert np.array_equal(loaded(grey), official(grey))


def test_sixteen_bit_greys_are_cut_at_255_as_in_the_official_code_and_that_is_told():
    for most in (255, 4095, 65535):  # 8, 12 and 16 bits of data
        grey = np.linspace(0, most, 40).astype(np.uint16).reshape(5, 8)
        data = saved(PIL.Image.fromarray(grey))
        assert np.array_equal(loaded(data), official(data))
        assert loaded(data).max() == 255, "not black"
        assert "above 255 become white" in inspect_image(data, [])[1][0]
    assert inspect_image(saved(PIL.Image.fromarray(noise(3, 3))), [])[1] == ()


def test_grey_bilevel_and_cmyk_become_rgb():
    assert loaded(saved(PIL.Image.new("L", (1, 1), 77))).tolist() == [[[77] * 3]]
    assert loaded(saved(PIL.Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]
    assert loaded(saved(PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")).tolist() == [[[255, 0, 0]]]


def test_float_pixels_are_refused():
    data = saved(PIL.Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(DataError, match="x, row 1, field images: embedded bytes has 32-bit float pixels"):
        load_image(read_image(data, []), "x, row 1")


def test_pixels_that_cannot_be_decoded_are_an_error_of_the_row(tmp_path):
    data = bytearray(saved(PIL.Image.fromarray(noise(64, 64, 3))))
    data[200:400] = bytes(200)
    (tmp_path / "a.png").write_bytes(data)
    image = read_image("a.png", [tmp_path])
    with pytest.raises(DataError, match=r"^x\.parquet, row 4, field images: \S*a\.png cannot be decoded \(.+\)"):
        load_image(image, "x.parquet, row 4")


def test_a_picture_that_changed_since_it_was_read_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(PIL.Image.new("RGB", (5, 4))))
    image = Image(tmp_path / "a.png", None, 4, 5)
    with pytest.raises(DataError, match="is now 5 x 4 pixels, but was 4 x 5"):
        load_image(image)


def test_the_thumbnail_of_a_truncated_jpeg_does_not_count_as_its_end():
    picture = PIL.Image.fromarray(noise(64, 64, 3))
    thumbnail = saved(picture.resize((8, 8)), "JPEG")
    data = saved(picture, "JPEG", comment=thumbnail)
    assert read_size(data) == (64, 64)
    with pytest.raises(DataError, match="is truncated: no end-of-image marker"):
        read_size(data[:-200])


def encoded_as(data, form):
    text = base64.b64encode(data).decode()
    return {
        "base64": text,
        "base64 in lines": "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
        "base64 without its padding": text.rstrip("="),
        "base64 of the URL alphabet": text.replace("+", "-").replace("/", "_"),
        "data URL": f"data:image/png;base64,{text}",
        "data URL without a type": f"data:;base64,{text}",
        "data URL with a parameter": f"data:image/png;charset=utf-8;base64,{text}",
        "bytes key": {"bytes": text},
        "bytes key with a data URL": {"bytes": f"data:image/jpeg;base64,{text}"},
        "image key": {"image": f"data:image/jpeg;base64,{text}"},
        "part": {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{text}"}},
    }[form]


FORMS = (
    "base64", "base64 in lines", "base64 without its padding", "base64 of the URL alphabet", "data URL",
    "data URL without a type", "data URL with a parameter", "bytes key", "bytes key with a data URL", "image key",
    "part",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_encoded_image_is_read_in_every_form_that_it_is_written_in(form, fmt):
    data = saved(PIL.Image.fromarray(noise(7, 13, 3)), fmt)
    image = read_image(encoded_as(data, form), [])
    assert (image.width, image.height) == (13, 7)
    assert image.path is None
    assert np.array_equal(np.asarray(load_image(image)), official(data))


def test_a_path_is_read_in_every_form_that_it_is_written_in(tmp_path):
    (tmp_path / "ein bild.png").write_bytes(saved(PIL.Image.new("RGB", (5, 4))))
    path = tmp_path / "ein bild.png"
    for value in (
        "ein bild.png", str(path), path, path.as_uri(), f"file://localhost{str(path).replace(' ', '%20')}",
        "file:ein%20bild.png", {"path": "ein bild.png"}, {"image": path.as_uri()}, {"url": "ein bild.png"},
        {"bytes": None, "path": "ein bild.png"}, {"bytes": "", "path": "ein bild.png"},
        {"bytes": b"", "path": "ein bild.png"},
    ):  # fmt: skip
        assert read_image(value, [tmp_path]).path == path


def test_what_of_an_image_entry_nobody_reads_is_told(tmp_path):
    (tmp_path / "a.png").write_bytes(saved(PIL.Image.new("RGB", (5, 4))))
    image, remarks = inspect_image({"image": "a.png", "max_pixels": 10_000, "min_pixels": None}, [tmp_path])
    assert (image.width, len(remarks)) == (5, 1)
    assert "has max_pixels, which nobody reads" in remarks[0]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("https://example.com/a.png", "https://example.com/a.png is an address on the network"),
        ("HTTP://example.com/a.png", "not downloaded"),
        ({"url": "http://example.com/b.jpg"}, "http://example.com/b.jpg is an address on the network"),
        ("s3://bucket/a.png", "s3:"),
        ("file://otherhost/a.png", "another machine"),
        ("data:image/png,abc", "those with ;base64"),
        ("data:image/png;base64,§§", "no valid base64"),
        ({"bytes": "no base64!"}, "no valid base64"),
        ({"path": None}, "an image must have one of bytes"),
        ({"picture": "a.png"}, "not a mapping with picture"),
        (7, "not int"),
        ("", "not an empty text"),
        ("x" * 4000 + ".png", "(4004 characters)"),
    ],
)
def test_what_is_no_image_is_refused_by_what_it_is(value, what):
    with pytest.raises(DataError, match=re.escape(what)) as raised:
        read_image(value, [])
    assert len(str(raised.value)) < 400
