"""Image files filled: a picture goes back into the format, and with the metadata, that it came in.

| format | what is kept |
|---|---|
| PNG, BMP, PPM, TIFF, lossless WebP, JPEG 2000 | every sample outside the hole, to the last bit |
| GIF | the same; the fill takes the nearest colours of the palette that is there |
| JPEG | quantisation tables, subsampling, progressive or not: pixels outside move by rounding, see docs/inpaint.md |
| lossy WebP, AVIF, HEIF | the format; their files do not say at which quality they were written |

What else a file holds stays, but for previews: they show what was removed. Every result is opened again and compared
with the original outside the hole before it is given away; what it lacks of the original is in its notes.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin

from tmad import containers, tiff
from tmad.containers import without_preview as without_preview
from tmad.holes import dilate
from tmad.images import MAX_PIXELS, UnreadableImage, decode_stored, orientation, to_rgb, upright
from tmad.inpaint import Inpainter, InpaintResult

Kind = Literal["same", "png"]
QUALITY = 95
"""What lossy formats that do not keep their quality are written at."""
ENDINGS = {
    **{"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"},
    **{"PPM": ".ppm", "JPEG2000": ".jp2", "AVIF": ".avif", "HEIF": ".heic"},
}
"""File name endings by Pillow's names of the formats."""

_TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_LOSSY_REACH = 32
"""Pixels around the hole that a lossy format changes with it: two blocks of the largest subsampling."""
_AT_ONCE = 2**19
"""Pixels of two pictures that are copied to be compared."""
_LOSSY_MEAN = 8.0
"""Grey levels by which, on average, a lossy result may differ outside the hole; more is another picture."""


@dataclass(frozen=True)
class ImageFile:
    """An opened image file."""

    stored: Image.Image
    """Decoded by Pillow: pixels as they lie in the file, those of TIFF upright."""
    image: Image.Image
    """The same upright, as every viewer shows it and as masks are drawn."""
    format: str
    """Pillow's name."""
    lossless: bool
    """Whether it can be written again without touching a pixel."""
    notes: tuple[str, ...]
    """What of the file is not looked at."""
    data: bytes
    """The file."""
    turned: int
    """Its EXIF orientation, 1 to 8."""


@dataclass(frozen=True)
class FilledFile:
    """A file with its hole filled."""

    data: bytes
    result: InpaintResult
    """Its `output` is closed, as the file holds the same pixels."""
    notes: tuple[str, ...]
    """What a user should know: about the mask, and what of the original is not in the result."""


def allow_pixels(max_pixels: int) -> None:
    """Let this process decode images of *max_pixels*, where that is more than Pillow's own limit."""
    Image.MAX_IMAGE_PIXELS = max(max_pixels, MAX_PIXELS)


