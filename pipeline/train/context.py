"""The training loop's view of the cluster: rank, collective operations, checkpoints.

The loop is written once against `TrainContext`; `RayContext` runs it in Ray Train's workers, and tests run it in a
process of their own.

There is no `DistributedDataParallel` here. Every worker starts from the same seed, and each gradient is averaged by
hand, in one all-reduce, after its backward is complete: that equals one process with the whole batch, gradient penalty
and relativistic expectations included. DDP would average while the backward runs, and a penalty that has its own
backward slips past its hooks: the workers drift apart without an error. What is left of that risk, a worker whose
weights differ for any reason, is found by `same_everywhere` at every log interval.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointConsistencyMode
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import CheckpointNotKept, TMADError
from pipeline.runs.lease import Lease
from pipeline.train.preemption import Notice, NoticeBoard
from tmad.step import Workers

COMMIT_TIMEOUT_S = 600.0
"""Seconds to wait for Ray's controller to register a checkpoint that is in storage."""

MANIFEST_FILE = "manifest.json"
"""In a checkpoint, written last: what else is in it."""

CHECKPOINT = re.compile(r"images_\d{12}(_\d+)?")
"""Names of checkpoints."""


class TrainContext(Protocol):
    """One training process and its relation to the others; every method is called by all of them alike."""

    rank: int
    """0 to world_size - 1."""
    world_size: int
    device: torch.device
    workers: Workers
    """Means over the workers, for the training step."""

    def same_everywhere(self, value: Tensor) -> bool:
        """Whether *value* (int64) is equal on all workers."""

    def everyones(self, value: Any) -> list[Any]:
        """What each worker gave as *value*, by rank; anything that can be pickled."""

    def notice(self) -> Notice | None:
        """An end that was announced since the last call, the same for all workers; asked after every step."""

    def checkpoints(self) -> dict[str, bool]:
        """Names of the checkpoints in storage, newest first, and whether each is known to have been complete once."""

    def checkpoint(self, name: str) -> Path:
        """The checkpoint *name* as a folder on this machine, not to be written to."""

    def keep(self, folder: Path | None, name: str, metrics: dict[str, float]) -> str:
        """Keep what rank 0 wrote into *folder* (others give `None`) as the checkpoint *name*; returns when it counts:
        a crash in the next instant resumes from there. Returns the name it got: another one if *name* is taken by a
        checkpoint that is damaged. Raises `CheckpointNotKept` if storage does not take it."""


class DistributedWorkers:
    """Means over the processes of the default `torch.distributed` group."""

    def mean(self, value: Tensor) -> Tensor:
        """Mean over the workers, differentiable any number of times; its gradient is the mean of theirs."""
        result: Tensor = _Mean.apply(value)
        return result

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the workers, in one all-reduce after the backward pass:
        hiding it behind that would gain a thousandth (docs/cost.md).

        The workers must give the same parameters with gradients, which fixed shapes guarantee.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [mean.view_as(one) for mean, one in zip(means, gradients, strict=True)])


class _Mean(torch.autograd.Function):
    """All-reduce mean in both directions.

    Each worker's loss depends on the common mean, so the gradient of the average loss with respect to one worker's
    value collects all workers' gradients: their mean, as gradients are averaged over the workers afterwards.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        result: Tensor = _Mean.apply(gradient)
        return result


class RayContext:
    """A worker of Ray Train; Ray has made the process group and keeps checkpoints in the folder *checkpoints*. *relay*
    is the driver's, which says when it was told to stop, *lease* what the driver holds on the run's folder."""

    def __init__(self, checkpoints: str, relay: Any, lease: Lease) -> None:
        self._folder = checkpoints
        self._lease = lease
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.workers: Workers = DistributedWorkers()
        self._notices = NoticeBoard(relay if self.rank == 0 else None)

    def same_everywhere(self, value: Tensor) -> bool:
        """Compare by one all-reduce."""
        both = torch.stack([value, -value]).to(self.device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        return bool((both[0] == -both[1]).all())

    def everyones(self, value: Any) -> list[Any]:
        """By one all-gather."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def notice(self) -> Notice | None:
        """The most urgent that any of them knows, by one all-reduce of a number."""
        found = torch.tensor(self._notices.own(), device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return self._notices.meaning(int(found))

    def checkpoints(self) -> dict[str, bool]:
        """Folders in storage; complete once are those that Ray's controller has registered."""
        if not storage.exists(self._folder):
            return {}
        names = {key.split("/", 1)[0] for key in storage.list_files(self._folder)}
        registered = self._registered()
        return {name: name in registered for name in sorted(filter(CHECKPOINT.fullmatch, names), reverse=True)}

    def checkpoint(self, name: str) -> Path:
        """A copy of this worker's own, or the folder itself where storage is local."""
        # Not the object that the controller hands out: its copy is shared by the processes of a machine, and one that
        # comes late downloads over the files that another reads.
        return storage.local_copy(storage.join(self._folder, name))

    def keep(self, folder: Path | None, name: str, metrics: dict[str, float]) -> str:
        """Upload, the manifest last, and wait until the controller has it in its books."""
        registered = self._registered()
        # A name that depends on the images alone: a repeated stretch overwrites what a crash left half-written. Not one
        # in the controller's books, which would delete the new folder together with the old entry.
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        free = next(one for one in names if one not in registered)
        place = storage.join(self._folder, free)
        # Not by Ray, which gives up at once where storage asks for patience, and whose other workers would wait.
        if refused := self.everyones(self._upload(folder, place))[0]:
            raise CheckpointNotKept(f"checkpoint {free} was not kept: {refused}")
        checkpoint = Checkpoint(*storage.for_ray(place)) if folder is not None else None
        ray.train.report(
            metrics, checkpoint=checkpoint, checkpoint_dir_name=free, checkpoint_upload_fn=lambda there, _: there
        )
        # `report` returns when the files are in storage. Until the controller has registered them, a crash would
        # restart from the checkpoint before.
        self._registered()
        return free

    def _registered(self) -> set[str]:
        """Names of the checkpoints in the controller's books, once it has every report of this worker in them."""
        reported = ray.train.get_all_reported_checkpoints(
            consistency_mode=CheckpointConsistencyMode.COMMITTED, timeout_s=COMMIT_TIMEOUT_S
        )
        return {one.checkpoint.path.rstrip("/").rsplit("/", 1)[-1] for one in reported}

    def _upload(self, folder: Path | None, place: str) -> str | None:
        """What storage, or another job that has taken the run over, says against it, if anything."""
        try:
            if folder is not None:
                self._lease.check()
                storage.upload_folder(folder, place, last=MANIFEST_FILE)
        except TMADError as error:
            return error.message
        return None


def checksums(modules: Iterable[nn.Module]) -> Tensor:
    """One int64 for each module, from the bits of its float32 parameters: equal weights, equal sums."""
    sums = []
    for module in modules:
        total = torch.zeros((), dtype=torch.int64, device=next(module.parameters()).device)
        for index, parameter in enumerate(module.parameters(), start=1):
            total += index * parameter.detach().contiguous().view(torch.int32).sum(dtype=torch.int64)
        sums.append(total)
    return torch.stack(sums)
