from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
from PIL import ImageOps

from foveate.data.images import load_image, read_image, read_size
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


def test_transparency_is_laid_over_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = (0, 255, 51)
    assert loaded(saved(PIL.Image.fromarray(rgba))).tolist() == [[[255] * 3, [0] * 3, [204] * 3]]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putdata([0, 1])
    assert loaded(saved(palette, transparency=0)).tolist() == [[[255] * 3, [200, 0, 0]]]
    assert loaded(saved(palette)).tolist() == [[[9] * 3, [200, 0, 0]]]


def test_sixteen_bit_greys_keep_their_upper_byte():
    grey = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    assert loaded(saved(PIL.Image.fromarray(grey)))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_grey_bilevel_and_cmyk_become_rgb():
    assert loaded(saved(PIL.Image.new("L", (1, 1), 77))).tolist() == [[[77] * 3]]
    assert loaded(saved(PIL.Image.new("1", (1, 1), 1))).tolist() == [[[255] * 3]]
    assert loaded(saved(PIL.Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")).tolist() == [[[255, 0, 0]]]


def test_float_pixels_are_refused():
    data = saved(PIL.Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(DataError, match="x, row 1, field images: embedded bytes: 32-bit float pixels"):
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
