"""The weights that a new run starts from when they are another model's (`init_from`).

The driver finds the model once, compares it with the run's networks tensor by tensor, and keeps what is taken in the
run's own folder: `init.safetensors`, and `init_report.json` that says what came from where. Workers read that copy, and
only where there is no checkpoint yet. So a run that is stopped continues with the weights it was started with, even if
`models:/tmad@champion` is another model by then, this very run's perhaps.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import safetensors.torch
from torch import Tensor

from pipeline import storage
from pipeline.config import RunConfig
from pipeline.errors import CorruptSource, WeightsMismatch
from pipeline.models import locate_model
from tmad.checkpoint import STATE_FILE, differences, model_digest, read_model, read_state
from tmad.step import TrainingState

REPORT_FILE = "init_report.json"
"""In the run's folder: which tensors were taken, and from where."""

WEIGHTS_FILE = "init.safetensors"
"""In the run's folder: the tensors that were taken."""

TAKEN_NETWORKS = ("model/", "patch_discriminator/", "global_discriminator/")
"""Tensors of a training state that can be taken, by the start of their names; the average follows the generator."""

PROBLEMS = ("missing", "unexpected", "reshaped")
"""Lists of a report that are empty where a model fits."""

LISTED = 20
"""Tensors that an error names; the report has all of them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptWeights:
    """The weights in a run's folder, as they go to the workers."""

    uri: str
    digest: str
    """First 16 hexadecimal digits of the file's SHA-256."""

    def read(self) -> dict[str, Tensor]:
        """The tensors, named as `TrainingState.tensors` does. Raises `CorruptSource` if the file is another one than
        the run was begun with."""
        data = storage.read_bytes(self.uri)
        if _digest(data) != self.digest:
            raise CorruptSource(
                f"{storage.redact(self.uri)} has digest {_digest(data)}, the run was begun with {self.digest}: "
                "a damaged file; begin again under another --name"
            )
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        return tensors


@dataclass(frozen=True)
class Initial:
    """What a run takes from another model."""

    tensors: dict[str, Tensor]
    """Named as `TrainingState.tensors` does."""
    report: dict[str, Any]
    """`model`, `model_digest`, `networks`, lists of tensor names, `settings` in which both models differ."""

    def summary(self) -> str:
        """The report in a line."""
        report = self.report
        counts = ", ".join(f"{len(report[kind])} {kind.replace('_', ' ')}" for kind in ("matched", *PROBLEMS))
        differ = f"; settings that differ: {'; '.join(report['settings'])}" if report["settings"] else ""
        networks = ", ".join(report["networks"]) or "no network"
        return f"{networks} of {report['model']} ({report['model_digest']}): {counts} tensors{differ}"


def find_initial(config: RunConfig, tracking_uri: str | None) -> Initial:
    """The weights that `config.init_from` names, compared with the networks of *config*.

    Raises `ModelNotFound`, `ValueError` for a damaged model, and `WeightsMismatch` with every tensor that is missing,
    unexpected or of another shape, unless `config.init_allow_partial`; even then if nothing fits at all.
    """
    assert config.init_from is not None
    place = locate_model(config.init_from, tracking_uri=tracking_uri)
    checkpoint = place.removesuffix("/model")
    # The artifact inside a checkpoint, named by itself, is a model and no more.
    whole = place not in (config.init_from, checkpoint) and storage.exists(storage.join(checkpoint, STATE_FILE))
    folder = storage.local_copy(checkpoint if whole else place)
    settings, weights = read_model(folder / "model" if whole else folder)
    found = {f"model/{name}": value for name, value in weights.items()}
    if whole:
        discriminators = {
            name: value for name, value in read_state(folder).items() if name.startswith(TAKEN_NETWORKS[1:])
        }
        found |= discriminators
    own = replace(config.training, loss=replace(config.loss, weight_perceptual=0.0, weight_style=0.0))
    wanted = {name: value for name, value in TrainingState(own).tensors().items() if name.startswith(TAKEN_NETWORKS)}
    if config.init_networks == "coarse":
        found, wanted = ({k: v for k, v in one.items() if k.startswith("model/coarse.")} for one in (found, wanted))
    there = {name.split("/")[0] for name in found}
    compared = compare(found, {name: value for name, value in wanted.items() if name.split("/")[0] in there})
    changed = differences(settings, json.loads(json.dumps(asdict(config.model))))
    if config.init_networks == "coarse":
        changed = [line for line in changed if line.startswith(("coarse.", "carafe."))]
    report = {
        "model": storage.redact(config.init_from),
        "model_digest": model_digest(folder / "model" if whole else folder),
        "networks": list(dict.fromkeys(_network(name) for name in compared["matched"])),
        **compared,
        "settings": changed,
    }
    initial = Initial({name: found[name] for name in compared["matched"]}, report)
    _refuse(initial, config)
    return initial


