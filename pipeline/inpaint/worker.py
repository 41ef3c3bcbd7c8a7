"""One replica of the model: prefetches, fills, writes behind, and adds a task's rows to the ledger.

Decoding with all that precedes the networks, and what follows them to the written file, run in threads of their own:
while the device computes, the next images are made ready and the last ones are encoded.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from PIL import Image

from pipeline.data.collection import OUTAGES
from pipeline.data.sources.base import Source
from pipeline.data.sources.prefetch import read_ahead
from pipeline.data.sources.tree import ImageTree
from pipeline.data.user_masks import stem_of
from pipeline.errors import MissingInput, StorageFailed
from pipeline.inpaint.config import InpaintConfig
from pipeline.inpaint.holes import NO_HOLE, Holes
from pipeline.inpaint.ledger import PARTS, Row, encode, left_behind, to_table
from pipeline.runs.lease import Lease
from pipeline.storage import UnsafeName, absolute, is_remote, join, write_atomic
from tmad.checkpoint import load_model
from tmad.files import ENDINGS, ImageFile, allow_pixels, encode_filled, open_file
from tmad.holes import MaskPolarityWarning, UnusableInput, polarity_notes
from tmad.images import PICTURES, UnreadableImage, decode_image
from tmad.inpaint import Inpainter, Prepared

WRITERS = 4
"""Results on their way to storage at once, at least."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What all copies share; picklable."""

    config: InpaintConfig
    """With absolute places."""
    source: Source
    holes: Holes
    coarse: Source | None
    """Results of another method."""
    coarse_names: dict[str, str]
    """Their keys by stem."""
    lease: Lease
    token: str
    """Tells the files of this run's tasks from those of earlier ones."""
    model: str
    model_digest: str
    identity: str
    earlier: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Results of earlier calls that are still there, with their sizes, by the inputs that are done again."""


@dataclass(frozen=True)
class _Loaded:
    file: ImageFile
    hole: np.ndarray
    prepared: Prepared


@dataclass(frozen=True)
class _Copied:
    row: Row
    data: bytes


@dataclass
class _Image:
    """One on its way."""

    key: str
    state: _Loaded | _Copied | Row
    """A row where it has come to its end."""
    seconds: float
    """Spent on it so far."""

    @property
    def pixels(self) -> int:
        """That the networks will see."""
        parts = self.state.prepared.parts if isinstance(self.state, _Loaded) else []
        return sum(part.pixels for part in parts)


def make_inpainter(folder: Path | str, config: InpaintConfig, *, device: str) -> Inpainter:
    """The model in *folder* with the settings of a job. Raises `ValueError` for a damaged model, and for settings that
    do not fit it."""
    return Inpainter(
        load_model(folder, device=device),
        precision=config.precision,
        policy=config.policy,
        context=config.context,
        limit=config.limit,
        feather=config.feather,
        cells_per_chunk=config.cells_per_chunk,
        seed=config.seed,
        keep_candidates=False,
    )


class InpaintWorker:
    """An actor of Ray Data: holds the model, works through a task a call, returns its rows of the ledger."""

    def __init__(self, model_files: Any, job: Job) -> None:
        """*model_files*: the artifact's files by name, or a reference to them, so that no node needs the place they
        came from."""
        config = job.config
        # What it says stands in the ledger.
        warnings.filterwarnings("ignore", category=MaskPolarityWarning)
        torch.set_num_threads(max(1, int(config.cpus_per_actor or 1)))
        allow_pixels(config.max_pixels)
        files = ray.get(model_files) if isinstance(model_files, ray.ObjectRef) else model_files
        with tempfile.TemporaryDirectory(prefix="tmad-model-") as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            self.inpainter = make_inpainter(folder, config, device="cuda" if config.use_gpu else "cpu")
        self.threads = max(1, int(config.cpus_per_actor or 1)) if config.use_gpu else 1
        self.job = job

    def __call__(self, block: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        """Tasks as JSON in, a table of rows for each out."""
        for text in block["task"]:
            yield self.work(json.loads(text))

    def work(self, task: dict[str, Any]) -> pa.Table:
        """Fill the images of task number `number`, the keys of `made_of`; what is wrong with one of them is its row. An
        outage of storage ends the task."""
        self.made_of: dict[str, str] = task["made_of"]
        rows: list[Row] = []
        encoded: deque[Future[tuple[Row, bytes | None]]] = deque()
        written: deque[Future[Row]] = deque()
        with (
            ThreadPoolExecutor(self.threads, "load") as loading,
            ThreadPoolExecutor(self.threads, "encode") as encoding,
            ThreadPoolExecutor(max(WRITERS, self.threads), "write") as writing,
        ):

            def settle(unencoded: int, unwritten: int) -> None:
                """Bound the results under way: they hold pixels, then files."""
                while len(encoded) > unencoded:
                    written.append(writing.submit(self._write, *encoded.popleft().result()))
                while len(written) > unwritten:
                    rows.append(written.popleft().result())

            coming = (
                loading.submit(self._timed_load, key, read)
                for key, read in read_ahead(self.job.source, list(self.made_of))
            )
            for images in self._together(_ahead(coming, 2 * self.threads - 1)):
                self._compute(images)
                encoded.extend(encoding.submit(self._encode, image) for image in images)
                settle(self.threads, max(WRITERS, self.threads))
            settle(0, 0)
        table = to_table(rows)
        self.job.lease.write(f"{PARTS}/{self.job.token}-{task['number']:07d}.parquet", encode(table))
        return table

    def _together(self, coming: Iterator[_Image]) -> Iterator[list[_Image]]:
        """Images in groups that fill the device."""
        images: list[_Image] = []
        for image in coming:
            images.append(image)
            if sum(one.pixels for one in images) >= self.inpainter.pixels_at_once:
                yield images
                images = []
        if images:
            yield images

    def _timed_load(self, key: str, read: Callable[[], bytes]) -> _Image:
        began = time.monotonic()
        return _Image(key, self._guarded(key, lambda: self._load(key, read)), time.monotonic() - began)

    def _load(self, key: str, read: Callable[[], bytes]) -> _Loaded | _Copied:
        job, config = self.job, self.job.config
        self._check_name(key)
        data = read()
        try:
            file = open_file(data, max_pixels=config.max_pixels)
            hole = job.holes.of(key, file, max_pixels=config.max_pixels)
        except UnreadableImage as error:
            if error.reason in NO_HOLE and config.without_hole == "copy":
                facts = {"reason": error.reason, "detail": "copied as it is"}
                return _Copied(self._row(key, "skipped", output=key, bytes=len(data), **facts), data)
            raise
        notes = polarity_notes(hole, "")
        if notes and config.refuse_inverted:
            raise UnreadableImage("inverted-mask", notes[0])
        coarse = None
        if job.coarse is not None:
            name = job.coarse_names.get(stem_of(key))
            if name is None:
                raise UnreadableImage("no-coarse", f"no result named {stem_of(key)}.* in {config.coarse_from}")
            coarse = decode_image(job.coarse.read(name), max_pixels=config.max_pixels)
        return _Loaded(file, hole, self.inpainter.prepare(file.image, hole, image_id=key, filled=coarse))

    def _compute(self, images: list[_Image]) -> None:
        """Take loaded images through the networks; one of them that cannot be computed costs no other its result."""
        began = time.monotonic()
        loaded = {image.key: image.state.prepared for image in images if isinstance(image.state, _Loaded)}
        try:
            self.inpainter.compute(list(loaded.values()))
        except Exception:
            for image in images:
                if image.key in loaded:
                    alone = partial(self.inpainter.compute, [loaded[image.key]])
                    image.state = self._guarded(image.key, alone) or image.state
        for image in images:
            image.seconds += (time.monotonic() - began) / len(images)

    def _encode(self, image: _Image) -> tuple[Row, bytes | None]:
        """The row of an image, and the file that is its result, if it has one."""
        if isinstance(image.state, Row):
            return replace(image.state, seconds=image.seconds), None
        began = time.monotonic()
        made = self._guarded(image.key, lambda: self._result(image))
        row, data = (made, None) if isinstance(made, Row) else made
        return replace(row, seconds=image.seconds + time.monotonic() - began), data

    def _result(self, image: _Image) -> tuple[Row, bytes]:
        config, loaded = self.job.config, image.state
        if isinstance(loaded, _Copied):
            return loaded.row, loaded.data
        assert isinstance(loaded, _Loaded), "a row has no result"
        file = loaded.file
        filled = encode_filled(
            file,
            loaded.hole,
            self.inpainter.finish(loaded.prepared),
            feather=config.feather,
            opaque=config.mask_from == "alpha",
            kind=config.format,
        )
        row = self._row(
            image.key,
            "done",
            output=output_key(image.key, config, file.format),
            detail="; ".join(dict.fromkeys([*filled.notes, *_misnamed(image.key, config, file.format)])) or None,
            hole_fraction=filled.result.hole_fraction,
            height=file.image.height,
            width=file.image.width,
            bytes=len(filled.data),
        )
        return row, filled.data

    def _write(self, row: Row, data: bytes | None) -> Row:
        """Put a result in its place; the row of what came of it."""
        if data is None:
            return row
        began = time.monotonic()
        place = join(self.job.config.output, row.output or "")
        refused = self._guarded(row.input, lambda: write_atomic(place, data))
        return refused or replace(row, seconds=(row.seconds or 0) + time.monotonic() - began)

    def _guarded(self, key: str, call: Callable[[], Any]) -> Any:
        """What *call* returns, or the row that says why it could not."""
        try:
            return call()
        except UnreadableImage as error:
            reason, detail = error.reason, error.detail
            status = "skipped" if reason in NO_HOLE else "failed"
            return self._row(key, status, reason=reason, detail=detail)
        except UnsafeName as error:
            return self._row(key, "failed", reason="unsafe-name", detail=str(error))
        except UnusableInput as error:
            return self._row(key, "failed", reason=error.reason, detail=str(error))
        except (StorageFailed, MissingInput) as error:
            if error.details.get("kind") in OUTAGES:
                raise
            reason = "missing" if isinstance(error, MissingInput) else "storage"
            return self._row(key, "failed", reason=reason, detail=str(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            return self._row(key, "failed", reason="memory", detail=str(error) or "not enough memory")
        except Exception as error:
            log.exception("unexpected error in %s", key)
            return self._row(key, "failed", reason="unexpected", detail=f"{type(error).__name__}: {error}")

    def _row(self, key: str, status: Any, **facts: Any) -> Row:
        job = self.job
        mask = job.holes.named(key) or None
        identity: dict[str, Any] = {"model": job.model, "model_digest": job.model_digest, "identity": job.identity}
        made_of = self.made_of.get(key)
        row = Row(input=key, status=status, when=time.time(), mask=mask, made_of=made_of, **identity, **facts)
        return left_behind(row, *job.earlier[key]) if row.output is None and key in job.earlier else row

    def _check_name(self, key: str) -> None:
        """Refuse names that lead out of a folder, by themselves or through a link."""
        config = self.job.config
        try:
            join(config.output, key)
        except UnsafeName as error:
            raise UnreadableImage("unsafe-name", str(error)) from None
        if any(part.startswith(".") for part in key.split("/")):
            # Results are found again by a listing, which hidden files are not in.
            raise UnreadableImage("unsafe-name", f"a part of the name is hidden: {key!r}")
        places = {"output": config.output} | (
            {"input": self.job.source.uri} if isinstance(self.job.source, ImageTree) else {}
        )
        for what, folder in places.items():
            if not is_remote(folder) and (link := _link_below(absolute(folder), key)):
                raise UnreadableImage("link", f"{link} in the {what} is a symbolic link")


def _ahead(coming: Iterator[Future[_Image]], number: int) -> Iterator[_Image]:
    """What is *coming*, in order, with a number of others under way behind the one that is waited for."""
    pending: deque[Future[_Image]] = deque()
    for one in coming:
        pending.append(one)
        if len(pending) > number:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def output_key(key: str, config: InpaintConfig, file_format: str) -> str:
    """The key of an image's result."""
    if config.format == "png":
        return stem_of(key) + ".png"
    return key if key.lower().endswith(PICTURES) else key + ENDINGS.get(file_format, "")


def _misnamed(key: str, config: InpaintConfig, file_format: str) -> list[str]:
    """A note where a name says another format than the file has: the result keeps both."""
    ending = os.path.splitext(key)[1].lower()
    kinds = {suffix: kind for suffix, kind in Image.registered_extensions().items() if suffix in PICTURES}
    said = {"MPO": "JPEG"}.get(file_format, file_format)
    if config.format == "png" or ending not in kinds or kinds[ending] in (said, file_format):
        return []
    return [f"the name ends in {ending}, the file is {said}"]


def _link_below(folder: str, key: str) -> str | None:
    parts = key.split("/")
    paths = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    return next((path for path in paths if os.path.islink(os.path.join(folder, path))), None)
