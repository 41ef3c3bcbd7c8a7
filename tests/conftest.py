"""What several tests share: one Ray cluster a session, single-threaded PyTorch, photographs made up from a seed."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tests.s3 import _proxy as _proxy
from tests.s3 import bucket as bucket
from tests.s3 import faulty as faulty
from tests.s3 import faulty_cluster as faulty_cluster
from tests.s3 import object_store as object_store

ROOT = Path(__file__).resolve().parent.parent

RAY_ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # A process more for each group of workers, which watches for machines that are taken away; ours stay.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray looks at the memory of the whole machine; a neighbour's must not end our workers.
    "RAY_memory_monitor_refresh_ms": "0",
    # As urgent as the tests that wait for them: at Ray's 15, those of a file stand still while another one computes.
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
}


SOAK_S = float(os.environ.get("TMAD_SOAK_S", 0))
"""Seconds that soaks of faults at random moments last; without it no soak is run."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: where several run side by side, short ones fill the end. No soaks unless
    `make soak` asks for them."""
    soaks = [] if SOAK_S else [item for item in items if item.get_closest_marker("soak")]
    for item in soaks:
        item.add_marker(pytest.mark.skip(reason="repeats a shorter test for minutes: make soak"))
    slow = Counter(item.path for item in items if item.get_closest_marker("slow") and item not in soaks)
    items.sort(key=lambda item: -slow[item.path])


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    """Two folders read into memory that differ: say in which files, not in which bytes."""
    if op != "==" or not (isinstance(left, dict) and isinstance(right, dict)):
        return None
    if not all(isinstance(content, bytes) for content in (*left.values(), *right.values())):
        return None
    changed = sorted(name for name in left.keys() & right.keys() if left[name] != right[name])
    said = {"only left": left.keys() - right.keys(), "only right": right.keys() - left.keys(), "differ": changed}
    return ["the same files", *(f"{what}: {sorted(names)}" for what, names in said.items() if names)]


# Triton reads it once, when something imports it, as `torch.compile` does: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A job that is called in this process logs to the stderr of its test, which is closed at the end of that."""
    root = logging.getLogger()
    ours = [root, *map(logging.getLogger, ("tmad", "pipeline", "jobs", "__main__"))]
    before, levels = list(root.handlers), [one.level for one in ours]
    yield
    for handler in [one for one in root.handlers if type(one) is logging.StreamHandler and one not in before]:
        root.removeHandler(handler)
    for logger, level in zip(ours, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray cluster of this machine with four logical CPUs, whatever the machine has, started once a session."""
    import ray

    from pipeline.runs.cluster import start_local

    # Socket names are limited to some 100 characters, so the folder has to lie high up.
    with tempfile.TemporaryDirectory(prefix="tm", ignore_cleanup_errors=True) as folder:
        # Workers keep the environment of this moment; an object store that starts later is named in this file.
        environment = {**RAY_ENVIRONMENT, "AWS_CONFIG_FILE": f"{folder}/aws-config"}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        start_local(
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            logging_level="warning",
            _temp_dir=folder,
        )
        yield
        ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def make_photo(seed: int, height: int = 256, width: int = 256) -> np.ndarray:
    """A photo-like picture (height, width, 3), uint8: smooth light, textured ground, a few objects with edges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    light = rng.uniform(60, 200, 3) + 70 * (y[..., None] * rng.normal(size=3) + x[..., None] * rng.normal(size=3))
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(15, 45)
    stripes = np.sin(2 * np.pi * frequency * (np.cos(angle) * x + np.sin(angle) * y))
    picture = light + 18 * stripes[..., None] + rng.normal(0, 5, (height, width, 1))
    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        left, top = int(rng.integers(width)), int(rng.integers(height))
        right, bottom = left + int(rng.integers(8, 9 + width // 3)), top + int(rng.integers(8, 9 + height // 3))
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((left, top, right, bottom), fill=colour)
    return np.asarray(image)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seeded photographs in two folders, JPEG and PNG, 256 x 256 and larger; not to be written to."""
    folder = tmp_path_factory.mktemp("photos")
    sizes = [(256, 256), (300, 420), (288, 256), (256, 352)]
    for number in range(12):
        kind = "png" if number % 4 == 3 else "jpg"
        path = folder / ("town" if number % 2 else "sea") / f"{number:02d}.{kind}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(make_photo(number, *sizes[number % 4])).save(path, quality=92)
    return folder
