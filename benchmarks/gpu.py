"""What a GPU makes of T-MAD: correctness first, then each speed beside the floor that the same card allows.

It needs PyTorch 2.11 or newer with its Triton, numpy, Pillow and safetensors, and of this project `tmad/` and
`benchmarks/` alone: no Ray, no network. pydantic and simplejpeg are used where they are and not missed where they are
not, as on machines of others: the settings are written below, and no JPEG is decoded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

# Where these are not installed: plain dataclasses, which check nothing, and no decoder of JPEG.
if find_spec("simplejpeg") is None:
    sys.modules["simplejpeg"] = ModuleType("simplejpeg")
if find_spec("pydantic") is None:
    _PACKAGE: Any = ModuleType("pydantic")
    _PACKAGE.ConfigDict, _PACKAGE.TypeAdapter = dict, None
    _PACKAGE.Field = _PACKAGE.AfterValidator = lambda *_, **limits: limits
    _PACKAGE.dataclasses = ModuleType("pydantic.dataclasses")
    _PACKAGE.dataclasses.dataclass = lambda *, config, **options: dataclass(**options)
    sys.modules |= {"pydantic": _PACKAGE, "pydantic.dataclasses": _PACKAGE.dataclasses}
if not torch.cuda.is_available():
    # CARAFE's kernels are interpreted; Triton asks when something imports it, as the modules below do.
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scenes import centred_hole, picture, training_batch
from tmad.carafe import reassemble, upsample
from tmad.config import (
    CoarseConfig,
    DiscriminatorsConfig,
    LossConfig,
    MemoryConfig,
    PSNetConfig,
    TMADConfig,
    TrainingConfig,
)
from tmad.inpaint import Inpainter, Precision
from tmad.model import TMAD
from tmad.perceptual import untrained_vgg19
from tmad.step import Phase, TrainingState

DESCRIPTION = """
Checks T-MAD on this machine's GPU and measures it: CARAFE, steps of both phases, pictures. Four minutes at most.
Weights are random: time does not depend on them.

Examples:
  python benchmarks/gpu.py
  python benchmarks/gpu.py --small      # tiny, in a minute, as on a CPU: shows that it runs, its times mean nothing
