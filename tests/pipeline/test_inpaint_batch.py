"""The batch job: every input is accounted for, only what is missing is done, results are those of the model alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.errors import CorruptSource, MissingInput, ModelNotFound, StorageFailed
from pipeline.inpaint import run
from pipeline.inpaint.config import InpaintConfig
from pipeline.inpaint.run import Summary, inpaint_all
from pipeline.inpaint.worker import InpaintWorker, Job
from pipeline.report.pictures import png_bytes
from pipeline.tracking import mlflow_client
from tests.conftest import ROOT
from tests.tmad.tiny import make_image, make_mask
from tmad.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_model, model_digest
from tmad.files import fill_file, open_file
from tmad.inpaint import Inpainter
from tmad.shell import inpaint_one

MASK = png_bytes(make_mask() * np.uint8(255))
PHOTO = png_bytes(make_image(0))


def fill_here(job: Job, todo: dict[str, str], folder: Path) -> Iterator[pa.Table]:
    """What the actors do, in this process."""
    worker = InpaintWorker({name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}, job)
    for number in range(0, len(todo), 3):
        yield worker.work({"number": number, "made_of": dict(list(todo.items())[number : number + 3])})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_fill_all", fill_here)


def ledger(out: object) -> dict[str, dict]:
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(f"{out}/ledger.parquet"))).to_pylist()
    assert len(rows) == len({row["input"] for row in rows}), "one row an input"
    return {row["input"]: row for row in rows}


def results(out: Path) -> dict[str, bytes]:
    """Everything but the ledger."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "ledger.parquet")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for key, content in files.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def jpeg(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture
def job(tmp_path: Path, model_folder: Path) -> Callable[..., InpaintConfig]:
    def make(
        images: dict[str, bytes] | None, masks: dict[str, bytes] | None = None, /, **changes: object
    ) -> InpaintConfig:
        places: dict[str, object] = {"input": tmp_path / "images"}
        if images is not None:
            write(tmp_path / "images", images)
        if masks is not None:
            places["masks"] = write(tmp_path / "masks", masks)
        settings = {**places, "output": tmp_path / "out", "model": model_folder, **changes}
        return InpaintConfig(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()})

    return make


