"""From a sweep's configuration to its winner: the only place that builds Ray's `Tuner`.

`runs/<name>/` holds `sweep.json`, `coarse/` (the run that all trials start from), `trials/<id>/` (a run each), `tune/`
(Ray Tune's own records), and at the end `report.html`, `winner.json` and `summary.json`, the last of all. The same
command with the same name continues it: trials that ended are kept, others continue from their checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipeline import storage
from pipeline.config import to_json
from pipeline.data.schema import read_manifest
from pipeline.errors import ClusterTooSmall, ConfigMismatch, Interrupted, SweepFailed, one_line
from pipeline.models import absolute_model, locate_model
from pipeline.runs.cluster import require, shortage, shown, start_ray
from pipeline.runs.lease import lease_folder
from pipeline.runs.settings import settle
from pipeline.storage.whole import whole_files
from pipeline.sweep.config import DISTORTION, TEXTURE, SweepConfig, direction
from pipeline.sweep.space import Choice, Domain, Point, Space, apply, make_space, sample
from pipeline.sweep.summary import REPORT_FILE, write_summary
from pipeline.sweep.trial import DRIVER_CPUS, ERROR_FILE, TRIALS_FOLDER, Job, encode, run_trial, trial_folder
from pipeline.sweep.trials import Trial, importance, pareto, read_trial, winner
from pipeline.tracking import Tracker, check_tracking, mlflow_client, read_json_lines, resolve_tracking_uri
from pipeline.train.footprint import run_bytes
from pipeline.train.launch import (
    CPUS_FOR_DATA,
    SWEEP_FILE,
    TRACKING_FILE,
    check_set,
    open_training_set,
    resources,
    train,
)
from pipeline.train.launch import resolve as resolve_run

SUMMARY_FILE, WINNER_FILE = "summary.json", "winner.json"

NAMES_FILE = "trials.json"

TUNE_FOLDER = "tune"

FREE_TO_CHANGE = ("num_pictures",)
"""Settings that may differ when a sweep is resumed. Tune keeps the settings it was started with, workers included."""

TRIAL_ATTEMPTS = 2
"""Restarts of a trial whose function fails, each from its newest checkpoint."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A sweep that has ended."""

    folder: str
    trials: list[Trial]
    summary: dict[str, Any]


def resolve(config: SweepConfig) -> SweepConfig:
    """With absolute places, as trials run in other working directories."""
    init_from = absolute_model(config.init_from) if config.init_from else None
    return replace(config, init_from=init_from, run=replace(resolve_run(config.run), name=None))


def sweep_folder(config: SweepConfig) -> str:
    """Of a resolved sweep."""
    return storage.join(config.run.runs, config.name)


def sweep(config: SweepConfig) -> Finished:
    """Run the trials of *config*, or those that are left, compare them, and write summary, report and winner.

    Raises `ConfigMismatch` if the name belongs to another sweep, `ClusterTooSmall` if there is no room for one trial,
    `SweepFailed` with the error of a trial that failed, or when no trial came to its end, and what `train` raises for
    the coarse phase.
    """
    config = resolve(config)
    space = make_space(config.space, config.run)
    points = sample(space, config.trials, config.seed) if config.search == "random" else None
    folder = sweep_folder(config)
    with lease_folder(folder):
        done = run_trials(config, space, points, kind="sweep")
        if done.summary:
            log.info("sweep %s is finished: %s; nothing to do", config.name, storage.redact(folder))
            return done
        objective = config.objectives[0]
        best = winner(done.trials, objective)
        if best is None:
            raise SweepFailed(f"no trial of sweep {config.name} came to its end; {told(done.trials)}")
        storage.write_atomic(storage.join(folder, WINNER_FILE), to_json(apply(config.run, best.point)).encode())
        axes = config.objectives if len(config.objectives) > 1 else (DISTORTION, TEXTURE)
        summary = {
            "name": config.name,
            "objectives": list(config.objectives),
            "space": {name: str(domain) for name, domain in space.items()},
            "winner": {"number": best.number, "name": best.name, "point": best.point, "metrics": best.metrics},
            "pareto": [one.number for one in pareto(done.trials, axes)],
            "importance": importance(done.trials, objective),
            "trials": [one.as_dict() for one in done.trials],
        }
        write_summary(config, folder, done.trials, space, summary)
        finish(config, done, summary, (REPORT_FILE, WINNER_FILE))
    value, place = best.metrics[objective], storage.redact(storage.join(folder, WINNER_FILE))
    log.info("sweep %s: %s wins with %s %.4g: %s", config.name, best.label, objective, value, place)
    return replace(done, summary=summary)


