"""Builds wheel and source archive of this checkout and tries the wheel where the checkout is not on the path.

    python infra/dist.py                          with the packages that this interpreter has
    python infra/dist.py python3.12 python3.13    in an empty environment of each of these, all packages installed

Both files are written to `dist/`. They hold what Git tracks, uncommitted changes included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"tmad": "tmad", "pipeline": "tmad_jobs/pipeline", "jobs": "tmad_jobs/jobs"}
"""Packages of the checkout -> where a wheel has them, so that it takes no name of its user's own packages."""

FREE = """
import sys
from importlib.util import find_spec
from pathlib import Path
import tmad
assert Path(tmad.__file__).is_relative_to(sys.prefix), f"{tmad.__file__} is not the installed one"
taken = [name for name in ("pipeline", "jobs", "infra", "tests") if find_spec(name)]
assert not taken, f"the wheel takes the names {taken}"
"""

OWN = """
import pipeline, tmad_jobs.jobs
assert pipeline.__file__ == MINE, f"{pipeline.__file__} shadows the program's own package"
try:
    tmad_jobs.jobs.find_model("s3://bucket/model")
except ImportError as error:
    assert "this program has another package `pipeline`" in str(error)
else:
    raise AssertionError("a model elsewhere was looked for with another package `pipeline`")
"""


class DistFailed(Exception):
    """What was built is not as it should be; the message says where."""


def build(out: Path) -> Path:
    """Make the wheel, which is returned, and the source archive in *out*.

    Raises `DistFailed` if the source archive makes another wheel, or as `check_content`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tmad-dist-") as temporary:
        source, unpacked = Path(temporary, "source"), Path(temporary, "unpacked")
        tracked = [name for name in _run(["git", "ls-files", "-z"], ROOT).split("\0") if (ROOT / name).is_file()]
        for name in tracked:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
        archive = out / _backend("sdist", source, out)
        wheel = out / _backend("wheel", source, out)
        with tarfile.open(archive) as packed:
            packed.extraction_filter = getattr(tarfile, "data_filter", None)  # not in the first releases of 3.11
            packed.extractall(unpacked)
        (folder,) = unpacked.iterdir()
        again = unpacked / _backend("wheel", folder, unpacked)
        if again.read_bytes() != wheel.read_bytes():
            raise DistFailed(f"{archive.name} makes another wheel than the checkout")
    check_content(wheel, tracked)
    return wheel


def _backend(kind: str, source: Path, out: Path) -> str:
    """File that the build backend makes of *source* in *out*; the same bytes for the same files."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    # The first date that a ZIP archive can hold.
    return _run([sys.executable, "-c", code], source, SOURCE_DATE_EPOCH="315532800").split()[-1]


def check_content(wheel: Path, tracked: Sequence[str]) -> None:
    """Raise `DistFailed` unless *wheel* has the *tracked* files of the packages and no other."""
    split = [name.partition("/") for name in tracked]
    wanted = {f"{PLACES[top]}/{rest}" for top, _, rest in split if top in PLACES}
    with zipfile.ZipFile(wheel) as packed:
        there = {name for name in packed.namelist() if ".dist-info/" not in name}
    if there != wanted:
        raise DistFailed(f"{wheel.name} lacks {sorted(wanted - there)} and has {sorted(there - wanted)} besides")


def environment(python: str | None, wheel: Path, folder: Path) -> Path:
    """Install *wheel* in a new environment in *folder* and return its `bin`. *python*: its interpreter, everything is
    installed; `None`: this one, whose packages, but none of a checkout, are found there too."""
    command = folder / "bin"
    install = ["--no-warn-script-location", "--disable-pip-version-check", "--quiet"]
    if python is None:
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)], ROOT)
        (site,) = folder.glob("lib/python*/site-packages")
        # Lines of such a file are put on the path; what in that folder adds a checkout to it is not read.
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(command / "python"), "install", *install, "--no-deps"]
        _run([*pip, str(wheel)], folder)
    else:
        _run([python, "-m", "venv", str(folder)], ROOT)
        pip = [str(command / "python"), "-m", "pip", "install", *install]
        _run([*pip, "-c", str(ROOT / "infra" / "constraints.txt"), f"{wheel}[web,serve]"], folder)
    return command


def attempt(command: Path, wheel: Path, folder: Path) -> None:
    """Use what is installed with *command*, the `bin` of an environment, from the empty *folder*. Raises `DistFailed`
    with what was said."""
    python = str(command / "python")
    _run([python, "-c", FREE], folder)
    version = wheel.name.split("-")[1]
    if (said := _run([str(command / "tmad"), "--version"], folder).strip()) != f"tmad {version}":
        raise DistFailed(f"tmad --version says {said!r}, the wheel is {version}")
    photo = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    hole = np.zeros((96, 128), np.uint8)
    hole[30:60, 40:80] = 255
    Image.fromarray(photo).save(folder / "photo.png")
    Image.fromarray(hole).save(folder / "mask.png")
    _run([str(command / "tmad"), "inpaint", "photo.png", "mask.png", "-o", "filled.png"], folder)
    filled = np.asarray(Image.open(folder / "filled.png"))
    if not np.array_equal(filled[hole == 0], photo[hole == 0]) or np.array_equal(filled[hole > 0], photo[hole > 0]):
        raise DistFailed("what was filled is not the hole alone")
    own = folder / "pipeline" / "__init__.py"
    own.parent.mkdir()
    own.touch()
    _run([python, "-c", f"MINE = {str(own)!r}\n{OWN}"], folder)


def _run(command: Sequence[str], folder: Path, **variables: str) -> str:
    """Output of *command*, run in *folder*, without the checkout on its path. Raises `DistFailed`."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**inherited, **variables})
    if done.returncode:
        raise DistFailed(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """Build, and try with each interpreter; returns 1 at the first failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="interpreters to install for")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where both files are put (default: dist)")
    asked = parser.parse_args(arguments)
    began = time.monotonic()
    try:
        wheel = build(asked.out)
        print(f"{wheel}, {wheel.stat().st_size / 1e6:.0f} MB: built, and the same from its source archive", flush=True)
        for python in asked.pythons or [None]:
            began = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="tmad-dist-") as temporary:
                place, elsewhere = Path(temporary, "environment"), Path(temporary, "elsewhere")
                elsewhere.mkdir()
                command = environment(python, wheel, place)
                installed = time.monotonic()
                attempt(command, wheel, elsewhere)
            seconds = f"installed in {installed - began:.0f} s, tried in {time.monotonic() - installed:.0f} s"
            print(f"{python or 'with the packages of ' + sys.executable}: {seconds}", flush=True)
    except (DistFailed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
