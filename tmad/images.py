"""Files and images of any kind to uint8 arrays and back, and the one place where ranges change.

Outside the model an image is uint8, (H, W, 3), RGB; inside it is float in [-1, 1], (B, 3, H, W). A mask is uint8,
(H, W), {0, 1}, 1 = hole.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded; formats whose readers run programs or draw vectors (EPS, WMF, ...) are not images here."""
SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".png"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".tif", ".tiff", ".webp"),
)
"""File name endings of these formats, lower case."""
MAX_PIXELS = 89_478_485
"""Pixels above which an image is refused before it is decoded: Pillow's own limit, a quarter of a gigabyte as RGB."""

_ORIENTATION = 0x0112
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N")
_GREY_MODES = ("1", "L", "I", "F", *_GREY_16)


class UnreadableImage(ValueError):
    """Bytes that do not give a usable image. `reason` is a short name to count by: `empty-file`, `not-an-image`,
    `truncated`, `damaged`, `too-large`, `too-small`, `unsupported-mode`."""

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
    if not data:
        raise UnreadableImage("empty-file", "the file has no bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise UnreadableImage("too-large", str(error)) from None
    except Image.UnidentifiedImageError:
        raise UnreadableImage("not-an-image", f"{len(data)} bytes that begin with {data[:8]!r}") from None
    except Exception as error:  # a damaged header can raise nearly anything inside the format's reader
        raise UnreadableImage("damaged", f"{type(error).__name__}: {error}") from None
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
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # metadata that cannot be parsed says nothing about the orientation
        return image


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
    if image.mode in (*_GREY_16, "I", "F"):
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


def to_grey(image: Image.Image) -> np.ndarray:
    """The luminance of *image* as (H, W), uint8; colours by the rules of `to_rgb`, alpha is not looked at."""
    return np.asarray(Image.fromarray(to_rgb(image)).convert("L"))


def to_mask(image: Image.Image) -> np.ndarray:
    """A picture of a hole as (H, W), uint8, {0, 1}: grey value above 127 (white) = 1 = hole; alpha is not looked at."""
    return (to_grey(image) > 127).astype(np.uint8)


def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The mask in the bytes of an image file, by the rule of `to_mask`. Raises `UnreadableImage`."""
    return to_mask(decode_image(data, max_pixels=max_pixels))


def restore_mode(rgb: np.ndarray, original: Image.Image) -> Image.Image:
    """A result (H, W, 3), uint8, as an image of *original*'s kind, so that untouched pixels keep their values.

    RGB -> RGB; RGBA -> RGBA and LA -> LA with the original's alpha; L -> L. These keep untouched pixels to the last
    bit. 1-bit and deep grey (I;16, I, F) -> L, as their pixels were seen by the model; palette and PA -> RGB, or
    RGBA if there is transparency; CMYK and everything else -> RGB. Raises `ValueError` if the sizes differ.
    """
    if rgb.shape != (original.height, original.width, 3) or rgb.dtype != np.uint8:
        raise ValueError(
            f"the result must be ({original.height}, {original.width}, 3) uint8 like its original, "
            f"got {rgb.shape} {rgb.dtype}"
        )
    result = Image.fromarray(np.ascontiguousarray(rgb))
    mode = original.mode
    if mode in _GREY_MODES:
        return result.convert("L")
    if mode == "LA":
        result = result.convert("L")
        result.putalpha(original.getchannel("A"))
    elif mode in ("RGBA", "PA") or (mode == "P" and "transparency" in original.info):
        result.putalpha(original.convert("RGBA").getchannel("A"))
    return result


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) after scaling the shorter side to *short_side* pixels, rounded, proportions kept."""
    scale = short_side / min(height, width)
    return max(short_side, round(height * scale)), max(short_side, round(width * scale))


def crop_scaled(
    rgb: np.ndarray,
    *,
    short_side: int,
    top: int,
    left: int,
    size: int,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """The (size, size, 3) square at (top, left) of *rgb* (H, W, 3) scaled so that its shorter side is *short_side*.

    Only what the square needs is computed: one antialiased Lanczos step; no step at all where the scale is 1. A mask
    (H, W) gives (size, size) and is cut with `Resampling.NEAREST`. Raises `ValueError` if the square leaves the
    scaled image.
    """
    height, width = rgb.shape[:2]
    new_height, new_width = scaled_size(height, width, short_side)
    if not (0 <= top <= new_height - size and 0 <= left <= new_width - size):
        raise ValueError(f"a {size}-pixel square at ({top}, {left}) leaves the scaled image {new_height}x{new_width}")
    if (new_height, new_width) == (height, width):
        return np.ascontiguousarray(rgb[top : top + size, left : left + size])
    y, x = height / new_height, width / new_width
    box = (left * x, top * y, min((left + size) * x, width), min((top + size) * y, height))
    image = Image.fromarray(np.ascontiguousarray(rgb))
    return np.array(image.resize((size, size), resample, box=box))


def to_model(image: Tensor) -> Tensor:
    """uint8 [0, 255] => float32 [-1, 1], any shape."""
    return image.to(torch.float32) / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """Float [-1, 1] => uint8 [0, 255], rounded, clamped; the exact inverse of `to_model` on its values."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