def open_file(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Decode *data*. Raises `UnreadableImage`, also for files of several frames: `several-frames`."""
    stored = decode_stored(data, max_pixels=max_pixels)
    kind = stored.format or "?"
    frames = getattr(stored, "n_frames", 1)
    notes: list[str] = []
    if frames > 1 and kind != "MPO":
        raise UnreadableImage("several-frames", f"{frames} frames or pages: only the first would be filled and kept")
    if kind == "MPO":
        notes.append(f"{frames - 1} further pictures in the file (MPO) are left out")
    lossy = kind in ("JPEG", "MPO", "AVIF", "HEIF") or (kind == "WEBP" and b"VP8L" not in containers.riff_names(data))
    if kind == "TIFF" and stored.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
        lossy = True
    # Pillow's TIFF reader has turned the pixels already.
    turned = tiff.orientation(data) if kind == "TIFF" else orientation(stored)
    return ImageFile(stored, upright(stored), kind, not lossy, tuple(notes), data, turned)


def fill_file(
    inpainter: Inpainter,
    file: ImageFile,
    hole: np.ndarray,
    *,
    image_id: str = "",
    filled: Image.Image | None = None,
    opaque: bool = False,
    kind: Kind = "same",
) -> FilledFile:
    """Fill *hole* (H, W) of the upright picture and encode it in its own format, or as PNG.

    *opaque*: the filled part loses its transparency, for holes that came from there. *filled*: see `Inpainter`.
    Raises `UnusableInput`, and `UnreadableImage`: `cannot-encode` if the format cannot hold the result, `cannot-keep`
    if the result, opened again, is not what the original was outside the hole.
    """
    result = inpainter(file.image, hole, image_id=image_id, filled=filled)
    return encode_filled(file, hole, result, feather=inpainter.feather, opaque=opaque, kind=kind)


def encode_filled(
    file: ImageFile,
    hole: np.ndarray,
    result: InpaintResult,
    *,
    feather: int = 0,
    opaque: bool = False,
    kind: Kind = "same",
) -> FilledFile:
    """What an inpainter with this *feather* made of the file's picture, as a file; the rest as `fill_file`.

    The result's picture is closed: its pixels take as much memory as those of the file opened again.
    """
    made = result.output
    assert isinstance(made, Image.Image), "a Pillow image comes back for a Pillow image"
    picture = made
    zone = dilate((hole > 0).view(np.uint8), feather)
    if opaque and picture.mode in ("LA", "RGBA"):
        alpha = np.array(picture.getchannel("A"))
        alpha[hole > 0] = 255
        picture.putalpha(Image.fromarray(alpha))
    picture = _beside_the_key(picture, file.image, zone, opaque)
    as_png = kind == "png" and (file.format != "PNG" or file.turned != 1)
    try:
        data = (_as_png if as_png else _as_it_was)(picture, file, zone, opaque)
    except (OSError, ValueError, KeyError, struct.error, StopIteration) as error:
        raise UnreadableImage("cannot-encode", f"{file.format}, mode {picture.mode}: {error}") from error
    made.close()
    del picture
    return FilledFile(data, result, result.notes + file.notes + _compared(file, data, zone))


def _beside_the_key(picture: Image.Image, before: Image.Image, zone: np.ndarray, opaque: bool) -> Image.Image:
    """*picture* where one colour stands for transparent: the fill has none of it, and what was transparent stays so."""
    key = before.info.get("transparency")
    if key is None or before.mode not in ("L", "RGB") or picture.mode != before.mode:
        return picture
    values, was = (np.array(one).reshape(*zone.shape, -1) for one in (picture, before))
    colour = np.atleast_1d(np.asarray(key, np.int64))
    clear = (was == colour).all(axis=2) & (not opaque)
    hit = (values == colour).all(axis=2) & (zone > 0) & ~clear
    values[hit, -1] ^= 1
    values[clear] = was[clear]
    made = Image.fromarray(values.reshape(np.array(picture).shape))
    made.info = dict(picture.info)
    return made


def _turned_back(image: Image.Image, file: ImageFile) -> Image.Image:
    return image if file.turned == 1 else image.transpose(_TURN_BACK[file.turned])


def _as_png(picture: Image.Image, file: ImageFile, zone: np.ndarray, opaque: bool) -> bytes:
    """Upright PNG with the metadata that PNG can hold."""
    original = file.image
    info = original.info
    found = _read_samples(file)
    samples = None if found is None else found.filled(picture, file, zone, opaque)
    bands = len(picture.getbands()) if picture.mode in ("LA", "RGB", "RGBA") else 0
    plain = found is not None and found.top == 65535 and found.agrees_plainly(file)
    if plain and samples is not None and samples.shape[2] == bands:
        data = _png_of_samples(_upright_samples(samples, file))
    else:
        if picture.mode == "I":
            picture = _as_16_bits(picture)
        if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
            picture = Image.fromarray(to_rgb(picture))
        data = _saved(picture, "PNG", {"dpi": info["dpi"]} if info.get("dpi") else {})
    chunks = list(containers.png_chunks(data))
    exif, profile, xmp = (info.get(name) for name in ("exif", "icc_profile", "xmp"))
    if file.format == "JPEG2000":
        boxes = dict(containers.parts(file.data, file.format))
        profile, exif, xmp = (boxes.get(name, b"")[at:] for name, at in (("ICC profile", 3), ("EXIF", 16), ("XMP", 16)))
    if file.format == "TIFF":
        directory = tiff.read_directory(file.data)
        exif = tiff.exif_block({tag: one for tag, one in directory.items() if tag != tiff.ORIENTATION})
    extra = []
    # A profile of other channels (CMYK) would turn the colours of the RGB result.
    if profile and original.mode in ("RGB", "RGBA", "L", "LA", "P", "I;16"):
        extra.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(profile)))
    if isinstance(exif, bytes) and exif and (exif := without_preview(exif)):
        extra.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))
    if xmp:
        xmp = containers.without_xmp_previews(xmp if isinstance(xmp, bytes) else xmp.encode())
        extra.append(containers.png_text(b"XML:com.adobe.xmp", xmp))
    comment = info.get("comment") or b""
    if comment:
        comment = comment if isinstance(comment, bytes) else comment.encode()
        extra.append(containers.png_text(b"Comment", comment.decode("utf-8", "replace").encode()))
    for name, text in getattr(file.stored, "text", {}).items():
        if name != "XML:com.adobe.xmp":
            extra.append(containers.png_text(name.encode("latin-1", "replace"), text.encode()))
    return containers.png_file(iter([chunks[0], *extra, *chunks[1:]]))


def _as_16_bits(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"PNG holds values from 0 to 65535, these are {values.min()} to {values.max()}")
    return Image.fromarray(values.astype(np.uint16))


def _as_it_was(picture: Image.Image, file: ImageFile, zone: np.ndarray, opaque: bool) -> bytes:
    stored, kind = file.stored, file.format
    found = _read_samples(file)
    samples = None if found is None else found.filled(picture, file, zone, opaque)
    if found is not None and samples is not None:
        return containers.graft(found.encode(samples), file.data, kind)
    picture = _turned_back(picture, file)
    options: dict[str, Any] = {}
    if kind in ("JPEG", "MPO"):
        assert isinstance(stored, JpegImagePlugin.JpegImageFile)
        sampling = JpegImagePlugin.get_sampling(stored)
        options = {
            "qtables": [stored.quantization[key] for key in sorted(stored.quantization)],
            # Of the samplings that Pillow cannot write, nothing is lost in full.
            "subsampling": sampling if sampling >= 0 else 0,
            "progressive": bool(stored.info.get("progressive") or stored.info.get("progression")),
            "keep_rgb": picture.mode == "RGB" and containers.jpeg_is_rgb(file.data),
        }
        kind = "JPEG"
    elif kind in ("WEBP", "AVIF", "HEIF"):
        options = {"lossless": True} if file.lossless else {"quality": QUALITY}
        options |= {"exact": True} if kind == "WEBP" else {}  # colours under transparent pixels, too
        options |= {name: stored.info[name] for name in ("icc_profile", "xmp") if stored.info.get(name)}
        if "xmp" in options:
            options["xmp"] = containers.without_xmp_previews(options["xmp"])
        if isinstance(stored.info.get("exif"), bytes):
            options["exif"] = without_preview(stored.info["exif"])
    elif kind == "JPEG2000":
        options["no_jp2"] = getattr(stored, "codec", None) == "j2k"
        options["comment"] = next(iter(containers.jp2_comments(file.data)), None)
    elif kind == "GIF":
        indices = _in_palette(picture, stored, np.asarray(_turned_back(Image.fromarray(zone), file)) > 0, opaque)
        encoded = _saved(Image.fromarray(indices), "GIF", {"optimize": False, "interlace": 0})
        return containers.gif_with_pixels(file.data, encoded, stored.size)
    elif kind == "BMP":
        options = {"dpi": stored.info["dpi"]} if stored.info.get("dpi") else {}
        if picture.mode == "RGBA":
            return _bmp_with_alpha(picture, *options.get("dpi", (0, 0)))
    elif kind == "TIFF":
        compression = stored.info.get("compression", "raw")
        bilevel = compression in ("group3", "group4", "tiff_ccitt")
        options["compression"] = "tiff_lzw" if bilevel else compression
        options |= {"quality": QUALITY} if compression in ("jpeg", "tiff_jpeg") else {}
    return containers.graft(_saved(picture, kind, options), file.data, kind)


def _saved(picture: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    # What is not among the options is not meant to be kept. Set aside meanwhile: a copy would hold every pixel twice.
    info, picture.info = picture.info, {}
    try:
        picture.save(buffer, format=kind, **options)
    finally:
        picture.info = info
    return buffer.getvalue()


def _bmp_with_alpha(picture: Image.Image, across: float, down: float) -> bytes:
    """A BMP whose header says which bits are alpha; those that Pillow writes are read without it."""
    pixels = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes("raw", "BGRA")
    metres = (round(one * 39.3701) for one in (across, down))
    header = struct.pack("<IiiHHIIiiII", 108, *picture.size, 1, 32, 3, len(pixels), *metres, 0, 0)
    masks = struct.pack("<IIII4s48x", 0xFF0000, 0xFF00, 0xFF, 0xFF000000, b"BGRs")
    return struct.pack("<2sIHHI", b"BM", 122 + len(pixels), 0, 0, 122) + header + masks + pixels


def _in_palette(picture: Image.Image, stored: Image.Image, zone: np.ndarray, opaque: bool) -> np.ndarray:
    """Indices (H, W) of *picture* in the palette of *stored*: they stay outside *zone*, and where they are transparent;
    elsewhere the nearest colour's that is to be seen."""
    if stored.mode not in ("P", "L"):
        raise ValueError(f"a first frame of mode {stored.mode}")
    indices = np.array(stored)
    clear = stored.info.get("transparency")
    palette = np.asarray(stored.getpalette() or np.repeat(np.arange(256), 3), np.int64).reshape(-1, 3)
    usable = np.array([number for number in range(len(palette)) if number != clear])
    if not usable.size:
        raise ValueError("the palette has no colour that is to be seen")
    place = zone if opaque or clear is None else zone & (indices != clear)
    colours, which = np.unique(to_rgb(picture)[place].astype(np.int64), axis=0, return_inverse=True)
    nearest = np.empty(len(colours), indices.dtype)
    for start in range(0, len(colours), 4096):
        part = colours[start : start + 4096, None]
        nearest[start : start + 4096] = usable[((part - palette[usable]) ** 2).sum(axis=2).argmin(axis=1)]
    indices[place] = nearest[which.reshape(-1)]
    return indices


# Samples that Pillow does not hold, or would not write as deep as they are


@dataclass(frozen=True)
class _Samples:
    values: np.ndarray
    """(H, W, channels), as they lie in the file."""
    top: float
    """White."""
    encode: Callable[[np.ndarray], bytes]

    def filled(self, picture: Image.Image, file: ImageFile, zone: np.ndarray, opaque: bool) -> np.ndarray | None:
        """The samples with those of *picture* inside *zone* (both upright); none if it is not known what they mean."""
        for meaning in (self._plainly, self._inverted, self._times_alpha):
            if self._agrees(meaning(_turned_back(file.image, file))):
                break
        else:
            return None
        zone = np.asarray(_turned_back(Image.fromarray(zone), file)) > 0
        new = meaning(_turned_back(picture, file))
        samples = self.values.copy()
        if self.values.dtype.kind in "ui":
            limits = np.iinfo(self.values.dtype)
            new = np.clip(np.rint(new), limits.min, limits.max)
        bands = self._in_its_bands(picture).getbands()
        colours = len(bands) - ("A" in bands)
        samples[zone, :colours] = new[zone, :colours].astype(samples.dtype)
        if opaque and "A" in bands:
            cleared = (np.asarray(_turned_back(picture.getchannel("A"), file)) == 255) & zone
            samples[cleared, colours] = self.top
        return samples

    def agrees_plainly(self, file: ImageFile) -> bool:
        """Whether the values mean what those of PNG mean."""
        return self._agrees(self._plainly(_turned_back(file.image, file)))

    def _agrees(self, seen: np.ndarray) -> bool:
        """Whether what Pillow has decoded, so understood, is what lies in the file, but for rounding."""
        count = min(seen.shape[2], self.values.shape[2])
        exact = self.values[..., :count]
        with np.errstate(invalid="ignore"):
            if seen.dtype.kind in "ui" and np.array_equal(seen[..., :count].astype(exact.dtype), exact):
                return True
            apart = np.abs(seen[..., :count].astype(np.float64) - exact.astype(np.float64))
            return bool((~(apart > 2.01 * self.top / 255)).all())

    def _plainly(self, image: Image.Image) -> np.ndarray:
        values = np.asarray(self._in_its_bands(image))
        values = values.reshape(*values.shape[:2], -1)
        if image.mode in ("F", "I") or image.mode.startswith("I;16"):
            return values if self.top in (65535, 0) or values.dtype.kind == "f" else values * (self.top / 65535)
        return values * (self.top / 255)

    def _in_its_bands(self, image: Image.Image) -> Image.Image:
        """Pillow has no grey of 16 bits with alpha, and gives its values in three channels."""
        return image.convert("LA") if image.mode == "RGBA" and self.values.shape[2] == 2 else image

    def _inverted(self, image: Image.Image) -> np.ndarray:
        return self.top - self._plainly(image)

    def _times_alpha(self, image: Image.Image) -> np.ndarray:
        values = np.array(self._plainly(image), np.float64)
        if image.mode in ("RGBA", "LA"):
            values[..., :-1] *= values[..., -1:] / self.top
        return values


def _read_samples(file: ImageFile) -> _Samples | None:
    """The samples of a file that Pillow alone would not give back; none where it does, or nobody can."""
    data = file.data
    if file.format == "TIFF" and file.lossless:
        values = tiff.read_samples(data)
        if values is None:
            return None
        small = values.dtype == np.int8
        values = values.view(np.uint8) if small else values
        back = (lambda new: new.view(np.int8)) if small else (lambda new: new)
        # Numbers with a sign, of 32 bits, and floats come out of Pillow as they are.
        top = np.iinfo(values.dtype).max if values.dtype.kind == "u" and values.dtype.itemsize < 4 else 0
        return _Samples(values, float(top), lambda new: tiff.write_samples(back(new), data))
    if file.format == "PNG" and data[24] == 16 and data[25] in (2, 4, 6):
        return _Samples(_png_16(data, data[25]), 65535.0, _png_of_samples)
    if file.format == "PPM" and data[1:2] in (b"2", b"3", b"5", b"6"):
        (width, height, top), _, place = containers.ppm_header(data)
        return None if top == 255 else _ppm_samples(data, width, height, top, place)
    return None


def _png_16(data: bytes, colour_type: int) -> np.ndarray:
    """(H, W, channels), uint16. Pillow drops the lower half of each sample; it is made to read the other one too."""
    halves = []
    for order in "BL":
        picture = Image.open(io.BytesIO(data), formats=("PNG",))
        tile = picture.tile[0]
        if colour_type == 4:  # grey with alpha: as long as four channels of eight bits
            picture._mode, raw = "RGBA", "RGBA"
        else:
            raw = {2: "RGB", 6: "RGBA"}[colour_type] + ";16" + order
        picture.tile = [tile._replace(args=raw)]
        picture.load()
        halves.append(np.asarray(picture).astype(np.uint16))
        if colour_type == 4:
            return halves[0][..., 0::2] << 8 | halves[0][..., 1::2]
    return halves[0] << 8 | halves[1]


def _png_of_samples(samples: np.ndarray) -> bytes:
    """A PNG file of (H, W, 2 to 4) uint16."""
    height, width, channels = samples.shape
    lines = np.ascontiguousarray(samples.astype(">u2")).view(np.uint8).reshape(height, -1)
    reach = 2 * channels
    packed = zlib.compressobj(6)
    body, above = [], np.zeros(lines.shape[1] + reach, np.int16)
    for line in lines:
        here = np.concatenate([np.zeros(reach, np.int16), line.astype(np.int16)])
        left, up, corner = here[:-reach], above[reach:], above[:-reach]
        guess = left + up - corner
        apart = [np.abs(guess - one) for one in (left, up, corner)]
        paeth = np.where(
            (apart[0] <= apart[1]) & (apart[0] <= apart[2]), left, np.where(apart[1] <= apart[2], up, corner)
        )
        body.append(packed.compress(b"\4" + (here[reach:] - paeth).astype(np.uint8).tobytes()))
        above = here
    colour_type = {2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b"".join([*body, packed.flush()])), (b"IEND", b"")]
    return containers.png_file(iter(chunks))


