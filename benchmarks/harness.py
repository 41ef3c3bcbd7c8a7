"""What the benchmarks share: interleaved timing, tensor memory, the machine's description, dated reports.

Protocol: all variants run in one process on one thread, one call of each in turn, the order rotating from round to
round; a figure is the median over the rounds, a ratio the median of the ratios within each round. What disturbs the
machine for a while then disturbs all sides alike.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from torch.nn import functional as F

from pipeline.train.footprint import peak_bytes as peak_bytes

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "benchmarks" / "reports"
QUICK_REPORTS = ROOT / "runs" / "benchmarks"

MIN_SAMPLE_S = 0.05
"""A sample repeats its call until it should take this long, so that the clock's own cost vanishes."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""

OptionsT = TypeVar("OptionsT", bound="Options")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every benchmark can be told."""

    quick: bool = False
    """Seconds instead of minutes: tiny sizes, two rounds. Shows that the script runs; its times mean nothing."""
    rounds: int = 5
    """Timed calls of each variant; at least 5 for a figure that is quoted."""
    limit_s: float = 120.0
    """Seconds after which no further round of a table begins; the report says how many rounds there were."""
    threads: int = 1
    """Threads of PyTorch."""
    keep_pages: bool = False
    """Have glibc keep freed pages instead of returning them to the system (mallopt), for all variants alike."""
    out: Path | None = None
    """Folder of the report; default: benchmarks/reports, with --quick runs/benchmarks."""


def start(kind: type[OptionsT], argv: Sequence[str], *, prog: str, description: str) -> OptionsT:
    """Read the command line and set the process up as it says: threads, allocator."""
    options = tyro.cli(kind, args=list(argv), prog=prog, description=description)
    if options.rounds < 1 or options.threads < 1:
        raise SystemExit("--rounds and --threads must be at least 1")
    if options.quick:
        options = dataclasses.replace(options, rounds=min(options.rounds, 2))
    torch.set_num_threads(options.threads)
    if options.keep_pages:
        keep_freed_pages()
    return options


def keep_freed_pages() -> None:
    """Tell glibc to reuse freed pages: fresh pages are the slowest thing on a CPU host. Raises `OSError` elsewhere."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError) as error:
        raise OSError("--keep-pages needs glibc's mallopt") from error
    if not (mallopt(M_MMAP_THRESHOLD, 1 << 30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        raise OSError("--keep-pages: mallopt refused the thresholds")


@dataclass(frozen=True)
class Timing:
    """Samples of one variant, in the order of the rounds."""

    wall_s: list[float]
    """Seconds of one call."""
    cpu_s: list[float]
    """Processor seconds of one call; well below the wall's where others held the machine."""

    @property
    def median_s(self) -> float:
        """The figure that is quoted."""
        return statistics.median(self.wall_s)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (max(self.wall_s) - min(self.wall_s)) / self.median_s

    def times(self, other: Timing) -> float:
        """How many times *other*'s time this one takes: median of the ratios within each round."""
        return statistics.median(a / b for a, b in zip(self.wall_s, other.wall_s, strict=True))


def interleave(calls: Mapping[str, Callable[[], object]], options: Options, *, warm: bool = False) -> dict[str, Timing]:
    """Time every variant in turn, round after round, after one call of each to warm up and to see how long it takes.

    *warm*: each was called before and takes long: no call but the timed ones, one a sample. So it is with `--quick`.
    """
    repeats = {name: 1 if warm or options.quick else _repeats(call) for name, call in calls.items()}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.freeze()  # what is there already need not be looked through again before every sample
    began = time.perf_counter()
    for number in range(options.rounds):
        if number and time.perf_counter() - began > options.limit_s:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(repeats[name]):
                calls[name]()
            wall[name].append((time.perf_counter() - wall_start) / repeats[name])
            cpu[name].append((time.process_time() - cpu_start) / repeats[name])
    gc.unfreeze()
    return {name: Timing(wall[name], cpu[name]) for name in names}


def _repeats(call: Callable[[], object]) -> int:
    begin = time.perf_counter()
    call()
    return max(1, math.ceil(MIN_SAMPLE_S / max(time.perf_counter() - begin, 1e-6)))


def convolution_limit() -> float:
    """What this machine reaches in the best case, GFLOP/s: conv3x3, 128 channels, 64x64, channels-last, float32."""
    channels, side = 128, 64
    x = torch.rand(1, channels, side, side).to(memory_format=torch.channels_last)
    weight = torch.rand(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    flop = 2 * channels * channels * 9 * side * side
    with torch.inference_mode():
        timing = interleave({"conv": lambda: F.conv2d(x, weight, padding=1)}, Options(rounds=7))
    return flop / min(timing["conv"].wall_s) / 1e9


@dataclass(frozen=True)
class Table:
    """One table of a report."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """First column to the left, the others to the right."""
        lines = [f"## {self.title}", ""]
        lines += [_row(self.header), "|---|" + "---:|" * (len(self.header) - 1), *map(_row, self.rows)]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


@dataclass
class Report:
    """A dated page and the figures behind it. Make it before measuring: it notes the commit and the machine's load."""

    name: str
    title: str
    options: Options
    script: str = ""
    """That wrote it, if it is not called like the report."""
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """JSON-serialisable: every sample of every variant, and whatever else was measured."""
    timings: list[Timing] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from pipeline.tracking.environment import environment

        self.environment = environment(
            cpu=cpu_model(),
            cpus_allowed=len(os.sched_getaffinity(0)),
            cpu_capability=torch.backends.cpu.get_cpu_capability(),
            threads=torch.get_num_threads(),
            load_at_start=round(os.getloadavg()[0], 2),
        )

    def add(self, table: Table, figures: Mapping[str, Any], timings: Mapping[str, Timing]) -> None:
        """One more table, with its figures and samples."""
        self.tables.append(table)
        samples = {name: dataclasses.asdict(timing) for name, timing in timings.items()}
        self.figures[table.title] = {**figures, "samples": samples}
        self.timings += timings.values()
        print(table.markdown(), flush=True)

    def write(self) -> Path:
        """Write `YYYY-MM-DD-<name>.md` and `.json`, replacing those of the same day; returns the page's path."""
        folder = self.options.out or (QUICK_REPORTS if self.options.quick else REPORTS)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{date.today().isoformat()}-{self.name}" + ("-quick" if self.options.quick else "")
        page = folder / f"{stem}.md"
        page.write_text(self.markdown(), encoding="utf-8")
        content = {"environment": self.environment, "options": self._settings(), "figures": self.figures}
        page.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"report: {page}")
        return page

    def markdown(self) -> str:
        """The whole page."""
        tables = "\n".join(table.markdown() for table in self.tables)
        return f"# {self.title}\n\n{self._head()}\n\n{tables}"

    def _head(self) -> str:
        env, settings = self.environment, self._settings()
        code, packages = env["code"], env["packages"]
        dirty = " with local changes" if code["dirty"] else ""
        wall, cpu = (sum(sum(getattr(one, kind)) for one in self.timings) for kind in ("wall_s", "cpu_s"))
        counts = sorted({len(one.wall_s) for one in self.timings})
        lines = {
            "Date": date.today().isoformat(),
            "Command": " ".join([f"python benchmarks/{self.script or self.name}.py", *_as_flags(self.options)]),
            "Commit": f"{code['commit'] or 'unknown'}{dirty}",
            "Processor": f"{env['cpu']}, {env['cpus_allowed']} logical cores, {env['cpu_capability']}",
            "Versions": f"torch {packages['torch']}, numpy {packages['numpy']}, Python {env['python']}",
            "System": env["platform"],
            "Threads": f"{env['threads']}; freed pages {'kept' if settings['keep_pages'] else 'left to glibc'}",
        }
        if cpu:
            lines["Rounds"] = " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))
            lines["Contention"] = f"wall / processor time {wall / cpu:.2f}, load at start {env['load_at_start']}"
        head = "\n".join(f"- **{name}:** {value}" for name, value in lines.items())
        if self.options.quick:
            head += "\n\nA quick run: sizes are tiny and times mean nothing."
        return head

    def _settings(self) -> dict[str, Any]:
        values = {item.name: getattr(self.options, item.name) for item in dataclasses.fields(self.options)}
        values.pop("out")
        return values


def _as_flags(options: Options) -> list[str]:
    """The options that differ from their defaults, as they stand on a command line; `--out` is nobody's business."""
    flags: list[str] = []
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if item.name == "out" or value == item.default or (options.quick and item.name == "rounds"):
            continue
        flag = "--" + item.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flags


def cpu_model() -> str:
    """The processor's name, as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown processor"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def ms(seconds: float) -> str:
    """Seconds as milliseconds with three digits."""
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def mb(count: float) -> str:
    """Bytes as MB of 10^6 with three digits."""
    value = count / 1e6
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