def run_trials(config: SweepConfig, space: Space, points: Sequence[Point] | None, *, kind: str) -> Finished:
    """Run every one of *points*, or as many as Optuna is to find in *space*. The result has no summary yet, unless all
    was done before. The caller holds the lease on the folder."""
    folder = sweep_folder(config)
    if storage.exists(storage.join(folder, "config.json")) and not storage.exists(storage.join(folder, SWEEP_FILE)):
        raise ConfigMismatch(f"{storage.redact(folder)} holds a run, not a sweep: take another --name")
    settle(
        storage.join(folder, SWEEP_FILE),
        asdict(config),
        what=f"{config.name} in {storage.redact(config.run.runs)}",
        remedy="take another --name, or the old settings to continue",
        free=FREE_TO_CHANGE,
    )
    if (summary := storage.read_json(storage.join(folder, SUMMARY_FILE))) is not None:
        return Finished(folder, _read_trials(folder), summary)
    check_points(config, space, points)
    room_on_disk(config)
    tracking_uri = resolve_tracking_uri(config.run.tracking.uri, config.run.runs)
    if not storage.exists(storage.join(folder, TRACKING_FILE)):
        check_tracking(tracking_uri)
    # Without the dashboard, what a stopped trial held is never given back.
    start_ray(dashboard=True)
    parent = _parent_run(folder, config, tracking_uri, kind)
    tracker = Tracker(tracking_uri, parent)
    try:
        init_from = _coarse(config, folder, tracking_uri, parent)
        job = Job(folder, to_json(config.run), init_from, config.objectives, tracking_uri, parent)
        _tune(config, folder, job, space, points)
    except BaseException as error:
        tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | Interrupted) else "FAILED")
        raise
    trials = _read_trials(folder)
    _close_runs(tracking_uri, trials)
    return Finished(folder, trials, {})


def finish(config: SweepConfig, trials: Finished, summary: dict[str, Any], files: Sequence[str]) -> None:
    """Hand summary and *files* to the parent run in MLflow, and write the summary, which says that all is done."""
    tracking_uri = resolve_tracking_uri(config.run.tracking.uri, config.run.runs)
    tracker = Tracker(tracking_uri, (storage.read_json(storage.join(trials.folder, TRACKING_FILE)) or {}).get("run_id"))
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    for file in files:
        tracker.artifact(storage.read_bytes(storage.join(trials.folder, file)), file)
    tracker.artifact(text.encode(), SUMMARY_FILE)
    if best := summary.get("winner"):
        tracker.metrics({f"winner/{name}": value for name, value in best["metrics"].items()}, step=0)
    tracker.finish()
    storage.write_atomic(storage.join(trials.folder, SUMMARY_FILE), text.encode())


def told(trials: Sequence[Trial]) -> str:
    """How many trials ended how, and the first error."""
    counts = Counter(trial.status for trial in trials)
    errors = [f"{one.label}: {one.error}" for one in trials if one.error]
    return ", ".join(f"{count} {status}" for status, count in counts.items()) + (f"; {errors[0]}" if errors else "")


def check_points(config: SweepConfig, space: Space, points: Sequence[Point] | None) -> None:
    """Raise `ValueError` for a point that could not be trained, and for sets that do not fit one."""
    run = config.run
    train_set, _ = open_training_set(run, None)
    sets = {"train": train_set, "val": read_manifest(run.data.validation_set)}
    known = points if points is not None else [{name: end} for name, domain in space.items() for end in domain.ends()]
    for point in [{}, *known]:
        try:
            for which, manifest in sets.items():
                check_set(apply(run, point), manifest, which)
        except ValueError as error:
            at = f" at {point}" if point else ""
            raise ValueError(f"the sweep cannot be run{at}: {one_line(error)}") from None


def room(config: SweepConfig, there: dict[str, float]) -> int:
    """Trials that a cluster with the resources *there* has room for. Raises `ClusterTooSmall` if not even for one."""
    whole = resources(config.run)
    if missing := shortage(whole, there):
        raise ClusterTooSmall(f"one trial takes {shown(whole)}, the cluster has {shown(there)}: {missing}")
    each = {**whole, "CPU": whole["CPU"] - CPUS_FOR_DATA + DRIVER_CPUS}
    free = {**there, "CPU": there.get("CPU", 0.0) - CPUS_FOR_DATA}
    fits = max(1, min(int(free.get(name, 0.0) / amount + 1e-6) for name, amount in each.items()))
    return min(fits, config.max_concurrent or fits, config.trials)


def room_on_disk(config: SweepConfig) -> str:
    """How what all trials and the coarse phase before them keep fits into what is free, in words. Raises
    `StorageFailed` if it does not."""
    there = sum(storage.file_sizes(sweep_folder(config)).values())
    size = run_bytes(config.run) * (config.trials + (config.init_from is None)) - there
    return storage.check_room(config.run.runs, size, "checkpoints and models", "--run.runs")


