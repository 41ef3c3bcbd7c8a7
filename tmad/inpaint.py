"""Inpainting of arrays and photographs: any size, any mode in; valid pixels come out bit-identical.

The coarse network sees the image, or each group of holes with its surroundings, once; the hole cells then go through
retrieval and PSNet in squares, so that memory beyond the coarse pass does not grow with the hole. Shapes: H W image
sides, k patch side, C candidates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tmad import builtin
from tmad.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_model
from tmad.coarse import compose
from tmad.draws import hole_cells
from tmad.holes import Box, block_any, dilate, fade, group_holes, named, polarity_notes
from tmad.holes import EmptyMaskWarning as EmptyMaskWarning
from tmad.holes import MaskPolarityWarning as MaskPolarityWarning
from tmad.holes import UnusableInput as UnusableInput
from tmad.holes import hole_mask as hole_mask
from tmad.images import paste, scale, to_model, to_rgb, to_uint8
from tmad.inputs import Picture, as_pillow, like, opened
from tmad.memory import select_pool
from tmad.model import TMAD
from tmad.patches import Part
from tmad.rng import numpy_generator

Policy = Literal["original", "resize", "crop"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

CONTEXT = 128
"""Pixels around a hole that the networks see by default: four cells of the paper's size."""
LIMIT = 1024
"""Pixels of a side up to which the coarse network works at full size by default; some 600 MB of memory."""


@dataclass(frozen=True)
class InpaintResult:
    """What `Inpainter` made of one image."""

    output: np.ndarray | Image.Image | Tensor
    """The filled image: an array for an array, a tensor for a tensor, else a Pillow image; same size, same type or mode
    where `images.paste` keeps it."""
    coarse: np.ndarray
    """I^_s (H, W, 3) uint8: the coarse result (or what came as `filled`) inside the hole, the input outside.
    Empty where candidates were not asked for."""
    candidates: np.ndarray
    """(cells, C, k, k, 3) uint8, the memory patches retrieved for each hole cell, most similar first; empty where
    they were not asked for."""
    cells_yx: np.ndarray
    """(cells, 2) int64, top-left corner of each hole cell; cells at the right and lower border may reach beyond it."""
    hole_fraction: float
    """Share of hole pixels in the mask."""
    candidates_yx: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 2), dtype=np.int64))
    """(cells, C, 2) int64, top-left corner of each candidate's window in the image; empty where `candidates` is."""
    memory: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0, 3), dtype=np.uint8))
    """(N_pool, k, k, 3) uint8, the memory's patches, of all groups of holes; empty where `candidates` is."""
    memory_yx: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    """(N_pool, 2) int64, top-left corners of those patches in the image."""
    notes: tuple[str, ...] = field(default=())
    """What a user should know about this input, such as a mask that looks inverted; also given as warnings."""


