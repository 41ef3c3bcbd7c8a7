"""Evaluation on a prepared set: fixed images, fixed masks, every method on the same pixels; tables, pictures, a page.

The masks are those stored in the set and the memory is keyed by image, so the same model on the same set gives the
same figures on any machine. One process; the measures are those of `tmad.metrics`, under names that say region and
formula.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import storage
from pipeline.data.schema import Record, read_manifest, read_records, set_folder
from pipeline.errors import MissingInput
from pipeline.models import find_model
from pipeline.report import Picture, Report, picture_grid, png_bytes
from pipeline.tracking import Tracker
from tmad.checkpoint import load_model, model_digest
from tmad.config import STRICT, PositiveInt
from tmad.inpaint import Inpainter, InpaintResult, UnusableInput
from tmad.metrics import MEASURES, Summary, measure
from tmad.swd import SMALLEST_LEVEL, SlicedWasserstein

Method = Literal["tmad", "coarse", "classical"]

METHOD_TITLES: Mapping[str, str] = {
    "tmad": "T-MAD",
    "coarse": "coarse result of T-MAD",
    "classical": "classical fill (biharmonic, scikit-image)",
}

PROGRESS_INTERVAL_S = 10.0

log = logging.getLogger(__name__)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """One evaluation."""

    model: str
    """Model folder, checkpoint, run folder, URI, or models:/name@alias."""
    data: str = "data/val"
    """Folder or URI of a prepared set (jobs/prepare.py)."""
    out: str = "runs/evaluation"
    """Folder or URI of the results; what an earlier evaluation left there is replaced."""
    methods: tuple[Method, ...] = ("tmad", "coarse", "classical")
    """What stands in the table; `classical` needs scikit-image."""
    limit: PositiveInt | None = None
    """Only so many images, the first of the set; none = all."""
    mask_variant: Annotated[int, Field(ge=0)] = 0
    """Which of the masks stored with each image."""
    num_pictures: Annotated[int, Field(ge=0)] = 8
    """Images shown in the report, evenly spread over the set."""
    use_gpu: bool = False
    """Run the model on the GPU."""
    seed: int = 0
    """Keys the choice of the texture memory."""
    tracking_uri: str | None = None
    """MLflow server or sqlite:///file, for a models:/ reference and for `mlflow_run`; none = MLFLOW_TRACKING_URI."""
    mlflow_run: str | None = None
    """Id of the MLflow run that gets the measures, tables and pictures too."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured; `summary` is the content of summary.json."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    """One an image and method: image_id, method, hole_fraction, seconds, and each measure (or none)."""
    pictures: list[tuple[str, dict[str, Picture]]]
    """Caption and {column: picture} of the images that are shown."""

    @property
    def means(self) -> dict[str, dict[str, float | None]]:
        """Method, then measure, then its mean over the images."""
        return {method: entry["measures"] for method, entry in self.summary["methods"].items()}


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure `config.methods` on the set and write into `config.out`: summary.json, per_image.parquet,
    per_image.csv, pictures.png, report.html.

    Images that cannot be filled (nothing but hole) are left out and listed in the summary. Raises `ModelNotFound`,
    `MissingInput`, and `ValueError` for a mask variant that the set does not have or scikit-image not being there.
    """
    if not config.methods:
        raise ValueError(f"methods must name at least one of {', '.join(METHOD_TITLES)}")
    tracking_uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if config.mlflow_run is not None and tracking_uri is None:
        raise ValueError("mlflow_run needs tracking_uri (or MLFLOW_TRACKING_URI), the server or file that holds it")
    if config.use_gpu and not torch.cuda.is_available():
        raise ValueError("use_gpu is set, but PyTorch sees no CUDA device here; leave it out to run on the CPU")
    classical = classical_fill() if "classical" in config.methods else None
    manifest = read_manifest(config.data)
    if config.mask_variant >= manifest.num_variants:
        raise ValueError(
            f"mask_variant must be below {manifest.num_variants}, the masks per image of "
            f"{storage.redact(config.data)}, got {config.mask_variant}"
        )
    folder = find_model(config.model, tracking_uri=tracking_uri)
    model = load_model(folder, device="cuda" if config.use_gpu else "cpu")
    total = min(manifest.records, config.limit or manifest.records)
    if total == 0:
        raise MissingInput(f"the prepared set {storage.redact(config.data)} has no image")
    measured = _measure_all(config, Inpainter(model, seed=config.seed), classical, total, manifest.crop_size)
    facts = {
        "model": storage.redact(config.model),
        "model_digest": model_digest(folder),
        "data": storage.redact(set_folder(config.data)),
        "data_digest": manifest.digest,
        "images": measured.num_images,
        "mask": manifest.settings.get("mask", manifest.settings.get("mask_from")),
        "mask_variant": config.mask_variant,
        "mean_hole_fraction": measured.mean_hole_fraction(),
        "seed": config.seed,
        "failed": measured.failed,
    }
    result = Evaluation(measured.summary(config.methods, facts), measured.rows, measured.pictures)
    write_evaluation(result, config.out)
    if config.mlflow_run is not None:
        _track(result, config.out, Tracker(tracking_uri, config.mlflow_run))
    return result


