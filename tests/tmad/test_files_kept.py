"""What lies outside the hole, and beside the pixels, comes back: over formats x modes x metadata, read by other readers
than those that the product uses where there are any."""

from __future__ import annotations

import io
import re
import warnings

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tmad import kept
from tests.tmad.tiny import MODEL
from tmad import files
from tmad.files import fill_file, open_file
from tmad.images import UnreadableImage
from tmad.inpaint import Inpainter
from tmad.model import TMAD
from tmad.rng import numpy_generator

FILES = kept.every_file()
UNREAD = ("tiff grey u4 MM", "tiff grey f8", "tiff grey f8 MM")
"""What Pillow does not read: a reason, and nothing else."""
LOSSY = ("jpeg ", "avif", "tiff of Pillow RGB jpeg")


@pytest.fixture(scope="module")
def inpainter() -> Inpainter:
    return Inpainter(TMAD(MODEL, seed=3), policy="crop", keep_candidates=False)


def is_lossy(name: str) -> bool:
    return name.endswith("lossy") or (name.startswith(LOSSY) and not name.startswith("jpeg 2000"))


def pixels(data: bytes) -> np.ndarray:
    """(H, W, channels) at the file's own depth where another reader than Pillow gives it, else as RGBA."""
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        with tifffile.TiffFile(io.BytesIO(data)) as opened:
            page = opened.pages[0]
            if page.bitspersample > 1 and page.photometric.name not in ("PALETTE", "YCBCR"):
                try:
                    found = page.asarray()
                except (ValueError, KeyError, ImportError):  # a compression that needs another package
                    return np.asarray(Image.open(io.BytesIO(data)))
                found = found.transpose(1, 2, 0) if page.planarconfig == 2 and found.ndim == 3 else found
                return found.reshape(*found.shape[:2], -1)
    if data[:2] in (b"P2", b"P3", b"P5", b"P6"):
        numbers = re.match(rb"P\d\s+(?:#.*\n)*(\d+)\s+(\d+)\s+(\d+)\s", data)
        assert numbers is not None
        width, height, top = map(int, numbers.groups())
        if data[1:2] in b"23":
            values = np.array(data[numbers.end() :].split(), int)
        else:
            values = np.frombuffer(data[numbers.end() :], ">u2" if top > 255 else "u1").astype(int)
        return values.reshape(height, width, -1)
    if data[:4] == b"\x89PNG" and data[24] == 16:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        return found.reshape(*found.shape[:2], -1)
    image = Image.open(io.BytesIO(data))
    return np.asarray(image if image.mode in ("I;16", "F", "CMYK") else image.convert("RGBA"))


TIFF_TAGS = {"icc": 34675, "xmp": 700, "iptc": 33723, "geo": 33550, "private": 65000, "text": 315, "dpi": 282}


def metadata(data: bytes, name: str, wanted: frozenset[str]) -> dict[str, object]:
    """What a reader finds of each thing that is wanted."""
    if name.startswith("tiff"):
        with tifffile.TiffFile(io.BytesIO(data)) as opened:
            tags = opened.pages[0].tags
            found = {one: tags[TIFF_TAGS[one]].value for one in wanted if TIFF_TAGS.get(one) in tags}
            if "exif" in wanted and 34665 in tags and 34853 in tags:
                found["exif"] = (tags[271].value, tags[34665].value, tags[34853].value)
        return found
    if name.startswith(("webp", "avif")):
        info = Image.open(io.BytesIO(data)).info
        return {one: bytes(info[known]) for one, known in (("icc", "icc_profile"), ("xmp", "xmp")) if known in info} | (
            {"exif": bytes(info["exif"]).removeprefix(b"Exif\0\0")} if "exif" in info else {}
        )
    known = {"png": kept.PNG_METADATA, "jpeg": kept.JPEG_METADATA, "jpeg 2000": kept.JP2_METADATA}
    known["jpeg 2000"] = kept.JP2_METADATA | {"icc": kept.ICC, "comment": b"a word"}
    whole = (
        known["jpeg 2000" if name.startswith("jpeg 2000") else name.split()[0]]
        if name[:2] in ("pn", "jp")
        else {
            "comment": b"a word",
            "xmp": kept.XMP,
        }
    )
    return {one: whole[one] for one in wanted if whole[one] in data}


HOLE = np.zeros((kept.HEIGHT, kept.WIDTH), np.uint8)
HOLE[12:28, 15:34] = 1


