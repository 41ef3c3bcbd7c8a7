"""Resolves every kind of model reference: artifact folder, checkpoint, run folder, URI, MLflow registry."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import ModelNotFound
from pipeline.tracking import mlflow_client
from tmad import builtin
from tmad.checkpoint import CONFIG_FILE, WEIGHTS_FILE, load_model
from tmad.model import TMAD

ARTIFACT_FILES = (CONFIG_FILE, WEIGHTS_FILE)
"""What makes a folder a model artifact."""

LOCAL_TRACKING_FILE = "runs/mlflow.db"
"""Where runs are tracked when nothing else is said (`tracking.default_tracking_uri`), seen from the current folder."""

MLFLOW_SCHEMES = ("models:", "runs:", "mlflow-artifacts:")

log = logging.getLogger(__name__)


def load_any_model(ref: str, device: str = "cpu", tracking_uri: str | None = None) -> TMAD:
    """Load the generator that *ref* names, in evaluation mode on *device*; see `find_model`.

    Raises `ModelNotFound` saying what was looked for where, and `ValueError` for an artifact of another format.
    """
    return load_model(find_model(ref, tracking_uri=tracking_uri), device=device)


def find_model(ref: str, *, tracking_uri: str | None = None) -> Path:
    """The model artifact that *ref* names, as a folder on this machine (downloaded where it is elsewhere); *ref* and
    what is raised as for `locate_model`."""
    return storage.local_copy(locate_model(ref, tracking_uri=tracking_uri))


def locate_model(ref: str, *, tracking_uri: str | None = None) -> str:
    """The folder or URI of the model artifact that *ref* names; MLflow's are downloaded.

    - `builtin`: the model in the box (`tmad.builtin`);
    - `models:/tmad@champion`, `models:/tmad/3`, `runs:/<id>/model`: from MLflow at *tracking_uri*, else
      `MLFLOW_TRACKING_URI`, else `runs/mlflow.db` in the current folder;
    - a folder or any fsspec URI that holds `config.json` and `model.safetensors`;
    - a checkpoint or a finished run (its `model/` is taken);
    - `best/` of a run (the model with the best validation);
    - an unfinished run (the newest of its `checkpoints/` is taken, with a warning).

    Raises `ModelNotFound` saying what was looked for where.
    """
    if not ref:
        raise ModelNotFound("no model was named: give a folder, a URI, models:/name@alias or builtin")
    if ref == builtin.NAME:
        return str(builtin.builtin_model())
    if ref.startswith(MLFLOW_SCHEMES):
        return str(_from_mlflow(ref, tracking_uri))
    looked = [ref, storage.join(ref, "model")]
    for place in looked:
        if _is_artifact(place):
            return place
    if ref.rstrip("/").endswith("/best") and (best := _newest_checkpoint(ref)) is not None:
        return storage.join(best, "model")
    checkpoints = storage.join(ref, "checkpoints")
    looked.append(storage.join(checkpoints, "*", "model"))
    newest = _newest_checkpoint(checkpoints)
    if newest is not None:
        log.warning("run %s is not finished: using its checkpoint %s", storage.redact(ref), storage.redact(newest))
        return storage.join(newest, "model")
    hint = ""
    if ref.endswith((".safetensors", ".pt", ".pth", ".ckpt")):
        hint = "; name the folder, not the file"
    elif "://" not in ref and "@" in ref and not storage.exists(ref):
        hint = f"; for the MLflow registry write models:/{ref.rsplit('/', 1)[-1]}"
    raise ModelNotFound(
        f"no model at {storage.redact(ref)}: looked for {' and '.join(ARTIFACT_FILES)} in "
        + ", ".join(storage.redact(place) for place in looked)
        + hint
    )


def absolute_model(ref: str) -> str:
    """*ref* as it can be said in another folder: relative places become absolute, names stay."""
    return ref if ref == builtin.NAME or ref.startswith(MLFLOW_SCHEMES) else storage.absolute(ref)


def model_version(ref: str, *, tracking_uri: str | None = None) -> str:
    """*ref* for a record that lasts: `models:/tmad@champion` as the version that it stands for now, others as they
    are, without credentials. For a reference that `find_model` has found."""
    if not ref.startswith("models:/"):
        return storage.redact(ref)
    name, alias, version = _registry_name(ref)
    if alias is not None:
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        client = mlflow_client(uri or f"sqlite:///{Path(LOCAL_TRACKING_FILE).absolute()}")
        version = client.get_model_version_by_alias(name, alias).version
    return f"models:/{name}/{version}"


def _is_artifact(folder: str) -> bool:
    return all(storage.size(storage.join(folder, file)) is not None for file in ARTIFACT_FILES)


def _newest_checkpoint(folder: str) -> str | None:
    names = (
        {key.split("/", 1)[0] for key in storage.list_files(folder, (".safetensors",))}
        if storage.exists(folder)
        else ()
    )
    for name in sorted(names, reverse=True):
        if _is_artifact(storage.join(folder, name, "model")):
            return storage.join(folder, name)
    return None


def _from_mlflow(ref: str, tracking_uri: str | None) -> Path:
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        if not Path(LOCAL_TRACKING_FILE).is_file():
            raise ModelNotFound(
                f"{ref} is kept by MLflow: say where with tracking_uri or MLFLOW_TRACKING_URI; "
                f"there is no {LOCAL_TRACKING_FILE} here either"
            )
        uri = f"sqlite:///{Path(LOCAL_TRACKING_FILE).absolute()}"
    client = mlflow_client(uri)
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    where = storage.redact(uri)
    try:
        source = _registered_source(client, ref) if ref.startswith("models:/") else ref
        target = tempfile.mkdtemp(prefix="tmad-model-")
        atexit.register(shutil.rmtree, target, ignore_errors=True)
        folder = Path(download_artifacts(artifact_uri=source, dst_path=target, tracking_uri=uri))
    except (MlflowException, OSError) as error:
        message = f"no model {ref} at {where}: {storage.redact(str(error))}"
        raise ModelNotFound(message + _what_is_there(client, ref)) from error
    # An MLflow model keeps its artifacts below the name of the folder they were logged from.
    for config in (folder / "config.json", *sorted(folder.glob("artifacts/*/config.json"))):
        if all((config.parent / file).is_file() for file in ARTIFACT_FILES):
            return config.parent
    raise ModelNotFound(f"{ref} at {where} is no T-MAD model: no {' and '.join(ARTIFACT_FILES)} in it")


def _registered_source(client: Any, ref: str) -> str:
    name, alias, version = _registry_name(ref)
    if alias is not None:
        version = client.get_model_version_by_alias(name, alias).version
    source: str = client.get_model_version_download_uri(name, version)
    return source


def _registry_name(ref: str) -> tuple[str, str | None, str]:
    """Name, alias, version of `models:/name@alias` or `models:/name/version`."""
    rest = ref.removeprefix("models:/").strip("/")
    if "@" in rest:
        name, alias = rest.rsplit("@", 1)
        if name and alias:
            return name, alias, ""
    elif "/" in rest:
        name, version = rest.rsplit("/", 1)
        if name and version.isdigit():
            return name, None, version
    raise ModelNotFound(f"{ref!r} is no registry reference: write models:/name@alias or models:/name/3")


def _what_is_there(client: Any, ref: str) -> str:
    """For an error: which names, or which aliases and versions of this name, the registry has."""
    from mlflow.exceptions import MlflowException

    if not ref.startswith("models:/"):
        return ""
    try:
        name = _registry_name(ref)[0]
        models = {model.name: model for model in client.search_registered_models(max_results=20)}
        if name not in models:
            return f" (registered models: {', '.join(sorted(models)) or 'none'})"
        versions = sorted(int(version.version) for version in client.search_model_versions(f"name = '{name}'"))
        aliases = ", ".join(sorted(client.get_registered_model(name).aliases)) or "none"
        return f" ({name} has versions {', '.join(map(str, versions)) or 'none'}; aliases: {aliases})"
    except MlflowException:
        return ""
