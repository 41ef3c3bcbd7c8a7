"""One photograph's bytes to the records of its crops: decode, check, crop, draw holes, choose the memory.

A pure function of (key, bytes, settings): running it ahead of time and storing the result, or running it in the
training input, gives the same.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
import simplejpeg
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.data.photograph import Photograph, open_photograph
from pipeline.data.schema import pack_mask
from pipeline.data.user_masks import MaskFrom, MaskReader, check_hole
from tmad.config import STRICT, MemoryConfig, PositiveInt, check_choice
from tmad.holes import MASK_THRESHOLD, Colour, MaskRule, MaskValue
from tmad.images import MAX_PIXELS, crop_scaled, scaled_size
from tmad.masks import MASKS, draw_mask
from tmad.memory import select_pool
from tmad.rng import numpy_generator, seed_of

_MASK_DRAWS = 32
_CROP_DRAWS = 32
_FAMILY = "brush_or_rectangle"
_SUBSAMPLING = "420"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CropConfig:
    """What a photograph's crops and their holes are, whatever the model's patches are."""

    crop_size: PositiveInt = 256
    """Side of the square crop, in pixels; a multiple of patch_size [P]."""
    short_side: tuple[PositiveInt, PositiveInt] | None = None
    """The image is scaled so that its shorter side, in pixels, lies in this range before it is cropped at random;
    default: crop_size, so that images of exactly that size are taken as they are [D: others crop 384 to 256]."""
    crops_per_image: PositiveInt = 1
    """Crops taken from each image."""
    min_side: PositiveInt | None = None
    """Images with a shorter side below this many pixels are left out; default: half of crop_size."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Images with more pixels are left out before they are decoded."""
    mask: str = _FAMILY
    """Family of holes, by its name in `tmad.masks.MASKS`."""
    mask_from: MaskFrom = "family"
    """Where holes come from: drawn by the family `mask`; a mask paired with its image by name; masks drawn at random
    from a list; the image's alpha channel (transparent = hole); a column of the Parquet source."""
    masks: str | None = None
    """For mask_from paired and random, the masks: folder, tar file, Parquet file or list, by path or URI."""
    mask_column: str | None = None
    """For mask_from column, the column with the encoded masks."""
    mask_hole: Colour = "white"
    """For mask_from paired, random and column, the colour of the hole in the masks; it is never guessed."""
    mask_value: MaskValue = "grey"
    """What of a mask counts: `grey`, its brightest channel; `nonzero`, all that is not 0, such as labels; `alpha`, its
    alpha channel, where opaque is white."""
    mask_threshold: Annotated[int, Field(ge=0, le=254)] = MASK_THRESHOLD
    """Values of a mask above it are white, on a scale to 255."""
    scale_masks: bool = False
    """Scale masks to the size of their images (nearest pixel) instead of leaving those images out."""
    masks_per_image: PositiveInt = 1
    """Holes drawn for each crop; epoch e trains with number e modulo this."""
    encoding: Literal["jpeg", "png", "webp"] = "jpeg"
    """Format of stored crops; files that need no crop, scaling or conversion keep their own bytes."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Quality of JPEG and WebP."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random choice is keyed by this, the image's key and the number of the crop or hole."""

    def __post_init__(self) -> None:
        low, high = self.short_sides
        if not self.crop_size <= low <= high:
            raise ValueError(f"short_side must rise from at least crop_size ({self.crop_size}), got {low} to {high}")
        if self.mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(sorted(MASKS))}, got {self.mask!r}")
        drawn, pictures = ("family", "paired", "random"), ("paired", "random", "column")
        check_choice(
            self,
            "mask_from",
            needs={"masks": ("paired", "random"), "mask_column": ("column",)},
            uses={
                **dict.fromkeys(("mask_hole", "mask_value", "mask_threshold"), pictures),
                **{"mask": ("family",), "scale_masks": ("paired", "column"), "masks_per_image": drawn},
            },
        )
        self.mask_rule  # noqa: B018 - refuses what contradicts itself

    @property
    def mask_rule(self) -> MaskRule:
        """How masks are read."""
        return MaskRule(self.mask_hole, self.mask_value, self.mask_threshold)

    @property
    def short_sides(self) -> tuple[int, int]:
        """The range of `short_side`, resolved."""
        return self.short_side or (self.crop_size, self.crop_size)

    @property
    def smallest_side(self) -> int:
        """`min_side`, resolved."""
        return self.min_side or self.crop_size // 2


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecordConfig(CropConfig):
    """What a record is made of: crop, encoding, holes, memory."""

    patch_size: PositiveInt = 32
    """k_p, side of a memory patch in pixels; the model must have the same [P]."""
    memory: MemoryConfig = MemoryConfig()
    """Which windows make up the texture memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_size % self.patch_size:
            raise ValueError(f"crop_size must be a multiple of patch_size ({self.patch_size}), got {self.crop_size}")
        if self.patch_size % self.memory.stride_divisor:
            raise ValueError(
                f"memory.stride_divisor must divide patch_size ({self.patch_size}), got {self.memory.stride_divisor}"
            )

    def family(self, variant: int, image_id: str) -> str:
        """The family of a crop's hole number *variant*."""
        return self.mask


