"""Files and images of any kind to uint8 arrays and back, and the one place where ranges change.

Outside the model an image is uint8, (H, W, 3), RGB; inside it is float in [-1, 1], (B, 3, H, W). A mask is uint8,
(H, W), {0, 1}, 1 = hole.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from tmad import tiff

if TYPE_CHECKING:  # PyTorch takes seconds to import; a job that only names files, or says what it would do, needs none
    from torch import Tensor

try:  # HEIC, as telephones write it, where the package is installed
    from pillow_heif import register_heif_opener
except ImportError:
    _HEIF: tuple[str, ...] = ()
else:
    register_heif_opener()
    _HEIF = ("HEIF",)

FORMATS = (*_HEIF, "AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded; formats whose readers run programs or draw vectors (EPS, WMF, ...) are not images here."""
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".png"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".tif", ".tiff", ".webp"),
)
"""File name endings of these formats, lower case."""
PICTURES = (
    *SUFFIXES,
    *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".psd", ".psb", ".tga", ".exr", ".hdr", ".ico", ".svg", ".eps", ".xcf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".raw"),
)
"""Endings of pictures, those that are not decoded too: they are looked at and get their reason."""
MAX_PIXELS = 89_478_485
"""Pixels above which an image is refused before it is decoded: Pillow's own limit, a quarter of a gigabyte as RGB."""

REDUCE_TO = 2
"""A JPEG much larger than what is wanted is decoded at a half, a quarter or an eighth of its size, but at no less than
this many times the wanted size: from there Lanczos gives the whole picture's result, to about a grey value."""

_ORIENTATION = 0x0112
_MAY_BE_TURNED = (b"Exif\0\0", b"tiff:Orientation")
_JPEG = b"\xff\xd8\xff"
_SEGMENTS = frozenset(range(0xC0, 0xFF)) - set(range(0xD0, 0xDB))
"""Second bytes of JPEG markers that a length follows, but for that of the compressed pixels, 0xDA."""
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
DEEP_MODES = ("I", "F", *_GREY_16)
"""Pillow's modes of more than eight bits a channel: grey ones."""


class UnreadableImage(ValueError):
    """Bytes that do not give a usable image. `reason` is a short name to count by: `empty-file`, `not-an-image`,
    `unsupported`, `truncated`, `damaged`, `too-large`, `too-small`, `unsupported-mode`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in *data*, decoded, upright (EXIF orientation applied), in its own mode; an animation's first frame.

    `format` is None if the pixels were turned, else the file's. Raises `UnreadableImage`; an image of more than
    *max_pixels* is refused by its header alone (the most that can be allowed is twice Pillow's `MAX_IMAGE_PIXELS`).
    """
    return upright(decode_stored(data, max_pixels=max_pixels))


