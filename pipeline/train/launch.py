"""From a configuration to a finished run: the only place that builds Ray's `TorchTrainer`.

`runs/<name>/` holds `config.json`, `environment.json`, `tracking.json`, `metrics.jsonl`, `checkpoints/`, `best/`, and
at the end `model/` and `finished.json`; with `init_from` also what was taken from that model. The same command with the
same name goes on where the run stands: at its newest checkpoint, at the final steps, or nowhere when `finished.json` is
there.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer

from pipeline import storage
from pipeline.config import RunConfig, digest, from_json, refusal, to_json, with_name
from pipeline.data.onthefly import Photographs, open_photographs, share
from pipeline.data.reader import start_reader
from pipeline.data.schema import Manifest, read_manifest
from pipeline.errors import CheckpointsDamaged, ConfigMismatch, Interrupted, TMADError, TrainingFailed, one_line
from pipeline.models import absolute_model
from pipeline.models.card import CARD_FILE, model_card
from pipeline.models.pretrained import resolve_perceptual
from pipeline.models.registry import reference, register_model
from pipeline.runs.cluster import joined, require, start_ray
from pipeline.runs.lease import Lease, lease_folder
from pipeline.runs.settings import refuse
from pipeline.tracking import Tracker, check_tracking, resolve_tracking_uri, wait_for_tracking
from pipeline.tracking.environment import code_state, code_tags, environment
from pipeline.train.checkpoints import forget_broken_records
from pipeline.train.early_stopping import best_kept
from pipeline.train.footprint import run_bytes
from pipeline.train.initial import REPORT_FILE, WEIGHTS_FILE, KeptWeights, keep_initial, kept_initial
from pipeline.train.log_relay import relayed_logs
from pipeline.train.preemption import NoticingTorchConfig, Stop, signals_stop
from pipeline.train.worker import work
from tmad.checkpoint import model_digest

SWEEP_FILE = "sweep.json"
"""The configuration of a sweep or an ablation, in its folder."""

TRACKING_FILE = "tracking.json"
"""In the folder of a run or a sweep: its run in MLflow. It continues without a server that answered once."""

SETS_FILE = "data.json"
"""In the run's folder: digests of the sets that it was begun with."""

CPUS_FOR_DATA = 1
"""Kept free beside the workers: without one, Ray Data never gets a turn and the job stands still."""

KEEP_FREED_PAGES = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
"""Environment of the training workers: glibc keeps pages between steps instead of handing them back. Ray Train runs the
loop in a thread of its own, where glibc would map and unmap every tensor: a step took 1.4 times as long (2 cores)."""

log = logging.getLogger(__name__)


def train(config: RunConfig, callbacks: Sequence[UserCallback] = (), *, wait_s: float = 0.0) -> dict[str, Any]:
    """Train, keep and register a model; returns the content of `finished.json`. *callbacks* are told of each
    checkpoint, with the metrics of the validation before it. A job that has the name is waited for, *wait_s* at most.

    Raises `ConfigMismatch` if the name belongs to a run with other settings or other data, `ClusterTooSmall`,
    `TrainingFailed` with the cause and the newest checkpoint, `Interrupted` when a signal stopped it,
    `MissingInput` for data or weights that are not there, `ValueError` for a data set that does not fit the model,
    `FolderInUse` while another job trains under that name, and what `initial.find_initial` raises.
    """
    config = resolve(config)
    assert config.name is not None
    folder = storage.join(config.runs, config.name)
    with lease_folder(folder, wait_s=wait_s) as lease:
        return _train(config, folder, lease, callbacks)


