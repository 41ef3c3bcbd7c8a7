"""The same holes as several models fill them, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.evaluate import Evaluation
from pipeline.report import Picture


def side_by_side(results: Mapping[str, Evaluation]) -> list[tuple[str, dict[str, Picture]]]:
    """Rows of a report: input, the result of each evaluation by its label, truth, of the images that all show."""
    evaluations = list(results.values())
    rows: list[tuple[str, dict[str, Picture]]] = []
    for shown in zip(*(one.pictures for one in evaluations), strict=False):
        caption, first = shown[0]
        filled = {label: cells["result"] for label, (_, cells) in zip(results, shown, strict=True)}
        rows.append((caption, {"input": first["input"], **filled, "truth": first["truth"]}))
    return rows
