"""Models and training states on disk: JSON and safetensors, nothing that needs unpickling.

A model artifact is a folder with `config.json` and `model.safetensors`; the same folder lies inside a checkpoint
(`model/`, the averaged weights), in the registry and at the end of a run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tmad.config import TMADConfig, from_dict, renamed
from tmad.model import TMAD
from tmad.step import TrainingState

FORMAT_VERSION = 2
"""2: PSNet works on pictures. Models of version 1 had the same layers, run cell by cell, and no gains."""
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "state.safetensors"
COUNTERS_FILE = "state.json"

MODEL_CARD = """# T-MAD model

Texture memory-augmented deep patch-based image inpainting (Xu et al., 2020). `config.json` holds the architecture,
`model.safetensors` the (averaged) weights. Input: an RGB image and a mask, 1 = hole; pixels outside the hole are
returned bit for bit. Load it with `tmad.load_model(folder)`.
"""


def save_model(model: TMAD, folder: Path | str, *, half: bool = False) -> None:
    """Write the artifact of *model* into *folder*, which is made if need be; with *half* as float16, half the size."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if half:
        tensors = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, {"format_version": FORMAT_VERSION, "model": asdict(model.config)})
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(MODEL_CARD)


def load_model(folder: Path | str, *, device: torch.device | str = "cpu") -> TMAD:
    """The model in *folder*, in evaluation mode.

    Raises `FileNotFoundError` that says which file was looked for where; `ValueError` for another format version, an
    unknown setting, a damaged file, or weights that are not finite or do not fit the configuration (missing,
    unexpected, reshaped).
    """
    folder = Path(folder)
    stored = _read_json(folder, CONFIG_FILE, "model")
    model = TMAD(from_dict(TMADConfig, stored["model"]))
    tensors = _read_tensors(folder, WEIGHTS_FILE)
    problems = mismatches(tensors, dict(model.state_dict()))
    if problems:
        raise ValueError(f"{folder / WEIGHTS_FILE} does not fit {CONFIG_FILE} beside it: {'; '.join(problems)}")
    if broken := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{folder / WEIGHTS_FILE} has weights that are not finite: {', '.join(broken)}")
    model.load_state_dict(tensors)
    return model.to(device).eval()


def read_model(folder: Path | str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Settings and weights of the artifact in *folder* as they are stored, whether or not they fit anything. Raises as
    `load_model` does for files that are missing, damaged or of another version."""
    folder = Path(folder)
    settings: dict[str, Any] = _read_json(folder, CONFIG_FILE, "model")["model"]
    return settings, _read_tensors(folder, WEIGHTS_FILE)


def read_state(folder: Path | str) -> dict[str, torch.Tensor]:
    """The tensors of the training checkpoint in *folder*, named as `TrainingState.tensors` does; raises as
    `read_model`."""
    _read_json(Path(folder), COUNTERS_FILE, "counters", "config")
    # The discriminators' former name.
    return {
        name.replace("critic", "discriminator"): value
        for name, value in _read_tensors(Path(folder), STATE_FILE).items()
    }


def model_digest(folder: Path | str) -> str:
    """What tells models apart: 16 hexadecimal digits of the sha256 of its configuration and weights."""
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()[:16]


def save_state(state: TrainingState, folder: Path | str) -> None:
    """Write a training checkpoint: the averaged model as artifact `model/`, all tensors, counters, configuration."""
    folder = Path(folder)
    save_model(state.ema_model, folder / "model")
    save_file(state.tensors(), folder / STATE_FILE)
    write_json(
        folder / COUNTERS_FILE,
        {"format_version": FORMAT_VERSION, "counters": state.counters(), "config": asdict(state.config)},
    )


def load_state(state: TrainingState, folder: Path | str) -> None:
    """Continue *state* from a checkpoint, bit for bit.

    Raises as `load_model` does, and `ValueError` that lists the differences if the checkpoint was made with another
    configuration.
    """
    folder = Path(folder)
    stored = _read_json(folder, COUNTERS_FILE, "counters", "config")
    changed = differences(renamed(stored["config"]), json.loads(json.dumps(asdict(state.config))))
    if changed:
        raise ValueError(f"{folder} was made with another configuration: {'; '.join(changed)}")
    state.restore(read_state(folder), stored["counters"])


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings in which two nested dictionaries differ, one "name: old -> new" each."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name, "(absent)"), new.get(name, "(absent)")
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a} -> {b}")
    return found


def mismatches(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    """What keeps *tensors* from being loaded as *wanted*: missing, unexpected and reshaped names."""
    problems = [f"missing {name}" for name in wanted.keys() - tensors.keys()]
    problems += [f"unexpected {name}" for name in tensors.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    ]
    return sorted(problems)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Readable JSON, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _read_json(folder: Path, name: str, *parts: str) -> dict[str, Any]:
    """The object in a JSON file, with a format version that is ours and at least the named *parts*."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"looked for {name} in {folder}: " + ("no such file" if folder.is_dir() else "no such folder")
        )
    try:
        stored: dict[str, Any] = json.loads(path.read_text())
        version = stored.get("format_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        older = (
            "; it was made by an older T-MAD, whose PSNet worked cell by cell: train it anew" if version == 1 else ""
        )
        raise ValueError(f"{path} has format version {version}; this code reads version {FORMAT_VERSION}{older}")
    missing = [part for part in parts if not isinstance(stored.get(part), dict)]
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return stored


def _read_tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"looked for {name} in {folder}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
