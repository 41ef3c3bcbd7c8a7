"""The rows of the table, and how each of them fills a hole."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.schema import Manifest, Record
from pipeline.evaluation.baselines import FILLS, why_not
from pipeline.evaluation.config import EvaluateConfig, behind
from pipeline.evaluation.external import Results, result_name
from tmad.inpaint import Inpainter, InpaintResult, UnusableInput
from tmad.rng import numpy_generator

TITLES: Mapping[str, str] = {
    "tmad": "T-MAD",
    "coarse": "coarse result of T-MAD",
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
        """The same for any mask; *only* these methods (none = all)."""
        hole = mask[..., None] > 0
        given = np.where(hole, np.uint8(0), truth)
        outputs: dict[str, np.ndarray] = {}
        seconds: dict[str, float] = {}
        names = [name for name in self._names if only is None or name in only]
        result = None
        if self._inpainter is not None and {"tmad", "coarse"} & set(names):
            began = time.monotonic()
            result = self._inpainter(given, mask, image_id=image_id)
            seconds["tmad"] = time.monotonic() - began
            outputs |= {"tmad": np.asarray(result.output), "coarse": result.coarse}
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
        return Filled(truth, mask, {name: outputs[name] for name in names if name in outputs}, seconds, result)
