"""The demo's photographs: which sample pictures of scikit-image and scikit-learn, under which licence, for what.

Only pictures that lie inside the installed packages (nothing is downloaded) and whose licence the package states.
Training and validation share no photograph and no scene.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

from pipeline.errors import MissingInput


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """One sample picture of an installed package."""

    file: str
    """Name of the file in the package's folder of pictures, and in the demo's folder."""
    package: Literal["skimage", "sklearn"]
    """Import name of the package that ships it."""
    split: Literal["train", "val"]
    """What the demo uses it for."""
    licence: str
    """As the package states it, shortened to its words about rights."""
    source: str
    """Where the package says it comes from, or who made it."""
    stated_in: str
    """The text that states both."""


STATEMENT = Path(__file__).with_suffix(".json")
"""The photographs, each as a `Photograph`."""

PHOTOGRAPHS = tuple(Photograph(**one) for one in json.loads(STATEMENT.read_text(encoding="utf-8")))


def installed_file(photograph: Photograph) -> Path:
    """The photograph's file inside the installed package, found without importing the package.

    Raises `MissingInput` that names the package to install, or the file that this version of it no longer ships.
    """
    spec = importlib.util.find_spec(photograph.package)
    distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[photograph.package]
    if spec is None or spec.origin is None:
        raise MissingInput(
            f"the demo's photograph {photograph.file} ships inside {distribution}, which is not installed; "
            f'run `make setup`, or `pip install "tmad[demo]"`'
        )
    folder = {"skimage": "data", "sklearn": "datasets/images"}[photograph.package]
    path = Path(spec.origin).parent / folder / photograph.file
    if not path.is_file():
        raise MissingInput(
            f"this version of {distribution} ships no {photograph.file} (looked for {path}); "
            "install the version that infra/constraints.txt names"
        )
    return path


def write_photographs(out: Path) -> dict[str, int]:
    """Copy the photographs to *out*/train and *out*/val, and state where each comes from beside them.

    Each training photograph also comes recoloured (`astronaut.gbr.png`): a dozen pictures show too few colours, and a
    network that saw only these would fill every hole with them instead of with the colours around it.
    Files that are already there stay as they are. Writes PHOTOGRAPHS.md for people and photographs.json for programs.
    Returns the number of photographs by split. Raises `MissingInput` as `installed_file` does, before anything is
    written.
    """
    sources = [(photograph, installed_file(photograph)) for photograph in PHOTOGRAPHS]
    counts: dict[str, int] = {}
    for photograph, source in sources:
        target = out / photograph.split / photograph.file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.is_file() and target.stat().st_size == source.stat().st_size):
            shutil.copyfile(source, target)
        counts[photograph.split] = counts.get(photograph.split, 0) + 1
        if photograph.split == "train":
            _write_recoloured(target)
    (out / "PHOTOGRAPHS.md").write_text("\n".join(_credits()) + "\n", encoding="utf-8")
    shutil.copyfile(STATEMENT, out / "photographs.json")
    return counts


def _write_recoloured(photograph: Path) -> None:
    """Variants beside *photograph*: a colour picture with its channels rotated, a grey one as its negative."""
    with Image.open(photograph) as image:
        grey = image.mode == "L"
        variants = ("negative",) if grey else ("gbr", "brg")
        for variant in variants:
            target = photograph.with_suffix(f".{variant}.png")
            if target.is_file():
                continue
            if grey:
                recoloured = ImageOps.invert(image)
            else:
                bands = dict(zip("rgb", image.convert("RGB").split(), strict=True))
                recoloured = Image.merge("RGB", [bands[letter] for letter in variant])
            recoloured.save(target)


def _credits() -> Iterator[str]:
    yield "# The photographs of the demo"
    yield ""
    yield "Copied from the installed packages; each line gives what the named text states. Files with .gbr, .brg or"
    yield ".negative in their name are training photographs with their colours exchanged."
    yield ""
    yield "| Photograph | Used for | Licence | Source | Stated in |"
    yield "|---|---|---|---|---|"
    for photograph in PHOTOGRAPHS:
        use = {"train": "training", "val": "validation"}[photograph.split]
        yield f"| {photograph.file} | {use} | {photograph.licence} | {photograph.source} | {photograph.stated_in} |"
