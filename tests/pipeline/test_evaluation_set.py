"""The evaluation set: anybody can draw its crops and holes anew from the list, and it never changes by itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.evaluation_set import LISTING_NAME
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import pack_mask, read_manifest, read_records
from tests.pipeline.test_contract import run_here
from tmad.config import MemoryConfig
from tmad.images import crop_scaled, decode_rgb
from tmad.masks import draw_mask

FAMILIES = ("rectangle", "brush", "irregular", "lama_thin", "lama_medium", "lama_thick")


def settings(source: Path, out: Path, **changes: object) -> PrepareConfig:
    return PrepareConfig(
        **{  # type: ignore[arg-type]
            "source": str(source),
            "out": str(out),
            "crop_size": 64,
            "short_side": (64, 90),
            "patch_size": 16,
            "memory": MemoryConfig(pool_size=20),
            "images_per_shard": 5,
            "split": "val",
            "families": FAMILIES,
            "masks_per_image": len(FAMILIES),
            "encoding": "png",
            **changes,
        }
    )


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        yield


@pytest.fixture(scope="module")
def evaluation_set(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photographs with a hole of each family; not to be written to."""
    out = tmp_path_factory.mktemp("sets") / "val"
    prepare(settings(photo_folder, out))
    return out


def test_every_crop_and_hole_can_be_drawn_anew_from_the_list(evaluation_set: Path, photo_folder: Path) -> None:
    lines = [json.loads(line) for line in (evaluation_set / LISTING_NAME).read_text().splitlines()]
    records = {record.image_id: record for record in read_records(str(evaluation_set))}
    assert [line["mask_family"] for line in lines] == list(FAMILIES) * len(records)
    for line in lines:
        rng = np.random.Generator(np.random.PCG64(line["mask_seed"]))
        mask = draw_mask(line["mask_family"], 64, 64, rng)
        record = records[line["image_id"]]
        assert np.array_equal(mask, record.mask(line["variant"]))
        assert hashlib.sha256(pack_mask(mask)).hexdigest() == line["mask_sha256"]
        assert line["hole_fraction"] == pytest.approx(mask.mean())
        photograph = (photo_folder / line["key"]).read_bytes()
        assert hashlib.sha256(photograph).hexdigest() == line["sha256"]
    line = lines[0]
    rgb, crop = decode_rgb((photo_folder / line["key"]).read_bytes()), line["crop"]
    drawn = crop_scaled(
        rgb, scaled=(crop["scaled_height"], crop["scaled_width"]), top=crop["top"], left=crop["left"], size=crop["side"]
    )
    # Large JPEGs are decoded smaller for the set: a grey value here and there.
    assert np.abs(drawn.astype(int) - records[line["image_id"]].pixels()).mean() < 2


def test_the_same_command_gives_the_same_digest_and_another_seed_another(
    evaluation_set: Path, photo_folder: Path, tmp_path: Path
) -> None:
    digest = read_manifest(str(evaluation_set)).digest
    before = (evaluation_set / LISTING_NAME).read_bytes()
    assert prepare(settings(photo_folder, tmp_path / "again", images_per_shard=5)).digest == digest
    assert (tmp_path / "again" / LISTING_NAME).read_bytes() == before
    assert prepare(settings(photo_folder, tmp_path / "other", seed=1)).digest != digest


def test_a_list_that_was_lost_is_written_again(evaluation_set: Path, photo_folder: Path) -> None:
    before = (evaluation_set / LISTING_NAME).read_bytes()
    (evaluation_set / LISTING_NAME).unlink()
    prepare(settings(photo_folder, evaluation_set))
    assert (evaluation_set / LISTING_NAME).read_bytes() == before


def test_families_that_do_not_fit_are_refused(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of the 2 families"):
        settings(photo_folder, tmp_path, families=("brush", "rectangle"), masks_per_image=3)
    with pytest.raises(ValueError, match=r"families must be of .*lama_thick.*, got lama_fat"):
        settings(photo_folder, tmp_path, families=("lama_fat",), masks_per_image=1)
    with pytest.raises(ValueError, match="mask_from=alpha does not use families"):
        settings(photo_folder, tmp_path, mask_from="alpha", families=("brush",), masks_per_image=1)


def test_training_sets_keep_their_identity(photo_folder: Path, tmp_path: Path) -> None:
    plain = settings(photo_folder, tmp_path, split="train", families=(), masks_per_image=1).settings()
    assert "split" not in plain
    assert "families" not in plain
    assert plain["mask"] == "brush_or_rectangle"
