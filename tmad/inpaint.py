"""Inpainting of arrays and photographs: any size, any mode in; valid pixels come out bit-identical.

The coarse network sees the whole image once; the hole cells then go through retrieval and PSNet in chunks, so that
memory beyond the coarse pass does not grow with the hole. Shapes: H W image sides, k patch side, C candidates.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tmad.coarse import compose
from tmad.images import restore_mode, to_model, to_rgb, to_uint8
from tmad.memory import select_pool
from tmad.model import TMAD
from tmad.patches import cell_corners, hole_cells, tile
from tmad.rng import numpy_generator

MASK_THRESHOLD = 127
"""Grey values above it are hole."""

MAX_USUAL_HOLE = 0.5
"""A mask with more hole than this, and more than this share of its border, is probably inverted."""


class MaskPolarityWarning(UserWarning):
    """The mask looks inverted: white should be the hole."""


class EmptyMaskWarning(UserWarning):
    """The mask has grey values, but none that counts as hole."""


class UnusableInput(ValueError):
    """Image and mask that cannot be worked on. `reason` is a short name to count by: `size-mismatch`, `all-hole`,
    `unreadable-array`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True)
class InpaintResult:
    """What `Inpainter` made of one image."""

    output: np.ndarray | Image.Image
    """The filled image: an array for an array, a Pillow image for a Pillow image; same size, same mode where
    `images.restore_mode` keeps it."""
    coarse: np.ndarray
    """I^_s (H, W, 3) uint8: the coarse result (or what came as `filled`) inside the hole, the input outside."""
    candidates: np.ndarray
    """(cells, C, k, k, 3) uint8, the memory patches retrieved for each hole cell, most similar first; empty where
    they were not asked for."""
    cells_yx: np.ndarray
    """(cells, 2) int64, top-left corner of each hole cell; cells at the right and lower border may reach beyond it."""
    hole_fraction: float
    """Share of hole pixels in the mask."""
    candidates_yx: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 2), dtype=np.int64))
    """(cells, C, 2) int64, top-left corner of each candidate's window in the image; empty where `candidates` is."""
    notes: tuple[str, ...] = field(default=())
    """What a user should know about this input, such as a mask that looks inverted; also given as warnings."""


