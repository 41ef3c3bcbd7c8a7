"""The search space of a sweep: every setting with its range, and how a command line narrows it.

A range is log-uniform around the paper's value: a decade to either side for the weights of Table II. A setting that is
not listed here can be searched too, with a range or choices of its own (`schedule.patches_per_image=16,25,64`).
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import one_line
from pipeline.runs.settings import flatten
from tmad.config import from_dict
from tmad.rng import numpy_generator

Point = dict[str, Any]
"""Settings by their dotted names: `{"loss.weight_l1": 0.3}`."""


@dataclass(frozen=True)
class LogRange:
    """Values between *low* and *high*, both above 0, each decade as likely as the next."""

    low: float
    high: float
    whole: bool = False
    """Only whole numbers."""

    def ends(self) -> tuple[Any, ...]:
        """The extreme values."""
        return self.rounded(self.low), self.rounded(self.high)

    def at(self, share: float) -> Any:
        """The value at *share* of the way, in [0, 1]."""
        return self.rounded(self.low * (self.high / self.low) ** share)

    def rounded(self, value: float) -> Any:
        """Four significant digits are enough to tell weights apart and to read them."""
        return round(value) if self.whole else float(f"{value:.4g}")

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of *values*."""

    values: tuple[Any, ...]

    def ends(self) -> tuple[Any, ...]:
        """All of them."""
        return self.values

    def at(self, share: float) -> Any:
        """The value at *share* of the way, in [0, 1)."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def __str__(self) -> str:
        return ",".join(json.dumps(value) for value in self.values)


Domain = LogRange | Choice
Space = Mapping[str, Domain]


def _around(value: float, decades: float = 1.0) -> LogRange:
    """From *decades* below *value* to as many above it."""
    return LogRange(value / 10**decades, value * 10**decades)


DOMAINS: Space = {
    # Table II.
    "loss.weight_hole": _around(6.0),
    "loss.weight_valid": _around(1.0),
    "loss.weight_l1": _around(1.0),
    "loss.weight_gan_patch": _around(0.05),
    "loss.weight_perceptual": _around(0.02),
    "loss.weight_tv": _around(0.02),
    "loss.weight_gan_global": _around(0.02),
    # Sec. IV: Adam, 1e-4. The betas are those of the related code bases.
    "optim.lr": _around(1e-4, 0.5),
    "optim.lr_discriminators": _around(1e-4, 0.5),
    "optim.betas": Choice(((0.5, 0.999), (0.0, 0.9), (0.9, 0.999))),
    # Table IV, and Sec. III-B.
    "model.retrieval.num_candidates": Choice((1, 2, 4, 6)),
    "model.memory.pool_size": Choice((25, 50, 100, 200)),
}
"""The range of each setting that has one."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "weights": tuple(name for name in DOMAINS if name.startswith("loss.weight_")),
    "rates": ("optim.lr", "optim.lr_discriminators", "optim.betas"),
    "candidates": ("model.retrieval.num_candidates",),
    "memory": ("model.memory.pool_size",),
}
"""Names for several of them at once."""

WITHOUT_EFFECT = {
    "loss.weight_perceptual": lambda run: "perceptual.features is off" if run.perceptual.features == "off" else "",
    "model.retrieval.num_candidates": lambda run: (
        "model.retrieval.mode is weighted_sum" if run.model.retrieval.mode == "weighted_sum" else ""
    ),
    "schedule.coarse_images": lambda run: "the coarse phase is run once, before the trials",
}
"""Why a setting, searched, would change nothing; empty = it does."""