GOOD_AND_BAD = {
    "a/one.png": PHOTO,
    "b/two.jpg": jpeg(make_image(1), quality=85),
    "truncated.png": PHOTO[: len(PHOTO) // 2],
    "empty.png": b"",
    "text.jpg": b"this is no image",
    "without.png": PHOTO,
    "inverted.png": PHOTO,
    "small.png": PHOTO,
    "all.png": PHOTO,
    "badmask.png": PHOTO,
    "nohole.png": PHOTO,
}
THEIR_MASKS = {
    "a/one.png": MASK,
    "b/two.png": MASK,
    "truncated.png": MASK,
    "empty.png": MASK,
    "text.png": MASK,
    "inverted.png": png_bytes((1 - make_mask()) * np.uint8(255)),
    "small.png": png_bytes(make_mask()[:50] * np.uint8(255)),
    "all.png": png_bytes(np.full((64, 64), 255, np.uint8)),
    "badmask.png": MASK[:40],
    "nohole.png": png_bytes(np.zeros((64, 64), np.uint8)),
}


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:.*may be inverted")
def test_every_input_is_accounted_for_and_a_second_call_does_only_what_is_missing(
    ray_session: None, job, tmp_path, model_folder
) -> None:
    config = job(GOOD_AND_BAD, THEIR_MASKS, num_actors=2, cpus_per_actor=0.5, images_per_task=2)
    out = tmp_path / "out"
    first = inpaint_all(config)
    assert (first.done, first.kept, first.skipped, first.failed) == (3, 0, 2, 6)
    rows = ledger(out)
    assert {key: (row["status"], row["reason"]) for key, row in rows.items()} == {
        "a/one.png": ("done", None),
        "b/two.jpg": ("done", None),
        "inverted.png": ("done", None),
        "without.png": ("skipped", "no-mask"),
        "nohole.png": ("skipped", "no-hole"),
        "truncated.png": ("failed", rows["truncated.png"]["reason"]),
        "empty.png": ("failed", "empty-file"),
        "text.jpg": ("failed", "not-an-image"),
        "small.png": ("failed", "mask-size"),
        "all.png": ("failed", "full-mask"),
        "badmask.png": ("failed", rows["badmask.png"]["reason"]),
    }
    assert rows["truncated.png"]["reason"] in ("truncated", "damaged")
    assert rows["badmask.png"]["reason"].startswith("mask-")
    assert "may be inverted" in rows["inverted.png"]["detail"]
    one = rows["a/one.png"]
    assert (one["model_digest"], one["model"], one["mask"]) == (
        model_digest(model_folder),
        str(model_folder),
        "a/one.png",
    )
    assert one["hole_fraction"] == pytest.approx(make_mask().mean())
    assert (one["height"], one["width"], one["bytes"]) == (64, 64, (out / "a" / "one.png").stat().st_size)
    assert one["seconds"] > 0
    found = results(out)
    assert set(found) == {"a/one.png", "b/two.jpg", "inverted.png"}
    own = Inpainter.load(model_folder)
    for key in found:
        hole = open_mask(THEIR_MASKS[key.replace(".jpg", ".png")])
        assert fill_file(own, open_file(GOOD_AND_BAD[key]), hole, image_id=key).data == found[key]

    written = (out / "a" / "one.png").stat().st_mtime_ns
    (out / "b" / "two.jpg").unlink()
    second = inpaint_all(config)
    assert (second.done, second.kept, second.skipped, second.failed) == (1, 9, 2, 6)
    assert (out / "a" / "one.png").stat().st_mtime_ns == written
    assert results(out) == found
    assert {key: row["status"] for key, row in ledger(out).items()} == {k: r["status"] for k, r in rows.items()}
    assert ledger(out)["a/one.png"] == one


def open_mask(data: bytes) -> np.ndarray:
    return (np.asarray(Image.open(io.BytesIO(data))) > 127).astype(np.uint8)


def test_failed_inputs_are_tried_again_only_if_asked_and_new_masks_are_found(here, job, tmp_path) -> None:
    images = {"a.png": PHOTO, "b.png": b"", "c.png": PHOTO}
    config = job(images, {"a.png": MASK, "b.png": MASK})
    assert inpaint_all(config).failed == 1
    again = inpaint_all(config)
    assert (again.done, again.kept, again.failed, again.skipped) == (0, 2, 1, 1)
    write(tmp_path / "masks", {"c.png": MASK})
    assert inpaint_all(config).done == 1
    retried = inpaint_all(replace(config, retry_failed=True))
    assert (retried.done, retried.kept, retried.failed) == (0, 2, 1)
    write(tmp_path / "images", {"b.png": PHOTO})
    repaired = inpaint_all(config)
    assert (repaired.done, repaired.kept, repaired.failed) == (1, 2, 0)


def test_another_model_or_setting_does_everything_again_and_workers_and_tasks_do_not(here, job, tmp_path) -> None:
    config = job({"a.png": PHOTO}, {"a.png": MASK})
    assert inpaint_all(config).done == 1
    assert inpaint_all(replace(config, images_per_task=3, num_actors=1, max_pixels=10**6)).done == 0
    before = results(tmp_path / "out")
    assert inpaint_all(replace(config, seed=1)).done == 1
    assert results(tmp_path / "out") != before
    assert inpaint_all(replace(config, dilate=3)).done == 1


def test_a_result_does_not_depend_on_the_batch_it_fell_into(here, job, tmp_path, monkeypatch) -> None:
    images = {f"{n}.png": png_bytes(make_image(n, 64 + 16 * n)) for n in range(5)}
    masks = {f"{n}.png": png_bytes(make_mask(64 + 16 * n) * np.uint8(255)) for n in range(5)}
    inpaint_all(job(images, masks))
    together = results(tmp_path / "out")
    monkeypatch.setattr(
        run,
        "_fill_all",
        lambda job, todo, folder: (t for key in reversed(todo) for t in fill_here(job, {key: todo[key]}, folder)),
    )
    inpaint_all(job(None, masks, output=tmp_path / "alone"))
    assert results(tmp_path / "alone") == together


@pytest.mark.parametrize("layout", ["tar", "parquet", "list", "s3"])
def test_images_and_masks_come_from_everywhere_with_one_result(here, job, layout, tmp_path, request) -> None:
    images = {"x/a.png": PHOTO, "b.jpg": jpeg(make_image(1))}
    masks = {"x/a.png": MASK, "b.png": MASK}
    inpaint_all(job(images, masks))
    expected = results(tmp_path / "out")
    places: dict[str, object] = {"output": tmp_path / "other"}
    if layout == "tar":
        for name, files in (("i", images), ("m", masks)):
            with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
                for key, data in files.items():
                    member = tarfile.TarInfo(key)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        places |= {"input": tmp_path / "i.tar", "masks": tmp_path / "m.tar"}
    elif layout == "parquet":
        table = {"jpg": list(images.values()), "name": list(images), "hole": list(masks.values())}
        pq.write_table(pa.table(table), tmp_path / "t.parquet")
        places |= {"input": tmp_path / "t.parquet", "key_column": "name", "mask_from": "column", "mask_column": "hole"}
    elif layout == "list":
        (tmp_path / "list.txt").write_text("x/a.png\nb.jpg\n")
        places |= {"input": tmp_path / "list.txt", "root": tmp_path / "images", "masks": tmp_path / "masks"}
    else:
        bucket = request.getfixturevalue("bucket")
        for folder, files in (("i", images), ("m", masks)):
            for key, data in files.items():
                storage.write_atomic(f"{bucket}/{folder}/{key}", data)
        places = {"input": f"{bucket}/i", "masks": f"{bucket}/m", "output": f"{bucket}/out"}
    config = job(None, None, **places)
    assert inpaint_all(config).done == 2
    out = config.output
    files = [key for key in storage.list_files(out) if key != "ledger.parquet"]
    assert {key: storage.read_bytes(storage.join(out, key)) for key in files} == expected
    assert inpaint_all(config).kept == 2


def test_rows_of_a_table_without_names_get_an_ending(here, job, tmp_path) -> None:
    pq.write_table(pa.table({"jpg": [PHOTO, jpeg(make_image(1))], "hole": [MASK, MASK]}), tmp_path / "t.parquet")
    inpaint_all(job(None, None, input=tmp_path / "t.parquet", mask_from="column", mask_column="hole"))
    assert set(results(tmp_path / "out")) == {"t.parquet#0.png", "t.parquet#1.jpg"}


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (["a_mask.png", "sub/b_mask.png"], {"mask_suffix": "_mask"}),
        (["a.hole7.png", "sub/b.hole12.png"], {"mask_pattern": r"(.+)\.hole\d+"}),
        (["a/0.png", "sub/b/0.png"], {}),
    ],
)
@pytest.mark.parametrize("among", [False, True])
def test_masks_are_paired_by_suffix_pattern_or_folder_also_among_the_images(
    here, job, tmp_path, names, settings, among
) -> None:
    masks = dict.fromkeys(names, MASK)
    images = {"a.png": PHOTO, "sub/b.jpg": jpeg(make_image(1))}
    if not among:
        summary = inpaint_all(job(images, masks, **settings))
        assert (summary.done, summary.skipped, summary.failed) == (2, 0, 0)
    elif settings:
        config = job({**images, **masks}, None, masks=tmp_path / "images", **settings)
        summary = inpaint_all(config)
        assert (summary.done, summary.skipped, summary.failed) == (2, 0, 0)
        assert set(results(tmp_path / "out")) == set(images)
    else:
        with pytest.raises(ValueError, match="with mask_suffix or mask_pattern they are told apart"):
            inpaint_all(job({**images, **masks}, None, masks=tmp_path / "images"))


def test_several_masks_of_one_image_are_joined(here, job, tmp_path) -> None:
    left, right = (png_bytes(make_mask(left=x, width=8) * np.uint8(255)) for x in (4, 40))
    inpaint_all(job({"a.png": PHOTO}, {"a/0.png": left, "a/1.png": right}))
    row = ledger(tmp_path / "out")["a.png"]
    assert row["mask"] == "a/0.png, a/1.png"
    assert row["hole_fraction"] == pytest.approx(2 * 8 * 30 / 64**2)


