"""Inpainting of arrays and photographs: any size, any mode in; valid pixels come out bit-identical.

The coarse network sees the image, or each group of holes with its surroundings, once; the hole cells then go through
retrieval and PSNet in squares, so that memory beyond the coarse pass does not grow with the hole. On a GPU images of
one size go through the networks together. Shapes: B images, N cells of an image, P memory patches, C candidates, H W
image sides, k patch side.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tmad import builtin
from tmad.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_model
from tmad.coarse import compose
from tmad.coherence import choose, continued
from tmad.config import TMADConfig
from tmad.holes import Box, block_any, dilate, fade, group_holes, named, polarity_notes
from tmad.holes import EmptyMaskWarning as EmptyMaskWarning
from tmad.holes import MaskPolarityWarning as MaskPolarityWarning
from tmad.holes import UnusableInput as UnusableInput
from tmad.holes import hole_mask as hole_mask
from tmad.images import Fill, UnreadableImage, paste, scale, to_model, to_rgb, to_uint8
from tmad.inputs import Picture, as_pillow, like, opened
from tmad.memory import nearest_windows, select_pool
from tmad.model import TMAD, folded
from tmad.patches import Part, cut, grown, within
from tmad.rng import numpy_generator
from tmad.structure import halvings, predict

Policy = Literal["original", "resize", "crop"]
POLICIES: tuple[Policy, ...] = get_args(Policy)

CONTEXT = 128
"""Pixels around a hole that the networks see by default: four cells of the paper's size."""
LIMIT = 1024
"""Pixels of a side up to which the coarse network works at full size by default; some 600 MB of memory."""
GPU_PIXELS = 2**22
"""Pixels that go through the networks together on a GPU by default."""

COHERENCE = 1.0
"""What it is worth by default that a window continues its neighbour's, in nats of S."""
MEMORY = 512
"""Windows of the memory where those of neighbours are to continue each other, at most; some 75 MB."""

_GRAIN = 4
"""Pictures are grouped by what PSNet sees of them, padded to sides of a multiple of this many cells."""

_STRIP = 128
"""Rows, or columns, of a large picture that are copied at once."""