def compare(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of *found* against *wanted*: `matched`, which are taken; `missing`, `unexpected`, `reshaped` with both
    shapes; and `left_out`, which would fit but belong to a layer that does not: half a layer is worth nothing, and a
    spectral norm's vectors are wrong beside another weight."""
    reshaped = [name for name in wanted if name in found and found[name].shape != wanted[name].shape]
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    unfit = {_layer(name) for name in (*missing, *unexpected, *reshaped)}
    fits = [name for name in wanted if name in found and name not in reshaped]
    return {
        "matched": [name for name in fits if _layer(name) not in unfit],
        "missing": missing,
        "unexpected": unexpected,
        "reshaped": [f"{name} {tuple(found[name].shape)} -> {tuple(wanted[name].shape)}" for name in reshaped],
        "left_out": [name for name in fits if _layer(name) in unfit],
    }


def keep_initial(config: RunConfig, folder: str, tracking_uri: str | None) -> dict[str, Any]:
    """Find the weights and keep them in the run's *folder*; returns the report. Raises as `find_initial`."""
    initial = find_initial(config, tracking_uri)
    data = safetensors.torch.save({name: value.contiguous() for name, value in initial.tensors.items()})
    report = {**initial.report, "digest": _digest(data)}
    storage.write_atomic(storage.join(folder, WEIGHTS_FILE), data)
    storage.write_atomic(storage.join(folder, REPORT_FILE), (json.dumps(report, indent=2) + "\n").encode())
    log.info("starting from %s; %s has every tensor", initial.summary(), REPORT_FILE)
    return report


def kept_initial(config: RunConfig, folder: str) -> dict[str, Any] | None:
    """The report of the weights that the run in *folder* was started with; `None` for random ones."""
    if config.init_from is None:
        return None
    report: dict[str, Any] = json.loads(storage.read_bytes(storage.join(folder, REPORT_FILE)))
    return report


def _refuse(initial: Initial, config: RunConfig) -> None:
    report = initial.report
    unfit = [f"{kind} {name}" for kind in PROBLEMS for name in report[kind]]
    if not initial.tensors:
        raise WeightsMismatch(f"init_from: nothing fits, {initial.summary()}", report=report)
    if not unfit or config.init_allow_partial:
        if unfit:
            log.warning("init_from takes a part of the model: %s", initial.summary())
        return
    more = f" and {len(unfit) - LISTED} more" if len(unfit) > LISTED else ""
    differ = f"; settings that differ: {'; '.join(report['settings'])}" if report["settings"] else ""
    raise WeightsMismatch(
        f"init_from: {report['model']} does not fit: {'; '.join(unfit[:LISTED])}{more}{differ}; change the settings, "
        "take the coarse network alone (--init-networks coarse), or start with what fits (--init-allow-partial)",
        report=report,
    )


def _layer(name: str) -> str:
    return name.split(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _network(name: str) -> str:
    network, _, rest = name.partition("/")
    return rest.split(".")[0] if network == "model" else network


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