def _ppm_samples(data: bytes, width: int, height: int, top: int, place: int) -> _Samples:
    channels = 3 if data[1:2] in b"36" else 1
    size = width * height * channels
    kind = np.dtype(">u2" if top > 255 else "u1")
    if data[1:2] in b"23":
        values = np.array(data[place - 1 :].split()[:size], np.int64).astype(kind)
    else:
        values = np.frombuffer(data, kind, size, place)

    def encode(new: np.ndarray) -> bytes:
        magic = b"P6" if channels == 3 else b"P5"
        return magic + b"\n%d %d\n%d\n" % (width, height, top) + new.astype(kind).tobytes()

    native = values.astype(kind.newbyteorder("=")).reshape(height, width, channels)
    return _Samples(native, float(top), encode)


def _upright_samples(samples: np.ndarray, file: ImageFile) -> np.ndarray:
    if file.turned == 1:
        return samples

    def turn(channel: np.ndarray) -> np.ndarray:
        image = Image.fromarray(channel)
        image.getexif()[0x0112] = file.turned
        return np.asarray(ImageOps.exif_transpose(image))

    return np.stack([turn(samples[..., number]) for number in range(samples.shape[2])], axis=2)


# What the result is, opened again


def _compared(file: ImageFile, data: bytes, zone: np.ndarray) -> tuple[str, ...]:
    """Notes on what of *file* is not in its result *data*. Raises `UnreadableImage` (`cannot-keep`) if pixels outside
    *zone* are not what they were."""
    try:
        again = open_file(data, max_pixels=max(MAX_PIXELS, zone.size))
    except UnreadableImage as error:
        raise UnreadableImage("cannot-keep", f"the result cannot be opened again: {error}") from error
    if again.image.size != file.image.size:
        raise UnreadableImage("cannot-keep", f"the result is {again.image.size}, the image {file.image.size}")
    if file.lossless or again.format == "PNG":
        _check_equal(file, again, zone)
    else:
        _check_close(file, again, zone)
    return tuple(_what_is_missing(file, again))


