"""The demo's photographs: which sample pictures of scikit-image and scikit-learn, under which licence, for what.

Only pictures that lie inside the installed packages (nothing is downloaded) and whose licence the package states.
Training and validation share no photograph and no scene.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

from pipeline.errors import MissingInput

FROM_SKIMAGE = "scikit-image, docstring of skimage.data.{}"
FROM_SKLEARN = "scikit-learn, sklearn/datasets/images/README.txt"


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


def _skimage(split: Literal["train", "val"], file: str, function: str, licence: str, source: str) -> Photograph:
    return Photograph(
        file=file,
        package="skimage",
        split=split,
        licence=licence,
        source=source,
        stated_in=FROM_SKIMAGE.format(function),
    )


PHOTOGRAPHS: tuple[Photograph, ...] = (
    _skimage(
        "train",
        "astronaut.png",
        "astronaut",
        "No known copyright restrictions, released into the public domain",
        "Eileen Collins, NASA Great Images database, https://flic.kr/p/r9qvLn",
    ),
    _skimage(
        "train",
        "coffee.png",
        "coffee",
        "No copyright restrictions. CC0 by the photographer (Rachel Michetti)",
        "Coffee cup, courtesy of Pikolo Espresso Bar",
    ),
    _skimage(
        "train",
        "rocket.jpg",
        "rocket",
        "Released in the public domain by SpaceX",
        "Launch of DSCOVR, SpaceX Photos, https://www.flickr.com/photos/spacexphotos/16511594820/in/photostream/",
    ),
    _skimage(
        "train",
        "ihc.png",
        "immunohistochemistry",
        "No known copyright restrictions",
        "Colonic glands, Center for Microscopy And Molecular Imaging (CMMI)",
    ),
    _skimage(
        "train",
        "retina.jpg",
        "retina",
        "Creative Commons CC0 1.0 Universal Public Domain Dedication",
        "Mikael Häggström, https://commons.wikimedia.org/wiki/File:Fundus_photograph_of_normal_left_eye.jpg",
    ),
    _skimage(
        "train",
        "hubble_deep_field.jpg",
        "hubble_deep_field",
        "Captured by NASA, may be freely used in the public domain",
        "HubbleSite, http://hubblesite.org/newscenter/archive/releases/2012/37/image/a/",
    ),
    _skimage(
        "train",
        "camera.png",
        "camera",
        "No copyright restrictions. CC0 by the photographer (Lav Varshney)",
        "Lav Varshney",
    ),
    _skimage(
        "train",
        "brick.png",
        "brick",
        "Creative Commons CC0 License",
        "Brick wall, CC0Textures, https://cc0textures.com/view.php?tex=Bricks25",
    ),
    _skimage(
        "train",
        "grass.png",
        "grass",
        "Creative Commons CC0 License",
        "DeviantArt, https://www.deviantart.com/linolafett/art/Grass-01-434853879",
    ),
    _skimage(
        "train",
        "gravel.png",
        "gravel",
        "Creative Commons CC0 License",
        "CC0Textures, https://cc0textures.com/view.php?tex=Gravel04",
    ),
    _skimage(
        "train",
        "coins.png",
        "coins",
        "No known copyright restrictions",
        "Greek coins from Pompeii, Brooklyn Museum, https://www.brooklynmuseum.org/opencollection/archives/image/51611",
    ),
    _skimage(
        "val",
        "chelsea.png",
        "chelsea",
        "No copyright restrictions. CC0 by the photographer (Stefan van der Walt)",
        "Chelsea the cat, Stefan van der Walt",
    ),
    Photograph(
        file="china.jpg",
        package="sklearn",
        split="val",
        licence="Creative Commons Attribution 2.0, https://creativecommons.org/licenses/by/2.0/",
        source="danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/sizes/z/in/photostream/",
        stated_in=FROM_SKLEARN,
    ),
    Photograph(
        file="flower.jpg",
        package="sklearn",
        split="val",
        licence="Creative Commons Attribution 2.0, https://creativecommons.org/licenses/by/2.0/",
        source="vultilion (the text names danielbuechele and links vultilion), "
        "https://www.flickr.com/photos/vultilion/6056698931/sizes/z/in/photostream/",
        stated_in=FROM_SKLEARN,
    ),
)


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
    statement = json.dumps([asdict(photograph) for photograph in PHOTOGRAPHS], indent=2, ensure_ascii=False)
    (out / "photographs.json").write_text(statement + "\n", encoding="utf-8")
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
