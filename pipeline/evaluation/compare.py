"""Compares two evaluations of one set, image by image: mean differences with intervals, largest changes."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import MissingInput
from pipeline.evaluation.external import result_name
from pipeline.evaluation.measure import FORMAT, Evaluation, read_rows
from pipeline.evaluation.pictures import Choice
from pipeline.evaluation.summary import Intervals, photograph_weights, rows_of_images
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
    changed: list[Choice]
    """Images of the first method that changed most, for better or worse; `value` is the change in dB."""
    out: str
    """The other's folder."""
    method: str
    """The method whose images are shown."""

    def other_result(self, name: str) -> bytes | None:
        """The other's result of that name, if it was kept."""
        uri = join(self.out, "results", self.method, f"{name}.png")
        return read_bytes(uri) if exists(uri) else None


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


def compare(evaluation: Evaluation, place: str) -> Comparison:
    """Differences, this one minus the other, of the methods that both have; over the images that both have.

    Raises `ValueError` if the other one was made on another set, or shares no method or image with this one.
    """
    other = read_summary(place)
    mine = evaluation.summary
    if other["data_digest"] != mine["data_digest"]:
        raise ValueError(
            f"against {redact(place)}: it was made on the set {other['data_digest']}, this one on "
            f"{mine['data_digest']}; only results of the same images and holes can be compared"
        )
    methods = [name for name in _measured(mine) if name in _measured(other)]
    if not methods:
        raise ValueError(f"against {redact(place)}: it has none of the methods {', '.join(_measured(mine))}")
    metrics = [
        name for name in METRICS
        if all(name in summary["methods"][method]["metrics"] for summary in (mine, other) for method in methods)
    ]  # fmt: skip
    of_images = [name for name in metrics if METRICS[name].function or name == "lpips_full"]
    config = evaluation.job.config
    intervals = Intervals(len(methods) * len(of_images), config.resamples)
    changes: list[tuple[float, int, Choice]] = []
    for number, (here, there) in enumerate(_paired(evaluation.rows, read_rows(folder_of(place)))):
        values = np.full((len(methods), len(of_images)), np.nan)
        for row, method in enumerate(methods):
            for column, name in enumerate(of_images):
                if here[method][name] is not None and there[method].get(name) is not None:
                    values[row, column] = here[method][name] - there[method][name]
        facts = here[methods[0]]
        intervals.add(values.ravel(), photograph_weights(config.seed, facts["key"], config.resamples))
        if CHANGE_METRIC in of_images and np.isfinite(change := values[0, of_images.index(CHANGE_METRIC)]):
            one = Choice(facts["image_id"], facts["variant"], facts["part"], "changed", float(change))
            changes.append((-abs(one.value or 0.0), number, one))
            changes = heapq.nsmallest(2 * config.num_extremes, changes, key=lambda entry: entry[:2])
    if not intervals.images:
        raise ValueError(f"against {redact(place)}: no image stands in both evaluations")
    differences: dict[str, dict[str, Any]] = {}
    for row, method in enumerate(methods):
        entries = {
            name: intervals.entry(row * len(of_images) + column, config.confidence)
            for column, name in enumerate(of_images)
        }
        for name in metrics:
            if name not in entries:
                entries[name] = _set_difference(mine, other, method, name, intervals.images)
        differences[method] = {name: entries[name] for name in metrics}
    names = ("model", "model_digest", "data_digest")
    summary = {
        "report": redact(folder_of(place)),
        **{name: other[name] for name in names},
        "images": intervals.images,
        "differences": differences,
        "changed": [
            {"image_id": one.image_id, "variant": one.variant, CHANGE_METRIC: one.value} for _, _, one in changes
        ],
    }
    return Comparison(summary, [one for _, _, one in changes], folder_of(place), methods[0])


def name_of(choice: Choice, evaluation: Evaluation) -> str:
    """What the results of this image are called."""
    return result_name(choice.image_id, choice.variant, manifest=evaluation.job.manifest)


def folder_of(place: str) -> str:
    """The folder of an evaluation, given that folder or the report.json in it."""
    return absolute(place).removesuffix(f"/{REPORT}")


def _measured(summary: Mapping[str, Any]) -> list[str]:
    return [name for name, entry in summary["methods"].items() if entry["not_measured"] is None]


def _set_difference(
    mine: Mapping[str, Any], other: Mapping[str, Any], method: str, name: str, common: int
) -> dict[str, Any]:
    """Of a metric of a whole set: none unless both were made of the same images, as many as are *common*."""
    ends = [summary["methods"][method]["metrics"][name]["mean"] for summary in (mine, other)]
    known = None not in ends and common == mine["images"] == other["images"]
    return {"mean": ends[0] - ends[1] if known else None, "low": None, "high": None, "images": common}


def _paired(
    mine: Iterator[dict[str, Any]], theirs: Iterator[dict[str, Any]]
) -> Iterator[tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]]:
    """Rows by method of the images and masks that both have. Both come in the order of the set; what one of them has
    before the next common image is held meanwhile."""
    waiting: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    others = iter(rows_of_images(theirs))
    for rows in rows_of_images(mine):
        key = (rows[0]["image_id"], rows[0]["variant"])
        while key not in waiting and (found := next(others, None)) is not None:
            waiting[found[0]["image_id"], found[0]["variant"]] = {row["method"]: dict(row) for row in found}
        if key in waiting:
            yield {row["method"]: dict(row) for row in rows}, waiting.pop(key)