def _check_equal(file: ImageFile, again: ImageFile, zone: np.ndarray) -> None:
    before, after = file.image, again.image
    clear = before.has_transparency_data or after.has_transparency_data
    same_mode = before.mode == after.mode and before.mode not in ("P", "PA")
    for box, kept in _strips(zone, 0):
        if same_mode:
            pair = [np.asarray(one.crop(box)) for one in (before, after)]
        elif clear and before.mode != "RGBa":
            pair = [np.asarray(one.crop(box).convert("RGBA")) for one in (before, after)]
        else:
            pair = [to_rgb(one.crop(box)) for one in (before, after)]
        moved = (pair[0][kept] != pair[1][kept]) & ~(
            (pair[0][kept] != pair[0][kept]) & (pair[1][kept] != pair[1][kept])
        )
        if moved.any():
            raise _not_kept(int(moved.reshape(len(moved), -1).any(axis=1).sum()), file)
    if clear != (before.has_transparency_data and after.has_transparency_data):
        raise UnreadableImage("cannot-keep", f"{file.format}: the result's transparency is not the image's")
    if (
        file.format == again.format
        and _depth(file) > 8
        and (old := _read_samples(file))
        and (new := _read_samples(again))
    ):
        stored = np.asarray(_turned_back(Image.fromarray(zone), file)) == 0
        if old.values.shape == new.values.shape and old.values.dtype == new.values.dtype:
            moved = old.values[stored].view(np.uint8) != new.values[stored].view(np.uint8)
            if moved.any():
                raise _not_kept(int(moved.any(axis=1).sum()), file)