def decode_stored(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`decode_image`, but with the pixels lying as they do in the file."""
    if not data:
        raise UnreadableImage("empty-file", "the file has no bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage("too-large", str(error)) from None
    except Image.UnidentifiedImageError:
        if kind := _kind_of(data):
            raise UnreadableImage("unsupported", kind) from None
        if kind := next((kind for begin, kind in _DECODED.items() if data.startswith(begin)), ""):
            raise UnreadableImage("damaged", f"{kind} that cannot be opened") from None
        raise UnreadableImage("not-an-image", f"{len(data)} bytes that begin with {data[:8]!r}") from None
    except Exception as error:  # a damaged header can raise nearly anything inside the format's reader
        raise UnreadableImage("damaged", f"{type(error).__name__}: {error}") from None
    if image.format == "TIFF" and tiff.shows_a_preview(data):
        raise UnreadableImage("unsupported", "a camera's raw file: what can be read in it is a preview")
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage("too-large", f"{width}x{height} pixels, at most {max_pixels} are decoded")
    if width * height == 0:
        raise UnreadableImage("too-small", f"{width}x{height} pixels")
    try:
        image.load()
    except MemoryError:
        raise UnreadableImage("too-large", f"{width}x{height} pixels do not fit into memory") from None
    except Exception as error:  # as above, from the decoder
        reason = "truncated" if "truncated" in str(error) else "damaged"
        raise UnreadableImage(reason, f"{type(error).__name__}: {error}") from None
    if image.format == "TIFF" and (planes := tiff.deep_planes(data)) is not None:
        if planes.shape != (*image.size[::-1], len(image.getbands())):
            raise UnreadableImage("unsupported", f"TIFF with {planes.shape[2]} channels of 16 bits that lie apart")
        image.frombytes(planes.tobytes())
    return image


_KINDS = {
    **{b"8BPS": "PSD", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"FUJIFILM": "a camera's raw file"},
    **{
        b"II*\0": "TIFF",
        b"MM\0*": "TIFF",
        b"II+\0": "TIFF",
        b"MM\0+": "TIFF",
        b"gimp xcf": "XCF",
        b"v/1\x01": "OpenEXR",
    },
    **{b"#?RADIANCE": "Radiance HDR", b"%!PS": "EPS", b"IIRO": "a camera's raw file", b"IIU\0": "a camera's raw file"},
    **{b"\0\0\1\0": "ICO", b"II\xbc": "JPEG XR"},
}
_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]\0.(.)", re.S)
"""Of JPEG: what begins a frame, with the bits of a sample."""
_DECODED = {b"\x89PNG\r\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF"}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def _kind_of(data: bytes) -> str:
    """What kind of picture *data* is, of those that are not decoded; empty for what is none."""
    if data[4:8] == b"ftyp":
        if data[8:12] in _HEIC_BRANDS:
            return "HEIC: it is read where the package pillow-heif is installed"
        return "a camera's raw file (CR3)" if data[8:11] == b"crx" else ""
    found = next((kind for begin, kind in _KINDS.items() if data.startswith(begin)), "")
    if data.startswith(b"\xff\xd8\xff") and (size := _FRAME.search(data)) is not None and size[1] != b"\x08":
        found = f"JPEG of {size[1][0]} bits a sample"
    if not found and b"<svg" in data[:1000]:
        found = "SVG"
    return f"{found} of a kind that is not decoded" if found == "TIFF" else found and f"{found} is not decoded"


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 = upright, also where there is none or one that cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # metadata that cannot be parsed says nothing about the orientation
        return 1
    return value if value in range(2, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """*image* turned as its EXIF orientation says; itself if that is 1."""
    if orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as above
        return image


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS, out: np.ndarray | None = None) -> np.ndarray:
    """`to_rgb(decode_image(data))`, the same pixels, sooner if the file is a common JPEG.

    They are written into *out* (H, W, 3), uint8, contiguous, where it is given. Raises `UnreadableImage`, and
    `ValueError` if *out* has another size.
    """
    found = decode_jpeg(data, max_pixels=max_pixels, out=out)
    if found is not None:
        return found[0]
    rgb = to_rgb(decode_image(data, max_pixels=max_pixels))
    if out is None:
        return rgb
    if out.shape != rgb.shape:
        raise ValueError(f"the image is {rgb.shape[:2]}, room was made for {out.shape[:2]}")
    out[...] = rgb
    return out


def decode_jpeg(
    data: bytes, *, max_pixels: int = MAX_PIXELS, short_side: int | None = None, out: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[int, int]] | None:
    """The colours (H, W, 3), uint8, of a common JPEG and its (height, width); none for any other file.

    Common is one that stands upright, in colour or grey of eight bits, and is whole. `decode_image` opens the others,
    or says what is wrong with them. Without *short_side* the pixels are those of `to_rgb(decode_image(data))`; for a
    picture that will be scaled down to a shorter side of *short_side* pixels they may be fewer, see `REDUCE_TO`.
    They are written into *out*, contiguous, if it has their shape; another one is no common JPEG either.
    """
    if not data.startswith(_JPEG):
        return None
    head = data[: _scan_starts(data)]
    if any(marker in head for marker in _MAY_BE_TURNED):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > max_pixels:
            return None
        shrink = _reduction(min(height, width), short_side) if short_side else 1
        if out is not None and (shrink > 1 or out.shape != (height, width, 3)):
            return None
        least = {"min_height": math.ceil(height / shrink), "min_width": math.ceil(width / shrink)}
        return simplejpeg.decode_jpeg(data, "RGB", **least, buffer=out), (height, width)
    except ValueError:
        return None


def _scan_starts(data: bytes) -> int:
    """Where the compressed pixels of a JPEG begin, behind all its metadata; its end, if that cannot be told."""
    place = 2
    while len(found := data[place : place + 4]) == 4 and found[0] == 0xFF and found[1] in _SEGMENTS:
        place += 2 + int.from_bytes(found[2:], "big")
    return place if found[:2] == b"\xff\xda" else len(data)


def _reduction(short_side: int, wanted: int) -> int:
    """By how much the decoder may divide the sides."""
    return max(number for number in (1, 2, 4, 8) if number == 1 or short_side >= number * REDUCE_TO * wanted)


def to_rgb(image: Image.Image) -> np.ndarray:
    """The colours of *image* as (H, W, 3), uint8.

    | mode | rule |
    |---|---|
    | RGB, RGBX | as they are |
    | RGBA, LA, PA, palette with transparency | colour channels as they are, alpha dropped, nothing composited |
    | RGBa, La (premultiplied) | divided by alpha first |
    | L, 1 | the grey value in all three channels; 1-bit gives 0 and 255 |
    | I;16 and its byte orders, I (32 bits) | read as 16 bits, clipped to [0, 65535], divided by 257 and rounded |
    | F | times 255 if everything lies in [0, 1], then clipped to [0, 255] and rounded; not a number gives 0 |
    | P | colours of the palette |
    | CMYK, YCbCr, HSV | Pillow's conversion, without colour profiles |

    Raises `UnreadableImage` (`unsupported-mode`) for any other mode.
    """
    if image.mode in DEEP_MODES:
        grey = _deep_grey(image)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBa", "La"):
        image = image.convert("RGBA" if image.mode == "RGBa" else "LA")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "PA":
        image = image.convert("RGBA")
    if image.mode == "LA":
        image = image.getchannel("L")
    if image.mode == "RGBA":
        return np.ascontiguousarray(np.asarray(image)[:, :, :3])
    if image.mode not in ("RGB", "RGBX", "L", "1", "P", "CMYK", "YCbCr", "HSV"):
        raise UnreadableImage("unsupported-mode", f"colour mode {image.mode}")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _deep_grey(image: Image.Image) -> np.ndarray:
    """(H, W) uint8 of an image with more than eight bits a pixel, by the rules of `to_rgb`."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0)
        if values.size and values.min() >= 0 and values.max() <= 1:
            values = values * 255
        return np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return ((np.clip(values.astype(np.int64), 0, 65535) + 128) // 257).astype(np.uint8)


Fill = tuple[tuple[int, int], np.ndarray, np.ndarray]
"""Upper left corner (row, column), colours (h, w, 3), uint8, and how much of them is shown, (h, w), uint8: 255 = all,
0 = nothing."""


def paste(original: Image.Image, fills: Iterable[Fill]) -> Image.Image:
    """A copy of *original* with *fills* in it; what they do not cover keeps its values to the last bit.

    Modes stay, with these exceptions: 1-bit becomes L, palettes RGB (RGBA if there is
    transparency), premultiplied alpha plain alpha, because the colours of the fill have no place in them. Grey of 16
    and 32 bits and float stay as deep as they are, the fill has 256 steps in them. Alpha stays as it is.
    """
    if original.mode in DEEP_MODES:
        return _paste_deep(original, fills)
    see_through = original.mode in ("PA", "RGBa") or (original.mode == "P" and "transparency" in original.info)
    kept = {"1": "L", "La": "LA", "PA": "RGBA", "RGBa": "RGBA", "P": "RGBA" if see_through else "RGB"}
    result = original.convert(kept[original.mode]) if original.mode in kept else original.copy()
    for (top, left), rgb, weight in fills:
        colours = Image.fromarray(np.ascontiguousarray(rgb))
        corners = (left, top, left + colours.width, top + colours.height)
        if result.mode in ("LA", "RGBA"):
            colours = colours.convert(result.mode)
            colours.putalpha(result.crop(corners).getchannel("A"))
            # Pasting through a mask blends alpha with itself, which changes nothing.
        elif result.mode != "RGB":
            colours = colours.convert(result.mode)
        result.paste(colours, corners, Image.fromarray(np.ascontiguousarray(weight)))
    return result


def _paste_deep(original: Image.Image, fills: Iterable[Fill]) -> Image.Image:
    values = np.array(original)
    values = values.astype(values.dtype.newbyteorder("="))
    unit: float = 257
    if original.mode == "F":
        unit = 1 / 255 if values.size and np.nanmin(values) >= 0 and np.nanmax(values) <= 1 else 1
    for (top, left), rgb, weight in fills:
        grey = np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("L")).astype(np.float64) * unit
        part = values[top : top + grey.shape[0], left : left + grey.shape[1]]
        share = weight / 255
        # Where nothing is shown the value itself stays: it may be no number.
        blended = np.where(weight == 255, grey, grey * share + np.nan_to_num(part) * (1 - share))
        part[weight > 0] = (blended if original.mode == "F" else np.rint(blended))[weight > 0].astype(part.dtype)
    result = Image.fromarray(values)
    result.info = dict(original.info)
    return result


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) after scaling the shorter side to *short_side* pixels, rounded, proportions kept."""
    scale = short_side / min(height, width)
    return max(short_side, round(height * scale)), max(short_side, round(width * scale))


def crop_scaled(
    image: np.ndarray,
    *,
    scaled: tuple[int, int],
    top: int,
    left: int,
    size: int,
    original: tuple[int, int] | None = None,
) -> np.ndarray:
    """The (size, size, 3) square at (top, left) of *image* (H, W, 3), uint8, scaled to *scaled* (height, width).

    *original* (height, width): that of the file, where `decode_jpeg` made it smaller; default: (H, W). One antialiased
    Lanczos step in integers, the same on every processor; none where the image has that size. A mask (H, W) gives
    (size, size) and keeps its values (nearest neighbour). Raises `ValueError` if the square leaves the scaled image.
    """
    height, width = image.shape[:2]
    new_height, new_width = scaled
    if not (0 <= top <= new_height - size and 0 <= left <= new_width - size):
        raise ValueError(f"a {size}-pixel square at ({top}, {left}) leaves the scaled image {new_height}x{new_width}")
    if image.ndim == 2:
        y, x = height / new_height, width / new_width
        box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
        return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.NEAREST, box=box))
    if (height, width) != (original or (height, width)) or scaled != (height, width):
        import torch

        image = scale(image, scaled, original=original)
        # Scaling leaves the colours in planes; PyTorch brings them together twice as fast as NumPy.
        return torch.from_numpy(image[top : top + size, left : left + size]).contiguous().numpy()
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def scale(
    rgb: np.ndarray,
    size: tuple[int, int],
    method: Literal["lanczos", "bilinear"] = "lanczos",
    original: tuple[int, int] | None = None,
) -> np.ndarray:
    """*rgb* (H, W, 3), uint8, at *size* (height, width), antialiased as in Pillow's `resize`, by vectorised code.

    *original* as in `crop_scaled`: a side that its reduction does not divide reaches a little beyond the picture.
    """
    import torch
    from torch.nn import functional

    planes = torch.from_numpy(np.require(rgb, requirements=["C", "W"])).permute(2, 0, 1)[None]
    target: dict[str, Any] = {"size": size}
    if original is not None and original != rgb.shape[:2]:
        shrink = round(original[0] / len(rgb))
        # The next larger number, as PyTorch rounds sides down.
        factors = [math.nextafter(new * shrink / old, math.inf) for new, old in zip(size, original, strict=True)]
        target = {"scale_factor": factors, "recompute_scale_factor": False}
    scaled = functional.interpolate(planes, **target, mode=method, antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()[: size[0], : size[1]]


def to_model(image: Tensor) -> Tensor:
    """uint8 [0, 255] => float32 [-1, 1], any shape, contiguous."""
    return image.contiguous() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Float [-1, 1] => uint8 [0, 255], rounded, clamped; the exact inverse of `to_model` on its values."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).byte()
