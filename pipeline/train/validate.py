"""Measures of the averaged model on fixed validation images with fixed masks, and the pictures that go with them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from pipeline.report import picture_grid
from pipeline.train.context import TrainContext
from tmad.batch import Batch
from tmad.coarse import compose
from tmad.images import to_model, to_uint8
from tmad.metrics import measure
from tmad.model import TMAD
from tmad.step import Phase
from tmad.swd import SMALLEST_LEVEL, SlicedWasserstein

MEASURES = ("l1_hole_pct", "psnr_hole", "ssim_full")
"""Of `tmad.metrics`, for the result and, with `coarse_` before the name, for the coarse result."""

TEXTURE = "swd_hole_truthscaled"
"""Of `tmad.swd`, for the result: what a smooth fill loses while its distortion is the best."""

TEXTURE_PATCHES = 2048
"""Of each level: what the workers hand to each other stays below 50 MB."""

NUM_PICTURES = 4


@torch.no_grad()
def validate(
    model: TMAD, phase: Phase, batches: Iterable[Batch], context: TrainContext
) -> tuple[dict[str, float], np.ndarray | None]:
    """Mean measures over the images of all workers, and a grid of this worker's first pictures.

    In the coarse phase only the coarse network is run; of a batch with somebody's results, those are the coarse ones.
    Names: `val/psnr_hole` and so on for the result, `val/coarse_psnr_hole` for the coarse result, `val/images`. A
    measure that no image has a value for is left out.
    """
    kinds = ("coarse",) if phase == "coarse" else ("coarse", "result")
    names = [f"{'coarse_' if kind == 'coarse' else ''}{name}" for kind in kinds for name in MEASURES]
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    images = 0
    rows: list[tuple[str, dict[str, np.ndarray]]] = []
    texture: SlicedWasserstein | None = None
    for batch in batches:
        images += len(batch)
        pictures = _run(model, phase, batch.to(context.device))
        truth, masks = _pixels(batch.image), batch.mask[:, 0].numpy()
        side = min(truth.shape[1:3])
        if texture is None and phase == "joint" and side >= SMALLEST_LEVEL:
            texture = SlicedWasserstein(side=side, max_patches=TEXTURE_PATCHES)
        for index, image_id in enumerate(batch.image_id):
            cells = {kind: pictures[kind][index] for kind in kinds}
            if texture is not None:
                texture.add(image_id, cells["result"], truth[index], masks[index])
            values = [
                value for kind in kinds for value in measure(cells[kind], truth[index], masks[index], MEASURES).values()
            ]
            for row, value in enumerate(values):
                if value is not None:
                    sums[row] += torch.tensor([value, 1.0], dtype=torch.float64)
            if len(rows) < NUM_PICTURES:
                given = np.where(masks[index][..., None] > 0, np.uint8(255), truth[index])
                rows.append((image_id, {"input": given, **cells, "truth": truth[index]}))
    total = torch.cat([sums.flatten(), torch.tensor([float(images)], dtype=torch.float64)])
    total = context.workers.mean(total.to(context.device)).cpu() * context.world_size
    means = {
        f"val/{name}": float(value / count)
        for name, (value, count) in zip(names, total[:-1].view(-1, 2), strict=True)
        if count > 0
    }
    means |= _texture(texture, phase, context)
    return {**means, "val/images": float(total[-1].round())}, picture_grid(rows) if rows else None


def _texture(own: SlicedWasserstein | None, phase: Phase, context: TrainContext) -> dict[str, float]:
    """The distance over the images of all workers; nothing where no image has patches in its hole."""
    if phase == "coarse":
        return {}
    collected = [one for one in context.everyones((own.side, own.state()) if own else None) if one is not None]
    if not collected:
        return {}
    whole = SlicedWasserstein(side=collected[0][0], max_patches=TEXTURE_PATCHES)
    for _, state in collected:
        whole.merge(state)
    value = whole.values()[TEXTURE]
    return {} if value is None else {f"val/{TEXTURE}": value}


def _run(model: TMAD, phase: Phase, batch: Batch) -> dict[str, np.ndarray]:
    """Pictures by name, (B, H, W, 3) uint8."""
    image, mask = to_model(batch.image), batch.mask.float()
    if phase == "coarse":
        return {"coarse": _pixels(to_uint8(compose(model.predict_coarse(image, mask), image, mask)))}
    filled = None if batch.filled is None else to_model(batch.filled)
    out = model(image, mask, batch.pool_yx, batch.cells, filled)
    return {"coarse": _pixels(to_uint8(out.coarse)), "result": _pixels(to_uint8(out.output))}


def _pixels(images: torch.Tensor) -> np.ndarray:
    pixels: np.ndarray = images.permute(0, 2, 3, 1).cpu().numpy()
    return pixels
