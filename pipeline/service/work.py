"""One request: what is asked, how it is read from a form, and the file that answers it. No network, no Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from pipeline.inpaint.holes import hole_of_boxes, is_box
from tmad.files import FilledFile, ImageFile, Kind, fill_file, open_file
from tmad.holes import Colour, MaskRule, MaskValue, dilate, hole_mask, scaled_hole
from tmad.images import UnreadableImage, decode_image
from tmad.inpaint import Inpainter, UnusableInput
from tmad.model import TMAD

FILES = ("photo", "mask")
FIELDS = {
    "boxes": "[[left, top, width, height], ...] in pixels, instead of a mask",
    "mask_hole": "which colour of the mask is the hole: white or black",
    "mask_value": "what of the mask counts: grey, nonzero or alpha",
    "mask_threshold": "values of the mask above it are white, 0 to 254",
    "scale_masks": "true: bring the mask to the size of the photograph",
    "dilate": "pixels by which the hole is grown, up to 1000",
    "seed": "keys the choice of the texture memory",
    "format": "same: that of the photograph; png",
}
"""What a form may hold beside the files."""


class Refused(Exception):
    """A request that is not answered with a picture: an HTTP *status*, a short *reason* to count by, a sentence."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(status, reason, message)
        self.status, self.reason, self.message = status, reason, message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Request:
    """A photograph, its hole, and how it is to be filled."""

    photo: bytes
    name: str
    """The file's; keys the choice of the memory, as the command does."""
    mask: bytes | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    rule: MaskRule = field(default_factory=MaskRule)
    scale_masks: bool = False
    dilate: int = 0
    seed: int = 0
    kind: Kind = "same"
    candidates: bool = False
    """Whether the answer says where texture was taken from."""


@dataclass(frozen=True)
class Answer:
    """The filled file and what is to be known about it."""

    data: bytes
    format: str
    """Pillow's name."""
    about: dict[str, Any]
    """`notes`, `hole_fraction`, `width`, `height`, and, where asked for, `patch_size`, `cells` and `candidates`:
    corners (row, column) of the hole's cells and, for each, of the windows that its texture was taken from."""


@dataclass(frozen=True)
class Opened:
    """A request whose files have been read."""

    file: ImageFile
    hole: np.ndarray
    """(H, W) uint8, 1 = hole."""


def read_request(files: Mapping[str, tuple[str, bytes]], fields: Mapping[str, str], *, candidates: bool) -> Request:
    """The request that a form makes: *files* by name, each (file name, bytes), and *fields*. Raises `Refused`."""
    unknown = sorted({*files, *fields} - {*FILES, *FIELDS})
    if unknown:
        raise Refused(
            400, "unknown-field", f"there is no {', '.join(unknown)}; there are {', '.join((*FILES, *FIELDS))}"
        )
    if "photo" not in files:
        raise Refused(400, "no-photo", "the form needs a file `photo`, and a file `mask` or `boxes`")
    if ("mask" in files) == ("boxes" in fields):
        raise Refused(400, "no-mask", "the form needs either a file `mask`, white where the hole is, or `boxes`")
    name, photo = files["photo"]
    rule = MaskRule(
        _one_of("mask_hole", fields, get_args(Colour), "white"),
        _one_of("mask_value", fields, get_args(MaskValue), "grey"),
        _number("mask_threshold", fields, 127, 254),
    )
    return Request(
        photo,
        name or "photo",
        files["mask"][1] if "mask" in files else None,
        _boxes(fields["boxes"]) if "boxes" in fields else (),
        rule,
        _one_of("scale_masks", fields, ("true", "false"), "false") == "true",
        _number("dilate", fields, 0, 1000),
        _number("seed", fields, 0, 2**31 - 1),
        _one_of("format", fields, get_args(Kind), "same"),
        candidates,
    )


def _one_of(name: str, fields: Mapping[str, str], allowed: tuple[str, ...], default: str) -> Any:
    value = fields.get(name, default)
    if value not in allowed:
        raise Refused(400, "wrong-field", f"{name} must be {' or '.join(allowed)}, got {value[:40]!r}")
    return value


def _number(name: str, fields: Mapping[str, str], default: int, most: int) -> int:
    value = fields.get(name, str(default))
    if not (value.isascii() and value.isdigit() and len(value) < 12 and int(value) <= most):
        raise Refused(400, "wrong-field", f"{name} must be a whole number from 0 to {most}, got {value[:40]!r}")
    return int(value)


def _boxes(text: str) -> tuple[tuple[float, ...], ...]:
    try:
        boxes = json.loads(text)
        if isinstance(boxes, list) and boxes and all(map(is_box, boxes)):
            return tuple(tuple(map(float, box)) for box in boxes)
    except (ValueError, RecursionError, OverflowError):
        pass
    raise Refused(400, "wrong-field", "boxes must be [[left, top, width, height], ...], the last two positive")


def open_request(request: Request, max_pixels: int) -> Opened:
    """Decode the files. Raises `Refused` for what cannot be used: 413 where it is too large, else 422."""
    try:
        file = open_file(request.photo, max_pixels=max_pixels)
        height, width = file.image.height, file.image.width
        if request.mask is None:
            return _checked(file, hole_of_boxes(request.boxes, height, width), request)
    except UnreadableImage as error:
        raise _refused("photo", error) from None
    try:
        hole, notes = hole_mask(decode_image(request.mask, max_pixels=max_pixels), request.rule)
    except UnreadableImage as error:
        raise _refused("mask", error) from None
    except UnusableInput as error:
        raise Refused(422, error.reason, str(error)) from None
    if notes:
        raise Refused(422, "faint-mask", notes[0])
    if request.scale_masks:
        hole = scaled_hole(hole, height, width)
    return _checked(file, hole, request)


def _checked(file: ImageFile, hole: np.ndarray, request: Request) -> Opened:
    if hole.shape == (file.image.height, file.image.width) and not hole.any():
        raise Refused(422, "no-hole", "the mask has no hole: nothing in it is white")
    return Opened(file, dilate(hole, request.dilate))


def _refused(what: str, error: UnreadableImage) -> Refused:
    return Refused(413 if error.reason == "too-large" else 422, error.reason, f"{what}: {error}")


def fill(model: TMAD, request: Request, *, max_pixels: int, **options: Any) -> Answer:
    """Answer *request* with *model*; *options* are an `Inpainter`'s. Raises `Refused`."""
    opened = open_request(request, max_pixels)
    inpainter = Inpainter(model, seed=request.seed, keep_candidates=request.candidates, **options)
    try:
        filled = fill_file(inpainter, opened.file, opened.hole, image_id=request.name, kind=request.kind)
    except UnusableInput as error:
        raise Refused(422, error.reason, str(error)) from None
    except UnreadableImage as error:
        raise _refused("photo", error) from None
    return answer(filled, opened, request, model.config.patch_size)


def answer(filled: FilledFile, opened: Opened, request: Request, patch_size: int) -> Answer:
    """What is sent back for a filled file."""
    file, result = opened.file, filled.result
    about: dict[str, Any] = {
        "notes": list(dict.fromkeys(filled.notes)),
        "hole_fraction": result.hole_fraction,
        "width": file.image.width,
        "height": file.image.height,
    }
    if request.candidates:
        about["patch_size"] = patch_size
        about["cells"], about["candidates"] = result.cells_yx.tolist(), result.candidates_yx.tolist()
    return Answer(filled.data, "PNG" if request.kind == "png" else file.format, about)
