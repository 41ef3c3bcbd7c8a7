"""Memory and speed of a training worker and size of a checkpoint, measured with a few steps on this machine."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pipeline.config import RunConfig
from pipeline.storage import mb
from pipeline.train.loop import due
from tmad.batch import Batch, collate, make_sample
from tmad.config import SMALLEST_IMAGE
from tmad.perceptual import untrained_vgg19
from tmad.rng import numpy_generator, torch_generator
from tmad.step import Phase, TrainingState

MEASURED_SIDE = 128
"""Pixels: the step that is measured has crops of about this side, or the run's where they are smaller."""


@dataclass(frozen=True)
class Footprint:
    """Bytes. What is held is counted tensor by tensor; `step` is an estimate, see `measure`."""

    networks: int
    """Generator and discriminators, with their buffers."""
    average: int
    """Averaged generator."""
    moments: int
    """Adam's."""
    features: int
    """Feature network of the perceptual loss."""
    step: int
    """Activations, gradients and all else that lives during a step, at its largest moment."""
    checkpoint: int
    """Tensors of one checkpoint: the state and the averaged model once more."""
    formula: str
    """How `step` came about, in words."""

    @property
    def held(self) -> int:
        """Between steps."""
        return self.networks + self.average + self.moments + self.features

    @property
    def worker(self) -> int:
        """At the largest moment."""
        return self.held + self.step


