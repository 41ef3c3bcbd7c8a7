"""Files of every kind to uint8 RGB and back."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tmad.images import (
    UnreadableImage,
    crop_scaled,
    decode_image,
    decode_jpeg,
    decode_rgb,
    paste,
    scale,
    scaled_size,
    to_model,
    to_rgb,
    to_uint8,
)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def bomb_png(width: int, height: int) -> bytes:
    """A valid PNG header that promises width x height pixels and holds next to none."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


PHOTO = encoded(Image.fromarray(noise(40, 60, 3)), "jpeg")

UNREADABLE = {
    "zero bytes": (b"", "empty-file: the file has no bytes"),
    "a text": (b"no image at all", "not-an-image: 15 bytes that begin with b'no image'"),
    "a truncated JPEG": (PHOTO[: len(PHOTO) // 2], "truncated: OSError: image file is truncated"),
    "a truncated PNG": (encoded(Image.fromarray(noise(64, 64, 3)))[:3000], "truncated: OSError"),
    "a PNG with a broken header": (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "damaged: PNG that cannot be opened"),
    "a corrupt GIF": (encoded(Image.fromarray(noise(9, 9)), "gif")[:-40], "truncated: OSError"),
    "a bomb": (bomb_png(9_000, 9_950), "too-large: "),
    "a bomb beyond Pillow's limit": (bomb_png(60_000, 60_000), "too-large: Image size (3600000000 pixels) exceeds"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unsupported: EPS"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_usable_image_is_refused_with_its_reason(name):
    data, message = UNREADABLE[name]
    with pytest.raises(UnreadableImage) as caught:
        decode_image(data)
    assert str(caught.value).startswith(message)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_bomb_is_refused_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage, match="too-large"):
        decode_image(bomb_png(9_000, 9_950))
    with pytest.raises(UnreadableImage, match="too-large: 20x10 pixels, at most 199"):
        decode_image(encoded(Image.new("RGB", (20, 10))), max_pixels=199)


def test_rgb_grey_and_alpha_keep_their_values():
    rgb, alpha = noise(5, 7, 3), noise(5, 7, seed=1)
    rgba = np.dstack([rgb, alpha])
    grey = rgb[..., 0]
    assert np.array_equal(to_rgb(decode_image(encoded(Image.fromarray(rgb)))), rgb)
    assert np.array_equal(to_rgb(decode_image(encoded(Image.fromarray(rgba)))), rgb)
    assert np.array_equal(to_rgb(decode_image(encoded(Image.fromarray(grey)))), np.dstack([grey] * 3))
    la = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    assert np.array_equal(to_rgb(decode_image(encoded(la))), np.dstack([grey] * 3))


@pytest.mark.parametrize("transparent", [False, True])
def test_a_palette_gives_its_colours_whether_or_not_one_is_transparent(transparent):
    rgb = np.repeat(np.repeat(noise(2, 2, 3), 4, axis=0), 4, axis=1)
    image = Image.fromarray(rgb).quantize(4)
    options = {"transparency": 0} if transparent else {}
    decoded = decode_image(encoded(image, **options))
    assert decoded.mode == "P"
    assert np.array_equal(to_rgb(decoded), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind):
    values = np.array([[0, 128, 129, 257, 32896, 65534, 65535]], np.uint16)
    rgb = to_rgb(decode_image(encoded(Image.fromarray(values), kind)))
    assert rgb[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
    assert rgb.shape == (1, 7, 3)


def test_32_bit_integers_are_read_as_16_bits_and_floats_by_their_range():
    integers = Image.fromarray(np.array([[-5, 257, 70000]], np.int32))
    assert to_rgb(integers)[0, :, 0].tolist() == [0, 1, 255]
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert to_rgb(unit)[0, :, 0].tolist() == [0, 128, 255]
    wide = Image.fromarray(np.array([[-3.0, np.nan, 99.6, 300.0]], np.float32))
    assert to_rgb(wide)[0, :, 0].tolist() == [0, 0, 100, 255]


def test_cmyk_one_bit_and_ycbcr_are_converted():
    red = Image.new("CMYK", (2, 1), (0, 255, 255, 0))
    assert to_rgb(decode_image(encoded(red, "tiff"))).tolist() == [[[255, 0, 0], [255, 0, 0]]]
    assert to_rgb(decode_image(encoded(red, "jpeg", quality=100)))[0, 0].tolist() == pytest.approx([254, 0, 0], abs=3)
    bits = Image.fromarray(np.array([[True, False]]))
    assert to_rgb(decode_image(encoded(bits))).tolist() == [[[255] * 3, [0] * 3]]
    assert to_rgb(Image.new("YCbCr", (1, 1), (255, 128, 128))).tolist() == [[[255, 255, 255]]]


def test_an_unknown_colour_mode_is_refused_by_name():
    with pytest.raises(UnreadableImage, match="unsupported-mode: colour mode LAB"):
        to_rgb(Image.new("LAB", (2, 2)))


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "webp" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert to_rgb(decode_image(data))[3, 3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_shown_upright(orientation):
    upright = Image.fromarray(noise(4, 6, 3))
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = decode_image(encoded(stored, exif=exif))
    assert np.array_equal(to_rgb(shown), np.asarray(upright))
    assert (shown.format is None) == (orientation != 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 1)])
def test_images_of_a_few_pixels_are_decoded(size):
    assert to_rgb(decode_image(encoded(Image.new("RGB", size, "white")))).shape == (size[1], size[0], 3)


def whole(image: Image.Image, value: int = 77, weight: int = 255):
    """A fill over the right half of the image."""
    height, width = image.height, image.width // 2
    rgb = np.full((height, width, 3), value, np.uint8)
    return (0, image.width - width), rgb, np.full((height, width), weight, np.uint8)


IN_MODES = {
    "1": Image.fromarray(np.eye(8) > 0),
    "L": Image.fromarray(noise(8, 8)),
    "LA": Image.fromarray(noise(8, 8, 4)).convert("LA"),
    "I;16": Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1001),
    "I": Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8) * 1001),
    "F": Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)),
    "P": Image.fromarray(noise(8, 8, 3)).quantize(16),
    "RGB": Image.fromarray(noise(8, 8, 3)),
    "RGBA": Image.fromarray(noise(8, 8, 4)),
    "CMYK": Image.merge("CMYK", [Image.fromarray(noise(8, 8))] * 4),
    "YCbCr": Image.fromarray(noise(8, 8, 3)).convert("YCbCr"),
}


