"""The MLflow model registry: a trained artifact becomes a version of a named model that any process can run."""

from __future__ import annotations

import logging
import tempfile
import warnings
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import MissingInput
from pipeline.tracking import mlflow_client
from tmad.checkpoint import CONFIG_FILE, WEIGHTS_FILE, model_digest

ARTIFACT = "tmad_model"
"""Key of the model artifact inside the MLflow model; `pyfunc_model.py` reads it under the same name."""

ARTIFACT_PATH = "model"
"""Folder of the MLflow model among its run's artifacts."""

REQUIREMENTS = ("torch", "numpy", "pillow", "pydantic", "safetensors")
"""What the stored model imports besides `tmad` itself."""

EXAMPLE_SIDE = 64
"""Of the example that is stored with a model, in pixels."""

log = logging.getLogger(__name__)


def register_model(
    folder: Path | str,
    *,
    tracking_uri: str,
    run_id: str,
    name: str = "tmad",
    alias: str | None = "champion",
    card: str | None = None,
) -> int:
    """Store the model artifact in *folder* as a new version of *name*, and return the version.

    *card* (`model_card`) becomes the version's description.

    *alias* is given to it if no version has it yet: once there is a champion, a newer version has to be measurably
    better (`pipeline.promotion.promote`).

    The stored model runs through `mlflow.pyfunc.load_model("models:/<name>@<alias>")` wherever this package is
    installed; signature: `image` (-1, -1, -1, 3) and `mask` (-1, -1, -1), both uint8, to (-1, -1, -1, 3) uint8. The
    same artifact registered again from the same run gives the version that is already there, so that a repeated
    command does not pile up versions.

    Raises `MissingInput` if *folder* is no model artifact.
    """
    from mlflow.exceptions import MlflowException

    folder = Path(folder)
    missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / file).is_file()]
    if missing:
        raise MissingInput(f"cannot register {folder}: no {' and no '.join(missing)} in it; save_model writes both")
    client = mlflow_client(tracking_uri)
    digest = model_digest(folder)
    # It may be there, or another run makes it in this moment; what else is wrong, the next call says.
    with suppress(MlflowException):
        client.create_registered_model(name, description="T-MAD image inpainting: image and mask in, filled image out")
    version = _version_with(client, name, run_id, digest)
    if version is None:
        with tempfile.TemporaryDirectory(prefix="tmad-register-") as temporary:
            stored = Path(temporary, ARTIFACT_PATH)
            write_pyfunc_model(folder, stored, digest=digest)
            client.log_artifacts(run_id, str(stored), ARTIFACT_PATH)
        created = client.create_model_version(
            name,
            source=f"{client.get_run(run_id).info.artifact_uri}/{ARTIFACT_PATH}",
            run_id=run_id,
            tags={"model_digest": digest},
            description=card,
        )
        version = int(created.version)
    if alias is not None and alias not in client.get_registered_model(name).aliases:
        try:
            client.set_registered_model_alias(name, alias, str(version))
        except MlflowException:
            # Another run has given it to its own version in this moment.
            if alias not in client.get_registered_model(name).aliases:
                raise
    log.info("model %s is version %d of %r at %s", digest, version, name, storage.redact(tracking_uri))
    return version


def reference(tracking_uri: str, name: str, version: int, alias: str) -> dict[str, Any]:
    """How *version* of *name* is loaded: by *alias* if it has it, else by number. `{"name", "version", "alias",
    "uri"}`."""
    held = mlflow_client(tracking_uri).get_registered_model(name).aliases.get(alias)
    has_it = held is not None and int(held) == version
    uri = f"models:/{name}@{alias}" if has_it else f"models:/{name}/{version}"
    return {"name": name, "version": version, "alias": alias if has_it else None, "uri": uri}


def write_pyfunc_model(folder: Path, target: Path, *, digest: str) -> None:
    """Write the artifact in *folder* as an MLflow pyfunc model to the new folder *target*; no server is involved."""
    with warnings.catch_warnings():
        # MLflow 3.17 warns about its own chat classes.
        warnings.filterwarnings("ignore", ".*Any type hint is inferred as", UserWarning)
        import mlflow.pyfunc

        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={ARTIFACT: str(folder.absolute())},
            signature=model_signature(),
            input_example=input_example(),
            pip_requirements=[f"{package}=={metadata.version(package)}" for package in REQUIREMENTS],
            metadata={"model_digest": digest},
        )


def model_signature() -> Any:
    """MLflow signature of the inpainter: any number of images of one size, uint8."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    uint8 = np.dtype(np.uint8)
    return ModelSignature(
        inputs=Schema([TensorSpec(uint8, (-1, -1, -1, 3), "image"), TensorSpec(uint8, (-1, -1, -1), "mask")]),
        outputs=Schema([TensorSpec(uint8, (-1, -1, -1, 3))]),
    )


def input_example() -> dict[str, Any]:
    """One small picture with a hole, as the stored model takes it: a ramp of grey values."""
    import numpy as np

    ramp = np.linspace(0, 255, EXAMPLE_SIDE, dtype=np.uint8)
    image = np.broadcast_to(ramp[:, None], (1, EXAMPLE_SIDE, EXAMPLE_SIDE, 3)).copy()
    mask = np.zeros(image.shape[:3], np.uint8)
    mask[:, EXAMPLE_SIDE // 4 : EXAMPLE_SIDE // 2, EXAMPLE_SIDE // 4 : EXAMPLE_SIDE // 2] = 255
    return {"image": image, "mask": mask}


def _version_with(client: Any, name: str, run_id: str, digest: str) -> int | None:
    versions = client.search_model_versions(f"name = '{name}'")
    same = [
        int(version.version)
        for version in versions
        if version.run_id == run_id and version.tags.get("model_digest") == digest
    ]
    return max(same, default=None)