def hole_of(data: bytes) -> np.ndarray:
    """The hole of the upright picture, and as it lies in the file where that is the same rectangle turned."""
    height, width = open_file(data).image.size[::-1]
    hole = np.zeros((height, width), np.uint8)
    hole[12:28, 15:34] = 1
    return hole


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("name", FILES)
def test_pixels_outside_the_hole_depth_and_metadata_stay_or_are_named(inpainter, name, share) -> None:
    make, known = FILES[name]
    rng = numpy_generator("kept", name)
    wanted = frozenset(one for one in known if share == 1 or rng.random() < share)
    file = make(wanted)
    if name in UNREAD:
        with pytest.raises(UnreadableImage):
            open_file(file)
        return
    hole = hole_of(file)
    filled = fill_file(inpainter, open_file(file), hole, image_id="x")
    said = " ".join(filled.notes)
    before, after = pixels(file), pixels(filled.data)
    turns = {"tiff turned 3": 2, "tiff turned 6": 1}.get(name, 0)
    outside = np.rot90(hole, turns) == 0
    if is_lossy(name):
        apart = np.abs(before.astype(int) - after)[:, 48:]
        assert apart.mean() < 4
    else:
        if before.dtype != after.dtype or before.shape != after.shape:
            assert "is written as 8 bits" in said or "full colour" in said
            before, after = (np.asarray(Image.open(io.BytesIO(one)).convert("RGBA")) for one in (file, filled.data))
        assert np.array_equal(before[outside], after[outside], equal_nan=before.dtype.kind == "f")
    if "gif 2, clear" not in name or name.endswith("None"):  # of two colours one is not to be seen
        assert not np.array_equal(before[~outside], after[~outside])
    had, has = metadata(file, name, wanted), metadata(filled.data, name, wanted)
    assert had.keys() == wanted, "the file has what was put into it"
    lost = {one for one in had if has.get(one) != had[one]}
    assert not lost or "not kept" in said, f"{lost} went without a word"
    assert not lost, "and this one can be kept"


@pytest.mark.parametrize("name", [name for name in FILES if name not in (*UNREAD, "tiff grey u4")])
def test_as_png_a_picture_keeps_its_pixels_and_what_png_can_hold(inpainter, name) -> None:
    make, known = FILES[name]
    file = make(frozenset(known))
    values = np.asarray(open_file(file).image)
    hole = hole_of(file)
    if values.dtype == np.int32 and values.min() < 0:
        with pytest.raises(UnreadableImage, match="PNG holds values from 0 to 65535"):
            fill_file(inpainter, open_file(file), hole, kind="png")
        return
    filled = fill_file(inpainter, open_file(file), hole, kind="png")
    after = Image.open(io.BytesIO(filled.data))
    assert after.format == "PNG"
    said = " ".join(filled.notes)
    if (mode := open_file(file).stored.mode) in ("CMYK", "F"):
        assert {"CMYK": "CMYK becomes RGB", "F": "32 bits a channel were read and are written as 8"}[mode] in said
    grey_or_colour = "I;16" if after.mode == "I;16" else "RGBA"
    if open_file(file).image.mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        before = np.asarray(open_file(file).image.convert(grey_or_colour))
        assert np.array_equal(before[hole == 0], np.asarray(after.convert(grey_or_colour))[hole == 0])
    for one, key in (("icc", "icc_profile"), ("xmp", "xmp"), ("exif", "exif")):
        if one in known:
            assert key in after.info or "not kept" in said


def test_a_result_that_lost_something_outside_the_hole_is_refused_and_nothing_comes_of_it(
    inpainter, monkeypatch
) -> None:
    encode = files._as_it_was

    def careless(picture: Image.Image, *others: object) -> bytes:
        return encode(picture.point(lambda value: value ^ 1), *others)

    monkeypatch.setattr(files, "_as_it_was", careless)
    for kind in ("PNG", "BMP", "TIFF", "GIF"):
        file = open_file(kept.saved(kept.pillow("P" if kind == "GIF" else "L"), kind))
        monkeypatch.setattr(files, "_in_palette", lambda picture, stored, *others: np.asarray(stored) ^ 1)
        monkeypatch.setattr(files, "_read_samples", lambda file: None)
        with pytest.raises(UnreadableImage, match=r"cannot-keep: .* pixels outside the hole are not what they were"):
            fill_file(inpainter, file, HOLE)


