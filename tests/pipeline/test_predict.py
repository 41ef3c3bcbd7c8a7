"""Batch inpainting: pairing, the ledger, what a second call does, and that no bad input ends the job."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import MissingInput, ModelNotFound, TooManyBadImages
from pipeline.predict import InpaintConfig, Pair, Row, Summary, finished, inpaint_folder, pair, report_failures
from pipeline.report import png_bytes
from tests.tmad.tiny import make_image, make_mask
from tmad.checkpoint import load_model, model_digest
from tmad.inpaint import Inpainter


def ledger(folder: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["input"] for row in rows}), "one line an input"
    return {row["input"]: row for row in rows}


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def config(tmp_path: Path, model_folder: Path) -> InpaintConfig:
    """Good and bad inputs: two to fill in a tree, and one of each kind that cannot be."""
    image, mask = png_bytes(make_image(0)), png_bytes(make_mask() * np.uint8(255))
    for key, content in {
        "a/one.png": image,
        "b/two.jpg": png_bytes(Image.fromarray(make_image(1)).convert("L")),
        "truncated.png": image[: len(image) // 2],
        "empty.png": b"",
        "text.jpg": b"this is no image",
        "without.png": image,
        "inverted.png": image,
        "small.png": image,
        "all.png": image,
        "badmask.png": image,
        "twice.png": image,
        "twice.jpg": image,
    }.items():
        write(tmp_path / "images" / key, content)
    for key, content in {
        "a/one.png": mask,
        "b/two.png": mask,
        "truncated.png": mask,
        "empty.png": mask,
        "text.png": mask,
        "inverted.png": png_bytes((1 - make_mask()) * np.uint8(255)),
        "small.png": png_bytes(make_mask()[:50] * np.uint8(255)),
        "all.png": png_bytes(np.full((64, 64), 255, dtype=np.uint8)),
        "badmask.png": mask[:40],
        "twice.png": mask,
    }.items():
        write(tmp_path / "masks" / key, content)
    return InpaintConfig(
        input=str(tmp_path / "images"),
        masks=str(tmp_path / "masks"),
        output=str(tmp_path / "out"),
        model=str(model_folder),
        num_actors=2,
        cpus_per_actor=0.5,
    )


@pytest.mark.ray
def test_a_folder_is_filled_every_input_is_accounted_for_and_a_second_call_does_nothing_twice(
    ray_session: None, config: InpaintConfig, tmp_path: Path, model_folder: Path
) -> None:
    out = tmp_path / "out"
    first = inpaint_folder(config)
    assert (first.done, first.kept, first.skipped, first.failed) == (3, 0, 1, 8)
    rows = ledger(out)
    assert {key: (row["status"], row["reason"]) for key, row in rows.items()} == {
        "a/one.png": ("done", None),
        "b/two.jpg": ("done", None),
        "inverted.png": ("done", None),
        "without.png": ("skipped", "no-mask"),
        "truncated.png": ("failed", "image-truncated"),
        "empty.png": ("failed", "image-empty-file"),
        "text.jpg": ("failed", "image-not-an-image"),
        "small.png": ("failed", "size-mismatch"),
        "all.png": ("failed", "all-hole"),
        "badmask.png": ("failed", rows["badmask.png"]["reason"]),
        "twice.png": ("failed", "same-name"),
        "twice.jpg": ("failed", "same-name"),
    }
    assert rows["badmask.png"]["reason"].startswith("mask-")
    assert "may be inverted" in rows["inverted.png"]["detail"]
    assert rows["a/one.png"]["model_digest"] == model_digest(model_folder)
    assert rows["a/one.png"]["hole_fraction"] == pytest.approx(make_mask().mean())
    assert (rows["a/one.png"]["height"], rows["a/one.png"]["width"]) == (64, 64)
    assert rows["a/one.png"]["seconds"] > 0
    pictures = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert pictures == ["a/one.png", "b/two.png", "inverted.png"]

    own = Inpainter(load_model(model_folder))(make_image(0), make_mask(), image_id="a/one.png").output
    assert np.array_equal(np.asarray(Image.open(out / "a" / "one.png")), own)
    grey = Image.open(out / "b" / "two.png")
    before = np.asarray(Image.fromarray(make_image(1)).convert("L"))
    assert grey.mode == "L"
    assert np.array_equal(np.asarray(grey)[make_mask() == 0], before[make_mask() == 0])

    written = (out / "a" / "one.png").stat().st_mtime_ns
    (out / "b" / "two.png").unlink()
    second = inpaint_folder(config)
    assert (second.done, second.kept, second.skipped, second.failed) == (1, 2, 1, 8)
    assert (out / "a" / "one.png").stat().st_mtime_ns == written
    assert (out / "b" / "two.png").exists()
    assert ledger(out)["a/one.png"] == rows["a/one.png"]


def test_only_what_this_model_and_seed_finished_and_is_still_there_is_kept() -> None:
    done = {"mask": "m", "status": "done", "model_digest": "d", "seed": 0}
    rows = [
        Row(input="kept", output="kept.png", **done),
        Row(input="lost", output="lost.png", **done),
        Row(input="model", output="model.png", **{**done, "model_digest": "e"}),
        Row(input="seed", output="seed.png", **{**done, "seed": 1}),
        Row(input="failed", output=None, **{**done, "status": "failed"}),
        Row(input="changed", output="changed.png", **done),
        Row(input="changed", output=None, **{**done, "status": "failed"}),
    ]
    there = {"kept.png", "model.png", "seed.png", "changed.png"}
    assert list(finished([asdict(row) for row in rows], there, digest="d", seed=0)) == ["kept"]
    assert finished([{"input": "kept", "from": "another version"}], there, digest="d", seed=0) == {}


def test_if_every_input_fails_the_job_says_so_after_writing_the_ledger(config: InpaintConfig, tmp_path: Path) -> None:
    for path in (tmp_path / "images").rglob("*.*"):
        if path.stem != "twice":
            path.unlink()
    with pytest.raises(TooManyBadImages, match=r"2 of 2 inputs failed \(2 same-name\)"):
        inpaint_folder(config)
    assert len(ledger(tmp_path / "out")) == 2


@pytest.mark.parametrize(("limit", "raises"), [(1.0, False), (0.5, False), (0.2, True)])
def test_the_share_of_failures_that_is_tolerated_is_a_setting(limit: float, raises: bool) -> None:
    summary = Summary(done=2, kept=1, skipped=0, failed=1, reasons={"all-hole": 1}, seconds=1.0, model_digest="d")
    with pytest.raises(TooManyBadImages) if raises else nullcontext():
        report_failures(summary, total=4, limit=limit, ledger="out/ledger.jsonl")


def test_images_and_masks_are_paired_by_place_and_stem() -> None:
    images = ["a.jpg", "b/a.png", "b/c.tif", "d.v2.png", "lost.png"]
    masks = ["a.png", "b/a.jpg", "b/c.png", "d.v2.png", "other.png"]
    pairs, rows = pair(images, masks)
    assert pairs == [
        Pair("a.jpg", "a.png", "a.png"),
        Pair("b/a.png", "b/a.jpg", "b/a.png"),
        Pair("b/c.tif", "b/c.png", "b/c.png"),
        Pair("d.v2.png", "d.v2.png", "d.v2.png"),
    ]
    assert [(row.input, row.status, row.reason) for row in rows] == [("lost.png", "skipped", "no-mask")]


def test_a_suffix_of_masks_is_expected_where_it_was_given() -> None:
    pairs, rows = pair(["a.jpg", "b.jpg"], ["a_mask.png", "b.png"], mask_suffix="_mask")
    assert pairs == [Pair("a.jpg", "a_mask.png", "a.png")]
    assert rows[0].detail == "no mask named b_mask.*"


def test_two_images_or_masks_of_one_stem_are_refused_rather_than_guessed() -> None:
    pairs, rows = pair(["a.jpg", "a.png", "b.jpg"], ["a.png", "b.png", "b.gif"])
    assert pairs == []
    assert [(row.input, row.reason) for row in rows] == [
        ("a.jpg", "same-name"),
        ("a.png", "same-name"),
        ("b.jpg", "same-name"),
    ]
    assert "their results would overwrite each other" in str(rows[0].detail)
    assert "several masks for one image: b.png, b.gif" in str(rows[2].detail)


@pytest.mark.parametrize("output", ["images", "images/filled", "masks"])
def test_an_output_among_the_inputs_is_refused(config: InpaintConfig, tmp_path: Path, output: str) -> None:
    with pytest.raises(ValueError, match="results would be taken for inputs"):
        inpaint_folder(InpaintConfig(**{**vars(config), "output": str(tmp_path / output)}))


def test_missing_folders_and_models_are_named_before_ray_starts(config: InpaintConfig, tmp_path: Path) -> None:
    def run(**changes: str) -> Summary:
        return inpaint_folder(InpaintConfig(**{**vars(config), **changes}))

    with pytest.raises(MissingInput, match=r"there is no folder .*nowhere"):
        run(input=str(tmp_path / "nowhere"))
    with pytest.raises(MissingInput, match=r"there is no folder .*nowhere"):
        run(masks=str(tmp_path / "nowhere"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(MissingInput, match=r"no image in .*bare"):
        run(input=str(tmp_path / "bare"))
    with pytest.raises(ModelNotFound, match=r"no model at .*nowhere"):
        run(model=str(tmp_path / "nowhere"))


def test_a_row_of_the_ledger_has_the_columns_that_are_documented() -> None:
    row = Row(input="a", mask=None, output=None, status="failed")
    assert list(vars(row)) == [
        *("input", "mask", "output", "status", "reason", "detail", "seconds", "hole_fraction", "height", "width"),
        *("model_digest", "seed"),
    ]
