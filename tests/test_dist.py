"""What is published: the wheel has what it should and works without a checkout; the source archive makes the same."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from infra.dist import DistFailed, attempt, check_content, main

TRACKED = ["Makefile", "jobs/demo.py", "pipeline/service/page/index.html", "tmad/py.typed"]


@pytest.mark.slow
def test_what_is_built_works_where_nothing_of_the_checkout_can_be_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["--out", str(tmp_path)])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gz", ".whl"]
    assert "tried in" in said.out


def test_an_environment_that_sees_the_checkout_is_not_taken_for_an_installation(tmp_path: Path) -> None:
    with pytest.raises(DistFailed, match="is not the installed one"):
        attempt(Path(sys.executable).parent, tmp_path / "tmad-0.1.0-py3-none-any.whl", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tmad_jobs/pipeline/service/page/index.html": False}, r"lacks \['tmad_jobs/pipeline/service/page/index"),
        ({"tmad/notes.txt": True}, r"has \['tmad/notes.txt'\] besides"),
        ({"jobs/demo.py": True}, r"has \['jobs/demo.py'\] besides"),
        ({}, None),
    ],
    ids=["without the page", "with a file that is not tracked", "with a name of its user", "whole"],
)
def test_a_wheel_has_the_tracked_files_of_the_packages_and_nothing_else(
    tmp_path: Path, change: dict[str, bool], said: str | None
) -> None:
    names = {"tmad_jobs/jobs/demo.py", "tmad_jobs/pipeline/service/page/index.html", "tmad/py.typed"}
    names = (names | {name for name, more in change.items() if more}) - {name for name in change if not change[name]}
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for name in (*names, "tmad-0.1.0.dist-info/METADATA"):
            packed.writestr(name, "")
    if said is None:
        check_content(wheel, TRACKED)
    else:
        with pytest.raises(DistFailed, match=said):
            check_content(wheel, TRACKED)
