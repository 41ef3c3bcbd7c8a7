"""Moves the alias to a newly registered version if it is measurably better than the current one.

Both fill the same holes of the same images. The rule (`promotion_rule`) names metrics: some the candidate has to be
better in, some it must not be worse in. A version that is equal, or better by luck, stays without the alias.

MLflow has no "set this alias if it still points there". Promotions of one name take turns by a lease in the folder of
comparisons, which therefore has to be one that all of them see, and look again at the alias before they move it.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import storage
from pipeline.config import check_registered
from pipeline.data.schema import read_manifest
from pipeline.errors import ModelNotFound, NotPromoted, TMADError, one_line
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import Evaluated, evaluate
from pipeline.evaluation.pictures import side_by_side
from pipeline.models import find_model
from pipeline.promotion.rule import Comparison, Requirement, compare, parse_requirement, shortfall
from pipeline.report.page import Table, metrics_table, render
from pipeline.report.pictures import picture_grid, png_bytes
from pipeline.runs.lease import Lease, holder_of, lease_folder
from pipeline.tracking import mlflow_client, resolve_tracking_uri
from tmad.checkpoint import model_digest, read_model
from tmad.config import STRICT, PositiveFloat, PositiveInt

PREVIOUS_TAG = "promoted_over"
"""Of a version: the one that had the alias before it; `none` for the first."""

VERDICT_TAG = "promotion"
"""Of a version: what the newest comparison came to."""

ATTEMPTS = 3
"""Comparisons begun anew because the alias had moved meanwhile, by hand or from elsewhere."""

log = logging.getLogger(__name__)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class PromoteConfig:
    """One promotion, or its return."""

    name: str = "tmad"
    """Registered model."""
    version: PositiveInt | None = None
    """The candidate; default: the newest version."""
    alias: str = "champion"
    """What is at stake: `models:/<name>@<alias>`."""
    rollback: bool = False
    """Give the alias back to the version that had it before, without measuring."""
    data: str = "data/val"
    """Folder or URI of the prepared set that both are measured on."""
    better: tuple[str, ...] = ("psnr_hole",)
    """Metrics that the candidate has to be better in; `psnr_hole=0.1`: by more than 0.1."""
    not_worse: tuple[str, ...] = ("ssim_full=0.002", "l1_hole_pct=0.05")
    """Metrics that it must not be worse in; `ssim_full=0.002`: by more than 0.002."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the intervals."""
    resamples: PositiveInt = 2000
    """Bootstrap draws behind each interval."""
    limit: PositiveInt | None = None
    """Only the first images of the set, this many."""
    num_pictures: Annotated[int, Field(ge=0)] = 8
    """Images shown in the comparison."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Keys the choice of the texture memory and the bootstrap."""
    use_gpu: bool = False
    """Run the models on the GPU."""
    tracking_uri: str | None = None
    """MLflow server or sqlite:///file; default: MLFLOW_TRACKING_URI, else runs/mlflow.db."""
    out: str = "runs/promotions"
    """Folder or URI of the comparisons; the same one for all that promote this name."""
    wait_s: PositiveFloat = 3600.0
    """Seconds to wait for another promotion of this name to end."""

    def __post_init__(self) -> None:
        check_registered("name", self.name, "alias", self.alias)
        if not self.better and not self.rollback:
            raise ValueError("better must name a metric: without one, an equal version would be promoted")
        names = [one.metric for one in self.rule]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"better and not_worse name {', '.join(sorted(twice))} twice")

    @property
    def rule(self) -> list[Requirement]:
        """Both lists, read."""
        strict = [parse_requirement(word, must_gain=True) for word in self.better]
        return strict + [parse_requirement(word, must_gain=False) for word in self.not_worse]


@dataclass(frozen=True)
class Decision:
    """What was decided; refusals are `NotPromoted`."""

    name: str
    version: int
    previous: int | None
    comparisons: list[Comparison]
    folder: str | None
    """Where the comparison lies."""


def promote(config: PromoteConfig) -> Decision:
    """Move the alias to the candidate if the rule holds, or raise `NotPromoted` with every reason.

    Table and pictures go to `<out>/<name>/v<candidate>-against-v<champion>/` and to the MLflow runs of both versions;
    the candidate is tagged with the verdict either way. The first version of a name has nobody to be compared with: it
    has to load, be finite and fill the set's holes. Raises `ModelNotFound` for a name or version that is not there and
    `FolderInUse` if another promotion does not end.
    """
    client, tracking_uri = _client(config)
    version = _candidate(client, config)
    with _turn(config):
        for _ in range(ATTEMPTS):
            champion = _holder(client, config)
            if champion == version:
                raise NotPromoted(f"version {version} of {config.name} has the alias {config.alias} already")
            try:
                decision = _compare(config, client, tracking_uri, version, champion)
            except NotPromoted as error:
                client.set_model_version_tag(
                    config.name, str(version), VERDICT_TAG, storage.redact(error.message)[:500]
                )
                raise
            if _holder(client, config) != champion:
                log.warning("the alias %s of %s has moved meanwhile: comparing again", config.alias, config.name)
                continue
            client.set_model_version_tag(config.name, str(version), PREVIOUS_TAG, str(champion or "none"))
            client.set_registered_model_alias(config.name, config.alias, str(version))
            over = f"over version {champion}" if champion else "as the first"
            client.set_model_version_tag(config.name, str(version), VERDICT_TAG, f"promoted {over}")
            log.info("%s@%s is version %d now, %s", config.name, config.alias, version, over)
            return decision
    raise NotPromoted(
        f"the alias {config.alias} of {config.name} was moved {ATTEMPTS} times while it was compared with"
    )


