"""Pictures for the report: selects images and renders them again on Ray.

Results are the same every time, so none has to be kept for the report while a large set is measured.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont

from pipeline.evaluation.measure import on_workers
from pipeline.evaluation.methods import TITLES, Filled, Filler
from pipeline.evaluation.parts import Job, opened, plan_parts, read_part
from pipeline.evaluation.summary import rows_of
from pipeline.report.pictures import Row, Zoom, jpeg_bytes, zoom_on
from tmad.inpaint import InpaintResult
from tmad.metrics import measure

Why = Literal["spread", "worst", "best", "changed"]

NUM_VIEWS = 3
"""Images whose retrieval is shown, and images that get a series of mask sizes."""
SERIES = (0.125, 0.25, 0.375, 0.5, 0.625)
"""Sides of the holes of a series, shares of the image's side."""
IN_SERIES = ("tmad", "coarse", "patchmatch")
"""Methods that are shown in it."""
VIEW_SCALE = 2
"""Enlargement of the retrieval view over the image."""

_CELL_COLOUR, _WINDOW_COLOUR = (230, 30, 30), (30, 90, 230)


@dataclass(frozen=True)
class Choice:
    """An image and mask to show, and why."""

    image_id: str
    variant: int
    part: int
    why: Why
    value: float | None = None
    """The metric that it was chosen by."""
    detailed: bool = False
    """With its retrieval and a series of mask sizes."""


@dataclass(frozen=True)
class Shown:
    """What is shown of an image; pictures are JPEG files."""

    choice: Choice
    hole_fraction: float
    pictures: dict[str, bytes]
    """By column: input, candidates, each method by its title, truth."""
    zoom: Zoom | None
    retrieval: list[tuple[str, str, list[bytes]]]
    """A cell with its windows marked, then the patches in rank order: name, what is said of it, pictures."""
    series: list[tuple[str, dict[str, bytes]]]
    """Mask sizes from small to large."""

    @property
    def caption(self) -> str:
        """The line above the pictures."""
        value = f", psnr_hole {self.choice.value:.2f} dB" if self.choice.value is not None else ""
        mask = f", mask {self.choice.variant}" if self.choice.variant else ""
        return f"{self.choice.image_id}{mask}, hole {self.hole_fraction:.0%}{value}"

    @property
    def row(self) -> Row:
        """For a report's strip of pictures."""
        return self.caption, self.pictures


