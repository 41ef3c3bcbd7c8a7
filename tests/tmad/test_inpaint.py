"""The inference API: any size and mode in, valid pixels bit-identical, bounded chunks, clear refusals."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.utils.parametrize import is_parametrized

from tests.tmad.tiny import MODEL, make_image, make_mask, with_noise
from tmad.config import MemoryConfig, RetrievalConfig
from tmad.holes import MaskRule
from tmad.images import to_model, to_rgb, to_uint8
from tmad.inpaint import EmptyMaskWarning, Inpainter, MaskPolarityWarning, UnusableInput, hole_mask
from tmad.model import TMAD, folded


@pytest.fixture(scope="module")
def model() -> TMAD:
    return with_noise(TMAD(MODEL, seed=3)).eval()


@pytest.fixture(scope="module")
def inpainter(model: TMAD) -> Inpainter:
    return Inpainter(model)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return make_image(seed, side=max(height, width, 8))[:height, :width]


def box(height: int, width: int) -> np.ndarray:
    """A hole in the upper left part that leaves at least one valid pixel."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[: max(1, height // 2), : max(1, width // 2)] = 1
    return mask


@pytest.mark.parametrize(
    "size", [(64, 64), (50, 71), (16, 33), (17, 16), (15, 15), (9, 40), (3, 5), (1, 9), (40, 1), (2, 1)]
)
def test_any_size_keeps_its_size_and_every_valid_pixel(inpainter: Inpainter, size: tuple[int, int]) -> None:
    image, mask = picture(*size), box(*size)
    result = inpainter(image, mask)
    assert isinstance(result.output, np.ndarray)
    assert result.output.shape == image.shape
    assert result.output.dtype == np.uint8
    assert np.array_equal(result.output[mask == 0], image[mask == 0])
    assert np.array_equal(result.coarse[mask == 0], image[mask == 0])
    assert result.hole_fraction == pytest.approx(mask.mean())


def test_the_hole_is_filled_with_something_else_than_was_there(inpainter: Inpainter) -> None:
    image, mask = picture(64, 64), make_mask()
    result = inpainter(image, mask)
    inside = mask > 0
    assert (np.asarray(result.output)[inside] != image[inside]).any(axis=-1).mean() > 0.9
    assert (np.asarray(result.output)[inside] != result.coarse[inside]).any(axis=-1).mean() > 0.9


def test_what_lies_in_the_hole_has_no_influence(inpainter: Inpainter) -> None:
    image, mask = picture(50, 71), box(50, 71)
    other = np.where(mask[..., None] > 0, 255 - image, image)
    assert np.array_equal(inpainter(image, mask).output, inpainter(other, mask).output)


def in_mode(mode: str) -> Image.Image:
    rgb = Image.fromarray(picture(40, 52))
    if mode == "I;16":
        return Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    if mode in ("RGBA", "LA", "PA"):
        alpha = Image.fromarray(np.arange(40 * 52, dtype=np.int64).reshape(40, 52).astype(np.uint8))
        base = rgb.convert("L" if mode == "LA" else "RGB")
        base.putalpha(alpha)
        return base.convert(mode)
    if mode == "P with transparency":
        palette = rgb.quantize(32)
        palette.info["transparency"] = 3
        return palette
    return rgb.convert(mode)