def check(config: PromoteConfig) -> list[str]:
    """What a promotion with this configuration would compare, in lines; nothing is written. Raises as `promote`."""
    client, _ = _client(config)
    version, champion = _candidate(client, config), _holder(client, config)
    theirs = holder_of(storage.join(storage.absolute(config.out), config.name))
    waits = [f"another promotion of {config.name} is under way: {theirs}"] if theirs is not None else []
    if config.rollback:
        return [*waits, f"{config.name}@{config.alias} is version {champion or 'none'}"]
    manifest = read_manifest(config.data)
    against = f"version {champion}, which has the alias" if champion else "nobody, as the first"
    images = min(manifest.records, config.limit or manifest.records)
    return [*waits, f"version {version} of {config.name} against {against}, on {images} images"]


def roll_back(config: PromoteConfig) -> Decision:
    """Give the alias back to the version that had it before. Raises `NotPromoted` if there is none."""
    client, _ = _client(config)
    with _turn(config):
        champion = _holder(client, config)
        if champion is None:
            raise NotPromoted(f"{config.name} has no alias {config.alias}; there is nothing to roll back")
        tags = client.get_model_version(config.name, str(champion)).tags
        previous = tags.get(PREVIOUS_TAG, "none")
        if not previous.isdigit():
            raise NotPromoted(
                f"version {champion} of {config.name} was not promoted over another one: there is no version to go "
                "back to"
            )
        client.get_model_version(config.name, previous)  # raises if it was deleted
        client.set_registered_model_alias(config.name, config.alias, previous)
        client.set_model_version_tag(config.name, str(champion), VERDICT_TAG, f"rolled back to version {previous}")
        log.info("%s@%s is version %s again, version %d was rolled back", config.name, config.alias, previous, champion)
        return Decision(config.name, int(previous), champion, [], None)


def _compare(config: PromoteConfig, client: Any, tracking_uri: str, version: int, champion: int | None) -> Decision:
    """The decision in favour of the candidate. Raises `NotPromoted` otherwise."""
    label = f"v{version}-against-v{champion}" if champion else f"v{version}-first"
    folder = storage.join(storage.absolute(config.out), config.name, label)
    digests = {}
    for one, role in ((version, "candidate"), (champion, "champion")):
        if one is not None:
            digests[role] = _check_sound(config, tracking_uri, one, role)
    if len(digests) == 2 and digests["candidate"] == digests["champion"]:
        raise NotPromoted(
            f"version {version} of {config.name} is not promoted: it has the weights of version {champion} "
            f"(digest {digests['candidate']})"
        )
    measured: dict[int, Evaluated] = {}
    against = None
    for one in (champion, version):
        if one is not None:
            out = storage.join(folder, f"v{one}")
            measured[one] = _measure(config, tracking_uri, one, out, against)
            against = out
    comparisons = [] if champion is None else compare(measured[version], measured[champion], config.rule)
    reasons = [shortfall(one) for one in comparisons if not one.met]
    decision = Decision(config.name, version, champion, comparisons, folder)
    _write(config, client, decision, measured, reasons)
    if reasons:
        raise NotPromoted(
            f"version {version} of {config.name} is not promoted over version {champion}: {'; '.join(reasons)}; "
            f"{storage.redact(folder)}/report.html has the comparison",
            reasons=reasons,
        )
    return decision


def _check_sound(config: PromoteConfig, tracking_uri: str, version: int, role: str) -> str:
    """Digest of a version whose files are there and whose weights are finite. Raises `NotPromoted`."""
    what = f"version {version} of {config.name}, the {role},"
    way_out = "" if role == "candidate" else "; give the alias to a sound version, as --rollback does"
    try:
        folder = find_model(f"models:/{config.name}/{version}", tracking_uri=tracking_uri)
        _, weights = read_model(folder)
    except (TMADError, ValueError, OSError) as error:
        raise NotPromoted(f"{what} cannot be loaded: {one_line(error)}{way_out}") from error
    bad = [name for name, value in weights.items() if not bool(value.isfinite().all())]
    if bad:
        raise NotPromoted(f"{what} has weights that are not finite: {', '.join(bad[:5])}, {len(bad)} in all{way_out}")
    return model_digest(folder)


