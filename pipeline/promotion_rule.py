"""The rule of a promotion: which measures have to gain how much, and whether two evaluations say so.

Differences are paired image by image. The interval of their mean comes from a seeded bootstrap that draws photographs,
with all their crops, and the rule is asked at its unfavourable end.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import NotPromoted
from pipeline.evaluation.evaluate import Evaluated
from tmad.metrics import MEASURES
from tmad.rng import numpy_generator


@dataclass(frozen=True)
class Requirement:
    """What one measure asks of the candidate."""

    measure: str
    margin: float
    must_gain: bool

    @property
    def bound(self) -> float:
        """The gain has to be above it (or, where it need not gain, no lower)."""
        return self.margin if self.must_gain else -self.margin

    def met(self, gain: float) -> bool:
        """Whether *gain*, or the low end of its interval, suffices."""
        return gain > self.bound if self.must_gain else gain >= self.bound

    def __str__(self) -> str:
        if self.must_gain:
            return "better" + (f" by more than {self.margin:g}" if self.margin else "")
        return "not worse" + (f" by more than {self.margin:g}" if self.margin else "")


@dataclass(frozen=True)
class Comparison:
    """One measure of both versions."""

    requirement: Requirement
    candidate: float | None
    champion: float | None
    gain: float | None
    """Mean over the images that both have a value for, positive where the candidate is better."""
    low: float | None
    high: float | None
    """Interval of the gain; none for a measure of a whole set, which has no value for each image."""
    images: int
    met: bool


def parse_requirement(word: str, *, must_gain: bool) -> Requirement:
    """Read `measure` or `measure=margin`. Raises `ValueError` for a name that is no measure, with near ones, and for a
    margin that is no number of 0 or more."""
    name, _, text = word.partition("=")
    if name not in MEASURES:
        near = difflib.get_close_matches(name, MEASURES, n=3) or list(MEASURES)
        raise ValueError(f"no measure is called {name!r}; did you mean {', '.join(near)}?")
    try:
        margin = float(text or 0)
    except ValueError:
        raise ValueError(f"{word!r}: a margin is a number, as in {name}=0.1") from None
    if not 0 <= margin < float("inf"):
        raise ValueError(f"{word!r}: a margin is 0 or more")
    return Requirement(name, margin, must_gain)


def bootstrap(
    gains: Mapping[str, float], *, resamples: int, confidence: float, seed: int
) -> tuple[float, float, float]:
    """Mean of *gains* by image, and the ends of its percentile interval.

    Images of one photograph (`photo.jpg#2`) are drawn together: they are not independent.
    """
    groups: dict[str, list[float]] = {}
    for image_id, gain in sorted(gains.items()):
        groups.setdefault(image_id.rpartition("#")[0] or image_id, []).append(gain)
    sums = np.array([sum(group) for group in groups.values()])
    counts = np.array([len(group) for group in groups.values()])
    drawn = numpy_generator(seed, "promote").integers(len(groups), size=(resamples, len(groups)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def compare(
    candidate: Evaluated,
    champion: Evaluated,
    rule: Sequence[Requirement],
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> list[Comparison]:
    """Every measure of the rule. Raises `NotPromoted` if they were not measured on the same images."""
    found = []
    for requirement in rule:
        name = requirement.measure
        sign = 1 if MEASURES[name].better == "higher" else -1
        values = [one.means["tmad"].get(name) for one in (candidate, champion)]
        ours, theirs = (_by_image(one, name) for one in (candidate, champion))
        if ours.keys() != theirs.keys():
            raise NotPromoted("the two versions were measured on different images; was the set changed meanwhile?")
        gains = {
            key: sign * (value - theirs[key])  # type: ignore[operator]
            for key, value in ours.items()
            if value is not None and theirs[key] is not None
        }
        gain = low = high = None
        if gains:
            gain, low, high = bootstrap(gains, resamples=resamples, confidence=confidence, seed=seed)
        elif values[0] is not None and values[1] is not None:
            gain = sign * (values[0] - values[1])
        # A value that the candidate alone lacks is no small sample, it is a fault.
        lacks = any(value is None and theirs[key] is not None for key, value in ours.items())
        worst = low if low is not None else gain
        met = worst is not None and bool(np.isfinite(worst)) and not lacks and requirement.met(worst)
        found.append(Comparison(requirement, values[0], values[1], gain, low, high, len(gains), met))
    return found


def shortfall(one: Comparison) -> str:
    """Why a measure stands against the candidate."""
    name, requirement = one.requirement.measure, one.requirement
    if one.gain is None:
        return f"{name} has no value on this set"
    interval = f", interval {one.low:+.4g} to {one.high:+.4g}" if one.low is not None else ""
    return f"{name} has to be {requirement}, its gain is {one.gain:+.4g}{interval} over {one.images} images"


def _by_image(result: Evaluated, measure: str) -> dict[str, float | None]:
    return {row["image_id"]: row.get(measure) for row in result.evaluation.rows if row["method"] == "tmad"}
