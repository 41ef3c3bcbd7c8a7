"""Geometry of patches: parts of images, the grid of cells, cutting by coordinates, tiling back.

Shapes: B images, N patches of an image, k patch side, H W image sides (multiples of k). A cell is one k x k square of
the non-overlapping grid, named by its raster index in the (H/k) x (W/k) grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Part = tuple[slice, slice]
"""Rows and columns of an image."""


def grown(part: Part, by: int, height: int, width: int) -> Part:
    """*part* with *by* pixels more on all sides, as far as the image goes."""
    rows, columns = part
    return (
        slice(max(0, rows.start - by), min(height, rows.stop + by)),
        slice(max(0, columns.start - by), min(width, columns.stop + by)),
    )


def within(part: Part, whole: Part) -> Part:
    """*part* as seen from the corner of *whole*."""
    rows, columns = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, whole, strict=True))
    return rows, columns


def reduced(part: Part, divisor: int) -> Part:
    """*part* in an image whose sides are divided by *divisor*: all pixels that it has a share in."""
    rows, columns = (slice(one.start // divisor, -(-one.stop // divisor)) for one in part)
    return rows, columns


def enlarged(part: Part, factor: int) -> Part:
    """*part* in an image whose sides are multiplied by *factor*."""
    rows, columns = (slice(factor * one.start, factor * one.stop) for one in part)
    return rows, columns


def cell_corners(cells: Tensor, *, patch_size: int, width: int) -> Tensor:
    """Top-left corners (..., 2), rows before columns, of cells (...) in an image *width* pixels wide."""
    columns = width // patch_size
    return torch.stack([cells // columns, cells % columns], dim=-1) * patch_size


def cut(image: Tensor, corners: Tensor, size: int) -> Tensor:
    """Cut size x size patches out of each image, by coordinates.

    *image* (B, C, H, W); *corners* (B, N, 2) integers, every window inside the image. Returns (B, N, C, size, size);
    differentiable in *image*, bit-exact copies of its pixels.
    """
    batch, channels, height, width = image.shape
    first = corners[..., 0] * width + corners[..., 1]
    first = first + torch.arange(0, batch * height * width, height * width, device=image.device)[:, None]
    index = first[..., None, None] + torch.arange(size * width, device=image.device).view(size, width)[:, :size]
    # Pixels as rows of a table: one lookup for all channels, and a dense, deterministic backward.
    pixels = image.permute(0, 2, 3, 1).reshape(-1, channels)
    patches = F.embedding(index, pixels)
    return patches.permute(0, 1, 4, 2, 3)


def all_cells(image: Tensor, patch_size: int) -> Tensor:
    """All cells (B, N, C, k, k) of each image (B, C, H, W), in raster order: what `cut` gives at their corners."""
    k = patch_size
    return image.unflatten(3, (-1, k)).unflatten(2, (-1, k)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def tile(image: Tensor, patches: Tensor, cells: Tensor) -> Tensor:
    """Put patches back onto their cells (Sec. III-C, "allocated back to the original position").

    *image* (B, C, H, W) is kept wherever no patch goes; *patches* (B, N, C, k, k); *cells* (B, N). A cell named twice
    gets the same patch twice or either of them. Returns a new (B, C, H, W); differentiable in both.
    """
    batch, channels, height, width = image.shape
    k = patches.shape[-1]
    rows, columns = height // k, width // k
    grid = image.reshape(batch, channels, rows, k, columns, k).permute(0, 2, 4, 1, 3, 5)
    grid = grid.reshape(batch, rows * columns, channels, k, k)
    where = torch.arange(batch, device=image.device)[:, None].expand_as(cells)
    grid = grid.index_put((where, cells), patches.to(grid.dtype))
    grid = grid.reshape(batch, rows, columns, channels, k, k).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, channels, height, width)