def choose(job: Job, rows: pa.Table) -> list[Choice]:
    """Images evenly spread over the set, and the best and worst of the first method by psnr_hole."""
    if not rows.num_rows:
        return []
    config = job.config
    images = rows_of(rows, job.measured_methods[0])
    found = [
        Choice(row["image_id"], row["variant"], row["part"], "spread", row.get("psnr_hole"))
        for row in images.to_pylist()
    ]
    places = sorted({*np.linspace(0, len(found) - 1, min(config.num_pictures, len(found))).round().astype(int)})
    spread = [replace(found[place], detailed=number < NUM_VIEWS) for number, place in enumerate(places)]
    ranked = sorted((one for one in found if one.value is not None), key=lambda one: one.value or 0.0)
    count = min(config.num_extremes, len(ranked) // 2)
    worst = [replace(one, why="worst") for one in ranked[:count]]
    best = [replace(one, why="best") for one in reversed(ranked[len(ranked) - count :])]
    return [*spread, *worst, *best]


def paint(job: Job, files: dict[str, Any], choices: Sequence[Choice]) -> list[Shown]:
    """What is shown of each choice, by tasks of Ray Data, in order."""
    if not choices:
        return []
    return [pickle.loads(one) for one in on_workers(job, files, choices, _paint, in_order=True)]


def side_by_side(results: Mapping[str, Sequence[Shown]]) -> list[Row]:
    """Rows of a report: input, T-MAD's result of each evaluation by its label, truth, of the spread images that all
    show."""
    spread = [[one for one in shown if one.choice.why == "spread"] for shown in results.values()]
    rows: list[Row] = []
    for same in zip(*spread, strict=False):
        first = same[0]
        filled = {label: one.pictures[TITLES["tmad"]] for label, one in zip(results, same, strict=True)}
        pictures = {"input": first.pictures["input"], **filled, "truth": first.pictures["truth"]}
        rows.append((f"{first.choice.image_id}, hole {first.hole_fraction:.0%}", pictures))
    return rows


def _paint(task: dict[str, Any], *, files: Any, job: Job) -> pa.Table:
    """A task of Ray: fill the hole of an image by every method, and draw what is shown of it."""
    filler, _ = opened(files, job)
    choice = Choice(**task)
    part = plan_parts(job.manifest, job.config)[choice.part]
    record = next(one for one in read_part(job.config.data, part, job.manifest) if one.image_id == choice.image_id)
    mask = record.mask(choice.variant)
    filled = filler.fill(record.pixels(), mask, image_id=choice.image_id, variant=choice.variant)
    return pa.table({"made": [pickle.dumps(_show(choice, filled, filler, job))]})


def _show(choice: Choice, filled: Filled, filler: Filler, job: Job) -> Shown:
    titles = {row.name: row.title for row in job.rows}
    pictures = {"input": filled.in_hole(np.uint8(255))}
    if filled.result is not None and filled.result.candidates.size:
        pictures["best memory patches"] = candidates_sheet(filled.truth, filled.result)
    pictures |= {titles[name]: output for name, output in filled.outputs.items()}
    pictures["truth"] = filled.truth
    detailed = choice.detailed and filled.result is not None
    return Shown(
        choice,
        float(filled.mask.mean()),
        {name: jpeg_bytes(picture) for name, picture in pictures.items()},
        zoom_on(filled.mask),
        list(retrieval_view(filled)) if detailed else [],
        list(mask_series(filler, filled, titles)) if detailed else [],
    )


def candidates_sheet(image: np.ndarray, result: InpaintResult) -> np.ndarray:
    """*image* with the most similar memory patch at each cell that touches the hole, as retrieval found it."""
    height, width = image.shape[:2]
    k = result.candidates.shape[2]
    sheet = image.copy()
    for (top, left), patches in zip(result.cells_yx, result.candidates, strict=True):
        rows, columns = min(k, height - top), min(k, width - left)
        sheet[top : top + rows, left : left + columns] = patches[0, :rows, :columns]
    return sheet


def retrieval_view(filled: Filled, *, cells: int = 2) -> Iterable[tuple[str, str, list[bytes]]]:
    """Fig. 6 for the cells with the most hole: where the cell lies and its candidates come from, then cell and patches
    in rank order."""
    result, mask = filled.result, filled.mask
    if result is None or not result.candidates.size:
        return
    k = result.candidates.shape[2]
    holes = [int(mask[top : top + k, left : left + k].sum()) for top, left in result.cells_yx]
    order = np.argsort([-hole for hole in holes], kind="stable")
    # Cells that lie apart say more than neighbours.
    for cell in order[:: max(1, len(order) // cells)][:cells]:
        top, left = (int(one) for one in result.cells_yx[cell])
        places = result.candidates_yx[cell].tolist()
        yield (
            f"cell at {top}, {left} (red)",
            "its memory patches (blue), by rank: "
            + "; ".join(f"{n}. from {y}, {x}" for n, (y, x) in enumerate(places, 1)),
            [jpeg_bytes(_marked(filled.in_hole(np.uint8(255)), (top, left), places, k))],
        )
        coarse, final = (
            picture[top : top + k, left : left + k] for picture in (result.coarse, np.asarray(result.output))
        )
        patches = [_enlarged(patch) for patch in result.candidates[cell]]
        yield "patches 1, 2, ...", "in rank order", [jpeg_bytes(patch) for patch in patches]
        yield "coarse, result", "of this cell", [jpeg_bytes(_enlarged(coarse)), jpeg_bytes(_enlarged(final))]


def _marked(picture: np.ndarray, cell: tuple[int, int], places: Sequence[Sequence[int]], k: int) -> np.ndarray:
    image = Image.fromarray(picture)
    image = image.resize((image.width * VIEW_SCALE, image.height * VIEW_SCALE), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=14)
    for number, (top, left) in [*enumerate(places, 1), (0, cell)]:
        box = [VIEW_SCALE * one for one in (left, top, left + k, top + k)]
        colour = _WINDOW_COLOUR if number else _CELL_COLOUR
        draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=colour, width=2)
        if number:
            draw.text(
                (box[0] + 4, box[1] + 2), str(number), fill=colour, font=font, stroke_width=2, stroke_fill="white"
            )
    return np.asarray(image)


def _enlarged(patch: np.ndarray, side: int = 96) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(patch)).resize((side, side), Image.Resampling.NEAREST))


def centred_hole(height: int, width: int, *, share: float) -> np.ndarray:
    """A mask (height, width) uint8 with a square hole in the middle, *share* of the short side."""
    side = round(share * min(height, width))
    top, left = (height - side) // 2, (width - side) // 2
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def mask_series(filler: Filler, filled: Filled, titles: Mapping[str, str]) -> Iterable[tuple[str, dict[str, bytes]]]:
    """Fig. 9: the image with centred square holes from small to large, and what T-MAD makes of them."""
    for share in SERIES:
        mask = centred_hole(*filled.mask.shape, share=share)
        side = int(mask.any(axis=0).sum())
        made = filler.fill(filled.truth, mask, image_id=filled.image_id, variant=filled.variant, only=IN_SERIES)
        pictures = {"input": made.in_hole(np.uint8(255))}
        figures = []
        for name, output in made.outputs.items():
            value = measure(output, filled.truth, mask, ["psnr_hole"])["psnr_hole"]
            figures.append(f"{titles.get(name, name)} {value:.2f} dB")
            pictures[titles.get(name, name)] = output
        pictures["truth"] = filled.truth
        caption = f"hole {side}×{side}, {mask.mean():.0%}: psnr_hole {', '.join(figures)}"
        yield caption, {name: jpeg_bytes(picture) for name, picture in pictures.items()}
