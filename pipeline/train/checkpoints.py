"""Chooses the checkpoint to resume from: the newest one that matches its manifest, the same on all workers.

`manifest.json` in a checkpoint names every other file with its size and SHA-256; it is written last. A checkpoint that
is not what its manifest says is passed over, with a warning, for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline import storage
from pipeline.errors import CheckpointsDamaged, TrainingFailed
from pipeline.train.context import MANIFEST_FILE, TrainContext

RAY_RECORDS_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of a run's checkpoints, beside them."""

log = logging.getLogger(__name__)


def checkpoint_name(images: int) -> str:
    """Sorts by images; the same for every repetition of the same work."""
    return f"images_{images:012d}"


def seal(folder: Path) -> None:
    """Write the manifest of the files in *folder*; nothing may change in it afterwards."""
    sizes = sorted(storage.file_sizes(str(folder)).items())
    files = {key: {"bytes": size, "sha256": _sha256(folder / key)} for key, size in sizes}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=2) + "\n")


def damage(folder: Path) -> list[str]:
    """In what the files of *folder* differ from its manifest, one readable line each; empty if it can be trusted."""
    try:
        files = json.loads((folder / MANIFEST_FILE).read_bytes())["files"]
        wanted = {key: (one["bytes"], one["sha256"]) for key, one in files.items()}
    except FileNotFoundError:
        return [f"{MANIFEST_FILE} is missing"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return [f"{MANIFEST_FILE} is damaged"]
    lines = []
    for key, (size, sha256) in wanted.items():
        if not (folder / key).is_file():
            lines.append(f"{key} is missing")
        elif (there := (folder / key).stat().st_size) != size:
            lines.append(f"{key} has {there:,} bytes, {size:,} were written")
        elif _sha256(folder / key) != sha256:
            lines.append(f"{key} has other content than was written")
    return lines


@dataclass(frozen=True)
class Usable:
    """A checkpoint that can be trusted."""

    name: str
    folder: Path
    """On this machine."""
    passed_over: int
    """Newer ones that are damaged."""


def newest_usable(context: TrainContext) -> Usable | None:
    """The newest checkpoint that can be trusted, or `None` at the start of a run; rank 0 decides for all workers.

    What is passed over is logged file by file. Raises `CheckpointsDamaged`, on all workers alike, if there are
    checkpoints and none can be trusted, and `TrainingFailed` if the workers read different content.
    """
    chosen: str | None = None
    folder: Path | None = None
    damaged: dict[str, list[str]] = {}
    # A crash while the very first checkpoint was written leaves one that never counted. More than one, or one that was
    # committed, is work that must not be thrown away unasked.
    disposable = True
    if context.rank == 0:
        found = context.checkpoints()
        disposable = len(found) <= 1 and not any(found.values())
        for name in found:
            folder = context.checkpoint(name)
            if not (lines := damage(folder)):
                chosen = name
                break
            damaged[name] = lines
            log.warning("checkpoint %s cannot be used: %s", name, "; ".join(lines))
    chosen, damaged, disposable = context.everyones((chosen, damaged, disposable))[0]
    if chosen is None:
        if not disposable:
            told = "; ".join(f"{name}: {', '.join(lines)}" for name, lines in damaged.items())
            raise CheckpointsDamaged(
                f"the run has checkpoints and none of them can be used ({told}); restore one of them from a copy, "
                "or take another --name to train from the start",
                damaged=damaged,
            )
        if damaged and context.rank == 0:
            log.warning("no checkpoint was ever complete: training from the start")
        return None
    if context.rank != 0 or folder is None:
        folder = context.checkpoint(chosen)
    _check_same(context, chosen, folder)
    if damaged and context.rank == 0:
        log.warning("going on from checkpoint %s instead of %s", chosen, ", ".join(damaged))
    return Usable(chosen, folder, len(damaged))


def forget_broken_records(checkpoints: str) -> None:
    """Remove Ray's list of the checkpoints in the folder *checkpoints* if it cannot be read or names some that are
    gone: Ray would refuse to start, and what is there is found without it."""
    uri = storage.join(checkpoints, RAY_RECORDS_FILE)
    if not storage.exists(uri):
        return
    try:
        content = json.loads(storage.read_bytes(uri))
        names = {one["checkpoint_dir_name"] for one in content["checkpoint_results"]}
    except (ValueError, TypeError, KeyError):
        why = "it is damaged"
    else:
        there = {key.split("/", 1)[0] for key in storage.list_files(checkpoints)}
        if names <= there:
            return
        why = f"it names {', '.join(sorted(names - there))}, which is gone"
    log.warning(
        "Ray's list of checkpoints %s is not used: %s; older checkpoints stay for good", storage.redact(uri), why
    )
    storage.remove(uri)


def _check_same(context: TrainContext, name: str, folder: Path) -> None:
    """Rank 0 has compared its own copy with the manifest; the others compare theirs, and all the manifests."""
    lines = damage(folder) if context.rank != 0 else []
    if lines:
        log.warning("checkpoint %s arrived damaged: %s", name, "; ".join(lines))
    digest = 0 if lines else int(_sha256(folder / MANIFEST_FILE)[:15], 16)
    if not context.same_everywhere(torch.tensor([digest])):
        raise TrainingFailed(
            f"the workers read different content of checkpoint {name}; do all of them see one storage?"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
