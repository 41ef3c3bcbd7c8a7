"""The evaluation for readers: one HTML file, and the same tables as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.evaluation.compare import CHANGE_MEASURE, Comparison, name_of
from pipeline.evaluation.measure import Evaluation
from pipeline.evaluation.pictures import Shown
from pipeline.report import Figure, Picture, Report, digits_of, measure_texts
from tmad.metrics import MEASURES

GROUPS = {
    "hole": ("By share of hole", "share of hole"),
    "family": ("By kind of hole", "kind of hole"),
    "label": ("By category", "category"),
}
GROUP_MEASURES = ("psnr_hole", "l1_hole_pct", "ssim_full")
"""Of the tables of groups, as far as they were measured; report.json has all."""


def write_sections(
    report: Report, evaluation: Evaluation, shown: Sequence[Shown], comparison: Comparison | None = None
) -> None:
    """The evaluation as sections of *report*."""
    summary = evaluation.summary
    report.heading("Measures")
    report.measures(
        columns(summary),
        small=intervals(summary),
        not_measured=not_measured(summary),
        note=f"Means over the images; the best of each measure is bold. Small: {interval_note(summary)}",
    )
    left_out = {entry["title"]: entry["not_measured"] for entry in summary["methods"].values() if entry["not_measured"]}
    report.facts(facts(summary) | ({"not measured": _listed(left_out)} if left_out else {}))
    for heading, header, rows in group_tables(summary):
        report.heading(heading)
        report.table(header, rows)
    if comparison is not None:
        _write_comparison(report, evaluation, shown, comparison)
    for heading, why, text in (
        ("Pictures", "spread", "Evenly spread over the set. The hole is white in the input."),
        ("Worst", "worst", "The images with the lowest psnr_hole of the first method."),
        ("Best", "best", "The images with the highest psnr_hole of the first method."),
    ):
        chosen = [one for one in shown if one.choice.why == why]
        if chosen:
            report.heading(heading)
            report.text(text)
            report.pictures([(caption(one), dict(one.pictures)) for one in chosen], zooms=[one.zoom for one in chosen])
    if views := [one for one in shown if one.retrieval]:
        report.heading("What was retrieved")
        report.text(
            "For cells of the hole, the memory patches that retrieval chose, in rank order, and where in the picture "
            "they come from. PSNet makes the cell from them and the coarse result."
        )
        for one in views:
            report.text(caption(one))
            report.gallery([(name, text, list(pictures)) for name, text, pictures in one.retrieval])
    if series := [one for one in shown if one.series]:
        report.heading("Growing holes")
        report.text("The same picture with square holes from small to large.")
        for one in series:
            report.text(one.choice.image_id)
            report.pictures([(text, dict(pictures)) for text, pictures in one.series])


def _write_comparison(report: Report, evaluation: Evaluation, shown: Sequence[Shown], comparison: Comparison) -> None:
    summary = comparison.summary
    titles = _titles(evaluation.summary)
    report.heading("Against another evaluation")
    report.text(
        f"Differences, this one minus {summary['report']} (model {summary['model_digest']}), image by image over "
        f"{summary['images']} images. Bold: the interval leaves out 0."
    )
    report.table(*difference_table(summary, titles))
    changed = [one for one in shown if one.choice.why == "changed"]
    if not changed:
        return
    rows: list[tuple[str, dict[str, Picture]]] = []
    for one in changed:
        other = comparison.other_result(name_of(one.choice, evaluation))
        mine = titles[comparison.method]
        pictures: dict[str, Picture] = {"input": one.pictures["input"], f"{mine}, this one": one.pictures[mine]}
        if other is not None:
            pictures[f"{mine}, the other"] = other
        pictures["truth"] = one.pictures["truth"]
        rows.append((f"{one.choice.image_id}: {one.choice.value or 0:+.2f} dB {CHANGE_MEASURE}", pictures))
    report.text("The images that changed most" + (":" if all(len(row) == 4 for _, row in rows) else
        " (the other evaluation did not keep its results: --keep):"))  # fmt: skip
    report.pictures(sorted(rows, key=lambda row: -len(row[1])), zooms=[one.zoom for one in changed])


def markdown(summary: Mapping[str, Any], comparison: Comparison | None = None) -> str:
    """The tables as Markdown."""
    measured = columns(summary)
    small = intervals(summary)
    lines = ["# T-MAD evaluation", "", _row(["measure", *measured]), _row(["---", *["---:"] * len(measured)])]
    reasons = not_measured(summary)
    for name, entry in MEASURES.items():
        if name in reasons:
            lines.append(_row([f"`{name}`", f"not measured: {reasons[name]}", *[""] * (len(measured) - 1)]))
        elif any(name in values for values in measured.values()):
            cells = []
            for method, (text, best) in measure_texts(name, entry, measured).items():
                cell = "–" if text is None else f"**{text}**" if best else text
                cells.append(" ".join([cell, *([f"({under})"] if (under := small[method].get(name)) else [])]))
            unit = f", {entry.unit}" if entry.unit else ""
            lines.append(_row([f"`{name}`{unit}, {entry.direction}", *cells]))
    lines += ["", f"In brackets: {interval_note(summary)}", ""]
    lines += [f"- {name}: {value}" for name, value in facts(summary).items()]
    for entry in summary["methods"].values():
        if entry["not_measured"]:
            lines.append(f"- {entry['title']}: not measured: {entry['not_measured']}")
    tables = list(group_tables(summary))
    if comparison is not None:
        heading = f"Against {comparison.summary['report']} (this one minus the other)"
        tables.append((heading, *difference_table(comparison.summary, _titles(summary))))
    for heading, header, rows in tables:
        lines += ["", f"## {heading}", "", _row(header), _row(["---"] * len(header))]
        lines += [_row(["–" if one is None else str(one) for one in row]) for row in rows]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def columns(summary: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Title of each method that was measured, then measure, then its mean."""
    return {
        entry["title"]: {name: value["mean"] for name, value in entry["measures"].items()}
        for entry in summary["methods"].values()
        if not entry["not_measured"]
    }


