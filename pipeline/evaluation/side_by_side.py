"""The same holes as several models fill them, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.evaluation.evaluate import Evaluated
from pipeline.evaluation.methods import TITLES
from pipeline.report.pictures import Row


def side_by_side(results: Mapping[str, Evaluated]) -> list[Row]:
    """Rows of a report: input, the result of each evaluation by its label, truth, of the images that all show."""
    rows: list[Row] = []
    for same in zip(*map(spread_pictures, results.values()), strict=False):
        caption, first = same[0]
        filled = {label: cells["result"] for label, (_, cells) in zip(results, same, strict=True)}
        rows.append((caption, {"input": first["input"], **filled, "truth": first["truth"]}))
    return rows


def spread_pictures(result: Evaluated) -> list[Row]:
    """Caption, and input, result and truth, of the images that are spread over the set."""
    columns = {"input": "input", "result": TITLES["tmad"], "truth": "truth"}
    return [
        (
            f"{one.choice.image_id}, hole {one.hole_fraction:.0%}",
            {name: one.pictures[column] for name, column in columns.items()},
        )
        for one in result.shown
        if one.choice.why == "spread"
    ]
