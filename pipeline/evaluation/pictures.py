"""Pictures for the report: selects images and renders them again on Ray.

Results are the same every time, so none has to be kept for the report while a large set is measured.
"""

from __future__ import annotations

import dataclasses
import heapq
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from PIL import Image, ImageDraw, ImageFont

from pipeline.data.tasks import iterate, run_tasks
from pipeline.evaluation.external import with_white_hole
from pipeline.evaluation.measure import Evaluation, num_workers, resources
from pipeline.evaluation.methods import Filled, Filler
from pipeline.evaluation.parts import Job, Part, opened, read_part
from pipeline.evaluation.summary import rows_of_images
from pipeline.report.pictures import Row, Zoom, jpeg_bytes, zoom_on
from tmad.inpaint import InpaintResult
from tmad.metrics import measure

Why = Literal["spread", "worst", "best", "changed"]

NUM_VIEWS = 3
"""Images whose retrieval is shown, and images that get a series of mask sizes."""
SERIES = (0.125, 0.25, 0.375, 0.5, 0.625)
"""Sides of the holes of a series, shares of the image's side."""
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


def choose(evaluation: Evaluation) -> list[Choice]:
    """Images evenly spread over the set, and the best and worst of the first method by psnr_hole; memory of a few."""
    config, method = evaluation.job.config, evaluation.job.measured_methods[0]
    images = evaluation.summary["images"]
    wanted = {int(place) for place in np.linspace(0, images - 1, min(config.num_pictures, images)).round()}
    spread: list[Choice] = []
    ranked: list[tuple[float, int, Choice]] = []
    for number, rows in enumerate(rows_of_images(evaluation.rows)):
        row = next(row for row in rows if row["method"] == method)
        value = row.get("psnr_hole")
        one = Choice(row["image_id"], row["variant"], row["part"], "spread", value, len(spread) < NUM_VIEWS)
        if number in wanted:
            spread.append(one)
        if value is not None:
            ranked.append((value, number, one))
            if len(ranked) > 4 * config.num_extremes + 64:
                ranked = _ends(ranked, config.num_extremes)
    count = min(config.num_extremes, len(ranked) // 2)
    worst = [_as(one, "worst") for _, _, one in heapq.nsmallest(count, ranked, key=lambda entry: entry[:2])]
    best = [_as(one, "best") for _, _, one in heapq.nlargest(count, ranked, key=lambda entry: entry[:2])]
    return [*spread, *worst, *best]


def _ends(ranked: list[tuple[float, int, Choice]], count: int) -> list[tuple[float, int, Choice]]:
    ordered = sorted(ranked, key=lambda entry: entry[:2])
    return ordered[:count] + ordered[max(count, len(ordered) - count) :]


def _as(choice: Choice, why: Why) -> Choice:
    return Choice(choice.image_id, choice.variant, choice.part, why, choice.value)


def paint(evaluation: Evaluation, choices: Sequence[Choice]) -> list[Shown]:
    """What is shown of each choice, by tasks of Ray Data, in order."""
    if not choices:
        return []
    workers = num_workers(evaluation.job.config, len(choices))
    shared = ray.put(evaluation.files)
    dataset = run_tasks(
        [dataclasses.asdict(choice) for choice in choices],
        partial(_paint, files=shared, job=evaluation.job, parts=evaluation.parts),
        in_order=True,
        **resources(evaluation.job.config, workers),
    )
    batches = iterate(dataset, batch_size=None, batch_format="numpy", prefetch_batches=0)
    return [pickle.loads(one) for rows in batches for one in rows["shown"]]


def _paint(task: dict[str, Any], *, files: Any, job: Job, parts: Sequence[Part]) -> pa.Table:
    """A task of Ray: fill the hole of an image by every method, and draw what is shown of it."""
    filler, _ = opened(files, job)
    choice = Choice(**task)
    for record in read_part(job.config.data, parts[choice.part], job.manifest):
        if record.image_id == choice.image_id:
            return pa.table({"shown": [pickle.dumps(_show(choice, filler(record, choice.variant), filler, job))]})
    raise AssertionError(f"{choice.image_id} is not in its part")


def _show(choice: Choice, filled: Filled, filler: Filler, job: Job) -> Shown:
    titles = {row.name: row.title for row in job.rows}
    pictures = {"input": with_white_hole(filled.truth, filled.mask)}
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
        list(mask_series(filler, filled, choice, titles)) if detailed else [],
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
            [jpeg_bytes(_marked(with_white_hole(filled.truth, mask), (top, left), places, k))],
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


def mask_series(
    filler: Filler, filled: Filled, choice: Choice, titles: Mapping[str, str]
) -> Iterable[tuple[str, dict[str, bytes]]]:
    """Fig. 9: the image with centred square holes from small to large, and what T-MAD makes of them."""
    height, width = filled.mask.shape
    for share in SERIES:
        side = max(2, round(share * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        mask = np.zeros_like(filled.mask)
        mask[top : top + side, left : left + side] = 1
        made = filler.fill(
            filled.truth, mask, image_id=choice.image_id, variant=choice.variant, only=("tmad", "coarse", "patchmatch")
        )
        pictures = {"input": with_white_hole(filled.truth, mask)}
        figures = []
        for name, output in made.outputs.items():
            value = measure(output, filled.truth, mask, ["psnr_hole"])["psnr_hole"]
            figures.append(f"{titles.get(name, name)} {value:.2f} dB")
            pictures[titles.get(name, name)] = output
        pictures["truth"] = filled.truth
        caption = f"hole {side}×{side}, {mask.mean():.0%}: psnr_hole {', '.join(figures)}"
        yield caption, {name: jpeg_bytes(picture) for name, picture in pictures.items()}
