"""Measures one part of the set with every method and stores rows, texture samples, features and a receipt.

A part is a stretch of records of one shard. Its files lie below the results; the receipt is written last, and with it
the part is finished, whatever becomes of the job. What a part holds depends on its images alone: on a CPU every image
goes by itself through everything, on one thread.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from pipeline.data.schema import Manifest, Record, open_shard, set_folder
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.external import Results, result_name
from pipeline.evaluation.methods import Filled, Filler, Row
from pipeline.evaluation.networks import ScriptedNetwork
from pipeline.report.pictures import png_bytes
from pipeline.runs.lease import Lease
from pipeline.storage import file_sizes, join, read_bytes
from tmad.checkpoint import load_model
from tmad.inpaint import Inpainter
from tmad.metrics import METRICS, measure
from tmad.swd import SMALLEST_LEVEL, VARIANTS, SlicedWasserstein

ONE_THREAD = {"env_vars": {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}}
"""Runtime environment of everything that computes: sums do not depend on how many processors a machine has."""

TOGETHER = 16
"""Images that the methods get at once."""

RETRIEVAL_METRICS = ("retrieval_top_l1", "retrieval_best_l1", "retrieval_distinct")
"""What `methods.retrieval_metrics` gives of one image."""

FACTS = ("image_id", "key", "variant", "mask_family", "label", "hole_fraction", "method")
"""Columns of the per-image results before the metrics."""


@dataclass(frozen=True)
class Part:
    """A run of records of one shard, beginning at number *start*."""

    index: int
    shard: str
    start: int
    records: int


@dataclass(frozen=True)
class Job:
    """What every worker has to know; made once by the driver."""

    config: EvaluateConfig
    manifest: Manifest
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    """Those that can be had."""
    variants: tuple[int, ...]
    externals: dict[str, Results]
    digest: str
    """Of all that decides the content of a part, besides its images."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why metrics have no figures, by metric."""
    model: str | None = None
    """Digest of the model; none if nothing in the table comes from it."""

    @property
    def images(self) -> int:
        """Of the set, up to `limit`."""
        return min(self.manifest.records, self.config.limit or self.manifest.records)

    @property
    def measured_methods(self) -> list[str]:
        """Names of the rows that get figures."""
        return [row.name for row in self.rows if row.not_measured is None]

    @property
    def has_features(self) -> bool:
        """Whether images go through a feature network."""
        return bool({"fid_full", "kid_full"} & set(self.metrics))

    @property
    def one_image_metrics(self) -> tuple[str, ...]:
        """Those that `tmad.metrics.measure` knows and that are asked for."""
        return tuple(name for name in self.metrics if METRICS[name].function)

    @property
    def row_metrics(self) -> tuple[str, ...]:
        """Columns of the per-image results: metrics of one image that are asked for, or needed for `retrieval_gain`."""
        wanted = {*self.one_image_metrics, *({"lpips_full", *RETRIEVAL_METRICS} & set(self.metrics))}
        if "retrieval_gain" in self.metrics:
            wanted |= set(RETRIEVAL_METRICS)
        return tuple(name for name in METRICS if name in wanted)

    def texture_samples(self) -> SlicedWasserstein | None:
        """A collector for a part or for the whole set; none where the images are too small or nothing was asked for."""
        side = self.manifest.crop_size
        if side < SMALLEST_LEVEL or not set(VARIANTS) & set(self.metrics):
            return None
        return SlicedWasserstein(side=side, seed=self.config.seed, num_images=self.images * len(self.variants))


def plan_parts(manifest: Manifest, config: EvaluateConfig) -> list[Part]:
    """The parts of the set in its order, of `images_per_task` records at most, up to `limit`."""
    parts: list[Part] = []
    left = config.limit or manifest.records
    for shard in manifest.shards:
        for start in range(0, min(shard.rows, left), config.images_per_task):
            records = min(config.images_per_task, min(shard.rows, left) - start)
            parts.append(Part(len(parts), shard.file, start, records))
        left -= min(shard.rows, left)
    return parts