def changed(tmp_path: Path, key: str, before: np.ndarray) -> np.ndarray:
    after = np.asarray(Image.open(tmp_path / "out" / key).convert("RGB"))
    return (after != before).any(axis=2)


def test_the_hole_is_what_is_transparent_coloured_boxed_or_the_one_mask(here, job, tmp_path) -> None:
    rgb, mask = make_image(0), make_mask()
    painted = np.where(mask[..., None] > 0, np.array([255, 0, 255], np.uint8), rgb)
    rgba = np.dstack([rgb, (1 - mask) * np.uint8(255)])
    boxes = {"images": [{"id": 7, "file_name": "a.png"}], "annotations": [{"image_id": 7, "bbox": [12, 20, 30, 30]}]}
    write(tmp_path, {"coco.json": json.dumps(boxes).encode(), "plain.json": b'{"a.png": [[12.4, 20.2, 29, 29.5]]}'})
    write(tmp_path, {"one.png": png_bytes((1 - mask) * np.uint8(255))})
    cases: list[tuple[np.ndarray, dict[str, object]]] = [
        (rgba, {"mask_from": "alpha"}),
        (painted, {"mask_from": "colour", "mask_colour": "#ff00ff"}),
        (rgb, {"mask_from": "boxes", "masks": tmp_path / "coco.json"}),
        (rgb, {"mask_from": "boxes", "masks": tmp_path / "plain.json"}),
        (rgb, {"mask_from": "one", "masks": tmp_path / "one.png", "mask_hole": "black"}),
    ]
    for image, settings in cases:
        summary = inpaint_all(job({"a.png": png_bytes(image)}, None, **settings))
        assert summary.done == 1, settings
        assert ledger(tmp_path / "out")["a.png"]["hole_fraction"] == pytest.approx(mask.mean()), settings
        found = changed(tmp_path, "a.png", image[..., :3])
        assert not found[mask == 0].any()
        assert found[mask > 0].mean() > 0.9
        (tmp_path / "out" / "a.png").unlink()


def test_growing_and_feathering_reach_so_far_and_no_further(here, job, tmp_path) -> None:
    inpaint_all(job({"a.png": PHOTO}, {"a.png": MASK}, dilate=3, feather=2))
    found = changed(tmp_path, "a.png", make_image(0))
    assert not found[:15].any()
    assert not found[:, :7].any()
    assert found[17:53, 9:45].mean() > 0.9


def test_images_without_a_hole_are_skipped_or_copied_by_choice(here, job, tmp_path) -> None:
    images = {"none.jpg": jpeg(make_image(1)), "empty.png": PHOTO, "full.png": PHOTO}
    masks = {"empty.png": png_bytes(np.zeros((64, 64), np.uint8)), "full.png": MASK}
    config = job(images, masks)
    assert inpaint_all(config).skipped == 2
    assert set(results(tmp_path / "out")) == {"full.png"}
    assert inpaint_all(replace(config, without_hole="copy")).skipped == 2
    found = results(tmp_path / "out")
    assert found["none.jpg"] == images["none.jpg"]
    assert found["empty.png"] == PHOTO
    assert inpaint_all(replace(config, without_hole="copy")).kept == 3


def test_masks_that_look_inverted_are_refused_if_asked(here, job, tmp_path) -> None:
    inverted = png_bytes((1 - make_mask()) * np.uint8(255))
    config = job({"a.png": PHOTO}, {"a.png": inverted}, refuse_inverted=True)
    assert inpaint_all(config).reasons == {"inverted-mask": 1}
    assert inpaint_all(replace(config, mask_hole="black")).done == 1


def test_another_methods_results_are_refined(here, job, tmp_path, model_folder) -> None:
    coarse = make_image(5)
    write(tmp_path / "lama", {"a.jpg.png": b"", "a.png": png_bytes(coarse)})
    config = job({"a.png": PHOTO, "b.png": PHOTO}, {"a.png": MASK, "b.png": MASK}, coarse_from=tmp_path / "lama")
    summary = inpaint_all(config)
    assert (summary.done, summary.reasons) == (1, {"no-coarse": 1})
    inpainter = Inpainter(load_model(model_folder), policy="crop")
    own = inpainter(make_image(0), make_mask(), image_id="a.png", filled=coarse).output
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), own)


def tar_with(tmp_path: Path, names: list[str]) -> Path:
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(PHOTO)
            archive.addfile(member, io.BytesIO(PHOTO))
    return tmp_path / "evil.tar"


def test_names_that_lead_out_of_the_output_are_refused_and_nothing_is_written_there(here, job, tmp_path) -> None:
    names = ["../outside.png", "a/../../up.png", "ok.png", "back\\slash.png", "a//b.png"]
    write(tmp_path, {"one.png": MASK})
    config = job(None, None, input=tar_with(tmp_path, names), mask_from="one", masks=tmp_path / "one.png")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    summary = inpaint_all(config)
    assert summary.done == 1
    assert summary.failed == summary.reasons["unsafe-name"] == 4
    after = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.relative_to(tmp_path / "out").as_posix() for path in after} == {"ok.png", "ledger.parquet"}


def test_a_key_column_cannot_lead_out_of_the_output(here, job, tmp_path) -> None:
    names = ["../evil.png", "/etc/evil.png", "fine.png"]
    pq.write_table(pa.table({"jpg": [PHOTO] * 3, "name": names, "hole": [MASK] * 3}), tmp_path / "t.parquet")
    settings = {"key_column": "name", "mask_from": "column", "mask_column": "hole"}
    summary = inpaint_all(job(None, None, input=tmp_path / "t.parquet", **settings))
    assert (summary.done, summary.reasons) == (1, {"unsafe-name": 2})
    assert set(results(tmp_path / "out")) == {"fine.png"}


def test_links_in_the_input_and_the_output_are_not_followed(here, job, tmp_path) -> None:
    config = job({"a.png": PHOTO, "sub/b.png": PHOTO}, {"a.png": MASK, "sub/b.png": MASK, "link.png": MASK})
    write(tmp_path, {"secret.png": PHOTO, "elsewhere/x.txt": b""})
    os.symlink(tmp_path / "secret.png", tmp_path / "images" / "link.png")
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out" / "sub")
    summary = inpaint_all(config)
    assert (summary.done, summary.reasons) == (1, {"link": 2})
    assert set(results(tmp_path / "elsewhere")) == {"x.txt"}


