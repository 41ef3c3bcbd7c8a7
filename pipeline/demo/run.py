"""The demo: photographs, prepared sets, training, inpainting, evaluation and a report, each by the real job's function.

A second run keeps what is there: prepared shards by their receipts, the run by its `finished.json` (an unfinished one
continues), filled images by their ledger, the evaluation by the digests of model and set.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import storage
from pipeline.config import DataConfig, RunConfig
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import Manifest
from pipeline.demo.photographs import PHOTOGRAPHS, write_photographs
from pipeline.errors import ConfigMismatch
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import Evaluated, evaluate
from pipeline.inpaint.config import InpaintConfig
from pipeline.inpaint.run import Summary, inpaint_all
from pipeline.presets import PRESETS
from pipeline.report.page import Table, render
from pipeline.report.pictures import Row
from pipeline.tracking import resolve_tracking_uri
from pipeline.tracking.environment import environment
from pipeline.train.launch import train
from tmad.config import STRICT, PositiveInt
from tmad.images import to_rgb
from tmad.masks import draw_mask
from tmad.rng import numpy_generator

CELLS_PER_SIDE = 8
"""Cells along the side of a crop: 256 pixels for the paper's 32-pixel patches, and in proportion for others."""

FREE_FORM = "brush"
"""Family of the holes that are trained and measured."""

log = logging.getLogger(__name__)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class DemoConfig:
    """The demo's few choices; everything else is the preset's."""

    out: str = "runs"
    """Local folder: the run is `<out>/demo`, its data `<out>/demo-data`, the MLflow file `<out>/mlflow.db`."""
    training: Literal["demo", "smoke"] = "demo"
    """Training preset; `smoke` passes through every stage in a minute and learns nothing of use."""
    train_crops: PositiveInt = 12
    """Crops of each training photograph."""
    val_crops: PositiveInt = 4
    """Crops of each validation photograph."""


@dataclass(frozen=True)
class DemoResult:
    """Where the demo left what it made."""

    report: Path
    metrics: Path
    tracking_uri: str | None
    """None where MLflow is switched off."""
    model: str
    """Reference of the registered model, or the model's folder."""
    stages_s: dict[str, float]
    """Seconds of each stage of this call."""

    def message(self) -> str:
        """What the user reads at the end."""
        times = "\n".join(f"  {name:<12}{seconds:7.1f} s" for name, seconds in self.stages_s.items())
        lines = [
            f"The demo took {sum(self.stages_s.values()):.0f} s:",
            times,
            "",
            f"Report    {_short(self.report)}",
            f"Metrics   {_short(self.metrics)}",
            f"Model     {self.model}",
        ]
        if self.tracking_uri is not None:
            lines.append(f"MLflow    mlflow ui --backend-store-uri {self.tracking_uri}")
        return "\n".join(lines)


def run_demo(config: DemoConfig) -> DemoResult:
    """Run every stage that has not been run, and write report.html and metrics.json into `<out>/demo`.

    Raises what the stages raise; `ConfigMismatch` (an older demo with other settings lies there) says what to remove.
    """
    out = Path(config.out).absolute()
    run = _run_config(config, out)
    folder, data = out / "demo", out / "demo-data"
    stages = _Stages()
    try:
        with stages("photographs"):
            counts = write_photographs(data / "photographs")
            log.info("%d photographs to train with, %d others to validate", counts["train"], counts["val"])
        with stages("prepare"):
            prepare(_prepare_config(config, run, data, "train"))
            val_set = prepare(_prepare_config(config, run, data, "val"))
        with stages("train"):
            finished = train(run)
    except ConfigMismatch as error:
        raise ConfigMismatch(
            f"{error.message}. An older demo lies in {out}: remove {folder} and {data} to start over", **error.details
        ) from error
    tracking_uri = resolve_tracking_uri(run.tracking.uri, run.runs)
    registered = finished["registered"]
    model = registered["uri"] if registered else finished["model"]
    with stages("inpaint"):
        write_examples(data / "photographs" / "val", folder / "inpaint")
        filled = inpaint_all(
            InpaintConfig(
                input=str(folder / "inpaint" / "images"),
                masks=str(folder / "inpaint" / "masks"),
                output=str(folder / "inpaint" / "results"),
                model=model,
                format="png",
                tracking_uri=tracking_uri,
                num_actors=1,
            )
        )
    report, metrics = folder / "report.html", folder / "metrics.json"
    with stages("evaluate"):
        if _is_current(metrics, finished, val_set) and report.exists():
            log.info("the evaluation of this model on this set is there and is kept")
        else:
            evaluation = evaluate(
                EvaluateConfig(
                    model=finished["model"],
                    data=str(data / "val"),
                    out=str(folder / "evaluation"),
                    num_pictures=12,
                    tracking_uri=tracking_uri,
                    mlflow_run=finished["mlflow_run_id"],
                )
            )
            _write_report(report, evaluation, run, finished, folder / "inpaint", model, tracking_uri)
            _write_metrics(metrics, evaluation, finished, filled, stages.seconds)
    return DemoResult(report, metrics, tracking_uri, model, stages.seconds)


