"""Validation: metrics of the EMA model on fixed images and masks, with pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch

from pipeline.report.pictures import picture_grid
from pipeline.train.context import TrainContext
from tmad.batch import Batch
from tmad.coarse import compose
from tmad.images import to_model, to_uint8
from tmad.metrics import measure
from tmad.model import TMAD
from tmad.patches import cell_corners, cut
from tmad.retrieval import Retrieval, patch_distances, retrieval_gain, retrieval_statistics, untrained_retrieval
from tmad.step import Phase
from tmad.swd import SMALLEST_LEVEL, SlicedWasserstein

METRICS = ("l1_hole_pct", "psnr_hole", "ssim_full", "seam_ratio_hole")
"""Of `tmad.metrics`, for the result and, with `coarse_` before the name, for the coarse result."""

TEXTURE = "swd_hole_truthscaled"
"""Of `tmad.swd`, for the result: what a smooth fill loses while its distortion is the best."""

TEXTURE_PATCHES = 2048
"""Of each level: what the workers hand to each other stays below 50 MB."""

RETRIEVAL = ("top", "untrained", "best", "random", "entropy", "distinct")
"""Of `retrieval.retrieval_statistics`, under `val/retrieval_...`; and `val/retrieval_gain`, from their means."""

COLLAPSED = 0.1
"""Share of different first candidates below which retrieval gives one patch to nearly all cells."""

NUM_PICTURES = 4

log = logging.getLogger(__name__)


@torch.no_grad()
def validate(
    model: TMAD, phase: Phase, batches: Iterable[Batch], context: TrainContext
) -> tuple[dict[str, float], np.ndarray | None]:
    """Mean metrics over the images of all workers, and a grid of this worker's first pictures.

    In the coarse phase only the coarse network is run; precomputed coarse results of a batch replace its own.
    Names: `val/psnr_hole` and so on for the result, `val/coarse_psnr_hole` for the coarse result, `val/images`. A
    metric that no image has a value for is left out.
    """
    kinds = ("coarse",) if phase == "coarse" else ("coarse", "result")
    names = [f"{'coarse_' if kind == 'coarse' else ''}{name}" for kind in kinds for name in METRICS]
    names += [f"retrieval_{name}" for name in RETRIEVAL if phase == "joint"]
    untrained = untrained_retrieval(model.config.retrieval).to(context.device)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    images = 0
    rows: list[tuple[str, dict[str, np.ndarray]]] = []
    texture: SlicedWasserstein | None = None
    for batch in batches:
        images += len(batch)
        pictures, retrieval = _run(model, untrained, phase, batch.to(context.device))
        truth, masks = _pixels(batch.image), batch.mask[:, 0].numpy()
        side = min(truth.shape[1:3])
        if texture is None and phase == "joint" and side >= SMALLEST_LEVEL:
            texture = SlicedWasserstein(side=side, max_patches=TEXTURE_PATCHES)
        for index, image_id in enumerate(batch.image_id):
            cells = {kind: pictures[kind][index] for kind in kinds}
            if texture is not None:
                texture.add(image_id, cells["result"], truth[index], masks[index])
            k = model.config.patch_size
            values = [
                value
                for kind in kinds
                for value in measure(cells[kind], truth[index], masks[index], METRICS, patch_size=k).values()
            ]
            values += [float(one[index]) for one in retrieval]
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
    if phase == "joint":
        top, none, best = (means[f"val/retrieval_{name}"] for name in ("top", "untrained", "best"))
        gain = retrieval_gain(top, none, best)
        means |= {} if gain is None else {"val/retrieval_gain": gain}
        if means["val/retrieval_distinct"] < COLLAPSED:
            log.warning(
                "retrieval has collapsed: %.0f %% of the hole cells of an image get a candidate of their own; see "
                "loss.weight_retrieval and retrieval.straight_through",
                100 * means["val/retrieval_distinct"],
            )
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


def _run(
    model: TMAD, untrained: Retrieval, phase: Phase, batch: Batch
) -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
    """Pictures by name, (B, H, W, 3) uint8, and each of `RETRIEVAL` by image (B,)."""
    image, mask = to_model(batch.image), batch.mask.float()
    if phase == "coarse":
        return {"coarse": _pixels(to_uint8(compose(model.predict_coarse(image, mask), image, mask)))}, []
    filled = None if batch.filled is None else to_model(batch.filled)
    out = model(image, mask, batch.pool_yx, batch.cells, filled)
    pictures = {"coarse": _pixels(to_uint8(out.coarse)), "result": _pixels(to_uint8(out.output))}
    k = model.config.patch_size
    corners = cell_corners(batch.cells, patch_size=k, width=image.shape[-1])
    counted = cut(mask, corners, k).flatten(2).amax(-1) > 0
    distances = patch_distances(out.pool, cut(image, corners, k))
    reference = untrained(cut(out.coarse, corners, k), out.pool, out.pool[..., :1, :1, :1]).index
    statistics = [
        retrieval_statistics((out.weights[one], out.candidate_index[one]), reference[one], distances[one], counted[one])
        for one in (slice(number, number + 1) for number in range(len(batch)))
    ]
    return pictures, [torch.stack([one[f"retrieval/{name}"] for one in statistics]) for name in RETRIEVAL]


def _pixels(images: torch.Tensor) -> np.ndarray:
    pixels: np.ndarray = images.permute(0, 2, 3, 1).cpu().numpy()
    return pixels