def test_bombs_and_absurd_sizes_are_refused_by_their_header(here, job) -> None:
    from tests.tmad.test_images import bomb_png

    images = {"bomb.png": bomb_png(60_000, 60_000), "large.png": png_bytes(make_image(0, 128)), "a.png": PHOTO}
    masks = {**dict.fromkeys(images, MASK), "a.png": bomb_png(30_000, 30_000)}
    summary = inpaint_all(job(images, masks, max_pixels=100 * 100))
    assert summary.reasons == {"too-large": 2, "mask-too-large": 1}


def test_results_of_one_name_are_refused_where_all_become_png(here, job, tmp_path) -> None:
    images = {"a.jpg": jpeg(make_image(1)), "a.png": PHOTO, "b.jpg": jpeg(make_image(2))}
    config = job(images, {"a.png": MASK, "b.png": MASK}, format="png")
    assert inpaint_all(config).reasons == {"same-name": 2}
    after = np.asarray(Image.open(tmp_path / "out" / "b.png"))
    before = np.asarray(Image.open(io.BytesIO(images["b.jpg"])))
    assert np.array_equal(after[make_mask() == 0], before[make_mask() == 0])
    assert inpaint_all(replace(config, format="same")).done == 3


@pytest.mark.parametrize("output", ["images", "images/filled", "masks"])
def test_an_output_among_the_inputs_is_refused(here, job, tmp_path, output) -> None:
    config = job({"a.png": PHOTO}, {"a.png": MASK}, output=tmp_path / output)
    with pytest.raises(ValueError, match="results would be taken for what belongs there"):
        inpaint_all(config)


@pytest.mark.parametrize("output", ["images", "images/filled"])
def test_an_output_in_the_input_works_if_asked_for_and_again(here, job, tmp_path, output) -> None:
    config = job({"a.png": PHOTO, "b.png": PHOTO}, {"a.png": MASK}, output=tmp_path / output, in_place=True)
    assert inpaint_all(config).done == 1
    first = results(tmp_path / output)
    again = inpaint_all(config)
    assert (again.done, again.kept, again.skipped) == (0, 1, 1)
    assert results(tmp_path / output) == first


