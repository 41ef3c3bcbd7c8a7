"""Results of other methods, from a folder: found by the names of the set's images, checked before anything is run.

The result of image `a/b.jpg` is `a/b` with any ending of an image. Where the set has several crops of a photograph,
`_c0`, `_c1`, ... stands behind the name, and where it has several masks of a crop `_m0`, `_m1`, ... behind that.
`export_inputs` writes pictures and masks under these very names.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline import storage
from pipeline.data.schema import Manifest, open_shard, read_records, set_folder
from pipeline.errors import MissingInput, UnfitResults
from pipeline.report.pictures import png_bytes
from tmad.images import SUFFIXES, decode_rgb

_SHOWN = 10
_READERS = 16


@dataclass(frozen=True)
class Results:
    """The results of one method."""

    name: str
    folder: str
    files: dict[str, str]
    """Key of the file below the folder, by the name that `result_name` gives."""
    digest: str
    """Of keys and sizes in bytes: changes when results are replaced."""

    def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """(H, W, 3) uint8 of *shape*. Raises `UnfitResults` for another size."""
        pixels = decode_rgb(storage.read_bytes(storage.join(self.folder, self.files[name])))
        if pixels.shape[:2] != shape[:2]:
            raise _unfit(self.name, self.folder, sizes=[_size_text(name, pixels.shape, shape)])
        return pixels


def result_name(image_id: str, variant: int, *, manifest: Manifest) -> str:
    """What the result of this image and mask is called, without ending."""
    key, _, crop = image_id.rpartition("#")
    name = _without_ending(key)
    if int(manifest.settings.get("crops_per_image", 1)) > 1:
        name += f"_c{crop}"
    return name + (f"_m{variant}" if manifest.num_variants > 1 else "")


def open_results(
    name: str, folder: str, *, data: str, manifest: Manifest, variants: Sequence[int], limit: int | None
) -> Results:
    """The results in *folder* for the first *limit* images of the set and these *variants* of their masks.

    Raises `UnfitResults` listing the images without a result, those of another size than the set's, and files that
    belong to no image of the set (their truth is missing); `MissingInput` if there is no image at all.
    """
    folder = storage.absolute(folder)
    there = storage.listing(folder) if storage.exists(folder) else {}
    files: dict[str, list[str]] = defaultdict(list)
    for key in there:
        if key.lower().endswith(SUFFIXES):
            files[_without_ending(key)].append(key)
    if not files:
        raise MissingInput(f"no image in {storage.redact(folder)}, the results of {name}")
    wanted, known = [], set()
    for number, image_id in enumerate(_image_ids(data, manifest)):
        for variant in range(manifest.num_variants):
            stem = result_name(image_id, variant, manifest=manifest)
            known.add(stem)
            if variant in variants and (limit is None or number < limit):
                wanted.append(stem)
    chosen = {stem: files[stem][0] for stem in wanted if stem in files}
    if twice := next((files[stem] for stem in chosen if len(files[stem]) > 1), None):
        raise UnfitResults(f"{name} has several results for one image in {storage.redact(folder)}: {_few(twice)}")
    side = (manifest.crop_size, manifest.crop_size)
    with ThreadPoolExecutor(_READERS) as pool:
        sizes = pool.map(lambda key: _size_of(storage.join(folder, key)), chosen.values())
        wrong = [_size_text(stem, size, side) for stem, size in zip(chosen, sizes, strict=True) if size != side]
    missing = [stem for stem in wanted if stem not in files]
    unknown = [keys[0] for stem, keys in files.items() if stem not in known]
    if missing or wrong or unknown:
        raise _unfit(name, folder, missing, wrong, unknown)
    text = json.dumps([(key, there[key].version) for key in chosen.values()])
    return Results(name, folder, chosen, hashlib.sha256(text.encode()).hexdigest()[:16])


def export_inputs(data: str, out: str, *, manifest: Manifest) -> int:
    """Write `images/` (holes white), `masks/` (white = hole) and `truth/` as PNG, for methods that run elsewhere;
    returns how many images."""
    count = 0
    for record in read_records(data):
        truth = record.pixels()
        for variant in range(manifest.num_variants):
            name, mask = result_name(record.image_id, variant, manifest=manifest), record.mask(variant) * np.uint8(255)
            pictures = {"images": np.maximum(truth, mask[..., None]), "masks": mask, "truth": truth}
            for kind, picture in pictures.items():
                storage.write_atomic(storage.join(out, kind, f"{name}.png"), png_bytes(picture))
            count += 1
    return count


def _without_ending(key: str) -> str:
    path = PurePosixPath(key)
    return str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else key


def _image_ids(data: str, manifest: Manifest) -> Iterator[str]:
    for shard in manifest.shards:
        yield from open_shard(set_folder(data), shard.file).read(columns=["image_id"])["image_id"].to_pylist()


def _size_of(uri: str) -> tuple[int, ...] | None:
    """Height and width by the file's header, none if it is no image."""
    try:
        with storage.open_file(uri) as file, Image.open(file) as image:
            return image.height, image.width
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError):
        return None


def _size_text(name: str, size: tuple[int, ...] | None, wanted: tuple[int, ...]) -> str:
    there = "no image" if size is None else f"{size[0]}x{size[1]}"
    return f"{name} ({there}, not {wanted[0]}x{wanted[1]})"


def _unfit(
    name: str, folder: str, missing: Sequence[str] = (), sizes: Sequence[str] = (), unknown: Sequence[str] = ()
) -> UnfitResults:
    wrong = {
        "images of the set have no result": missing,
        "results are of another size": sizes,
        "files belong to no image of the set, so their truth is missing": unknown,
    }
    parts = [f"{len(names)} {what}: {_few(names)}" for what, names in wrong.items() if names]
    return UnfitResults(
        f"the results of {name} in {storage.redact(folder)} do not fit: {'; '.join(parts)}",
        missing=list(missing),
        sizes=list(sizes),
        unknown=list(unknown),
    )


def _few(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
