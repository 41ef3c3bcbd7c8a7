"""Pictures of every usual kind go in, the same kind comes out, and all are filled alike."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tmad.tiny import MODEL, make_image, make_mask, with_noise
from tmad.checkpoint import save_model
from tmad.inpaint import Inpainter
from tmad.model import TMAD

IMAGE, MASK = make_image(0), make_mask()


@pytest.fixture(scope="module")
def inpainter() -> Inpainter:
    return Inpainter(with_noise(TMAD(MODEL, seed=3)))


@pytest.fixture(scope="module")
def expected(inpainter: Inpainter) -> np.ndarray:
    return np.asarray(inpainter.inpaint(IMAGE, MASK))


def as_file(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(array, -1, 0).copy())


def test_files_are_taken_as_paths_bytes_and_open_files(
    inpainter: Inpainter, expected: np.ndarray, tmp_path: Path
) -> None:
    data, mask = as_file(IMAGE), as_file(MASK * np.uint8(255))
    (tmp_path / "image.png").write_bytes(data)
    for image in (tmp_path / "image.png", str(tmp_path / "image.png"), data, bytearray(data), io.BytesIO(data)):
        filled = inpainter.inpaint(image, mask)
        assert isinstance(filled, Image.Image)
        assert np.array_equal(filled, expected)


@pytest.mark.parametrize("batch", [False, True])
def test_a_tensor_gives_a_tensor_of_its_shape_and_type(inpainter: Inpainter, expected: np.ndarray, batch: bool) -> None:
    image, mask = channels_first(IMAGE), torch.from_numpy(MASK)
    image, mask = (image[None], mask[None, None]) if batch else (image, mask)
    filled = inpainter.inpaint(image, mask)
    assert isinstance(filled, torch.Tensor)
    assert (filled.shape, filled.dtype) == (image.shape, torch.uint8)
    assert torch.equal(filled.reshape(3, 64, 64), channels_first(expected))


def test_a_picture_without_colour_gets_a_fill_without_colour(inpainter: Inpainter) -> None:
    grey = IMAGE[:, :, 0]
    coloured = np.asarray(inpainter.inpaint(np.repeat(grey[:, :, None], 3, axis=2), MASK))
    assert not np.ptp(coloured, axis=2).any()
    assert np.array_equal(coloured[:, :, 0], np.asarray(inpainter.inpaint(grey, MASK)))
    assert np.ptp(np.asarray(inpainter.inpaint(IMAGE, MASK))[MASK > 0], axis=-1).any()


def test_a_grey_tensor_stays_grey(inpainter: Inpainter) -> None:
    grey = torch.from_numpy(IMAGE[:, :, 0].copy())
    assert inpainter.inpaint(grey, MASK).shape == (64, 64)
    assert inpainter.inpaint(grey[None], MASK).shape == (1, 64, 64)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_float_tensors_keep_every_value_outside_the_hole(inpainter: Inpainter, kind: torch.dtype) -> None:
    image = torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(kind)
    filled = inpainter.inpaint(image, MASK)
    assert filled.dtype == kind
    hole = torch.from_numpy(MASK > 0)
    assert torch.equal(filled[:, ~hole], image[:, ~hole])
    assert not torch.equal(filled[:, hole], image[:, hole])


def test_a_float_array_is_filled_as_the_picture_that_it_stands_for(inpainter: Inpainter, expected: np.ndarray) -> None:
    filled = inpainter.inpaint(IMAGE.astype(np.float32) / 255, MASK)
    assert isinstance(filled, np.ndarray)
    assert filled.dtype == np.float32
    assert np.array_equal(np.rint(filled * 255).astype(np.uint8), expected)
    assert np.array_equal(filled[MASK == 0], (IMAGE.astype(np.float32) / 255)[MASK == 0])


@pytest.mark.parametrize(
    "mask",
    [
        MASK.astype(bool),
        MASK * np.uint8(255),
        MASK[None],
        MASK[..., None],
        np.repeat(MASK[..., None], 3, axis=2) * np.uint8(255),
        MASK.astype(np.float64),
        torch.from_numpy(MASK).bool(),
        torch.from_numpy(MASK).float()[None],
        torch.from_numpy(MASK)[None, None].long(),
        Image.fromarray(MASK * np.uint8(255)).convert("1"),
        as_file(MASK * np.uint8(255)),
    ],
)
def test_masks_of_every_usual_kind_say_the_same(inpainter: Inpainter, expected: np.ndarray, mask: Any) -> None:
    assert np.array_equal(inpainter.inpaint(IMAGE, mask), expected)


def test_what_has_no_hole_comes_back_as_it_came(inpainter: Inpainter) -> None:
    tensor = torch.rand((3, 20, 30))
    assert torch.equal(inpainter.inpaint(tensor, np.zeros((20, 30), np.uint8)), tensor)


def test_a_model_is_loaded_by_every_name_that_a_job_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    model = with_noise(TMAD(MODEL, seed=3))
    save_model(model, tmp_path / "run" / "checkpoints" / "images_000000200" / "model")
    for path in (tmp_path / "run" / "checkpoints" / "images_000000200" / "model").iterdir():
        fsspec.filesystem("memory").pipe(f"/loaded/model/{path.name}", path.read_bytes())
    monkeypatch.chdir(tmp_path)
    filled = [
        Inpainter.load(name).inpaint(IMAGE, MASK)
        for name in ("run", tmp_path / "run" / "checkpoints" / "images_000000200", "memory://loaded")
    ]
    assert np.array_equal(filled[0], filled[1])
    assert np.array_equal(filled[0], filled[2])
    with pytest.raises(Exception, match=r"no model at nowhere: looked for config\.json and model\.safetensors"):
        Inpainter.load("nowhere")