def read_part(data: str, part: Part, manifest: Manifest) -> Iterator[Record]:
    """The records of *part*, a row group at a time."""
    file = open_shard(set_folder(data), part.shard)
    rows = manifest.row_group_rows
    first, end = part.start, part.start + part.records
    for group in range(first // rows, (end - 1) // rows + 1):
        skip = max(0, first - group * rows)
        found = file.read_row_group(group, columns=manifest.columns).slice(skip, end - group * rows - skip)
        yield from (Record(**row) for row in found.to_pylist())


def part_file(index: int, kind: str) -> str:
    """Where a file of part number *index* lies below the results: `rows` are a file of the Parquet data set per_image,
    `json` is the receipt."""
    return f"per_image/{index:06d}.parquet" if kind == "rows" else f"parts/{index:06d}.{kind}"


def finished_parts(job: Job, parts: Sequence[Part], out: str) -> dict[int, dict[str, Any]]:
    """Receipts, by number, of the parts that an earlier call with the same settings finished and whose files are
    whole."""
    there = file_sizes(out)

    def receipt_of(part: Part) -> dict[str, Any] | None:
        if part_file(part.index, "json") not in there:
            return None
        receipt: dict[str, Any] = json.loads(read_bytes(join(out, part_file(part.index, "json"))))
        whole = all(there.get(file) == size for file, size in receipt["files"].items())
        return receipt if whole and receipt["inputs"] == inputs_of(job, part) else None

    with ThreadPoolExecutor(16) as pool:
        return {receipt["index"]: receipt for receipt in pool.map(receipt_of, parts) if receipt}


def inputs_of(job: Job, part: Part) -> str:
    """Digest of all that decides what a part holds."""
    return hashlib.sha256(json.dumps([job.digest, asdict(part)]).encode()).hexdigest()[:16]


def measure_part(task: dict[str, Any], *, files: Any, job: Job, lease: Lease) -> pa.Table:
    """A task of Ray: measure `Part` *task* and write its files, the receipt last, which is `made` as JSON; twice writes
    the same twice. *files*: see `opened`."""
    part = Part(**task)
    filler, networks = opened(files, job)
    names = job.measured_methods
    rows: list[dict[str, Any]] = []
    textures = {name: texture for name in names if (texture := job.texture_samples()) is not None}
    features: dict[str, list[np.ndarray]] = {}
    failed: dict[str, str] = {}
    seconds = dict.fromkeys(names, 0.0)
    written: dict[str, int] = {}

    def write(key: str, data: bytes) -> None:
        lease.write(key, data)
        written[key] = len(data)

    def measure_output(name: str, filled: Filled) -> dict[str, Any]:
        output, truth, mask = filled.outputs[name], filled.truth, filled.mask
        values = dict.fromkeys(job.row_metrics) | filled.retrieval.get(name, {})
        values |= measure(output, truth, mask, job.one_image_metrics, patch_size=job.manifest.patch_size)
        if "lpips" in networks:
            values["lpips_full"] = networks["lpips"].distance(output, truth)
        return values

    items = ((record, variant) for record in read_part(job.config.data, part, job.manifest) for variant in job.variants)
    while some := list(itertools.islice(items, TOGETHER)):
        given = [(one, Filled(one.pixels(), one.mask(variant), one.image_id, variant)) for one, variant in some]
        failed |= {_item_id(filled): "all-hole" for _, filled in given if filled.mask.all()}
        given = [(record, filled) for record, filled in given if not filled.mask.all()]
        filler.fill_all([filled for _, filled in given])
        for record, filled in given:
            facts = facts_of(record, filled.variant, job.manifest)
            if "fid" in networks:
                features.setdefault("", []).append(networks["fid"].features(filled.truth))
            for name, output in filled.outputs.items():
                rows.append({**facts, "method": name, **measure_output(name, filled)})
                seconds[name] += filled.seconds.get(name, 0.0)
                if "fid" in networks:
                    features.setdefault(name, []).append(networks["fid"].features(output))
                if name in textures:
                    textures[name].add(_item_id(filled), output, filled.truth, filled.mask)
                if name in job.config.keep:
                    stem = result_name(record.image_id, filled.variant, manifest=job.manifest)
                    write(f"results/{name}/{stem}.png", png_bytes(output))
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=row_schema(job)), sink)
    write(part_file(part.index, "rows"), sink.getvalue())
    for name, texture in textures.items():
        write(part_file(part.index, f"{name}.textures.npz"), _npz(texture.state()))
    if "fid" in networks:
        stacked = {name or "truth": np.stack(vectors) for name, vectors in features.items()}
        write(part_file(part.index, "features.npz"), _npz(stacked))
    receipt = {
        **{"index": part.index, "inputs": inputs_of(job, part), "files": written, "failed": failed},
        **{"images": part.records, "seconds": seconds},
    }
    text = json.dumps(receipt)
    lease.write(part_file(part.index, "json"), text.encode())
    return pa.table({"made": [text]})