class _Rungs(ASHAScheduler):
    """ASHA that, in a resumed sweep, knows what trials had reported before."""

    def __init__(self, folder: str, metric: str, **kwargs: Any) -> None:
        super().__init__(time_attr="images", metric=metric, mode=direction(metric), **kwargs)
        self._folder = folder
        self._metric = metric

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        # Tune keeps trials and searchers over a restart, and begins with empty rungs.
        rows = read_json_lines(storage.join(trial_folder(self._folder, trial.trial_id), "metrics.jsonl"))
        for row in rows:
            value = row.get(f"val/{self._metric}")
            if value is not None:
                self.on_trial_result(tune_controller, trial, {"images": row["step"], self._metric: value})


class _Watch(tune.Callback):
    """Tells what trials do, and ends the sweep when one has failed for good."""

    def __init__(self, config: SweepConfig, folder: str) -> None:
        self._objectives = config.objectives
        self._stop_on_failure = config.stop_on_failure
        self._folder = folder

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A line."""
        shown_values = ", ".join(f"{name} {result[name]:.4g}" for name in self._objectives if name in result)
        log.info("%s: %s images, %s", self._label(trials, trial), f"{int(result.get('images', 0)):,}", shown_values)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A line."""
        log.info("%s: %s", self._label(trials, trial), read_trial(self._folder, 0, trial.trial_id).status)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Raises `SweepFailed`, which Tune hands through, with its records of the other trials as they are."""
        note = storage.read_json(storage.join(trial_folder(self._folder, trial.trial_id), ERROR_FILE)) or {}
        text = f"{self._label(trials, trial)} ({trial.trial_id}) failed: {note.get('error', 'its process was lost')}"
        if self._stop_on_failure:
            raise SweepFailed(f"{text}; the same command tries it again and continues the others")
        log.error("%s", text)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Keeps which trials there are."""
        names = [trial.trial_id for trial in trials]
        storage.write_atomic(storage.join(self._folder, NAMES_FILE), json.dumps(names).encode())

    def _label(self, trials: list[Any], trial: Any) -> str:
        number = trial.trial_id.rpartition("_")[2]
        return f"trial {int(number) + 1 if number.isdigit() else trials.index(trial) + 1}"


