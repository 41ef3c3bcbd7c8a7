"""The losses of T-MAD (Eq. 1, 6-10) as pure functions; their weights are applied in `step`.

A mean over images is a mean over equal shares, so that the average of several workers' losses is the loss of the whole
batch. The relativistic expectations of Eq. 6-7 are no such mean: they take the workers' common value through *mean*.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Mean = Callable[[Tensor], Tensor]
"""Mean of a scalar over all workers, differentiable; the identity for one worker."""


def region_l1(result: Tensor, truth: Tensor, region: Tensor) -> Tensor:
    """Mean |result - truth| over the pixels of *region*, image by image, then over the batch (Eq. 1) [D].

    *result*, *truth* (B, C, H, W); *region* (B, 1, H, W) {0, 1}. An image with an empty region counts as 0. Each
    region's mean is its own, so that a weight means the same for small and large holes.
    """
    # |I_s - I|_1 over M, or over 1 - M: one of the two terms of Eq. 1.
    difference = ((result - truth).abs() * region).flatten(1).sum(1)
    count = region.flatten(1).sum(1) * result.shape[1]
    return (difference / count.clamp(min=1)).mean()


def patch_discriminator_loss(real: Tensor, fake: Tensor, *, relativistic: bool, mean: Mean) -> Tensor:
    """Eq. 6, the discriminator of the patch distribution; without *relativistic* the standard logistic loss (Fig. 7).

    *real*: raw scores C(x_r) of the candidates and true patches together; *fake*: C(x_f) of the synthesized ones.
    """
    centre_fake, centre_real = _centres(real, fake, relativistic, mean)
    # E[f1(C(x_r) - E C(x_f))] + E[f2(C(x_f) - E C(x_r))] with f1(z) = softplus(-z) and f2(z) = softplus(z).
    return F.softplus(-(real - centre_fake)).mean() + F.softplus(fake - centre_real).mean()


def patch_generator_loss(memory: Tensor, real: Tensor, fake: Tensor, *, relativistic: bool, mean: Mean) -> Tensor:
    """Eq. 7, the generator of the patch distribution; without *relativistic* the non-saturating loss alone (Fig. 7).

    *memory*: raw scores over the whole texture memory, the compensation term that draws the mean of the synthesized
    patches to that of the intact area; *real*: scores of candidates and true patches; *fake*: of synthesized ones.
    """
    if not relativistic:
        return F.softplus(-fake).mean()
    centre_fake, centre_real = _centres(real, fake, relativistic, mean)
    # E_T[g1(C(x) - E C(x_f))] + E[g2(C(x_f) - E C(x_r))] with g1(z) = softplus(z) and g2(z) = softplus(-z).
    return F.softplus(memory - centre_fake).mean() + F.softplus(-(fake - centre_real)).mean()


def _centres(real: Tensor, fake: Tensor, relativistic: bool, mean: Mean) -> tuple[Tensor, Tensor]:
    """E C(x_f) and E C(x_r) over the global batch; zeros in the ablation."""
    if not relativistic:
        return fake.new_zeros(()), fake.new_zeros(())
    return mean(fake.mean()), mean(real.mean())


def global_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Discriminator of the blending loss (Eq. 9): logistic loss on raw scores of I and of the tiled result."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def global_generator_loss(fake: Tensor) -> Tensor:
    """Generator's side of the blending loss (Eq. 9), non-saturating."""
    return F.softplus(-fake).mean()


def expected_distance(weights: Tensor, distances: Tensor, counted: Tensor) -> Tensor:
    """What teaches retrieval: sum_j S_j |T_j - p_gt|, the l1 distance to the true patch that is expected of a memory
    patch drawn from S [D].

    Like Eq. 5, it makes dL/dS_j a property of the memory patch T_j alone. *weights* S and *distances* (B, N, P);
    *counted* (B, N) bool, cells whose truth the memory has to guess. A mean over those cells, image by image.
    """
    expected = (weights * distances).sum(-1) * counted
    return (expected.sum(1) / counted.sum(1).clamp(min=1)).mean()


def total_variation(image: Tensor, mask: Tensor) -> Tensor:
    """Total variation of *image* over the hole and its one-pixel rim (Eq. 9) [D: the region and the mean].

    *image* (B, C, H, W); *mask* (B, 1, H, W) {0, 1}, 1 = hole. Absolute differences between neighbours of which at
    least one lies in the hole, averaged over such pairs in each direction, image by image, then over the batch.
    """
    total = image.new_zeros(())
    for axis in (-2, -1):
        size = image.shape[axis] - 1
        step = image.narrow(axis, 1, size) - image.narrow(axis, 0, size)
        pairs = torch.maximum(mask.narrow(axis, 1, size), mask.narrow(axis, 0, size))
        total = total + region_l1(step, torch.zeros_like(step), pairs)
    return total
