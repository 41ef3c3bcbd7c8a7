"""The repository keeps its own promises: direction of imports, documentation, README, pins, portability."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tmad.metrics import METRICS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("tmad", "pipeline", "jobs")
FORBIDDEN_IN_TMAD = ("ray", "mlflow", "fsspec", "pyarrow", "pipeline", "jobs")
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if not path.stem.startswith("__"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def loaded_by(code: str) -> set[str]:
    """Which forbidden packages a fresh interpreter has loaded after *code*."""
    report = f"import sys\n{code}\nprint(*(name for name in {FORBIDDEN_IN_TMAD} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def imported_packages(source: str) -> set[str]:
    """Top-level packages that *source* imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def undocumented(source: str) -> Iterator[str]:
    """Public functions, classes and methods of *source* without a docstring.

    A method that another class of the file documents under the same name (its protocol) needs none of its own, nor do
    the two halves of an autograd function, which their class documents.
    """
    tree = ast.parse(source)
    if ast.get_docstring(tree) is None:
        yield "(module)"
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    explained = {
        method.name: owner.name
        for owner in classes
        for method in owner.body
        if isinstance(method, ast.FunctionDef) and ast.get_docstring(method)
    }

    def visit(body: list[ast.stmt], owner: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name[0] == "_":
                continue
            elsewhere = owner and explained.get(node.name, owner) != owner
            static = any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in node.decorator_list)
            half = static and node.name in ("forward", "backward")
            if ast.get_docstring(node) is None and not elsewhere and not half:
                yield f"{owner}.{node.name}".lstrip(".")
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, node.name)

    yield from visit(tree.body, "")


def tracked_files() -> list[Path]:
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def make_targets() -> dict[str, list[str]]:
    """Target -> prerequisites, comments left out."""
    found = re.findall(r"^([a-z-]+):([^#\n=]*)", (ROOT / "Makefile").read_text(), re.M)
    return {name: needs.split() for name, needs in found}


def test_importing_all_of_tmad_loads_neither_ray_nor_mlflow_nor_fsspec_nor_pyarrow() -> None:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules("tmad")]
    assert loaded_by("\n".join(f"import {name.removesuffix('.__init__')}" for name in names)) == set()


def test_the_check_of_loaded_packages_can_fail() -> None:
    assert loaded_by("import fsspec") == {"fsspec"}


def test_no_module_of_tmad_names_a_package_that_it_must_not_import() -> None:
    wrong = {
        path.name: found
        for path in modules("tmad")
        if (found := imported_packages(path.read_text()) & {*FORBIDDEN_IN_TMAD})
    }
    assert wrong == {}


def test_pipeline_imports_no_job() -> None:
    assert [path.name for path in modules("pipeline") if "jobs" in imported_packages(path.read_text())] == []


def test_the_check_of_named_packages_sees_imports_inside_functions() -> None:
    assert imported_packages("def f():\n    from ray.data import x\n    import mlflow.pyfunc") == {"ray", "mlflow"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package: str) -> None:
    missing = {str(path.relative_to(ROOT)): list(undocumented(path.read_text())) for path in modules(package)}
    assert {name: found for name, found in missing.items() if found} == {}


def test_the_check_of_docstrings_can_fail() -> None:
    source = (
        '"""A module."""\nclass A:\n    """One."""\n    def method(self): ...\ndef function(): ...\ndef _own(): ...'
    )
    assert list(undocumented(source)) == ["A.method", "function"]


def test_the_readme_is_read_in_minutes() -> None:
    assert len(README.encode()) <= 8_000


def test_the_architecture_page_names_every_folder_of_the_packages() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    folders = {path.parent.relative_to(ROOT).as_posix() for package in PACKAGES for path in modules(package)}
    assert sorted(folder for folder in folders if f"`{folder}/`" not in page) == []


def test_the_readme_table_lists_exactly_the_jobs() -> None:
    assert sorted(re.findall(r"^\| `jobs/(\w+)\.py` \|", README, re.M)) == JOBS


@pytest.mark.parametrize("name", JOBS)
def test_every_job_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    job = importlib.import_module(f"jobs.{name}")
    with pytest.raises(SystemExit) as end:
        job.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"python jobs/{name}.py" in text, "the help shows an example"


def test_a_job_runs_as_a_script_from_another_folder_and_explains_itself_without_what_takes_seconds_to_import(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "jobs" / "train_places.py"), "--help"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--preset" in run.stdout
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}
    assert "pipeline.config" in imported
    assert imported.isdisjoint({"torch", "ray", "mlflow", "pandas"})


def test_continuous_integration_runs_make_check_and_that_includes_make_test() -> None:
    assert re.search(r"^exec make check$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert "test" in make_targets()["check"]


def test_the_make_targets_that_the_documents_name_exist() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = {name for path in documents for name in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", path.read_text(), re.M)}
    assert named <= make_targets().keys()
    assert {"demo", "test"} <= named


def test_every_link_between_the_documents_leads_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in documents
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []


def test_the_index_of_measures_says_what_the_code_says() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = [
        f"| `{name}` | {entry.unit or '1'} | {entry.better} | {entry.formula.replace('|', chr(92) + '|')} |"
        for name, entry in METRICS.items()
    ]
    assert re.findall(r"^\| `.*$", text, re.M) == rows


def test_no_tracked_file_names_a_path_of_somebodys_machine() -> None:
    pattern = re.compile(r"(?:^|[^\w.-])/(?:work|farm|root|home|Users|opt/wheels|tmp/probe)/")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {line.strip()}" for line in text.splitlines() if pattern.search(line)]
    assert found == []


def test_the_constraints_pin_every_dependency_to_a_version_that_pyproject_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    asked = [one for one in map(Requirement, listed) if one.name != project["name"]]
    lines = [
        line for line in (ROOT / "infra" / "constraints.txt").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    loose = [
        str(one)
        for one in asked
        if not one.specifier.contains(pins.get(canonicalize_name(one.name), "0"), prereleases=True)
    ]
    assert loose == []


def test_the_pin_of_torch_names_no_build_so_that_cpu_and_gpu_machines_can_share_it() -> None:
    assert re.search(r"^torch==[\d.]+$", (ROOT / "infra" / "constraints.txt").read_text(), re.M)