@pytest.mark.parametrize("mode", IN_MODES)
def test_what_a_fill_does_not_cover_keeps_its_values_and_its_depth(mode):
    original = IN_MODES[mode]
    result = paste(original, [whole(original)])
    assert result.mode == {"1": "L", "P": "RGB"}.get(mode, mode)
    before, after = (np.asarray(image.convert("RGB") if mode in ("1", "P") else image) for image in (original, result))
    if mode == "1":
        after = np.asarray(result.convert("RGB"))
    assert np.array_equal(before[:, :4], after[:, :4])
    colours = to_rgb(result)[:, 4:]
    assert np.abs(colours.astype(int) - 77).max() <= (2 if mode in ("CMYK", "YCbCr") else 0)
    if mode.endswith("A"):
        assert np.array_equal(before[..., -1], after[..., -1])


def test_a_fill_that_is_shown_in_part_is_blended_and_where_nothing_is_shown_nothing_changes():
    for mode in ("RGB", "I;16", "F"):
        original = IN_MODES[mode]
        assert np.array_equal(np.asarray(paste(original, [whole(original, weight=0)])), np.asarray(original))
        half = to_rgb(paste(original, [whole(original, value=200, weight=128)]))[:, 4:].astype(float)
        assert np.abs(half - (to_rgb(original)[:, 4:] * (127 / 255) + 200 * (128 / 255))).max() <= 1.5


def test_a_transparent_palette_becomes_alpha():
    see_through = IN_MODES["P"].copy()
    see_through.info["transparency"] = int(np.asarray(see_through)[0, 0])
    result = paste(see_through, [whole(see_through)])
    assert result.mode == "RGBA"
    assert result.getpixel((0, 0))[3] == 0


def test_a_crop_of_the_scaled_image_is_cut_from_it():
    rgb = noise(60, 90, 3)
    assert scaled_size(60, 90, 30) == (30, 45)
    assert np.array_equal(crop_scaled(rgb, scaled=(60, 90), top=3, left=7, size=32), rgb[3:35, 7:39])
    whole = np.asarray(Image.fromarray(rgb).resize((45, 30), Image.Resampling.LANCZOS))
    part = crop_scaled(rgb, scaled=(30, 45), top=5, left=20, size=16)
    assert np.abs(part.astype(int) - whole[5:21, 20:36]).max() <= 1
    with pytest.raises(ValueError, match=r"16-pixel square at \(15, 0\) leaves the scaled image 30x45"):
        crop_scaled(rgb, scaled=(30, 45), top=15, left=0, size=16)