Precision = Literal["fp32", "bf16"]
_Item = TypeVar("_Item")


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
        precision: Precision | None = None,
        pixels_at_once: int | None = None,
        coherence: float = COHERENCE,
    ) -> None:
        """How pictures of any size are worked on, by a copy of *model* where it is.

        *policy*: `original`, the coarse network sees the whole picture; `resize`, it sees the picture with its longer
        side reduced to *limit* pixels; `crop`, it sees each group of holes with *context* pixels around it, reduced
        where that part is longer than *limit*. Texture is retrieved and synthesized at full size always. *feather*:
        pixels around the hole over which the result passes into the picture; they change, those beyond them never do.
        *cells_per_chunk*, cells worked on at once, bounds the memory of retrieval and PSNet; *seed* keys the choice of
        the texture memory.

        *precision* of coarse network and PSNet, retrieval being float32 always; default: `bf16` on a GPU, `fp32` on a
        CPU. *pixels_at_once*: pixels of pictures of one size that go through the networks together; default:
        `GPU_PIXELS` on a GPU and one picture on a CPU, where a result is thus the same to the last bit whatever else is
        in the batch. On a GPU, in another precision or in company, a value may differ by rounding.

        *coherence*: what it is worth, in nats of S, that a cell's window continues the one of a neighbouring cell, so
        that no window shows again and again. 0 is the paper's choice, each cell by itself, from a memory of the size
        that the model was trained with.
        """
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if cells_per_chunk < 1:
            raise ValueError(f"cells_per_chunk must be at least 1, got {cells_per_chunk}")
        if context < 0 or feather < 0:
            raise ValueError(f"context and feather must not be negative, got {context} and {feather}")
        if limit < 2 * model.config.size_multiple:
            raise ValueError(f"limit must be at least {2 * model.config.size_multiple}, got {limit}")
        if coherence < 0:
            raise ValueError(f"coherence must not be negative, got {coherence}")
        if pixels_at_once is not None and pixels_at_once < 1:
            raise ValueError(f"pixels_at_once must be at least 1, got {pixels_at_once}")
        self.model = folded(model)
        on_gpu = self.device.type == "cuda"
        self.precision = precision or ("bf16" if on_gpu else "fp32")
        if self.precision == "bf16":
            for network in (self.model.coarse, self.model.psnet):
                network.to(torch.bfloat16)
                if on_gpu:
                    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pixels_at_once = pixels_at_once or (GPU_PIXELS if on_gpu else 1)
        self.policy = policy
        self.context = context
        self.limit = limit
        self.feather = feather
        self.cells_per_chunk = cells_per_chunk
        self.seed = seed
        self.keep_candidates = keep_candidates
        # The mean of the whole memory continues nothing.
        self.coherence = 0.0 if model.config.retrieval.mode == "weighted_sum" else coherence

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
        """Settings and networks: all that another process needs."""
        return {**self.__dict__, "model": (copy.deepcopy(self.model).cpu(), str(self.device))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, device = state.pop("model")
        check_device(device)
        self.__dict__.update(state)
        self.model = model.to(device)

    def with_options(self, *, seed: int | None = None, keep_candidates: bool | None = None) -> Inpainter:
        """One that shares the networks of this one, with another *seed* or another choice of `keep_candidates`."""
        other = object.__new__(Inpainter)
        other.__dict__.update(self.__dict__)
        other.seed = self.seed if seed is None else seed
        other.keep_candidates = self.keep_candidates if keep_candidates is None else keep_candidates
        return other

    def inpaint(self, image: Picture, mask: Picture, *, image_id: str = "") -> np.ndarray | Image.Image | Tensor:
        """The filled image alone: an array for an array, a tensor for a tensor, else a Pillow image. Arguments and
        errors as in a call."""
        return self(image, mask, image_id=image_id).output

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

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
        *mask*: the same, of the same size, 1 = hole; see `hole_mask` for its types. *filled*: a precomputed coarse
        result for this image and mask, which replaces the coarse network's (Table V).
        *image_id* and `seed` key the choice of the memory, so the same call gives the same result anywhere.

        Sides are padded to `size_multiple` (reflected, repeated at the edge where a side is too short) and cropped
        back; the memory is chosen from the image, or the part of it, as it came. A mask without hole gives the input
        back. A hole of more than half the image that also covers more than half of its border warns that the mask may
        be inverted.

        Raises `UnusableInput` (a `ValueError`) naming the image: a mask or result of another size, nothing but hole,
        an array that is no image. Raises `UnreadableImage` for a file that is none.
        """
        prepared = self.prepare(image, mask, image_id=image_id, filled=filled)
        self.compute([prepared])
        return self.finish(prepared)

    def batch(
        self,
        images: Sequence[Picture],
        masks: Sequence[Picture],
        *,
        image_ids: Sequence[str] | None = None,
        filled: Sequence[Picture] | None = None,
    ) -> list[InpaintResult | UnusableInput | UnreadableImage]:
        """Fill images of any sizes, those of one size together (`pixels_at_once`); arguments as in a call, one for
        each image. An image that cannot be filled has its error in place of a result, and the others theirs."""
        number = len(images)
        for name, given in {"masks": masks, "image_ids": image_ids, "filled": filled}.items():
            if given is not None and len(given) != number:
                raise ValueError(f"{name} must be as many as images ({number}), got {len(given)}")
        found: list[Prepared | UnusableInput | UnreadableImage] = []
        for place, (image, mask) in enumerate(zip(images, masks, strict=True)):
            image_id = image_ids[place] if image_ids is not None else ""
            try:
                coarse = filled[place] if filled is not None else None
                found.append(self.prepare(image, mask, image_id=image_id, filled=coarse))
            except (UnusableInput, UnreadableImage) as error:
                found.append(error)
        self.compute([one for one in found if isinstance(one, Prepared)])
        return [self.finish(one) if isinstance(one, Prepared) else one for one in found]

    # A call in three steps, for those who feed a GPU: the first and the last may run in any thread, beside the second.

    def prepare(self, image: Picture, mask: Picture, *, image_id: str = "", filled: Picture | None = None) -> Prepared:
        """All that comes before the networks; arguments and errors as in a call."""
        original = as_pillow(opened(image), "image", image_id)
        size = (original.height, original.width)
        hole, notes = hole_mask(opened(mask), image_id=image_id)
        _check_size("mask", hole.shape, size, image_id)
        coarse = None
        if filled is not None:
            coarse = as_pillow(opened(filled), "filled", image_id)
            _check_size("filled", (coarse.height, coarse.width), size, image_id)
        if not hole.any():
            return Prepared(image, original, hole, notes, [])
        wider = dilate(hole, self.feather)
        if wider.all():
            message = "the mask leaves nothing but hole: no texture to fill it from"
            raise UnusableInput("all-hole", named(image_id) + message)
        notes += polarity_notes(hole, image_id)
        if original.mode == "F":  # whose values mean what the whole picture's range says
            readable: Image.Image = Image.fromarray(to_rgb(original))
        else:
            readable = original
        parts = [self._part(readable, wider, coarse, box, image_id) for box in self._boxes(wider)]
        return Prepared(image, original, hole, notes, parts)

    @torch.inference_mode()
    def compute(self, pictures: Sequence[Prepared]) -> None:
        """Take prepared pictures through the networks; on a GPU it returns before they are through."""
        groups: dict[Any, list[_Part]] = {}
        for number, part in enumerate(part for picture in pictures for part in picture.parts):
            # Those beyond the limit are worked on in tiles, each by itself.
            part.pieces.clear()
            key = number if part.shown is None else (part.size, part.given is None, part.shown.halvings)
            groups.setdefault(key, []).append(part)
        for group in groups.values():
            for some in self._bounded(group, group[0].pixels):
                self._fill(some)
        if self.device.type == "cuda":
            through = torch.cuda.Event()
            through.record(torch.cuda.current_stream(self.device))
            for picture in pictures:
                picture.through = through

    def finish(self, picture: Prepared) -> InpaintResult:
        """The result of a picture that was computed, once the device has made it."""
        if picture.through is not None:
            picture.through.synchronize()
        original, parts = picture.original, picture.parts
        fills = (fill for part in parts for fill in part.fills(picture.hole, self.feather))
        output = paste(original, fills) if parts else original.copy()
        none = _none_found(self.model.config)
        found = [part.found for part in parts if part.found is not None] or [none]
        return InpaintResult(
            output=like(picture.image, output),
            coarse=self._coarse(original, parts),
            candidates=np.concatenate([one.candidates for one in found]),
            cells_yx=np.concatenate([none.memory_yx, *(part.cells_yx + part.corner for part in parts)]),
            candidates_yx=np.concatenate([one.candidates_yx for one in found]),
            memory=np.concatenate([one.memory for one in found]),
            memory_yx=np.concatenate([one.memory_yx for one in found]),
            hole_fraction=float(picture.hole.mean()),
            notes=picture.notes,
        )

    def _boxes(self, hole: np.ndarray) -> list[Box]:
        if self.policy == "crop":
            return group_holes(hole, multiple=self.model.config.size_multiple, context=self.context)
        return [Box(0, 0, *hole.shape)]

    def _part(self, image: Image.Image, hole: np.ndarray, coarse: Image.Image | None, box: Box, image_id: str) -> _Part:
        """One part of the picture; *hole* is that of the whole picture."""
        whole, multiple = (box.height, box.width) == hole.shape, self.model.config.size_multiple
        hole, k = hole[box.slices], self.model.config.patch_size
        # Parts of one picture draw their memories independently.
        key = (image_id,) if whole else (image_id, box.top, box.left)
        part = _Part(
            picture=image,
            given=coarse,
            box=box,
            hole=hole,
            area=_around(hole, k),
            rows=_pad(np.arange(box.height), multiple),
            columns=_pad(np.arange(box.width), multiple),
            pool_yx=self._pool(hole, key).astype(np.int64),
            # Not those whose only hole pixels are padding, which would be cropped away again.
            cells_yx=np.argwhere(block_any(hole, k)) * k,
        )
        if self.policy == "original" or max(box.height, box.width) <= self.limit:
            given = None if coarse is None else _pad(part.read(part.whole, coarse), multiple)
            mask = _pad(hole, multiple)
            part.shown = _Shown(_pad(part.read(part.whole), multiple), mask, given, halvings(mask))
        return part

    def _bounded(self, items: list[_Item], pixels: int) -> Iterator[list[_Item]]:
        """*items* of this many *pixels* each, as many at a time as go through the networks together."""
        at_once = max(1, self.pixels_at_once // pixels)
        for start in range(0, len(items), at_once):
            yield items[start : start + at_once]

    def _fill(self, parts: list[_Part]) -> None:
        """Fill parts of one padded size, or a single large one."""
        source: _OnDevice | _OnHost
        shown = [part.shown for part in parts if part.shown is not None]
        most = max(len(part.pool_yx) for part in parts)
        pool = np.stack([part.pool_yx[_filled_up(np.arange(len(part.pool_yx)), most)] for part in parts])
        if not shown:
            (part,) = parts
            source = _OnHost(part, self._coarse_of_large(part), self.device)
            windows = [self._window(source, top, left) for top, left in part.pool_yx.tolist()]
            memory = torch.cat(windows, dim=1)
        else:
            source = _OnDevice(self._coarse_of(shown))
            memory = self.model.read_memory(source.coarse, _sent(pool, self.device))
        index, weights, joined = self._retrieve(source, parts, pool, memory)
        self._synthesize(source, parts, memory, index, weights, joined)
        if self.keep_candidates:
            for number, part in enumerate(parts):
                part.coarse = source.pixels(number, part.area)
                part.found = self._found(part, index[number], memory[number])

    def _coarse_of(self, parts: list[_Shown]) -> Tensor:
        """I^_s (B, 3, H, W) of parts of one size."""
        image = _to_tensor(np.stack([part.image for part in parts]), self.device)
        mask = _sent(np.stack([part.mask for part in parts])[:, None], self.device).float()
        given = [part.given for part in parts if part.given is not None]
        if given:
            return compose(_to_tensor(np.stack(given), self.device), image, mask)
        holes = np.bitwise_or.reduce([part.mask for part in parts])
        return self._predict(image, mask, _around(holes, self.model.config.patch_size), parts[0].halvings)

    def _coarse_of_large(self, part: _Part) -> np.ndarray:
        """I^_s of the area of a part that the coarse network sees reduced, (h, w, 3), uint8."""
        coarse = self._reduced(part) if part.given is None else part.read(part.area, part.given)
        np.copyto(coarse, part.read(part.area), where=part.hole[part.area][..., None] == 0)
        return coarse

    def _predict(self, image: Tensor, mask: Tensor, part: Part, number: int) -> Tensor:
        """I^_s of *image*, whose holes lie in *part*, from *number* halvings."""
        coarse, multiple = image.clone(), self.model.config.size_multiple
        result = predict(self.model.predict_coarse, image, mask, part, number=number, multiple=multiple)
        coarse[..., *part] = compose(result, image[..., *part], mask[..., *part])
        return coarse

    def _retrieve(
        self, source: _OnDevice | _OnHost, parts: list[_Part], pool: np.ndarray, memory: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The candidates (B, N, C) of all cells, as numbers of memory windows, S (B, N, P), and which of them continue
        those of neighbours. A part with fewer cells than another has its first one again."""
        most = max(len(part.cells_yx) for part in parts)
        corners = np.stack([part.cells_yx[_filled_up(np.arange(len(part.cells_yx)), most)] for part in parts])
        index, weights, scores = [], [], []
        step = max(1, self.cells_per_chunk // len(parts))
        for start in range(0, most, step):
            queries = source.windows(corners[:, start : start + step], self.model.config.patch_size)
            found = self.model.retrieval(queries, self.model.patches(memory), memory[..., :1, :1, :1])
            index.append(found.index)
            weights.append(found.weights)
            scores.append(found.scores)
        if not self.coherence:
            return torch.cat(index, dim=1), torch.cat(weights, dim=1), None
        of = self.model.config
        chosen = choose(
            torch.cat(scores, dim=1),
            corners,
            pool,
            patch_size=of.patch_size,
            num_candidates=of.retrieval.num_candidates,
            bonus=self.coherence,
        )
        return chosen, torch.cat(weights, dim=1), continued(chosen, corners, pool, of.patch_size)

    def _synthesize(
        self,
        source: _OnDevice | _OnHost,
        parts: list[_Part],
        memory: Tensor,
        index: Tensor,
        weights: Tensor,
        joined: Tensor | None,
    ) -> None:
        """Texture for the hole cells, a square of `cells_per_chunk` of them at a time, those of one size together.

        *memory* as `TMAD.read_memory`, *index*, *weights* and *joined* as `_retrieve`. PSNet sees so much around each
        square that the result does not depend on where squares end. What it makes goes into the parts' `pieces`.
        """
        by_size: dict[tuple[int, ...], list[_Square]] = {}
        for number, part in enumerate(parts):
            for square in self._squares(number, part):
                by_size.setdefault(square.seen_size, []).append(square)
        for (height, width), squares in by_size.items():
            for some in self._bounded(squares, height * width):
                self._synthesize_squares(some, source, parts, memory, index, weights, joined)

    def _squares(self, number: int, part: _Part) -> Iterator[_Square]:
        k = self.model.config.patch_size
        side = max(1, math.isqrt(self.cells_per_chunk)) * k
        margin = -(-(self.model.psnet.reach + self.model.config.overlap) // k) * k
        # Pictures that go together need not have their holes in one place, but PSNet has to see as much of each.
        grain = k if self.pixels_at_once == 1 else _GRAIN * k
        steps = (range(one.start, one.stop, side) for one in part.area)
        for corner in itertools.product(*steps):
            top, left = (
                slice(start, min(start + side, one.stop)) for start, one in zip(corner, part.area, strict=True)
            )
            target = top, left
            if part.hole[target].any():
                rows, columns = (
                    _stretched(one, margin, grain, length) for one, length in zip(target, part.size, strict=True)
                )
                inside = (part.cells_yx >= (rows.start, columns.start)) & (part.cells_yx < (rows.stop, columns.stop))
                yield _Square(number, target, (rows, columns), np.flatnonzero(inside.all(axis=1)))

    def _synthesize_squares(
        self,
        squares: list[_Square],
        source: _OnDevice | _OnHost,
        parts: list[_Part],
        memory: Tensor,
        index: Tensor,
        weights: Tensor,
        joined: Tensor | None,
    ) -> None:
        """Squares around which PSNet sees as much of each, together; other arguments as above."""
        k, device = self.model.config.patch_size, self.device
        numbers = [square.number for square in squares]
        most = max(len(square.cells) for square in squares)
        cells = np.stack([_filled_up(square.cells, most) for square in squares])
        places = np.stack(
            [
                (parts[square.number].cells_yx[some] - [one.start for one in square.seen]) // k
                for square, some in zip(squares, cells, strict=True)
            ]
        )
        rows, columns = places[..., 0], places[..., 1]
        area = tuple(slice(int(one.min()) * k, int(one.max() + 1) * k) for one in (rows, columns))
        inner = _union([within(square.target, square.seen) for square in squares])
        seen = source.parts([(square.number, square.seen) for square in squares])
        mask = _sent(np.stack([parts[square.number].mask(square.seen) for square in squares])[:, None], device).float()
        local = _sent(rows * (seen.shape[-1] // k) + columns, device)
        whose, which = _sent(np.array(numbers)[:, None], device), _sent(cells, device)
        held = memory if numbers == list(range(len(parts))) else memory[whose[:, 0]]
        made = self.model.synthesize(
            seen,
            mask,
            # Without a name, so that they go when they have been laid out.
            self.model.retrieval.hand_out(weights[whose, which], held, index[whose, which]),
            local,
            inner,
            area,  # type: ignore[arg-type]
            None if joined is None else joined[whose, which],
        )
        pixels = to_uint8(made).permute(0, 2, 3, 1).to("cpu", non_blocking=True)
        for square, piece in zip(squares, pixels, strict=True):
            wanted = within(square.target, square.seen)
            parts[square.number].pieces.append((square.target, piece[within(wanted, inner)]))

    def _found(self, part: _Part, index: Tensor, memory: Tensor) -> _Found:
        pool = to_uint8(self.model.patches(memory[: len(part.pool_yx)])).permute(0, 2, 3, 1).cpu().numpy()
        places, chosen = part.pool_yx + part.corner, index[: len(part.cells_yx)].cpu().numpy()
        return _Found(pool[chosen], places[chosen], pool, places)

    def _reduced(self, part: _Part) -> np.ndarray:
        """The coarse result of a part reduced to `limit` pixels, its area (h, w, 3) at the part's own size, uint8."""
        config = self.model.config
        height, width = part.hole.shape
        factor = max(height, width) / self.limit
        size = max(1, round(height / factor)), max(1, round(width / factor))
        # Every pixel of the reduced picture that a hole pixel has a share in: the filter reaches one pixel further.
        found = block_any(part.hole, factor)[: size[0], : size[1]]
        small_hole = np.zeros(size, np.uint8)
        small_hole[: found.shape[0], : found.shape[1]] = found
        small_hole = dilate(small_hole, 1)
        # Rows and columns are scaled one after the other, as they are in one step: no copy of the whole picture.
        strips = [scale(part.read(rows), (rows[0].stop - rows[0].start, size[1]), "bilinear") for rows in part.strips()]
        small = scale(np.concatenate(strips), size, "bilinear")
        image = _to_tensor(_pad(small, config.size_multiple)[None], self.device)
        mask = _sent(_pad(small_hole, config.size_multiple)[None, None], self.device).float()
        around, number = _around(small_hole, config.size_multiple), halvings(small_hole)
        coarse = _to_array(self._predict(image, mask, around, number))[: size[0], : size[1]]
        rows, columns = part.area
        coarse = scale(coarse, (size[0], width))[:, columns]
        large = np.empty((*part.hole[part.area].shape, 3), np.uint8)
        for left in range(0, large.shape[1], _STRIP):
            some = coarse[:, left : left + _STRIP]
            large[:, left : left + _STRIP] = scale(some, (height, some.shape[1]))[rows]
        return large

    def _window(self, source: _OnHost, top: int, left: int) -> Tensor:
        """What `TMAD.read_memory` reads at one corner, from as much of a large part as it depends on."""
        config = self.model.config
        reach = config.overlap + config.patch_size // 2
        first_y, first_x = max(0, top - reach), max(0, left - reach)
        last = config.patch_size + reach
        pixels = source.parts([(0, (slice(first_y, top + last), slice(first_x, left + last)))])
        return self.model.read_memory(pixels, torch.tensor([[[top - first_y, left - first_x]]], device=self.device))

    def _pool(self, hole: np.ndarray, key: tuple[int | str, ...]) -> np.ndarray:
        """Corners of the memory, inside the image as it came; a side shorter than k borrows from its padding. Where
        windows are to continue each other, those of a grid of half of k around the hole, and others if they are few."""
        config = self.model.config
        if max(hole.shape) > np.iinfo(np.int16).max:
            raise UnusableInput("too-long", f"sides up to {np.iinfo(np.int16).max} pixels can be filled at once")
        if min(hole.shape) < config.patch_size:
            height, width = (max(side, config.patch_size) for side in hole.shape)
            hole = _pad(hole, config.size_multiple)[:height, :width]
        rng = numpy_generator(self.seed, "pool", *key)
        near = np.zeros((0, 2), np.int16)
        if self.coherence:
            stride = max(1, config.patch_size // 2)
            top, left = rng.integers(np.minimum(stride, np.array(hole.shape) - config.patch_size + 1))
            near = nearest_windows(hole[top:, left:], patch_size=config.patch_size, stride=stride, most=MEMORY)
            near += np.array([top, left], np.int16)
        if len(near) >= config.memory.pool_size:
            return near
        drawn = select_pool(
            hole,
            patch_size=config.patch_size,
            stride=config.memory_stride,
            pool_size=config.memory.pool_size,
            rule=config.memory.rule,
            rng=rng,
        )
        return np.concatenate([near, drawn])

    def _coarse(self, original: Image.Image, parts: Sequence[_Part]) -> np.ndarray:
        if not self.keep_candidates:
            return np.zeros((0, 0, 3), np.uint8)
        coarse = to_rgb(original)
        for part in parts:
            inside = part.hole[part.area] > 0
            filled = part.as_grey_as_known(part.coarse[: inside.shape[0], : inside.shape[1]])
            coarse[part.box.slices][part.area][inside] = filled[inside]
        return coarse


@dataclass(frozen=True)
class _Found:
    """What retrieval found, as in `InpaintResult`."""

    candidates: np.ndarray
    candidates_yx: np.ndarray
    memory: np.ndarray
    memory_yx: np.ndarray


@dataclass(frozen=True)
class _Shown:
    """What the networks are shown of a part at once: pixels (H, W, 3) and hole (H, W), uint8, with padding."""

    image: np.ndarray
    mask: np.ndarray
    given: np.ndarray | None
    """The precomputed coarse result."""
    halvings: int
    """`structure.halvings`."""


@dataclass
class _Part:
    """A part of a picture and what was made of it. Places are rows and columns of the part, pixels (h, w, 3), uint8."""

    picture: Image.Image
    """The whole one."""
    given: Image.Image | None
    """A precomputed coarse result of it."""
    box: Box
    hole: np.ndarray
    """(H, W) uint8, 1 = hole."""
    area: Part
    """Around all hole cells, which may reach beyond the part."""
    rows: np.ndarray
    """Those that the part shows with its padding."""
    columns: np.ndarray
    """The same."""
    pool_yx: np.ndarray
    """(P, 2) int64."""
    cells_yx: np.ndarray
    """(N, 2) int64."""
    shown: _Shown | None = None
    """None where the part is too large for the networks."""
    pieces: list[tuple[Part, Tensor]] = field(default_factory=list)
    """Places, and what PSNet made for them, uint8."""
    coarse: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.uint8))
    """I^_s of the area."""
    found: _Found | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width with padding."""
        return len(self.rows), len(self.columns)

    @property
    def pixels(self) -> int:
        """That the networks work on."""
        return len(self.rows) * len(self.columns)

    @property
    def whole(self) -> Part:
        """All of it, without padding."""
        return slice(0, self.box.height), slice(0, self.box.width)

    @property
    def corner(self) -> np.ndarray:
        """In the picture."""
        return np.array([self.box.top, self.box.left])

    def in_picture(self, place: Part) -> Box:
        """*place*, as far as the part reaches, in the picture."""
        (top, left, bottom, right), (rows, columns) = self.box, place
        return Box(
            top + rows.start, left + columns.start, min(top + rows.stop, bottom), min(left + columns.stop, right)
        )

    def read(self, place: Part, of: Image.Image | None = None) -> np.ndarray:
        """The colours of *place*, as far as the part reaches, in its picture or in another one."""
        picture, box = of or self.picture, self.in_picture(place)
        return to_rgb(picture if box == (0, 0, picture.height, picture.width) else picture.crop(box.corners))

    def mask(self, place: Part) -> np.ndarray:
        """The hole in *place*, (h, w), uint8; there is none in the padding."""
        mask = np.zeros([one.stop - one.start for one in place], np.uint8)
        hole = self.hole[place]
        mask[: hole.shape[0], : hole.shape[1]] = hole
        return mask

    def strips(self) -> Iterator[Part]:
        """Places, one below the other, that make up the part."""
        for top in range(0, self.box.height, _STRIP):
            yield slice(top, min(top + _STRIP, self.box.height)), slice(0, self.box.width)

    def fills(self, hole: np.ndarray, feather: int) -> Iterator[Fill]:
        """What is to be pasted into the picture, whose *hole* (H, W) fades over *feather* pixels."""
        for place, piece in self.pieces:
            box = self.in_picture(place)
            around = grown(box.slices, feather, *hole.shape)
            shown = fade(hole[around], feather)[within(box.slices, around)]
            yield (box.top, box.left), self.as_grey_as_known(piece.numpy()[: box.height, : box.width]), shown

    def as_grey_as_known(self, pixels: np.ndarray) -> np.ndarray:
        """*pixels* without colour if the part has none outside the hole: the networks tint what they fill."""
        return to_rgb(Image.fromarray(pixels).convert("L")) if self._is_grey else pixels

    @cached_property
    def _is_grey(self) -> bool:
        for rows in self.strips():
            red, green, blue = np.moveaxis(self.read(rows), -1, 0)
            if (((red != green) | (red != blue)) & (self.hole[rows] == 0)).any():
                return False
        return True


@dataclass
class Prepared:
    """A picture on its way through an `Inpainter`."""

    image: Picture
    original: Image.Image
    hole: np.ndarray
    notes: tuple[str, ...]
    parts: list[_Part]
    through: torch.cuda.Event | None = None
    """When the device will have computed it."""


@dataclass(frozen=True)
class _Square:
    """Cells of a part that PSNet makes at once."""

    number: int
    """Of the part."""
    target: Part
    seen: Part
    """With what PSNet sees around it."""
    cells: np.ndarray
    """Numbers of the part's cells in what is seen."""

    @property
    def seen_size(self) -> tuple[int, ...]:
        """Height and width."""
        return tuple(one.stop - one.start for one in self.seen)


class _OnDevice:
    """Coarse results (B, 3, H, W) where the networks are."""

    def __init__(self, coarse: Tensor) -> None:
        self.coarse = coarse

    def windows(self, corners: np.ndarray, size: int) -> Tensor:
        """(B, N, 3, size, size) at *corners* (B, N, 2)."""
        return cut(self.coarse, _sent(corners, self.coarse.device), size)

    def parts(self, wanted: list[tuple[int, Part]]) -> Tensor:
        """Places of one size of the pictures with these numbers."""
        return torch.stack([self.coarse[number][..., *place] for number, place in wanted])

    def pixels(self, number: int, place: Part) -> np.ndarray:
        """(h, w, 3) uint8."""
        return _to_array(self.coarse[number : number + 1][..., *place])


class _OnHost:
    """The coarse result of one part that is too large for the device, read from the picture but for the hole's area."""

    def __init__(self, part: _Part, coarse: np.ndarray, device: torch.device) -> None:
        self._part, self._coarse, self._device = part, coarse, device

    def windows(self, corners: np.ndarray, size: int) -> Tensor:
        """(1, N, 3, size, size) at *corners* (1, N, 2)."""
        places = [(0, (slice(y, y + size), slice(x, x + size))) for y, x in corners[0]]
        return self.parts(places)[None]

    def parts(self, wanted: list[tuple[int, Part]]) -> Tensor:
        """Places of one size."""
        return _to_tensor(np.stack([self._read(place) for _, place in wanted]), self._device)

    def pixels(self, number: int, place: Part) -> np.ndarray:
        """That of the area."""
        return self._coarse

    def _read(self, place: Part) -> np.ndarray:
        part = self._part
        rows, columns = part.rows[place[0]], part.columns[place[1]]
        held = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        pixels = part.read(held)
        starts = [max(a.start, b.start) for a, b in zip(held, part.area, strict=True)]
        stops = [min(a.stop, b.stop) for a, b in zip(held, part.area, strict=True)]
        if starts[0] < stops[0] and starts[1] < stops[1]:
            both = slice(starts[0], stops[0]), slice(starts[1], stops[1])
            pixels[within(both, held)] = self._coarse[within(both, part.area)]
        return pixels[np.ix_(rows - held[0].start, columns - held[1].start)]


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
    # Other places are known to packages that say so under this entry point, which `pipeline` does.
    for finder in entry_points(group="tmad.models"):
        found: Path = finder.load()(str(model), tracking_uri=tracking_uri)
        return found
    return Path(model)


def _check_size(what: str, size: tuple[int, ...], wanted: tuple[int, int], image_id: str) -> None:
    if tuple(size) != wanted:
        raise UnusableInput(
            "size-mismatch",
            f"{named(image_id)}{what} is {size[0]}x{size[1]} (height x width), "
            f"the image is {wanted[0]}x{wanted[1]}; they must have the same size",
        )


def _pad(array: np.ndarray, multiple: int) -> np.ndarray:
    """Grow the first two axes, or the only one, to a multiple, at their ends: reflected, repeated where a side is too
    short."""
    for axis in range(min(2, array.ndim)):
        side = array.shape[axis]
        if extra := -side % multiple:
            widths = [(0, extra if index == axis else 0) for index in range(array.ndim)]
            array = np.pad(array, widths, mode="reflect" if extra < side else "edge")
    return array


def _around(hole: np.ndarray, multiple: int) -> Part:
    """The rows and columns that hold all of *hole*, to multiples of *multiple*."""
    rows, columns = (np.flatnonzero(hole.any(axis=axis)) // multiple * multiple for axis in (1, 0))
    return slice(rows[0], rows[-1] + multiple), slice(columns[0], columns[-1] + multiple)


def _stretched(one: slice, margin: int, grain: int, length: int) -> slice:
    """*one* with *margin* pixels on both sides as far as a side of *length* pixels goes, to multiples of *grain*."""
    start, stop = max(0, one.start - margin), min(length, one.stop + margin)
    size = min(length, -(-(stop - start) // grain) * grain)
    start = min(start, length - size)
    return slice(start, start + size)


def _union(parts: Sequence[Part]) -> Part:
    """The smallest part that holds all of *parts*."""
    rows, columns = (
        slice(min(one.start for one in some), max(one.stop for one in some)) for some in zip(*parts, strict=True)
    )
    return rows, columns


def _filled_up(numbers: np.ndarray, length: int) -> np.ndarray:
    """*numbers* and then the first of them, *length* in all."""
    return np.concatenate([numbers, np.repeat(numbers[:1], length - len(numbers))])


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """*array* on *device*; the process does not wait for it to be there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _to_tensor(rgb: np.ndarray, device: torch.device) -> Tensor:
    """Pixels (B, H, W, 3) as the networks take them."""
    return to_model(_sent(rgb, device).permute(0, 3, 1, 2))


def _to_array(image: Tensor) -> np.ndarray:
    return to_uint8(image[0]).permute(1, 2, 0).cpu().numpy()


def _none_found(config: TMADConfig) -> _Found:
    count, k = config.retrieval.num_candidates, config.patch_size
    return _Found(
        candidates=np.zeros((0, count, k, k, 3), np.uint8),
        candidates_yx=np.zeros((0, count, 2), np.int64),
        memory=np.zeros((0, k, k, 3), np.uint8),
        memory_yx=np.zeros((0, 2), np.int64),
    )
