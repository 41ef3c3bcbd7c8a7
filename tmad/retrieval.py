"""Patch retrieval from the texture memory (Sec. III-B, Eq. 2-5).

Shapes: B images, N cells of an image, P memory patches of an image, C candidates of a cell, K patch side,
D embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tmad.config import RetrievalConfig
from tmad.patches import cut
from tmad.rng import seed_of


def similarity(query_BND: Tensor, memory_BPD: Tensor) -> Tensor:
    """Eq. 3: c = theta(p_s)^T phi(p_t) / |phi(p_t)|; only the memory's side is normalised. Returns (B, N, P)."""
    return query_BND @ F.normalize(memory_BPD, dim=-1).transpose(1, 2)


START_SHARPNESS = 8.0
"""theta over phi at the start: S is then neither uniform nor one patch [D]."""


class StraightThroughGather(torch.autograd.Function):
    """Eq. 4-5: each candidate is its memory patch to the last bit; its gradient is that of the softmax-weighted sum.

    Forward: p_c = T[index_c]. Backward: dp/dw = dS/dw (x) T, hence dL/dS_j = sum over candidates of <dL/dp_c, T_j>:
    all candidates of a cell share one S, so their gradients are added before one product with the pool. The pool is
    data and receives no gradient.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, weights: Tensor, pool: Tensor, index: Tensor) -> Tensor:
        """*weights* S (B, N, P); *pool* (B, P, ...); *index* (B, N, C) int64. Returns (B, N, C, ...)."""
        ctx.save_for_backward(pool)
        return gather_patches(pool, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        """(B, N, C, ...) -> (B, N, P)."""
        (pool,) = ctx.saved_tensors  # type: ignore[attr-defined]
        # Eq. 5: dL/dS_j = <sum_c dL/dp_c, T_j>.
        summed = grad.sum(dim=2).flatten(2)
        return summed @ pool.to(summed.dtype).flatten(2).transpose(1, 2), None, None


def gather_patches(pool: Tensor, index: Tensor) -> Tensor:
    """Memory patches by number: *pool* (B, P, ...), *index* (B, N, C) -> (B, N, C, ...)."""
    batch = torch.arange(pool.shape[0], device=pool.device)[:, None, None]
    return pool[batch, index]


@dataclass(frozen=True)
class Retrieved:
    """What retrieval found."""

    candidates: Tensor
    """(B, N, C, ...): what the memory holds of the most similar patches, most similar first; in mode `weighted_sum` the
    softmax mean of all, C times the same."""
    index: Tensor
    """(B, N, C) int64, which memory patches they are."""
    weights: Tensor
    """(B, N, P), S: softmax of the similarity over the memory."""
    scores: Tensor
    """(B, N, P), what S is the softmax of."""


class Retrieval(nn.Module):
    """theta, phi and the sampling of N_c candidates (Eq. 2-5)."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_query = embedding(config)
        self.embed_memory = embedding(config)
        self._start_as_distance()

    def forward(self, cells: Tensor, pool: Tensor, held: Tensor) -> Retrieved:
        """*cells* p_s (B, N, 3, K, K) and *pool* T (B, P, 3, K, K), in [-1, 1]; *held* (B, P, ...), what is handed out
        of each memory patch: the patch itself, or a window around it. S is float32."""
        query_BND = self.embed_query(cells.flatten(0, 1)).reshape(*cells.shape[:2], -1)
        memory_BPD = self.embed_memory(pool.flatten(0, 1)).reshape(*pool.shape[:2], -1)
        # A choice must not hang on rounding, which differs with the number of cells that are scored at once.
        exact = torch.float32 if torch.is_grad_enabled() else torch.float64
        with torch.autocast(cells.device.type, enabled=False):
            # Eq. 3. [D] The temperature keeps the softmax from saturating and changes no ranking.
            scores_BNP = similarity(query_BND.to(exact), memory_BPD.to(exact)) / self.config.temperature
            weights = scores_BNP.softmax(dim=-1).float()
        index = scores_BNP.topk(self.config.num_candidates, dim=-1).indices
        return Retrieved(self.hand_out(weights, held, index), index, weights, scores_BNP)

    @torch.no_grad()
    def _start_as_distance(self) -> None:
        """[D] theta starts as a multiple of phi, and phi with one constant channel. What Eq. 3 then ranks by is
        |phi(p_s) - phi(p_t)|: with constants of norm c and other channels f much shorter, phi / |phi| = (f / c,
        1 - |f|^2 / 2c^2), so that theta^T phi / |phi| is c + (f_s^T f_t - |f_t|^2 / 2) / c. A random phi without it
        ranks by angle, and how good that is depends on the seed."""
        weight, bias = list(self.embed_memory.parameters())[-2:]
        if self.config.embed_channels > 1:
            bias.zero_()
            weight[-1], bias[-1] = 0.0, 1.0
        self.embed_query.load_state_dict(self.embed_memory.state_dict())
        for parameter in list(self.embed_query.parameters())[-2:]:
            parameter.mul_(START_SHARPNESS)

    def hand_out(self, weights: Tensor, held: Tensor, index: Tensor) -> Tensor:
        """The candidates (B, N, C, ...) that S *weights* (B, N, P) and *index* (B, N, C) choose of *held*."""
        if self.config.mode == "weighted_sum":
            # W-Sum of Table IV: S (x) T, forward too.
            mean = torch.einsum("bnp,bp...->bn...", weights, held.float()).to(held.dtype)
            return mean[:, :, None].expand(-1, -1, index.shape[-1], *(-1 for _ in held.shape[2:]))
        if self.config.straight_through:
            candidates: Tensor = StraightThroughGather.apply(weights, held, index)
            return candidates
        # No gradient reaches S: the expected distance alone teaches retrieval.
        return gather_patches(held, index)