class Inpainter:
    """A trained generator, ready for images; holds no state between calls, so one image never affects another."""

    def __init__(self, model: TMAD, *, cells_per_chunk: int = 256, seed: int = 0, keep_candidates: bool = True) -> None:
        """*cells_per_chunk* bounds the memory of retrieval and PSNet; *seed* keys the choice of the texture memory."""
        if cells_per_chunk < 1:
            raise ValueError(f"cells_per_chunk must be at least 1, got {cells_per_chunk}")
        self.model = model.eval()
        self.cells_per_chunk = cells_per_chunk
        self.seed = seed
        self.keep_candidates = keep_candidates

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def __call__(
        self,
        image: np.ndarray | Image.Image,
        mask: np.ndarray | Image.Image,
        *,
        image_id: str = "",
        filled: np.ndarray | Image.Image | None = None,
    ) -> InpaintResult:
        """Fill the hole of one image (Sec. III; inference takes the hole cells and nothing else).

        *image*: Pillow image of any mode, or uint8 array (H, W), (H, W, 3), (H, W, 4) or uint16 (H, W). *mask*: of the
        same size, 1 = hole; see `hole_mask` for its types. *filled*: somebody else's result for this image and mask;
        retrieval and PSNet then work behind it and the coarse network is not asked (Table V). *image_id* and `seed`
        key the choice of the memory, so the same call gives the same result anywhere.

        Sides are padded to `size_multiple` (reflected, repeated at the edge where a side is too short) and cropped
        back; the memory is chosen from the image as it came. A mask without hole gives the input back. A hole of more
        than half the image that also covers more than half of its border warns that the mask may be inverted.

        Raises `UnusableInput` (a `ValueError`) naming the image: a mask or result of another size, nothing but hole,
        an array that is no image.
        """
        original = _as_pillow(image, "image", image_id)
        rgb = to_rgb(original)
        hole, notes = hole_mask(mask, image_id=image_id)
        _check_size("mask", hole.shape, rgb, image_id)
        donor = None
        if filled is not None:
            donor = to_rgb(_as_pillow(filled, "filled", image_id))
            _check_size("filled", donor.shape[:2], rgb, image_id)
        if not hole.any():
            return self._unchanged(image, rgb, notes)
        if hole.all():
            message = "the mask leaves nothing but hole: no texture to fill it from"
            raise UnusableInput("all-hole", _named(image_id) + message)
        notes += _polarity_notes(hole, image_id)

        result, coarse, candidates, cells_yx, candidates_yx = self._fill(rgb, hole, donor, image_id)
        output: np.ndarray | Image.Image = restore_mode(result, original)
        return InpaintResult(
            output=np.asarray(output) if isinstance(image, np.ndarray) else output,
            coarse=coarse,
            candidates=candidates,
            cells_yx=cells_yx,
            candidates_yx=candidates_yx,
            hole_fraction=float(hole.mean()),
            notes=notes,
        )

    def _fill(
        self, rgb: np.ndarray, hole: np.ndarray, donor: np.ndarray | None, image_id: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        config, device = self.model.config, self.device
        height, width = hole.shape
        padded_rgb, padded_hole = (_pad(array, config.size_multiple) for array in (rgb, hole))
        image = _to_tensor(padded_rgb, device)
        mask = torch.from_numpy(padded_hole).to(device)[None, None].float()
        pool_yx = torch.from_numpy(self._pool(hole, padded_hole, image_id).astype(np.int64)).to(device)[None]
        # Cells whose only hole pixels are padding would be cropped away again.
        inside = np.zeros_like(padded_hole)
        inside[:height, :width] = hole
        cells = torch.from_numpy(hole_cells(inside, config.patch_size).astype(np.int64)).to(device)[None]

        if donor is None:
            coarse = compose(self.model.predict_coarse(image, mask), image, mask)
        else:
            coarse = compose(_to_tensor(_pad(donor, config.size_multiple), device), image, mask)
        pool = self.model.read_memory(coarse, pool_yx)
        patches, kept, places = [], [], []
        for chunk in cells.split(self.cells_per_chunk, dim=1):
            synthesized, found, index, _ = self.model.synthesize(coarse, pool, chunk)
            patches.append(synthesized)
            if self.keep_candidates:
                kept.append(to_uint8(found[0]).cpu())
                places.append(pool_yx[0][index[0]].cpu())
        output = tile(coarse, torch.cat(patches, dim=1), cells)

        k, num_candidates = config.patch_size, config.retrieval.num_candidates
        candidates = torch.cat(kept).permute(0, 1, 3, 4, 2).numpy() if kept else _no_candidates(num_candidates, k)
        cells_yx = cell_corners(cells[0].cpu(), patch_size=k, width=image.shape[-1]).numpy()
        crop = np.s_[:height, :width]
        return (
            np.where(hole[..., None] > 0, _to_array(output)[crop], rgb),
            np.where(hole[..., None] > 0, _to_array(coarse)[crop], rgb),
            candidates,
            cells_yx,
            torch.cat(places).numpy() if places else np.zeros((0, num_candidates, 2), dtype=np.int64),
        )

    def _pool(self, hole: np.ndarray, padded_hole: np.ndarray, image_id: str) -> np.ndarray:
        """Corners of the memory, inside the image as it came; a side shorter than k borrows from its padding."""
        config = self.model.config
        height, width = (max(side, config.patch_size) for side in hole.shape)
        return select_pool(
            padded_hole[:height, :width],
            patch_size=config.patch_size,
            stride=config.memory_stride,
            pool_size=config.memory.pool_size,
            rule=config.memory.rule,
            rng=numpy_generator(self.seed, "pool", image_id),
        )

    def _unchanged(self, image: np.ndarray | Image.Image, rgb: np.ndarray, notes: tuple[str, ...]) -> InpaintResult:
        config = self.model.config
        return InpaintResult(
            output=image.copy(),
            coarse=rgb,
            candidates=_no_candidates(config.retrieval.num_candidates, config.patch_size),
            cells_yx=np.zeros((0, 2), dtype=np.int64),
            hole_fraction=0.0,
            notes=notes,
        )


def hole_mask(mask: np.ndarray | Image.Image, *, image_id: str = "") -> tuple[np.ndarray, tuple[str, ...]]:
    """A mask as (H, W) uint8 {0, 1}, 1 = hole, and notes about it.

    Boolean: true = hole. Integers: with no value above 1, 1 = hole; otherwise grey, above 127 = hole (16-bit values
    count by their upper byte). Floats must lie in [0, 1]: above 0.5 = hole. Pillow images: 1-bit as boolean, grey of 8
    or 16 bits as integers, everything else by its grey value; alpha is ignored. Grey values of which none is above 127
    warn.

    Raises `UnusableInput` for more than two dimensions and for values out of range.
    """
    if isinstance(mask, Image.Image):
        plain = mask.mode in ("1", "L", "I") or mask.mode.startswith("I;16")
        values = np.asarray(mask if plain else Image.fromarray(to_rgb(mask)).convert("L"))
    else:
        values = np.asarray(mask)
    trouble = _mask_trouble(values)
    if trouble:
        raise UnusableInput("unreadable-array", _named(image_id) + trouble)
    if values.dtype.kind in "bf":
        return (values > 0.5).astype(np.uint8), ()
    high = values.max()
    if high <= 1:
        return values.astype(np.uint8), ()
    grey = values >> 8 if high > 255 else values
    hole = (grey > MASK_THRESHOLD).astype(np.uint8)
    notes: tuple[str, ...] = ()
    if not hole.any():
        notes = (f"the mask has values up to {high}, none above {MASK_THRESHOLD}: nothing counts as hole",)
        warnings.warn(_named(image_id) + notes[0], EmptyMaskWarning, stacklevel=3)
    return hole, notes


def _mask_trouble(values: np.ndarray) -> str:
    if values.ndim != 2 or values.size == 0:
        return f"the mask must have two dimensions (H, W), got {values.shape}"
    if values.dtype.kind not in "buif":
        return f"the mask must be bool, integer or float, got {values.dtype}"
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and not (low >= 0 and high <= 1):
        return f"a float mask must lie in [0, 1], got [{low:g}, {high:g}]"
    if values.dtype.kind in "ui" and not (low >= 0 and high <= 65535):
        return f"mask values must lie in [0, 255] or [0, 65535], got [{low}, {high}]"
    return ""


def _polarity_notes(hole: np.ndarray, image_id: str) -> tuple[str, ...]:
    border = np.concatenate([hole[0], hole[-1], hole[1:-1, 0], hole[1:-1, -1]])
    if hole.mean() <= MAX_USUAL_HOLE or border.mean() <= MAX_USUAL_HOLE:
        return ()
    note = (
        f"the mask may be inverted: {hole.mean():.0%} of the image and {border.mean():.0%} of its border are hole; "
        "white (1) is the hole, black (0) is kept"
    )
    warnings.warn(_named(image_id) + note, MaskPolarityWarning, stacklevel=3)
    return (note,)


def _as_pillow(image: np.ndarray | Image.Image, what: str, image_id: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    shape, kind = array.shape, array.dtype
    grey, colour = array.ndim == 2, array.ndim == 3 and shape[2] in (3, 4)
    readable = (kind == np.uint8 and (grey or colour)) or (kind == np.uint16 and grey)
    if array.size == 0 or not readable:
        hint = "; a float image in [0, 1] is (image * 255).round().astype('uint8')" if kind.kind == "f" else ""
        raise UnusableInput(
            "unreadable-array",
            f"{_named(image_id)}{what} must be a Pillow image or a uint8 array (H, W), (H, W, 3) or (H, W, 4), "
            f"or uint16 (H, W), got {kind} {shape}{hint}",
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _check_size(what: str, size: tuple[int, ...], rgb: np.ndarray, image_id: str) -> None:
    if tuple(size) != rgb.shape[:2]:
        raise UnusableInput(
            "size-mismatch",
            f"{_named(image_id)}{what} is {size[0]}x{size[1]} (height x width), "
            f"the image is {rgb.shape[0]}x{rgb.shape[1]}; they must have the same size",
        )


def _pad(array: np.ndarray, multiple: int) -> np.ndarray:
    """Grow the first two axes to a multiple, at their ends: reflected, repeated where a side is too short."""
    for axis in (0, 1):
        side = array.shape[axis]
        extra = -side % multiple
        widths = [(0, extra if index == axis else 0) for index in range(array.ndim)]
        array = np.pad(array, widths, mode="reflect" if extra < side else "edge")
    return array


def _to_tensor(rgb: np.ndarray, device: torch.device) -> Tensor:
    return to_model(torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))).to(device)[None])


def _to_array(image: Tensor) -> np.ndarray:
    return to_uint8(image[0]).permute(1, 2, 0).cpu().numpy()


def _no_candidates(num_candidates: int, patch_size: int) -> np.ndarray:
    return np.zeros((0, num_candidates, patch_size, patch_size, 3), dtype=np.uint8)


def _named(image_id: str) -> str:
    return f"{image_id}: " if image_id else ""
