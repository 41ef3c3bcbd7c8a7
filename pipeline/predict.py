"""Batch inpainting: a folder of images and a folder of masks in, a folder of filled images and a ledger out, on Ray.

Images and masks are paired by their place in the tree without the ending (`a/b.jpg` with `a/b.png`). Results are PNG by
default choice, whatever came in: only a lossless file keeps the valid pixels bit-identical. A bad input is a row of the
ledger with its reason, never the end of the job. The same command again does only what is missing.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import ray
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import storage
from pipeline.cluster import joined, require, start_ray
from pipeline.errors import MissingInput, TooManyBadImages
from pipeline.models import find_model
from pipeline.tracking import JsonLines, read_json_lines
from tmad.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_model, model_digest
from tmad.config import STRICT, PositiveFloat, PositiveInt
from tmad.images import MAX_PIXELS, SUFFIXES, UnreadableImage, decode_image
from tmad.inpaint import Inpainter, UnusableInput

LEDGER = "ledger.jsonl"

MAX_ITEMS_PER_TASK = 16
"""Inputs that one actor call works through; small, so that progress is seen and little is repeated after a failure."""

PROGRESS_INTERVAL_S = 10.0

log = logging.getLogger(__name__)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class InpaintConfig:
    """A batch inpainting job."""

    input: str
    """Folder or URI of the images; subfolders are searched. On several machines: a place that all of them see."""
    masks: str
    """Folder or URI of the masks, white = hole, named like their images (any image ending)."""
    output: str
    """Folder or URI of the results: the same tree and names, ending .png, and ledger.jsonl."""
    model: str
    """Model folder, checkpoint, run folder, URI, or models:/name@alias."""
    mask_suffix: str = ""
    """What a mask's name has behind its image's name: `_mask` pairs a.jpg with a_mask.png."""
    tracking_uri: str | None = None
    """MLflow server or sqlite:///file for a models:/ reference; none = MLFLOW_TRACKING_URI."""
    num_actors: PositiveInt | None = None
    """Copies of the model that work side by side; none = one per GPU, or per CPU."""
    cpus_per_actor: PositiveFloat = 1.0
    """CPUs, and threads, of each copy."""
    use_gpu: bool = False
    """Give each copy a GPU."""
    cells_per_chunk: PositiveInt = 256
    """Hole cells synthesized at once: bounds the memory of large holes."""
    seed: int = 0
    """Keys the choice of the texture memory; the same seed gives the same bytes."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Images of more pixels are refused before they are decoded."""
    max_failed_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The job ends with an error, after all else is done, if more than this share of the inputs failed; if all of them
    failed it always does."""


@dataclass(frozen=True)
class Row:
    """What became of one input: a line of the ledger."""

    input: str
    """Key of the image below the input folder."""
    mask: str | None
    """Key of its mask below the mask folder."""
    output: str | None
    """Key of the result below the output folder; none if there is none."""
    status: Literal["done", "skipped", "failed"]
    reason: str | None = None
    """Short name to count by: `no-mask`, `same-name`, `image-truncated`, `mask-empty-file`, `size-mismatch`, ..."""
    detail: str | None = None
    """The whole message, and what to know about inputs that were done (a mask that looks inverted)."""
    seconds: float | None = None
    """Time for reading, filling and writing this input."""
    hole_fraction: float | None = None
    height: int | None = None
    width: int | None = None
    model_digest: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Summary:
    """Counts of a finished job."""

    done: int
    """Filled by this call."""
    kept: int
    """Filled by an earlier call with the same model and seed."""
    skipped: int
    failed: int
    reasons: dict[str, int]
    """Skipped and failed inputs by reason."""
    seconds: float
    model_digest: str


@dataclass(frozen=True)
class Pair:
    """One input to work on; keys as in `Row`."""

    input: str
    mask: str
    output: str


def inpaint_folder(config: InpaintConfig) -> Summary:
    """Fill every image of `config.input` that has a mask; returns what happened, which the ledger says image by image.

    Raises `MissingInput` (no folder, no image), `ModelNotFound`, `ClusterTooSmall`, and `TooManyBadImages` once
    everything else is done.
    """
    began = time.monotonic()
    _check_folders(config)
    images = storage.list_files(config.input, SUFFIXES)
    if not images:
        raise MissingInput(f"no image in {storage.redact(config.input)}; looked for {', '.join(SUFFIXES)}")
    pairs, dropped = pair(images, storage.list_files(config.masks, SUFFIXES), mask_suffix=config.mask_suffix)
    folder = find_model(config.model, tracking_uri=config.tracking_uri)
    digest = model_digest(folder)
    ledger_uri = storage.join(config.output, LEDGER)
    there = set(storage.list_files(config.output)) if storage.exists(config.output) else set()
    kept = finished(read_json_lines(ledger_uri), there, digest=digest, seed=config.seed)
    rows = {row.input: row for row in dropped} | {item.input: kept[item.input] for item in pairs if item.input in kept}
    missing = [item for item in pairs if item.input not in kept]
    log.info(
        "%d images: %d to fill, %d already done by model %s, %d without a usable mask",
        len(images), len(missing), len(rows) - len(dropped), digest, len(dropped),
    )  # fmt: skip
    if missing:
        ledger = JsonLines(ledger_uri)
        for row in _fill_all(missing, config, folder, digest):
            rows[row.input] = row
            ledger.append(asdict(row))
        ledger.close()
    _write_ledger(ledger_uri, rows.values())
    summary = _summary(rows.values(), kept=len(pairs) - len(missing), seconds=time.monotonic() - began, digest=digest)
    report_failures(summary, total=len(images), limit=config.max_failed_fraction, ledger=ledger_uri)
    return summary


def pair(images: Sequence[str], masks: Sequence[str], *, mask_suffix: str = "") -> tuple[list[Pair], list[Row]]:
    """Match images with masks by path without ending; what cannot be matched comes back as rows of the ledger.

    `no-mask`: skipped. `same-name`: two images (or two masks) differ in their ending only, so their results would have
    one name (or the choice would be chance): failed.
    """
    stems = Counter(_stem(key) for key in images)
    masks_by_stem: dict[str, list[str]] = {}
    for key in masks:
        masks_by_stem.setdefault(_stem(key), []).append(key)
    pairs, rows = [], []
    for key in images:
        stem = _stem(key)
        found = masks_by_stem.get(stem + mask_suffix, [])
        if stems[stem] > 1:
            detail = f"{stems[stem]} images are named {stem}.*: rename them, their results would overwrite each other"
            rows.append(Row(input=key, mask=None, output=None, status="failed", reason="same-name", detail=detail))
        elif len(found) > 1:
            detail = f"several masks for one image: {', '.join(found)}"
            rows.append(Row(input=key, mask=None, output=None, status="failed", reason="same-name", detail=detail))
        elif not found:
            detail = f"no mask named {stem}{mask_suffix}.*"
            rows.append(Row(input=key, mask=None, output=None, status="skipped", reason="no-mask", detail=detail))
        else:
            pairs.append(Pair(key, found[0], stem + ".png"))
    return pairs, rows


class FillWorker:
    """An actor of Ray Data: holds the model, fills one image a call, returns its row of the ledger."""

    def __init__(self, model_files: Any, config: InpaintConfig, digest: str) -> None:
        """*model_files*: reference to the artifact's files by name, so that no node needs the place they came from."""
        import torch

        torch.set_num_threads(max(1, int(config.cpus_per_actor)))
        with tempfile.TemporaryDirectory(prefix="tmad-model-") as folder:
            for name, content in ray.get(model_files).items():
                Path(folder, name).write_bytes(content)
            model = load_model(folder, device="cuda" if config.use_gpu else "cpu")
        self.inpainter = Inpainter(
            model, cells_per_chunk=config.cells_per_chunk, seed=config.seed, keep_candidates=False
        )
        self.config = config
        self.digest = digest

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """`Pair` as a dictionary in, `Row` as a dictionary out. Never raises for what is wrong with one input."""
        began = time.monotonic()
        facts: dict[str, Any] = {}
        try:
            facts = self._fill(Pair(**item)) | {"status": "done"}
        except _BadInput as error:
            facts = {"status": "failed", "reason": error.reason, "detail": error.detail}
        except Exception as error:
            log.exception("unexpected error in %s", item["input"])
            facts = {"status": "failed", "reason": "unexpected", "detail": f"{type(error).__name__}: {error}"}
        if facts["status"] != "done":
            item = {**item, "output": None}
        row = Row(**item, **facts, seconds=time.monotonic() - began, model_digest=self.digest, seed=self.config.seed)
        return asdict(row)

    def _fill(self, item: Pair) -> dict[str, Any]:
        image = _read(self.config.input, item.input, "image", self.config.max_pixels)
        mask = _read(self.config.masks, item.mask, "mask", self.config.max_pixels)
        with warnings.catch_warnings():
            # What they say is in the result's notes, and from there in the ledger.
            warnings.simplefilter("ignore", UserWarning)
            try:
                result = self.inpainter(image, mask, image_id=item.input)
            except UnusableInput as error:
                raise _BadInput(error.reason, str(error)) from error
            except UnreadableImage as error:
                raise _BadInput(error.reason, error.detail) from error
        filled = result.output
        assert isinstance(filled, Image.Image), "a Pillow image comes back for a Pillow image"
        buffer = io.BytesIO()
        # A colour profile of other channels (CMYK) would turn the colours of the RGB result.
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA", "L", "LA", "P") else None
        filled.save(buffer, format="PNG", icc_profile=profile)
        storage.write_atomic(storage.join(self.config.output, item.output), buffer.getvalue())
        return {
            "hole_fraction": result.hole_fraction,
            "height": image.height,
            "width": image.width,
            "detail": "; ".join(result.notes) or None,
        }


