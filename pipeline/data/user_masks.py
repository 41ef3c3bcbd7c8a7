"""User-supplied holes: masks paired with images, drawn from a list, in a column, or in the alpha channel.

A mask is read by the one rule of `tmad.holes.MaskRule`; which of black and white is the hole is never guessed.
What the masks look like is counted, so that a set with the two confused says so.
"""

from __future__ import annotations

import hashlib
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.data.sources.base import Source
from pipeline.data.sources.choose import open_source
from pipeline.data.sources.parquet import ParquetTable
from pipeline.errors import MissingInput
from pipeline.storage import absolute, redact
from tmad.holes import PLAIN_MASK, EmptyMaskWarning, MaskRule, UnusableInput, hole_mask, mask_grey, scaled_hole
from tmad.holes import Colour as Colour
from tmad.images import MAX_PIXELS, PICTURES, UnreadableImage, decode_image

MaskFrom = Literal["family", "paired", "random", "alpha", "column"]

SPARE_DRAWS = 32
"""Masks looked at in place of drawn ones that cannot be used."""
_SHOWN = 3


@dataclass(frozen=True)
class OwnMasks:
    """Where masks lie and which of their colours is the hole; picklable, because workers read from it.

    Masks belong to the image `a/b.jpg` whose key is `a/b` with any ending, or that lie in the folder `a/b/`.
    """

    source: Source
    place: str
    """For messages."""
    rule: MaskRule = PLAIN_MASK
    scaled: bool = False
    """Bring masks to the size of their images, instead of leaving those of another size out."""
    stems: pa.Array | None = None
    """What each mask belongs to, in order; none if images are not paired with names."""
    names: pa.Array | None = None
    """Keys of the masks in *source*, in the order of *stems* if there are any; default: those of the images."""

    def of_image(self, key: str) -> list[str]:
        """Keys of the masks of the image *key*, by code point."""
        if self.stems is None or self.names is None:
            return [key]
        stem = stem_of(key)
        first, end = (cut(self.stems, stem, key=lambda one: one.as_py()) for cut in (bisect_left, bisect_right))
        return list(self.names[first:end].to_pylist())

    def made_of(self, keys: Sequence[str]) -> Any:
        """What decides, beside the settings, which masks the images *keys* get."""
        return self._names_digest if self.stems is None else [self.of_image(key) for key in keys]

    def versions(self, keys: Sequence[str]) -> list[str]:
        """For each of the images *keys* a text that changes when one of its masks, or of those it may get, does."""
        if self.names is None:
            return self.source.versions(keys)
        if self.stems is None:
            names = self.names.to_pylist()
            text = "\0".join(f"{name}\0{one}" for name, one in zip(names, self.source.versions(names), strict=True))
            return [hashlib.sha256(text.encode()).hexdigest()] * len(keys)
        masks = [self.of_image(key) for key in keys]
        flat = [name for one in masks for name in one]
        known = dict(zip(flat, self.source.versions(flat), strict=True))
        return [str([(name, known[name]) for name in one]) for one in masks]

    @cached_property
    def _names_digest(self) -> str | None:
        if self.names is None:
            return None
        return hashlib.sha256("\0".join(self.names.to_pylist()).encode()).hexdigest()


