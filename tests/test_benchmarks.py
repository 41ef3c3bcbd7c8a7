"""The benchmarks run, agree with themselves and leave a report; no test looks at a time."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import data, gpu, harness, inference, training_step
from benchmarks.harness import Options, Report, Table, Timing
from tmad.config import LossConfig

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"training_step": training_step, "inference": inference}
MB = 10**6


@pytest.fixture(scope="session")
def quick_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, Any]]]:
    """Page and figures of every script's quick run."""
    found = {}
    for name, script in SCRIPTS.items():
        folder = tmp_path_factory.mktemp(name)
        assert script.main(["--quick", "--out", str(folder)]) == 0
        page, figures = sorted(folder.iterdir(), key=lambda path: path.suffix, reverse=True)
        assert page.name.endswith(f"-{name}-quick.md")
        found[name] = page.read_text(encoding="utf-8"), json.loads(figures.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_quick_run_reports_where_it_ran_and_every_sample(name: str, quick_runs: dict[str, Any]) -> None:
    page, content = quick_runs[name]
    for part in ("Commit:", "Processor:", "Versions:", f"torch {torch.__version__}", "times mean nothing"):
        assert part in page
    assert f"- **Command:** python benchmarks/{name}.py --quick\n" in page
    assert content["environment"]["threads"] == 1
    assert content["figures"]
    for title, figures in content["figures"].items():
        assert f"## {title}\n" in page
        assert figures["samples"]
        assert all(len(timing["wall_s"]) == 2 for timing in figures["samples"].values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        SCRIPTS[name].main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"python benchmarks/{name}.py" in text
    assert "--keep-pages" in text


def test_a_benchmark_runs_as_a_script_from_another_folder(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "inference.py"
    run = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_training_report_has_both_phases_at_each_batch_and_the_parts_left_out(quick_runs: dict[str, Any]) -> None:
    whole, parts = quick_runs["training_step"][1]["figures"].values()
    steps = whole["peak_bytes"]
    assert set(steps) == {f"{phase} step, batch {images}" for phase in ("coarse", "joint") for images in (1, 2)}
    assert steps["joint step, batch 2"] > steps["coarse step, batch 2"] > steps["coarse step, batch 1"] > 0
    assert set(parts["samples"]) == {training_step.JOINT, *training_step.without_parts(LossConfig())}
    assert parts["peak_bytes"]["without VGG-19"] < parts["peak_bytes"][training_step.JOINT]


def test_chunks_give_the_image_that_all_cells_at_once_give(quick_runs: dict[str, Any]) -> None:
    (holes,) = quick_runs["inference"][1]["figures"].values()
    assert holes["values_apart"] == 0


def test_peak_counts_what_is_held_at_once_and_not_what_was_released() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.empty(MB // 4)

    def together() -> list[torch.Tensor]:
        return [torch.empty(MB // 4) for _ in range(3)]

    assert harness.peak_bytes(one_after_the_other) == MB
    assert harness.peak_bytes(together) == 3 * MB


def test_variants_take_turns_in_an_order_that_rotates() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = harness.interleave(calls, Options(rounds=3), warm=True)
    assert "".join(order) == "abc" + "bca" + "cab"
    assert [len(timing.wall_s) for timing in timings.values()] == [3, 3, 3]
    assert gc.get_freeze_count() == 0, "the collector is back to normal"


def test_no_round_begins_after_the_limit_but_the_first_always_runs() -> None:
    timings = harness.interleave({"a": lambda: None}, Options(rounds=50, limit_s=0))
    assert len(timings["a"].wall_s) == 1


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    disturbed, other = Timing([1.0, 30.0, 1.0], [1.0] * 3), Timing([2.0, 60.0, 2.2], [2.0] * 3)
    assert other.times(disturbed) == 2.0
    assert disturbed.median_s == 1.0


def test_a_report_names_the_options_that_differ_from_their_defaults_but_no_folder(tmp_path: Path) -> None:
    options = inference.InferenceOptions(chunks=(2, 3), keep_pages=True, out=tmp_path)
    report = Report("inference", "Title", options)
    report.add(Table("One", ["what", "ms"], [["a", "1"]]), {}, {"a": Timing([1.0], [0.5])})
    page = report.write()
    text = page.read_text(encoding="utf-8")
    assert "python benchmarks/inference.py --keep-pages --chunks 2 3\n" in text
    assert "freed pages kept" in text
    assert "wall / processor time 2.00" in text
    assert str(tmp_path) not in text + page.with_suffix(".json").read_text(encoding="utf-8")


@pytest.mark.ray
def test_the_data_plane_is_measured_from_every_source_and_beside_both_rivals(ray_session, tmp_path: Path) -> None:
    assert data.main(["--quick", "--out", str(tmp_path)]) == 0
    (figures,) = tmp_path.glob("*-data-quick.json")
    found = json.loads(figures.read_text(encoding="utf-8"))["figures"]
    forms = {title.split(",")[0]: set(table["samples"]) for title, table in found.items()}
    assert forms["Preparation"] == {data.BARE, data.OWN, "tree", "tar", "Parquet"}
    assert forms["Training input"] == {data.BARE, data.OWN, "training input", "from photographs", "DataLoader"}
    # Bits of a mask and two int16 a window, compressed: far below the 307,200 bytes of the pool's pixels.
    sizes = found["On disk"]["4"]
    assert 4 * 200 < (sizes["shards"] - sizes["crops"]) / sizes["records"] < 4 * 2000


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_quick_run_of_the_inpainting_job_fills_the_same_on_both_sides(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "batch_inpaint.py"
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (figures,) = tmp_path.glob("*-batch_inpaint-quick.json")
    found = json.loads(figures.read_text(encoding="utf-8"))["figures"]
    samples = found["The job beside a bare loop"]["samples_rate_first_whole"]
    assert samples.keys() == {"bare loop", "Ray job"}
    assert all(
        value["peak_bytes"] >= value["before_bytes"] for value in list(found["Memory of one file"].values())[:-1]
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_quick_run_of_the_training_job_compares_both_sides_on_one_and_two_workers(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "training_job.py"
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (figures,) = tmp_path.glob("*-training_job-quick.json")
    found = json.loads(figures.read_text(encoding="utf-8"))["figures"]
    runs = found["Training, smallest networks"]["runs"]
    assert runs.keys() == {f"{side}, {count}" for side in ("job", "plain loop") for count in ("1 worker", "2 workers")}
    assert all(run["images_per_s"] > 0 and run["start_s"] > 0 for some in runs.values() for run in some)
    checkpoint = found["A checkpoint, smallest networks"]
    assert checkpoint["bytes"] > 0
    assert min(checkpoint["seconds"]) > 0


@pytest.mark.slow
def test_the_gpu_benchmark_measures_every_row_and_goes_on_when_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(machine: gpu.Machine) -> gpu.Row:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(gpu, "launches", broken)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--limit-s", "1000"]) == 1
    page, figures = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    rows = json.loads(figures.read_text())["rows"]
    failed = {row["what"]: row["note"] for row in rows if row["failed"]}
    assert failed == {"launches in a joint step, batch 4": "failed: RuntimeError: broken on purpose"}
    for row in rows:
        assert f"| {row['what']} | " in page.read_text()
        assert row["failed"] or row["figures"]
    with_floors = [row["what"] for row in rows if row["floor"]]
    for part in ("CARAFE forward", "CARAFE backward", "coarse step", "joint step", "one picture", "pictures of 512"):
        assert any(what.startswith(part) for what in with_floors), part
    behind = ["first step after start, empty cache", "joint step, batch 64, compiled"]
    behind += ["first compiled step after start, kept cache"]
    assert [row["what"] for row in rows[-3:]] == behind, "what stands behind the broken row was measured"
    goals = {row["goal"] for row in rows}
    assert goals >= {"50 %", "2,500/s", "400/s", "350/s", "150/s", "1,000/s", "20 s", "2 GB"}


@pytest.mark.slow
def test_the_gpu_benchmark_needs_no_ray_no_pydantic_and_nothing_of_pipeline() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['ray', 'pydantic', 'simplejpeg', 'mlflow', 'pipeline'])\n"
        "from benchmarks import gpu\n"
        "machine = gpu.Machine(gpu.torch.device('cpu'), True, True, 1e9, 1e9)\n"
        "print(gpu.pictures(machine, 1, 'fp32', '').measured, gpu.step_row(machine, 'joint', 4, 4, 1, '').measured)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("/s") == 2