def test_missing_places_and_models_are_named_before_ray_starts(job, tmp_path) -> None:
    config = job({"a.png": PHOTO}, {"a.png": MASK})
    for changes, error, said in (
        ({"input": str(tmp_path / "no")}, MissingInput, "there is no folder"),
        ({"masks": str(tmp_path / "no")}, MissingInput, "there is no folder"),
        ({"model": str(tmp_path / "no")}, ModelNotFound, "no model at"),
        ({"mask_suffix": "_m"}, MissingInput, r"no image has a mask in .*looked for 'a_m'"),
        ({"mask_from": "boxes", "masks": str(tmp_path / "masks/a.png")}, CorruptSource, "is not JSON"),
    ):
        with pytest.raises(error, match=said):
            inpaint_all(replace(config, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask_from": "alpha"}, "mask_from=alpha does not use masks"),
        ({"masks": None}, "mask_from=paired needs masks"),
        ({"mask_from": "colour", "masks": None}, "needs mask_colour"),
        ({"mask_suffix": "a", "mask_pattern": "(.*)"}, "one of them"),
        ({"mask_pattern": "("}, "no regular expression"),
        ({"mask_pattern": ".*"}, "needs a group"),
        ({"mask_from": "boxes", "mask_hole": "black"}, "mask_from=boxes does not use mask_hole"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said) -> None:
    with pytest.raises(ValueError, match=said):
        InpaintConfig(**{"input": "i", "output": "o", "model": "m", "masks": "x", **settings})


@pytest.mark.parametrize(
    "content", ["[1]", "{", '{"images": [], "annotations": [{}]}', '{"images": [1], "annotations": []}']
)
def test_a_damaged_list_of_boxes_is_refused_by_name(here, job, tmp_path, content) -> None:
    write(tmp_path, {"boxes.json": content.encode()})
    with pytest.raises(CorruptSource, match=r"boxes\.json"):
        inpaint_all(job({"a.png": PHOTO}, None, mask_from="boxes", masks=tmp_path / "boxes.json"))


def test_an_outage_of_storage_ends_the_job_and_its_end_lets_the_next_one_finish(here, job, faulty, bucket) -> None:
    for number in range(7):
        storage.write_atomic(f"{bucket}/i/{number}.png", PHOTO)
    storage.write_atomic(f"{bucket}/one.png", MASK)
    places = {"input": f"{bucket}/i", "output": f"{bucket}/out", "mask_from": "one", "masks": f"{bucket}/one.png"}
    config = job(None, None, **places)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMAD_STORAGE_ATTEMPTS", "2")
        faulty.answer("InternalError", method="GET", target=r"/i/5\.png")
        with pytest.raises(StorageFailed, match=r"InternalError|reach|attempts"):
            inpaint_all(config)
    faulty.heal()
    summary = inpaint_all(config)
    assert summary.done + summary.kept == 7
    assert summary.kept >= 3
    assert summary.failed == 0


def test_passing_faults_of_storage_show_in_nothing(here, job, faulty, bucket, tmp_path) -> None:
    images = {f"{number}.png": png_bytes(make_image(number)) for number in range(6)}
    write(tmp_path, {"one.png": MASK})
    inpaint_all(job(images, None, mask_from="one", masks=tmp_path / "one.png"))
    for key, data in images.items():
        storage.write_atomic(f"{bucket}/i/{key}", data)
    faulty.answer("SlowDown", method="GET", target="/i/1", times=2)
    faulty.truncate(100, target="/i/2", times=1)
    faulty.reset(method="PUT", target="/out/3", times=1)
    faulty.swallow(method="PUT", target="/out/4", times=1)
    settings = {"mask_from": "one", "masks": tmp_path / "one.png", "input": f"{bucket}/i", "output": f"{bucket}/out"}
    assert inpaint_all(job(None, None, **settings)).done == 6
    assert faulty.unspent() == 0
    found = {key: storage.read_bytes(f"{bucket}/out/{key}") for key in images}
    assert found == results(tmp_path / "out")


def test_mlflow_gets_the_summary_the_ledger_and_pictures(here, job, tracking_uri, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    images = {"a.png": PHOTO, "b.jpg": jpeg(make_image(1)), "c.png": b""}
    inpaint_all(job(images, dict.fromkeys(("a.png", "b.png", "c.png"), MASK), tracking_uri=tracking_uri))
    client = mlflow_client(tracking_uri)
    found = client.search_runs([client.get_experiment_by_name(run.EXPERIMENT).experiment_id])[0]
    assert found.info.status == "FINISHED"
    assert (found.data.metrics["done"], found.data.metrics["failed"]) == (2, 1)
    assert found.data.metrics["reason/empty-file"] == 1
    assert found.data.params["policy"] == "crop"
    names = {item.path for item in client.list_artifacts(found.info.run_id)}
    assert {"ledger.parquet", "samples"} <= names
    assert len(client.list_artifacts(found.info.run_id, "samples")) == 2


def test_a_summary_counts_each_input_once(here, job) -> None:
    summary = inpaint_all(job(GOOD_AND_BAD, THEIR_MASKS))
    assert isinstance(summary, Summary)
    assert summary.done + summary.kept + summary.skipped + summary.failed == len(GOOD_AND_BAD)
    assert summary.megapixels == pytest.approx(3 * 64 * 64 / 1e6)
    assert sum(summary.reasons.values()) == summary.skipped + summary.failed


# One rule for masks, identity, names, outages


def in_alpha(hole: np.ndarray) -> bytes:
    return png_bytes(np.dstack([np.zeros((*hole.shape, 3), np.uint8), hole * np.uint8(255)]))


def in_palette(hole: np.ndarray) -> bytes:
    image = Image.frombytes("P", hole.shape[::-1], hole.tobytes())
    image.putpalette([0, 0, 0, 128, 0, 0])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


ONE_HOLE = make_mask()
MASK_FILES = {
    "0 and 1": (png_bytes(ONE_HOLE), {}),
    "16 bits": (as_png(ONE_HOLE.astype(np.uint16) * 65535), {}),
    "palette": (in_palette(ONE_HOLE), {}),
    "red": (png_bytes(np.dstack([ONE_HOLE * 255, ONE_HOLE * 0, ONE_HOLE * 0]).astype(np.uint8)), {}),
    "one bit": (as_png(ONE_HOLE.astype(bool)), {}),
    "alpha": (in_alpha(ONE_HOLE), {"mask_value": "alpha"}),
    "labels": (png_bytes(ONE_HOLE * np.uint8(7)), {"mask_value": "nonzero"}),
    "faint": (png_bytes(ONE_HOLE * np.uint8(90)), {"mask_threshold": 60}),
    "half as large": (png_bytes(ONE_HOLE[::2, ::2] * np.uint8(255)), {"scale_masks": True}),
}


@pytest.mark.parametrize("place", ["paired", "one", "column", "single"])
def test_every_mask_is_the_same_hole_for_every_path(here, job, tmp_path, model_folder, place) -> None:
    expected = fill_file(Inpainter.load(model_folder), open_file(PHOTO), ONE_HOLE, image_id="a.png").data
    for name, (mask, options) in MASK_FILES.items():
        out = tmp_path / name / "out"
        write(tmp_path, {"photo/a.png": PHOTO, f"{name}/m/a.png": mask})
        if place == "single":
            given = [str(part) for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)]
            given = [part for part in given if part != "True"]
            paths = [str(tmp_path / "photo" / "a.png"), str(tmp_path / name / "m" / "a.png"), "-o", str(out / "a.png")]
            assert inpaint_one([*paths, "-m", str(model_folder), *given]) == 0
        else:
            places: dict[str, object] = {"input": tmp_path / "photo", "masks": tmp_path / name / "m"}
            if place == "one":
                places |= {"masks": tmp_path / name / "m" / "a.png", "mask_from": "one"}
            if place == "column":
                pq.write_table(pa.table({"jpg": [PHOTO], "name": ["a.png"], "hole": [mask]}), tmp_path / "t.parquet")
                places = {"input": tmp_path / "t.parquet", "key_column": "name", "mask_column": "hole"}
                places["mask_from"] = "column"
            assert inpaint_all(job(None, None, **{**places, "output": out, **options})).done == 1, name
        found = np.asarray(Image.open(out / "a.png"))
        if name == "half as large":
            changed_there = (found != make_image(0)).any(axis=2)
            assert (changed_there & (ONE_HOLE == 0)).sum() < 130
        else:
            assert (out / "a.png").read_bytes() == expected, name


def test_a_mask_that_shows_something_but_no_hole_is_a_failure_that_names_the_option(here, job, tmp_path) -> None:
    masks = {"a.png": in_alpha(ONE_HOLE), "b.png": png_bytes(ONE_HOLE * np.uint8(90)), "c.png": png_bytes(ONE_HOLE * 0)}
    summary = inpaint_all(job(dict.fromkeys(masks, PHOTO), masks))
    assert (summary.failed, summary.skipped) == (2, 1)
    rows = ledger(tmp_path / "out")
    assert (rows["a.png"]["reason"], rows["b.png"]["reason"], rows["c.png"]["reason"]) == (
        *("faint-mask", "faint-mask", "no-hole"),
    )
    assert "mask_value alpha" in rows["a.png"]["detail"]
    assert "lower mask_threshold" in rows["b.png"]["detail"]


OTHER = png_bytes(make_mask(left=40, width=8) * np.uint8(255))


@pytest.mark.parametrize("kind", ["paired", "one", "boxes", "elsewhere", "column", "image", "repaired", "coarse", "s3"])
def test_a_result_is_done_again_when_its_image_or_its_hole_has_changed_and_not_otherwise(
    here, job, tmp_path, kind, request
) -> None:
    images = {"a.png": PHOTO, "b.png": png_bytes(make_image(1))}
    boxes = {"a.png": [[12, 20, 30, 30]], "b.png": [[12, 20, 30, 30]]}
    places: dict[str, object] = {}
    if kind in ("paired", "elsewhere", "image", "repaired", "coarse"):
        first = png_bytes(make_mask() * np.uint8(0)) if kind == "repaired" else MASK
        write(tmp_path / "masks", {"a.png": first, "b.png": MASK})
        places = {"masks": tmp_path / "masks"}
    if kind == "coarse":
        write(tmp_path / "coarse", images)
        places["coarse_from"] = tmp_path / "coarse"
    if kind == "one":
        write(tmp_path, {"one.png": MASK})
        places = {"mask_from": "one", "masks": tmp_path / "one.png"}
    if kind == "boxes":
        write(tmp_path, {"boxes.json": json.dumps(boxes).encode()})
        places = {"mask_from": "boxes", "masks": tmp_path / "boxes.json"}
    if kind == "column":
        table = {"jpg": list(images.values()), "name": list(images), "hole": [MASK, MASK]}
        pq.write_table(pa.table(table), tmp_path / "t.parquet")
        places = {"mask_from": "column", "mask_column": "hole", "input": tmp_path / "t.parquet", "key_column": "name"}
    if kind == "s3":
        bucket = request.getfixturevalue("bucket")
        for key in images:
            storage.write_atomic(f"{bucket}/i/{key}", images[key])
            storage.write_atomic(f"{bucket}/m/{key}", MASK)
        places = {"input": f"{bucket}/i", "masks": f"{bucket}/m", "output": f"{bucket}/out"}
    config = job(images, None, **places)
    inpaint_all(config)
    assert inpaint_all(config).kept == 2, "nothing has changed"
    if kind in ("paired", "repaired"):
        write(tmp_path / "masks", {"a.png": OTHER})
    elif kind == "elsewhere":
        config = job(None, {}, masks=write(tmp_path / "other", {"a.png": OTHER, "b.png": OTHER}))
    elif kind == "one":
        write(tmp_path, {"one.png": OTHER})
    elif kind == "boxes":
        write(tmp_path, {"boxes.json": json.dumps({**boxes, "a.png": [[40, 20, 8, 30]]}).encode()})
    elif kind == "column":
        pq.write_table(pa.table({**table, "hole": [OTHER, MASK]}), tmp_path / "t.parquet")
    elif kind == "image":
        write(tmp_path / "images", {"a.png": png_bytes(make_image(7))})
    elif kind == "coarse":
        write(tmp_path / "coarse", {"a.png": png_bytes(make_image(9))})
    else:
        storage.write_atomic(f"{config.masks}/a.png", OTHER)
    summary = inpaint_all(config)
    everything = kind in ("elsewhere", "one", "column")
    assert (summary.done, summary.kept) == ((2, 0) if everything else (1, 1))
    assert inpaint_all(config).kept == 2
    if kind not in ("image", "coarse", "s3"):
        found = changed(tmp_path, "a.png", make_image(0))
        assert found[20:50, 40:48].mean() > 0.9, "the new hole"
        assert not found[:, :40].any(), "nothing of the old one"


@pytest.mark.parametrize("kind", ["no mask", "no hole", "no picture", "no image", "another format"])
def test_a_result_whose_image_or_mask_is_gone_is_told_and_never_passed_off_as_of_today(
    here, job, tmp_path, caplog, kind
) -> None:
    config = job({"a.jpg": jpeg(make_image(0)), "b.png": PHOTO}, {"a.png": MASK, "b.png": MASK})
    inpaint_all(config)
    if kind == "no mask":
        (tmp_path / "masks" / "a.png").unlink()
    elif kind == "no hole":
        write(tmp_path / "masks", {"a.png": png_bytes(make_mask() * np.uint8(0))})
    elif kind == "no picture":
        write(tmp_path / "images", {"a.jpg": b"text"})
    elif kind == "no image":
        (tmp_path / "images" / "a.jpg").unlink()
    else:
        config = replace(config, format="png")
    # A result under another name is told of by the call that has replaced it.
    for _ in range(1 if kind == "another format" else 2):
        caplog.clear()
        summary = inpaint_all(config)
        assert "1 results of earlier calls are still in" in caplog.text
        assert "'a.jpg'" in caplog.text
        if kind.startswith("no ") and kind != "no image":
            row = ledger(tmp_path / "out")["a.jpg"]
            assert summary.failed == 1
            assert row["status"] == "failed"
            assert row["reason"] == ("not-an-image" if kind == "no picture" else "stale-result")
            assert "a.jpg is of an earlier call" in row["detail"]
    (tmp_path / "out" / "a.jpg").unlink()
    caplog.clear()
    assert inpaint_all(config).failed == (kind == "no picture")
    assert "results of earlier calls" not in caplog.text
    if kind == "no mask":
        assert ledger(tmp_path / "out")["a.jpg"]["reason"] == "no-mask"
        write(tmp_path / "masks", {"a.png": MASK})
        assert inpaint_all(config).done == 1


def test_again_does_everything_again(here, job, tmp_path) -> None:
    config = job({"a.png": PHOTO, "b.png": PHOTO}, {"a.png": MASK})
    inpaint_all(config)
    summary = inpaint_all(replace(config, again=True))
    assert (summary.done, summary.kept, summary.skipped) == (1, 0, 1)
    assert inpaint_all(config).kept == 1


def test_in_place_a_filled_picture_is_settled_and_a_new_mask_fills_it_once_more(here, job, tmp_path) -> None:
    config = job({"a.png": PHOTO}, {"a.png": MASK}, output=tmp_path / "images", in_place=True)
    assert inpaint_all(config).done == 1
    assert inpaint_all(config).kept == 1
    write(tmp_path / "masks", {"a.png": OTHER})
    assert inpaint_all(config).done == 1
    assert {path.name for path in (tmp_path / "images").iterdir() if path.is_file()} == {"a.png", "ledger.parquet"}
    assert ledger(tmp_path / "images").keys() == {"a.png"}


ODD_NAMES = (
    *(b"back\\slash.png", b"caf\xe9.png", b"new\nline.png", b"tab\t.png", b"a::b.png", b"per%20cent.png", b"#hash.png"),
    *(b"ask?.png", b"star*.png", b"[set].png", b"{brace}.png", b" blank .png", b"quote'\".png", b"~home.png"),
    *("ünï©ødé-名前.png".encode(), b"-dash.png", b"$var.png", b"a&b=c.png", b"x" * 251 + b".png", b"\x01.png"),
    *(b"double..dots.png", b"C:colon.png", b"semi;colon.png", b"comma,.png", b"UPPER.PNG"),
    # The same letter as one character and as two, an emoji, a change of direction, the end of a terminal's line.
    *("caf\u00e9.png".encode(), "cafe\u0301.png".encode(), "\U0001f4f7.png".encode(), "\u202ertl.png".encode()),
    *(b"del\x7f.png", b"cr\r.png", b"esc\x1b[2J.png"),
)


def test_any_name_that_a_disk_allows_gives_a_row_and_none_ends_the_job(here, job, tmp_path) -> None:
    write(tmp_path, {"one.png": MASK})
    folder = os.fsencode(tmp_path / "images")
    os.makedirs(folder)
    for name in ODD_NAMES:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(PHOTO)
    summary = inpaint_all(job(None, None, mask_from="one", masks=tmp_path / "one.png"))
    rows = ledger(tmp_path / "out")
    assert len(rows) == len(ODD_NAMES)
    refused = {key for key, row in rows.items() if row["status"] != "done"}
    assert refused == {"back\\slash.png", "caf\\xe9.png"}
    assert {rows[key]["reason"] for key in refused} == {"unsafe-name"}
    assert (summary.done, summary.failed) == (len(ODD_NAMES) - 2, 2)
    assert {os.fsencode(path.name) for path in (tmp_path / "out").glob("*") if path.suffix.lower() == ".png"} == {
        name for name in ODD_NAMES if name not in (b"back\\slash.png", b"caf\xe9.png")
    }


def test_any_name_that_a_bucket_allows_gives_a_row_and_none_ends_the_job(here, job, bucket, tmp_path) -> None:
    fs, place = storage.file_system(f"{bucket}/i")
    plain = ["a.png", "b c.png", "ünï.png", "a::b.png", "per%20cent.png", "plus+.png", "[x]{y}.png", "a/b/c.png"]
    plain += [
        "ask?.png",
        "#hash.png",
        "star*.png",
        "a&b=c.png",
        "~home.png",
        " blank .png",
        "tab\t.png",
    ]
    odd = ["back\\slash.png", "a//b.png", "/first.png", "x/../y.png", "./dot.png"]
    versioned = "q?versionId=1.png"  # which s3fs takes for a version of another object
    name = place.split("/", 1)[0]
    for key in [*plain, *odd, versioned]:
        fs.call_s3("put_object", Bucket=name, Key=f"{place.split('/', 1)[1]}/{key}", Body=PHOTO)
    write(tmp_path, {"one.png": MASK})
    settings = {"mask_from": "one", "masks": tmp_path / "one.png", "input": f"{bucket}/i", "output": f"{bucket}/out"}
    inpaint_all(job(None, None, **settings))
    rows = ledger(f"{bucket}/out")
    assert {key for key, row in rows.items() if row["status"] == "done"} == set(plain)
    assert {rows[key]["reason"] for key in rows.keys() - {*plain, versioned}} == {"unsafe-name"}
    assert rows[versioned]["status"] == "failed"
    assert len(rows) == len(plain) + len(odd) + 1


ODD_BOXES = [
    [[1, 1, 0, 5]],
    [[1, 1, -3, 5]],
    ["x"],
    5,
    "text",
    None,
    [[1, 2, 3]],
    [[1, 1, float("nan"), 4]],
    [{"x": 1}],
]


@pytest.mark.parametrize("coco", [False, True])
def test_an_odd_box_is_one_image_not_filled_and_boxes_of_no_image_are_listed(here, job, tmp_path, caplog, coco) -> None:
    names = [f"{number}.png" for number in range(len(ODD_BOXES))]
    boxes = {**dict(zip(names, ODD_BOXES, strict=True)), "good.png": [[12, 20, 30, 30]], "stray.png": [[1, 1, 4, 4]]}
    content: object = boxes
    if coco:
        numbered = list(enumerate(boxes))
        flat = [(n, one) for n, name in numbered for one in (boxes[name] if isinstance(boxes[name], list) else [5])]
        content = {
            "images": [{"id": number, "file_name": name} for number, name in numbered],
            "annotations": [{"image_id": number, "bbox": box} for number, box in flat]
            + [{"image_id": 99, "bbox": [1, 1, 4, 4]}],
        }
    write(tmp_path, {"boxes.json": json.dumps(content).encode()})
    images = dict.fromkeys([*names, "good.png"], PHOTO)
    summary = inpaint_all(job(images, None, mask_from="boxes", masks=tmp_path / "boxes.json"))
    assert (summary.done, summary.failed, summary.reasons) == (1, len(names), {"bad-box": len(names)})
    assert f"{1 + coco} masks belong to no image: " in caplog.text
    assert "'stray.png'" in caplog.text


def test_odd_rows_and_members_have_a_reason_each_and_the_others_are_filled(here, job, tmp_path) -> None:
    write(tmp_path, {"one.png": MASK})
    one = {"mask_from": "one", "masks": tmp_path / "one.png"}
    keys = ["a.png", None, "a.png", "../x.png", "/abs.png", "a//b.png", "nul\0.png", "", "ok.png", "none.png"]
    table = pa.table({"jpg": [*[PHOTO] * 9, None], "key": keys})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    settings = {"input": tmp_path / "t.parquet", "key_column": "key", "output": tmp_path / "rows", **one}
    assert inpaint_all(job(None, None, **settings)).done == 2
    assert {key: row["reason"] for key, row in ledger(tmp_path / "rows").items()} == {
        **dict.fromkeys(("a.png", "ok.png")),
        **{"t.parquet#1": "no-key", "t.parquet#2": "same-key", "none.png": "empty-file"},
        **dict.fromkeys(("../x.png", "/abs.png", "a//b.png", "nul\0.png", ""), "unsafe-name"),
    }
    members = ["a.png", "../up.png", "x/../y.png", "x/./z.png", "caf\udce9.png", "a\\b.png", ".hidden.png"]
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for name in members:
            member = tarfile.TarInfo(name)
            member.size = len(PHOTO)
            archive.addfile(member, io.BytesIO(PHOTO))
    assert inpaint_all(job(None, None, input=tmp_path / "t.tar", output=tmp_path / "members", **one)).done == 1
    rows = ledger(tmp_path / "members")
    assert {row["reason"] for row in rows.values()} == {None, "unsafe-name"}
    assert len(rows) == len(members) - 1


def test_pipes_devices_and_links_that_lead_nowhere_are_rows_and_nothing_is_waited_for(here, job, tmp_path) -> None:
    write(tmp_path, {"one.png": MASK, "images/a.png": PHOTO})
    images = tmp_path / "images"
    os.mkfifo(images / "pipe.png")
    (images / "endless.png").symlink_to("/dev/zero")
    (images / "dangling.png").symlink_to("nowhere.png")
    (images / "circle.png").symlink_to("circle.png")
    (images / "folder.png").mkdir()
    assert inpaint_all(job(None, None, mask_from="one", masks=tmp_path / "one.png")).done == 1
    assert {key: row["reason"] for key, row in ledger(tmp_path / "out").items()} == {
        "a.png": None,
        "pipe.png": "not-a-file",
        **dict.fromkeys(("endless.png", "dangling.png", "circle.png"), "link"),
    }
    (tmp_path / "list.txt").write_text("a.png\npipe.png\n")
    config = job(None, None, input=tmp_path / "list.txt", root=images, mask_from="one", masks=tmp_path / "one.png")
    inpaint_all(replace(config, output=str(tmp_path / "listed")))
    assert ledger(tmp_path / "listed")["pipe.png"]["reason"] == "missing"


def test_files_of_every_kind_have_a_row_with_a_reason(here, job, tmp_path) -> None:
    files = {
        "a.png": PHOTO,
        "b.heic": b"\0\0\0\x18ftypheic" + bytes(40),
        "telephone.jpg": b"\0\0\0\x18ftypheic" + bytes(40),
        "c.cr2": b"II*\0\x10\0\0\0CR\2\0" + bytes(40),
        "d.psd": b"8BPS" + bytes(40),
        "e.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "f.tga": b"\0\0\2" + bytes(40),
        "without": PHOTO,
        "notes.txt": b"words",
        "movie.mp4": b"\0\0\0\x18ftypmp42" + bytes(40),
        "Thumbs.db": b"\xd0\xcf\x11\xe0",
    }
    write(tmp_path, {"one.png": MASK})
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "images", files)
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    summary = inpaint_all(job(None, None, mask_from="one", masks=tmp_path / "one.png"))
    rows = ledger(tmp_path / "out")
    assert {key: row["reason"] for key, row in rows.items()} == {
        "a.png": None,
        **dict.fromkeys(("b.heic", "telephone.jpg", "d.psd", "e.svg"), "unsupported"),
        "c.cr2": "unsupported",
        "f.tga": "not-an-image",
        **dict.fromkeys(("without", "notes.txt", "movie.mp4", "Thumbs.db"), "not-an-image"),
        "linked": "link",
    }
    assert "pillow-heif" in rows["telephone.jpg"]["detail"]
    assert summary.done + summary.skipped + summary.failed == len(files) + 1
    assert inpaint_all(job(None, None, mask_from="one", masks=tmp_path / "one.png")).done == 0


def test_masks_that_belong_to_no_image_are_listed_with_what_they_are_near_to(here, job, caplog) -> None:
    images = {"a.png": PHOTO, "dd.jpg": jpeg(make_image(1)), "IMG_9.JPG": jpeg(make_image(2))}
    inpaint_all(job(images, {"a.png": MASK, "dd.jpg.png": MASK, "img_9.png": MASK, "stray.png": MASK}))
    assert (
        "3 masks belong to no image: 'dd.jpg.png' (is it that of 'dd.jpg'?), 'img_9.png' (is it that of 'IMG_9.JPG'?), "
        "'stray.png'"
    ) in caplog.text


def test_what_results_lack_of_their_originals_is_in_the_ledger_and_in_the_log(here, job, tmp_path, caplog) -> None:
    images = {f"{n}.png": png_of_palette(n) for n in range(3)} | {"lies.jpg": PHOTO}
    inpaint_all(job(images, dict.fromkeys([*images, "lies.png"], MASK)))
    assert "3 results: the palette becomes full colour" in caplog.text
    assert ledger(tmp_path / "out")["0.png"]["detail"] == "the palette becomes full colour"
    assert ledger(tmp_path / "out")["lies.jpg"]["detail"] == "the name ends in .jpg, the file is PNG"


def png_of_palette(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_image(seed)).quantize(50).save(buffer, "PNG")
    return buffer.getvalue()


FULL_DISK = """
import sys
from pathlib import Path
from pipeline.inpaint import run
from pipeline.inpaint.config import InpaintConfig
from tests.pipeline.test_inpaint_batch import fill_here
from pipeline.errors import StorageFailed
run._fill_all = fill_here
images, masks, out, model = sys.argv[1:]
config = InpaintConfig(input=images, masks=masks, mask_from="one", output=out, model=model)
blocker = Path(out, "blocker")
blocker.write_bytes(bytes(1_900_000))
try:
    run.inpaint_all(config)
    raise SystemExit("a full disk was not noticed")
except StorageFailed as error:
    assert "No space left on device" in str(error), error
    assert error.details["kind"] == "full"
blocker.unlink()
summary = run.inpaint_all(config)
assert (summary.failed, summary.done + summary.kept) == (0, 12), summary
"""


def test_a_full_disk_ends_the_job_and_the_same_command_goes_on_when_there_is_room(tmp_path, model_folder) -> None:
    images = write(tmp_path / "images", {f"{n:02}.png": as_png(NOISE + np.uint8(n)) for n in range(12)})
    write(tmp_path, {"one.png": as_png(np.pad(make_mask(), 64) * np.uint8(255))})
    (tmp_path / "out").mkdir()
    (tmp_path / "full.py").write_text(FULL_DISK)
    arguments = [tmp_path / "full.py", images, tmp_path / "one.png", tmp_path / "out", model_folder]
    mount = f'mount -t tmpfs -o size=2500k none "{tmp_path / "out"}" && exec "$0" "$@"'
    command = ["unshare", "-Urm", "sh", "-c", mount, sys.executable, *map(str, arguments)]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("no name spaces to mount a small disk in")
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


NOISE = np.random.default_rng(0).integers(0, 240, (192, 192, 3)).astype(np.uint8)
