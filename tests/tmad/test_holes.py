"""Holes grouped with their context, grown and faded; policies of size cost what they say and touch nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import ModelNotFound
from tests.tmad.tiny import MODEL, make_image
from tmad.holes import Box, block_any, dilate, fade, group_holes
from tmad.inpaint import Inpainter, UnusableInput
from tmad.model import TMAD


def holes(height: int, width: int, *boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    for top, left, bottom, right in boxes:
        mask[top:bottom, left:right] = 1
    return mask


@pytest.fixture(scope="module")
def model() -> TMAD:
    return TMAD(MODEL, seed=3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([0, 16, 40]))
def test_groups_hold_every_hole_once_with_context_and_none_of_another(seed: int, count: int, context: int) -> None:
    rng = np.random.default_rng(seed)
    mask = np.zeros((int(rng.integers(20, 400)), int(rng.integers(20, 400))), np.uint8)
    for _ in range(count):
        top, left = int(rng.integers(mask.shape[0])), int(rng.integers(mask.shape[1]))
        mask[top : top + int(rng.integers(1, 50)), left : left + int(rng.integers(1, 50))] = 1
    found = group_holes(mask, multiple=16, context=context)
    seen = np.zeros(mask.shape, int)
    for box in found:
        part = mask[box.slices]
        seen[box.slices] += part
        assert part.any()
        assert box.top % 16 == box.left % 16 == 0
        rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
        assert rows[0] >= context or box.top == 0
        assert columns[0] >= context or box.left == 0
        assert box.height - 1 - rows[-1] >= context or box.bottom == mask.shape[0]
        assert box.width - 1 - columns[-1] >= context or box.right == mask.shape[1]
    assert np.array_equal(seen, mask)
    assert found == sorted(found)


def test_near_holes_share_a_box_and_far_ones_do_not() -> None:
    near = holes(400, 400, (100, 100, 110, 110), (100, 150, 110, 160))
    far = holes(400, 400, (100, 100, 110, 110), (100, 300, 110, 310))
    assert len(group_holes(near, multiple=16, context=64)) == 1
    assert group_holes(far, multiple=16, context=64) == [Box(32, 32, 176, 176), Box(32, 224, 176, 384)]


@pytest.mark.parametrize("pixels", [0, 1, 2, 3, 7, 20])
def test_a_hole_grows_to_all_sides_by_so_many_pixels(pixels: int) -> None:
    grown = dilate(holes(60, 50, (30, 20, 31, 22)), pixels)
    assert np.array_equal(grown, holes(60, 50, (30 - pixels, 20 - pixels, 31 + pixels, 22 + pixels)))


def test_a_faded_hole_is_whole_inside_and_falls_evenly_around() -> None:
    weight = fade(holes(1, 20, (0, 8, 1, 10)), 3)[0]
    assert weight.tolist() == [0] * 5 + [64, 128, 191, 255, 255, 191, 128, 64] + [0] * 7


def test_blocks_of_a_fraction_of_a_pixel_miss_nothing() -> None:
    mask = holes(10, 10, (9, 9, 10, 10))
    found = block_any(mask, 2.5)
    assert found.shape == (4, 4)
    assert found.sum() == found[3, 3] == 1


@pytest.mark.parametrize("policy", ["original", "resize", "crop"])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "CMYK"])
def test_every_policy_fills_the_hole_and_nothing_else(model: TMAD, policy: str, mode: str) -> None:
    grey = Image.fromarray(make_image(2, 300)).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257 + 3)
    image = deep if mode == "I;16" else Image.fromarray(make_image(2, 300)).convert(mode)
    mask = holes(300, 300, (20, 30, 40, 60), (200, 150, 290, 280))
    output = Inpainter(model, policy=policy, context=32, limit=96)(image, mask).output
    before, after = np.asarray(image), np.asarray(output)
    assert output.mode == mode
    assert np.array_equal(before[mask == 0], after[mask == 0])
    changed = (before != after).reshape(300, 300, -1).any(2)
    assert changed[mask > 0].mean() > 0.8


@pytest.mark.parametrize("policy", ["original", "resize", "crop"])
def test_no_policy_looks_into_the_hole(model: TMAD, policy: str) -> None:
    image = make_image(3, 300)
    mask = holes(300, 300, (20, 30, 40, 60), (120, 150, 290, 280))
    other = np.where(mask[..., None] > 0, 255 - image, image)
    inpainter = Inpainter(model, policy=policy, context=32, limit=96)
    assert np.array_equal(inpainter(image, mask).output, inpainter(other, mask).output)


def test_a_part_is_filled_as_the_same_part_cut_out_by_hand(model: TMAD) -> None:
    image, mask = make_image(4, 320), holes(320, 320, (150, 150, 180, 190))
    box = group_holes(mask, multiple=MODEL.size_multiple, context=32)[0]
    seen = []
    predict = model.predict_coarse
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "predict_coarse", lambda i, *more: seen.append(i.shape) or predict(i, *more))
        result = Inpainter(model, policy="crop", context=32)(image, mask)
        by_hand = Inpainter(model)(image[box.slices], mask[box.slices])
    assert [tuple(shape[-2:]) for shape in seen] == [(box.height, box.width)] * 2
    assert np.array_equal(result.coarse[box.slices], by_hand.coarse)
    assert np.array_equal(result.cells_yx, by_hand.cells_yx + np.array([box.top, box.left]))


def test_the_whole_picture_as_one_part_gives_what_the_picture_gives(model: TMAD) -> None:
    image, mask = make_image(5, 64), holes(64, 64, (10, 10, 50, 50))
    whole = Inpainter(model)(image, mask, image_id="a").output
    for policy in ("crop", "resize"):
        assert np.array_equal(Inpainter(model, policy=policy)(image, mask, image_id="a").output, whole)


def test_the_coarse_network_never_sees_more_than_the_limit(model: TMAD, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    predict, synthesize = model.predict_coarse, model.synthesize
    monkeypatch.setattr(model, "predict_coarse", lambda i, *more: sides.append(max(i.shape[-2:])) or predict(i, *more))
    margin = 48  # what PSNet and a window reach, in whole cells
    monkeypatch.setattr(
        model, "synthesize", lambda c, *more: sides.append(max(c.shape[-2:]) - 2 * margin) or synthesize(c, *more)
    )
    image, mask = make_image(6, 400), holes(400, 400, (30, 30, 370, 370))
    Inpainter(model, policy="crop", limit=96, cells_per_chunk=36)(image, mask)
    assert max(sides) == 96
    assert len(sides) == 1 + 16


def test_feathering_changes_so_many_pixels_around_the_hole_and_no_more(model: TMAD) -> None:
    image, mask = make_image(7, 128), holes(128, 128, (50, 50, 80, 80))
    output = Inpainter(model, feather=6)(image, mask).output
    changed = (output != image).any(2)
    assert changed[dilate(mask, 6) == 0].sum() == 0
    assert changed[(dilate(mask, 3) > 0) & (mask == 0)].mean() > 0.5
    sharp = Inpainter(model)(image, dilate(mask, 6)).output
    assert np.array_equal(output[mask > 0], sharp[mask > 0])


def test_refining_another_result_works_under_every_policy(model: TMAD, monkeypatch: pytest.MonkeyPatch) -> None:
    image, mask = make_image(8, 300), holes(300, 300, (100, 100, 250, 250))
    coarse = np.where(mask[..., None] > 0, make_image(9, 300), 0).astype(np.uint8)
    monkeypatch.setattr(model, "predict_coarse", lambda *_: pytest.fail("the coarse network was asked"))
    for policy in ("original", "resize", "crop"):
        result = Inpainter(model, policy=policy, context=32, limit=96)(image, mask, filled=coarse)
        assert np.array_equal(result.coarse, np.where(mask[..., None] > 0, coarse, image))
        assert np.array_equal(result.output[mask == 0], image[mask == 0])


def test_impossible_settings_and_sides_are_refused(model: TMAD) -> None:
    for settings_ in ({"policy": "squash"}, {"limit": 16}, {"context": -1}, {"feather": -1}):
        with pytest.raises(ValueError, match=r"must|at least"):
            Inpainter(model, **settings_)
    wide = np.zeros((16, 32768, 3), np.uint8)
    mask = holes(16, 32768, (0, 5, 4, 9))
    with pytest.raises(UnusableInput, match="up to 32767"):
        Inpainter(model)(wide, mask)
    assert Inpainter(model, policy="crop")(wide, mask).output.shape == wide.shape


def test_a_loaded_inpainter_takes_and_gives_arrays_and_pictures(model: TMAD, tmp_path) -> None:
    from tmad import Inpainter as Public
    from tmad import save_model

    save_model(model, tmp_path / "run" / "model")
    inpainter = Public.load(tmp_path / "run")
    image, mask = make_image(1, 64), holes(64, 64, (10, 10, 30, 30))
    array = inpainter.inpaint(image, mask)
    picture = inpainter.inpaint(Image.fromarray(image), Image.fromarray(mask * 255))
    assert isinstance(picture, Image.Image)
    assert np.array_equal(array, np.asarray(picture))
    assert torch.is_inference_mode_enabled() is False
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        Public.load(tmp_path)


def test_an_inpainter_takes_paths_and_single_channels_and_gives_arrays_that_can_be_written_to(model, tmp_path) -> None:
    inpainter = Inpainter(model, policy="crop", keep_candidates=False)
    image, mask = make_image(1, 64), holes(64, 64, (10, 10, 30, 30))
    expected = inpainter.inpaint(image, mask)
    Image.fromarray(image).save(tmp_path / "photo.png")
    Image.fromarray(mask * 255).save(tmp_path / "mask.png")
    for path in (str, Path):
        opened = inpainter.inpaint(path(tmp_path / "photo.png"), path(tmp_path / "mask.png"))
        assert np.array_equal(np.asarray(opened), expected)
    assert np.array_equal(inpainter.inpaint(image, mask[..., None]), expected)
    grey = image[..., :1]
    assert np.array_equal(inpainter.inpaint(grey, mask)[..., 0], inpainter.inpaint(grey[..., 0], mask))
    for array in (expected, inpainter.inpaint(image, mask * 0)):
        array[0, 0] = 7
    assert image[0, 0].tolist() != [7, 7, 7]


def test_an_inpainter_travels_to_another_process_and_fills_the_same(model) -> None:
    inpainter = Inpainter(model, policy="crop", context=32, feather=2, seed=5)
    image, mask = make_image(1, 64), holes(64, 64, (10, 10, 30, 30))
    other = pickle.loads(pickle.dumps(inpainter))
    assert np.array_equal(other.inpaint(image, mask), inpainter.inpaint(image, mask))
    assert (other.context, other.feather, other.seed, other.policy) == (32, 2, 5, "crop")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_one_sentence(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^device cuda needs a GPU that PyTorch can use, and there is none here; use"):
        Inpainter.load(tmp_path, device="cuda")


def test_type_hints_are_installed_with_the_package() -> None:
    from importlib.resources import files

    assert (files("tmad") / "py.typed").is_file()