def untrained_retrieval(config: RetrievalConfig) -> Retrieval:
    """What training is compared with: the same layers with random weights, the same ones everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(0, "untrained retrieval"))
        return Retrieval(config).requires_grad_(False).eval()


def embedding(config: RetrievalConfig) -> nn.Sequential:
    """theta or phi: conv3x3, leaky ReLU 0.2, conv1x1 (Sec. IV); flattened, it is the embedding [D]."""
    return nn.Sequential(
        nn.Conv2d(3, config.hidden_channels, 3, padding=1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(config.hidden_channels, config.embed_channels, 1),
    )


@torch.no_grad()
def patch_distances(pool: Tensor, targets: Tensor) -> Tensor:
    """Mean |T_j - p| between memory patches (B, P, 3, K, K) and patches (B, N, 3, K, K): (B, N, P), float32."""
    with torch.autocast(pool.device.type, enabled=False):
        flat = targets.float().flatten(2), pool.float().flatten(2)
        return torch.cdist(*flat, p=1) / flat[0].shape[-1]


GREY_LEVELS = 127.5
"""Of 255, in a difference of 1 between values in [-1, 1]."""


@torch.no_grad()
def retrieval_statistics(
    found: tuple[Tensor, Tensor], reference: Tensor, distances: Tensor, counted: Tensor
) -> dict[str, Tensor]:
    """How well the memory was searched, over the cells that are *counted* (B, N) bool.

    *found*: weights S (B, N, P) and candidate index (B, N, C); *reference*: the index (B, N, C) that an untrained
    embedding finds; *distances* (B, N, P) as `patch_distances`. `retrieval/top`, `retrieval/untrained`,
    `retrieval/best` and `retrieval/random`: grey levels between the true cell and the first candidate, an untrained
    embedding's, the memory's best and its mean patch; `retrieval/entropy` of S, nats; `retrieval/distinct`: different
    first candidates of an image, as a share of its cells (or of the memory, where that is smaller).
    """
    weights, index = found
    share = counted.float() / counted.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return (values * share).sum()

    first = index[..., 0]
    chosen = torch.zeros_like(distances[:, 0]).scatter_reduce_(1, first, counted.float(), "amax").sum(1)
    possible = counted.sum(1).clamp(max=distances.shape[-1])
    return {
        "retrieval/top": GREY_LEVELS * mean(distances.gather(2, index[..., :1])[..., 0]),
        "retrieval/untrained": GREY_LEVELS * mean(distances.gather(2, reference[..., :1])[..., 0]),
        "retrieval/best": GREY_LEVELS * mean(distances.amin(-1)),
        "retrieval/random": GREY_LEVELS * mean(distances.mean(-1)),
        "retrieval/entropy": mean(-(weights * weights.clamp(min=1e-12).log()).sum(-1)),
        "retrieval/distinct": (chosen / possible.clamp(min=1)).sum() / (possible > 0).sum().clamp(min=1),
    }


def retrieval_gain(top: float, untrained: float, best: float) -> float | None:
    """(untrained - top) / (untrained - best): 1 where retrieval finds the memory's best patch for each cell, 0 where
    training has changed nothing, negative where it is worse; none where an untrained embedding finds the best."""
    return (untrained - top) / (untrained - best) if untrained > best else None


@torch.no_grad()
def intact_share(mask: Tensor, pool_yx: Tensor, index: Tensor, patch_size: int) -> Tensor:
    """Share of the candidates' pixels that are no hole pixels. *mask* (B, 1, H, W) {0, 1}, 1 = hole; *pool_yx* (B,
    N_pool, 2); *index* (B, N, N_c) into the pool."""
    intact = 1 - cut(mask.float(), pool_yx, patch_size).mean((2, 3, 4))
    return intact.gather(1, index.flatten(1)).mean()
