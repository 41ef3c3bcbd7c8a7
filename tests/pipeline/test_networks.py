"""Networks that measure: loaded by digest only, never unpickled, and FID by them against the closed form."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.evaluation.config import NETWORKS, NetworkConfig
from pipeline.evaluation.networks import NotMeasured, ScriptedNetwork, read_network
from tmad.frechet import Moments, frechet_distance


class Means(torch.nn.Module):
    """Features that are the mean colour; takes `return_features` as the published Inception does."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean(dim=(2, 3)) if return_features else images.float()


class Vectors(torch.nn.Module):
    """Vectors whose squared distance is meant, as in StyleGAN's LPIPS file."""

    def forward(self, images: torch.Tensor, return_lpips: bool = False) -> torch.Tensor:
        return images.mean(dim=(2, 3)) / 255 if return_lpips else images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("networks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the published networks are TorchScript all the same
        for name, module in (("means.pt", Means()), ("vectors.pt", Vectors())):
            torch.jit.save(torch.jit.script(module), str(found / name))
    torch.save({"weight": torch.zeros(1)}, found / "pickled.pth")
    (found / "text.pt").write_text("not a network")
    return found


def config(path: Path, sha256: str | None = None) -> NetworkConfig:
    return NetworkConfig(network=str(path), sha256=sha256 or hashlib.sha256(path.read_bytes()).hexdigest())


def test_fid_of_gaussian_colours_is_the_closed_form(folder: Path) -> None:
    network = ScriptedNetwork(read_network(config(folder / "means.pt")))
    rng = np.random.default_rng(0)
    means, deviations = ((100, 120, 140), (110, 120, 120)), ((5, 10, 20), (10, 10, 10))
    sides = []
    for mean, deviation in zip(means, deviations, strict=True):
        collected = Moments(3)
        colours = np.rint(rng.normal(mean, deviation, (4000, 3))).astype(np.uint8)
        collected.add(network.features(np.broadcast_to(colour, (2, 2, 3))) for colour in colours)
        sides.append(collected)
    expected = np.square(np.subtract(*means)).sum() + np.square(np.subtract(*deviations)).sum()
    assert frechet_distance(*sides) == pytest.approx(expected, rel=0.05)


def test_lpips_by_vectors_is_their_squared_distance(folder: Path) -> None:
    network = ScriptedNetwork(read_network(config(folder / "vectors.pt")))
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert network.distance(black, grey) == pytest.approx(3 * 0.2**2)
    assert network.distance(grey, grey) == 0


@pytest.mark.parametrize(
    ("file", "sha256", "said"),
    [
        ("pickled.pth", None, "is no TorchScript file"),
        ("text.pt", None, "is no TorchScript file"),
        ("means.pt", "0" * 64, "another file"),
        ("gone.pt", "0" * 64, r"cannot be read: .*it is not there"),
    ],
)
def test_anything_else_is_refused_with_the_reason(folder: Path, file: str, sha256: str | None, said: str) -> None:
    with pytest.raises(NotMeasured, match=said):
        read_network(config(folder / file, sha256))


def test_a_network_without_digest_is_refused() -> None:
    with pytest.raises(ValueError, match="needs sha256"):
        NetworkConfig(network="inception.pt")
    with pytest.raises(ValueError, match="16 to 64 hexadecimal digits"):
        NetworkConfig(network="inception.pt", sha256="abc")
    with pytest.raises(NotMeasured, match=r"no network was given \(--fid.network inception"):
        read_network(NetworkConfig())


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_network_is_read_from_an_address(folder: Path, address: str) -> None:
    data = (folder / "means.pt").read_bytes()
    found = NetworkConfig(network=f"{address}/means.pt", sha256=hashlib.sha256(data).hexdigest()[:16])
    assert read_network(found) == data
    with pytest.raises(NotMeasured, match=r"cannot be read: .*404"):
        read_network(NetworkConfig(network=f"{address}/gone.pt", sha256="0" * 64))


def test_a_network_by_name_is_downloaded_once_and_checked_every_time(
    folder: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    data = (folder / "means.pt").read_bytes()
    monkeypatch.setitem(NETWORKS, "inception", (f"{address}/means.pt", hashlib.sha256(data).hexdigest()))
    assert read_network(NetworkConfig(network="inception")) == data
    monkeypatch.setitem(NETWORKS, "inception", (f"{address}/gone/means.pt", hashlib.sha256(data).hexdigest()))
    assert read_network(NetworkConfig(network="inception")) == data
    (tmp_path / "hub" / "checkpoints" / "means.pt").write_bytes(b"damaged")
    with pytest.raises(NotMeasured, match="another file"):
        read_network(NetworkConfig(network="inception"))
