"""The model in the box: there, whole, small, used when none is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.tmad.tiny import MODEL, make_image, make_mask
from tmad.builtin import builtin_model, pack
from tmad.checkpoint import load_model, save_model
from tmad.inpaint import Inpainter
from tmad.model import TMAD

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def box(tmp_path: Path) -> Path:
    save_model(TMAD(MODEL), tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "box")
    return tmp_path / "box"


def test_the_model_in_the_box_is_small_and_half_precision_and_has_a_card() -> None:
    folder = builtin_model()
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 30e6
    with safe_open(weights, "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float16"}  # noqa: SIM118
    card = (folder / "README.md").read_text()
    for heading in ("Trained on", "Terms", "How good it is", "Limits"):
        assert f"## {heading}" in card


def test_without_a_name_the_model_in_the_box_fills_and_beats_a_flat_fill() -> None:
    image, mask = make_image(3, 128), np.zeros((128, 128), np.uint8)
    mask[40:80, 50:90] = 1
    output = np.asarray(Inpainter.load().inpaint(image, mask))
    assert np.array_equal(output[mask == 0], image[mask == 0])
    hole = mask > 0
    flat = np.abs(image[hole].astype(float) - image[~hole].mean(axis=0)).mean()
    assert np.abs(output[hole].astype(float) - image[hole]).mean() < 0.7 * flat


def test_a_packed_model_computes_what_its_source_does_but_for_the_rounding_to_float16(box: Path) -> None:
    image, mask = make_image(1), make_mask()
    packed, source = (
        np.asarray(Inpainter(load_model(folder)).inpaint(image, mask)).astype(int)
        for folder in (builtin_model(box), box.parent / "source")
    )
    assert np.abs(packed - source).max() <= 2


def test_a_box_that_was_damaged_is_refused_by_the_file(box: Path) -> None:
    weights = box / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: it is not the file that was shipped"):
        builtin_model(box)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_a_box_that_lacks_a_file_says_which_and_what_to_do(box: Path, name: str) -> None:
    (box / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing; install tmad again"):
        builtin_model(box)
