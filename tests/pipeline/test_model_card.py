"""The page beside a trained model: what it prints works, wherever the run lies."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import storage
from pipeline.data.schema import read_manifest
from pipeline.models.card import model_card
from pipeline.presets import smoke
from tests.pipeline.conftest import SetMaker
from tests.tmad.tiny import make_image, make_mask


@pytest.mark.parametrize("where", ["here", "s3"])
def test_the_code_on_the_card_fills_a_hole(
    where: str, request: pytest.FixtureRequest, model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    runs = str(tmp_path / "runs") if where == "here" else f"{request.getfixturevalue('bucket')}/runs"
    storage.upload_folder(model_folder, f"{runs}/first/model")
    manifest = read_manifest(make_set())
    summary = {"validation": {}, "images": 8, "bad_steps": 0, "rollbacks": 0, "stopped": None}
    card = model_card(
        replace(smoke(), name="first", runs=runs),
        summary,
        name="tmad",
        model_digest="0123456789abcdef",
        sets={"train": manifest, "val": manifest},
        code={"commit": None, "dirty": None},
    )
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    image, mask = make_image(0), make_mask()
    names: dict[str, Any] = {"image": image, "mask": mask}
    exec(code, names)
    assert names["filled"].shape == image.shape
    assert np.array_equal(names["filled"][mask == 0], image[mask == 0])
