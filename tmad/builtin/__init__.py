"""The model in the box: `config.json`, `model.safetensors` (float16) and its card lie in this folder.

`python -m tmad.builtin MODEL_FOLDER` puts another model there, which is how a trained run becomes the one that ships.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from tmad.checkpoint import CONFIG_FILE, WEIGHTS_FILE

NAME = "builtin"
"""What commands and settings call this model."""

DIGEST_FILE = "SHA256SUMS"


def builtin_model(folder: Path = Path(__file__).parent) -> Path:
    """The folder of the model that ships with this package, its files compared with their digests.

    Raises `FileNotFoundError` if a file is missing, `ValueError` if one is not what was shipped.
    """
    sums = folder / DIGEST_FILE
    if not sums.is_file():
        raise FileNotFoundError(f"this installation has no model in the box: {sums} is missing; install tmad again")
    for line in sums.read_text().splitlines():
        expected, name = line.split()
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"the model in the box is not complete: {path} is missing; install tmad again")
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ValueError(f"{path} is damaged: it is not the file that was shipped; install tmad again")
    return folder


def pack(source: Path, folder: Path) -> None:
    """Make the model in *source* the one in *folder*: float16, with digests."""
    from tmad.checkpoint import load_model, save_model

    save_model(load_model(source), folder, half=True)
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in (CONFIG_FILE, WEIGHTS_FILE)
    ]
    (folder / DIGEST_FILE).write_text("".join(lines))
