"""Pretrained weights: VGG-19 for the perceptual loss (Eq. 8).

The driver fetches and checks them once, up front, and puts them beside the runs, where every worker reads them: a run
that cannot have them stops before anything is scheduled, never in the middle and never silently without the term.
"""

from __future__ import annotations

import hashlib
import logging
import urllib.error
import urllib.request

from torch import nn

from pipeline import storage
from pipeline.config import VGG19_ADDRESS, RunConfig
from pipeline.errors import MissingInput
from pipeline.storage.download import download
from tmad.perceptual import load_vgg19, untrained_vgg19
from tmad.rng import torch_generator

DOWNLOAD = "download"
CHECK_TIMEOUT_S = 5.0
"""Seconds that a download address has to answer when asked only whether the file exists."""

OPTIONS = (
    "give the file (--perceptual.weights /path/or/uri/vgg19-dcbb9e9d.pth), or train without it on purpose: "
    "--perceptual.features untrained (random features) or --perceptual.features off"
)

log = logging.getLogger(__name__)


def resolve_perceptual(config: RunConfig) -> str | None:
    """Have the feature weights in place before training; returns the URI that workers load, `None` without weights.

    Untrained features and none at all are departures from the paper: each is logged as a warning. Raises `MissingInput`
    with the options where the weights cannot be had, `ValueError` where the file is another than its checksum says.
    """
    perceptual = config.perceptual
    if not config.training.loss.uses_features:
        log.warning("the perceptual loss is off (%s): not the paper's method", _why_off(config))
        return None
    if perceptual.features == "untrained":
        log.warning("the perceptual loss uses untrained VGG-19 features (perceptual.features): not the paper's method")
        return None
    known = storage.join(config.runs, "cache", _file_name(perceptual.sha256)) if perceptual.sha256 else None
    if known is not None and storage.exists(known):
        check_digest(storage.read_bytes(known), perceptual.sha256, known)
        return known
    if perceptual.weights == DOWNLOAD:
        where = VGG19_ADDRESS
        try:
            data = download(where)
        except MissingInput as error:
            raise MissingInput(f"no VGG-19 weights: {error}; {OPTIONS}") from error
    else:
        where = storage.redact(perceptual.weights)
        try:
            data = storage.read_bytes(perceptual.weights)
        except MissingInput as error:
            raise MissingInput(f"no VGG-19 weights at {where}; {OPTIONS}") from error
    check_digest(data, perceptual.sha256, where)
    kept = storage.join(config.runs, "cache", _file_name(perceptual.sha256 or hashlib.sha256(data).hexdigest()[:16]))
    storage.write_atomic(kept, data)
    return kept


def check_perceptual(config: RunConfig) -> str:
    """Where `resolve_perceptual` would find the weights, in words; downloads nothing. Raises as that does."""
    perceptual = config.perceptual
    if not config.training.loss.uses_features:
        return f"none needed, the perceptual loss is off ({_why_off(config)})"
    if perceptual.features == "untrained":
        return "none needed, untrained VGG-19 features (perceptual.features)"
    known = storage.join(config.runs, "cache", _file_name(perceptual.sha256)) if perceptual.sha256 else None
    if known is not None and storage.exists(known):
        check_digest(storage.read_bytes(known), perceptual.sha256, storage.redact(known))
        return f"VGG-19 at {storage.redact(known)}"
    where = storage.redact(perceptual.weights)
    if perceptual.weights == DOWNLOAD:
        request = urllib.request.Request(VGG19_ADDRESS, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=CHECK_TIMEOUT_S).close()
        except (urllib.error.URLError, OSError) as error:
            raise MissingInput(
                f"cannot download the VGG-19 weights from {VGG19_ADDRESS} ({error}); {OPTIONS}"
            ) from error
        return f"VGG-19 not here yet, to be downloaded (549 MB) from {VGG19_ADDRESS}"
    if not storage.exists(perceptual.weights):
        raise MissingInput(f"no VGG-19 weights at {where}; {OPTIONS}")
    check_digest(storage.read_bytes(perceptual.weights), perceptual.sha256, where)
    return f"VGG-19 at {where}"


def load_perceptual(config: RunConfig, weights: str | None) -> nn.Module | None:
    """The feature network that *config* asks for, from what `resolve_perceptual` returned."""
    if not config.training.loss.uses_features:
        return None
    if config.perceptual.features == "untrained":
        return untrained_vgg19(
            torch_generator(config.seed, "untrained-vgg19"), convolutions=config.perceptual.convolutions
        )
    assert weights is not None
    return load_vgg19(
        storage.local_copy(weights), sha256=config.perceptual.sha256, convolutions=config.perceptual.convolutions
    )


def check_digest(data: bytes, sha256: str, where: str) -> None:
    """Raise `ValueError` unless the SHA-256 of *data* begins with *sha256*."""
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(sha256.lower()):
        raise ValueError(
            f"VGG-19 weights at {where} have SHA-256 {found[: max(len(sha256), 8)]}..., expected {sha256}...; "
            f"a damaged or another file: replace it, or state its digest with perceptual.sha256"
        )


def _file_name(sha256: str) -> str:
    return f"vgg19-{sha256.lower()}.pth"


def _why_off(config: RunConfig) -> str:
    return "perceptual.features" if config.perceptual.features == "off" else "loss.weight_perceptual is 0"