def _check_close(file: ImageFile, again: ImageFile, zone: np.ndarray) -> None:
    total, moved, looked_at = 0, 0, 0
    for box, kept in _strips(zone, _LOSSY_REACH):
        before, after = (to_rgb(one.crop(box))[kept].astype(np.int16) for one in (file.image, again.image))
        apart = np.abs(before - after)
        total += int(apart.sum())
        moved += int((apart > _LOSSY_MEAN).any(axis=1).sum())
        looked_at += len(apart)
    if total > _LOSSY_MEAN * 3 * looked_at:
        raise _not_kept(moved, file)


def _strips(zone: np.ndarray, reach: int) -> Iterator[tuple[tuple[int, int, int, int], np.ndarray]]:
    """Boxes over the whole width, with what of them lies more than *reach* pixels from *zone*: copies of a whole
    picture would double its memory."""
    height, width = zone.shape
    rows = max(1, _AT_ONCE // width)
    for top in range(0, height, rows):
        bottom, first = min(top + rows, height), max(0, top - reach)
        near = dilate(zone[first : bottom + reach], reach)
        yield (0, top, width, bottom), near[top - first : bottom - first] == 0


def _not_kept(count: int, file: ImageFile) -> UnreadableImage:
    what = f"{file.format}, mode {file.stored.mode}: {count} pixels outside the hole are not what they were"
    return UnreadableImage("cannot-keep", f"{what} in the result, opened again; nothing was written")


def _what_is_missing(file: ImageFile, again: ImageFile) -> list[str]:
    notes = []
    before, after = _depth(file), _depth(again)
    kind, mode = file.format, file.stored.mode
    if mode in ("P", "PA") and again.stored.mode not in ("P", "PA"):
        notes.append("the palette becomes full colour")
    elif mode == "1" and again.stored.mode != "1":
        notes.append("one-bit grey is written as 8 bits")
    elif mode == "CMYK" and again.stored.mode != "CMYK":
        notes.append("CMYK becomes RGB")
    elif before > after:
        notes.append(f"{before} bits a channel were read and are written as {after}")
    elif before < after:
        notes.append(f"{before} bits a channel are written as {after}")
    if kind in ("WEBP", "AVIF", "HEIF", "TIFF") and not (file.lossless or again.format == "PNG"):
        notes.append(f"{kind} does not say its quality: written at {QUALITY}")
    if kind in ("JPEG", "MPO") and again.format == "JPEG" and _sampling(file) != _sampling(again):
        notes.append("the colours' subsampling cannot be written: they have full resolution")
    had, has = _parts(file), _parts(again)
    if kind == again.format or (kind, again.format) == ("MPO", "JPEG"):
        lost = list((Counter(had) - Counter(has)).elements())
        names = [name for name, _ in lost]
    else:
        left = {name for name, _ in has}
        left.add("control")  # of a GIF: what it says of transparency is in the pixels
        in_exif = ("GPS", "GeoTIFF", "TIFF tag") if "EXIF" in left else ()
        names = [name for name, _ in had if name not in left and not name.startswith(in_exif)]
        if left & {"text"}:
            names = [name for name in names if name != "comment"]
    if names:
        notes.append(f"not kept: {', '.join(sorted(set(names)))}")
    return notes


def _parts(file: ImageFile) -> containers.Parts:
    if file.format not in ("AVIF", "HEIF"):
        return containers.parts(file.data, file.format)
    info = file.stored.info
    exif = without_preview(info["exif"]).removeprefix(b"Exif\0\0") if isinstance(info.get("exif"), bytes) else b""
    found = [("ICC profile", info.get("icc_profile")), ("EXIF", exif), ("XMP", info.get("xmp"))]
    return [(name, bytes(content)) for name, content in found if content]


def _sampling(file: ImageFile) -> list[tuple[int, int]]:
    return [layer[1:3] for layer in getattr(file.stored, "layer", [])]


def _depth(file: ImageFile) -> int:
    """Bits a channel in the file."""
    data = file.data
    if file.format == "PNG":
        return data[24]
    if file.format == "TIFF":
        return max(tiff.numbers(tiff.read_directory(data), tiff.BITS, (1,)))
    if file.format == "PPM" and data[1:2] in (b"2", b"3", b"5", b"6"):
        return containers.ppm_header(data)[0][2].bit_length()
    if file.format == "JPEG2000" and (place := data.find(b"\xff\x4f\xff\x51")) >= 0:
        return (data[place + 42] & 0x7F) + 1
    if file.format == "AVIF" and (place := data.find(b"av1C")) >= 0:
        high, twelve = data[place + 6] & 0x40, data[place + 6] & 0x20
        return (12 if twelve else 10) if high else 8
    return {"1": 1, "F": 32}.get(file.stored.mode, 8)
