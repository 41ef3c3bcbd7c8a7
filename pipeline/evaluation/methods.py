"""The rows of the table, and how each of them fills a hole."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.data.schema import Manifest, Record
from pipeline.evaluation.baselines import FILLS, why_not
from pipeline.evaluation.config import EvaluateConfig, behind
from pipeline.evaluation.external import Results, result_name
from tmad.inpaint import Inpainter, InpaintResult, UnusableInput
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
    others = [Row(name, name) for name, _ in config.folders]
    for name, _ in config.donors:
        others += [Row(name, name), Row(behind(name), f"{name} + PSNet")]
    learned = [row for row in own if row.name not in FILLS]
    return (*learned, *others, *(row for row in own if row.name in FILLS))


@dataclass(frozen=True)
class Filled:
    """One image and mask, filled by every method."""

    truth: np.ndarray
    """(H, W, 3) uint8."""
    mask: np.ndarray
    """(H, W) uint8, 1 = hole."""
    outputs: dict[str, np.ndarray]
    """(H, W, 3) uint8 by method; valid pixels are the truth's."""
    seconds: dict[str, float]
    """By method; the coarse result is a by-product of T-MAD's and has no time of its own."""
    result: InpaintResult | None
    """T-MAD's, with the candidates that were retrieved."""
    retrieval: dict[str, dict[str, float]]
    """`retrieval_measures` of the methods that retrieve."""


class Filler:
    """Fills a hole by every method that can be run. What each of them gets has a black hole."""

    def __init__(
        self,
        rows: Sequence[Row],
        inpainter: Inpainter | None,
        externals: Mapping[str, Results],
        donors: Sequence[str],
        manifest: Manifest,
        seed: int,
    ) -> None:
        self._names = [row.name for row in rows if row.not_measured is None]
        self._inpainter, self._externals, self._donors = inpainter, externals, donors
        self._untrained = untrained(inpainter) if inpainter is not None else None
        self._manifest, self._seed = manifest, seed

    def __call__(self, record: Record, variant: int) -> Filled:
        """Raises `UnusableInput` for a mask of nothing but hole, `UnfitResults` for a result of another size."""
        truth, mask = record.pixels(), record.mask(variant)
        if mask.all():
            raise UnusableInput("all-hole", f"{record.image_id}: the mask leaves nothing but hole")
        return self.fill(truth, mask, image_id=record.image_id, variant=variant)

    def fill(
        self, truth: np.ndarray, mask: np.ndarray, *, image_id: str, variant: int, only: Sequence[str] | None = None
    ) -> Filled:
        """The same for any mask; *only* these methods (default: all)."""
        hole = mask[..., None] > 0
        given = np.where(hole, np.uint8(0), truth)
        outputs: dict[str, np.ndarray] = {}
        seconds: dict[str, float] = {}
        names = [name for name in self._names if only is None or name in only]
        result = None
        retrieval: dict[str, dict[str, float]] = {}
        if self._inpainter is not None and {"tmad", "coarse", "blended"} & set(names):
            began = time.monotonic()
            result = self._inpainter(given, mask, image_id=image_id)
            seconds["tmad"] = time.monotonic() - began
            outputs |= {"tmad": np.asarray(result.output), "coarse": result.coarse}
            retrieval["tmad"] = retrieval_measures(result, truth)
            if self._untrained is not None and "blended" in names:
                blended = self._untrained(given, mask, image_id=image_id, filled=result.coarse)
                outputs["blended"] = np.asarray(blended.output)
                retrieval["blended"] = retrieval_measures(blended, truth)
        for name, results in self._externals.items():
            if only is not None:
                continue
            pixels = results.read(result_name(image_id, variant, manifest=self._manifest), truth.shape)
            outputs[name] = np.where(hole, pixels, truth)
            if name in self._donors:
                assert self._inpainter is not None, "coarse_from needs a model"
                began = time.monotonic()
                refined = self._inpainter(given, mask, image_id=image_id, filled=outputs[name])
                seconds[behind(name)] = time.monotonic() - began
                outputs[behind(name)] = np.asarray(refined.output)
        for name in names:
            if name in FILLS:
                rng = numpy_generator(self._seed, name, image_id, variant)
                began = time.monotonic()
                outputs[name] = FILLS[name](given, mask, rng) if mask.any() else given
                seconds[name] = time.monotonic() - began
        shown = {name: outputs[name] for name in names if name in outputs}
        return Filled(truth, mask, shown, seconds, result, retrieval)


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


def retrieval_measures(result: InpaintResult, truth: np.ndarray) -> dict[str, float]:
    """`retrieval_top_l1`, `retrieval_best_l1` and `retrieval_distinct` of `tmad.metrics` for one image; nothing where
    no cell lies wholly in it."""
    side = result.candidates.shape[2]
    whole = (result.cells_yx + side <= truth.shape[:2]).all(axis=1)
    if not whole.any():
        return {}
    cells = np.stack([truth[y : y + side, x : x + side] for y, x in result.cells_yx[whole]]).astype(np.float32)
    first = np.abs(result.candidates[whole, 0] - cells).mean()
    memory = result.memory.astype(np.float32)
    best = np.mean([np.abs(memory - cell).mean(axis=(1, 2, 3)).min() for cell in cells])
    places = np.unique(result.candidates_yx[:, 0], axis=0)
    possible = min(len(result.cells_yx), len(memory))
    return {
        "retrieval_top_l1": float(first),
        "retrieval_best_l1": float(best),
        "retrieval_distinct": min(1.0, len(places) / possible),
    }
