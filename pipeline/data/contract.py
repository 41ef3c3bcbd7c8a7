"""Quality checks of each photograph while it is decoded, and the facts that set-wide checks need later.

Pure functions of one photograph. `pipeline.data.duplicates` compares photographs with each other by the facts that are
noted here, without reading a shard again; `pipeline.data.contract_report` shows what was found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.data.photograph import Photograph
from tmad.config import STRICT
from tmad.images import UnreadableImage, scale

GREY_TOLERANCE = 4
"""Grey values by which the channels of a picture may differ and it still is grey: chroma that JPEG made up."""
HASH_GRID = (8, 9)
"""Rows and columns of mean luminance that the perceptual hash compares: 8 x 8 differences."""
_HASHED_ROWS = 256
"""Rows of a larger picture that the hash looks at, at least; means of cells hardly change by it."""
LUMINANCE = np.array([299, 587, 114])
"""Thousandths of red, green and blue in it (ITU-R BT.601)."""
MIN_HASH_BITS = 8
"""A hash with fewer ones, or fewer zeros, is that of a flat picture or a plain gradient: alike in all of them."""
NO_HASH = 0
"""Stands for "this picture's hash says nothing"."""

FACTS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("digest", pa.binary(16), nullable=False),
        pa.field("hash", pa.uint64(), nullable=False),
        pa.field("grey", pa.bool_(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
"""One row for each photograph that a shard was made of: `bytes` and `digest` (the first half of SHA-256) are the
file's, `width` and `height` those of the upright picture, `hash` is `perceptual_hash`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PhotographConfig:
    """What a photograph has to be, beyond a file that can be decoded and is large enough."""

    max_aspect: Annotated[float, Field(ge=1)] = 4.0
    """Images whose longer side is more than this many times the shorter one are left out."""
    drop_grey: bool = False
    """Leave out images without colour."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ContractConfig(PhotographConfig):
    """What a prepared set may hold: the photographs' own properties, and what they have to do with others."""

    exact_duplicates: Literal["drop", "keep"] = "drop"
    """What becomes of a file with the same bytes as an earlier one, by key; kept ones are reported."""
    near_duplicates: Literal["keep", "drop"] = "keep"
    """What becomes of an image that looks like an earlier one, by key; kept ones are reported."""
    near_distance: Annotated[int, Field(ge=0, le=8)] = 4
    """Bits of the 64-bit perceptual hash by which images that look alike may differ."""
    against: str | None = None
    """A prepared set that this one must share no image with, for example the training set when validation is prepared:
    a path or any fsspec URI."""
    shared_images: Literal["drop", "stop"] = "drop"
    """What becomes of an image that is, or looks like one, in `against`: left out, or the job stops."""


def examine(key: str, photograph: Photograph, config: ContractConfig) -> dict[str, Any]:
    """The row of `FACTS_SCHEMA` for a photograph.

    Raises `UnreadableImage`: `too-narrow` beyond `max_aspect`, `grey` with `drop_grey`.
    """
    return {
        "grey": check_photograph(photograph, config),
        "key": key,
        "bytes": photograph.size,
        "digest": bytes.fromhex(photograph.sha256)[:16],
        "hash": perceptual_hash(photograph.rgb),
        "width": photograph.width,
        "height": photograph.height,
    }


def check_photograph(photograph: Photograph, config: PhotographConfig) -> bool:
    """Whether it is grey. Raises `UnreadableImage` as `examine` does."""
    height, width = photograph.height, photograph.width
    if max(height, width) > config.max_aspect * min(height, width):
        raise UnreadableImage(
            "too-narrow",
            f"{width}x{height} pixels, the longer side may be {config.max_aspect:g} times the shorter one (max_aspect)",
        )
    grey = is_grey(photograph.rgb)
    if grey and config.drop_grey:
        raise UnreadableImage("grey", f"the colour channels differ by at most {GREY_TOLERANCE} (drop_grey)")
    return grey


def is_grey(rgb: np.ndarray) -> bool:
    """True if no pixel of *rgb* (H, W, 3), uint8, has channels that differ by more than `GREY_TOLERANCE`."""
    # A few pixels are enough to see that most pictures have colour.
    return _channels_agree(rgb[::16, ::16]) and _channels_agree(rgb)


def perceptual_hash(rgb: np.ndarray) -> int:
    """64 bits that recompression and scaling hardly change, of a picture (H, W, 3), uint8: the difference hash.

    One bit for each pair of horizontal neighbours in an 8 x 9 grid of mean luminance: is the right one lighter? (N.
    Krawetz, "Kind of Like That", hackerfactor.com, 2013.) It knows nothing of crops, turns and mirror images. `NO_HASH`
    if fewer than `MIN_HASH_BITS` bits are ones, or zeros. docs/data-contract.md has the distances measured.
    """
    rows, columns = HASH_GRID
    # Sums over eight by eight parts of a cell keep what rounding to eight bits would lose.
    sampled = rgb[:: max(1, len(rgb) // _HASHED_ROWS)]
    parts = scale(sampled, (8 * rows, 8 * columns), "bilinear").astype(np.int64) @ LUMINANCE
    cells = parts.reshape(rows, 8, columns, 8).sum((1, 3))
    bits = (cells[:, 1:] > cells[:, :-1]).reshape(-1)
    ones = int(bits.sum())
    if min(ones, bits.size - ones) < MIN_HASH_BITS:
        return NO_HASH
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def summarise_holes(fractions: np.ndarray) -> dict[str, Any]:
    """Number, least, greatest and total of hole fractions in [0, 1], and how many fall into each tenth."""
    counts, _ = np.histogram(fractions, bins=10, range=(0, 1))
    return {
        "masks": int(fractions.size),
        "min": float(fractions.min(initial=1)),
        "max": float(fractions.max(initial=0)),
        "sum": float(fractions.sum(dtype=np.float64)),
        "histogram": counts.tolist(),
    }


def join_holes(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The summaries of several shards as one, with their mean in place of the sum."""
    masks = sum(part["masks"] for part in parts)
    return {
        "masks": masks,
        "min": min((part["min"] for part in parts), default=1.0),
        "mean": sum(part["sum"] for part in parts) / max(masks, 1),
        "max": max((part["max"] for part in parts), default=0.0),
        "histogram": [sum(part["histogram"][tenth] for part in parts) for tenth in range(10)],
    }


def polarity_warning(mean_fraction: float) -> str | None:
    """What to say where holes cover more than half of the pictures, as they do in masks with black holes."""
    if mean_fraction <= 0.5:
        return None
    return (
        f"holes cover {mean_fraction:.0%} of the pictures on average: in a mask, 1 (white) is the hole; are these "
        "masks the other way round?"
    )


def _channels_agree(rgb: np.ndarray) -> bool:
    values = np.ascontiguousarray(rgb).reshape(-1)
    # Every run of three neighbouring values; each third run is one pixel's. Contiguous, hence an eighth of the time.
    red, green, blue = values[:-2], values[1:-1], values[2:]
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return int(spread[::3].max()) <= GREY_TOLERANCE