class Inpainter:
    """A trained generator, ready for images; holds no state between calls, so one image never affects another."""

    def __init__(
        self,
        model: TMAD,
        *,
        policy: Policy = "original",
        context: int = CONTEXT,
        limit: int = LIMIT,
        feather: int = 0,
        cells_per_chunk: int = 256,
        seed: int = 0,
        keep_candidates: bool = True,
    ) -> None:
        """How pictures of any size are worked on.

        *policy*: `original`, the coarse network sees the whole picture; `resize`, it sees the picture with its longer
        side reduced to *limit* pixels; `crop`, it sees each group of holes with *context* pixels around it, reduced
        where that part is longer than *limit*. Texture is retrieved and synthesized at full size always. *feather*:
        pixels around the hole over which the result passes into the picture; they change, those beyond them never do.
        *cells_per_chunk*, cells worked on at once, bounds the memory of retrieval and PSNet; *seed* keys the choice of
        the texture memory.
        """
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if cells_per_chunk < 1:
            raise ValueError(f"cells_per_chunk must be at least 1, got {cells_per_chunk}")
        if context < 0 or feather < 0:
            raise ValueError(f"context and feather must not be negative, got {context} and {feather}")
        if limit < 2 * model.config.size_multiple:
            raise ValueError(f"limit must be at least {2 * model.config.size_multiple}, got {limit}")
        self.model = model.eval()
        self.policy = policy
        self.context = context
        self.limit = limit
        self.feather = feather
        self.cells_per_chunk = cells_per_chunk
        self.seed = seed
        self.keep_candidates = keep_candidates

    @staticmethod
    def load(
        model: Path | str = builtin.NAME,
        *,
        device: torch.device | str = "cpu",
        policy: Policy = "crop",
        tracking_uri: str | None = None,
        **options: Any,
    ) -> Inpainter:
        """The model that *model* names, as in every job, ready for pictures of any size; *options* as above.

        `builtin`, the one in the box; a folder, that of an artifact, a checkpoint or a run; a URI of one;
        `models:/tmad@champion` or `runs:/<id>/model` of MLflow at *tracking_uri*, else `MLFLOW_TRACKING_URI`. Raises
        what `load_model` and `builtin_model` raise, `ModelNotFound` where there is none, and `ValueError` for a device
        that this machine does not have.
        """
        check_device(device)
        folder = _model_folder(model, tracking_uri)
        return Inpainter(load_model(folder, device=device), policy=policy, **{"keep_candidates": False, **options})

    def __getstate__(self) -> dict[str, Any]:
        """The settings, the model's configuration, and its weights: all that another process needs."""
        weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
        settings = {name: value for name, value in self.__dict__.items() if name != "model"}
        return {**settings, "model": (self.model.config, weights, str(self.device))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        config, weights, device = state.pop("model")
        check_device(device)
        self.__dict__.update(state)
        self.model = TMAD(config)
        self.model.load_state_dict(weights)
        self.model = self.model.to(device).eval()

    def inpaint(self, image: Picture, mask: Picture, *, image_id: str = "") -> np.ndarray | Image.Image | Tensor:
        """The filled image alone: an array for an array, a tensor for a tensor, else a Pillow image. Arguments and
        errors as in a call."""
        return self(image, mask, image_id=image_id).output

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def __call__(
        self,
        image: Picture,
        mask: Picture,
        *,
        image_id: str = "",
        filled: Picture | None = None,
    ) -> InpaintResult:
        """Fill the hole of one image (Sec. III; inference takes the hole cells and nothing else).

        *image*: a file's path or bytes, the open file, a Pillow image of any mode, an array (H, W), (H, W, 1),
        (H, W, 3) or (H, W, 4) of uint8 or of floats in [0, 1], uint16 (H, W), or such a tensor with its channels first.
        *mask*: the same, of the same size, 1 = hole; see `hole_mask` for its types. *filled*: somebody else's result
        for this image and mask; retrieval and PSNet then work behind it and the coarse network is not asked (Table V).
        *image_id* and `seed` key the choice of the memory, so the same call gives the same result anywhere.

        Sides are padded to `size_multiple` (reflected, repeated at the edge where a side is too short) and cropped
        back; the memory is chosen from the image, or the part of it, as it came. A mask without hole gives the input
        back. A hole of more than half the image that also covers more than half of its border warns that the mask may
        be inverted.

        Raises `UnusableInput` (a `ValueError`) naming the image: a mask or result of another size, nothing but hole,
        an array that is no image. Raises `UnreadableImage` for a file that is none.
        """
        original = as_pillow(opened(image), "image", image_id)
        size = (original.height, original.width)
        hole, notes = hole_mask(opened(mask), image_id=image_id)
        _check_size("mask", hole.shape, size, image_id)
        donor = None
        if filled is not None:
            donor = as_pillow(opened(filled), "filled", image_id)
            _check_size("filled", (donor.height, donor.width), size, image_id)
        if not hole.any():
            return self._unchanged(image, original, notes)
        grown = dilate(hole, self.feather)
        if grown.all():
            message = "the mask leaves nothing but hole: no texture to fill it from"
            raise UnusableInput("all-hole", named(image_id) + message)
        notes += polarity_notes(hole, image_id)

        if original.mode == "F":  # whose values mean what the whole picture's range says
            readable: Image.Image = Image.fromarray(to_rgb(original))
        else:
            readable = original
        parts = [self._fill(readable, grown, donor, box, image_id) for box in self._boxes(grown)]
        shown = fade(hole, self.feather)
        output = paste(original, [((part.box.top, part.box.left), part.rgb, shown[part.box.slices]) for part in parts])
        return InpaintResult(
            output=like(image, output),
            coarse=self._coarse(original, parts),
            candidates=np.concatenate([part.found.candidates for part in parts]),
            cells_yx=np.concatenate([part.found.cells_yx for part in parts]),
            candidates_yx=np.concatenate([part.found.candidates_yx for part in parts]),
            memory=np.concatenate([part.found.memory for part in parts]),
            memory_yx=np.concatenate([part.found.memory_yx for part in parts]),
            hole_fraction=float(hole.mean()),
            notes=notes,
        )

    def _boxes(self, hole: np.ndarray) -> list[Box]:
        if self.policy == "crop":
            return group_holes(hole, multiple=self.model.config.size_multiple, context=self.context)
        return [Box(0, 0, *hole.shape)]

    def _fill(self, image: Image.Image, hole: np.ndarray, donor: Image.Image | None, box: Box, image_id: str) -> _Part:
        """One part of the picture, filled; *hole* is that of the whole picture."""
        whole = (box.height, box.width) == hole.shape
        hole = hole[box.slices]
        rgb = to_rgb(image if whole else image.crop(box.corners))
        given = None if donor is None else to_rgb(donor if whole else donor.crop(box.corners))
        # Parts of one picture draw their memories independently.
        key = (image_id,) if whole else (image_id, box.top, box.left)
        if self.policy != "original" and max(hole.shape) > self.limit:
            coarse = np.where(hole[..., None] > 0, self._reduced(rgb, hole) if given is None else given, rgb)
            filled, found = self._fill_in_tiles(coarse, hole, key)
        else:
            filled, coarse, found = self._fill_at_once(rgb, hole, given, key)
        corner = np.array([box.top, box.left])
        moved = replace(
            found,
            candidates_yx=found.candidates_yx + corner,
            cells_yx=found.cells_yx + corner,
            memory_yx=found.memory_yx + corner,
        )
        return _Part(box, filled, coarse, moved)

    def _fill_at_once(
        self, rgb: np.ndarray, hole: np.ndarray, donor: np.ndarray | None, key: tuple[int | str, ...]
    ) -> tuple[np.ndarray, np.ndarray, _Found]:
        config, device = self.model.config, self.device
        height, width = hole.shape
        padded_rgb, padded_hole = (_pad(array, config.size_multiple) for array in (rgb, hole))
        image = _to_tensor(padded_rgb, device)
        mask = torch.from_numpy(padded_hole).to(device)[None, None].float()
        pool_yx = torch.from_numpy(self._pool(hole, key).astype(np.int64)).to(device)[None]
        if donor is None:
            coarse = self._predict(image, mask, _around(padded_hole, config.patch_size))
        else:
            coarse = compose(_to_tensor(_pad(donor, config.size_multiple), device), image, mask)
        memory = self.model.read_memory(coarse, pool_yx)
        # Cells whose only hole pixels are padding would be cropped away again.
        inside = np.zeros_like(padded_hole)
        inside[:height, :width] = hole
        before = _to_array(coarse)[:height, :width]
        before = np.where(hole[..., None] > 0, before, rgb)
        filled, found = self._synthesize(lambda part: coarse[..., *part], before, inside, memory, pool_yx[0])
        return filled, before, found

    def _predict(self, image: Tensor, mask: Tensor, part: Part) -> Tensor:
        """I^_s of *image*, whose holes lie in *part*."""
        coarse = image.clone()
        coarse[..., *part] = compose(self.model.predict_coarse(image, mask, part), image[..., *part], mask[..., *part])
        return coarse

    def _synthesize(
        self, read: Callable[[Part], Tensor], before: np.ndarray, hole: np.ndarray, memory: Tensor, pool_yx: Tensor
    ) -> tuple[np.ndarray, _Found]:
        """Texture for the hole cells, a square of `cells_per_chunk` of them at a time.

        *read* gives parts (1, 3, h, w) of I^_s, whose size is that of *hole* (H, W), multiples of k; *before*: the same
        as uint8, without padding; *memory* as `TMAD.read_memory` and its corners *pool_yx* (P, 2). PSNet sees so much
        around each square that the result does not depend on where squares end. Returns *before* with texture.
        """
        k = self.model.config.patch_size
        cells = hole_cells(hole, k).astype(np.int64)
        corners = np.stack(np.divmod(cells, hole.shape[1] // k), axis=1) * k
        index, weights = self._retrieve(read, corners, memory)
        filled = before.copy()
        side = max(1, math.isqrt(self.cells_per_chunk)) * k
        margin = -(-(self.model.psnet.reach + self.model.config.overlap) // k) * k
        first, last = corners.min(axis=0), corners.max(axis=0) + k
        for top, left in itertools.product(range(first[0], last[0], side), range(first[1], last[1], side)):
            bottom, right = min(top + side, last[0]), min(left + side, last[1])
            target = filled[top:bottom, left:right]
            wanted = hole[top:bottom, left:right][: target.shape[0], : target.shape[1]] > 0
            if not wanted.any():
                continue
            y, x = max(0, top - margin), max(0, left - margin)
            part = np.s_[y : bottom + margin, x : right + margin]
            coarse, mask = read(part), torch.from_numpy(hole[part]).to(self.device)[None, None].float()
            inside = ((corners >= (y, x)) & (corners < (bottom + margin, right + margin))).all(axis=1)
            rows, columns = ((corners[inside] - (y, x)) // k).T
            local = torch.from_numpy(rows * (coarse.shape[-1] // k) + columns).to(self.device)
            chosen = torch.from_numpy(inside).to(self.device)
            candidates = self.model.retrieval.hand_out(weights[chosen][None], memory, index[chosen][None])
            inner = slice(top - y, bottom - y), slice(left - x, right - x)
            ends = [(slice(a * k, (b + 1) * k)) for a, b in ((rows.min(), rows.max()), (columns.min(), columns.max()))]
            made = _to_array(self.model.synthesize(coarse, mask, candidates, local[None], inner, (ends[0], ends[1])))
            target[wanted] = made[: target.shape[0], : target.shape[1]][wanted]
        return filled, self._found(index, memory, pool_yx, corners)

    def _retrieve(self, read: Callable[[Part], Tensor], corners: np.ndarray, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates (N, C) of the cells at *corners* (N, 2), as numbers of memory windows, and S (N, P)."""
        k = self.model.config.patch_size
        index, weights = [], []
        for chunk in np.split(corners, range(self.cells_per_chunk, len(corners), self.cells_per_chunk)):
            queries = torch.cat([read(np.s_[y : y + k, x : x + k]) for y, x in chunk])[None]
            found = self.model.retrieval(queries, self.model.patches(memory), memory[..., :1, :1, :1])
            index.append(found.index[0])
            weights.append(found.weights[0])
        return torch.cat(index), torch.cat(weights)

    def _found(self, index: Tensor, memory: Tensor, pool_yx: Tensor, corners: np.ndarray) -> _Found:
        if not self.keep_candidates:
            none = _none_found(self.model.config.retrieval.num_candidates, self.model.config.patch_size)
            return replace(none, cells_yx=corners)
        pool = to_uint8(self.model.patches(memory[0])).permute(0, 2, 3, 1).cpu().numpy()
        places, chosen = pool_yx.cpu().numpy(), index.cpu().numpy()
        return _Found(pool[chosen], places[chosen], corners, pool, places)

    def _reduced(self, rgb: np.ndarray, hole: np.ndarray) -> np.ndarray:
        """The coarse result of a picture reduced to `limit` pixels, at the picture's own size (H, W, 3), uint8."""
        config = self.model.config
        height, width = hole.shape
        factor = max(height, width) / self.limit
        size = max(1, round(height / factor)), max(1, round(width / factor))
        # Every pixel of the reduced picture that a hole pixel has a share in: the filter reaches one pixel further.
        found = block_any(hole, factor)[: size[0], : size[1]]
        small_hole = np.zeros(size, np.uint8)
        small_hole[: found.shape[0], : found.shape[1]] = found
        small_hole = dilate(small_hole, 1)
        small = scale(rgb, size, "bilinear")
        image = _to_tensor(_pad(small, config.size_multiple), self.device)
        mask = torch.from_numpy(_pad(small_hole, config.size_multiple)).to(self.device)[None, None].float()
        coarse = _to_array(self._predict(image, mask, _around(small_hole, config.size_multiple)))
        return scale(np.ascontiguousarray(coarse[: size[0], : size[1]]), (height, width))

    def _fill_in_tiles(
        self, coarse: np.ndarray, hole: np.ndarray, key: tuple[int | str, ...]
    ) -> tuple[np.ndarray, _Found]:
        """Texture at full size, for squares of `limit` pixels at a time, from one memory of the whole part."""
        config = self.model.config
        height, width = hole.shape
        pool_yx = torch.from_numpy(self._pool(hole, key).astype(np.int64))
        padded = _pad(coarse, config.size_multiple)

        def read(part: Part) -> Tensor:
            return _to_tensor(padded[part], self.device)

        inside = np.zeros(padded.shape[:2], hole.dtype)
        inside[:height, :width] = hole
        memory = torch.cat([self._window(padded, top, left) for top, left in pool_yx.tolist()], dim=1)
        return self._synthesize(read, coarse, inside, memory, pool_yx)

    def _window(self, coarse: np.ndarray, top: int, left: int) -> Tensor:
        """What `TMAD.read_memory` reads at one corner, from as much of a large picture as it depends on."""
        config = self.model.config
        reach = config.overlap + config.patch_size // 2
        first_y, first_x = max(0, top - reach), max(0, left - reach)
        last = config.patch_size + reach
        part = np.ascontiguousarray(coarse[first_y : top + last, first_x : left + last])
        corner = torch.tensor([[[top - first_y, left - first_x]]], device=self.device)
        return self.model.read_memory(_to_tensor(part, self.device), corner)

    def _pool(self, hole: np.ndarray, key: tuple[int | str, ...]) -> np.ndarray:
        """Corners of the memory, inside the image as it came; a side shorter than k borrows from its padding."""
        config = self.model.config
        if max(hole.shape) > np.iinfo(np.int16).max:
            raise UnusableInput("too-long", f"sides up to {np.iinfo(np.int16).max} pixels can be filled at once")
        height, width = (max(side, config.patch_size) for side in hole.shape)
        hole = _pad(hole, config.size_multiple)[:height, :width]
        return select_pool(
            hole,
            patch_size=config.patch_size,
            stride=config.memory_stride,
            pool_size=config.memory.pool_size,
            rule=config.memory.rule,
            rng=numpy_generator(self.seed, "pool", *key),
        )

    def _coarse(self, original: Image.Image, parts: Sequence[_Part]) -> np.ndarray:
        if not self.keep_candidates:
            return np.zeros((0, 0, 3), np.uint8)
        coarse = to_rgb(original)
        for part in parts:
            coarse[part.box.slices] = part.coarse
        return coarse

    def _unchanged(self, image: Picture, original: Image.Image, notes: tuple[str, ...]) -> InpaintResult:
        config = self.model.config
        none = _none_found(config.retrieval.num_candidates, config.patch_size)
        return InpaintResult(
            output=like(image, original.copy()),
            coarse=self._coarse(original, ()),
            candidates=none.candidates,
            cells_yx=none.cells_yx,
            candidates_yx=none.candidates_yx,
            hole_fraction=0.0,
            notes=notes,
        )


@dataclass(frozen=True)
class _Found:
    """What retrieval found, as in `InpaintResult`."""

    candidates: np.ndarray
    candidates_yx: np.ndarray
    cells_yx: np.ndarray
    memory: np.ndarray
    memory_yx: np.ndarray


@dataclass(frozen=True)
class _Part:
    """A part of a picture and what was made of it; pixels (h, w, 3), uint8, corners in the picture."""

    box: Box
    rgb: np.ndarray
    coarse: np.ndarray
    found: _Found


def check_device(device: torch.device | str) -> None:
    """Raise `ValueError` for a device that this machine does not have."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} needs a GPU that PyTorch can use, and there is none here; use device='cpu'")


def _model_folder(model: Path | str, tracking_uri: str | None) -> Path:
    """The folder on this machine of the artifact that *model* names."""
    if str(model) == builtin.NAME:
        return builtin.builtin_model()
    for folder in (Path(model), Path(model) / "model"):
        if all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
            return folder
    # Whoever names a folder needs neither Ray nor MLflow; other places are known to the glue around this package.
    from pipeline.models import find_model

    return find_model(str(model), tracking_uri=tracking_uri)


def _check_size(what: str, size: tuple[int, ...], wanted: tuple[int, int], image_id: str) -> None:
    if tuple(size) != wanted:
        raise UnusableInput(
            "size-mismatch",
            f"{named(image_id)}{what} is {size[0]}x{size[1]} (height x width), "
            f"the image is {wanted[0]}x{wanted[1]}; they must have the same size",
        )


def _pad(array: np.ndarray, multiple: int) -> np.ndarray:
    """Grow the first two axes to a multiple, at their ends: reflected, repeated where a side is too short."""
    for axis in (0, 1):
        side = array.shape[axis]
        extra = -side % multiple
        widths = [(0, extra if index == axis else 0) for index in range(array.ndim)]
        array = np.pad(array, widths, mode="reflect" if extra < side else "edge")
    return array


def _around(hole: np.ndarray, multiple: int) -> Part:
    """The rows and columns that hold all of *hole*, to multiples of *multiple*."""
    rows, columns = (np.flatnonzero(hole.any(axis=axis)) // multiple * multiple for axis in (1, 0))
    return slice(rows[0], rows[-1] + multiple), slice(columns[0], columns[-1] + multiple)


def _to_tensor(rgb: np.ndarray, device: torch.device) -> Tensor:
    return to_model(torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1))).to(device)[None])


def _to_array(image: Tensor) -> np.ndarray:
    return to_uint8(image[0]).permute(1, 2, 0).cpu().numpy()


def _none_found(num_candidates: int, patch_size: int) -> _Found:
    candidates = np.zeros((0, num_candidates, patch_size, patch_size, 3), dtype=np.uint8)
    corners = np.zeros((0, 2), np.int64)
    return _Found(
        candidates,
        np.zeros((0, num_candidates, 2), np.int64),
        corners,
        candidates.reshape(0, *candidates.shape[2:]),
        corners,
    )
