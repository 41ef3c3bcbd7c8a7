"""The notebooks run from top to bottom, in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"pictures": 2, "images": 4, "size": 128}
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)  # on a busy machine; half a minute on a quiet one
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_it_is_but_for_its_parameters(
    path: Path, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
            if cell["metadata"].get("tags") == ["parameters"]:
                assert names.keys() >= SMALL.keys()
                names |= SMALL
    before, hole = np.asarray(names["photograph"]), names["hole"] > 0
    for filled in map(np.asarray, (names["filled"], names["compared"])):
        assert np.array_equal(filled[~hole], before[~hole])
        assert not np.array_equal(filled[hole], before[hole])
    assert not np.array_equal(names["filled"], names["compared"])
    assert names["measured"].summary["images"] == SMALL["pictures"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    assert [cell["outputs"] for cell in cells if cell.get("outputs")] == []
    assert 8 <= len(cells) <= 14
