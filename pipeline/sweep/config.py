"""Settings of a sweep."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.config import NAME, RunConfig
from pipeline.presets import PRESETS
from pipeline.sweep.space import make_space
from tmad.config import STRICT, PositiveInt
from tmad.metrics import METRICS

OBJECTIVES = ("psnr_hole", "l1_hole_pct", "ssim_full", "swd_hole_truthscaled")
"""What trials are compared by: metrics of the validation, of the joint phase. None of them is a weighted loss, which
would move with the weights."""

DISTORTION, TEXTURE = "psnr_hole", "swd_hole_truthscaled"
"""The two axes of the Pareto front."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepConfig:
    """One sweep."""

    name: str = "sweep"
    """Name of the sweep and of its folder below run.runs. The same command with the same name continues it."""
    space: tuple[str, ...] = ("weights",)
    """Groups and settings that are searched, with a range or choices where they are to differ from those of
    pipeline/sweep/space.py: `weights optim.lr=1e-5..1e-3 loss.relativistic=true,false`."""
    trials: PositiveInt = 16
    """Points of the space that are tried."""
    search: Literal["random", "optuna"] = "random"
    """`random`: seeded points, spread evenly; `optuna`: TPE, which learns from the trials so far ('tmad[sweep]')."""
    objectives: tuple[str, ...] = ("psnr_hole",)
    """Metrics of the validation that trials are compared by. The first one decides who is stopped and who wins; Optuna
    searches for the Pareto front of all of them."""
    stop_early: bool = True
    """Stop trials that lie behind the others at the same number of images (ASHA)."""
    first_rung_images: PositiveInt | None = None
    """No trial is stopped before this many images; default: those of the first validation."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """At each rung, one trial in this many continues; each rung lies this many times as far as the one before."""
    max_concurrent: PositiveInt | None = None
    """Trials side by side; default: as many as the cluster has room for."""
    init_from: str | None = None
    """Model, checkpoint or run whose coarse network all trials start from, without a coarse phase. Default: the coarse
    phase of `run` is run once, before the trials."""
    stop_on_failure: bool = True
    """End the sweep, with its error, when a trial has failed twice. Otherwise the others continue, and the error is
    reported at the end. Losses that are no longer finite are no failure: that trial has diverged."""
    num_pictures: PositiveInt = 4
    """Validation images that the summary shows of every trial."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the points."""
    run: RunConfig = RunConfig()
    """The run that every trial is, but for the settings of its point."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '.', '_' and '-', starting with one, got {self.name!r}")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"objectives must name one or more of {known}, each once, got {self.objectives!r}")
        for name in self.objectives:
            if name not in OBJECTIVES:
                near = difflib.get_close_matches(name, OBJECTIVES, n=2)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                loss = " (a weighted loss moves with its weights)" if name.startswith("loss") else ""
                raise ValueError(f"no objective is called {name!r}{loss}{hint} There are {', '.join(OBJECTIVES)}")
        if self.run.schedule.joint_images < self.run.schedule.batch_images:
            raise ValueError(
                f"run.schedule.joint_images is {self.run.schedule.joint_images}: trials are compared by the joint "
                "phase, which needs a batch at least"
            )
        if self.run.init_from is not None:
            # A preset's. Trials take the coarse network of one model, and train the rest.
            if self.init_from not in (None, self.run.init_from):
                raise ValueError(f"init_from is {self.init_from!r} and run.init_from {self.run.init_from!r}: give one")
            object.__setattr__(self, "init_from", self.run.init_from)
            object.__setattr__(self, "run", replace(self.run, init_from=None, init_networks="all"))
        if self.run.schedule.stop_after_validations is not None:
            raise ValueError("run.schedule.stop_after_validations would end trials at other lengths; leave it out")
        if self.run.workers.min_workers is not None:
            raise ValueError("run.workers.min_workers: trials share a cluster, and would grow into each other's place")
        make_space(self.space, self.run)


def direction(metric: str) -> Literal["max", "min"]:
    """Which way *metric* improves."""
    return "max" if METRICS[metric].better == "higher" else "min"


SWEEP_PRESETS = {
    name: (lambda make=make: SweepConfig(run=replace(make(), name=None))) for name, make in PRESETS.items()
}
"""The presets of training, as the `run` of a sweep."""
