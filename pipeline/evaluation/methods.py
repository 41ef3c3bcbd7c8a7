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
    others = [Row(name, name) for name, _ in config.external_folders]
    for name, _ in config.coarse_folders:
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
    """`retrieval_metrics` of the methods that retrieve."""

    def add(
        self,
        outputs: Mapping[str, np.ndarray],
        seconds: Mapping[str, float] | None = None,
        retrieval: Mapping[str, dict[str, float]] | None = None,
    ) -> None:
        """What further methods made."""
        self.outputs.update(outputs)
        self.seconds.update(seconds or {})
        self.retrieval.update(retrieval or {})


class Filler:
    """Fills a hole by every method that can be run. What each of them gets has a black hole."""

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
        self._untrained = untrained(inpainter) if inpainter is not None else None
        self._manifest, self._seed = manifest, seed

    def __call__(self, record: Record, variant: int) -> Filled:
        """Raises `UnusableInput` for a mask of nothing but hole, `UnfitResults` for a result of another size."""
        return _or_raise(self.batch([(record, variant)])[0])

    def batch(self, items: Sequence[tuple[Record, int]]) -> list[Filled | UnusableInput]:
        """The same for several images and variants, which the networks see together; an error in place of what has
        one."""
        return self._fill([Given(one.pixels(), one.mask(variant), one.image_id, variant) for one, variant in items])

    def fill(
        self, truth: np.ndarray, mask: np.ndarray, *, image_id: str, variant: int, only: Sequence[str] | None = None
    ) -> Filled:
        """The same for any mask; *only* these methods (default: all)."""
        return _or_raise(self._fill([Given(truth, mask, image_id, variant)], only)[0])

    def _fill(self, items: Sequence[Given], only: Sequence[str] | None = None) -> list[Filled | UnusableInput]:
        names = [name for name in self._names if only is None or name in only]
        found: dict[int, Filled | UnusableInput] = {
            number: UnusableInput("all-hole", f"{one.image_id}: the mask leaves nothing but hole")
            for number, one in enumerate(items)
            if one.mask.all()
        }
        usable = [number for number in range(len(items)) if number not in found]
        filled = [Filled(items[number].truth, items[number].mask, {}, {}, None, {}) for number in usable]
        some = [items[number] for number in usable]
        learned = {"tmad", "coarse", "blended"} & set(names)
        if self._inpainter is not None and learned:
            results, seconds = _timed_batch(self._inpainter, some)
            coarse = [result.coarse for result in results]
            for place, result in enumerate(results):
                outputs = {"tmad": np.asarray(result.output), "coarse": result.coarse}
                filled[place] = replace(filled[place], result=result)
                filled[place].add(outputs, {"tmad": seconds}, {"tmad": retrieval_metrics(result, some[place].truth)})
            if self._untrained is not None and "blended" in names:
                for place, result in enumerate(_timed_batch(self._untrained, some, coarse)[0]):
                    measured = retrieval_metrics(result, some[place].truth)
                    filled[place].add({"blended": np.asarray(result.output)}, {}, {"blended": measured})
        for name, results_of in self._externals.items() if only is None else ():
            given = []
            for one in some:
                pixels = results_of.read(
                    result_name(one.image_id, one.variant, manifest=self._manifest), one.truth.shape
                )
                given.append(np.where(one.hole, pixels, one.truth))
            for place, pixels in enumerate(given):
                filled[place].add({name: pixels})
            if name in self._coarse:
                assert self._inpainter is not None, "coarse_from needs a model"
                refined, seconds = _timed_batch(self._inpainter, some, given)
                for place, result in enumerate(refined):
                    filled[place].add({behind(name): np.asarray(result.output)}, {behind(name): seconds})
        for name in names:
            if name in FILLS:
                for place, one in enumerate(some):
                    rng = numpy_generator(self._seed, name, one.image_id, one.variant)
                    began = time.monotonic()
                    output = FILLS[name](one.given, one.mask, rng) if one.mask.any() else one.given
                    filled[place].add({name: output}, {name: time.monotonic() - began})
        for number, done in zip(usable, filled, strict=True):
            shown = {name: done.outputs[name] for name in names if name in done.outputs}
            found[number] = replace(done, outputs=shown)
        return [found[number] for number in range(len(items))]


@dataclass(frozen=True)
class Given:
    """An image and a mask of it."""

    truth: np.ndarray
    mask: np.ndarray
    image_id: str
    variant: int

    @property
    def hole(self) -> np.ndarray:
        """(H, W, 1) bool."""
        return self.mask[..., None] > 0

    @property
    def given(self) -> np.ndarray:
        """What methods get: the hole is black."""
        return np.where(self.hole, np.uint8(0), self.truth)


def _or_raise(one: Filled | UnusableInput) -> Filled:
    if isinstance(one, UnusableInput):
        raise one
    return one


def _timed_batch(
    inpainter: Inpainter, items: Sequence[Given], filled: Sequence[np.ndarray] | None = None
) -> tuple[list[InpaintResult], float]:
    """Results, and seconds for each."""
    began = time.monotonic()
    found = inpainter.batch(
        [one.given for one in items],
        [one.mask for one in items],
        image_ids=[one.image_id for one in items],
        filled=filled,
    )
    results = []
    for one in found:
        if not isinstance(one, InpaintResult):
            raise one
        results.append(one)
    return results, (time.monotonic() - began) / max(1, len(items))


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
