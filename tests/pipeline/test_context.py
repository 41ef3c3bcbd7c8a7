"""Two and four gloo workers with a part of a batch each compute what one does with all of it; without that care they
would not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.train.context import DistributedWorkers, checksums
from tests.pipeline.conftest import start_processes
from tests.tmad.tiny import make_batch, make_state, with_loss, with_optim
from tmad.batch import Batch
from tmad.step import OneWorker, TrainingState, Workers

GLOBAL_BATCH = 4
# A rate so small that Adam, which divides by a gradient's size, cannot blow rounding up into a difference of weights; a
# penalty weight that lets the relativistic terms be seen beside it.
CONFIG = with_optim(with_loss(gradient_penalty=0.01), lr=1e-7, lr_discriminators=1e-7)


class Recorder:
    """Hands everything to *workers* and keeps the averaged gradients, the discriminators' first."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.gradients: list[Tensor] = []

    def mean(self, value: Tensor) -> Tensor:
        return self.workers.mean(value)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        self.workers.average_gradients(parameters)
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters if p.grad is not None]))


class LocalMeans(DistributedWorkers):
    """What must not happen: relativistic expectations over one worker's share."""

    def mean(self, value: Tensor) -> Tensor:
        return value


def _share(batch: Batch, rank: int, world: int) -> Batch:
    rows = slice(rank * len(batch) // world, (rank + 1) * len(batch) // world)
    return Batch(
        batch.image_id[rows],
        *(getattr(batch, name)[rows] for name in ("image", "mask", "pool_yx", "cells", "mix")),
    )


def _joint_step(batch: Batch, workers: Workers) -> dict[str, Any]:
    state = make_state(CONFIG)
    recorder = Recorder(workers)
    metrics = state.step(batch, "joint", global_batch=GLOBAL_BATCH, progress=0.0, workers=recorder)
    return {"metrics": metrics, "gradients": recorder.gradients, "weights": checksums([state.model])}


def _messages(batch: Batch) -> dict[str, Any]:
    """Bytes of each all-reduce of a joint step, in order, and of the weights that it trains."""
    state, sent, send = make_state(CONFIG), [], dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **more: Any) -> Any:
        sent.append(tensor.nbytes)
        return send(tensor, *args, **more)

    dist.all_reduce = counted
    try:
        state.step(batch, "joint", global_batch=GLOBAL_BATCH, progress=0.0, workers=DistributedWorkers())
    finally:
        dist.all_reduce = send
    weights = [[p.nbytes for group in one.param_groups for p in group["params"]] for one in state.optimizers.values()]
    return {"sent": sent, "weights": [sum(sizes) for sizes in weights]}


def _coarse_steps(batches: list[Batch], workers: Workers) -> Tensor:
    state = make_state(replace(CONFIG, optim=replace(CONFIG.optim, lr=1e-3)))
    for batch in batches:
        state.step(batch, "coarse", global_batch=GLOBAL_BATCH, progress=0.0, workers=workers)
    return _weights(state)


def _weights(state: TrainingState) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in state.model.parameters()])