class _Stages:
    """Times the stages and announces them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        log.info("── %s", name)
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = time.monotonic() - began
            log.info("── %s: %.1f s", name, self.seconds[name])


def _run_config(config: DemoConfig, out: Path) -> RunConfig:
    data = DataConfig(train=str(out / "demo-data" / "train"), val=str(out / "demo-data" / "val"))
    return replace(PRESETS[config.training](), name="demo", runs=str(out), data=data)


def _prepare_config(config: DemoConfig, run: RunConfig, data: Path, split: Literal["train", "val"]) -> PrepareConfig:
    side = CELLS_PER_SIDE * run.model.patch_size
    training = split == "train"
    return PrepareConfig(
        source=str(data / "photographs" / split),
        out=str(data / split),
        crop_size=side,
        short_side=(side, 2 * side) if training else (side * 3 // 2, side * 3 // 2),
        crops_per_image=config.train_crops if training else config.val_crops,
        masks_per_image=4 if training else 1,
        mask=FREE_FORM,
        patch_size=run.model.patch_size,
        memory=run.model.memory,
        images_per_shard=4,
        split=split,
        against=None if training else str(data / "train"),
        encoding="png",
        seed=run.seed,
    )


def write_examples(photographs: Path, folder: Path) -> None:
    """The validation photographs as they came, whole, each with a mask of its own size, as a user would bring them."""
    for source in sorted(photographs.iterdir()):
        image, mask = folder / "images" / source.name, folder / "masks" / f"{source.stem}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        mask.parent.mkdir(parents=True, exist_ok=True)
        if image.exists() and mask.exists():
            continue
        content = source.read_bytes()
        with Image.open(io.BytesIO(content)) as opened:
            width, height = opened.size
        hole = draw_mask("brush", height, width, numpy_generator(0, "demo", source.name))
        buffer = io.BytesIO()
        Image.fromarray(hole * np.uint8(255)).save(buffer, format="PNG")
        storage.write_atomic(str(mask), buffer.getvalue())
        storage.write_atomic(str(image), content)


def _is_current(metrics: Path, finished: dict[str, Any], val_set: Manifest) -> bool:
    """Whether *metrics* was measured with this model on this set."""
    if not metrics.exists():
        return False
    evaluation = json.loads(metrics.read_text(encoding="utf-8"))["evaluation"]
    now = (finished["model_digest"], val_set.digest)
    return (evaluation["model_digest"], evaluation["data_digest"]) == now


def _write_metrics(
    path: Path, evaluation: Evaluated, finished: dict[str, Any], filled: Summary, stages_s: dict[str, float]
) -> None:
    content = {
        "evaluation": evaluation.summary,
        "training": finished,
        "inpainting": dataclasses.asdict(filled),
        "stages_s": stages_s,
        "environment": environment(),
    }
    storage.write_atomic(str(path), (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _write_report(
    path: Path,
    evaluation: Evaluated,
    run: RunConfig,
    finished: dict[str, Any],
    inpainted: Path,
    model: str,
    tracking_uri: str | None,
) -> None:
    photographs = [
        [one.file, "training" if one.split == "train" else "validation", one.licence, one.source] for one in PHOTOGRAPHS
    ]
    page = render(
        "demo.html",
        e=evaluation.sections(),
        run=run,
        features=finished["perceptual"],
        model=model,
        examples=list(_example_rows(inpainted)),
        tracking_uri=tracking_uri,
        photographs=Table(["photograph", "used for", "licence", "source"], photographs),
    )
    storage.write_atomic(str(path), page.encode())


def _example_rows(folder: Path) -> Iterator[Row]:
    for image in sorted((folder / "images").iterdir()):
        result = folder / "results" / f"{image.stem}.png"
        if not result.exists():
            continue
        with Image.open(image) as opened:
            truth = to_rgb(opened)
        hole = np.asarray(Image.open(folder / "masks" / f"{image.stem}.png"))[..., None] > 0
        height, width = truth.shape[:2]
        caption = f"{image.name}, {width}×{height}, hole {hole.mean():.0%}"
        yield caption, {"input": np.where(hole, np.uint8(255), truth), "result": result.read_bytes(), "original": truth}


def _short(path: Path) -> Path:
    """Relative to here where it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
