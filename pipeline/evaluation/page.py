"""The evaluation for readers: what its page shows, and the same tables as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.evaluation.compare import CHANGE_METRIC, Comparison
from pipeline.evaluation.pictures import Shown
from pipeline.report.page import Cell, Table, decimals, interval, measure_cells, metrics_table
from pipeline.report.pictures import Picture, Row
from tmad.metrics import METRICS

GROUPS = {
    "hole": ("By share of hole", "share of hole"),
    "family": ("By kind of hole", "kind of hole"),
    "label": ("By category", "category"),
}
GROUP_METRICS = ("psnr_hole", "l1_hole_pct", "ssim_full")
"""Of the tables of groups, as far as they were measured; report.json has all."""


def sections(
    summary: Mapping[str, Any], shown: Sequence[Shown], comparison: Comparison | None = None
) -> dict[str, Any]:
    """What `evaluation_sections.html` shows of report.json's content and of pictures."""
    return {
        **tables(summary),
        "shown": {why: [one for one in shown if one.choice.why == why] for why in ("spread", "worst", "best")},
        "against": summary.get("against"),
        "changed": [] if comparison is None else _changed(summary, shown, comparison),
        "views": [one for one in shown if one.retrieval],
        "series": [one for one in shown if one.series],
    }


def tables(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `evaluation.md` shows: facts, and the tables of metrics, of groups and of differences."""
    methods = {name: entry for name, entry in summary["methods"].items() if not entry["not_measured"]}
    reasons = {name: entry["not_measured"] for name, entry in summary["metrics"].items() if "not_measured" in entry}
    return {
        "metrics": metrics_table(
            {entry["title"]: entry["metrics"] for entry in methods.values()},
            not_measured=reasons,
            note=f"Means over the images, the best of each metric in bold. With them the {summary['confidence']:.0%} "
            f"bootstrap interval of the mean ({summary['resamples']} draws of photographs, with all their crops and "
            "masks); metrics of a whole set have none.",
        ),
        "facts": facts(summary),
        "groups": list(group_tables(summary)),
        "differences": difference_table(summary["against"], methods) if "against" in summary else None,
    }


def facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, for people."""
    found = {
        "images": f"{summary['images']} of {summary['data']} (digest {summary['data_digest']})",
        "masks": f"{summary['mask']}, mean hole {summary['mean_hole_fraction'] or 0:.1%}",
    }
    if summary["model"] is not None:
        found = {"model": f"{summary['model']} (digest {summary['model_digest']})", **found}
    for option, network in summary["networks"].items():
        found[f"network of {option}"] = f"{network['network']} (SHA-256 {network['sha256']})"
    capped = [
        f"{entry['title']}, {name}: {value['at_cap']}"
        for entry in summary["methods"].values()
        for name, value in entry["metrics"].items()
        if "at_cap" in value
    ]
    if capped:
        found["images at the cap"] = "; ".join(capped)
    if summary["failed"]:
        found["left out"] = json.dumps(summary["failed"])
    for entry in summary["methods"].values():
        if entry["not_measured"]:
            found[entry["title"]] = f"not measured: {entry['not_measured']}"
    return found


def group_tables(summary: Mapping[str, Any]) -> Iterator[Table]:
    """Of each kind of groups: a row a group and metric, a column a method."""
    titles = [entry["title"] for entry in summary["methods"].values() if not entry["not_measured"]]
    for kind, groups in summary["groups"].items():
        heading, first = GROUPS[kind]
        rows = [
            [name, group["images"], metric, *measure_cells(metric, [one[metric] for one in entries])]
            for name, group in groups.items()
            for entries in [list(group["methods"].values())]
            for metric in GROUP_METRICS
            if metric in entries[0]
        ]
        yield Table([first, "images", "metric", *titles], rows, heading)


def difference_table(against: Mapping[str, Any], methods: Mapping[str, Any]) -> Table:
    """A row a metric, a column a method; bold where the interval leaves out 0."""
    differences = against["differences"]

    def cell(name: str, entry: Mapping[str, Any]) -> Cell | None:
        if entry["mean"] is None:
            return None
        digits = decimals(name)
        sure = entry["low"] is not None and (entry["low"] > 0 or entry["high"] < 0)
        text = f"{entry['mean']:+.{digits}f}"
        return Cell(text, interval(entry, digits, sign="+"), "best" if sure else "number")

    rows = []
    for name in next(iter(differences.values())):
        arrow = METRICS[name].direction[:1].replace("l", "")
        rows.append([f"{name} {arrow}", *(cell(name, one[name]) for one in differences.values())])
    header = ["metric, better", *(methods[name]["title"] for name in differences)]
    return Table(header, rows, f"Against {against['report']} (this one minus the other)")


def _changed(summary: Mapping[str, Any], shown: Sequence[Shown], comparison: Comparison) -> list[tuple[Row, Any]]:
    """Row and zoom of the images that changed most; those with both results first."""
    found: list[tuple[Row, Any]] = []
    mine = summary["methods"][comparison.method]["title"]
    changed = [one for one in shown if one.choice.why == "changed"]
    for one, (_, other) in zip(changed, comparison.changed, strict=True):
        pictures: dict[str, Picture] = {"input": one.pictures["input"], f"{mine}, this one": one.pictures[mine]}
        if other is not None:
            pictures[f"{mine}, the other"] = other
        pictures["truth"] = one.pictures["truth"]
        caption = f"{one.choice.image_id}: {one.choice.value or 0:+.2f} dB {CHANGE_METRIC}"
        found.append(((caption, pictures), one.zoom))
    return sorted(found, key=lambda row: -len(row[0][1]))
