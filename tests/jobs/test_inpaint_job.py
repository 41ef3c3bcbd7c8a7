"""`jobs/inpaint.py` as a program: dry run from another folder, errors as one line, a folder filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs.inpaint import SOME_FAILED, main
from pipeline.report.pictures import png_bytes
from tests.jobs.conftest import CallJob
from tests.tmad.tiny import make_image, make_mask

SCRIPT = Path(__file__).resolve().parent.parent.parent / "jobs" / "inpaint.py"
PLACES = ["--input", "photos", "--masks", "masks", "--output", "out", "--model", "model"]


def test_a_dry_run_prints_the_settings_reads_the_pairs_and_writes_nothing(model_folder: Path, tmp_path: Path) -> None:
    files = {"a.png": make_image(0), "b.png": make_image(1), "c.png": make_image(2), "IMG_9.png": make_image(3)}
    masks = {"a": make_mask() * np.uint8(255), "b": make_mask()[:50], "dd.jpg": make_mask(), "img_9": make_mask()}
    for folder, content in (("photos", files), ("masks", {f"{name}.png": mask for name, mask in masks.items()})):
        (tmp_path / folder).mkdir()
        for name, array in content.items():
            (tmp_path / folder / name).write_bytes(png_bytes(array))
    (tmp_path / "photos" / "notes.txt").write_text("not a photograph")
    places = [*PLACES[:6], "--num-actors", "3", "--dry-run"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *places],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "TMAD_MODEL": str(model_folder)},
    )
    assert run.returncode == 0, run.stderr
    settings = json.loads(run.stdout)
    assert (settings["input"], settings["num_actors"], settings["model"]) == ("photos", 3, str(model_folder))
    assert "4 images, 2 of them without a mask" in run.stderr
    assert "2 masks belong to no image: 'dd.jpg.png', 'img_9.png' (is it that of 'IMG_9.png'?)" in run.stderr
    assert "2 pairs of image and hole were read: 1 can be filled" in run.stderr
    assert "1 mask-size: 'b.png'" in run.stderr
    assert "1 files beside them are no images, e.g. 'notes.txt'" in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks", "photos"]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_missing_folder_is_one_line_and_exit_code_1(dry: list[str], call_job: CallJob, tmp_path: Path) -> None:
    code, _, shown = call_job(main, *PLACES, *dry)
    assert code == 1
    assert len(shown.strip().splitlines()) == 1
    assert f"there is no folder {tmp_path}/photos" in shown


def test_a_required_option_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(PLACES[:4])
    assert end.value.code == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.ray
def test_a_folder_is_filled_the_counts_are_printed_and_the_exit_code_says_whether_all_is_well(
    ray_session: None, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, content in (("photos", make_image(0)), ("masks", make_mask() * np.uint8(255))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(png_bytes(content))
    places = [
        f"--{name}={tmp_path / place}" for name, place in (("input", "photos"), ("masks", "masks"), ("output", "out"))
    ]
    assert main([*places, "--model", str(model_folder), "--num-actors", "1"]) == 0
    assert "1 filled in" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file()) == ["a.png", "ledger.parquet"]
    (tmp_path / "photos" / "b.png").write_bytes(b"")
    (tmp_path / "masks" / "b.png").write_bytes((tmp_path / "masks" / "a.png").read_bytes())
    assert main([*places, "--model", str(model_folder), "--num-actors", "1"]) == SOME_FAILED == 3
    assert "0 filled in" in (said := capsys.readouterr().out)
    assert "1 were settled before, 0 skipped, 1 failed (1 empty-file)" in said
