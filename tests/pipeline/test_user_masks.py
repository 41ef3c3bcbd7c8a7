"""Masks that the user brings, of every kind: they line up with their images, say what is wrong, and never vary."""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.records import RecordConfig, make_records
from pipeline.data.schema import Manifest, Record, read_records
from pipeline.data.sources.choose import open_source
from pipeline.data.user_masks import MaskReader, OwnMasks, open_masks, stem_of
from pipeline.errors import ConfigMismatch, CorruptSource, MissingInput, TooManyBadImages
from tests.conftest import make_photo
from tests.pipeline.test_contract import run_here
from tests.pipeline.test_inpaint_batch import MASK_FILES, ONE_HOLE
from tests.pipeline.test_sources import parquet_of, tar_of
from tmad.config import MemoryConfig
from tmad.holes import MaskRule
from tmad.images import UnreadableImage

SMALL = {"crop_size": 64, "patch_size": 16, "memory": MemoryConfig(pool_size=20), "images_per_shard": 2}
KEYS = ["a/one.jpg", "a/two.jpg", "b/three.jpg"]


def encoded(array: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def box(height: int = 96, width: int = 120, *, top: int = 20, left: int = 20, side: int = 50) -> np.ndarray:
    """A white square on black."""
    mask = np.zeros((height, width), np.uint8)
    mask[top : top + side, left : left + side] = 255
    return mask


def marked(mask: np.ndarray, alpha: bool = False) -> np.ndarray:
    """A picture that is white where *mask* is and dark elsewhere, so that both can be compared after cropping."""
    rgb = np.repeat(np.where(mask > 127, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    return np.dstack([rgb, 255 - mask]) if alpha else rgb


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def own_box(number: int) -> np.ndarray:
    return box(top=10 + 8 * number, left=14 + 15 * number, side=30 + 4 * number)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures, each white where its mask is white."""
    return write(tmp_path / "photos", {key: encoded(marked(own_box(n))) for n, key in enumerate(KEYS)})


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    return write(tmp_path / "masks", {f"{stem_of(key)}.png": encoded(own_box(n)) for n, key in enumerate(KEYS)})


def settings(source: Path | str, out: Path, **changes) -> PrepareConfig:
    if changes.get("masks"):
        changes["masks"] = str(changes["masks"])
    return PrepareConfig(**{**SMALL, "source": str(source), "out": str(out), **changes})


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)


def records_of(out: Path) -> list[Record]:
    return list(read_records(str(out)))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def agreement(record: Record, variant: int = 0) -> float:
    """Share of pixels where the record's mask is what its picture, made by `marked`, says."""
    return float(np.mean((record.pixels()[..., 0] > 127) == (record.mask(variant) != 0)))


def drops_of(out: Path) -> dict[str, tuple[str, str]]:
    lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
    return {line["key"]: (line["reason"], line["detail"]) for line in lines}


def reader_of(masks: Path, config: RecordConfig, keys: list[str] = KEYS) -> MaskReader:
    opened = open_masks(
        config.mask_from,
        source=str(masks.parent / "photos"),
        images=open_source(str(masks)),
        keys=keys,
        masks=str(masks),
        mask_column=None,
        rule=MaskRule(config.mask_hole),
        masks_per_image=config.masks_per_image,
    )
    return MaskReader(opened)


# Every kind, end to end


@pytest.mark.ray
def test_masks_of_a_folder_go_with_the_images_of_their_name(ray_session, photos, masks, tmp_path):
    manifest = prepare(settings(photos, tmp_path / "set", mask_from="paired", masks=masks, encoding="png"))
    assert (manifest.records, manifest.drops) == (3, {})
    assert manifest.settings["mask_from"] == "paired"
    assert manifest.settings["mask_hole"] == "white"
    assert "mask" not in manifest.settings
    for record in records_of(tmp_path / "set"):
        assert agreement(record) > 0.98
        assert record.hole_fraction[0] == pytest.approx(record.mask().mean())
        assert 0 < record.hole_fraction[0] < 1
        assert record.pool().shape == (20, 2)


@pytest.mark.parametrize("layout", ["tar", "folder in a tar", "list", "parquet"])
def test_masks_come_from_the_same_places_as_images(layout, photos, masks, tmp_path, no_ray):
    named = files_of(masks)
    place = tmp_path / {"tar": "m.tar", "folder in a tar": "m.tar", "list": "m.txt", "parquet": "m.parquet"}[layout]
    before = "inner/" if layout == "folder in a tar" else ""
    if place.suffix == ".tar":
        place.write_bytes(tar_of([(before + name, data) for name, data in named.items()]))
    if layout == "list":
        write(tmp_path, named)
        place.write_text("".join(f"{name}\n" for name in named))
    if layout == "parquet":
        place.write_bytes(parquet_of({"image": [{"bytes": data, "path": name} for name, data in named.items()]}))
        source, keys = tmp_path / "p.parquet", [f"m.parquet#{row}" for row in range(3)]
        source.write_bytes(parquet_of({"jpg": list(files_of(photos).values()), "key": keys}))
    else:
        source = photos
    changes = {"key_column": "key"} if layout == "parquet" else {}
    uri = place / "inner" if before else place
    prepare(settings(source, tmp_path / "set", mask_from="paired", masks=uri, encoding="png", **changes))
    found = records_of(tmp_path / "set")
    assert len(found) == 3
    assert all(agreement(record) > 0.98 for record in found)


def test_a_column_of_the_table_holds_the_masks(photos, tmp_path, no_ray):
    table = {"jpg": list(files_of(photos).values()), "hole": [encoded(own_box(n)) for n in range(3)], "name": KEYS}
    (tmp_path / "t.parquet").write_bytes(parquet_of(table))
    config = settings(tmp_path / "t.parquet", tmp_path / "set", mask_from="column", mask_column="hole", encoding="png")
    manifest = prepare(config)
    assert manifest.settings["mask_column"] == "hole"
    assert all(agreement(record) > 0.98 for record in records_of(tmp_path / "set"))
    with pytest.raises(
        CorruptSource, match=r"no column 'holes'; set mask_column; its columns are jpg \(binary\), hole"
    ):
        prepare(settings(tmp_path / "t.parquet", tmp_path / "x", mask_from="column", mask_column="holes"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "P", "RGB"])
def test_the_transparent_part_of_an_image_is_the_hole(mode):
    picture = Image.fromarray(marked(box(), alpha=True))
    if mode == "RGB":
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "png", transparency=(255, 255, 255))
        data = buffer.getvalue()
    else:
        # Pillow stores La in no format that keeps it; the reader is asked directly.
        image = picture.convert("LA").convert("La") if mode == "La" else picture
        if mode == "P":
            image = picture.quantize(8)
        if mode == "LA":
            image = picture.convert("LA")
        assert np.array_equal(MaskReader().of_alpha(image), box() // 255)
        if mode == "La":
            return
        buffer = io.BytesIO()
        image.save(buffer, "png")
        data = buffer.getvalue()
    config = RecordConfig(crop_size=64, patch_size=16, encoding="png", mask_from="alpha", crops_per_image=3)
    for row in make_records("x.png", data, config):
        assert agreement(Record(**row)) > 0.98


def test_masks_of_a_list_are_drawn_and_differ_between_the_variants_of_a_crop(photos, tmp_path, no_ray):
    shapes = {f"{n}.png": encoded(box(40, 40, top=n, left=2 * n, side=10)) for n in range(8)}
    place = write(tmp_path / "shapes", shapes)
    config = settings(photos, tmp_path / "set", mask_from="random", masks=place, masks_per_image=4, crops_per_image=2)
    prepare(config)
    found = records_of(tmp_path / "set")
    allowed = {
        np.asarray(Image.open(io.BytesIO(data)).resize((64, 64), Image.Resampling.NEAREST)).tobytes()
        for data in shapes.values()
    }
    assert len(found) == 6
    for record in found:
        drawn = [(record.mask(variant) * 255).tobytes() for variant in range(4)]
        assert len(set(drawn)) == 4
        assert set(drawn) <= allowed
    assert len({tuple(record.masks) for record in found}) == 6


def test_several_masks_of_an_image_lie_in_a_folder_and_are_taken_in_turn(photos, tmp_path, no_ray):
    three = [box(top=5 + 10 * n, side=30) for n in range(3)]
    place = write(
        tmp_path / "masks",
        {
            **{f"a/one/{n}.png": encoded(mask) for n, mask in enumerate(three)},
            **{f"{stem}.png": encoded(box()) for stem in ("a/two", "b/three")},
        },
    )
    prepare(settings(photos, tmp_path / "set", mask_from="paired", masks=place, masks_per_image=2, short_side=(96, 96)))
    one, two, _ = records_of(tmp_path / "set")
    assert one.masks[0] != one.masks[1]
    assert two.masks[0] == two.masks[1]


# Geometry


@pytest.mark.parametrize("short_side", [(64, 64), (96, 96), (64, 96), (100, 200)])
def test_a_mask_is_scaled_and_cropped_with_its_image(short_side, masks):
    mask = box(130, 97, top=40, left=30, side=45)
    place = write(masks.parent / "other", {"x.png": encoded(mask)})
    config = RecordConfig(
        crop_size=64,
        patch_size=16,
        encoding="png",
        short_side=short_side,
        crops_per_image=6,
        mask_from="paired",
        masks=str(place),
    )
    rows = make_records("x.jpg", encoded(marked(mask)), config, masks=reader_of(place, config, ["x.jpg"]))
    assert len({row["image"] for row in rows}) > 1
    for row in rows:
        record = Record(**row)
        picture = record.pixels()[..., 0]
        sure = (picture < 64) | (picture > 191)
        assert np.array_equal(picture[sure] > 127, record.mask()[sure] != 0)
        assert sure.mean() > 0.95
        assert agreement(record) > 0.98


def test_a_crop_is_drawn_again_until_it_has_hole_and_known_pixels(tmp_path):
    mask = box(64, 640, top=10, left=600, side=30)
    place = write(tmp_path / "masks", {"x.png": encoded(mask)})
    config = RecordConfig(
        crop_size=64, patch_size=16, encoding="png", crops_per_image=4, mask_from="paired", masks=str(place)
    )
    rows = make_records("x.png", encoded(marked(mask)), config, masks=reader_of(place, config, ["x.png"]))
    assert len(rows) == 4
    assert all(0 < row["hole_fraction"][0] < 1 for row in rows)


def test_a_turned_photograph_wants_its_mask_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = box(120, 96)
    buffer = io.BytesIO()
    Image.fromarray(marked(np.rot90(mask))).save(buffer, "png", exif=exif)
    place = write(tmp_path / "masks", {"x.png": encoded(mask)})
    config = RecordConfig(crop_size=64, patch_size=16, encoding="png", mask_from="paired", masks=str(place))
    (row,) = make_records("x.png", buffer.getvalue(), config, masks=reader_of(place, config, ["x.png"]))
    assert agreement(Record(**row)) > 0.98


# Polarity


@pytest.mark.parametrize("mask_from", ["paired", "random"])
def test_black_holes_are_the_complement_of_white_ones(mask_from, photos, masks, tmp_path, no_ray):
    for hole in ("white", "black"):
        prepare(settings(photos, tmp_path / hole, mask_from=mask_from, masks=masks, mask_hole=hole))
    white, black = records_of(tmp_path / "white"), records_of(tmp_path / "black")
    assert [record.image for record in white] == [record.image for record in black]
    for one, other in zip(white, black, strict=True):
        assert np.array_equal(one.mask(), 1 - other.mask())


def test_masks_that_are_mostly_hole_are_told_and_not_turned(photos, tmp_path, caplog, no_ray):
    inverted = {f"{stem_of(key)}.png": encoded(255 - own_box(n)) for n, key in enumerate(KEYS)}
    masks = write(tmp_path / "masks", inverted)
    with caplog.at_level(logging.WARNING):
        prepare(settings(photos, tmp_path / "set", mask_from="paired", masks=masks, encoding="png"))
    message = (
        "in 3 of 3 masks the hole is more than half of the picture: white is taken for the hole; if black is, set "
        "mask_hole to black"
    )
    assert message in caplog.text
    report = json.loads((tmp_path / "set/report.json").read_text())
    assert report["own_masks"] == {"masks": 3, "mostly_hole": 3, "grey": 0, "unreadable": 0}
    assert report["warnings"] == [message]
    assert all(agreement(record) < 0.02 for record in records_of(tmp_path / "set"))
    caplog.clear()
    prepare(settings(photos, tmp_path / "set", mask_from="paired", masks=masks, encoding="png"))
    assert message in caplog.text, "also where all shards are there already"


def test_grey_values_are_parted_in_the_middle_and_counted(photos, tmp_path, caplog, no_ray):
    soft = {
        f"{stem_of(key)}.png": encoded(np.where(own_box(n) > 0, 128, 127).astype(np.uint8))
        for n, key in enumerate(KEYS)
    }
    masks = write(tmp_path / "masks", soft)
    prepare(settings(photos, tmp_path / "set", mask_from="paired", masks=masks, encoding="png"))
    assert (
        "3 of 3 masks are not only black and white: values between 0 and 255 are parted by mask_threshold"
        in caplog.text
    )
    assert all(agreement(record) > 0.98 for record in records_of(tmp_path / "set"))


def test_clean_masks_give_no_warning(photos, masks, tmp_path, caplog, no_ray):
    prepare(settings(photos, tmp_path / "set", mask_from="paired", masks=masks))
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert json.loads((tmp_path / "set/report.json").read_text())["warnings"] == []


# What is left out


def test_an_image_without_a_usable_mask_is_left_out_with_the_reason(tmp_path, no_ray):
    cases = {
        "good": (encoded(box()), None, ""),
        "lost": (None, "no-mask", "no mask named lost.* in "),
        "small": (encoded(box(95, 120)), "mask-size", "the mask small.png has 120x95 pixels, its image 120x96"),
        "empty": (encoded(box(side=0)), "empty-mask", "(values 0 to 0, white is the hole) has no hole"),
        "faint": (encoded(box() // 255 * 100), "faint-mask", "the mask has values up to 100, none above 127"),
        "full": (encoded(box(side=0) + 255), "full-mask", "the mask full.png"),
        "text": (b"no picture", "mask-not-an-image", "the mask text.png: 10 bytes"),
        "nothing": (b"", "no-mask", "the mask nothing.png has no bytes"),
    }
    photos = write(tmp_path / "photos", {f"{name}.png": encoded(make_photo(0, 96, 120)) for name in cases})
    masks = write(tmp_path / "masks", {f"{name}.png": case[0] for name, case in cases.items() if case[0] is not None})
    config = settings(photos, tmp_path / "set", mask_from="paired", masks=masks, max_bad_fraction=0.9)
    manifest = prepare(config)
    assert manifest.records == 1
    assert manifest.drops == {
        "empty-mask": 1,
        "faint-mask": 1,
        "full-mask": 1,
        "mask-not-an-image": 1,
        "mask-size": 1,
        "no-mask": 2,
    }
    found = drops_of(tmp_path / "set")
    assert found.keys() == {f"{name}.png" for name, case in cases.items() if case[1]}
    for name, (_, reason, detail) in cases.items():
        if reason:
            assert found[f"{name}.png"][0] == reason
            assert detail in found[f"{name}.png"][1]


@pytest.mark.parametrize(("hole", "reason"), [("white", "empty-mask"), ("black", "full-mask")])
def test_an_image_whose_crops_never_meet_the_hole_is_left_out(hole, reason, tmp_path):
    mask = box(64, 64_000, top=0, left=0, side=1)
    place = write(tmp_path / "masks", {"x.png": encoded(mask)})
    config = RecordConfig(
        crop_size=64, patch_size=16, mask_from="paired", masks=str(place), mask_hole=hole, crops_per_image=1
    )
    with pytest.raises(UnreadableImage, match=f"{reason}: the mask in each of 32 crops drawn"):
        make_records("x.png", encoded(marked(mask)), config, masks=reader_of(place, config, ["x.png"]))


@pytest.mark.parametrize(
    ("picture", "reason", "detail"),
    [
        (make_photo(0, 64, 64), "no-mask", "mode RGB has no transparency"),
        (marked(box(64, 64, side=0), alpha=True), "empty-mask", "values 255 to 255, black is the hole"),
        (marked(box(64, 64, side=0) + 255, alpha=True), "full-mask", "the alpha channel"),
    ],
)
def test_an_image_whose_alpha_is_no_mask_is_left_out(picture, reason, detail):
    with pytest.raises(UnreadableImage, match=f"{reason}: .*{detail}"):
        make_records("x.png", encoded(picture), RecordConfig(crop_size=64, patch_size=16, mask_from="alpha"))


def test_a_row_without_a_mask_is_left_out(photos, tmp_path, no_ray):
    (tmp_path / "t.parquet").write_bytes(
        parquet_of({"jpg": list(files_of(photos).values()), "hole": [encoded(own_box(0)), None, encoded(box(9, 9))]})
    )
    config = settings(
        tmp_path / "t.parquet", tmp_path / "set", mask_from="column", mask_column="hole", max_bad_fraction=0.7
    )
    assert prepare(config).drops == {"mask-size": 1, "no-mask": 1}


def test_a_bad_mask_of_a_list_is_passed_over_and_counted(photos, tmp_path, caplog, no_ray):
    shapes = {"bad.png": b"no picture", "empty.png": encoded(box(side=0)), "good.png": encoded(box())}
    place = write(tmp_path / "shapes", shapes)
    prepare(settings(photos, tmp_path / "set", mask_from="random", masks=place, crops_per_image=8))
    assert len({record.masks[0] for record in records_of(tmp_path / "set")}) == 1
    assert "unreadable masks were drawn " in caplog.text
    (place / "good.png").unlink()
    with pytest.raises(TooManyBadImages, match="3 of 3 images cannot be used") as caught:
        prepare(settings(photos, tmp_path / "none", mask_from="random", masks=place, images_per_shard=3))
    assert caught.value.details["reasons"].keys() <= {"mask-not-an-image", "empty-mask"}


# Always the same


@pytest.mark.ray
@pytest.mark.parametrize("mask_from", ["paired", "random"])
def test_masks_and_images_of_object_storage_make_the_set_that_local_ones_make(
    mask_from, faulty_cluster, bucket, photos, masks, tmp_path, monkeypatch
):
    changes = {"mask_from": mask_from, "masks_per_image": 2, "crops_per_image": 2}
    places = {}
    for name, folder in {"photos": photos, "masks": masks}.items():
        places[name] = f"{bucket}/{name}"
        storage.upload_folder(folder, places[name])
    faulty_cluster.heal()
    faulty_cluster.truncate(60, target=r"/masks/\w+/\w+\.png", times=2)
    remote = prepare(settings(places["photos"], f"{bucket}/set", masks=places["masks"], **changes))
    assert faulty_cluster.unspent() == 0
    assert (remote.images_used, remote.drops) == (3, {})
    run_here(monkeypatch)
    local = prepare(settings(photos, tmp_path / "set", masks=masks, **changes))
    assert (remote.shards, remote.digest) == (local.shards, local.digest)
    for shard in local.shards:
        assert storage.read_bytes(f"{bucket}/set/{shard.file}") == (tmp_path / "set" / shard.file).read_bytes()
    gone = storage.list_files(places["masks"])[0]
    faulty_cluster.answer("AccessDenied", target=re.escape(f"/masks/{gone}"))
    if mask_from == "paired":
        arguments = settings(places["photos"], f"{bucket}/other", masks=places["masks"], **changes, max_bad_fraction=1)
        assert prepare(arguments).drops == {"unreadable": 1}


@pytest.mark.ray
@pytest.mark.parametrize("mask_from", ["paired", "random"])
def test_the_set_does_not_depend_on_who_makes_which_shard(mask_from, ray_session, photos, masks, tmp_path, monkeypatch):
    changes = {"mask_from": mask_from, "masks": masks, "masks_per_image": 2, "crops_per_image": 2}
    prepare(settings(photos, tmp_path / "ray", **changes))
    run_here(monkeypatch, backwards=True)
    prepare(settings(photos, tmp_path / "here", **changes))
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "here")
    prepare(settings(photos, tmp_path / "other", **changes, seed=1))
    assert files_of(tmp_path / "other")["shards/00000.parquet"] != files_of(tmp_path / "ray")["shards/00000.parquet"]


def test_a_drawn_mask_depends_on_seed_and_key_alone(tmp_path):
    place = write(tmp_path / "masks", {f"{n}.png": encoded(box(top=n)) for n in range(40)})
    config = RecordConfig(crop_size=64, patch_size=16, mask_from="random", masks=str(place), masks_per_image=3)
    data = encoded(make_photo(0, 96, 120))

    def masks_of(*keys: str) -> list[list[bytes]]:
        reader = reader_of(place, config)
        return [make_records(key, data, config, masks=reader)[0]["masks"] for key in keys]

    assert masks_of("a.png", "b.png") == masks_of("b.png", "a.png")[::-1]
    assert masks_of("a.png") != masks_of("b.png")


def test_new_masks_make_anew_only_the_shards_they_concern(photos, masks, tmp_path, no_ray):
    config = settings(photos, tmp_path / "set", mask_from="paired", masks=masks, masks_per_image=2)
    prepare(config)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set/shards").glob("*.parquet")}
    write(masks, {"b/three/more.png": encoded(box())})
    prepare(config)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set/shards").glob("*.parquet")}
    assert {name for name in before if before[name] != after[name]} == {"00001.parquet"}


def test_the_digest_knows_the_polarity_and_not_the_place(photos, masks, tmp_path, no_ray):
    def digest(name: str, place: Path, **changes) -> str:
        return prepare(settings(photos, tmp_path / name, mask_from="paired", masks=place, **changes)).digest

    moved = write(tmp_path / "elsewhere", files_of(masks))
    assert digest("1", masks) == digest("2", moved)
    assert digest("3", masks, mask_hole="black") != digest("1", masks)
    with pytest.raises(ConfigMismatch, match="mask_hole: white -> black"):
        digest("1", masks, mask_hole="black")


def test_a_set_with_generated_holes_says_nothing_of_masks(photos, tmp_path, no_ray):
    manifest: Manifest = prepare(settings(photos, tmp_path / "set"))
    assert {name for name in manifest.settings if "mask" in name} == {"mask", "masks_per_image"}
    assert "own_masks" not in json.loads((tmp_path / "set/report.json").read_text())
    assert "masks" not in json.loads((tmp_path / "set/shards/00000.json").read_text())


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_from": "paired"}, "mask_from=paired needs masks; masks goes with mask_from paired or random"),
        ({"mask_from": "random"}, "mask_from=random needs masks"),
        (
            {"masks": "m"},
            r"=family does not use masks \(got 'm'\); masks goes with mask_from paired or random",
        ),
        ({"mask_from": "alpha", "masks": "m"}, "mask_from=alpha does not use masks"),
        ({"mask_from": "column"}, "mask_from=column needs mask_column; mask_column goes with mask_from column"),
        ({"mask_column": "m"}, "mask_from=family does not use mask_column .*; mask_column goes with mask_from column"),
        ({"mask_hole": "black"}, "mask_from=family does not use mask_hole .* paired, random or column"),
        ({"mask_from": "alpha", "mask_hole": "black"}, "mask_from=alpha does not use mask_hole"),
        (
            {"mask_from": "alpha", "mask": "brush"},
            r"does not use mask \(got 'brush'\); mask goes with mask_from family",
        ),
        (
            {"mask_from": "alpha", "masks_per_image": 2},
            "does not use masks_per_image .* family, paired or random",
        ),
        ({"mask_from": "folder"}, "'family', 'paired', 'random', 'alpha' or 'column'"),
        ({"mask_hole": "grey"}, "'white' or 'black'"),
        ({"mask_threshold": 90}, r"mask_from=family does not use mask_threshold \(got 90\)"),
        ({"mask_from": "alpha", "mask_value": "nonzero"}, "mask_from=alpha does not use mask_value"),
        ({"scale_masks": True}, r"mask_from=family does not use scale_masks \(got True\); .* paired or column"),
        (
            {"mask_from": "paired", "masks": "m", "mask_value": "nonzero", "mask_threshold": 3},
            "mask_threshold does not go with mask_value=nonzero",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_those_that_do(changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(source="x", out="y", **changes)


def test_masks_that_cannot_be_those_of_the_images_stop_the_job_at_once(photos, masks, tmp_path):
    def attempt(place: Path, **changes) -> None:
        prepare(settings(photos, tmp_path / "set", **{"mask_from": "paired", "masks": place, **changes}))

    with pytest.raises(ValueError, match=r"masks .* must not lie in the source .* taken for images"):
        attempt(photos)
    with pytest.raises(ValueError, match=r"masks .* must not lie in the source"):
        attempt(photos / "masks")
    with pytest.raises(ValueError, match=r"mask_from=column needs a Parquet table, .* paired, random or alpha"):
        attempt(None, mask_from="column", mask_column="m")
    with pytest.raises(ValueError, match=r"masks_per_image must be at most the number of masks in .* \(3\), got 4"):
        attempt(masks, mask_from="random", masks_per_image=4)
    other = write(tmp_path / "other", {"c/four.png": encoded(box())})
    with pytest.raises(MissingInput, match=r"no image has a mask in .*: looked for 'a/one', .*; there is 'c/four.png'"):
        attempt(other)
    with pytest.raises(MissingInput, match="nowhere"):
        attempt(tmp_path / "nowhere")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("place", ["paired", "column", "random"])
def test_every_mask_is_the_hole_that_it_is_for_inpainting_with_the_same_options(place, tmp_path, no_ray):
    photo = encoded(make_photo(0, 64, 64))
    for name, (mask, options) in MASK_FILES.items():
        folder = write(tmp_path / name.replace(" ", "-"), {"photos/a.png": photo, "masks/a.png": mask})
        if place == "column":
            table = pa.table({"image": [photo], "key": ["a.png"], "hole": [mask]})
            pq.write_table(table, folder / "t.parquet")
            named = {"source": folder / "t.parquet", "key_column": "key", "mask_column": "hole"}
        else:
            named = {"source": folder / "photos", "masks": folder / "masks"}
            if place == "random":  # scaled to the crop in any case
                options = {key: value for key, value in options.items() if key != "scale_masks"}
        prepare(settings(out=folder / "set", mask_from=place, **named, **options))
        (record,) = records_of(folder / "set")
        hole = record.mask(0)
        if name == "half as large":
            hole = hole[::2, ::2].repeat(2, 0).repeat(2, 1)
            assert np.abs(hole.astype(int) - ONE_HOLE).mean() < 0.02
        else:
            assert np.array_equal(hole, ONE_HOLE), name


def test_records_with_masks_from_somewhere_need_their_reader():
    config = RecordConfig(crop_size=64, patch_size=16, mask_from="paired", masks="m")
    with pytest.raises(ValueError, match="need a reader of that place"):
        make_records("x.png", encoded(make_photo(0, 64, 64)), config)


@pytest.mark.parametrize(
    ("key", "stem"),
    [("a/b.jpg", "a/b"), ("a/b.c.PNG", "a/b.c"), ("t.parquet#3", "t.parquet#3"), ("a.b/c", "a.b/c"), ("x", "x")],
)
def test_only_the_ending_of_an_image_file_is_taken_off(key, stem):
    assert stem_of(key) == stem


def test_masks_survive_the_way_to_a_worker(masks):
    config = RecordConfig(mask_from="paired", masks=str(masks))
    place = reader_of(masks, config).masks
    assert isinstance(place, OwnMasks)
    again = pickle.loads(pickle.dumps(place))
    assert [again.of_image(key) for key in KEYS] == [[f"{stem_of(key)}.png"] for key in KEYS]
    assert again.of_image("c/four.jpg") == []
