"""Made-up collections of photographs of any number and size, no two alike, cut from the demo's photographs."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from pipeline.demo.photographs import write_photographs
from tmad.rng import numpy_generator


class Maker:
    """Cuts photographs out of the demo's, which it writes to *folder*."""

    def __init__(self, folder: Path) -> None:
        write_photographs(folder)
        self.originals = [Image.open(file).convert("RGB") for file in sorted(folder.glob("train/*"))]
        self.grain: np.ndarray | None = None

    def photographs(
        self,
        folder: Path,
        count: int,
        *,
        size: tuple[int, int] = (640, 480),
        quality: int = 92,
        grain: float = 0.0,
    ) -> None:
        """*count* JPEG files of *size* (width, height) in *folder*: a part of one photograph over a part of another.

        *grain*: standard deviation of fine noise, in grey values; enlarged photographs have no detail otherwise.
        """
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number:06d}.jpg").write_bytes(self._file(number, size, quality, grain))

    def _file(self, number: int, size: tuple[int, int], quality: int, grain: float) -> bytes:
        rng = numpy_generator("photograph", number)
        parts = []
        for place in rng.choice(len(self.originals), 2, replace=False):
            original = self.originals[int(place)]
            share = rng.uniform(0.5, 1)
            width, height = (int(side * share) for side in original.size)
            left, top = int(rng.integers(original.width - width + 1)), int(rng.integers(original.height - height + 1))
            parts.append(original.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height)))
        picture = np.asarray(Image.blend(parts[0], parts[1], 0.3))
        if grain:
            picture = self._with_grain(picture, grain, rng)
        return simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality, "RGB", "420")

    def _with_grain(self, picture: np.ndarray, grain: float, rng: np.random.Generator) -> np.ndarray:
        if self.grain is None or self.grain.shape != picture.shape[:2]:
            self.grain = rng.normal(0, grain, picture.shape[:2]).astype(np.int16)
        shifted = np.roll(self.grain, rng.integers(0, picture.shape[:2]), (0, 1))
        return np.clip(picture + shifted[..., None], 0, 255).astype(np.uint8)


def write_pictures(folder: Path, count: int) -> None:
    """*count* JPEG files of 64 x 64 pixels, quickly made: no two look alike."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (8, 8, 3), np.uint8)
        picture = np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1))
        (folder / f"{number:08d}.jpg").write_bytes(simplejpeg.encode_jpeg(picture, 90))


def write_list(file: Path, count: int, *, there: str) -> Path:
    """A list of *count* keys as those of Places365, of which *there* is the only one that exists."""
    file.write_text("\n".join([there, *(f"/c/class/sub/{number:08d}.jpg 7" for number in range(count - 1))]))
    return file


def as_tar(files: Iterable[Path], below: str = ".") -> bytes:
    """These files as a tar file's bytes, in the folder *below*."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for file in files:
            archive.add(file, arcname=f"{below}/{file.name}")
    return buffer.getvalue()


def as_parquet(files: Iterable[Path]) -> bytes:
    """These files as a Parquet file's bytes: columns `name` and `image`, 64 rows a row group."""
    rows = [{"name": file.name, "image": file.read_bytes()} for file in files]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=64)
    return buffer.getvalue()
