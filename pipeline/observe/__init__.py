"""What Prometheus sees of a job: gauges and counters at the metrics endpoint of the Ray node that a process runs on.

Nothing is to be declared: a metric `group/name` of the stream that goes to MLflow becomes the gauge `ray_tmad_<group>`
with the tags `run` and `name`, `rate/images_per_s` for instance `ray_tmad_rate{name="images_per_s"}`. Things that
happen are counted in `ray_tmad_events_total`. Outside Ray nothing is exported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

UNGROUPED = "training"
"""Group of metrics without one, `bad_steps` say."""


def export(run: str, values: Mapping[str, float]) -> None:
    """Show the newest *values* of *run*. Never waits."""
    if not _in_ray():
        return
    for name, value in values.items():
        group, _, rest = name.rpartition("/")
        _gauge(re.sub(r"\W", "_", group or UNGROUPED)).set(float(value), {"run": run, "name": rest})


def count(event: str, amount: int = 1) -> None:
    """*event* has happened *amount* times: `storage_repeat`, `first_worker_start`."""
    if amount > 0 and _in_ray():
        _counter().inc(amount, {"event": event})


def _in_ray() -> bool:
    # Storage counts too, and must not import Ray for it.
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


@cache
def _gauge(group: str) -> Any:
    from ray.util.metrics import Gauge

    return Gauge(f"tmad_{group}", f"{group} of a run, as in MLflow", tag_keys=("run", "name"))


@cache
def _counter() -> Any:
    from ray.util.metrics import Counter

    return Counter("tmad_events", "what has happened in the jobs' processes", tag_keys=("event",))