@pytest.mark.parametrize("colours", [2, 16, 256])
def test_a_fill_is_never_the_transparent_colour_and_what_was_transparent_stays_so(inpainter, colours) -> None:
    for clear in (0, colours // 2, colours - 1):
        data = kept.gif(frozenset(), colours=colours, clear=clear)
        before = np.asarray(Image.open(io.BytesIO(data)))
        after = np.asarray(Image.open(io.BytesIO(fill_file(inpainter, open_file(data), HOLE).data)))
        assert np.array_equal(before == clear, after == clear)
        shown = fill_file(inpainter, open_file(data), HOLE, opaque=True).data
        assert not (np.asarray(Image.open(io.BytesIO(shown)))[HOLE > 0] == clear).any()
    key = (120,)
    for mode, value in (("L", 120), ("RGB", (120, 120, 120))):
        flat = Image.new(mode, (64, 64), value)
        flat.paste(tuple(one + 1 for one in key * 3) if mode == "RGB" else 121, (20, 20, 40, 40))
        data = kept.saved(flat, "PNG", transparency=value)
        hole = np.zeros((64, 64), np.uint8)
        hole[10:50, 10:50] = 1
        after = Image.open(io.BytesIO(fill_file(inpainter, open_file(data), hole).data)).convert("RGBA")
        before = Image.open(io.BytesIO(data)).convert("RGBA")
        assert before.getchannel("A").tobytes() == after.getchannel("A").tobytes()


def test_previews_of_every_kind_go(inpainter) -> None:
    small = b"\xff\xd8 what was there \xff\xd9"
    resources = b"Photoshop 3.0\0" + b"".join(
        b"8BIM" + number.to_bytes(2, "big") + b"\0\0" + len(body).to_bytes(4, "big") + body + b"\0" * (len(body) % 2)
        for number, body in ((0x0404, kept.IPTC), (1036, small), (1033, small))
    )
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x><xmpGImg:image>what was there</xmpGImg:image><dc:title>kept</dc:title></x>"
    plain = kept.saved(kept.pillow("RGB"), "JPEG")
    extra = (
        kept.jpeg_segment(0xED, resources) + kept.jpeg_segment(0xE1, xmp) + kept.jpeg_segment(0xE0, b"JFXX\0" + small)
    )
    data = plain[:20] + extra + plain[20:]
    filled = fill_file(inpainter, open_file(data), HOLE)
    assert b"what was there" not in filled.data
    assert kept.IPTC in filled.data
    assert b"<dc:title>kept</dc:title>" in filled.data
    assert filled.notes == ()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM"])
def test_what_follows_the_end_of_a_file_as_a_phones_film_goes_and_is_named(inpainter, kind) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"progressive": True}}.get(kind, {})
    data = kept.saved(kept.pillow("P" if kind == "GIF" else "RGB"), kind, **options)
    film = b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 4 + b"\xff\xd9"
    filled = fill_file(inpainter, open_file(data + film), HOLE)
    assert "not kept: data behind the picture" in filled.notes
    assert b"ftypmp42" not in filled.data
    plain = fill_file(inpainter, open_file(data), HOLE)
    assert plain.data == filled.data
    assert not any("behind" in note for note in plain.notes)
    assert fill_file(inpainter, open_file(data + bytes(100)), HOLE).notes == plain.notes, "padding"


def test_a_picture_that_nobody_here_decodes_is_not_said_to_be_none() -> None:
    jpeg, png = kept.saved(kept.pillow("RGB"), "JPEG"), kept.saved(kept.pillow("RGB"), "PNG")
    for data, reason in (
        (jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "unsupported: JPEG of 12 bits a sample is not"),
        (png[:20] + b"\xff" + png[21:], "damaged: PNG that cannot be opened"),
        (b"no picture", "not-an-image: 10 bytes"),
    ):
        with pytest.raises(UnreadableImage, match=reason):
            open_file(data)


def test_what_vouches_for_the_old_pixels_goes_and_is_named(inpainter) -> None:
    data = kept.saved(kept.pillow("RGB"), "JPEG")
    data = data[:20] + kept.jpeg_segment(0xEB, b"JP\0\x01 signed") + data[20:]
    filled = fill_file(inpainter, open_file(data), HOLE)
    assert filled.notes == ("not kept: content credentials (JUMBF)",)
    unsafe = kept.saved(kept.pillow("RGB"), "PNG")
    unsafe = unsafe[:33] + kept.png_chunk(b"prVT", b"about these pixels") + unsafe[33:]
    assert fill_file(inpainter, open_file(unsafe), HOLE).notes == ("not kept: PNG chunk prVT",)


@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.sampled_from(sorted(FILES)), st.integers(0, 2**32 - 1))
def test_a_damaged_file_gives_a_reason_and_no_other_error(inpainter, name, seed) -> None:
    make, known = FILES[name]
    data = bytearray(make(frozenset(known)))
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(data), 1 + int(rng.integers(12))):
        data[place] = rng.integers(256)
    damaged = bytes(data[: int(rng.integers(20, len(data) + 1))] if rng.random() < 0.3 else data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about what it reads
        try:
            file = open_file(damaged, max_pixels=10**6)
            hole = np.zeros(file.image.size[::-1], np.uint8)
            hole[2:9, 2:9] = 1
            if hole.all() or not hole.any():
                return
            fill_file(inpainter, file, hole)
        except UnreadableImage:
            pass