def _train(config: RunConfig, folder: str, lease: Lease, callbacks: Sequence[UserCallback]) -> dict[str, Any]:
    check_name(folder)
    finished = storage.read_json(storage.join(folder, "finished.json"))
    train_set, photographs = open_training_set(config, folder)
    sets = {"train": train_set, "val": read_manifest(config.data.validation_set)}
    for which, manifest in sets.items():
        check_set(config, manifest, which)
    tracking_uri = resolve_tracking_uri(config.tracking.uri, config.runs)
    _begin(folder, config, sets, tracking_uri)
    if finished is not None:
        log.info("run %s is finished: %s; nothing to do", config.name, storage.join(folder, "finished.json"))
        return finished

    room_for_run(config, run_bytes(config))
    if not storage.exists(storage.join(folder, TRACKING_FILE)):
        check_tracking(tracking_uri)
    weights = resolve_perceptual(config)
    start_ray()
    require(
        resources(config),
        "--workers.num-workers or --workers.cpus-per-worker",
        wait_s=config.workers.start_timeout_s if joined() else 0.0,
    )
    initial = kept_initial(config, folder)
    run_id = _open_tracking(folder, config, tracking_uri, sets, initial)
    log.info("run %s: %s", config.name, plan(config, sets["train"]))
    began = time.time()
    metrics = storage.join(folder, "metrics.jsonl")
    job = {
        "config": to_json(config),
        "weights": weights,
        "tracking_uri": tracking_uri,
        "run_id": run_id,
        "metrics": metrics,
        "checkpoints": storage.join(folder, "checkpoints"),
        "best": storage.join(folder, "best"),
        "lease": lease,
        "live": share(photographs, train_set) if photographs else None,
        "reader": start_reader() if config.workers.num_workers > 1 else None,
        "initial": KeptWeights(storage.join(folder, WEIGHTS_FILE), initial["digest"]) if initial else None,
    }
    try:
        with relayed_logs() as relay, signals_stop(relay, config.workers.stop_grace_s) as stop:
            summary = _fit(folder, config, {**job, "relay": relay}, callbacks, stop)
        wait_for_tracking(tracking_uri, config.tracking.wait_s)
        Tracker(tracking_uri, run_id).catch_up(metrics)
        lease.check()  # a server may have been waited for
        finished = _finish(folder, config, summary, sets, tracking_uri, run_id)
    except BaseException as error:
        told_to_end = isinstance(error, KeyboardInterrupt | Interrupted)
        Tracker(tracking_uri, run_id).finish("KILLED" if told_to_end else "FAILED")
        raise
    Tracker(tracking_uri, run_id).finish("FINISHED")
    log.info("run %s finished in %.0f s: model %s", config.name, time.time() - began, finished["model"])
    if best := finished["best"]:
        log.info(
            "best %s was %.4g after %s images: %s", best["metric"], best["value"], f"{best['images']:,}", best["model"]
        )
    return finished


def resolve(config: RunConfig) -> RunConfig:
    """The configuration as any process understands it: a name, and absolute places, since workers have other working
    directories."""
    name = config.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    perceptual = config.perceptual
    if perceptual.weights != "download":
        perceptual = replace(perceptual, weights=storage.absolute(perceptual.weights))
    train, images = config.data.training_set, config.data.images
    data = replace(
        config.data,
        train=train and storage.absolute(train),
        val=storage.absolute(config.data.validation_set),
        images=images.with_absolute_places(),
        coarse_from=config.data.coarse_from and storage.absolute(config.data.coarse_from),
    )
    init_from = absolute_model(config.init_from) if config.init_from else None
    runs = storage.absolute(config.runs)
    return replace(with_name(config, name), runs=runs, init_from=init_from, data=data, perceptual=perceptual)


def plan(config: RunConfig, train_set: Manifest | None = None) -> str:
    """What is going to happen, in a line."""
    schedule, workers = config.schedule, config.workers
    steps = math.ceil(schedule.total_images / schedule.batch_images)
    share = schedule.batch_images // workers.num_workers
    number = f"{workers.num_workers}" if workers.min_workers is None else f"{workers.fewest} to {workers.num_workers}"
    of = f" of {train_set.records:,} records" if train_set is not None else ""
    device = "GPU" if workers.use_gpu else f"CPU, threads {config.threads}"
    return (
        f"{number} workers ({device}, {config.precision}), {schedule.batch_images} images a step "
        f"({share} a worker), {schedule.coarse_images:,} images coarse, then {schedule.joint_images:,} jointly{of}: "
        f"{steps:,} steps; checkpoint every {schedule.checkpoint_every_images:,} images, "
        f"validation every {schedule.validate_every_images:,}"
    )