"""

ROOT = Path(__file__).resolve().parent.parent
KERNEL = 5
CELLS = 25
"""Cells synthesized in each image, a square of five by five."""
SAMPLES = 7
STEPS: tuple[tuple[str, Phase, int, int, int, str], ...] = (
    ("coarse step, batch 64", "coarse", 64, CELLS, 1, "2,500/s"),
    ("joint step, batch 64", "joint", 64, CELLS, 1, "400/s"),
    ("joint step, batch 16", "joint", 16, CELLS, 1, "2 GB"),
    ("joint step as `paper` is set", "joint", 4, 64, 1, ""),
    ("joint step as `places` is set", "joint", 32, 64, 4, "350/s"),
)
"""Name, phase, images, cells of each image, steps from one gradient penalty to the next, and what is to be reached."""
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "hipLaunchKernel", "hipExtModuleLaunchKernel")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str = ""
    measured: str = ""
    floor: str = ""
    """The best that the bandwidth or the matrix rate measured here allows."""
    share: str = ""
    """How much of that is reached."""
    goal: str = ""
    note: str = ""
    failed: bool = False
    figures: dict[str, float] | None = None
    """The same in SI units."""


@dataclass(frozen=True)
class Machine:
    """Where and how large everything is measured."""

    device: torch.device
    small: bool
    channels_last: bool
    bandwidth: float = math.nan
    """Bytes/s, read and written, of a copy."""
    rate: float = math.nan
    """FLOP/s of a bfloat16 matrix product."""

    @property
    def on_gpu(self) -> bool:
        """There is a GPU to wait for."""
        return self.device.type == "cuda"

    @property
    def side(self) -> int:
        """Pixels of a training image."""
        return 64 if self.small else 256

    def batch(self, images: int) -> int:
        """This many images, or two where only the program is tried."""
        return min(images, 2) if self.small else images

    @property
    def config(self) -> TrainingConfig:
        """The defaults in bfloat16; small: the smallest networks that have every part, in float32 if on a CPU, which
        may have no other arithmetic."""
        config = TrainingConfig(precision="bf16" if self.on_gpu else "fp32")
        if not self.small:
            return config
        model = TMADConfig(
            patch_size=16,
            coarse=CoarseConfig(base_width=4, num_res_blocks=1),
            memory=MemoryConfig(pool_size=6),
            psnet=PSNetConfig(base_width=4, num_res_blocks=1, num_texture_res_blocks=1),
        )
        discriminators = DiscriminatorsConfig(patch_base_width=4, global_base_width=4)
        # VGG-19, most of what is left, has no smaller form; the first check runs it.
        return replace(
            config, model=model, discriminators=discriminators, loss=LossConfig(weight_perceptual=0, weight_style=0)
        )

    def layout(self, tensor: Tensor) -> Tensor:
        """*tensor* with the channels where they are to be."""
        return tensor.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def seconds(self, call: Callable[[], object], *, samples: int = SAMPLES) -> float:
        """Median of *samples* calls, after three that compile and choose algorithms."""
        samples, warm = (1, 0) if self.small else (samples, 3)
        taken = []
        for number in range(warm + samples):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            if number >= warm:
                taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def seconds_each(self, call: Callable[[], object], calls: int) -> float:
        """The same for calls so short that the wait between them would count."""
        calls = 1 if self.small else calls
        return self.seconds(lambda: [call() for _ in range(calls)]) / calls

    def wait(self) -> None:
        """Until the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def peak_bytes(self, call: Callable[[], object]) -> float:
        """Most memory allocated on the GPU during *call*, weights included; nan on a CPU."""
        if not self.on_gpu:
            return math.nan
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device)


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, write page and figures; returns 1 if a check or a row failed."""
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="tiny networks and images, as always on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--channels-first", action="store_true", help="weights and inputs with channels first")
    parser.add_argument(
        "--limit-s", type=float, default=230.0, help="seconds after which no row starts and running processes end"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the report; default: benchmarks/reports, with --small runs/benchmarks"
    )
    parser.add_argument("--alone", choices=list(ALONE), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    machine = Machine(device, options.small or device.type == "cpu", not options.channels_first)
    if options.alone:
        print(json.dumps(ALONE[options.alone](machine)))
        return 0

    rows: list[Row] = []
    began = time.perf_counter()
    folder = options.out or ROOT / ("runs/benchmarks" if machine.small else "benchmarks/reports")
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{date.today().isoformat()}-gpu{'-small' if machine.small else ''}.md"
    if machine.small:
        print("tiny networks and images: this shows that the program runs, its times mean nothing", flush=True)

    def left_s() -> float:
        return max(1.0, options.limit_s - (time.perf_counter() - began))

    def measure(name: str, row: Callable[[], Row]) -> Row:
        """A row, whatever happens; what is known so far is on disk."""
        if time.perf_counter() - began > options.limit_s:
            found = Row(name, note=f"left out: {options.limit_s:.0f} s were over", failed=True)
        else:
            try:
                found = replace(row(), what=name)
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                found = Row(name, note=f"failed: {type(error).__name__}: {lines[0][:160]}", failed=True)
            if machine.on_gpu:
                torch.cuda.empty_cache()
        rows.append(found)
        print(f"{time.perf_counter() - began:5.0f} s  {line(found)}", flush=True)
        write(page, rows, machine, time.perf_counter() - began)
        return found

    measure("fp32 on the device against the CPU", partial(same_as_cpu, machine))
    measure("bf16 and together against fp32 alone", partial(same_together, machine))
    # Triton's interpreter takes the bits of bfloat16 for integers where it multiplies matrices.
    for dtype in (torch.float32, torch.bfloat16) if machine.on_gpu else (torch.float32,):
        measure(f"CARAFE against its plain form, {short(dtype)}", partial(same_carafe, machine, dtype))
    copied = measure("copy", partial(copy_bandwidth, machine)).figures or {}
    product = measure("matrix product, bf16", partial(matrix_rate, machine)).figures or {}
    machine = replace(
        machine,
        bandwidth=copied.get("bytes_per_s", math.nan),
        rate=product.get("flop_per_s", math.nan),
    )
    for channels, side in ((128, 32), (64, 64), (32, 128)):
        for backward in (False, True):
            name = f"CARAFE {'backward' if backward else 'forward'}, bf16, {channels} channels from {side}"
            measure(name, partial(carafe_row, machine, channels, side, backward))
    for name, phase, images, cells, every, goal in STEPS:
        measure(name, partial(step_row, machine, phase, images, cells, every, goal))
    measure("launches in a joint step, batch 4", partial(launches, machine))
    measure("one picture of 512, fp32", partial(pictures, machine, 1, "fp32", "150/s"))
    measure("one picture of 512, bf16", partial(pictures, machine, 1, "bf16", "150/s"))
    measure("pictures of 512 together, bf16", partial(pictures, machine, 64, "bf16", "1,000/s"))
    measure("first step after start, empty cache", lambda: first_step_row(machine, left_s()))
    with tempfile.TemporaryDirectory() as cache:
        measure("joint step, batch 64, compiled", lambda: compiled_row(machine, left_s(), cache))
        measure("first compiled step after start, kept cache", lambda: kept_cache_row(machine, left_s(), cache))
    print(f"\n{markdown(rows, machine, time.perf_counter() - began)}\nreport: {page}")
    return int(any(row.failed for row in rows))


# Is it right?


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Without TF32, which cuDNN takes for float32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def same_as_cpu(machine: Machine) -> Row:
    """Coarse network, one picture and the losses of a joint step, float32, on both."""
    config = replace(machine.config, precision="fp32", loss=LossConfig())
    side = machine.side if machine.small else 128
    batch = training_batch(config.model, side=side, images=1, cells=4)
    vgg = untrained_vgg19(torch.Generator().manual_seed(0))
    image, mask = picture(side, "check"), centred_hole(side, side // 2)
    found: dict[str, list[Any]] = {"coarse": [], "picture": [], "losses": []}
    with _exact_convolutions():
        for device in (torch.device("cpu"), machine.device):
            state = TrainingState(config, device=device, perceptual=vgg)
            small = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
            with torch.inference_mode():
                found["coarse"].append(state.model.predict_coarse(small, small[:, :1].round()).cpu())
            filled = Inpainter(state.model, keep_candidates=False, precision="fp32")(image, mask).output
            found["picture"].append(torch.from_numpy(filled.copy()).int())  # type: ignore[union-attr]
            state.model.train()
            metrics = state.step(batch, "joint", global_batch=1, progress=0.0)
            found["losses"].append({name: float(value) for name, value in metrics.items() if name.startswith("loss/")})
    coarse, levels = _apart(*found["coarse"]), int((found["picture"][0] - found["picture"][1]).abs().max())
    cpu, gpu = found["losses"]
    losses = max(abs(gpu[name] - value) / max(abs(value), 1e-3) for name, value in cpu.items())
    right = coarse < 1e-4 and levels <= 1 and losses < 1e-2
    return Row(
        measured=f"{coarse:.0e}",
        goal="1e-04",
        note=f"picture {levels} grey levels apart, losses {losses:.0e}" + ("" if right else ": WRONG"),
        failed=not right,
        figures={"coarse": coarse, "grey_levels": levels, "losses": losses},
    )


def same_together(machine: Machine) -> Row:
    """Pictures filled in bfloat16 and in company, as a GPU does, against each in float32 and alone; untrained networks,
    one candidate of many alike, so that what is retrieved is no matter of rounding."""
    side, number = (64, 2) if machine.small else (256, 8)
    model = TMAD(machine.config.model).to(machine.device)
    images, masks = [picture(side, index) for index in range(number)], [centred_hole(side, side // 2)] * number
    exact = Inpainter(model, keep_candidates=False, precision="fp32")
    rounded = Inpainter(model, keep_candidates=False, precision="bf16", pixels_at_once=number * side**2)
    pairs = zip(images, masks, rounded.batch(images, masks), strict=True)
    found = [(exact(image, mask).output, together.output) for image, mask, together in pairs]  # type: ignore[union-attr]
    apart = [np.abs(np.int16(alone) - np.int16(together))[masks[0] > 0] for alone, together in found]  # type: ignore[arg-type]
    mean, most = float(np.mean(apart)), int(np.max(apart))
    return Row(
        measured=f"{mean:.2g} grey levels",
        goal="1",
        note=f"the mean in the hole, {most} at most" + ("" if mean <= 1 else ": WRONG"),
        failed=mean > 1,
        figures={"mean": mean, "most": most},
    )


def same_carafe(machine: Machine, dtype: torch.dtype) -> Row:
    """The fused operator's output and gradients against the plain form in double precision, in both layouts."""
    from tmad import carafe_triton

    shape = (1, 5, 5, 7) if machine.small else (2, 48, 21, 37)
    worst = 0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        features, logits, grad = _carafe_inputs(machine, shape, dtype)
        inputs = [tensor.detach().to(memory_format=layout).requires_grad_() for tensor in (features, logits)]
        doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
        out = carafe_triton.upsample(inputs[0], inputs[1], KERNEL)
        found = [out, *torch.autograd.grad(out, inputs, grad.to(memory_format=layout))]
        weights = doubles[1].unflatten(1, (4, KERNEL**2)).softmax(2)
        plain = reassemble(doubles[0], weights, KERNEL)
        expected = [plain, *torch.autograd.grad(plain, doubles, grad.double())]
        worst = max(worst, *(_apart(a, b) for a, b in zip(found, expected, strict=True)))
    limit = 1e-5 if dtype == torch.float32 else 2**-8
    return Row(
        measured=f"{worst:.0e}",
        goal=f"{limit:.0e}",
        note="output and gradients, both layouts" + ("" if worst <= limit else ": WRONG"),
        failed=worst > limit,
        figures={"difference": worst},
    )


