"""The promotion rule: required gains, checked on two evaluations.

Differences and their intervals are those of the evaluation of one version against the other
(`pipeline.evaluation.compare`); the rule is asked at the interval's unfavourable end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from pipeline.errors import NotPromoted
from pipeline.evaluation.config import check_metric
from pipeline.evaluation.evaluate import Evaluated
from tmad.metrics import METRICS


@dataclass(frozen=True)
class Requirement:
    """What one metric asks of the candidate."""

    metric: str
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
    """One metric of both versions."""

    requirement: Requirement
    candidate: float | None
    champion: float | None
    gain: float | None
    """Mean over the images that both have a value for, positive where the candidate is better."""
    low: float | None
    high: float | None
    """Interval of the gain; none for a metric of a whole set, which has no value for each image."""
    images: int
    met: bool

    def values(self) -> dict[str, object]:
        """For the table and for comparison.json."""
        values = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {"metric": self.requirement.metric, "rule": str(self.requirement), **values}


def parse_requirement(word: str, *, must_gain: bool) -> Requirement:
    """Read `metric` or `metric=margin`. Raises `ValueError` for a name that is no metric, with near ones, and for a
    margin that is no number of 0 or more."""
    name, _, text = word.partition("=")
    check_metric(name)
    try:
        margin = float(text or 0)
    except ValueError:
        raise ValueError(f"{word!r}: a margin is a number, as in {name}=0.1") from None
    if not 0 <= margin < float("inf"):
        raise ValueError(f"{word!r}: a margin is 0 or more")
    return Requirement(name, margin, must_gain)


def compare(candidate: Evaluated, champion: Evaluated, rule: Sequence[Requirement]) -> list[Comparison]:
    """Every metric of the rule; *candidate* was evaluated against *champion*. Raises `NotPromoted` if they were not
    measured on the same images."""
    against = candidate.summary["against"]
    if not candidate.summary["images"] == champion.summary["images"] == against["images"]:
        raise NotPromoted("the two versions were measured on different images; was the set changed meanwhile?")
    found = []
    for requirement in rule:
        name = requirement.metric
        sign = 1 if METRICS[name].better == "higher" else -1
        values = [one.means["tmad"].get(name) for one in (candidate, champion)]
        entry = against["differences"]["tmad"].get(name, {"mean": None, "low": None, "high": None, "images": 0})
        gain = None if entry["mean"] is None else sign * entry["mean"]
        ends = [] if entry["low"] is None else sorted(sign * entry[end] for end in ("low", "high"))
        # A value that the candidate alone lacks is no small sample, it is a fault.
        known = champion.summary["methods"]["tmad"]["metrics"].get(name, {"images": 0})["images"]
        worst = ends[0] if ends else gain
        met = worst is not None and bool(np.isfinite(worst)) and entry["images"] >= known and requirement.met(worst)
        low, high = ends or (None, None)
        found.append(Comparison(requirement, values[0], values[1], gain, low, high, entry["images"], met))
    return found


def shortfall(one: Comparison) -> str:
    """Why a metric stands against the candidate."""
    name, requirement = one.requirement.metric, one.requirement
    if one.gain is None:
        return f"{name} has no value on this set"
    interval = f", interval {one.low:+.4g} to {one.high:+.4g}" if one.low is not None else ""
    return f"{name} has to be {requirement}, its gain is {one.gain:+.4g}{interval} over {one.images} images"
