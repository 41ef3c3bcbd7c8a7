"""A photograph during preparation: a file opened once, and the properties that later steps use."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tmad.images import MAX_PIXELS, UnreadableImage, decode_image, decode_jpeg, to_rgb


@dataclass(frozen=True)
class Photograph:
    """A file that could be decoded."""

    rgb: np.ndarray
    """(H, W, 3), uint8: the upright picture, or for a large JPEG a smaller version of it (`images.REDUCE_TO`)."""
    height: int
    width: int
    """Sides of the upright picture in the file, in pixels."""
    keeps_its_bytes: bool
    """Any reader shows this file as we see it: one upright frame of eight-bit RGB or grey."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Digest of the file, 64 hex."""
    original: Image.Image | None = None
    """The picture in its own mode, if it was asked for."""


def open_photograph(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    smallest_side: int = 1,
    short_side: int | None = None,
    with_original: bool = False,
) -> Photograph:
    """Decode the image file *data*, for use at a shorter side of at most *short_side* pixels (default: its own).

    Raises `UnreadableImage` with the reason to leave the image out: more than *max_pixels*, a side shorter than
    *smallest_side*, or what `decode_image` finds.
    """
    found = None if with_original else decode_jpeg(data, max_pixels=max_pixels, short_side=short_side)
    if found is not None:
        rgb, (height, width) = found
        image, plain = None, True
    else:
        image = decode_image(data, max_pixels=max_pixels)
        rgb, height, width, plain = to_rgb(image), image.height, image.width, _is_plain(image)
    if min(height, width) < smallest_side:
        raise UnreadableImage("too-small", f"{width}x{height} pixels, the shorter side needs {smallest_side}")
    return Photograph(
        rgb=rgb,
        height=height,
        width=width,
        keeps_its_bytes=plain,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        original=image if with_original else None,
    )


def _is_plain(image: Image.Image) -> bool:
    plain = image.format in ("JPEG", "PNG", "WEBP") and image.mode in ("RGB", "L")
    return plain and not getattr(image, "is_animated", False)
