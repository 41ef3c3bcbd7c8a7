"""The demo's photographs: their licences, their separation, and what happens where one is missing."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.demo import photographs
from pipeline.demo.photographs import PHOTOGRAPHS, Photograph, installed_file, write_photographs
from pipeline.errors import MissingInput
from tmad.images import decode_image, to_rgb

by_file = pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda photograph: photograph.file)


def words(text: str) -> str:
    return " ".join(re.sub(r"[`_<>]", " ", text).split()).lower()


def stated_text(photograph: Photograph) -> str:
    """What the package itself says about the photograph."""
    if photograph.package == "sklearn":
        text = (installed_file(photograph).parent / "README.txt").read_text()
        parts = re.split(r"^Image: ", text, flags=re.M)
        return next(part for part in parts if part.startswith(photograph.file))
    function = photograph.stated_in.rsplit(".", 1)[1]
    doc: str = getattr(importlib.import_module("skimage.data"), function).__doc__
    return doc


@by_file
def test_every_photograph_states_the_licence_that_its_package_states(photograph: Photograph) -> None:
    said = words(stated_text(photograph))
    marks = ("cc0", "public domain", "no known copyright restrictions", "licenses/by/2.0")
    ours = [mark for mark in marks if mark in words(photograph.licence)]
    assert ours, "the licence names one that the test knows"
    assert [mark for mark in ours if mark not in said] == []


@by_file
def test_every_photograph_names_the_address_that_its_package_names(photograph: Photograph) -> None:
    said = words(stated_text(photograph))
    assert [url for url in re.findall(r"https?://[^\s,]+", photograph.source) if words(url) not in said] == []


@by_file
def test_every_photograph_ships_with_the_installed_package_and_can_be_read(photograph: Photograph) -> None:
    height, width, _ = to_rgb(decode_image(installed_file(photograph).read_bytes())).shape
    assert min(height, width) >= 256


def test_training_and_validation_share_no_photograph() -> None:
    digests = {
        split: {
            hashlib.sha256(installed_file(one).read_bytes()).hexdigest() for one in PHOTOGRAPHS if one.split == split
        }
        for split in ("train", "val")
    }
    assert digests["train"].isdisjoint(digests["val"])
    assert len(digests["train"] | digests["val"]) == len(PHOTOGRAPHS)


def test_the_written_folder_states_licence_and_source_of_every_file_in_it(tmp_path: Path) -> None:
    counts = write_photographs(tmp_path)
    files = {path.name for split in ("train", "val") for path in (tmp_path / split).iterdir()}
    stated = {entry["file"]: entry for entry in json.loads((tmp_path / "photographs.json").read_text())}
    table = (tmp_path / "PHOTOGRAPHS.md").read_text()
    recoloured = {name for name in files if name.split(".")[1] in ("gbr", "brg", "negative")}
    assert files - recoloured == stated.keys()
    assert sum(counts.values()) == len(files - recoloured)
    training = {Path(name).stem for name, entry in stated.items() if entry["split"] == "train"}
    assert {name.split(".")[0] for name in recoloured} == training
    for name, entry in stated.items():
        assert f"| {name} |" in table
        assert entry["licence"] in table
        assert entry["source"] in table


def test_recoloured_photographs_hold_the_same_channels_in_another_order(tmp_path: Path) -> None:
    write_photographs(tmp_path)
    original = np.asarray(Image.open(tmp_path / "train" / "coffee.png").convert("RGB"))
    rotated = np.asarray(Image.open(tmp_path / "train" / "coffee.gbr.png"))
    assert np.array_equal(rotated, original[..., [1, 2, 0]])
    grey = np.asarray(Image.open(tmp_path / "train" / "brick.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "train" / "brick.negative.png")), 255 - grey)


def test_writing_again_leaves_the_files_alone(tmp_path: Path) -> None:
    write_photographs(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    write_photographs(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()} == before


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingInput, match=r"astronaut\.png ships inside scikit-image, which is not installed"):
        write_photographs(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_photograph_that_the_package_no_longer_ships_is_named(tmp_path: Path) -> None:
    class Gone:
        file = "gone.png"
        package = "skimage"

    look: Callable[..., Path] = installed_file
    with pytest.raises(MissingInput, match=r"this version of scikit-image ships no gone\.png"):
        look(Gone)
