"""The registry: a version that MLflow's own loader runs in another process, with a signature and clear refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import MissingInput
from pipeline.models.registry import model_signature, reference, register_model, write_pyfunc_model
from pipeline.tracking import Tracker, mlflow_client
from tests.tmad.tiny import make_image, make_mask
from tmad.checkpoint import model_digest
from tmad.inpaint import Inpainter

ROOT = Path(__file__).resolve().parent.parent.parent

IN_ANOTHER_PROCESS = """
import sys, numpy as np, mlflow
model = mlflow.pyfunc.load_model("models:/tests@champion")
data = np.load(sys.argv[1])
np.save(sys.argv[2], model.predict({"image": data["image"], "mask": data["mask"]}))

def message(image, mask):
    try:
        model.predict({"image": image, "mask": mask})
    except Exception as error:
        return " ".join(str(error).split())
    return "no error"

image, mask = data["image"], data["mask"]
print("DTYPE", message(image.astype(np.float32), mask))
print("CHANNELS", message(image[..., :2], mask))
print("SIZE", message(image, mask[:, :-1]))
print("BATCH", message(image[0], mask[0]))
try:
    model.predict({"image": image})
except Exception as error:
    print("MISSING", " ".join(str(error).split()))
print("RAY", "ray" in sys.modules)
"""


def register(model_folder: Path, tracking_uri: str, **kwargs: str | None) -> tuple[int, str]:
    run_id = Tracker.create(tracking_uri, "tests", "registered")
    assert run_id is not None
    arguments = {"tracking_uri": tracking_uri, "run_id": run_id, "name": "tests", **kwargs}
    return register_model(model_folder, **arguments), run_id  # type: ignore[arg-type]


def test_another_process_gets_the_same_pixels_and_clear_errors_for_wrong_input(
    model_folder: Path, tracking_uri: str, tmp_path: Path
) -> None:
    register(model_folder, tracking_uri)
    images = np.stack([make_image(seed, side=50)[:, :40] for seed in (1, 2)])
    masks = np.stack([make_mask(50)[:, :40]] * 2)
    np.savez(tmp_path / "in.npz", image=images, mask=masks)
    run = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "in.npz"), str(tmp_path / "out.npy")],
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": tracking_uri,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    inpainter = Inpainter.load(model_folder)
    expected = [inpainter(image, mask).output for image, mask in zip(images, masks, strict=True)]
    assert np.array_equal(np.load(tmp_path / "out.npy"), np.stack(expected))
    said = dict(line.split(" ", 1) for line in run.stdout.splitlines() if " " in line)
    assert "float32" in said["DTYPE"]
    assert "uint8" in said["DTYPE"]
    assert "(-1, -1, -1, 3)" in said["CHANNELS"]
    assert "image must be (n, H, W, 3) and mask (n, H, W) of the same n, H, W" in said["SIZE"]
    assert "(-1, -1, -1, 3)" in said["BATCH"]
    assert "mask" in said["MISSING"]
    assert said["RAY"] == "False"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_line_of_mlflow_fills_a_hole_from_json(
    model_folder: Path, tracking_uri: str, tmp_path: Path
) -> None:
    register(model_folder, tracking_uri)
    image, mask = make_image(1, side=48), make_mask(48)
    question = {"inputs": {"image": image[None].tolist(), "mask": mask[None].tolist()}}
    (tmp_path / "in.json").write_text(json.dumps(question))
    command = [sys.executable, "-m", "mlflow", "models", "predict", "-m", "models:/tests@champion"]
    command += ["--env-manager", "local", "-i", "in.json", "-o", "out.json", "-t", "json"]
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    answer = np.array(json.loads((tmp_path / "out.json").read_text())["predictions"], dtype=np.uint8)
    expected = Inpainter.load(model_folder)(image, mask).output
    assert np.array_equal(answer[0], expected)


def test_a_newer_version_does_not_take_the_alias(model_folder: Path, tracking_uri: str) -> None:
    assert [register(model_folder, tracking_uri)[0] for _ in range(2)] == [1, 2]
    champion = mlflow_client(tracking_uri).get_model_version_by_alias("tests", "champion")
    assert int(champion.version) == 1
    assert reference(tracking_uri, "tests", 1, "champion")["uri"] == "models:/tests@champion"
    assert reference(tracking_uri, "tests", 2, "champion") == {
        "name": "tests", "version": 2, "alias": None, "uri": "models:/tests/2"
    }  # fmt: skip


def test_a_version_carries_digest_run_and_alias(model_folder: Path, tracking_uri: str) -> None:
    version, run_id = register(model_folder, tracking_uri, alias="candidate")
    found = mlflow_client(tracking_uri).get_model_version_by_alias("tests", "candidate")
    assert int(found.version) == version == 1
    assert found.run_id == run_id
    assert found.tags["model_digest"] == model_digest(model_folder)


def test_registering_the_same_model_from_the_same_run_again_makes_no_second_version(
    model_folder: Path, tracking_uri: str
) -> None:
    version, run_id = register(model_folder, tracking_uri)
    again = register_model(model_folder, tracking_uri=tracking_uri, run_id=run_id, name="tests", alias="other")
    assert again == version
    client = mlflow_client(tracking_uri)
    assert len(client.search_model_versions("name = 'tests'")) == 1
    assert sorted(client.get_registered_model("tests").aliases) == ["champion", "other"]
    assert register(model_folder, tracking_uri)[0] == 2, "another run makes another version"


def test_a_folder_without_a_model_is_refused_before_anything_is_registered(tmp_path: Path, tracking_uri: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MissingInput, match=r"cannot register .*: no model\.safetensors in it"):
        register(tmp_path, tracking_uri)
    assert list(mlflow_client(tracking_uri).search_registered_models()) == []


def test_the_signature_is_uint8_of_any_size() -> None:
    signature = model_signature()
    shapes = {spec.name: (spec.type, spec.shape) for spec in signature.inputs.inputs}
    assert shapes == {
        "image": (np.dtype(np.uint8), (-1, -1, -1, 3)),
        "mask": (np.dtype(np.uint8), (-1, -1, -1)),
    }


def test_a_stored_model_brings_an_example_that_it_takes(model_folder: Path, tmp_path: Path) -> None:
    import mlflow.pyfunc

    write_pyfunc_model(model_folder, tmp_path / "stored", digest="0" * 16)
    stored = mlflow.pyfunc.load_model(str(tmp_path / "stored"))
    example = {name: np.asarray(value, np.uint8) for name, value in stored.input_example.items()}
    filled = stored.predict(example)
    valid = example["mask"] == 0
    assert 0 < valid.mean() < 1
    assert np.array_equal(filled[valid], example["image"][valid])
    assert not np.array_equal(filled, example["image"])


@pytest.mark.filterwarnings("ignore:.*Any type hint")  # of MLflow, about its own base class
def test_a_picture_is_filled_the_same_wherever_it_stands_and_a_bad_one_fails_alone(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import mlflow.pyfunc

    write_pyfunc_model(model_folder, tmp_path / "stored", digest="0" * 16)
    stored = mlflow.pyfunc.load_model(str(tmp_path / "stored"))
    image, mask = make_image(1, side=200), make_mask(200)
    images, masks = np.stack([image] * 3), np.stack([mask, np.ones_like(mask), mask])
    filled = stored.predict({"image": images, "mask": masks})
    assert np.array_equal(filled[0], filled[2])
    assert np.array_equal(filled[0], Inpainter.load(model_folder).inpaint(image, mask))
    assert np.array_equal(filled[1], image)
    assert "image 1 of 3 comes back as it was: the mask leaves nothing but hole" in caplog.text
