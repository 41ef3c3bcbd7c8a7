"""The console command: one picture without Ray, folders and jobs by the same name, errors as one line."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.__main__ import _as_options, commands, main
from pipeline.runs.cli import run_job
from tests.conftest import ROOT
from tests.jobs.conftest import CallJob
from tests.tmad.tiny import make_image, make_mask
from tmad.inpaint import Inpainter


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    photo, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.fromarray(make_image(0)).save(photo)
    Image.fromarray(make_mask() * np.uint8(255)).save(mask)
    return photo, mask


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(one) for one in arguments])
    return end.value.code


def test_one_picture_is_filled_without_ray_mlflow_or_arrow(pair, model_folder, tmp_path) -> None:
    photo, mask = pair
    out = tmp_path / "new" / "out.png"
    code = "import sys\nfrom jobs.__main__ import main\ntry: main(sys.argv[1:])\nfinally:\n"
    code += (
        " print([name for name in ('ray', 'mlflow', 'pyarrow', 'fsspec', 'pipeline.storage') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "inpaint", photo, mask, "-o", out, "--model", model_folder]
    done = subprocess.run([str(one) for one in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    own = Inpainter.load(model_folder).inpaint(make_image(0), make_mask(), image_id="photo.png")
    assert np.array_equal(np.asarray(Image.open(out)), own)


def test_help_and_mistakes_do_not_wait_for_pytorch(tmp_path) -> None:
    code = "import sys\nfrom jobs.__main__ import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for arguments in (["inpaint", "no.jpg", "no.png", "-o", "x.png", "-m", "m"], ["--help"], ["dance"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "False"
        assert done.returncode == {"inpaint": 1, "--help": 0, "dance": 2}[arguments[0]]
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("text.png", b"no image", "not-an-image"),
        ("empty.png", b"", "empty-file"),
        ("size.png", None, "mask is 50x64 (height x width), the image is 64x64"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_nothing_is_written(
    pair, model_folder, tmp_path, capsys, name, content, said
) -> None:
    mask = tmp_path / name
    if content is None:
        Image.fromarray(make_mask()[:50] * np.uint8(255)).save(mask)
    else:
        mask.write_bytes(content)
    assert run("inpaint", pair[0], mask, "-o", tmp_path / "out.png", "-m", model_folder) == 1
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert said in error
    assert not (tmp_path / "out.png").exists()


def test_black_holes_growing_alpha_and_the_photos_own_format(pair, model_folder, tmp_path) -> None:
    photo, mask = pair
    inverted, jpeg, rgba = tmp_path / "black.png", tmp_path / "photo.jpg", tmp_path / "rgba.png"
    Image.fromarray((1 - make_mask()) * np.uint8(255)).save(inverted)
    Image.fromarray(np.dstack([make_image(0), (1 - make_mask()) * np.uint8(255)])).save(rgba)
    Image.open(photo).save(jpeg, quality=80)
    outs = [tmp_path / f"out{number}.png" for number in range(3)]
    model = ("-m", model_folder)
    assert run("inpaint", photo, mask, "-o", outs[0], *model) == 0
    assert run("inpaint", photo, inverted, "--hole", "black", "-o", outs[1], *model) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert run("inpaint", rgba, "alpha", "-o", outs[2], *model) == 0
    assert (np.asarray(Image.open(outs[2]))[..., 3] == 255).all()
    assert run("inpaint", jpeg, mask, "-o", tmp_path / "out.jpg", "--dilate", "4", *model) == 0
    assert Image.open(tmp_path / "out.jpg").quantization == Image.open(jpeg).quantization
    buffer = io.BytesIO((tmp_path / "out.jpg").read_bytes())
    assert Image.open(buffer).format == "JPEG"


@pytest.mark.parametrize(
    ("photo", "result", "said"),
    [
        ("p.png", "o.jpg", r"must end in \.png, got .*o\.jpg: .*p\.png is PNG"),
        ("p.webp", "o.jpg", r"must end in \.webp or \.png"),
        ("p.jpg", "o.tif", r"must end in \.jpg or \.png"),
        ("p.png", "o", r"must end in \.png"),
        ("lies.jpg", "o.jpg", r"lies\.jpg is PNG"),
        ("p.jpg", "o.jpeg", None),
        ("p.tif", "o.tiff", None),
        ("p.jpg", "O.PNG", None),
        ("p.jpg", "folder/", None),
        ("lies.jpg", "folder/", None),
    ],
)
def test_the_ending_of_a_result_is_its_format_or_it_is_refused(
    pair, model_folder, tmp_path, capsys, photo, result, said
) -> None:
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".png": "PNG", ".webp": "WEBP"}
    path = tmp_path / "in" / photo
    path.parent.mkdir()
    Image.open(pair[0]).save(path, "PNG" if photo == "lies.jpg" else kinds[path.suffix])
    code = run("inpaint", path, pair[1], "-o", f"{tmp_path}/out/{result}", "-m", model_folder)
    written = [one for one in (tmp_path / "out").rglob("*") if one.is_file()]
    if said:
        assert code == 1
        assert re.search(said, capsys.readouterr().err)
        assert written == []
        return
    assert code == 0
    (one,) = written
    assert Image.open(one).format == kinds[one.suffix.lower()]
    if result == "folder/":
        assert one.name == ("lies.png" if photo == "lies.jpg" else photo)


def test_a_mask_that_shows_something_but_no_hole_is_one_line_with_the_option(
    pair, model_folder, tmp_path, capsys
) -> None:
    mask = tmp_path / "faint.png"
    Image.fromarray(make_mask() * np.uint8(90)).save(mask)
    assert run("inpaint", pair[0], mask, "-o", tmp_path / "o.png", "-m", model_folder) == 1
    assert "mask_value nonzero, or a lower mask_threshold" in capsys.readouterr().err
    assert run("inpaint", pair[0], mask, "-o", tmp_path / "o.png", "-m", model_folder, "--mask-threshold", "50") == 0


def test_the_version_is_told(capsys) -> None:
    assert run("--version") == 0
    assert re.fullmatch(r"tmad \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_every_job_is_a_command_and_folders_become_the_batch_jobs_options() -> None:
    assert {"inpaint", "prepare", "train", "evaluate", "demo"} <= commands().keys()
    assert _as_options(["photos/", "masks/", "-o", "out", "-m", "m"]) == [
        *("--input", "photos/", "--masks", "masks/", "--output", "out", "--model", "m"),
    ]
    assert _as_options(["photos.tar", "--mask-from", "alpha"]) == ["--input", "photos.tar", "--mask-from", "alpha"]


def test_a_job_is_run_by_its_command(capsys) -> None:
    assert run("train", "--help") == 0
    assert "python jobs/train_places.py" in capsys.readouterr().out


def test_what_the_system_refuses_is_one_line_and_a_bug_is_a_traceback(call_job: CallJob) -> None:
    def refused(_: Sequence[str]) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/data/a.json")

    code, _, said = call_job(refused)
    assert (code, said.count("\n")) == (1, 1)
    assert "Read-only file system: '/data/a.json'" in said

    def wrong(_: Sequence[str]) -> int:
        raise AssertionError

    with pytest.raises(AssertionError):
        run_job(wrong, [])