def _tune(config: SweepConfig, folder: str, job: Job, space: Space, points: Sequence[Point] | None) -> None:
    # Read by Tune in this process: no files of its own for each trial, and its records of the sweep at least every 5 s.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")
    # The newer output prints a table whatever `verbose` says.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Tune would take Ctrl-C for the end of the sweep.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # A trial's traceback, at each attempt; we report its error in one line.
    for noisy in ("ray.tune", "ray.train"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    require(resources(config.run), "--run.workers.num-workers")
    concurrent = room(config, ray.cluster_resources())
    trainable: Any = tune.with_resources(run_trial, {"CPU": DRIVER_CPUS})
    root, file_system = storage.for_ray(folder)
    file_system = file_system or whole_files()
    place = f"{root}/{TUNE_FOLDER}"
    if _has_records(storage.join(folder, TUNE_FOLDER)):
        log.info("sweep %s was begun before: going on with it, %d trials side by side", config.name, concurrent)
        tuner = tune.Tuner.restore(place, trainable=trainable, resume_errored=True, storage_filesystem=file_system)
    else:
        log.info("sweep %s: %d trials, %d side by side", config.name, config.trials, concurrent)
        # Of a sweep that was killed before Tune had written anything.
        storage.remove_folder(storage.join(folder, TRIALS_FOLDER))
        searched = points is None
        tuner = tune.Tuner(
            trainable,
            param_space={
                "job": asdict(job),
                "point": _tune_space(space) if searched else tune.grid_search([encode(one) for one in points or ()]),
            },
            tune_config=tune.TuneConfig(
                num_samples=config.trials if searched else 1,
                max_concurrent_trials=concurrent,
                scheduler=_scheduler(config, folder),
                search_alg=_optuna(config) if searched else None,
                reuse_actors=False,
            ),
            run_config=tune.RunConfig(
                name=TUNE_FOLDER,
                storage_path=root,
                storage_filesystem=file_system,
                verbose=0,
                callbacks=[_Watch(config, folder)],
                failure_config=tune.FailureConfig(max_failures=TRIAL_ATTEMPTS - 1),
            ),
        )
    began = time.time()
    ended = tuner.fit()
    # Of a sweep that Tune was told to end (SIGUSR1) it returns what there is.
    if (count := ended.num_terminated + ended.num_errors) < len(ended):
        raise Interrupted(
            f"sweep {config.name} was stopped after {count} of {len(ended)} trials; "
            "the same command continues where it stopped"
        )
    log.info("sweep %s: all trials ended, %.0f s in this call", config.name, time.time() - began)


def _has_records(place: str) -> bool:
    """Whether Tune has recorded trials in *place*. Raises `SweepFailed` if it could not read them: it would begin a new
    sweep there, without settings."""
    names = [name for name in storage.file_sizes(place) if name.startswith("experiment_state-")]
    if not names:
        return False
    newest = storage.join(place, max(names))
    try:
        json.loads(storage.read_bytes(newest))
    except ValueError:
        raise SweepFailed(
            f"{storage.redact(newest)} is damaged, and with it the list of trials; delete {storage.redact(place)} to "
            "train all of them again"
        ) from None
    return True


def _scheduler(config: SweepConfig, folder: str) -> TrialScheduler:
    if not config.stop_early:
        return FIFOScheduler()
    schedule = config.run.schedule
    total = schedule.joint_images
    first = min(config.first_rung_images or schedule.validate_every_images, total)
    # The last report comes when the model is kept; there is nothing left to stop then.
    return _Rungs(folder, config.objectives[0], max_t=2 * total, grace_period=first, reduction_factor=config.reduction)


def _optuna(config: SweepConfig) -> Any:
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch
    except ImportError as error:
        raise ValueError("search = optuna needs Optuna: pip install 'tmad[sweep]', or take --search random") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names, modes = list(config.objectives), [str(direction(name)) for name in config.objectives]
    one = len(names) == 1
    return OptunaSearch(metric=names[0] if one else names, mode=modes[0] if one else modes, seed=config.seed)


def _tune_space(space: Space) -> dict[str, Any]:
    def one(domain: Domain) -> Any:
        if isinstance(domain, Choice):
            return tune.choice([json.dumps(value) for value in domain.values])
        return tune.lograndint(*domain.ends()) if domain.whole else tune.loguniform(domain.low, domain.high)

    return {name: one(domain) for name, domain in space.items()}


def _coarse(config: SweepConfig, folder: str, tracking_uri: str | None, parent: str | None) -> str | None:
    """The model that all trials start from: the one that was given, or that of the coarse phase, which is run here."""
    if config.init_from is not None:
        locate_model(config.init_from, tracking_uri=tracking_uri)  # raises if it is not there
        return config.init_from
    run = config.run
    if not run.schedule.coarse_images:
        return None
    tracking = replace(run.tracking, uri=tracking_uri or "none", register=False, parent_run=parent)
    schedule = replace(run.schedule, joint_images=0, best_metric="coarse_psnr_hole")
    train(replace(run, name="coarse", runs=folder, tracking=tracking, schedule=schedule))
    return storage.join(folder, "coarse")


def _parent_run(folder: str, config: SweepConfig, tracking_uri: str | None, kind: str) -> str | None:
    """The MLflow run that the trials are nested in: the one there was before, or a new one."""
    uri = storage.join(folder, TRACKING_FILE)
    before = storage.read_json(uri)
    if before is not None and before["uri"] == tracking_uri:
        known: str | None = before["run_id"]
        return known
    params = {name: value for name, value in asdict(config).items() if name != "run"}
    run_id = Tracker.create(tracking_uri, config.run.tracking.experiment, config.name, params, {"kind": kind})
    Tracker(tracking_uri, run_id).artifact(storage.read_bytes(storage.join(folder, SWEEP_FILE)), SWEEP_FILE)
    storage.write_atomic(uri, json.dumps({"uri": tracking_uri, "run_id": run_id}, indent=2).encode())
    return run_id


def _read_trials(folder: str) -> list[Trial]:
    """In the order of their points, or in which they were found."""
    names = storage.read_json(storage.join(folder, NAMES_FILE)) or []
    # Points that are known beforehand have ids that end with their number.
    names.sort(key=lambda name: name.rpartition("_")[2] if name.rpartition("_")[2].isdigit() else "")
    return [read_trial(folder, number, name) for number, name in enumerate(names, start=1)]


def _close_runs(tracking_uri: str | None, trials: Sequence[Trial]) -> None:
    """Name the trials' runs in MLflow, and close those of trials that were stopped, whose processes cannot."""
    if tracking_uri is None:
        return
    client = mlflow_client(tracking_uri)
    for trial in trials:
        if trial.mlflow_run_id is None:
            continue
        client.set_tag(trial.mlflow_run_id, "trial", trial.number)
        client.update_run(trial.mlflow_run_id, name=trial.label)  # as report and summary call it
        client.set_tag(trial.mlflow_run_id, "trial_status", trial.status)
        if trial.status != "finished":
            client.set_terminated(trial.mlflow_run_id, "KILLED" if trial.status == "stopped early" else "FAILED")