def intervals(summary: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Title, then measure, then its interval in words, where there is one."""
    return {
        entry["title"]: {
            name: _interval(value, digits_of(MEASURES[name]))
            for name, value in entry["measures"].items()
            if value["low"] is not None
        }
        for entry in summary["methods"].values()
    }


def interval_note(summary: Mapping[str, Any]) -> str:
    """What the intervals are."""
    return (
        f"{summary['confidence']:.0%} bootstrap interval of the mean ({summary['resamples']} draws of photographs, "
        "with all their crops and masks). Measures of a whole set have none."
    )


def not_measured(summary: Mapping[str, Any]) -> dict[str, str]:
    """Measures without values, and why."""
    return {name: entry["not_measured"] for name, entry in summary["measures"].items() if "not_measured" in entry}


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
    capped = {
        f"{entry['title']}, {name}": value["at_cap"]
        for entry in summary["methods"].values()
        for name, value in entry["measures"].items()
        if "at_cap" in value
    }
    if capped:
        found["images at the cap"] = _listed(capped)
    if summary["failed"]:
        found["left out"] = json.dumps(summary["failed"])
    return found


def group_tables(summary: Mapping[str, Any]) -> Iterable[tuple[str, list[str], list[list[object]]]]:
    """Heading, header and rows of each kind of groups: a row a group and measure, a column a method."""
    titles = [entry["title"] for entry in summary["methods"].values() if not entry["not_measured"]]
    for kind, groups in summary["groups"].items():
        heading, first = GROUPS[kind]
        rows: list[list[object]] = []
        for name, group in groups.items():
            entries = group["methods"]
            for measure in [one for one in GROUP_MEASURES if one in next(iter(entries.values()))]:
                texts = measure_texts(
                    measure,
                    MEASURES[measure],
                    {method: {measure: values[measure]["mean"]} for method, values in entries.items()},
                )
                cells = [
                    Figure(text or "–", _interval(entries[method][measure], digits_of(MEASURES[measure])), best)
                    for method, (text, best) in texts.items()
                ]
                rows.append([name, group["images"], measure, *cells])
        yield heading, [first, "images", "measure", *titles], rows


def difference_table(summary: Mapping[str, Any], titles: Mapping[str, str]) -> tuple[list[str], list[list[object]]]:
    """Header and rows: a row a measure, a column a method; bold where the interval leaves out 0."""
    differences = summary["differences"]
    rows: list[list[object]] = []
    for name in next(iter(differences.values())):
        digits = digits_of(MEASURES[name])
        cells: list[object] = []
        for entries in differences.values():
            entry = entries[name]
            if entry["mean"] is None:
                cells.append(None)
                continue
            sure = entry["low"] is not None and (entry["low"] > 0 or entry["high"] < 0)
            cells.append(Figure(f"{entry['mean']:+.{digits}f}", _interval(entry, digits, sign="+"), sure))
        rows.append([f"{name} {MEASURES[name].direction[:1].replace('l', '')}", *cells])
    return ["measure, better", *(titles[method] for method in differences)], rows


def caption(one: Shown) -> str:
    """The line above an image's pictures."""
    value = f", psnr_hole {one.choice.value:.2f} dB" if one.choice.value is not None else ""
    mask = f", mask {one.choice.variant}" if one.choice.variant else ""
    return f"{one.choice.image_id}{mask}, hole {one.hole_fraction:.0%}{value}"


def _interval(entry: Mapping[str, Any], digits: int, *, sign: str = "") -> str:
    """In words; empty where there is none."""
    if entry["low"] is None:
        return ""
    return f"{entry['low']:{sign}.{digits}f} to {entry['high']:{sign}.{digits}f}"


def _titles(summary: Mapping[str, Any]) -> dict[str, str]:
    return {name: entry["title"] for name, entry in summary["methods"].items()}


def _listed(values: Mapping[str, object]) -> str:
    return "; ".join(f"{name}: {value}" for name, value in values.items())
