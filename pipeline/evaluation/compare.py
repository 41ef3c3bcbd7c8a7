"""Compares two evaluations of one set, image by image: mean differences with intervals, largest changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import MissingInput
from pipeline.evaluation.external import result_name
from pipeline.evaluation.measure import FORMAT, read_rows
from pipeline.evaluation.parts import Job
from pipeline.evaluation.pictures import Choice
from pipeline.evaluation.summary import bootstrap, rows_of, values_of
from pipeline.storage import absolute, exists, join, read_bytes, redact
from tmad.metrics import METRICS

REPORT = "report.json"
CHANGE_METRIC = "psnr_hole"
"""Ranks the images that changed most."""


@dataclass(frozen=True)
class Comparison:
    """This evaluation against another one."""

    summary: dict[str, Any]
    """The content of `against` in report.json."""
    method: str
    """The first one that both have; its images are shown."""
    changed: list[tuple[Choice, bytes | None]]
    """Images that changed most, for better or worse, `value` being the change in dB; and the other's result, if it was
    kept."""


def read_summary(place: str) -> dict[str, Any]:
    """The report.json of the evaluation in *place*, a folder or that file. Raises `MissingInput` if there is none, and
    `ValueError` if it is something else."""
    folder = folder_of(place)
    try:
        summary: dict[str, Any] = json.loads(read_bytes(join(folder, REPORT)))
    except MissingInput:
        raise MissingInput(
            f"no evaluation in {redact(folder)}: there is no {REPORT}; make one with jobs/evaluate.py"
        ) from None
    except ValueError as error:
        raise ValueError(f"{redact(folder)}/{REPORT} is no report of an evaluation: {error}") from error
    if summary.get("format") != FORMAT:
        raise ValueError(f"{redact(folder)}/{REPORT} has format {summary.get('format')}, this code reads {FORMAT}")
    return summary


def compare(job: Job, mine: Mapping[str, Any], rows: pa.Table, place: str) -> Comparison:
    """Differences of *mine*, the content of report.json, and its *rows* to the evaluation in *place*: of the methods
    that both have, over the images that both have.

    Raises `ValueError` if the other one was made on another set, or shares no method or image with this one.
    """
    other = read_summary(place)
    if other["data_digest"] != mine["data_digest"]:
        raise ValueError(
            f"against {redact(place)}: it was made on the set {other['data_digest']}, this one on "
            f"{mine['data_digest']}; only results of the same images and holes can be compared"
        )
    measured = [
        [name for name, entry in summary["methods"].items() if entry["not_measured"] is None]
        for summary in (mine, other)
    ]
    methods = [name for name in measured[0] if name in measured[1]]
    if not methods:
        raise ValueError(f"against {redact(place)}: it has none of the methods {', '.join(measured[0])}")
    metrics = [
        name for name in METRICS
        if all(name in summary["methods"][method]["metrics"] for summary in (mine, other) for method in methods)
    ]  # fmt: skip
    of_images = [name for name in metrics if METRICS[name].function or name == "lpips_full"]
    config, folder = job.config, folder_of(place)
    others = read_rows(folder)
    theirs = {key: number for number, key in enumerate(_images(others, methods[0]))}
    pairs = [(here, theirs[key]) for here, key in enumerate(_images(rows, methods[0])) if key in theirs]
    if not pairs:
        raise ValueError(f"against {redact(place)}: no image stands in both evaluations")
    here, there = map(list, zip(*pairs, strict=True))
    values = values_of(rows, methods, of_images)[here] - values_of(others, methods, of_images)[there]
    images = rows_of(rows, methods[0]).select(["image_id", "variant", "part", "key"]).take(here).to_pylist()
    entries = bootstrap(values, [one["key"] for one in images], methods, of_images, config)

    def set_difference(method: str, name: str) -> dict[str, Any]:
        """None unless both were made of the same images."""
        ends = [summary["methods"][method]["metrics"][name]["mean"] for summary in (mine, other)]
        known = None not in ends and len(images) == mine["images"] == other["images"]
        return {"mean": ends[0] - ends[1] if known else None, "low": None, "high": None, "images": len(images)}

    changed: list[tuple[Choice, bytes | None]] = []
    if CHANGE_METRIC in of_images:
        change = values[:, 0, of_images.index(CHANGE_METRIC)]
        order = np.argsort(-np.abs(change), kind="stable")[: 2 * config.num_extremes]
        for one, value in ((images[place], float(change[place])) for place in order if np.isfinite(change[place])):
            name = result_name(one["image_id"], one["variant"], manifest=job.manifest)
            uri = join(folder, "results", methods[0], f"{name}.png")
            choice = Choice(one["image_id"], one["variant"], one["part"], "changed", value)
            changed.append((choice, read_bytes(uri) if exists(uri) else None))
    summary = {
        "report": redact(folder),
        **{name: other[name] for name in ("model", "model_digest", "data_digest")},
        "images": len(images),
        "differences": {
            method: {name: entries[method].get(name) or set_difference(method, name) for name in metrics}
            for method in methods
        },
        "changed": [{"image_id": one.image_id, "variant": one.variant, CHANGE_METRIC: one.value} for one, _ in changed],
    }
    return Comparison(summary, methods[0], changed)


def folder_of(place: str) -> str:
    """The folder of an evaluation, given that folder or the report.json in it."""
    return absolute(place).removesuffix(f"/{REPORT}")


def _images(rows: pa.Table, method: str) -> list[tuple[str, int]]:
    of_method = rows_of(rows, method)
    return list(zip(of_method["image_id"].to_pylist(), of_method["variant"].to_pylist(), strict=True))
