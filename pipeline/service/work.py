"""One request: its form parsed, the picture filled, the answer encoded. No network, no Ray."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch

from pipeline.inpaint.holes import hole_of_boxes, is_box
from tmad.files import FilledFile, ImageFile, Kind, encode_filled, open_file
from tmad.holes import Colour, MaskRule, MaskValue, dilate, hole_mask, scaled_hole
from tmad.images import UnreadableImage, decode_image
from tmad.inpaint import Inpainter, Prepared, UnusableInput

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

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Begun:
    """A request that is ready for the networks."""

    request: Request
    opened: Opened
    inpainter: Inpainter
    """With the request's own settings."""
    prepared: Prepared


def fill(inpainter: Inpainter, request: Request, *, max_pixels: int) -> Answer:
    """Answer *request*, by itself. Raises `Refused`."""
    begun = begin(inpainter, request, max_pixels=max_pixels)
    (error,) = compute([begun])
    if error is not None:
        raise error
    return end(begun)


# The same in three steps: the first and the last may run in any thread, beside the second.


def begin(inpainter: Inpainter, request: Request, *, max_pixels: int) -> Begun:
    """Decode and prepare. Raises `Refused`."""
    opened = open_request(request, max_pixels)
    inpainter = inpainter.with_options(seed=request.seed, keep_candidates=request.candidates)
    try:
        prepared = inpainter.prepare(opened.file.image, opened.hole, image_id=request.name)
    except UnusableInput as error:
        raise Refused(422, error.reason, str(error)) from None
    return Begun(request, opened, inpainter, prepared)


def compute(begun: Sequence[Begun]) -> list[Exception | None]:
    """Take several through the networks together; for each, what went wrong with it."""
    together: dict[int, list[Begun]] = {}
    for one in begun:
        together.setdefault(id(one.inpainter.model), []).append(one)
    try:
        for some in together.values():
            wanted = any(one.request.candidates for one in some)
            some[0].inpainter.with_options(keep_candidates=wanted).compute([one.prepared for one in some])
    except Exception as error:
        # What is too much together may be possible one after the other, and one's trouble is not its neighbours'.
        return [error] if len(begun) == 1 else [found for one in begun for found in compute([one])]
    return [None] * len(begun)


def end(begun: Begun) -> Answer:
    """Encode what the networks made. Raises `Refused`."""
    file, hole, request = begun.opened.file, begun.opened.hole, begun.request
    try:
        filled = encode_filled(file, hole, begun.inpainter.finish(begun.prepared), kind=request.kind)
    except UnreadableImage as error:
        raise _refused("photo", error) from None
    return answer(filled, begun.opened, request, begun.inpainter.model.config.patch_size)


def refusal(error: Exception) -> Refused:
    """What is said of *error*, which happened to one picture."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Refused(413, "too-large", "the picture does not fit into memory; mark less of it")
    log.error("a picture could not be filled", exc_info=error)
    return Refused(500, "failed", f"this picture could not be filled: {type(error).__name__}")


def too_long(seconds: float) -> Refused:
    """What is said to a request that has waited for *seconds*."""
    return Refused(504, "too-long", f"it took more than {seconds:g} s; mark less, or a smaller picture")


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