def open_training_set(config: RunConfig, folder: str | None) -> tuple[Manifest, Photographs | None]:
    """The manifest of what is trained on, and the photographs if no prepared set is; where these lie in tar files is
    kept in *folder*."""
    if config.data.training_set is not None:
        return read_manifest(config.data.training_set), None
    model = config.model
    photographs = open_photographs(config.data.images, patch_size=model.patch_size, memory=model.memory, cache=folder)
    return photographs.manifest(), photographs


def check_set(config: RunConfig, manifest: Manifest, which: str) -> None:
    """Raise `ValueError` if the set, prepared or of photographs, does not fit the model."""
    place = config.data.training_set if which == "train" else config.data.validation_set
    uri = storage.redact(place or "")
    model = config.model
    if manifest.patch_size != model.patch_size:
        raise ValueError(
            f"data.{which} was prepared for patch_size {manifest.patch_size}, model.patch_size is {model.patch_size}: "
            f"its memory points at other windows; prepare {uri} again or change the model"
        )
    memory, prepared = asdict(model.memory), manifest.settings["memory"]
    # Of a larger memory the first windows are taken: they are those that a smaller one would have.
    if {**prepared, "pool_size": 0} != {**memory, "pool_size": 0} or prepared["pool_size"] < memory["pool_size"]:
        raise ValueError(
            f"data.{which} was prepared with memory {prepared}, model.memory is {memory}; a set serves its own "
            f"memory.pool_size and smaller ones: prepare {uri} again or change the model"
        )
    if manifest.crop_size % model.size_multiple:
        remedy = f"prepare {uri} with another crop_size" if place else "set another data.images.crop_size"
        raise ValueError(
            f"data.{which} has crops of {manifest.crop_size} pixels; the model needs a multiple of "
            f"{model.size_multiple} (patch_size and 2^coarse.num_down_blocks): {remedy}"
        )
    if config.data.coarse_from is not None and manifest.num_variants > 1:
        raise ValueError(
            f"data.{which} has {manifest.num_variants} masks an image, data.coarse_from one result: prepare {uri} with "
            "masks_per_image 1"
        )
    cells = (manifest.crop_size // model.patch_size) ** 2
    if config.schedule.patches_per_image > cells:
        raise ValueError(
            f"schedule.patches_per_image is {config.schedule.patches_per_image}, but a crop of {manifest.crop_size} "
            f"pixels has {cells} cells"
        )


def _begin(folder: str, config: RunConfig, manifests: Mapping[str, Manifest], tracking_uri: str | None) -> None:
    """Write the run's configuration and keep the weights that it starts from, or check that it can be continued."""
    sets = {which: manifest.digest for which, manifest in manifests.items()}
    config_uri = storage.join(folder, "config.json")
    if not was_begun(folder, config, manifests):
        storage.write_atomic(storage.join(folder, SETS_FILE), json.dumps(sets, indent=2).encode())
        initial = keep_initial(config, folder, tracking_uri) if config.init_from else None
        storage.write_atomic(storage.join(folder, "environment.json"), _environment(config, sets, initial))
        # Last, as it makes the folder a run.
        storage.write_atomic(config_uri, to_json(config).encode())
        return
    storage.write_atomic(config_uri, to_json(config).encode())
    log.info("run %s was begun before: going on with it", config.name)


def check_name(folder: str) -> None:
    """Raise `ConfigMismatch` if *folder* holds a sweep."""
    if storage.exists(storage.join(folder, SWEEP_FILE)):
        raise ConfigMismatch(f"{storage.redact(folder)} holds a sweep, not a run: take another --name")


def was_begun(folder: str, config: RunConfig, manifests: Mapping[str, Manifest]) -> bool:
    """Whether the run in *folder* was begun before. Raises `ConfigMismatch` if with another configuration or other
    data."""
    config_uri = storage.join(folder, "config.json")
    if not storage.exists(config_uri):
        return False
    old = from_json(storage.read_bytes(config_uri))
    lines = refusal(old, config)
    begun_with = storage.read_json(storage.join(folder, SETS_FILE)) or {}
    lines += [
        f"{_content_of(config, which)} {begun_with.get(which)} -> {one.digest}, {one.images_listed:,} images now"
        for which, one in manifests.items()
        if begun_with.get(which) != one.digest
    ]
    refuse(
        f"run {config.name} in {storage.redact(config.runs)}",
        lines,
        "take another --name, or the old settings to continue",
    )
    return True


def place_of(config: RunConfig, which: str) -> str:
    """Where the set `train` or `val`, or the photographs, are, for people."""
    place = config.data.training_set if which == "train" else config.data.validation_set
    return storage.redact(place or config.data.images.source or "")


def _content_of(config: RunConfig, which: str) -> str:
    live = which == "train" and config.data.training_set is None
    return (
        "data.images.source: names or sizes of the photographs, or names of their masks"
        if live
        else f"data.{which}: content"
    )


def _environment(config: RunConfig, sets: Mapping[str, str], initial: Mapping[str, Any] | None) -> bytes:
    more = {"init_digest": initial["digest"]} if initial else {}
    content = environment(config_digest=digest(config), data_digests=dict(sets), **more)
    return (json.dumps(content, indent=2) + "\n").encode()


def room_for_run(config: RunConfig, size: int) -> str:
    """How what the run has yet to write of its *size* bytes fits into what is free, in words. Raises `StorageFailed`
    if it does not."""
    there = sum(storage.file_sizes(storage.join(config.runs, config.name)).values()) if config.name else 0
    return storage.check_room(config.runs, size - there, "checkpoints and models", "--runs")


def resources(config: RunConfig) -> dict[str, float]:
    """What the cluster must have."""
    workers = config.workers
    cpus = {"CPU": workers.fewest * workers.cpus_per_worker + CPUS_FOR_DATA}
    return {**cpus, "GPU": workers.fewest * workers.gpus_per_worker} if workers.use_gpu else cpus


def _open_tracking(
    folder: str,
    config: RunConfig,
    tracking_uri: str | None,
    sets: Mapping[str, Manifest],
    initial: Mapping[str, Any] | None,
) -> str | None:
    """The id of this run's MLflow run: the one it had before, or a new one."""
    uri = storage.join(folder, TRACKING_FILE)
    before = storage.read_json(uri)
    if before is not None and before["uri"] == tracking_uri:
        known: str | None = before["run_id"]
        return known
    assert config.name is not None
    tags = code_tags() | {"config_digest": digest(config)}
    tags |= {f"data_{which}": one.digest for which, one in sets.items()}
    if config.tracking.parent_run is not None:
        tags["mlflow.parentRunId"] = config.tracking.parent_run
    if initial is not None:
        tags |= {"init_digest": initial["digest"], "init_model": initial["model_digest"]}
    run_id = Tracker.create(tracking_uri, config.tracking.experiment, config.name, asdict(config), tags)
    tracker = Tracker(tracking_uri, run_id)
    for which, one in sets.items():
        tracker.dataset(place_of(config, which), one.digest, "training" if which == "train" else "validation")
    for name in ("config.json", "environment.json", *([REPORT_FILE] if initial is not None else [])):
        tracker.artifact(storage.read_bytes(storage.join(folder, name)), name)
    storage.write_atomic(uri, json.dumps({"uri": tracking_uri, "run_id": run_id}, indent=2).encode())
    return run_id


class _Trainer(TorchTrainer):
    """Ray's trainer without its handler of Ctrl-C, which ends the workers at once and takes the place of ours."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


def _fit(
    folder: str, config: RunConfig, job: dict[str, Any], callbacks: Sequence[UserCallback], stop: Stop
) -> dict[str, Any]:
    workers = config.workers
    each = {"CPU": workers.cpus_per_worker, **({"GPU": workers.gpus_per_worker} if workers.use_gpu else {})}
    # Type checkers are shown the older classes behind these names, which lack some of the arguments.
    failures: dict[str, Any] = {
        "max_failures": workers.max_failures,
        "controller_failure_limit": workers.controller_failure_limit,
    }
    # Arguments that Ray's annotation of the class leaves out. Its own notes on each checkpoint and worker group say the
    # same as ours.
    more: dict[str, Any] = {
        "callbacks": list(callbacks),
        "logging_config": LoggingConfig(log_level="WARNING"),
        "worker_runtime_env": {"env_vars": KEEP_FREED_PAGES},
    }
    path, file_system = storage.for_ray(folder)
    # Ray's annotation leaves out the pair: fewest and most.
    number: Any = workers.num_workers if workers.min_workers is None else (workers.fewest, workers.num_workers)
    worker: Any = work  # Ray's annotation allows no result, its `Result.return_value` carries one.
    trainer = _Trainer(
        worker,
        train_loop_config=job,
        torch_config=NoticingTorchConfig(),
        scaling_config=ScalingConfig(num_workers=number, use_gpu=workers.use_gpu, resources_per_worker=each),
        run_config=RayRunConfig(
            # Ray keeps checkpoints in <storage_path>/<name>/, and by that name finds them again after a restart.
            name="checkpoints",
            storage_path=path,
            storage_filesystem=file_system,
            failure_config=FailureConfig(**failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.schedule.keep_checkpoints),
            **more,
        ),
    )
    forget_broken_records(storage.join(folder, "checkpoints"))
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingFailed(f"training stopped: {_cause(error)}; {_how_to_go_on(folder)}") from error
    summary: dict[str, Any] = result.return_value
    if "damaged" in summary:
        raise CheckpointsDamaged(summary["failed"], damaged=summary["damaged"])
    if "interrupted" in summary:
        raise Interrupted(
            f"{summary['interrupted']}; the same command with --name {config.name} continues where it stopped",
            signal=stop.number,
        )
    if "failed" in summary:
        raise TrainingFailed(f"training stopped: {summary['failed']}; {_how_to_go_on(folder)}", not_finite=True)
    return summary


def _finish(
    folder: str,
    config: RunConfig,
    summary: dict[str, Any],
    sets: Mapping[str, Manifest],
    tracking_uri: str | None,
    run_id: str | None,
) -> dict[str, Any]:
    """Put the model and its card beside the checkpoints, register it, and write `finished.json`, last of all."""
    model_uri = storage.join(folder, "model")
    artifact = storage.local_copy(storage.join(folder, "checkpoints", summary["checkpoint"], "model"))
    storage.upload_folder(artifact, model_uri)
    named = config.tracking.registered_name
    card = model_card(config, summary, name=named, model_digest=model_digest(artifact), sets=sets, code=code_state())
    storage.write_atomic(storage.join(model_uri, CARD_FILE), card.encode())
    Tracker(tracking_uri, run_id).artifact(card.encode(), f"model_card/{CARD_FILE}")
    registered: dict[str, Any] | None = None
    if config.tracking.register and tracking_uri is not None and run_id is not None:
        alias = config.tracking.alias
        version = register_model(artifact, tracking_uri=tracking_uri, run_id=run_id, name=named, alias=alias, card=card)
        registered = reference(tracking_uri, named, version, alias)
    finished = {
        **summary,
        "best": best_kept(storage.join(folder, "best"), config.schedule.best_metric),
        "name": config.name,
        "model": model_uri,
        "model_digest": model_digest(artifact),
        "registered": registered,
        "tracking_uri": None if tracking_uri is None else storage.redact(tracking_uri),
        "mlflow_run_id": run_id,
        "perceptual": config.perceptual.features,
        "config_digest": digest(config),
    }
    storage.write_atomic(storage.join(folder, "finished.json"), (json.dumps(finished, indent=2) + "\n").encode())
    return finished


def _cause(error: TrainingFailedError) -> str:
    """The first worker's own message, without Ray's tracebacks around it."""
    causes = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else [error]
    # A worker that raised says more than those that then lost their connection to it.
    causes.sort(key=lambda one: not isinstance(_root(one), TMADError | ValueError))
    root = _root(causes[0]) if causes else error
    return storage.redact(f"{type(root).__name__}: {one_line(root)}")


def _root(error: BaseException) -> BaseException:
    """What Ray's wrappers are about."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    return error


def _how_to_go_on(folder: str) -> str:
    name = folder.rsplit("/", 1)[-1]
    checkpoints = storage.join(folder, "checkpoints")
    names = {key.split("/", 1)[0] for key in storage.list_files(checkpoints)} if storage.exists(checkpoints) else set()
    kept = sorted(one for one in names if one.startswith("images_"))
    newest = (
        f"the newest checkpoint is {storage.redact(storage.join(checkpoints, kept[-1]))}"
        if kept
        else "no checkpoint yet"
    )
    return f"{newest}; the same command with --name {name} continues from there"
