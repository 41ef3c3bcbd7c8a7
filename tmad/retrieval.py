"""Patch retrieval from the texture memory (Sec. III-B, Eq. 2-5).

Shapes: B images, N cells of an image, P memory patches of an image, C candidates of a cell, K patch side,
D embedding dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tmad.config import RetrievalConfig
from tmad.patches import cut


def similarity(query_BND: Tensor, memory_BPD: Tensor) -> Tensor:
    """Eq. 3: c = theta(p_s)^T phi(p_t) / |phi(p_t)|; only the memory's side is normalised. Returns (B, N, P)."""
    return query_BND @ F.normalize(memory_BPD, dim=-1).transpose(1, 2)


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
    """(B, N, C, 3, K, K): the most similar memory patches, most similar first; in mode `weighted_sum` their softmax
    mean, C times the same."""
    index: Tensor
    """(B, N, C) int64, which memory patches they are."""
    weights: Tensor
    """(B, N, P), S: softmax of the similarity over the memory."""


class Retrieval(nn.Module):
    """theta, phi and the sampling of N_c candidates (Eq. 2-5)."""

    def __init__(self, config: RetrievalConfig, patch_size: int) -> None:
        super().__init__()
        self.config = config
        self.embed_query = embedding(config)
        self.embed_memory = embedding(config)
        # Equal at the start, so that from the first step a cell is most similar to patches that look like it [D].
        self.embed_memory.load_state_dict(self.embed_query.state_dict())
        dimension = config.embed_channels * patch_size**2
        self.temperature = config.temperature or math.sqrt(dimension)

    def forward(self, cells: Tensor, pool: Tensor, *, num_candidates: int | None = None) -> Retrieved:
        """*cells* p_s (B, N, 3, K, K) and *pool* T (B, P, 3, K, K), in [-1, 1]. Softmax in float32."""
        query_BND = self.embed_query(cells.flatten(0, 1)).reshape(*cells.shape[:2], -1)
        memory_BPD = self.embed_memory(pool.flatten(0, 1)).reshape(*pool.shape[:2], -1)
        # The temperature keeps the softmax from saturating; it changes no ranking.
        with torch.autocast(cells.device.type, enabled=False):
            scores_BNP = similarity(query_BND.float(), memory_BPD.float()) / self.temperature
            weights = scores_BNP.softmax(dim=-1)
        num = num_candidates or self.config.num_candidates
        index = scores_BNP.topk(num, dim=-1).indices
        if self.config.mode == "weighted_sum":
            mean = torch.einsum("bnp,bpchw->bnchw", weights, pool.float()).to(pool.dtype)
            candidates = mean[:, :, None].expand(-1, -1, num, -1, -1, -1)
        else:
            candidates = StraightThroughGather.apply(weights, pool, index)
        return Retrieved(candidates, index, weights)


def embedding(config: RetrievalConfig) -> nn.Sequential:
    """theta or phi: conv3x3, leaky ReLU 0.2, conv1x1 (Sec. IV); flattened, it is the embedding [D]."""
    return nn.Sequential(
        nn.Conv2d(3, config.hidden_channels, 3, padding=1),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(config.hidden_channels, config.embed_channels, 1),
    )


@torch.no_grad()
def candidate_statistics(mask: Tensor, pool_yx: Tensor, index: Tensor, patch_size: int) -> dict[str, Tensor]:
    """What the candidates of a batch are made of, as means over its images.

    *mask* (B, 1, H, W) {0, 1}, 1 = hole; *pool_yx* (B, N_pool, 2); *index* (B, N, N_c) into the pool. Returns
    `candidates/intact`, the share of the candidates' pixels that are no hole pixels, and `candidates/distinct`, the
    share of the pool that is a candidate of any cell.
    """
    intact = 1 - cut(mask.float(), pool_yx, patch_size).mean((2, 3, 4))
    chosen = index.flatten(1)
    distinct = torch.zeros_like(intact).scatter_(1, chosen, 1.0)
    return {"candidates/intact": intact.gather(1, chosen).mean(), "candidates/distinct": distinct.mean()}
