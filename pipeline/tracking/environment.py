"""Provenance of a run (commit, versions, machine), written as `environment.json`."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

from pipeline.runs.cluster import ROOT

PACKAGES = ("tmad", "torch", "ray", "mlflow", "numpy", "pyarrow", "pillow", "pydantic", "safetensors", "fsspec")


def environment(**more: Any) -> dict[str, Any]:
    """Versions, machine and code of this process, and *more* (digests, say) as it is given; JSON-serialisable."""
    return {
        "code": code_state(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        **more,
    }


def code_state() -> dict[str, Any]:
    """Git commit and whether tracked files differ from it; both `None` outside a checkout (installed, uploaded).

    `TMAD_COMMIT` in the environment states the commit where the code arrives without its repository.
    """
    if not (ROOT / ".git").exists():
        return {"commit": os.environ.get("TMAD_COMMIT"), "dirty": None}
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def code_tags() -> dict[str, str]:
    """`code_state` as tags of an MLflow run, the commit under the name that MLflow's pages show; what is not known is
    none."""
    names = {"commit": "mlflow.source.git.commit", "dirty": "git_dirty"}
    return {names[name]: str(value) for name, value in code_state().items() if value is not None}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