def open_as(data: bytes, config: RecordConfig) -> Photograph:
    """The image file *data* as `make_records` needs it. Raises `UnreadableImage` with the reason to leave it out."""
    return open_photograph(
        data,
        max_pixels=config.max_pixels,
        smallest_side=config.smallest_side,
        short_side=config.short_sides[1],
        with_original=config.mask_from == "alpha",
    )


def make_records(
    key: str,
    data: bytes,
    config: RecordConfig,
    *,
    label: int | None = None,
    photograph: Photograph | None = None,
    masks: MaskReader | None = None,
    crops: range | None = None,
    variants: range | None = None,
) -> list[dict[str, Any]]:
    """Rows of `schema.RECORD_SCHEMA` and `EVALUATION_FIELDS` for the image file *data* of class *label*, one a crop.

    *photograph*: that file, if `open_as` opened it already; *masks* reads the user's, where `mask_from` names any.
    *crops* and *variants*: numbers of the crops, and of the holes of each, that are made (default: all); what is made
    does not depend on what is left out. Raises `UnreadableImage` with the reason to leave the image out.
    """
    crops = crops or range(config.crops_per_image)
    variants = variants or range(config.masks_per_image)
    photograph = photograph or open_as(data, config)
    masks = masks or MaskReader()
    sides = (photograph.height, photograph.width)
    whole_masks: list[np.ndarray] = []
    if config.mask_from == "alpha":
        assert photograph.original is not None, "opened with its alpha channel"
        whole_masks = [masks.of_alpha(photograph.original)]
    elif config.mask_from in ("paired", "column"):
        whole_masks = masks.of_image(key, *sides)
    rows = []
    for number in crops:
        rng = numpy_generator(config.seed, "crop", key, number)
        image_id = f"{key}#{number}"
        families: list[str] = [config.mask_from] * len(variants)
        seeds: list[int | None] = [None] * len(variants)
        if config.mask_from == "family":
            place = _draw_place(photograph, config, rng)
            families = [config.family(variant, image_id) for variant in variants]
            seeds = [seed_of(config.seed, "mask", image_id, variant) for variant in variants]
            holes = [_family_mask(image_id, config, variant) for variant in variants]
        elif config.mask_from == "random":
            place = _draw_place(photograph, config, rng)
            seeds = [seed_of(config.seed, "mask", image_id)] * len(variants)
            mask_rng = numpy_generator(config.seed, "mask", image_id)
            drawn = masks.draw(config.masks_per_image, config.crop_size, mask_rng)
            holes = list(islice(drawn, variants.start, variants.stop))
        else:
            first = number * config.masks_per_image
            turn = [whole_masks[(first + one) % len(whole_masks)] for one in range(config.masks_per_image)]
            place, cut = _draw_place_with_hole(photograph, turn, config, rng)
            holes = cut[variants.start : variants.stop]
        height, width = place["scaled"]
        if photograph.keeps_its_bytes and sides == (height, width) == (config.crop_size, config.crop_size):
            encoded = data
        else:
            encoded = _encode(crop_scaled(photograph.rgb, original=sides, **place), config)
        pools = [_pool(image_id, mask, config, variant) for variant, mask in zip(variants, holes, strict=True)]
        rows.append(
            {
                "image_id": image_id,
                "image": encoded,
                "height": config.crop_size,
                "width": config.crop_size,
                "masks": [pack_mask(mask) for mask in holes],
                "pool_yx": [pool.reshape(-1) for pool in pools],
                "hole_fraction": [float(mask.mean()) for mask in holes],
                "label": label,
                "source": {"key": key, "size": photograph.size, "sha256": photograph.sha256},
                "crop": {"scaled_height": height, "scaled_width": width, "top": place["top"], "left": place["left"]},
                "mask_family": families,
                "mask_seed": seeds,
            }
        )
    return rows


