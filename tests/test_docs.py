"""The documents say what is: links, commands, generated pages, the list of errors, the names of metrics."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from infra.stack_demo import RESULTS
from pipeline import errors
from pipeline.data.schema import MANIFEST_NAME
from pipeline.inpaint.ledger import LEDGER
from tests.conftest import make_photo
from tmad.builtin import builtin_model

ROOT = Path(__file__).resolve().parent.parent


def script(path: str) -> Any:
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = script("docs/check.py")
generate = script("docs/reference/generate.py")
dashboard = script("infra/observability/dashboard.py")


def test_the_generated_pages_are_those_of_the_code() -> None:
    stale = [path.name for path, text in generate.pages().items() if not path.exists() or path.read_text() != text]
    assert stale == [], "run `make docs`"


def test_every_job_stands_on_the_page() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py") if not path.stem.startswith("__")}
    assert generate.JOBS.keys() == jobs, "add its configuration to JOBS in docs/reference/generate.py"


def test_every_setting_has_a_meaning_and_stands_on_the_page() -> None:
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    for job, kind in generate.JOBS.items():
        for name, _, _, meaning in generate.settings(kind):
            assert meaning, f"{job}: {name} has no docstring"
            assert f"| `{generate.option(name)}` |" in page


def test_every_variable_of_ours_stands_on_the_page() -> None:
    sources = [path.read_text() for part in ("tmad", "pipeline", "infra") for path in (ROOT / part).rglob("*.py")]
    named = {name for text in sources for name in re.findall(r'"(TMAD_[A-Z_]+)"', text)}
    assert named <= generate.VARIABLES.keys()
    assert "TMAD_LOG" in named


def test_links_and_commands_of_all_documents_are_right() -> None:
    assert list(check.broken_links()) == []
    assert list(check.refused_commands()) == []
    assert len(list(check.job_commands())) > 30


def test_those_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.md"
    wrong.write_text(
        "# One heading\n[a](nowhere.md) [b](#one-heading) [c](#another)\n\n"
        "    python jobs/prepare.py --source a --out b --crop-sise 64\n    python jobs/prepare.py --source a --out b\n"
    )
    monkeypatch.setattr(check, "DOCUMENTS", [wrong])
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert list(check.broken_links()) == ["wrong.md: nowhere.md", "wrong.md: #another: no such heading"]
    [refused] = check.refused_commands()
    assert "--crop-sise" in refused


def test_what_the_stacks_demo_looks_for_is_what_the_jobs_write() -> None:
    assert f"filled/{LEDGER}" in RESULTS
    assert f"train/{MANIFEST_NAME}" in RESULTS


def test_the_slow_tests_that_have_a_reason_are_tests() -> None:
    named = re.findall(r"\| `([\w/.]+)`: `(test_\w+)` \|", (ROOT / "docs" / "tests.md").read_text())
    assert len(named) > 20
    assert [(file, name) for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()] == []


def test_every_set_that_the_documents_validate_on_is_prepared_as_one() -> None:
    """Without `--split val` it is another set, which `evaluate --against` does not take for the same."""
    texts = [
        path.read_text() for path in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", *(ROOT / "jobs").glob("*.py"))
    ]
    commands = [
        " ".join(match.split())
        for text in texts
        for match in re.findall(r"jobs/prepare\.py(?:.*\\\n)*.*", text)
        if re.search(r"--out \S*\bval\b", match)
    ]
    assert len(commands) >= 4
    assert [command for command in commands if "--split val" not in command] == []


@pytest.mark.parametrize(
    ("document", "made"), [("README.md", "filled.png"), ("docs/inpaint.md", "")], ids=["README", "inpaint"]
)
def test_the_python_examples_run_as_they_stand(
    document: str, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, mask = make_photo(0, 64, 64), np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    Image.fromarray(image).save(tmp_path / "photo.jpg")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(builtin_model())
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)
    names = {"image": image, "mask": mask}
    exec(compile(example, document, "exec"), names)
    filled = np.asarray(Image.open(made)) if made else names["filled"]
    before = np.asarray(Image.open("photo.jpg")) if made else image
    assert np.array_equal(filled[mask == 0], before[mask == 0])
    assert not np.array_equal(filled[mask > 0], before[mask > 0])


def test_the_quickstart_has_every_job_in_what_is_run() -> None:
    run = check.runnable(ROOT / "docs" / "quickstart.md")
    assert re.findall(r"^python jobs/(\w+)\.py", run, re.M) == [
        *("prepare", "prepare", "train_places", "train_places", "evaluate", "inpaint")
    ]


def test_every_kind_of_error_has_its_place_in_troubleshooting() -> None:
    kinds = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.TMADError) and kind is not errors.TMADError
    }
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert set(re.findall(r"^### (\w+)$", page, re.M)) == kinds


def test_the_tests_that_hold_each_fault_exist() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    entries = {int(number): line for number, line in re.findall(r"^\| (\d+) \|(.*)$", page, re.M)}
    assert list(entries) == list(range(1, 36))
    held = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert all("::test_" in line for line in entries.values())
    assert [one for one in held if not re.search(rf"^def {one[1]}\(", (ROOT / one[0]).read_text(), re.M)] == []


def test_the_dashboard_is_written_by_its_script_and_shows_metrics_that_are_exported() -> None:
    assert dashboard.FILE.read_text() == dashboard.text()
    sources = [path.read_text() for part in ("tmad", "pipeline") for path in (ROOT / part).rglob("*.py")]
    groups = {group for text in sources for group in re.findall(r'["{](\w+)/[\w{]', text)} | {
        "training",
        "events_total",
    }
    groups |= {group for text in sources for group in re.findall(r'exported_as=\(.*, "(\w+)"\)', text)}
    shown = set(re.findall(r"ray_tmad_(\w+)", json.dumps(dashboard.dashboard())))
    assert shown <= groups
    told = set(re.findall(r"ray_tmad_(\w+)", (ROOT / "docs" / "operate.md").read_text()))
    assert shown - {"data"} <= told


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda path: path.stem)
def test_pictures_are_well_formed_say_what_they_show_and_fetch_nothing(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert root.get("aria-label")
    assert root.get("viewBox")
    assert not re.search(r"(?:href|src|url)\s*[=(]\s*[\"']?(?!#)", path.read_text().replace("xmlns", ""))