def make_space(words: Sequence[str], run: RunConfig) -> dict[str, Domain]:
    """The space that *words* name: groups (`weights`), settings (`optim.lr`), settings with a range
    (`optim.lr=1e-5..1e-3`) or with choices (`optim.betas=[0.5,0.999],[0,0.9]`). A setting without effect in *run* is
    left out of a group.

    Raises `ValueError` for a name that is not known (with near ones), a range upside down or without logarithm, a
    setting given twice, one without effect, a value that the settings refuse, and a space of one point.
    """
    space: dict[str, Domain] = {}
    known = flatten(asdict(run))
    for word in words:
        name, equals, text = word.partition("=")
        named = GROUPS.get(name, (name,))
        if equals and name in GROUPS:
            raise ValueError(f"space: {name} is a group of settings, a range belongs to one of {', '.join(named)}")
        for setting in named:
            if setting not in known:
                near = difflib.get_close_matches(setting, [*GROUPS, *DOMAINS, *known], n=3) or [*GROUPS, *DOMAINS]
                raise ValueError(f"space: there is no setting {setting!r}; did you mean {', '.join(near)}?")
            why_not = WITHOUT_EFFECT.get(setting, lambda _: "")(run)
            if why_not and name in GROUPS:
                continue
            if why_not:
                raise ValueError(f"space: {setting} has no effect, as {why_not}; leave it out or change that")
            if setting in space:
                raise ValueError(f"space: {setting} is named twice, as {space[setting]} and in {word!r}")
            if not equals and setting not in DOMAINS:
                raise ValueError(
                    f"space: {setting} has no range of its own; give one ({setting}=LOW..HIGH) or choices "
                    f"({setting}=A,B,C). Settings with a range: {', '.join(DOMAINS)}"
                )
            space[setting] = _parse(setting, text, known[setting]) if equals else DOMAINS[setting]
    if all(len(set(map(repr, domain.ends()))) == 1 for domain in space.values()):
        raise ValueError(
            f"space is empty: {'there is one point in it' if space else 'nothing is named'}; groups: "
            f"{', '.join(GROUPS)}; settings with a range: {', '.join(DOMAINS)}"
        )
    for setting, domain in space.items():
        for value in domain.ends():
            try:
                apply(run, {setting: value})
            except ValueError as error:
                raise ValueError(f"space: {setting} = {value!r} cannot be trained: {one_line(error)}") from None
    return space


def _parse(setting: str, text: str, default: Any) -> Domain:
    whole = isinstance(default, int) and not isinstance(default, bool)
    if ".." in text:
        low_text, _, high_text = text.partition("..")
        try:
            low, high = float(low_text), float(high_text)
        except ValueError:
            raise ValueError(f"space: {setting}={text}: a range is two numbers, as in {setting}=0.1..10") from None
        if not 0 < low < high or not math.isfinite(high):
            raise ValueError(
                f"space: {setting}={text}: a range goes from a number above 0 to a larger one; to have 0 among the "
                f"values, list them ({setting}=0,0.1,1)"
            )
        return LogRange(low, high, whole)
    try:
        values = json.loads(f"[{text}]")
    except json.JSONDecodeError:
        words = {"True": True, "False": False, "None": None}
        values = [words.get(part.strip(), part.strip()) for part in text.split(",")]
    values = [tuple(value) if isinstance(value, list) else value for value in values]
    if not values or "" in values:
        raise ValueError(f"space: {setting}={text}: choices are values with commas between them")
    if twice := [value for index, value in enumerate(values) if value in values[:index]]:
        raise ValueError(f"space: {setting}={text}: {twice[0]!r} stands there twice")
    return Choice(tuple(values))


def sample(space: Space, count: int, seed: int) -> list[Point]:
    """*count* points drawn from *space*, the same for the same *seed*; more points begin with the same ones.

    Each axis is divided evenly among the points of a stretch of eight (a Latin hypercube), as a few random points
    would leave large gaps.
    """
    points: list[Point] = []
    while len(points) < count:
        rng = numpy_generator(seed, "sweep", len(points))
        shares = {name: (rng.permutation(8) + rng.random(8)) / 8 for name in space}
        points += [{name: domain.at(shares[name][row]) for name, domain in space.items()} for row in range(8)]
    return points[:count]


def apply(run: RunConfig, point: Mapping[str, Any]) -> RunConfig:
    """*run* with the settings of *point*. Raises `ValueError` for values that do not go together."""
    values = json.loads(json.dumps(asdict(run)))
    for name, value in point.items():
        *groups, last = name.split(".")
        place = values
        for group in groups:
            place = place[group]
        place[last] = value
    return from_dict(RunConfig, values)