class _BadInput(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def _read(folder: str, key: str, what: str, max_pixels: int) -> Any:
    try:
        return decode_image(storage.read_bytes(storage.join(folder, key)), max_pixels=max_pixels)
    except UnreadableImage as error:
        raise _BadInput(f"{what}-{error.reason}", error.detail) from error
    except MissingInput as error:
        raise _BadInput(f"{what}-gone", str(error)) from error


def _fill_all(pairs: Sequence[Pair], config: InpaintConfig, folder: Path, digest: str) -> Iterable[Row]:
    """Rows as they are finished, in any order."""
    start_ray()
    num_actors = _num_actors(config, len(pairs))
    require({"CPU": num_actors * config.cpus_per_actor, "GPU": num_actors if config.use_gpu else 0})
    files = ray.put({name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)})
    num_tasks = max(num_actors, math.ceil(len(pairs) / MAX_ITEMS_PER_TASK))
    absolute = {name: storage.absolute(getattr(config, name)) for name in ("input", "masks", "output")}
    rows = ray.data.from_items([asdict(item) for item in pairs], override_num_blocks=min(num_tasks, len(pairs))).map(
        FillWorker,  # type: ignore[arg-type]  # Ray's hints know functions, not the classes that it runs as actors
        fn_constructor_args=(files, InpaintConfig(**{**asdict(config), **absolute}), digest),
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=None if config.use_gpu else config.cpus_per_actor,
        num_gpus=1 if config.use_gpu else None,
    )
    rows.context.enable_progress_bars = False
    rows.context.print_on_execution_start = False
    began = last = time.monotonic()
    for count, row in enumerate(rows.iter_rows(), start=1):
        yield Row(**row)
        now = time.monotonic()
        if now - last >= PROGRESS_INTERVAL_S or count == len(pairs):
            rate = count / (now - began)
            eta_s = (len(pairs) - count) / rate
            log.info("%d of %d images, %.2f images/s, %.0f s to go", count, len(pairs), rate, eta_s)
            last = now