def measure(config: RunConfig, *, crop_size: int) -> Footprint:
    """The footprint of a worker of *config* that trains on square crops of *crop_size* pixels.

    The step's peak with one and with two small crops, measured on the CPU in the run's precision, gives a constant and
    a slope. The slope is multiplied by the images of a worker and by the ratio of the crops' areas, as cells and
    activations grow with the area: 8 % (64 cells) and 21 % (25 cells, beside which the memory counts) more than a whole
    step at the paper's settings and 256 pixels took. Not in it: cuDNN's workspaces, the CUDA context, NCCL, the input
    pipeline.
    """
    # The penalty's second backward is the largest moment; the step that is measured must not leave it out.
    training = replace(config.training, loss=replace(config.training.loss, gp_every=1))
    features = untrained_features(config)
    state = TrainingState(training, perceptual=features)
    multiple = config.model.size_multiple
    side = min(crop_size, math.ceil(MEASURED_SIDE / multiple) * multiple)
    area = (crop_size / side) ** 2
    block = math.isqrt(math.ceil(config.schedule.patches_per_image / area))
    block = max(block, math.ceil(SMALLEST_IMAGE / config.model.patch_size))  # what the global discriminator needs
    cells = min(block, side // config.model.patch_size) ** 2
    share = config.schedule.batch_images // config.workers.fewest
    phase: Phase = "joint" if config.schedule.joint_images else "coarse"

    def step(images: int) -> Callable[[], object]:
        batch = noise_batch(config, side=side, images=images, cells=cells)
        return lambda: state.step(batch, phase, global_batch=images, progress=0.0)

    step(1)()  # Adam's moments come into being
    one, two = peak_bytes(step(1)), peak_bytes(step(2))
    slope = (two - one) * area
    tensors = state.tensors()
    constant = one - (two - one)
    average = _bytes(state.ema_model.state_dict().values())
    moments = _bytes(value for name, value in tensors.items() if name.startswith("adam/"))
    return Footprint(
        networks=_bytes(tensors.values()) - average - moments,
        average=average,
        moments=moments,
        features=_bytes(features.state_dict().values()) if features is not None else 0,
        step=round(constant + slope * share),
        checkpoint=_bytes(tensors.values()) + average,
        formula=f"{mb(constant)} + {share} x {mb(slope)}, from {phase} steps with one and two crops of {side} pixels "
        f"and {cells} cells",
    )


def checkpoint_count(config: RunConfig) -> int:
    """Checkpoints that a run writes from its start to its end."""
    schedule = config.schedule
    batch, every = schedule.batch_images, schedule.checkpoint_every_images
    last = math.ceil(schedule.total_images / batch) * batch
    regular = min(last // batch, last // every)
    return regular if due(last - batch, last, every) else regular + 1


def kept_bytes(config: RunConfig, *, checkpoint: int, model: int) -> int:
    """Bytes that a run has in storage at its fullest moment: its checkpoints and a new one that takes an old one's
    place, the best model, the last one, and that in MLflow. *checkpoint* and *model*: bytes of one."""
    return checkpoint * min(config.schedule.keep_checkpoints + 1, checkpoint_count(config)) + 3 * model


def run_bytes(config: RunConfig) -> int:
    """`kept_bytes` of a run of *config*, from its networks, which are made for this."""
    state = TrainingState(config.training, perceptual=untrained_features(config))
    model = _bytes(state.ema_model.state_dict().values())
    return kept_bytes(config, checkpoint=_bytes(state.tensors().values()) + model, model=model)


def measured_rates(
    config: RunConfig, *, crop_size: int, phases: Sequence[Phase] = ("coarse", "joint")
) -> dict[Phase, float] | None:
    """Images/s of one worker of *config* in each of *phases* that it trains in, from steps made here; none where the
    run wants GPUs and this machine has none.

    On a GPU whole steps of a worker, on a CPU steps with one image. Without input, without other workers.
    """
    device = torch.device("cuda" if config.workers.use_gpu else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    on_gpu, schedule, threads = device.type == "cuda", config.schedule, torch.get_num_threads()
    images = schedule.batch_images // config.workers.num_workers if on_gpu else 1
    features = untrained_features(config)
    state = TrainingState(config.training, device=device, perceptual=features)
    if config.workers.lays_channels_last:
        state.use_channels_last()
    batch = noise_batch(config, side=crop_size, images=images, cells=schedule.patches_per_image).to(device)
    lengths: dict[Phase, int] = {"coarse": schedule.coarse_images, "joint": schedule.joint_images}
    rates: dict[Phase, float] = {}
    # A worker elsewhere may have more processors than there are here; more threads than processors take forever.
    torch.set_num_threads(min(config.threads, os.cpu_count() or 1))
    try:
        for phase in (phase for phase in phases if lengths[phase]):
            # The penalty is part of every `gp_every`-th step only.
            steps = max(config.loss.gp_every, 8 if on_gpu else 1)
            for timed in (False, True):
                began = time.perf_counter()
                for _ in range(steps if timed or on_gpu else 1):
                    state.step(batch, phase, global_batch=images, progress=0.0)
                if on_gpu:
                    torch.cuda.synchronize(device)
                if timed:
                    rates[phase] = steps * images / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return rates


def untrained_features(config: RunConfig) -> nn.Module | None:
    """The feature network of the run's losses, as large as the real one; none where they need none."""
    if not config.training.loss.uses_features:
        return None
    return untrained_vgg19(torch_generator("footprint"), config.perceptual.convolutions)


def peak_bytes(call: Callable[[], object]) -> int:
    """Largest sum of tensor bytes that *call* holds at one moment, beyond what lives when it begins.

    A running sum over the allocations and releases that PyTorch's profiler reports for the CPU allocator. What the
    libraries below allocate by themselves (oneDNN's scratch) is not in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    events = recorded.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    # Stable: events of one timestamp stay in the order in which they happened.
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def noise_batch(config: RunConfig, *, side: int, images: int, cells: int) -> Batch:
    """Noise with a hole over a quarter of each image: memory does not depend on content."""
    model, rng = config.model, numpy_generator("footprint")
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[: side // 2, : side // 2] = 1
    pool = np.full((model.memory.pool_size, 2), side - model.patch_size, dtype=np.int16)
    samples = [
        make_sample(
            str(number),
            rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
            mask,
            pool,
            patch_size=model.patch_size,
            num_cells=cells,
            rng=rng,
        )
        for number in range(images)
    ]
    return collate(samples)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