MODES = ["1", "L", "LA", "P", "P with transparency", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_every_image_mode_is_filled_and_valid_colours_stay(inpainter: Inpainter, mode: str) -> None:
    image, mask = in_mode(mode), box(40, 52)
    result = inpainter(image, mask)
    assert isinstance(result.output, Image.Image)
    assert result.output.size == image.size
    assert np.array_equal(to_rgb(result.output)[mask == 0], to_rgb(image)[mask == 0])
    assert not np.array_equal(to_rgb(result.output), to_rgb(image))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_plain_modes_come_back_as_they_were_with_alpha_and_every_valid_byte(inpainter: Inpainter, mode: str) -> None:
    image, mask = in_mode(mode), box(40, 52)
    output = inpainter(image, mask).output
    assert isinstance(output, Image.Image)
    assert output.mode == mode
    assert np.array_equal(np.asarray(output)[mask == 0], np.asarray(image)[mask == 0])
    if mode.endswith("A"):
        assert output.getchannel("A").tobytes() == image.getchannel("A").tobytes()


@pytest.mark.parametrize("channels", [0, 3, 4])
def test_arrays_come_back_as_arrays_of_their_shape(inpainter: Inpainter, channels: int) -> None:
    image = picture(20, 30)
    image = image[:, :, 0] if channels == 0 else np.dstack([image, image])[:, :, :channels]
    output = inpainter(image, box(20, 30)).output
    assert isinstance(output, np.ndarray)
    assert output.shape == image.shape
    assert np.array_equal(output[box(20, 30) == 0], image[box(20, 30) == 0])


LARGE = {
    "original": {},
    "crop": {"policy": "crop", "context": 32},
    "resize": {"policy": "resize", "limit": 96},  # beyond it, texture is made in tiles
}


def two_holes(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[3 : height // 2, 5 : width // 3] = 1
    mask[height - 45 :, width - 60 : width - 4] = 1
    return mask


@pytest.mark.parametrize("mode", ["sample", "weighted_sum"])
@pytest.mark.parametrize("policy", LARGE)
def test_chunks_of_any_size_give_the_same_picture(policy: str, mode: str) -> None:
    config = replace(MODEL, retrieval=replace(MODEL.retrieval, mode=mode))
    model = with_noise(TMAD(config, seed=3))
    image, mask = picture(150, 230), two_holes(150, 230)
    whole = Inpainter(model, cells_per_chunk=10_000, **LARGE[policy])(image, mask)
    for cells_per_chunk in (1, 7):
        chunked = Inpainter(model, cells_per_chunk=cells_per_chunk, **LARGE[policy])(image, mask)
        # Matrix products round differently by size: half a grey level can fall to either side.
        difference = np.abs(np.asarray(chunked.output).astype(int) - np.asarray(whole.output))
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
        for name in ("coarse", "candidates", "candidates_yx", "cells_yx", "memory", "memory_yx"):
            assert np.array_equal(getattr(chunked, name), getattr(whole, name)), name


def test_a_wider_overlap_needs_no_other_chunks() -> None:
    for overlap in (0.0, 0.5):
        model = with_noise(TMAD(replace(MODEL, psnet=replace(MODEL.psnet, overlap=overlap)), seed=3))
        image, mask = picture(100, 130), two_holes(100, 130)
        results = [np.asarray(Inpainter(model, cells_per_chunk=n)(image, mask).output).astype(int) for n in (1, 10_000)]
        assert np.abs(results[0] - results[1]).max() <= 1


def test_no_part_is_larger_than_its_chunk_and_what_psnet_sees_around_it(
    model: TMAD, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, asked = [], []
    synthesize, retrieval = model.synthesize, model.retrieval.forward
    monkeypatch.setattr(model, "synthesize", lambda c, *more: sizes.append(c.shape[-2:]) or synthesize(c, *more))
    monkeypatch.setattr(
        model.retrieval, "forward", lambda cells, *more: asked.append(cells.shape[1]) or retrieval(cells, *more)
    )
    mask = np.zeros((200, 230), np.uint8)
    mask[40:170, 30:200] = 1
    result = Inpainter(model, cells_per_chunk=5)(picture(200, 230), mask)
    assert max(asked) == 5
    assert sum(asked) == len(result.cells_yx) == 9 * 12
    # Squares of two cells, with 32 pixels that PSNet reaches and 8 that windows reach around them, in whole cells.
    assert model.psnet.reach + MODEL.overlap == 40
    assert max(max(size) for size in sizes) == 2 * 16 + 2 * 48
    assert len(sizes) == 5 * 6


def test_the_result_is_that_of_the_generator(model: TMAD) -> None:
    # Sides that need no padding and a picture without parts: what training computes is what inference gives.
    image, mask = picture(96, 112), np.zeros((96, 112), np.uint8)
    mask[20:70, 30:90] = 1
    result = Inpainter(model, cells_per_chunk=4, coherence=0)(image, mask)
    cells = torch.from_numpy(result.cells_yx // 16 @ np.array([7, 1]))[None]
    tensor = to_model(torch.from_numpy(image).permute(2, 0, 1)[None])
    with torch.no_grad():
        out = model(tensor, torch.from_numpy(mask)[None, None].float(), torch.from_numpy(result.memory_yx)[None], cells)
    expected = to_uint8(out.output[0]).permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(result.output).astype(int) - expected).max() <= 1
    assert np.array_equal(result.candidates_yx, result.memory_yx[out.candidate_index[0].numpy()])
    assert np.array_equal(result.memory, to_uint8(out.pool[0]).permute(0, 2, 3, 1).numpy())


def test_with_weighted_sum_the_result_is_that_of_the_generator_too() -> None:
    model = with_noise(TMAD(replace(MODEL, retrieval=replace(MODEL.retrieval, mode="weighted_sum")), seed=3))
    test_the_result_is_that_of_the_generator(model.eval())


@pytest.mark.parametrize("coherence", [0.0, 1.0])
@pytest.mark.parametrize("policy", LARGE)
def test_memory_and_candidates_are_patches_of_what_the_networks_saw_at_their_places(
    model: TMAD, policy: str, coherence: float
) -> None:
    image, mask = picture(150, 230), two_holes(150, 230)
    result = Inpainter(model, **LARGE[policy], coherence=coherence)(image, mask)
    pools = 2 if policy == "crop" else 1
    if not coherence:
        assert len(result.memory) == pools * MODEL.memory.pool_size
    assert result.memory.shape == (len(result.memory_yx), 16, 16, 3)
    for patch, (y, x) in zip(result.memory, result.memory_yx, strict=True):
        # Coarse pixels were rounded to uint8 on the way into one of the two.
        assert np.abs(patch.astype(int) - result.coarse[y : y + 16, x : x + 16]).max() <= 1
    for n, places in enumerate(result.candidates_yx):
        for c, place in enumerate(places):
            (number,) = np.flatnonzero((result.memory_yx == place).all(1))[:1]
            assert np.array_equal(result.candidates[n, c], result.memory[number])


def test_without_candidates_no_memory_is_handed_out(model: TMAD) -> None:
    result = Inpainter(model, keep_candidates=False)(picture(64, 64), make_mask())
    for name in ("coarse", "candidates", "candidates_yx", "memory", "memory_yx"):
        assert getattr(result, name).size == 0, name
    assert len(result.cells_yx) == 9


@pytest.mark.parametrize("size", [(12, 37), (37, 12), (9, 9), (30, 50)])
def test_no_window_of_the_memory_lies_in_the_padding_of_a_side_that_is_long_enough(
    model: TMAD, size: tuple[int, int]
) -> None:
    mask = np.zeros(size, np.uint8)
    mask[:4, :4] = 1
    for policy, coherence in itertools.product(("original", "crop"), (0.0, 1.0)):
        corners = Inpainter(model, policy=policy, coherence=coherence)(picture(*size), mask).memory_yx
        assert len(corners) >= MODEL.memory.pool_size
        # A side shorter than a patch borrows from its padding what is missing, and no more.
        assert (corners >= 0).all()
        assert (corners + 16 <= np.maximum(size, 16)).all()


@pytest.mark.parametrize("coherence", [0.0, 1.0])
def test_the_same_call_gives_the_same_bytes_and_the_seed_and_id_choose_the_memory(
    model: TMAD, coherence: float
) -> None:
    image, mask, inpainter = picture(64, 64), make_mask(), Inpainter(model, coherence=coherence)

    def pools(seed: int, image_id: str) -> bytes:
        return inpainter.with_options(seed=seed)(image, mask, image_id=image_id).candidates.tobytes()

    first = Inpainter(model)(image, mask, image_id="a")
    torch.manual_seed(99)
    again = Inpainter(model)(image, mask, image_id="a")
    assert np.array_equal(first.output, again.output)
    assert pools(0, "a") == pools(0, "a")
    assert pools(0, "a") != pools(1, "a")
    assert pools(0, "a") != pools(0, "b")
    again = Inpainter(model, seed=1, coherence=coherence)(image, mask, image_id="a")
    assert pools(1, "a") == again.candidates.tobytes()
    assert inpainter.with_options(seed=1).model is inpainter.model


def test_candidates_are_exact_patches_of_the_image_where_the_memory_is_clean() -> None:
    config = replace(MODEL, memory=MemoryConfig(pool_size=4, rule="clean", stride_divisor=2))
    image, mask = picture(64, 64), np.zeros((64, 64), dtype=np.uint8)
    mask[:16, :16] = 1
    result = Inpainter(TMAD(config))(image, mask)
    windows = np.lib.stride_tricks.sliding_window_view(image, (16, 16), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    assert result.candidates.shape == (1, config.retrieval.num_candidates, 16, 16, 3)
    for patch in result.candidates[0]:
        assert (windows == patch).all(axis=(2, 3, 4)).any()


def test_the_memory_of_an_image_that_needs_padding_lies_inside_the_image(
    model: TMAD, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    read = model.read_memory
    monkeypatch.setattr(model, "read_memory", lambda coarse, yx: seen.update(yx=yx) or read(coarse, yx))
    Inpainter(model)(picture(50, 71), box(50, 71))
    assert int(seen["yx"][..., 0].max()) + MODEL.patch_size <= 50
    assert int(seen["yx"][..., 1].max()) + MODEL.patch_size <= 71


def test_only_cells_that_touch_the_hole_are_synthesized(inpainter: Inpainter) -> None:
    mask = np.zeros((64, 70), dtype=np.uint8)
    mask[15:17, 69] = 1
    result = inpainter(picture(64, 70), mask)
    assert result.cells_yx.tolist() == [[0, 64], [16, 64]]


def test_no_hole_gives_the_input_back(inpainter: Inpainter) -> None:
    for image in (picture(20, 30), in_mode("I;16"), in_mode("CMYK")):
        size = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
        result = inpainter(image, np.zeros(size, dtype=np.uint8))
        assert type(result.output) is type(image) or isinstance(result.output, Image.Image)
        assert np.array_equal(np.asarray(result.output), np.asarray(image))
        assert result.output is not image
        assert result.hole_fraction == 0
        assert len(result.candidates) == 0


def test_nothing_but_hole_is_refused_with_the_name_of_the_image(inpainter: Inpainter) -> None:
    with pytest.raises(UnusableInput, match=r"^sea/7\.jpg: the mask leaves nothing but hole") as error:
        inpainter(picture(20, 30), np.ones((20, 30), dtype=np.uint8), image_id="sea/7.jpg")
    assert error.value.reason == "all-hole"


def test_another_size_is_refused_with_both_sizes(inpainter: Inpainter) -> None:
    with pytest.raises(ValueError, match=r"a: mask is 30x20 \(height x width\), the image is 20x30"):
        inpainter(picture(20, 30), box(30, 20), image_id="a")
    with pytest.raises(ValueError, match=r"filled is 64x64 .* the image is 20x30"):
        inpainter(picture(20, 30), box(20, 30), filled=picture(64, 64))


def test_a_mask_that_looks_inverted_warns_and_is_used_as_it_is(inpainter: Inpainter) -> None:
    mask = 1 - make_mask()
    with pytest.warns(
        MaskPolarityWarning, match=r"b: the mask may be inverted: 78% of the image and 100% of its border"
    ):
        result = inpainter(picture(64, 64), mask, image_id="b")
    assert result.notes[0].startswith("the mask may be inverted")
    assert np.array_equal(np.asarray(result.output)[mask == 0], picture(64, 64)[mask == 0])


def test_a_large_hole_inside_the_image_does_not_warn(inpainter: Inpainter) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[2:62, 2:62] = 1
    assert inpainter(picture(64, 64), mask).notes == ()


def in_palette(indices: list, palette: list[int]) -> Image.Image:
    image = Image.frombytes("P", (len(indices[0]), len(indices)), np.array(indices, np.uint8).tobytes())
    image.putpalette(palette)
    return image


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (np.array([[True, False]]), [[1, 0]]),
        (np.array([[0, 1]], dtype=np.uint8), [[0, 1]]),
        (np.array([[0, 1]], dtype=np.int64), [[0, 1]]),
        (np.array([[0, 127, 128, 255]], dtype=np.uint8), [[0, 0, 1, 1]]),
        (np.array([[0, 32767, 32768, 65535]], dtype=np.uint16), [[0, 0, 1, 1]]),
        (np.array([[0.0, 0.5, 0.51, 1.0]]), [[0, 0, 1, 1]]),
        (Image.fromarray(np.array([[0, 255, 200]], dtype=np.uint8)), [[0, 1, 1]]),
        (Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1"), [[0, 1]]),
        (Image.fromarray(np.array([[[0, 0, 0, 255], [255, 255, 255, 0]]], dtype=np.uint8)), [[0, 1]]),
        (Image.fromarray(np.array([[0, 40000]], dtype=np.uint16)), [[0, 1]]),
        (np.array([[[0], [1]]], dtype=np.uint8), [[0, 1]]),
        (np.array([[[0, 1], [1, 0]]], dtype=bool), [[0, 1], [1, 0]]),
        (np.array([[[0, 0, 0], [255, 0, 0], [0, 0, 200]]], dtype=np.uint8), [[0, 1, 1]]),
        (np.array([[[0, 0, 0, 255], [255, 255, 255, 0]]], dtype=np.uint8), [[0, 1]]),
        (Image.fromarray(np.array([[[0, 0, 0], [255, 0, 0], [0, 0, 200]]], dtype=np.uint8)), [[0, 1, 1]]),
        (in_palette([[0, 1]], [0, 0, 0, 128, 0, 0]), [[0, 1]]),
        (Image.fromarray(np.array([[0, 70000]], dtype=np.int32).clip(0, 65535)), [[0, 1]]),
        (Image.fromarray(np.array([[0.0, 0.5, 0.6]], dtype=np.float32)), [[0, 0, 1]]),
        (Image.fromarray(np.array([[0.0, 127.0, 200.0]], dtype=np.float32)), [[0, 0, 1]]),
    ],
)
def test_every_kind_of_mask_is_read_by_the_stated_rule(mask: np.ndarray | Image.Image, expected: list) -> None:
    hole, notes = hole_mask(mask)
    assert hole.dtype == np.uint8
    assert hole.tolist() == expected
    assert notes == ()


SOFT = np.array([[[0, 0, 0, 0], [0, 0, 0, 90], [0, 0, 0, 255]]], dtype=np.uint8)


@pytest.mark.parametrize(
    ("mask", "rule", "expected"),
    [
        (np.array([[0, 40, 41, 255]], np.uint8), {"threshold": 40}, [[0, 0, 1, 1]]),
        (np.array([[0, 40 * 257, 41 * 257, 65535]], np.uint16), {"threshold": 40}, [[0, 0, 1, 1]]),
        (np.array([[0, 1]], np.uint8), {"threshold": 200}, [[0, 1]]),
        (np.array([[0, 1, 20]], np.uint8), {"value": "nonzero"}, [[0, 1, 1]]),
        (np.array([[0, 1, 65535]], np.uint16), {"value": "nonzero"}, [[0, 1, 1]]),
        (in_palette([[0, 1, 2]], [0, 0, 0, 5, 5, 5, 0, 0, 0]), {"value": "nonzero"}, [[0, 1, 1]]),
        (Image.fromarray(SOFT), {"value": "alpha"}, [[0, 0, 1]]),
        (SOFT, {"value": "alpha"}, [[0, 0, 1]]),
        (Image.fromarray(SOFT), {"value": "alpha", "threshold": 0}, [[0, 1, 1]]),
        (Image.fromarray(SOFT), {"value": "alpha", "hole": "black"}, [[1, 1, 0]]),
        (Image.fromarray(SOFT), {"value": "nonzero", "hole": "black"}, [[1, 1, 1]]),
        (np.array([[0, 127, 128]], np.uint8), {"hole": "black"}, [[1, 1, 0]]),
    ],
)
@pytest.mark.filterwarnings("ignore:the mask is black")
def test_colour_value_and_threshold_of_a_mask_are_settings(mask, rule, expected) -> None:
    assert hole_mask(mask, MaskRule(**rule))[0].tolist() == expected


def test_a_mask_whose_hole_may_lie_elsewhere_says_where(inpainter: Inpainter) -> None:
    with pytest.warns(EmptyMaskWarning, match="the mask is black, with a hole in its alpha channel: mask_value alpha"):
        hole_mask(Image.fromarray(SOFT))
    with pytest.raises(UnusableInput, match="no alpha channel, which mask_value=alpha asks for"):
        hole_mask(Image.new("RGB", (4, 4)), MaskRule(value="alpha"))
    with pytest.raises(ValueError, match="0 to 254, got 255"):
        MaskRule(threshold=255)
    with pytest.raises(ValueError, match="does not go with mask_value=nonzero"):
        MaskRule(value="nonzero", threshold=3)


def test_a_grey_mask_without_a_hole_warns() -> None:
    with pytest.warns(EmptyMaskWarning, match="values up to 9, none above 127: nothing is white; mask_value nonzero"):
        hole, notes = hole_mask(np.array([[0, 9]], dtype=np.uint8))
    assert hole.sum() == 0
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((4, 4, 2), dtype=np.uint8), r"1, 3 or 4 channels, got \(4, 4, 2\)"),
        (np.zeros((2, 1, 4, 4), dtype=np.uint8), r"1, 3 or 4 channels, got \(2, 1, 4, 4\)"),
        (np.full((4, 4), 7.0), r"must lie in \[0, 1\], got \[7, 7\]"),
        (np.full((4, 4), np.nan), r"must lie in \[0, 1\]"),
        (np.full((4, 4), -1), r"mask values must lie in .* got \[-1, -1\]"),
        (np.full((4, 4), "x"), "must be bool, integer or float"),
    ],
)
def test_a_mask_that_cannot_be_read_is_refused(mask: np.ndarray, message: str) -> None:
    with pytest.raises(UnusableInput, match=message):
        hole_mask(mask)


@pytest.mark.parametrize(
    "image",
    [
        np.full((8, 8, 3), 1.5),
        np.full((8, 8, 3), np.nan),
        np.zeros((8, 8, 2), dtype=np.uint8),
        np.zeros((0, 8, 3), dtype=np.uint8),
        torch.zeros((8, 8, 3), dtype=torch.uint8),  # channels last
    ],
)
def test_an_array_that_is_no_image_is_refused(inpainter: Inpainter, image: np.ndarray) -> None:
    with pytest.raises(UnusableInput, match="must be a file, a Pillow image, or an array"):
        inpainter(image, box(8, 8))


def test_behind_a_foreign_result_psnet_alone_works_and_valid_pixels_stay(
    model: TMAD, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, mask = picture(50, 71), box(50, 71)
    foreign = np.where(mask[..., None] > 0, picture(50, 71, seed=5), 255 - image)
    monkeypatch.setattr(model, "predict_coarse", lambda *_: pytest.fail("the coarse network was asked"))
    result = Inpainter(model)(image, mask, filled=foreign)
    assert np.array_equal(np.asarray(result.output)[mask == 0], image[mask == 0])
    assert np.array_equal(result.coarse, np.where(mask[..., None] > 0, foreign, image))
    assert not np.array_equal(result.output, result.coarse)


def test_a_foreign_result_changes_the_result(inpainter: Inpainter) -> None:
    image, mask = picture(64, 64), make_mask()
    dark, light = (inpainter(image, mask, filled=np.full_like(image, value)).output for value in (0, 255))
    assert not np.array_equal(dark, light)


def test_the_own_coarse_result_handed_in_as_foreign_gives_nearly_the_same(inpainter: Inpainter) -> None:
    image, mask = picture(64, 64), make_mask()
    own = inpainter(image, mask)
    behind = inpainter(image, mask, filled=own.coarse)
    # The coarse result was rounded to uint8 on its way.
    assert np.abs(np.asarray(behind.output).astype(int) - np.asarray(own.output)).max() <= 6


def test_the_weighted_sum_mode_is_usable_too() -> None:
    config = replace(MODEL, retrieval=replace(MODEL.retrieval, mode="weighted_sum"))
    assert isinstance(config.retrieval, RetrievalConfig)
    image, mask = picture(64, 64), make_mask()
    result = Inpainter(with_noise(TMAD(config, seed=3)))(image, mask)
    assert np.array_equal(np.asarray(result.output)[mask == 0], image[mask == 0])
    # It is another method than handing over the most similar patches.
    other = Inpainter(with_noise(TMAD(MODEL, seed=3)))(image, mask)
    assert not np.array_equal(result.output, other.output)


def test_inference_leaves_no_gradients_and_no_warnings(model: TMAD) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Inpainter(model)(picture(33, 33), box(33, 33))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_inpainter_has_a_copy_of_its_model_and_leaves_the_model_as_it_was() -> None:
    model, image, mask = with_noise(TMAD(MODEL, seed=3)), picture(64, 64), make_mask()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inpainter = Inpainter(model)
    first = inpainter(image, mask).output
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert np.array_equal(inpainter(image, mask).output, first)


def test_spectral_norms_computed_once_give_the_same_networks_to_the_last_bit(model: TMAD) -> None:
    once = folded(model)
    assert not any(is_parametrized(layer) for layer in once.modules())
    image, mask = torch.rand(2, 3, 32, 48) * 2 - 1, (torch.rand(2, 1, 32, 48) > 0.5).float()
    pool_yx, cells = torch.zeros(2, MODEL.memory.pool_size, 2, dtype=torch.int64), torch.arange(6).expand(2, 6)
    model.eval()
    assert torch.equal(once(image, mask, pool_yx, cells).output, model(image, mask, pool_yx, cells).output)


SIZES = [(64, 64), (60, 50), (64, 64), (96, 200), (50, 71), (96, 200), (64, 64), (180, 190)]
"""Some are the same once they are padded; under `resize` the last ones are beyond the limit."""


def mixed() -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    """Pictures of several sizes with holes of different sizes at different places."""
    images, masks = [], []
    for seed, (height, width) in enumerate(SIZES):
        images.append(picture(height, width, seed))
        mask = np.zeros((height, width), np.uint8)
        mask[3 + 4 * seed : height // 2 + 2 * seed, 5 * seed + 2 : width // 2 + 3 * seed] = 1
        masks.append(mask)
    return images, masks, [f"picture {seed}" for seed in range(len(SIZES))]


FIELDS = ("output", "coarse", "candidates", "candidates_yx", "cells_yx", "memory", "memory_yx")


@pytest.mark.parametrize("policy", LARGE)
def test_what_shares_a_batch_with_a_picture_changes_no_bit_of_its_result(model: TMAD, policy: str) -> None:
    inpainter, (images, masks, names) = Inpainter(model, **LARGE[policy]), mixed()
    results = inpainter.batch(images, masks, image_ids=names)
    for image, mask, name, result in zip(images, masks, names, results, strict=True):
        alone = inpainter(image, mask, image_id=name)
        for what in FIELDS:
            assert np.array_equal(getattr(result, what), getattr(alone, what)), (name, what)


@pytest.mark.parametrize("mode", ["sample", "weighted_sum"])
@pytest.mark.parametrize("cells_per_chunk", [4, 256])
@pytest.mark.parametrize("policy", LARGE)
def test_pictures_that_go_through_the_networks_together_come_out_as_alone(
    policy: str, cells_per_chunk: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, where rounding may differ.
    model = with_noise(TMAD(replace(MODEL, retrieval=replace(MODEL.retrieval, mode=mode)), seed=3))
    options, (images, masks, names) = {"cells_per_chunk": cells_per_chunk, **LARGE[policy]}, mixed()
    inpainter = Inpainter(model, pixels_at_once=10**9, **options)
    seen: list[int] = []
    predict = inpainter.model.predict_coarse
    monkeypatch.setattr(
        inpainter.model, "predict_coarse", lambda image, *more: seen.append(len(image)) or predict(image, *more)
    )
    results = inpainter.batch(images, masks, image_ids=names)
    assert max(seen) >= 3
    for image, mask, name, result in zip(images, masks, names, results, strict=True):
        alone = Inpainter(model, **options)(image, mask, image_id=name)
        for what in FIELDS:
            difference = np.abs(getattr(result, what).astype(int) - getattr(alone, what))
            assert difference.max() <= (1 if getattr(result, what).dtype == np.uint8 else 0), (name, what)
            assert (difference > 0).mean() < 1e-3


def test_as_many_pixels_go_together_as_the_setting_says(model: TMAD, monkeypatch: pytest.MonkeyPatch) -> None:
    inpainter = Inpainter(model, pixels_at_once=3 * 64 * 64 + 100)
    sizes: list[int] = []
    for name in ("predict_coarse", "synthesize"):
        call = getattr(inpainter.model, name)
        monkeypatch.setattr(
            inpainter.model,
            name,
            lambda image, *more, call=call: sizes.append(image[:, 0].numel()) or call(image, *more),
        )
    inpainter.batch([picture(64, 64, seed) for seed in range(5)], [make_mask()] * 5)
    assert sizes == [3 * 64 * 64, 3 * 64 * 64, 2 * 64 * 64, 2 * 64 * 64]


def test_in_a_batch_a_picture_that_cannot_be_filled_costs_no_other_its_result(inpainter: Inpainter) -> None:
    images = [picture(20, 30, seed) for seed in range(4)]
    masks = [box(20, 30), np.ones((20, 30), np.uint8), box(30, 20), np.zeros((20, 30), np.uint8)]
    found = inpainter.batch(images, masks, image_ids=list("abcd"))
    assert np.array_equal(found[0].output, inpainter(images[0], masks[0], image_id="a").output)
    assert [error.reason for error in found[1:3]] == ["all-hole", "size-mismatch"]
    assert np.array_equal(found[3].output, images[3])
    with pytest.raises(ValueError, match=r"masks must be as many as images \(4\), got 1"):
        inpainter.batch(images, masks[:1])


def test_in_bfloat16_a_picture_is_nearly_the_same_and_its_candidates_are_found_in_float32(model: TMAD) -> None:
    image, mask = picture(48, 48), box(48, 48)
    exact, rounded = (Inpainter(model, precision=precision)(image, mask) for precision in ("fp32", "bf16"))
    difference = np.abs(rounded.output.astype(int) - exact.output)
    assert 0 < difference.mean() < 1
    assert np.array_equal(rounded.output[mask == 0], image[mask == 0])
    coarse = exact.coarse
    found = [Inpainter(model, precision=one)(image, mask, filled=coarse).candidates_yx for one in ("fp32", "bf16")]
    assert np.array_equal(*found)


def test_a_chunk_of_no_cells_is_refused(model: TMAD) -> None:
    with pytest.raises(ValueError, match="cells_per_chunk must be at least 1, got 0"):
        Inpainter(model, cells_per_chunk=0)
