"""Sources of holes for batch inpainting: mask files, alpha, colours, boxes, one mask for all."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.sources.base import Source
from pipeline.data.sources.choose import open_source
from pipeline.data.user_masks import MaskReader, OwnMasks, check_hole, open_masks, stem_of
from pipeline.errors import CorruptSource, MissingInput
from pipeline.inpaint.config import HolesConfig
from pipeline.storage import absolute, read_bytes, redact
from tmad.files import ImageFile
from tmad.holes import dilate, scaled_hole
from tmad.images import UnreadableImage, to_rgb

Boxes = Mapping[str, Sequence[Any]]
"""[left, top, width, height] in pixels of the upright picture, by the image's key, as the file has them."""

NO_HOLE = ("no-mask", "no-hole")
"""Reasons of images with nothing to fill, which are skipped or copied, as the settings say."""


@dataclass(frozen=True)
class Holes:
    """All that is needed to tell an image's hole; picklable, because workers read from it."""

    config: HolesConfig
    masks: OwnMasks | None = None
    boxes: Boxes | None = None
    one: np.ndarray | None = None
    """(H, W), uint8, 1 = hole."""
    unmatched: Sequence[str] = ()
    """Masks that belong to no image; stays with the process that looked."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "unmatched": ()}

    def versions(self, keys: Sequence[str]) -> list[str]:
        """What stands for the hole of each of *keys*, beside its image: a text that changes when the hole may have."""
        if self.config.mask_from == "paired":
            assert self.masks is not None
            return self.masks.versions(keys)
        if self.boxes is not None:
            return [str(self.boxes.get(key)) for key in keys]
        if self.one is not None:
            return [hashlib.sha256(self.one.tobytes() + str(self.one.shape).encode()).hexdigest()] * len(keys)
        return [""] * len(keys)

    def has_mask(self, key: str) -> bool:
        """False if it is known, without looking at the image, that there is none."""
        if self.config.mask_from == "paired":
            assert self.masks is not None
            return bool(self.masks.of_image(key))
        return self.boxes is None or key in self.boxes

    def named(self, key: str) -> str:
        """Where the hole of *key* comes from, for the ledger."""
        if self.config.mask_from == "paired" and self.masks is not None:
            return ", ".join(self.masks.of_image(key))
        return {
            "boxes": f"{len(self.boxes[key]) if self.boxes and key in self.boxes else 0} boxes",
            "colour": f"colour {self.config.mask_colour}",
            "column": f"column {self.config.mask_column}",
        }.get(self.config.mask_from, self.config.mask_from)

    def of(self, key: str, file: ImageFile, *, max_pixels: int) -> np.ndarray:
        """The hole (H, W), uint8, {0, 1}, of an image, grown as the settings say.

        Raises `UnreadableImage` with the reason why there is none or why it cannot be used.
        """
        height, width = file.image.height, file.image.width
        try:
            hole = self._read(key, file, height, width, max_pixels)
        except UnreadableImage as error:
            if error.reason == "empty-mask":
                raise UnreadableImage("no-hole", error.detail) from None
            raise
        if not hole.any():
            raise UnreadableImage("no-hole", f"{self.named(key)}: nothing in the image is hole")
        return dilate(hole, self.config.dilate)

    def _read(self, key: str, file: ImageFile, height: int, width: int, max_pixels: int) -> np.ndarray:
        reader = MaskReader(self.masks, max_pixels=max_pixels)
        kind = self.config.mask_from
        if kind == "alpha":
            return reader.of_alpha(file.image)
        if kind == "colour":
            return self._of_colour(to_rgb(file.image))
        if kind == "boxes":
            return hole_of_boxes(map(_box, (self.boxes or {}).get(key, ())), height, width)
        if kind == "one":
            assert self.one is not None
            if self.one.shape != (height, width) and self.config.scale_masks:
                return check_hole(scaled_hole(self.one, height, width), f"the one mask, brought to {width}x{height},")
            if self.one.shape != (height, width):
                mask = f"{self.one.shape[1]}x{self.one.shape[0]}"
                raise UnreadableImage("mask-size", f"the one mask has {mask} pixels, this image {width}x{height}")
            return self.one
        found = reader.of_image(key, height, width)
        return found[0] if len(found) == 1 else np.bitwise_or.reduce(found)

    def _of_colour(self, rgb: np.ndarray) -> np.ndarray:
        assert self.config.mask_colour is not None
        colour, tolerance = bytes.fromhex(self.config.mask_colour.removeprefix("#")), self.config.mask_tolerance
        hole = np.ones(rgb.shape[:2], bool)
        for channel, value in enumerate(colour):
            low, high = max(0, value - tolerance), min(255, value + tolerance)
            hole &= (rgb[..., channel] >= low) & (rgb[..., channel] <= high)
        return hole.astype(np.uint8)


def hole_of_boxes(boxes: Iterable[Sequence[float]], height: int, width: int) -> np.ndarray:
    """Hole (H, W) of boxes [left, top, width, height]: every pixel that they touch. Raises `UnreadableImage`,
    `box-outside`."""
    hole = np.zeros((height, width), np.uint8)
    for left, top, box_width, box_height in boxes:
        rows = slice(max(0, math.floor(top)), max(0, math.ceil(top + box_height)))
        columns = slice(max(0, math.floor(left)), max(0, math.ceil(left + box_width)))
        if not hole[rows, columns].size:
            box = [left, top, box_width, box_height]
            raise UnreadableImage("box-outside", f"the box {box} lies outside of the image, {width}x{height}")
        hole[rows, columns] = 1
    return hole


def open_holes(config: HolesConfig, source: Source, source_uri: str, keys: Sequence[str]) -> tuple[Holes, list[str]]:
    """What tells the holes of the images *keys*, and those of the keys that are images, not masks lying among them.

    Raises `MissingInput`, `CorruptSource`, `StorageFailed` or `ValueError` for places and files that cannot be used.
    """
    if config.mask_from in ("alpha", "colour"):
        return Holes(config), list(keys)
    if config.mask_from == "column":
        masks = open_masks(
            "column",
            source=source_uri,
            images=source,
            keys=keys,
            masks=None,
            mask_column=config.mask_column,
            rule=config.mask_rule,
            masks_per_image=1,
            scaled=config.scale_masks,
        )
        return Holes(config, masks), list(keys)
    assert config.masks is not None, "the settings see to it"
    place = absolute(config.masks)
    if config.mask_from == "boxes":
        boxes = read_boxes(place)
        return Holes(config, boxes=boxes, unmatched=sorted(boxes.keys() - set(keys))), list(keys)
    if config.mask_from == "one":
        try:
            hole = MaskReader().of_file(read_bytes(place), config.mask_rule, f"the mask {redact(place)}")
        except UnreadableImage as error:
            raise CorruptSource(f"the one mask cannot be used: {error}") from None
        return Holes(config, one=hole), list(keys)
    return _open_paired(config, place, source, source_uri, keys)


def _open_paired(
    config: HolesConfig, place: str, source: Source, source_uri: str, keys: Sequence[str]
) -> tuple[Holes, list[str]]:
    among = place == absolute(source_uri) or place.startswith(absolute(source_uri) + "/")
    if among and not config.masks_may_lie_among_images:
        raise ValueError(
            f"masks ({redact(place)}) must not lie in the input ({redact(source_uri)}): they would be taken for "
            "images; with mask_suffix or mask_pattern they are told apart by name"
        )
    same = place == absolute(source_uri)
    opened = source if same else open_source(place)
    names = list(keys) if same else opened.keys()
    images = {stem_of(key) for key in keys}
    pairs = []
    for name in names:
        stem = _image_of(stem_of(name), config, images)
        if stem is not None and stem in images:
            pairs.append((stem, name))
    if not pairs:
        looked = ", ".join(repr(stem_of(key) + config.mask_suffix) for key in keys[:3])
        pattern = f" by {config.mask_pattern!r}" if config.mask_pattern else ""
        raise MissingInput(
            f"no image has a mask in {redact(place)}: looked for {looked}{pattern} with an image ending; "
            f"there is {names[0]!r}"
        )
    if among:
        prefix = "" if same else place[len(absolute(source_uri)) + 1 :] + "/"
        taken = {prefix + name for _, name in pairs}
        keys = [key for key in keys if key not in taken]
    pairs.sort()
    stems, ordered = zip(*pairs, strict=True)
    large = pa.large_string()
    masks = OwnMasks(
        opened, redact(place), config.mask_rule, config.scale_masks, pa.array(stems, large), pa.array(ordered, large)
    )
    matched = set(ordered)
    # Among the images, what is no mask is an image.
    unmatched = [] if same else [name for name in names if name not in matched]
    return Holes(config, masks, unmatched=unmatched), list(keys)


def near_misses(unmatched: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """For masks that belong to no image, images whose names they nearly have: in other letters, or with an ending."""
    known: dict[str, str] = {}
    for key in keys:
        known.setdefault(stem_of(key).lower(), key)
        known.setdefault(key.lower(), key)
    return {name: known[one] for name in unmatched if (one := stem_of(name).lower()) in known}


def _image_of(stem: str, config: HolesConfig, images: set[str]) -> str | None:
    """The stem of the image that the mask *stem* belongs to, by its name."""
    if config.mask_pattern is not None:
        match = re.fullmatch(config.mask_pattern, stem)
        return match[1] if match else None
    if config.mask_suffix:
        return stem.removesuffix(config.mask_suffix) if stem.endswith(config.mask_suffix) else None
    folder = stem.rpartition("/")[0]
    return folder if folder in images and stem not in images else stem


def read_boxes(uri: str) -> Boxes:
    """Boxes by image from a JSON file: `{"a/b.jpg": [[left, top, width, height], ...]}`, or COCO's `images` and
    `annotations` with their `bbox`. Raises `CorruptSource` saying what is wrong where."""
    try:
        content = json.loads(read_bytes(uri))
    except ValueError as error:
        raise CorruptSource(f"{redact(uri)} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CorruptSource(f"{redact(uri)} must hold a JSON object, got {type(content).__name__}")
    if isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        content = _of_coco(uri, content)
    return {key: boxes if isinstance(boxes, list) else [boxes] for key, boxes in content.items()}


def _of_coco(uri: str, content: Mapping[str, Any]) -> dict[str, list[Any]]:
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        found: dict[str, list[Any]] = {}
        for annotation in content["annotations"]:
            found.setdefault(names.get(annotation["image_id"], "an image_id without image"), []).append(
                annotation["bbox"]
            )
    except (KeyError, TypeError) as error:
        raise CorruptSource(f"{redact(uri)} is no COCO file: {type(error).__name__}: {error}") from None
    return found


def _box(box: Any) -> tuple[float, float, float, float]:
    if not is_box(box):
        raise UnreadableImage(
            "bad-box", f"a box is [left, top, width, height] in pixels, the last two positive, got {box!r}"
        )
    return tuple(map(float, box))  # type: ignore[return-value]


def is_box(box: Any) -> bool:
    """Whether *box* is [left, top, width, height], the last two positive."""
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
    return numbers and all(map(math.isfinite, box)) and box[2] > 0 and box[3] > 0