def _draw_place(photograph: Photograph, config: RecordConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Scale and place of one crop, as `crop_scaled` takes them."""
    short_side = int(rng.integers(config.short_sides[0], config.short_sides[1], endpoint=True))
    height, width = scaled_size(photograph.height, photograph.width, short_side)
    top = int(rng.integers(height - config.crop_size, endpoint=True))
    left = int(rng.integers(width - config.crop_size, endpoint=True))
    return {"scaled": (height, width), "top": top, "left": left, "size": config.crop_size}


def _draw_place_with_hole(
    photograph: Photograph, whole_masks: Sequence[np.ndarray], config: RecordConfig, rng: np.random.Generator
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A crop in which each of the image's masks has hole and known pixels, and these parts of the masks."""
    for _ in range(_CROP_DRAWS):
        place = _draw_place(photograph, config, rng)
        cut = [crop_scaled(mask, **place) for mask in whole_masks]
        if all(mask.any() and not mask.all() for mask in cut):
            break
    for mask in cut:
        check_hole(mask, f"the mask in each of {_CROP_DRAWS} crops drawn, the last of them,")
    return place, cut


def _family_mask(image_id: str, config: RecordConfig, variant: int) -> np.ndarray:
    """Mask (crop, crop) of a variant. A draw of no hole or nothing but hole is drawn again."""
    rng = numpy_generator(config.seed, "mask", image_id, variant)
    family, side = config.family(variant, image_id), config.crop_size
    for _ in range(_MASK_DRAWS):
        mask = draw_mask(family, side, side, rng)
        if mask.any() and not mask.all():
            return mask
    raise ValueError(
        f"mask family {family!r} gave {_MASK_DRAWS} times no hole or nothing but hole at {side} pixels; choose another "
        "mask or crop_size"
    )


def _pool(image_id: str, mask: np.ndarray, config: RecordConfig, variant: int) -> np.ndarray:
    """Memory (P, 2) of a variant."""
    return select_pool(
        mask,
        patch_size=config.patch_size,
        stride=config.patch_size // config.memory.stride_divisor,
        pool_size=config.memory.pool_size,
        rule=config.memory.rule,
        rng=numpy_generator(config.seed, "pool", image_id, variant),
    )


def _encode(crop: np.ndarray, config: RecordConfig) -> bytes:
    if config.encoding == "jpeg":
        return simplejpeg.encode_jpeg(crop, config.quality, "RGB", _SUBSAMPLING)
    buffer = io.BytesIO()
    options = {} if config.encoding == "png" else {"quality": config.quality}
    Image.fromarray(crop).save(buffer, config.encoding, **options)
    return buffer.getvalue()