def _num_actors(config: InpaintConfig, num_pairs: int) -> int:
    if config.num_actors is not None:
        return min(config.num_actors, num_pairs)
    there = ray.cluster_resources()
    if config.use_gpu:
        return max(1, min(int(there.get("GPU", 0)), num_pairs))
    cpus = there.get("CPU", 1)
    # An embedded Ray counts more CPUs than this machine may have; the model needs real ones.
    cpus = cpus if joined() else min(cpus, os.cpu_count() or 1)
    return max(1, min(int(cpus / config.cpus_per_actor), num_pairs))


def _check_folders(config: InpaintConfig) -> None:
    output = storage.absolute(config.output)
    for name in ("input", "masks"):
        folder = storage.absolute(getattr(config, name))
        if output == folder or output.startswith(folder + "/"):
            raise ValueError(
                f"output ({storage.redact(output)}) lies in the {name} folder ({storage.redact(folder)}): "
                "results would be taken for inputs; choose another place"
            )


def finished(ledger: Sequence[Mapping[str, Any]], there: set[str], *, digest: str, seed: int) -> dict[str, Row]:
    """Inputs that an earlier call finished: by this model and seed, with the result still there."""
    latest = {row["input"]: row for row in ledger if set(row) == set(Row.__dataclass_fields__)}
    return {
        key: Row(**row)
        for key, row in latest.items()
        if row["status"] == "done" and row["output"] in there and (row["model_digest"], row["seed"]) == (digest, seed)
    }


def _write_ledger(uri: str, rows: Iterable[Row]) -> None:
    """One line an input, sorted, in place of the lines of this call and earlier ones."""

    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in sorted(rows, key=lambda row: row.input)]
    storage.write_atomic(uri, ("\n".join(lines) + "\n").encode())


def _summary(rows: Iterable[Row], *, kept: int, seconds: float, digest: str) -> Summary:
    rows = list(rows)
    status = Counter(row.status for row in rows)
    return Summary(
        done=status["done"] - kept,
        kept=kept,
        skipped=status["skipped"],
        failed=status["failed"],
        reasons=dict(Counter(row.reason for row in rows if row.reason).most_common()),
        seconds=seconds,
        model_digest=digest,
    )


def report_failures(summary: Summary, *, total: int, limit: float, ledger: str) -> None:
    """Warn about what was not filled; raise `TooManyBadImages` if more than *limit* of *total*, or all, failed."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.reasons.items())
    if summary.failed > limit * total or summary.failed == total:
        raise TooManyBadImages(
            f"{summary.failed} of {total} inputs failed ({reasons}); each one's reason is in {storage.redact(ledger)}",
            reasons=summary.reasons,
        )
    if summary.reasons:
        log.warning("not filled: %s; details in %s", reasons, storage.redact(ledger))


def _stem(key: str) -> str:
    path = PurePosixPath(key)
    return str(path.with_suffix(""))
