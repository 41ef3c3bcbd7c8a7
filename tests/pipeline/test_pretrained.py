"""Weights of the perceptual loss: had and checked before training, or refused with the options."""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config import PerceptualConfig, RunConfig
from pipeline.errors import MissingInput
from pipeline.models import pretrained
from pipeline.models.pretrained import load_perceptual, resolve_perceptual
from pipeline.presets import smoke
from tmad.perceptual import untrained_vgg19


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in torchvision's layout with random weights."""
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    network = untrained_vgg19(torch.Generator().manual_seed(1))
    torch.save({name: value for name, value in network.state_dict().items() if name.startswith("features.")}, path)
    return path


def _config(tmp_path: Path, **perceptual: str) -> RunConfig:
    run = smoke()
    model = replace(run.model, patch_size=16)
    return replace(run, model=model, runs=str(tmp_path / "runs"), perceptual=PerceptualConfig(**perceptual))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_weights_from_a_file_are_checked_kept_and_loaded(tmp_path: Path, vgg_file: Path) -> None:
    config = _config(tmp_path, weights=str(vgg_file), sha256=_digest(vgg_file)[:8])
    kept = resolve_perceptual(config)
    assert kept is not None
    assert Path(kept).read_bytes() == vgg_file.read_bytes()
    network = load_perceptual(config, kept)
    assert network is not None
    expected = torch.load(vgg_file, weights_only=True)["features.0.weight"]
    assert torch.equal(network.state_dict()["features.0.weight"], expected)


def test_kept_weights_need_no_second_download(tmp_path: Path, vgg_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path, sha256=_digest(vgg_file)[:8])
    downloads = []

    def download(address: str) -> bytes:
        downloads.append(address)
        return vgg_file.read_bytes()

    monkeypatch.setattr(pretrained, "download", download)
    assert resolve_perceptual(config) == resolve_perceptual(config)
    assert downloads == ["https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"]


def test_another_file_than_the_checksum_says_is_refused_and_not_kept(tmp_path: Path, vgg_file: Path) -> None:
    with pytest.raises(ValueError, match=r"have SHA-256 .*expected dcbb9e9d"):
        resolve_perceptual(_config(tmp_path, weights=str(vgg_file)))
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_is_refused_with_the_options(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"no VGG-19 weights at .*--perceptual.features untrained"):
        resolve_perceptual(_config(tmp_path, weights=str(tmp_path / "nowhere.pth")))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\ncut", "3 of 9 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ncut", "IncompleteRead"),
        (b"HTTP/1.0 503 Busy\r\n\r\n", "503"),
        (b"not http\r\n\r\n", "not http"),
        (b"", "without response"),
    ],
)
def test_a_download_that_fails_or_is_cut_short_is_refused_with_the_options_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            caller, _ = server.accept()
            with caller:
                caller.recv(65536)
                caller.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        monkeypatch.setattr(pretrained, "VGG19_ADDRESS", f"http://127.0.0.1:{server.getsockname()[1]}/vgg19.pth")
        with pytest.raises(MissingInput, match=rf"cannot download .*{said}.*--perceptual.weights"):
            resolve_perceptual(_config(tmp_path))
        thread.join()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("features", "said"), [("off", "is off"), ("untrained", "untrained VGG-19 features")])
def test_doing_without_the_weights_is_said_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, features: str, said: str
) -> None:
    config = _config(tmp_path, features=features)
    with caplog.at_level(logging.WARNING):
        assert resolve_perceptual(config) is None
    assert said in caplog.text
    assert "not the paper's method" in caplog.text
    assert (load_perceptual(config, None) is None) == (features == "off")


def test_untrained_features_are_the_same_on_every_worker(tmp_path: Path) -> None:
    config = _config(tmp_path, features="untrained")
    first, second = load_perceptual(config, None), load_perceptual(config, None)
    assert first is not None
    assert second is not None
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