def classical_fill() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A fill without learning, for comparison: the biharmonic equation solved over the hole (Damelin & Hoang 2018).

    The function takes (H, W, 3) uint8 and a mask (H, W), 1 = hole, and gives (H, W, 3) uint8, valid pixels unchanged.
    Raises `ValueError` if scikit-image is not installed.
    """
    try:
        from skimage.restoration import inpaint_biharmonic
    except ImportError as error:
        raise ValueError(
            "the classical fill needs scikit-image: pip install 'tmad[demo]', or leave it out with "
            "--methods tmad coarse"
        ) from error

    def fill(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        filled = inpaint_biharmonic(image, mask, channel_axis=-1)
        return np.where(mask[..., None] > 0, np.rint(np.clip(filled, 0, 1) * 255).astype(np.uint8), image)

    return fill


class _Measured:
    """Collects rows, means and pictures while the set goes by."""

    def __init__(self, methods: Sequence[str], side: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.pictures: list[tuple[str, dict[str, Picture]]] = []
        self.failed: dict[str, str] = {}
        self.num_images = 0
        self._means = {method: Summary() for method in methods}
        self._textures = {method: SlicedWasserstein(side=side) for method in methods if side >= SMALLEST_LEVEL}
        self._seconds = dict.fromkeys(methods, 0.0)
        self._hole_sum = 0.0

    def add(
        self, record: Record, mask: np.ndarray, outputs: Mapping[str, np.ndarray], seconds: Mapping[str, float]
    ) -> None:
        """Measure each method's picture of one image. Where a method has no time of its own, `seconds` lacks it."""
        truth, hole_fraction = record.pixels(), float(mask.mean())
        self.num_images += 1
        self._hole_sum += hole_fraction
        for method, means in self._means.items():
            values = measure(outputs[method], truth, mask)
            means.add(values)
            if method in self._textures:
                self._textures[method].add(record.image_id, outputs[method], truth, mask)
            facts = {"image_id": record.image_id, "method": method, "hole_fraction": hole_fraction}
            self.rows.append({**facts, "seconds": seconds.get(method), **values})
            self._seconds[method] += seconds.get(method, 0.0)

    def mean_hole_fraction(self) -> float | None:
        return self._hole_sum / self.num_images if self.num_images else None

    def summary(self, methods: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        shown: set[str] = set()
        for method in methods:
            means, textures = self._means[method], self._textures.get(method)
            values = {**means.means(), **(textures.values() if textures else {})}
            shown |= values.keys()
            entries[method] = {
                "title": METHOD_TITLES[method],
                "measures": values,
                "without_value": {**means.skipped(), **(textures.skipped() if textures else {})},
                "at_cap": means.at_cap(),
                "seconds_per_image": self._seconds[method] / max(1, self.num_images),
            }
        legend = {
            name: {"unit": entry.unit, "better": entry.better, "formula": entry.formula}
            for name, entry in MEASURES.items()
            if name in shown
        }
        return {**facts, "methods": entries, "measures": legend}


def _measure_all(
    config: EvaluateConfig,
    inpainter: Inpainter,
    classical: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    total: int,
    side: int,
) -> _Measured:
    measured = _Measured(config.methods, side)
    shown = {int(index) for index in np.linspace(0, total - 1, min(config.num_pictures, total)).round()}
    began = last = time.monotonic()
    for index, record in enumerate(read_records(config.data, limit=total)):
        _measure_one(record, config, inpainter, classical, measured, show=index in shown)
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL_S or index + 1 == total:
            rate = (index + 1) / (now - began)
            log.info("%d of %d images, %.2f images/s, %.0f s to go", index + 1, total, rate, (total - index - 1) / rate)
            last = now
    return measured


def _measure_one(
    record: Record,
    config: EvaluateConfig,
    inpainter: Inpainter,
    classical: Callable[[np.ndarray, np.ndarray], np.ndarray] | None,
    measured: _Measured,
    *,
    show: bool,
) -> None:
    truth, mask = record.pixels(), record.mask(config.mask_variant)
    # The coarse result is a by-product of the same pass: it has no time of its own.
    began = time.monotonic()
    try:
        result = inpainter(truth, mask, image_id=record.image_id)
    except UnusableInput as error:
        measured.failed[record.image_id] = error.reason
        log.warning("left out: %s", error)
        return
    seconds = {"tmad": time.monotonic() - began}
    outputs = {"tmad": np.asarray(result.output), "coarse": result.coarse}
    if classical is not None:
        began = time.monotonic()
        outputs["classical"] = classical(truth, mask)
        seconds["classical"] = time.monotonic() - began
    measured.add(record, mask, outputs, seconds)
    if show:
        caption = f"{record.image_id}, hole {result.hole_fraction:.0%}"
        measured.pictures.append((caption, picture_row(truth, mask, result, classical=outputs.get("classical"))))


def picture_row(
    truth: np.ndarray, mask: np.ndarray, result: InpaintResult, *, classical: np.ndarray | None = None
) -> dict[str, Picture]:
    """The pictures of one image, by column: input, mask, coarse, candidates, result, classical (where given), truth.

    *candidates* shows the most similar memory patch at each hole cell, as retrieval found it.
    """
    hole = mask[..., None] > 0
    row: dict[str, Picture] = {
        "input": np.where(hole, np.uint8(255), truth),
        "mask": mask * np.uint8(255),
        "coarse": result.coarse,
        "candidates": _first_candidates(truth, result),
        "result": np.asarray(result.output),
    }
    if classical is not None:
        row["classical"] = classical
    return {**row, "truth": truth}


def _first_candidates(image: np.ndarray, result: InpaintResult) -> np.ndarray:
    height, width = image.shape[:2]
    k = result.candidates.shape[2]
    sheet = image.copy()
    for (top, left), patches in zip(result.cells_yx, result.candidates, strict=True):
        rows, columns = min(k, height - top), min(k, width - left)
        sheet[top : top + rows, left : left + columns] = patches[0, :rows, :columns]
    return sheet


def write_evaluation(result: Evaluation, out: str) -> None:
    """Write the files of an evaluation into the folder *out*; summary.json comes last and says that it is complete."""
    storage.write_atomic(storage.join(out, "per_image.parquet"), _parquet(result.rows))
    storage.write_atomic(storage.join(out, "per_image.csv"), _csv(result.rows))
    if result.pictures:
        storage.write_atomic(storage.join(out, "pictures.png"), png_bytes(picture_grid(result.pictures)))
    evaluation_report(result).write(storage.join(out, "report.html"))
    summary = json.dumps(result.summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    storage.write_atomic(storage.join(out, "summary.json"), summary.encode())


def evaluation_report(result: Evaluation, report: Report | None = None) -> Report:
    """The evaluation as sections of *report*, which is made where none is given."""
    summary = result.summary
    if report is None:
        report = Report("T-MAD evaluation", "Every method fills the same holes of the same images.")
    report.heading("Measures")
    report.measures({METHOD_TITLES[method]: means for method, means in result.means.items()})
    report.facts(
        {
            "model": f"{summary['model']} (digest {summary['model_digest']})",
            "images": f"{summary['images']} of {summary['data']} (digest {summary['data_digest']})",
            "masks": f"{summary['mask']}, variant {summary['mask_variant']}, mean hole "
            f"{summary['mean_hole_fraction'] or 0:.1%}",
            "seconds per image": ", ".join(
                f"{METHOD_TITLES[method]} {entry['seconds_per_image']:.2f}"
                for method, entry in summary["methods"].items()
                if entry["seconds_per_image"]
            ),
            **({"left out": json.dumps(summary["failed"])} if summary["failed"] else {}),
        }
    )
    if result.pictures:
        report.heading("Pictures")
        report.text(
            "The hole is white in the input. Candidates: the most similar patch of the image's own texture memory at "
            "each cell that touches the hole; PSNet makes the result from several of them and the coarse result."
        )
        report.pictures(result.pictures)
    return report


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=_schema(rows)), buffer)
    return buffer.getvalue()


def _schema(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Measures are floats even where no image gave one a value."""
    import pyarrow as pa

    names = list(rows[0]) if rows else ["image_id", "method", "hole_fraction", "seconds"]
    return pa.schema([(name, pa.string() if name in ("image_id", "method") else pa.float64()) for name in names])


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]) if rows else ["image_id", "method"])
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def _track(result: Evaluation, out: str, tracker: Tracker) -> None:
    with tracker:
        for method, means in result.means.items():
            values = {f"evaluation/{method}/{name}": value for name, value in means.items() if value is not None}
            tracker.metrics(values, step=0)
        for name in ("report.html", "summary.json", "per_image.parquet"):
            tracker.artifact(storage.read_bytes(storage.join(out, name)), f"evaluation/{name}")
        if result.pictures:
            tracker.image("evaluation/pictures", picture_grid(result.pictures))