def _apart(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


# What does the card give?


def copy_bandwidth(machine: Machine) -> Row:
    """Bytes read and written a second."""
    source = torch.zeros(2**22 if machine.small else 2**30, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / machine.seconds_each(lambda: target.copy_(source), 10)
    return Row(measured=f"{rate / 1e12:.3g} TB/s", figures={"bytes_per_s": rate})


def matrix_rate(machine: Machine) -> Row:
    """FLOP a second of a square product in bfloat16."""
    side = 256 if machine.small else 8192
    a, b = (torch.randn(side, side, device=machine.device).bfloat16() for _ in range(2))
    rate = 2 * side**3 / machine.seconds_each(lambda: a @ b, 10)
    return Row(measured=f"{rate / 1e12:.3g} TFLOP/s", figures={"flop_per_s": rate})


# What does T-MAD make of it?


def _carafe_inputs(machine: Machine, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    sizes = shape, (batch, 4 * KERNEL**2, height, width), (batch, channels, 2 * height, 2 * width)
    features, logits, grad = (
        machine.layout(torch.randn(size, generator=generator).to(machine.device, dtype)) for size in sizes
    )
    return features.requires_grad_(), logits.requires_grad_(), grad


def carafe_row(machine: Machine, channels: int, side: int, backward: bool) -> Row:
    """One place of the coarse network at 256, beside reading and writing everything once."""
    shape = (machine.batch(64), channels, side // 8 if machine.small else side, side // 8 if machine.small else side)
    features, logits, grad = _carafe_inputs(machine, shape, torch.bfloat16)
    read = features.nbytes + logits.nbytes
    if backward:
        out = upsample(features, logits, KERNEL)
        taken = machine.seconds_each(
            lambda: torch.autograd.grad(out, (features, logits), grad, retain_graph=True), 1 if machine.small else 5
        )
        floor, note = (2 * read + grad.nbytes) / machine.bandwidth, ""
    else:
        with torch.inference_mode():
            taken = machine.seconds_each(lambda: upsample(features, logits, KERNEL), 20)
            weights = logits.unflatten(1, (4, KERNEL**2)).softmax(2)
            plain = machine.seconds(lambda: reassemble(features, weights, KERNEL))
        floor, note = (read + grad.nbytes) / machine.bandwidth, f"plain form {1e3 * plain:.3g} ms"
    return Row(
        measured=f"{1e3 * taken:.3g} ms",
        floor=f"{1e3 * floor:.3g} ms",
        share=percent(floor / taken),
        goal="" if backward else "50 %",
        note=note,
        figures={"seconds": taken, "floor_seconds": floor},
    )


def _trainer(
    machine: Machine, phase: Phase, images: int, *, cells: int = CELLS, penalty_every: int = 1, compiled: bool = False
) -> Callable[[], dict[str, Tensor]]:
    config = machine.config
    config = replace(config, loss=replace(config.loss, gp_every=penalty_every))
    vgg = untrained_vgg19(torch.Generator().manual_seed(0))
    state = TrainingState(config, device=machine.device, perceptual=vgg)
    if machine.channels_last:
        state.use_channels_last()
    if compiled:
        state.compile()
    # On the device beforehand: this is about the step, not about feeding it.
    batch = training_batch(config.model, side=machine.side, images=images, cells=4 if machine.small else cells)
    batch = batch.to(machine.device)
    return lambda: state.step(batch, phase, global_batch=images, progress=0.0)


class _Nowhere:
    """Instead of PyTorch's tracker of modules: everything is counted in one place."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def step_row(machine: Machine, phase: Phase, images: int, cells: int, every: int, goal: str) -> Row:
    """A training step with its penalty at every *every*-th, beside its convolutions and matrix products at the matrix
    rate."""
    count = machine.batch(images)
    step = _trainer(machine, phase, count, cells=cells, penalty_every=every)

    def steps() -> list[dict[str, Tensor]]:
        return [step() for _ in range(every)]

    counter = FlopCounterMode(display=False)
    # Its hooks on modules, which tell them apart, break the penalty's inner derivative.
    counter.mod_tracker = _Nowhere()  # type: ignore[assignment]
    with counter:
        losses = steps()[0]
    flop = counter.get_total_flops() / every
    broken = [term for term, value in losses.items() if not math.isfinite(float(value))]
    taken = machine.seconds(steps) / every
    peak = machine.peak_bytes(steps)
    floor = flop / machine.rate
    note = f"{flop / count / 1e9:.3g} GFLOP an image, peak {peak / 1e9:.3g} GB"
    if phase == "joint":
        note = f"{cells} cells, {note}"
    if every > 1:
        note += f", penalty at every {every}th"
    return Row(
        measured=f"{count / taken:.4g}/s",
        floor=f"{count / floor:.4g}/s",
        share=percent(floor / taken),
        goal=goal,
        note=note + (f"; not finite: {', '.join(broken)}" if broken else ""),
        failed=bool(broken),
        figures={"seconds": taken, "images": count, "floor_seconds": floor, "peak_bytes": peak},
    )


def launches(machine: Machine) -> Row:
    """Kernels started in a joint step, as the profiler sees them; on a CPU the operators that would start them."""
    step = _trainer(machine, "joint", machine.batch(4))
    machine.seconds(step, samples=1)
    figures = _launches(machine, step)
    note = "operators, nested ones too: there is no GPU"
    if machine.on_gpu:
        note = f"{figures['copies']} copies, {figures['waits']} waits"
    return Row(measured=f"{figures['launches']:,}", goal="1,500", note=note, figures=figures)


def _launches(machine: Machine, step: Callable[[], object]) -> dict[str, float]:
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.on_gpu else [])]
    machine.wait()
    with profile(activities=kinds) as seen:
        step()
        machine.wait()
    names = [event.name for event in seen.events()]
    return {
        "launches": sum(name.startswith(LAUNCHES if machine.on_gpu else "aten::") for name in names),
        "copies": sum(name.startswith(("cudaMemcpy", "hipMemcpy")) for name in names),
        "waits": sum("Synchronize" in name for name in names),
    }


def pictures(machine: Machine, number: int, precision: Precision, goal: str) -> Row:
    """From arrays to arrays, a quarter of each picture missing."""
    side = 128 if machine.small else 512
    number = machine.batch(number)
    model = TMAD(machine.config.model).to(machine.device)
    if machine.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inpainter = Inpainter(model, keep_candidates=False, precision=precision)
    images, masks = [picture(side, index) for index in range(number)], [centred_hole(side, side // 2)] * number
    with FlopCounterMode(display=False) as counter:
        inpainter(images[0], masks[0])
    taken = machine.seconds(lambda: inpainter.batch(images, masks), samples=5 if number > 1 else 20)
    each, floor = taken / number, counter.get_total_flops() / machine.rate
    return Row(
        measured=f"{1 / each:.4g}/s",
        floor=f"{1 / floor:.4g}/s",
        share=percent(floor / each),
        goal=goal,
        note=f"{number} in a call, array to array",
        figures={"seconds": each, "floor_seconds": floor},
    )


def first_step(machine: Machine) -> dict[str, float]:
    """Seconds of a fresh process after its imports: networks on the device, then the first two joint steps."""
    begin = time.perf_counter()
    step = _trainer(machine, "joint", machine.batch(4))
    machine.wait()
    built = time.perf_counter()
    step()
    machine.wait()
    first = time.perf_counter()
    step()
    machine.wait()
    return {
        "networks": built - begin,
        "first": first - built,
        "second": time.perf_counter() - first,
    }


def compiled_step(machine: Machine) -> dict[str, float]:
    """Seconds until a compiled joint step has run once, of one after that, and its launches."""
    count = machine.batch(64)
    begin = time.perf_counter()
    step = _trainer(machine, "joint", count, compiled=not machine.small)
    step()
    machine.wait()
    first = time.perf_counter()
    seconds = machine.seconds(step, samples=3)
    figures = {"seconds": seconds, "images": count, **_launches(machine, step)}
    return {"first": first - begin, "rest": time.perf_counter() - first, **figures}


ALONE: dict[str, Callable[[Machine], dict[str, float]]] = {"first": first_step, "compiled": compiled_step}
"""What is measured in a process of its own."""


def _alone(machine: Machine, name: str, limit_s: float, cache: str) -> tuple[dict[str, float], float]:
    """One of `ALONE` in a process that keeps compiled code in the folder *cache*, and how long that lived."""
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", name, "--device", str(machine.device)]
    command += ["--small"] * machine.small + ["--channels-first"] * (not machine.channels_last)
    kept = {"TRITON_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": cache, "CUDA_CACHE_DISABLE": "1"}
    begin = time.perf_counter()
    run = subprocess.run(command, env=os.environ | kept, capture_output=True, text=True, timeout=limit_s)
    whole = time.perf_counter() - begin
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or ["the process ended"])[-1])
    return json.loads(run.stdout.strip().splitlines()[-1]), whole


def first_step_row(machine: Machine, limit_s: float) -> Row:
    """From the start of Python to the end of the first joint step."""
    with tempfile.TemporaryDirectory() as cache:
        parts, whole = _alone(machine, "first", limit_s, cache)
    parts = {"imports": whole - sum(parts.values()), **parts}
    note = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return Row(
        measured=f"{whole - parts['second']:.1f} s",
        goal="20 s",
        note=note,
        figures={"seconds": whole - parts["second"], **parts},
    )


def compiled_row(machine: Machine, limit_s: float, cache: str) -> Row:
    """The joint step with `workers.compile`."""
    found, _ = _alone(machine, "compiled", limit_s, cache)
    note = f"{found['first']:.0f} s for the first, compiling included; {found['launches']:,.0f} launches, goal 1,500"
    return Row(
        measured=f"{found['images'] / found['seconds']:.4g}/s",
        goal="800/s",
        note="not compiled: small" if machine.small else note,
        figures=found,
    )


def kept_cache_row(machine: Machine, limit_s: float, cache: str) -> Row:
    """The same from the start of Python to the end of the first step, where a process before left compiled code."""
    found, whole = _alone(machine, "compiled", limit_s, cache)
    return Row(
        measured=f"{whole - found['rest']:.1f} s",
        goal="20 s",
        note="not compiled: small" if machine.small else f"{found['first']:.1f} of them behind the imports",
        figures=found,
    )


# Table and JSON


def percent(share: float) -> str:
    """A share with two digits."""
    return f"{100 * share:.2g} %"


def short(dtype: torch.dtype) -> str:
    """fp32, bf16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def line(row: Row) -> str:
    """One row of the Markdown table."""
    return "| " + " | ".join([row.what, row.measured, row.floor, row.share, row.goal, row.note]) + " |"


def environment(machine: Machine) -> dict[str, Any]:
    """What ran where."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "date": date.today().isoformat(),
        "commit": git.stdout.strip() or os.environ.get("TMAD_COMMIT"),
        "device": torch.cuda.get_device_name(machine.device) if machine.on_gpu else platform.processor() or "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "channels_last": machine.channels_last,
        "small": machine.small,
    }


def markdown(rows: Sequence[Row], machine: Machine, seconds: float) -> str:
    """The whole page."""
    head = "\n".join(f"- **{name}:** {value}" for name, value in environment(machine).items())
    header = ["", "measured", "at most", "share", "to reach", ""]
    table = "\n".join(["| " + " | ".join(header) + " |", "|---|---:|---:|---:|---:|---|", *map(line, rows)])
    note = (
        "“At most” is what the copy rate (CARAFE: everything read and written once) or the matrix rate (convolutions "
        "and products alone) of the same run allow. Medians, batches on the device beforehand."
    )
    return f"# T-MAD on a GPU\n\n{head}\n- **seconds:** {seconds:.0f}\n\n{table}\n\n{note}\n"


def write(page: Path, rows: Sequence[Row], machine: Machine, seconds: float) -> None:
    """Page and figures, whatever rows there are so far."""
    page.write_text(markdown(rows, machine, seconds), encoding="utf-8")
    content = {"environment": environment(machine), "seconds": seconds, "rows": [asdict(row) for row in rows]}
    page.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
