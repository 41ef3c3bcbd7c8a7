"""Files filled: every format and mode comes back as it was, metadata too; turned once; nothing left of what went."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from tests.tmad.tiny import MODEL, make_image
from tmad.files import FilledFile, fill_file, open_file, without_preview
from tmad.images import UnreadableImage, to_rgb
from tmad.inpaint import Inpainter
from tmad.model import TMAD

ICC = b"\x00\x00\x00\x80profile" + bytes(117)
HEIGHT, WIDTH = 64, 80
HOLE = np.zeros((HEIGHT, WIDTH), np.uint8)
HOLE[20:44, 30:60] = 1


@pytest.fixture(scope="module")
def inpainter() -> Inpainter:
    return Inpainter(TMAD(MODEL, seed=3), policy="crop", keep_candidates=False)


def picture(mode: str = "RGB") -> Image.Image:
    rgb = Image.fromarray(make_image(0, WIDTH)[:HEIGHT])
    if mode in ("RGBA", "LA"):
        base = rgb.convert(mode[:-1])
        base.putalpha(Image.fromarray(make_image(1, WIDTH)[:HEIGHT, :, 0]))
        return base
    if mode == "I;16":
        return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257 + 1)
    if mode == "P":
        return rgb.quantize(64)
    return rgb.convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reopened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def fill(inpainter: Inpainter, data: bytes, hole: np.ndarray = HOLE, **options: object) -> FilledFile:
    return fill_file(inpainter, open_file(data), hole, image_id="x", **options)


LOSSLESS = [
    *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *(("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK")),
    *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    *(("BMP", mode) for mode in ("L", "RGB")),
    *(("PPM", mode) for mode in ("L", "RGB", "I;16")),
    *(("JPEG2000", mode) for mode in ("L", "RGB", "RGBA")),
    ("GIF", "P"),
]


@pytest.mark.parametrize(("kind", "mode"), LOSSLESS)
def test_a_lossless_file_keeps_format_mode_and_every_pixel_outside_the_hole(inpainter, kind, mode) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    data = encoded(picture(mode), kind, **options)
    filled = fill(inpainter, data)
    before, after = reopened(data), reopened(filled.data)
    assert after.format == before.format
    becomes = {"1": "L", "P": "P" if kind == "GIF" else "RGB"}
    assert after.mode == becomes.get(before.mode, before.mode)
    plain = before.mode in ("1", "P")
    pixels = [np.asarray(image.convert("RGB") if plain else image) for image in (before, after)]
    assert np.array_equal(pixels[0][HOLE == 0], pixels[1][HOLE == 0])
    assert not np.array_equal(to_rgb(before), to_rgb(after))
    if mode.endswith("A"):
        assert before.getchannel("A").tobytes() == after.getchannel("A").tobytes()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"quality": 60}, {"quality": 92, "subsampling": 0}, {"progressive": True}])
def test_a_jpeg_is_written_with_its_own_tables_and_its_pixels_hardly_move(inpainter, mode, options) -> None:
    data = encoded(picture(mode), "JPEG", **options)
    after, before = reopened(fill(inpainter, data).data), reopened(data)
    assert after.format == "JPEG"
    assert after.mode == mode
    assert after.quantization == before.quantization
    assert after.layer == before.layer, "sampling factors and tables of the components"
    assert bool(after.info.get("progressive")) == bool(before.info.get("progressive"))
    # Blocks of 16 pixels without hole, a block away from it, hold the same picture.
    apart = np.abs(np.asarray(after).astype(int) - np.asarray(before))
    outside = np.ones((HEIGHT, WIDTH), bool)
    # Colours of half the size are interpolated: the pixel beside a block that changed changes with it.
    outside[0:64, 15:80] = False
    assert apart[outside].max() <= 6
    assert apart[HOLE > 0].mean() > 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_profile_exif_and_resolution_stay(inpainter, kind) -> None:
    exif = Image.Exif()
    exif[271], exif[305] = "Maker", "Software"
    more = {} if kind in ("WEBP", "AVIF") else {"dpi": (300, 300)}
    tags = {"tiffinfo": {271: "Maker"}} if kind == "TIFF" else {"exif": exif.tobytes()}
    data = encoded(picture(), kind, icc_profile=ICC, **tags, **more)
    after = reopened(fill(inpainter, data).data)
    assert after.info["icc_profile"] == ICC
    assert after.getexif()[271] == "Maker"
    if more:
        assert [round(float(value)) for value in after.info["dpi"]] == [300, 300]


def test_text_and_comments_stay(inpainter) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "somebody")
    text.add_itxt("Title", "ein Bild")
    assert reopened(fill(inpainter, encoded(picture(), "PNG", pnginfo=text)).data).text == {
        "Author": "somebody",
        "Title": "ein Bild",
    }
    assert reopened(fill(inpainter, encoded(picture(), "JPEG", comment=b"hello")).data).info["comment"] == b"hello"


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_turned_photograph_is_filled_upright_and_shown_upright_once(inpainter, turned, kind) -> None:
    exif = Image.Exif()
    exif[0x0112] = turned
    data = encoded(picture(), kind, exif=exif.tobytes(), **({"quality": 95} if kind == "JPEG" else {}))
    seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    hole = np.zeros(seen.shape[:2], np.uint8)
    hole[4:20, 8:30] = 1
    filled = fill(inpainter, data, hole)
    after = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(filled.data))))
    assert after.shape == seen.shape
    changed = np.abs(after.astype(int) - seen).max(axis=2) > (25 if kind == "JPEG" else 0)
    assert changed[hole > 0].mean() > (0.3 if kind == "JPEG" else 0.9)
    outside = np.ones_like(hole)
    outside[:36, :48] = 0
    assert not changed[outside > 0].any()
    as_png = np.asarray(ImageOps.exif_transpose(reopened(fill(inpainter, data, hole, kind="png").data)))
    assert np.array_equal(as_png[hole == 0], seen[hole == 0])


def test_the_preview_inside_exif_which_shows_what_was_removed_goes_and_the_rest_stays(inpainter) -> None:
    preview = encoded(picture().resize((16, 12)), "JPEG")
    tiff = (
        b"MM\x00\x2a\x00\x00\x00\x08" + b"\x00\x01" + b"\x01\x0f\x00\x02\x00\x00\x00\x04abc\x00" + b"\x00\x00\x00\x1a"
    )
    place = len(tiff) + 2 + 2 * 12 + 4
    second = b"\x00\x02" + b"\x02\x01\x00\x04\x00\x00\x00\x01" + place.to_bytes(4, "big")
    second += b"\x02\x02\x00\x04\x00\x00\x00\x01" + len(preview).to_bytes(4, "big") + bytes(4)
    exif = b"Exif\0\0" + tiff + second + preview
    data = encoded(picture(), "JPEG", exif=exif)
    assert preview in data
    after = fill(inpainter, data).data
    assert preview[20:-20] not in after
    assert reopened(after).getexif()[271] == "abc"
    assert len(without_preview(exif)) == len(exif)
    assert without_preview(exif[:40]) == b""
    assert without_preview(b"") == b""


def test_a_hole_from_transparency_becomes_opaque(inpainter) -> None:
    rgba = np.dstack([make_image(0, WIDTH)[:HEIGHT], np.where(HOLE, 0, 200).astype(np.uint8)])
    after = np.asarray(reopened(fill(inpainter, encoded(Image.fromarray(rgba), "PNG"), opaque=True).data))
    assert (after[HOLE > 0, 3] == 255).all()
    assert np.array_equal(after[HOLE == 0], rgba[HOLE == 0])


def test_what_a_format_does_not_keep_is_said(inpainter) -> None:
    assert fill(inpainter, encoded(picture(), "WEBP", quality=50)).notes == (
        "WEBP does not say its quality: written at 95",
    )
    assert fill(inpainter, encoded(picture("P"), "PNG")).notes == ("the palette becomes full colour",)
    assert fill(inpainter, encoded(picture(), "PNG")).notes == ()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_a_file_of_several_frames_is_refused(kind) -> None:
    data = encoded(picture(), kind, save_all=True, append_images=[picture().rotate(90), picture().rotate(180)])
    with pytest.raises(UnreadableImage, match="several-frames: 3 frames"):
        open_file(data)


def test_a_phones_jpeg_with_further_pictures_keeps_the_first(inpainter) -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture()])
    filled = fill(inpainter, data)
    assert reopened(filled.data).format == "JPEG"
    assert filled.notes == ("1 further pictures in the file (MPO) are left out",)
