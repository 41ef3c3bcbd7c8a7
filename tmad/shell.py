"""`tmad inpaint PHOTO MASK -o RESULT`: one file, without Ray, started in the time that PyTorch takes."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

DESCRIPTION = """
Fill the hole of one picture. The mask is a picture of the same size, white = hole (--hole black turns it round);
`alpha` in its place takes the transparent part of PHOTO. The result has PHOTO's format and metadata, and an ending of
that format, or is PNG and ends in .png; a folder as RESULT takes it under PHOTO's name.

Folders, tar files, tables and URIs in place of PHOTO and MASK are the batch job: tmad inpaint --help
"""


def parser() -> argparse.ArgumentParser:
    """The command line of one picture."""
    made = argparse.ArgumentParser(
        prog="tmad inpaint", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("photo", metavar="PHOTO", type=Path, help="image file")
    made.add_argument("mask", metavar="MASK", help="mask file, or `alpha`")
    made.add_argument("-o", "--output", metavar="RESULT", required=True, help="file or folder to write")
    made.add_argument(
        "-m",
        "--model",
        default=os.environ.get("TMAD_MODEL", "builtin"),
        help="model folder, run folder, URI, models:/name@alias or builtin; default: TMAD_MODEL, else builtin",
    )
    made.add_argument(
        "--hole", "--mask-hole", choices=("white", "black"), default="white", help="colour of the hole in the mask"
    )
    made.add_argument(
        "--mask-value",
        choices=("grey", "nonzero", "alpha"),
        default="grey",
        help="what of the mask counts: its brightest channel, all that is not 0, or its alpha channel",
    )
    made.add_argument(
        "--mask-threshold", metavar="N", type=int, default=127, help="values above it are white (0 to 254)"
    )
    made.add_argument("--scale-masks", action="store_true", help="bring the mask to the size of PHOTO")
    made.add_argument("--dilate", metavar="PX", type=int, default=0, help="pixels by which the hole is grown")
    made.add_argument("--feather", metavar="PX", type=int, default=0, help="pixels over which the fill is blended in")
    made.add_argument(
        "--policy", choices=("crop", "resize", "original"), default="crop", help="what the coarse network sees"
    )
    made.add_argument("--coarse-from", metavar="FILE", type=Path, help="another method's result, to be refined")
    made.add_argument("--seed", type=int, default=0, help="keys the choice of the texture memory")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--max-pixels", metavar="N", type=int, default=None, help="refuse larger pictures")
    return made


def inpaint_one(argv: Sequence[str]) -> int:
    """Fill one file; returns the exit code.

    Raises `ValueError` with one line that says what cannot be used and why.
    """
    options = parser().parse_args(argv)
    if options.dilate < 0 or options.feather < 0:
        raise ValueError("--dilate and --feather must not be negative")
    for path in (options.photo, Path(options.mask)):
        if not path.is_file() and str(path) != "alpha":
            raise ValueError(f"there is no file {path}")
    import numpy as np

    from tmad.files import allow_pixels, fill_file, open_file
    from tmad.holes import MaskRule, dilate, hole_mask, scaled_hole
    from tmad.images import MAX_PIXELS, UnreadableImage, decode_image
    from tmad.inpaint import Inpainter

    began = time.monotonic()
    rule = MaskRule(options.hole, options.mask_value, options.mask_threshold)
    warnings.simplefilter("ignore", UserWarning)  # what they say stands in the result's notes
    max_pixels = options.max_pixels or MAX_PIXELS
    allow_pixels(max_pixels)
    inpainter = Inpainter.load(
        options.model,
        device=options.device,
        policy=options.policy,
        feather=options.feather,
        seed=options.seed,
    )
    try:
        file = open_file(options.photo.read_bytes(), max_pixels=max_pixels)
        if options.mask == "alpha":
            if not file.image.has_transparency_data:
                raise ValueError(f"{options.photo} has no transparency to take for the hole")
            hole = (np.asarray(file.image.convert("RGBA").getchannel("A")) < 128).astype(np.uint8)
        else:
            mask = decode_image(Path(options.mask).read_bytes(), max_pixels=max_pixels)
            hole, notes = hole_mask(mask, rule)
            if notes:
                raise ValueError(f"{options.mask}: {notes[0]}")
            if options.scale_masks:
                hole = scaled_hole(hole, file.image.height, file.image.width)
        output = _output(options.output, options.photo, file.format)
        coarse = decode_image(options.coarse_from.read_bytes()) if options.coarse_from else None
        filled = fill_file(
            inpainter,
            file,
            dilate(hole, options.dilate),
            image_id=options.photo.name,
            filled=coarse,
            opaque=options.mask == "alpha",
            kind="png" if output.suffix.lower() == ".png" and file.format != "PNG" else "same",
        )
    except UnreadableImage as error:
        raise ValueError(f"{options.photo}, {options.mask}: {error}") from error
    try:
        _write(output, filled.data)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror}") from error
    for note in filled.notes:
        print(f"note: {note}", file=sys.stderr)
    share = filled.result.hole_fraction
    print(f"{output}: {share:.2%} of {options.photo} filled in {time.monotonic() - began:.1f} s")
    return 0


def _output(text: str, photo: Path, file_format: str) -> Path:
    """Where the result goes. Raises `ValueError` for an ending of another format: it would not say what the file is."""
    path = Path(text)
    from PIL import Image

    from tmad.files import ENDINGS

    own = {"MPO": "JPEG"}.get(file_format, file_format)
    endings = [ending for ending, kind in Image.registered_extensions().items() if kind == own]
    if path.is_dir() or text.endswith(("/", os.sep)):
        return path / (photo.name if photo.suffix.lower() in endings else photo.stem + ENDINGS[own])
    if path.suffix.lower() not in (*endings, ".png"):
        allowed = " or ".join(dict.fromkeys((ENDINGS[own], ".png")))
        raise ValueError(
            f"the result must end in {allowed}, got {path}: {photo} is {own}, and a result has its format, or is PNG"
        )
    return path


def _write(path: Path, data: bytes) -> None:
    """Wholly or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:40]}.", delete=False) as file:
        try:
            file.write(data)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
