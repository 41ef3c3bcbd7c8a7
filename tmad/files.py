"""Image files filled: a picture goes back into the format, and with the metadata, that it came in.

| format | what is kept |
|---|---|
| PNG, BMP, PPM, TIFF, lossless WebP, JPEG 2000 | every pixel outside the hole, to the last bit |
| GIF | the same; the fill takes the nearest colours of the palette that is there |
| JPEG | quantisation tables, subsampling, progressive or not: pixels outside move by rounding, see docs/inpaint.md |
| lossy WebP, AVIF | the format; their files do not say at which quality they were written |

EXIF, ICC profile, XMP, resolution and text stay. The preview inside EXIF goes: it shows what was removed.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin

from tmad.images import MAX_PIXELS, UnreadableImage, decode_stored, orientation, to_rgb, upright
from tmad.inpaint import Inpainter, InpaintResult

Kind = Literal["same", "png"]
QUALITY = 95
"""What lossy formats that do not keep their quality are written at."""
ENDINGS = {
    **{"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "TIFF": ".tif", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"},
    **{"PPM": ".ppm", "JPEG2000": ".jp2", "AVIF": ".avif"},
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
_TIFF_TEXT = (270, 271, 272, 305, 306, 315, 33432)


@dataclass(frozen=True)
class ImageFile:
    """An opened image file."""

    stored: Image.Image
    """Decoded, pixels as they lie in the file."""
    image: Image.Image
    """The same upright, as every viewer shows it and as masks are drawn."""
    format: str
    """Pillow's name."""
    lossless: bool
    """Whether it can be written again without touching a pixel."""
    notes: tuple[str, ...]
    """What writing it again does not keep."""


@dataclass(frozen=True)
class FilledFile:
    """A file with its hole filled."""

    data: bytes
    result: InpaintResult
    notes: tuple[str, ...]
    """What a user should know: about the mask, and what the format did not keep."""


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
    if kind == "PNG" and data[24:25] == b"\x10" and stored.mode in ("RGB", "RGBA", "LA"):
        notes.append("16 bits a channel were read and are written as 8")
    if stored.mode in ("1", "P", "PA") and kind != "GIF":
        notes.append("one-bit grey is written as 8 bits" if stored.mode == "1" else "the palette becomes full colour")
    lossy = kind in ("JPEG", "MPO", "AVIF") or (kind == "WEBP" and b"VP8L" not in _chunk_names(data))
    if kind == "TIFF" and stored.info.get("compression") == "jpeg":
        lossy = True
    if lossy and kind not in ("JPEG", "MPO"):
        notes.append(f"{kind} does not say its quality: written at {QUALITY}")
    return ImageFile(stored, upright(stored), kind, not lossy, tuple(notes))


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
    Raises `UnusableInput`, and `UnreadableImage` (`cannot-encode`) if the format cannot hold the result.
    """
    result = inpainter(file.image, hole, image_id=image_id, filled=filled)
    picture = result.output
    assert isinstance(picture, Image.Image), "a Pillow image comes back for a Pillow image"
    if opaque and picture.mode in ("LA", "RGBA"):
        alpha = np.array(picture.getchannel("A"))
        alpha[hole > 0] = 255
        picture.putalpha(Image.fromarray(alpha))
    try:
        data = _as_png(picture, file.image) if kind == "png" else _as_it_was(picture, file)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise UnreadableImage("cannot-encode", f"{file.format}, mode {picture.mode}: {error}") from error
    notes = file.notes if kind == "same" else tuple(note for note in file.notes if "quality" not in note)
    return FilledFile(data, result, result.notes + notes)


def _as_png(picture: Image.Image, original: Image.Image) -> bytes:
    """PNG with the metadata of an upright original."""
    # A profile of other channels (CMYK) would turn the colours of the RGB result.
    profiled = original.mode in ("RGB", "RGBA", "L", "LA", "P", "I;16")
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        picture = Image.fromarray(to_rgb(picture))
    options = _metadata(original, "PNG")
    if not profiled:
        options.pop("icc_profile", None)
    return _saved(picture, "PNG", options)


def _as_it_was(picture: Image.Image, file: ImageFile) -> bytes:
    stored, kind = file.stored, file.format
    turned = orientation(stored)
    if turned != 1:
        picture = picture.transpose(_TURN_BACK[turned])
    options = _metadata(stored, kind)
    if kind in ("JPEG", "MPO"):
        assert isinstance(stored, JpegImagePlugin.JpegImageFile)
        tables = [stored.quantization[key] for key in sorted(stored.quantization)]
        options |= {
            "qtables": tables,
            "subsampling": JpegImagePlugin.get_sampling(stored),
            "progressive": bool(stored.info.get("progressive") or stored.info.get("progression")),
        }
        kind = "JPEG"
    elif kind == "WEBP":
        options |= {"lossless": True, "exact": True} if file.lossless else {"quality": QUALITY}
    elif kind == "AVIF":
        options["quality"] = QUALITY
    elif kind == "JPEG2000":
        options["no_jp2"] = getattr(stored, "codec", None) == "j2k"
    elif kind == "GIF":
        picture = _in_palette(picture, stored)
    elif kind == "TIFF":
        compression = stored.info.get("compression", "raw")
        bilevel = compression in ("group3", "group4", "tiff_ccitt")
        options["compression"] = "tiff_lzw" if bilevel else compression
    return _saved(picture, kind, options)


def _saved(picture: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    plain = picture.copy() if picture.info else picture
    plain.info = {}  # what is not among the options is not meant to be kept
    plain.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _metadata(stored: Image.Image, kind: str) -> dict[str, Any]:
    """What Pillow's writer of this format takes over."""
    info = stored.info
    found = {name: info[name] for name in ("icc_profile", "dpi", "xmp") if info.get(name)}
    if isinstance(info.get("exif"), bytes):
        found["exif"] = without_preview(info["exif"])
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        for name, value in getattr(stored, "text", {}).items():
            if name != "XML:com.adobe.xmp":
                text.add_itxt(name, value) if isinstance(value, PngImagePlugin.iTXt) else text.add_text(name, value)
        found["pnginfo"] = text
        if stored.mode in ("L", "RGB", "I;16") and "transparency" in info:
            found["transparency"] = info["transparency"]
    if kind == "JPEG" and info.get("comment"):
        found["comment"] = info["comment"]
    if kind == "GIF" and "transparency" in info:
        found["transparency"] = info["transparency"]
    if kind == "TIFF":
        tags = getattr(stored, "tag_v2", {})
        found["tiffinfo"] = {tag: tags[tag] for tag in _TIFF_TEXT if tag in tags}
        found.pop("exif", None)
    allowed = {
        **{"BMP": ("dpi",), "PPM": (), "GIF": ("transparency",), "JPEG2000": ()},
        **{"WEBP": ("icc_profile", "exif", "xmp"), "AVIF": ("icc_profile", "exif", "xmp")},
    }
    return {name: value for name, value in found.items() if name in allowed.get(kind, found)}