def _item_id(filled: Filled) -> str:
    return f"{filled.image_id}/{filled.variant}" if filled.variant else filled.image_id


def opened(files: Any, job: Job) -> tuple[Filler, dict[str, ScriptedNetwork]]:
    """The methods and the measuring networks in this process, which computes on one thread from now on; kept for the
    next task of the same evaluation.

    *files*: reference to the networks' files: `model` (file by name), `fid` and `lpips`, where there are any.
    """
    torch.set_num_threads(1)
    key = f"{job.digest}-{job.config.cells_per_chunk}"
    if key not in _OPENED:
        _OPENED.clear()
        _OPENED[key] = _open(ray.get(files), job)
    return _OPENED[key]


_OPENED: dict[str, tuple[Filler, dict[str, ScriptedNetwork]]] = {}


def _open(files: Mapping[str, Any], job: Job) -> tuple[Filler, dict[str, ScriptedNetwork]]:
    device = "cuda" if job.config.use_gpu else "cpu"
    inpainter = None
    if files.get("model"):
        with tempfile.TemporaryDirectory(prefix="tmad-model-") as folder:
            for name, content in files["model"].items():
                Path(folder, name).write_bytes(content)
            model = load_model(folder, device=device)
        inpainter = Inpainter(model, cells_per_chunk=job.config.cells_per_chunk, seed=job.config.seed)
    coarse = [name for name, _ in job.config.coarse_folders]
    filler = Filler(job.rows, inpainter, job.externals, coarse, job.manifest, job.config.seed)
    networks = {name: ScriptedNetwork(files[name], device=device) for name in ("fid", "lpips") if files.get(name)}
    return filler, networks


def facts_of(record: Record, variant: int, manifest: Manifest) -> dict[str, Any]:
    """What a row of results says of its image and mask."""
    family = record.mask_family[variant] if record.mask_family else manifest.settings.get("mask", "own")
    return {
        "image_id": record.image_id,
        "key": record.source["key"],
        "variant": variant,
        "mask_family": family,
        "label": record.label,
        "hole_fraction": float(record.mask(variant).mean()),
    }


def row_schema(job: Job) -> pa.Schema:
    """Of the per-image results: `FACTS`, then each metric of one image, without a value where it has none."""
    kinds = {"variant": pa.int64(), "label": pa.int64(), "hole_fraction": pa.float64()}
    facts = [(name, kinds.get(name, pa.string())) for name in FACTS]
    return pa.schema([*facts, *((name, pa.float64()) for name in job.row_metrics)])


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, **arrays)  # type: ignore[arg-type]
    return sink.getvalue()


def read_npz(uri: str) -> dict[str, np.ndarray]:
    """The arrays that a part kept, by name."""
    with np.load(io.BytesIO(read_bytes(uri)), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