def _measure(config: PromoteConfig, tracking_uri: str, version: int, out: str, against: str | None) -> Evaluated:
    result = evaluate(
        EvaluateConfig(
            model=f"models:/{config.name}/{version}",
            data=config.data,
            out=out,
            methods=("tmad",),
            limit=config.limit,
            mask_variant=0,
            num_pictures=config.num_pictures,
            num_extremes=0,
            keep=(),
            against=against,
            resamples=config.resamples,
            confidence=config.confidence,
            seed=config.seed,
            use_gpu=config.use_gpu,
            tracking_uri=tracking_uri,
        )
    )
    if not result.summary["images"]:
        raise NotPromoted(f"version {version} of {config.name} filled no image of {storage.redact(config.data)}")
    return result


def _write(
    config: PromoteConfig,
    client: Any,
    decision: Decision,
    measured: Mapping[int, Evaluated],
    reasons: Sequence[str],
) -> None:
    """Comparison as page, table and pictures: in the folder, and with both versions' runs in MLflow."""
    assert decision.folder is not None
    version, champion = decision.version, decision.previous
    verdict = "refused" if reasons else "promoted"
    rule = [one.values() for one in decision.comparisons]
    newest_first = {f"version {one}": measured[one] for one in sorted(measured, reverse=True)}
    pictures = side_by_side({name: one.shown for name, one in newest_first.items()})
    header = ["metric", "rule", f"version {version}", f"version {champion}", "gain", "low", "high", "images", "met"]
    page = render(
        "promotion.html",
        name=config.name,
        version=version,
        champion=champion,
        verdict=verdict,
        reasons=reasons,
        pictures=pictures,
        rule=Table(
            header,
            [[*list(one.values())[:-1], "yes" if one["met"] else "no"] for one in rule],
            note=f"Intervals of {config.confidence:.0%} from {config.resamples:,} bootstrap draws of photographs, seed "
            f"{config.seed}. A metric without one is of the whole set.",
        ),
        metrics=metrics_table(
            {name: one.summary["methods"]["tmad"]["metrics"] for name, one in newest_first.items()},
            note="Means over the images with their intervals; the best of each metric in bold.",
        ),
    )
    summary = {
        "name": config.name,
        "candidate": version,
        "champion": champion,
        "verdict": verdict,
        "reasons": list(reasons),
        "data": storage.redact(config.data),
        "rule": rule,
        "metrics": {str(one): result.means["tmad"] for one, result in measured.items()},
    }
    files = {
        "report.html": page.encode(),
        "comparison.json": (json.dumps(summary, indent=2) + "\n").encode(),
        **({"pictures.png": png_bytes(picture_grid(pictures))} if pictures else {}),
    }
    for file, content in files.items():
        storage.write_atomic(storage.join(decision.folder, file), content)
    label = decision.folder.rsplit("/", 1)[-1]
    with tempfile.TemporaryDirectory(prefix="tmad-promotion-") as temporary:
        for file, content in files.items():
            Path(temporary, file).write_bytes(content)
        for one in measured:
            run_id = client.get_model_version(config.name, str(one)).run_id
            if run_id:
                client.log_artifacts(run_id, temporary, f"promotion/{label}")
            else:
                log.warning("version %d of %s has no MLflow run; the comparison is in %s", one, config.name, label)


def _client(config: PromoteConfig) -> tuple[Any, str]:
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    tracking_uri = resolve_tracking_uri(uri, "runs")
    if tracking_uri is None:
        raise ValueError("a promotion needs MLflow: set tracking_uri or MLFLOW_TRACKING_URI")
    return mlflow_client(tracking_uri), tracking_uri


def _candidate(client: Any, config: PromoteConfig) -> int:
    versions = sorted(int(one.version) for one in client.search_model_versions(f"name = '{config.name}'"))
    if not versions:
        names = ", ".join(sorted(one.name for one in client.search_registered_models(max_results=20))) or "none"
        raise ModelNotFound(f"no model is registered as {config.name}; registered models: {names}")
    if config.version is None:
        return versions[-1]
    if config.version not in versions:
        raise ModelNotFound(f"{config.name} has no version {config.version}; it has {', '.join(map(str, versions))}")
    return config.version


def _holder(client: Any, config: PromoteConfig) -> int | None:
    """The version that has the alias."""
    held: str | None = client.get_registered_model(config.name).aliases.get(config.alias)
    return int(held) if held is not None else None


def _turn(config: PromoteConfig) -> AbstractContextManager[Lease]:
    """One promotion of a name at a time."""
    return lease_folder(storage.join(storage.absolute(config.out), config.name), wait_s=config.wait_s)