def _in_palette(picture: Image.Image, stored: Image.Image) -> Image.Image:
    """*picture* in the palette of *stored*: what is the same keeps its index, the rest gets the nearest colour's."""
    if stored.mode != "P":
        return picture
    rgb = to_rgb(picture)
    changed = (rgb != to_rgb(stored)).any(axis=2)
    indices = np.array(stored)
    nearest = Image.fromarray(rgb).quantize(palette=stored.copy(), dither=Image.Dither.NONE)
    indices[changed] = np.asarray(nearest)[changed]
    result = stored.copy()
    result.frombytes(indices.tobytes())
    return result


def without_preview(exif: bytes) -> bytes:
    """The EXIF block with its small preview picture blanked out and unlinked; every other byte stays."""
    start = 6 if exif.startswith(b"Exif\0\0") else 0
    tiff = bytearray(exif[start:])
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    if order is None:
        return exif
    try:
        (first,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, first)
        link = first + 2 + 12 * count
        (second,) = struct.unpack_from(order + "I", tiff, link)
        if second == 0:
            return exif
        (count,) = struct.unpack_from(order + "H", tiff, second)
        entries = [struct.unpack_from(order + "HHII", tiff, second + 2 + 12 * number) for number in range(count)]
        values = {tag: value for tag, _, _, value in entries}
        offset, length = values.get(0x0201, 0), values.get(0x0202, 0)
        tiff[offset : offset + length] = bytes(len(tiff[offset : offset + length]))
        struct.pack_into(order + "I", tiff, link, 0)
    except struct.error:  # cut off or damaged: what cannot be walked cannot be trusted to be without one
        return b""
    return exif[:start] + bytes(tiff)


def _chunk_names(data: bytes) -> bytes:
    """The names of a WebP file's chunks, of which one tells whether it is lossless."""
    names, place = b"", 12
    while place + 8 <= len(data) and len(names) < 400:
        names += data[place : place + 4]
        place += 8 + int.from_bytes(data[place + 4 : place + 8], "little")
        place += place % 2
    return names
