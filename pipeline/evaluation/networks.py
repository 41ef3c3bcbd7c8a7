"""Networks that measure, from a file or an address: TorchScript, and only the file whose digest was given.

`torch.jit.load` reads an archive of TorchScript code and tensors with a reader of its own: no pickle of Python objects
is opened, and a file that is anything else is refused. What the code does is still its author's, hence the digest.

- Features (FID, KID): `forward(images)` with images (B, 3, H, W) uint8 RGB gives (B, D). The Inception file that
  StyleGAN's authors publish fits: where forward takes `return_features`, it is set.
- Distance (LPIPS): `forward(a, b)` with images (B, 3, H, W) float32 in [-1, 1] gives one figure an image; or one that
  takes images (B, 3, H, W) in 0..255 and `return_lpips`, and gives vectors whose squared distance is meant.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import storage
from pipeline.errors import TMADError
from pipeline.evaluation.config import NETWORKS, NetworkConfig
from pipeline.storage.download import download


class NotMeasured(Exception):
    """Why a metric has no figures, in words for the table."""


def read_network(config: NetworkConfig) -> bytes:
    """The file of the network, of the digest that was given.

    Raises `NotMeasured` if none was given, if it cannot be had, or if it is another file or no TorchScript.
    """
    if config.network is None or config.sha256 is None:
        raise NotMeasured("no network was given (--fid.network inception, --lpips.network vgg16)")
    where = storage.redact(config.network)
    try:
        data = _read(config.network)
    except (TMADError, OSError) as error:
        raise NotMeasured(f"the network cannot be read: {storage.redact(str(error))}") from error
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(config.sha256.lower()):
        raise NotMeasured(f"{where} has SHA-256 {found[:16]}..., not {config.sha256[:16]}...: another file")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            is_script = any("/code/" in name for name in archive.namelist())
    except zipfile.BadZipFile:
        is_script = False
    if not is_script:
        raise NotMeasured(f"{where} is no TorchScript file: export the network with torch.jit.save")
    return data


def _read(place: str) -> bytes:
    if place in NETWORKS:
        address, digest = NETWORKS[place]
        kept = Path(torch.hub.get_dir(), "checkpoints", address.rsplit("/", 1)[1])
        if kept.exists():
            return kept.read_bytes()
        data = _read(address)
        if hashlib.sha256(data).hexdigest() == digest:
            storage.write_atomic(str(kept), data)
        return data
    if place.startswith(("https://", "http://")):
        return download(place)
    return storage.read_bytes(place)


class ScriptedNetwork:
    """A loaded network; images go through it one at a time, so that no figure depends on a batch."""

    def __init__(self, data: bytes, *, device: str = "cpu") -> None:
        with warnings.catch_warnings():
            # PyTorch announces that TorchScript will go; the published networks are TorchScript.
            warnings.simplefilter("ignore")
            self._network: Any = torch.jit.load(io.BytesIO(data), map_location=device).eval()
        self._device = device
        arguments = {argument.name for argument in self._network.forward.schema.arguments}
        self._options = {name: True for name in ("return_features", "return_lpips") if name in arguments}
        self._takes_pairs = len(arguments - {"self"}) > 1 and not self._options

    @torch.inference_mode()
    def features(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (D,) float32."""
        options = {name: True for name in self._options if name == "return_features"}
        found = self._network(self._batch(image), **options)
        return found.reshape(-1).float().cpu().numpy()

    @torch.inference_mode()
    def distance(self, first: np.ndarray, second: np.ndarray) -> float:
        """Between two images (H, W, 3) uint8."""
        batches = [self._batch(image) for image in (first, second)]
        if self._takes_pairs:
            return float(self._network(*(batch.float() / 127.5 - 1 for batch in batches)).reshape(-1)[0])
        options = {name: True for name in self._options if name == "return_lpips"}
        vectors = [self._network(batch.float(), **options).double() for batch in batches]
        return float((vectors[0] - vectors[1]).square().sum())

    def _batch(self, image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(self._device)