def open_masks(
    mask_from: MaskFrom,
    *,
    source: str,
    images: Source,
    keys: Sequence[str],
    masks: str | None,
    mask_column: str | None,
    rule: MaskRule,
    masks_per_image: int,
    scaled: bool = False,
    cache: str | None = None,
) -> OwnMasks | None:
    """The masks that these settings name for the images *keys* of *images* at *source*; none if none are read.

    Raises `MissingInput` if there is no mask, or none for any image, and `ValueError` if there are fewer masks than
    *masks_per_image*, or for places that cannot be.
    """
    if mask_from == "column":
        if not isinstance(images, ParquetTable):
            raise ValueError(
                f"mask_from=column needs a Parquet table, the source {redact(source)} is none; "
                "mask_from paired, random or alpha can be used here"
            )
        column = replace(images, image_column=mask_column, label_column=None, image_setting="mask_column")
        column.keys()
        return OwnMasks(column, redact(source), rule, scaled)
    if masks is None:
        return None
    place = absolute(masks)
    if place == absolute(source) or place.startswith(absolute(source) + "/"):
        raise ValueError(
            f"masks ({redact(place)}) must not lie in the source ({redact(source)}): they would be taken for images"
        )
    opened = open_source(place, cache=cache)
    names = opened.keys()
    if mask_from == "random":
        if len(names) < masks_per_image:
            raise ValueError(
                f"masks_per_image must be at most the number of masks in {redact(place)} ({len(names)}), "
                f"got {masks_per_image}"
            )
        return OwnMasks(opened, redact(place), rule, scaled, names=pa.array(names, pa.large_string()))
    own = {stem_of(key) for key in keys}

    def image_of(name: str) -> str:
        stem = stem_of(name)
        folder = stem.rpartition("/")[0]
        return folder if folder in own and stem not in own else stem

    stems, ordered = zip(*sorted((image_of(name), name) for name in names), strict=True)
    if own.isdisjoint(stems):
        raise MissingInput(
            f"no image has a mask in {redact(place)}: looked for {', '.join(map(repr, map(stem_of, keys[:_SHOWN])))} "
            f"with an image ending; there is {names[0]!r}"
        )
    large = pa.large_string()
    return OwnMasks(opened, redact(place), rule, scaled, pa.array(stems, large), pa.array(ordered, large))


def stem_of(key: str) -> str:
    """The key without the ending of an image file."""
    name, dot, ending = key.rpartition(".")
    return name if f"{dot}{ending}".lower() in PICTURES else key