def jpeg(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def smooth(height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(noise(height // 8 + 1, width // 8 + 1, 3)).resize((width, height)))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}])
@pytest.mark.parametrize("sides", [(64, 64), (33, 57), (17, 16)])
def test_the_fast_way_to_a_jpegs_pixels_gives_pillows_pixels(sides, options):
    colour = jpeg(smooth(*sides), quality=80, **options)
    grey = jpeg(smooth(*sides)[..., 0], quality=80, **({} if "subsampling" in options else options))
    for data in (colour, grey):
        found = decode_jpeg(data)
        assert found is not None
        assert found[1] == sides
        assert np.array_equal(found[0], to_rgb(decode_image(data)))
        assert np.array_equal(decode_rgb(data), found[0])


def test_a_jpeg_that_needs_pillow_goes_to_pillow():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = jpeg(smooth(32, 48), exif=exif)
    whole = jpeg(smooth(32, 48))
    cmyk = io.BytesIO()
    Image.new("CMYK", (16, 16), (1, 2, 3, 4)).save(cmyk, "JPEG")
    others = (turned, cmyk.getvalue(), whole[:-40], whole[:12], b"", b"\xff\xd8\xff", b"GIF89a")
    assert all(decode_jpeg(data) is None for data in others)
    assert decode_rgb(turned).shape == (48, 32, 3)
    assert decode_rgb(cmyk.getvalue()).shape == (16, 16, 3)
    with pytest.raises(UnreadableImage, match="truncated"):
        decode_rgb(whole[:-40])
    assert decode_jpeg(whole, max_pixels=32 * 48 - 1) is None
    with pytest.raises(UnreadableImage, match="too-large"):
        decode_rgb(whole, max_pixels=32 * 48 - 1)


@pytest.mark.parametrize("before", [b"", b"\xff\xfe\x00\x06\xff\xda\x00\x02", b"\xff\xff"], ids=["", "comment", "fill"])
def test_an_orientation_is_seen_wherever_the_header_has_it(before):
    """Also behind a comment that looks like the beginning of the pixels, and bytes that only fill."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = jpeg(smooth(32, 48), exif=exif)
    behind = data.index(b"\xff\xdb")  # the quantization tables
    for place in (2, behind):
        changed = data[:place] + before + data[place:]
        assert decode_image(changed).size == (32, 48)
        assert decode_rgb(changed).shape == (48, 32, 3)


def test_what_looks_like_metadata_behind_the_pixels_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = jpeg(smooth(32, 48)) + jpeg(smooth(32, 48), exif=exif)
    assert decode_jpeg(found) is not None
    assert np.array_equal(decode_rgb(found), to_rgb(decode_image(found)))


def test_a_large_jpeg_is_decoded_smaller_and_scales_to_nearly_the_same():
    original = np.asarray(Image.fromarray(noise(17, 25, 3)).resize((770, 515), Image.Resampling.BICUBIC))
    data = jpeg(original, quality=95)
    assert [decode_jpeg(data, short_side=side)[0].shape[:2] for side in (130, 128, 64, 32, 8)] == [
        (515, 770),
        (258, 385),
        (129, 193),
        (65, 97),
        (65, 97),
    ]
    assert all(decode_jpeg(data, short_side=side)[1] == (515, 770) for side in (130, 64, 8))
    scaled = scaled_size(515, 770, 64)
    parts = [
        crop_scaled(rgb, scaled=scaled, top=0, left=32, size=64, original=(515, 770)).astype(int)
        for rgb in (decode_jpeg(data)[0], decode_jpeg(data, short_side=64)[0])
    ]
    assert np.abs(parts[0] - parts[1]).max() <= 2


def test_scaling_is_pillows_to_a_grey_value_and_the_same_on_any_processor():
    code = (
        "import numpy, hashlib; from tmad.images import scale; "
        "rgb = numpy.random.default_rng(0).integers(0, 256, (331, 517, 3), numpy.uint8); "
        "both = scale(rgb, (96, 150)).tobytes() + scale(rgb, (72, 64), 'bilinear').tobytes(); "
        "print(hashlib.sha256(both).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "ATEN_CPU_CAPABILITY": level, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for level, threads in (("default", "1"), ("avx2", "2"))
    }
    rgb = np.random.default_rng(0).integers(0, 256, (331, 517, 3), np.uint8)
    mine = scale(rgb, (96, 150)), scale(rgb, (72, 64), "bilinear")
    digests.add(hashlib.sha256(mine[0].tobytes() + mine[1].tobytes()).hexdigest() + "\n")
    assert len(digests) == 1
    for found, method in zip(mine, (Image.Resampling.LANCZOS, Image.Resampling.BILINEAR), strict=True):
        pillow = np.asarray(Image.fromarray(rgb).resize(found.shape[1::-1], method))
        assert np.abs(found.astype(int) - pillow).max() <= 1


def test_every_value_survives_the_way_into_the_model_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_model(values).min() == -1
    assert to_model(values).max() == 1
    assert torch.equal(to_uint8(to_model(values)), values)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]