def _derivatives_of_a_mean(rank: int) -> list[float]:
    """For loss_r = (r + 1) m², m = mean over ranks of x_r³, x_r = r + 1: m, first and second derivative by x_r."""
    x = torch.tensor(float(rank + 1), dtype=torch.float64, requires_grad=True)
    mean = DistributedWorkers().mean(x**3)
    (first,) = torch.autograd.grad((rank + 1) * mean**2, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    return [mean.item(), first.item(), second.item()]


def _worker(rank: int, world: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    batches = [make_batch(seed, size=GLOBAL_BATCH) for seed in range(3)]
    shares = [_share(batch, rank, world) for batch in batches]
    result = {
        "right": _joint_step(shares[0], DistributedWorkers()),
        "local means": _joint_step(shares[0], LocalMeans()),
        "coarse": _coarse_steps(shares, DistributedWorkers()),
        "mean": _derivatives_of_a_mean(rank),
        "messages": _messages(shares[0]),
    }
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of so many processes computed."""
    folder = tmp_path_factory.mktemp("gloo")
    start_processes(_worker, request.param, str(folder), count=request.param)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What one process computes with the whole batch."""
    return _joint_step(make_batch(0, size=GLOBAL_BATCH), OneWorker())


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_several_workers_have_the_losses_of_one(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    names = [name for name in alone["metrics"] if name.startswith(("loss/", "penalty/"))]
    assert {"loss/discriminator_patch", "loss/gan_patch", "penalty/patch", "penalty/global", "loss/total"} <= set(names)
    for name in names:
        mean = sum(float(rank["right"]["metrics"][name]) for rank in ranks) / len(ranks)
        assert mean == pytest.approx(float(alone["metrics"][name]), rel=1e-5), name


@pytest.mark.parametrize("which", [0, 1], ids=["discriminators", "generator"])
def test_several_workers_have_the_gradients_of_one(
    ranks: list[dict[str, Any]], alone: dict[str, Any], which: int
) -> None:
    for rank in ranks:
        assert _relative(rank["right"]["gradients"][which], alone["gradients"][which]) < 2e-5


def test_a_joint_step_sends_each_gradient_once_in_two_messages_and_seven_scalars(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        sent, (generator, discriminators) = rank["messages"]["sent"], rank["messages"]["weights"]
        # Both expectations of the discriminators' loss and back, those of the generator's and back through one.
        assert sent == [4] * 4 + [discriminators] + [4] * 3 + [generator]


def test_relativistic_means_of_one_share_would_be_another_gradient(
    ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    wrong, right = (
        _relative(ranks[0][kind]["gradients"][0], alone["gradients"][0]) for kind in ("local means", "right")
    )
    assert wrong > 20 * right


def test_workers_keep_equal_weights_to_the_last_bit(ranks: list[dict[str, Any]]) -> None:
    for other in ranks[1:]:
        assert torch.equal(ranks[0]["right"]["weights"], other["right"]["weights"])
        assert torch.equal(ranks[0]["coarse"], other["coarse"])


def test_several_coarse_steps_of_several_workers_give_the_weights_of_one(ranks: list[dict[str, Any]]) -> None:
    start = _weights(make_state(CONFIG))
    expected = _coarse_steps([make_batch(seed, size=GLOBAL_BATCH) for seed in range(3)], OneWorker())
    moved = (expected - start).norm()
    assert moved > 0
    assert (ranks[0]["coarse"] - expected).norm() < 1e-3 * moved


def test_the_mean_over_workers_is_differentiable_twice(ranks: list[dict[str, Any]]) -> None:
    # The workers' losses together are s m² with s = 1 + ... + world and m = (1³ + 2³ + ...) / world, so the first
    # derivatives are f_r = 6 s m x_r² / world; the second ones are those of their sum.
    world = len(ranks)
    xs = [float(rank + 1) for rank in range(world)]
    m, factor = sum(x**3 for x in xs) / world, 6 * sum(xs) / world
    for rank, x in enumerate(xs):
        mean, first, second = ranks[rank]["mean"]
        assert mean == pytest.approx(m)
        assert first == pytest.approx(factor * m * x**2)
        assert second == pytest.approx(factor * (3 * x**2 / world * sum(y**2 for y in xs) + 2 * m * x))


def test_a_checksum_sees_one_bit_and_two_weights_exchanged() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(checksums([first]), checksums([second]))
    with torch.no_grad():
        second.weight[0, 0] = torch.nextafter(second.weight[0, 0], torch.tensor(9.0))
    assert not torch.equal(checksums([first]), checksums([second]))
    with torch.no_grad():
        second.weight.copy_(torch.ones(3, 3))
        second.bias.copy_(torch.zeros(3))
        before = checksums([second])
        second.weight[0].zero_()
        second.bias.fill_(1.0)
    assert not torch.equal(before, checksums([second]))