@dataclass
class MaskReader:
    """Reads masks and counts what they look like."""

    masks: OwnMasks | None = None
    """None: alpha channels alone can be read."""
    max_pixels: int = MAX_PIXELS
    counts: Counter[str] = field(default_factory=Counter)
    """`masks`: masks read; of these `mostly_hole`, `grey` (with values between black and white), `unreadable` (random
    masks that were passed over)."""

    def of_alpha(self, image: Image.Image) -> np.ndarray:
        """(H, W), uint8, 1 = the transparent part of *image*. Raises `UnreadableImage`, as below."""
        if not image.has_transparency_data:
            raise UnreadableImage("no-mask", f"mode {image.mode} has no transparency")
        if image.mode == "La":
            image = image.convert("LA")
        alpha = image if image.mode == "RGBA" else image.convert("RGBA")
        return self._hole(alpha, MaskRule("black", "alpha"), "the alpha channel")

    def of_image(self, key: str, height: int, width: int) -> list[np.ndarray]:
        """The masks (height, width), uint8, 1 = hole, of the image *key*.

        Raises `UnreadableImage` with the reason to leave the image out: `no-mask`, `mask-size`, `empty-mask`,
        `full-mask`, `faint-mask` (it shows something, but nothing that counts), `mask-truncated`, ...
        """
        masks = self._place()
        names = masks.of_image(key)
        if not names:
            raise UnreadableImage("no-mask", f"no mask named {stem_of(key)}.* in {masks.place}")
        return [self._of_size(name, masks, height, width) for name in names]

    def _of_size(self, name: str, masks: OwnMasks, height: int, width: int) -> np.ndarray:
        picture = self._read(name)
        fits = picture.size == (width, height)
        if not fits and not masks.scaled:
            found = f"{picture.width}x{picture.height}"
            raise UnreadableImage("mask-size", f"the mask {name} has {found} pixels, its image {width}x{height}")
        hole = self._hole(picture, masks.rule, f"the mask {name}")
        if fits:
            return hole
        return check_hole(scaled_hole(hole, height, width), f"the mask {name}, brought to {width}x{height},")

    def of_file(self, data: bytes, rule: MaskRule, name: str) -> np.ndarray:
        """The hole in the bytes of one mask file. Raises `UnreadableImage`."""
        return self._hole(decode_image(data, max_pixels=self.max_pixels), rule, name)

    def draw(self, count: int, side: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """*count* different masks of the list as (side, side), uint8, 1 = hole; unusable ones are passed over.

        A mask is read when it is asked for.
        Raises `UnreadableImage` with the last one's reason if too few could be used.
        """
        masks = self._place()
        assert masks.names is not None, "masks are drawn from a list"
        total, left = len(masks.names), count
        error = UnreadableImage("no-mask", f"{masks.place} has {total} masks, {count} are needed")
        for row in rng.choice(total, size=min(total, count + SPARE_DRAWS), replace=False):
            name = masks.names[int(row)].as_py()
            try:
                whole = self._hole(self._read(name), masks.rule, f"the mask {name}")
                mask = check_hole(scaled_hole(whole, side, side), f"the mask {name} at {side} pixels")
            except UnreadableImage as one:
                self.counts["unreadable"] += one.reason.startswith("mask-") or one.reason in ("no-mask", "faint-mask")
                error = one
                continue
            yield mask
            if (left := left - 1) == 0:
                return
        raise error

    def _place(self) -> OwnMasks:
        if self.masks is None:
            raise ValueError("masks that lie somewhere need a reader of that place, see open_masks")
        return self.masks

    def _read(self, name: str) -> Image.Image:
        data = self._place().source.read(name)
        if not data:
            raise UnreadableImage("no-mask", f"the mask {name} has no bytes")
        try:
            return decode_image(data, max_pixels=self.max_pixels)
        except UnreadableImage as error:
            raise UnreadableImage(f"mask-{error.reason}", f"the mask {name}: {error.detail}") from None

    def _hole(self, picture: Image.Image, rule: MaskRule, name: str) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", EmptyMaskWarning)  # it becomes the reason
                mask, notes = hole_mask(picture, rule)
            grey = mask_grey(picture, rule.value)
        except UnusableInput as error:
            raise UnreadableImage(f"mask-{error.reason}", f"{name}: {error}") from None
        if notes:
            raise UnreadableImage("faint-mask", f"{name}: {notes[0]}")
        self.counts["masks"] += 1
        self.counts["mostly_hole"] += bool(mask.mean() > 0.5)
        self.counts["grey"] += bool(((grey != 0) & (grey != 255)).any())
        return check_hole(mask, f"{name} (values {grey.min()} to {grey.max()}, {rule.hole} is the hole)")


def check_hole(mask: np.ndarray, name: str) -> np.ndarray:
    """The mask, if it has hole and known pixels. Raises `UnreadableImage`: `empty-mask` or `full-mask`."""
    if not mask.any():
        raise UnreadableImage("empty-mask", f"{name} has no hole")
    if mask.all():
        raise UnreadableImage("full-mask", f"{name} is nothing but hole")
    return mask


def join_counts(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The counts of several readers as one."""
    names = ("masks", "mostly_hole", "grey", "unreadable")
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def mask_warnings(counts: Mapping[str, int], mask_from: MaskFrom, hole: Colour) -> list[str]:
    """What to say about masks with these counts."""
    total, alpha = counts["masks"], mask_from == "alpha"
    found = []
    if counts["mostly_hole"] > total / 2:
        other = "black" if hole == "white" else "white"
        advice = f"{hole} is taken for the hole; if {other} is, set mask_hole to {other}"
        if alpha:
            advice = "the transparent part is the hole; is alpha the other way round?"
        found.append(f"in {counts['mostly_hole']} of {total} masks the hole is more than half of the picture: {advice}")
    if counts["grey"]:
        what = "alpha channels are partly transparent" if alpha else "masks are not only black and white"
        where = "in the middle" if alpha else "by mask_threshold"
        found.append(
            f"{counts['grey']} of {total} {what}: values between 0 and 255 are parted {where}; lossless files with two "
            "values leave nothing to chance"
        )
    if counts["unreadable"]:
        found.append(f"unreadable masks were drawn {counts['unreadable']} times, and others in their place")
    return found
