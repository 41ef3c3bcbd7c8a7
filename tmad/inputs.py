"""What may be handed in as a picture, as arrays and Pillow images, and results as the kind that came in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tmad.holes import UnusableInput, named
from tmad.images import decode_image


class _Readable(Protocol):
    def read(self) -> bytes: ...


Picture = np.ndarray | Image.Image | Tensor | bytes | os.PathLike[str] | str | BinaryIO | _Readable
"""Array (H, W[, channels]), Pillow image, tensor ([channels,] H, W), a file's bytes, its path, or the open file."""


def opened(picture: Picture) -> np.ndarray | Image.Image:
    """A file's picture, upright; a tensor as (H, W[, channels]), wherever it lies; anything else as it is.

    Leading dimensions of 1 that a tensor has beyond three go. Raises `UnreadableImage` for a file that is no picture.
    """
    if isinstance(picture, str | os.PathLike):
        return decode_image(Path(picture).read_bytes())
    if isinstance(picture, bytes | bytearray | memoryview):
        return decode_image(bytes(picture))
    if isinstance(picture, Tensor):
        values = picture.detach().cpu()
        array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        while array.ndim > 3 and len(array) == 1:
            array = array[0]
        return np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if not isinstance(picture, np.ndarray | Image.Image) and hasattr(picture, "read"):
        return decode_image(picture.read())
    return picture  # type: ignore[return-value]


def as_pillow(picture: np.ndarray | Image.Image, what: str, image_id: str) -> Image.Image:
    """An opened picture for Pillow. Raises `UnusableInput` that calls it *what* for an array that is no picture."""
    if isinstance(picture, Image.Image):
        return picture
    array = np.asarray(picture)
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    shape, kind = array.shape, array.dtype
    grey, colour = array.ndim == 2, array.ndim == 3 and shape[2] in (3, 4)
    hint = ""
    if kind.kind == "f" and array.size and (grey or colour):
        if array.min() >= 0 and array.max() <= 1:
            return Image.fromarray(_eight_bits(array))
        hint = f" with values in [{array.min():g}, {array.max():g}]"
    readable = (kind == np.uint8 and (grey or colour)) or (kind == np.uint16 and grey)
    if array.size == 0 or not readable:
        raise UnusableInput(
            "unreadable-array",
            f"{named(image_id)}{what} must be a file, a Pillow image, or an array (H, W), (H, W, 3) or (H, W, 4) of "
            f"uint8 or of floats in [0, 1], or uint16 (H, W), or such a tensor with its channels first; "
            f"got {kind} {shape}{hint}",
        )
    return Image.fromarray(np.ascontiguousarray(array))


def like(given: Picture, filled: Image.Image) -> np.ndarray | Image.Image | Tensor:
    """*filled* as the kind that *given*, which it was made of, is: an array or a tensor of its shape, type and device,
    else a Pillow image. Floats that eight bits do not tell apart from the filled picture's stay as they were."""
    if isinstance(given, Tensor):
        array = opened(given)
        assert isinstance(array, np.ndarray), "a tensor is opened as an array"
        values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(_like_array(array, filled), -1, array.ndim - 3)))
        return values.reshape(given.shape).to(given.device, given.dtype)
    return _like_array(given, filled) if isinstance(given, np.ndarray) else filled


def _like_array(given: np.ndarray, filled: Image.Image) -> np.ndarray:
    values = np.array(filled).reshape(given.shape)
    if given.dtype.kind != "f":
        return values
    return np.where(values == _eight_bits(given), given, (values / 255).astype(given.dtype))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] as uint8."""
    return np.rint(np.ascontiguousarray(values, np.float64) * 255).astype(np.uint8)
