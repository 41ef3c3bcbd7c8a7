"""The paper's ablations, as lists of runs: what is varied, and what the paper reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.sweep.space import Point


@dataclass(frozen=True)
class Study:
    """One table or figure of the ablation study, Sec. IV-B."""

    title: str
    claim: str
    """What the paper concludes."""
    variants: Mapping[str, Point]
    """Label -> settings on top of the run."""
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Label -> metric -> value, where the paper has a table."""
    hole_sides: tuple[float, ...] = ()
    """Sides of the square holes that the trained model is measured on, as shares of the image's; default: the masks of
    the validation set."""


def _row(l1: float, psnr: float, ssim: float, tv: float, fid: float) -> dict[str, float]:
    return {"l1_hole_pct": l1, "psnr_hole": psnr, "ssim_full": ssim, "TV": tv, "FID": fid}


STUDIES: Mapping[str, Study] = {
    "candidates": Study(
        title="Table IV: number of candidates, and their weighted sum",
        claim="The weighted sum harms structure and texture; fewer than four candidates cost texture, more than "
        "four bring no more.",
        variants={
            **{f"N_c = {count}": {"model.retrieval.num_candidates": count} for count in (1, 2, 4, 6)},
            "W-Sum": {"model.retrieval.mode": "weighted_sum"},
        },
        paper={
            "N_c = 1": _row(10.341, 17.119, 0.852, 11.52, 8.151),
            "N_c = 2": _row(10.336, 17.130, 0.859, 11.46, 8.147),
            "N_c = 4": _row(10.334, 17.203, 0.867, 11.23, 8.131),
            "N_c = 6": _row(10.335, 17.210, 0.864, 11.24, 8.130),
            "W-Sum": _row(10.602, 16.872, 0.853, 11.31, 8.602),
        },
    ),
    "relativistic": Study(
        title="Fig. 7: patch distribution loss with and without its relativistic terms",
        claim="Without them the model does not learn to use the texture of the memory.",
        variants={
            "relativistic": {"loss.relativistic": True},
            "not relativistic": {"loss.relativistic": False},
        },
    ),
    "retrieval": Study(
        title="What teaches retrieval (decision 024)",
        claim="Eq. 5: the straight-through gradient of PSNet's losses is enough.",
        variants={
            "expected distance": {"loss.weight_retrieval": 1.0, "model.retrieval.straight_through": False},
            "straight through": {"loss.weight_retrieval": 0.0, "model.retrieval.straight_through": True},
            "both": {"loss.weight_retrieval": 1.0, "model.retrieval.straight_through": True},
        },
    ),
    "blending": Study(
        title="Fig. 8: with and without the blending loss",
        claim="Without it (Eq. 9: global discriminator and total variation) the borders of patches show.",
        variants={
            "with blending loss": {},
            "without": {"loss.weight_gan_global": 0.0, "loss.weight_tv": 0.0},
        },
    ),
    "mask_size": Study(
        title="Fig. 9: influence of the hole's size",
        claim="Texture stays realistic as the hole grows, as a few patches of the intact area are enough.",
        variants={"T-MAD": {}},
        hole_sides=(0.125, 0.25, 0.375, 0.5, 0.625),
    ),
}
"""By name, for `--study`."""
