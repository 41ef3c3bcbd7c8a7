"""The rows of the table, and how each of them fills a hole."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.data.schema import Manifest
from pipeline.evaluation.baselines import FILLS, why_not
from pipeline.evaluation.config import EvaluateConfig, behind
from pipeline.evaluation.external import Results, result_name
from tmad.inpaint import Inpainter, InpaintResult
from tmad.model import TMAD
from tmad.retrieval import untrained_retrieval
from tmad.rng import numpy_generator

TITLES: Mapping[str, str] = {
    "tmad": "T-MAD",
    "coarse": "coarse result of T-MAD",
    "blended": "blended detail, untrained",
    "patchmatch": "PatchMatch",
    "telea": "Telea (OpenCV)",
    "navier_stokes": "Navier-Stokes (OpenCV)",
    "biharmonic": "biharmonic (scikit-image)",
}


@dataclass(frozen=True)
class Row:
    """A method of the table."""

    name: str
    title: str
    not_measured: str | None = None
    """Why it has no figures."""


def table_rows(config: EvaluateConfig) -> tuple[Row, ...]:
    """The methods of the table in its order: T-MAD's, other methods and PSNet behind them, classical fills."""
    own = [Row(name, TITLES[name], why_not(name)) for name in config.methods]
    others = [Row(name, name) for name, _ in config.external_folders]
    for name, _ in config.coarse_folders:
        others += [Row(name, name), Row(behind(name), f"{name} + PSNet")]
    learned = [row for row in own if row.name not in FILLS]
    return (*learned, *others, *(row for row in own if row.name in FILLS))


@dataclass
class Filled:
    """One image and mask, and what the methods make of it."""

    truth: np.ndarray
    """(H, W, 3) uint8."""
    mask: np.ndarray
    """(H, W) uint8, 1 = hole; not all of it."""
    image_id: str
    variant: int
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    """(H, W, 3) uint8 by method; valid pixels are the truth's."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By method; the coarse result is a by-product of T-MAD's and has no time of its own."""
    result: InpaintResult | None = None
    """T-MAD's, with the candidates that were retrieved."""
    retrieval: dict[str, dict[str, float]] = field(default_factory=dict)
    """`retrieval_metrics` of the methods that retrieve."""

    def in_hole(self, pixels: np.ndarray | np.uint8) -> np.ndarray:
        """The truth with *pixels* in the hole."""
        return np.where(self.mask[..., None] > 0, pixels, self.truth)


class Filler:
    """Fills holes by every method that can be run. What each of them gets has a black hole."""

    def __init__(
        self,
        rows: Sequence[Row],
        inpainter: Inpainter | None,
        externals: Mapping[str, Results],
        coarse: Sequence[str],
        manifest: Manifest,
        seed: int,
    ) -> None:
        self._names = [row.name for row in rows if row.not_measured is None]
        self._inpainter, self._externals, self._coarse = inpainter, externals, coarse
        self._manifest, self._seed = manifest, seed
        self._networks: dict[str, Inpainter] = {}
        if inpainter is not None:
            self._networks = {
                "blended": untrained(inpainter),
                **dict.fromkeys(("tmad", *map(behind, coarse)), inpainter),
            }

    def fill(
        self, truth: np.ndarray, mask: np.ndarray, *, image_id: str, variant: int, only: Sequence[str] = ()
    ) -> Filled:
        """One image, by all methods or by those of *only* that need no results from elsewhere."""
        one = Filled(truth, mask, image_id, variant)
        self.fill_all([one], only)
        return one

    def fill_all(self, items: Sequence[Filled], only: Sequence[str] = ()) -> None:
        """The same for several images, which the networks see together. Raises `UnfitResults` for a result of another
        size."""
        names = [name for name in self._names if not only or (name in only and name not in self._externals)]
        own = {"tmad", "coarse", "blended"} & {*names} - self._externals.keys()
        if own:
            results = self._complete("tmad", items)
            for one, result in zip(items, results, strict=True):
                one.result, one.outputs["coarse"] = result, result.coarse
                one.retrieval["tmad"] = retrieval_metrics(result, one.truth)
        if "blended" in own:
            for one, result in zip(items, self._complete("blended", items, "coarse"), strict=True):
                one.retrieval["blended"] = retrieval_metrics(result, one.truth)
                del one.seconds["blended"]  # it is there for its figures, not for its speed
        for name in names:
            if name in self._externals:
                for one in items:
                    stem = result_name(one.image_id, one.variant, manifest=self._manifest)
                    one.outputs[name] = one.in_hole(self._externals[name].read(stem, one.truth.shape))
                if name in self._coarse:
                    self._complete(behind(name), items, name)
            elif name in FILLS:
                for one in items:
                    rng = numpy_generator(self._seed, name, one.image_id, one.variant)
                    given, began = one.in_hole(np.uint8(0)), time.monotonic()
                    one.outputs[name] = FILLS[name](given, one.mask, rng) if one.mask.any() else given
                    one.seconds[name] = time.monotonic() - began
        for one in items:
            one.outputs = {name: one.outputs[name] for name in names}

    def _complete(self, name: str, items: Sequence[Filled], coarse: str = "") -> list[InpaintResult]:
        """Fill by the network of the row *name*, behind the outputs of the method *coarse* where one is named."""
        began = time.monotonic()
        results = self._networks[name].batch(
            [one.in_hole(np.uint8(0)) for one in items],
            [one.mask for one in items],
            image_ids=[one.image_id for one in items],
            filled=[one.outputs[coarse] for one in items] if coarse else None,
        )
        seconds = (time.monotonic() - began) / max(1, len(items))
        found = []
        for one, result in zip(items, results, strict=True):
            if not isinstance(result, InpaintResult):
                raise result
            one.outputs[name], one.seconds[name] = np.asarray(result.output), seconds
            found.append(result)
        return found


def untrained(inpainter: Inpainter) -> Inpainter:
    """The same coarse network with an untrained retrieval and PSNet behind it: the coarse result and the blended detail
    of its best candidate, which a trained model has to beat."""
    config = inpainter.model.config
    config = replace(
        config,
        retrieval=replace(config.retrieval, mode="sample"),
        psnet=replace(config.psnet, residual="detail", base_width=1, num_res_blocks=1, num_texture_res_blocks=1),
        coarse=replace(config.coarse, base_width=2, num_res_blocks=1),
    )
    model = TMAD(config)
    model.retrieval = untrained_retrieval(config.retrieval)
    model.to(inpainter.device)
    return Inpainter(model, policy=inpainter.policy, cells_per_chunk=inpainter.cells_per_chunk, seed=inpainter.seed)


def retrieval_metrics(result: InpaintResult, truth: np.ndarray) -> dict[str, float]:
    """`retrieval_top_l1`, `retrieval_best_l1` and `retrieval_distinct` of `tmad.metrics` for one image; nothing where
    no cell lies wholly in it."""
    side = result.candidates.shape[2]
    whole = (result.cells_yx + side <= truth.shape[:2]).all(axis=1)
    if not whole.any():
        return {}
    cells = np.stack([truth[y : y + side, x : x + side] for y, x in result.cells_yx[whole]]).astype(np.float32)
    memory = result.memory.astype(np.float32)
    places = np.unique(result.candidates_yx[:, 0], axis=0)
    return {
        "retrieval_top_l1": float(np.abs(result.candidates[whole, 0] - cells).mean()),
        "retrieval_best_l1": float(np.mean([np.abs(memory - cell).mean(axis=(1, 2, 3)).min() for cell in cells])),
        "retrieval_distinct": min(1.0, len(places) / min(len(result.cells_yx), len(memory))),
    }
