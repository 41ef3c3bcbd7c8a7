"""Settings of a batch inpainting job."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.storage import absolute
from tmad.config import STRICT, PositiveFloat, PositiveInt, check_choice
from tmad.files import Kind
from tmad.holes import MASK_THRESHOLD, Colour, MaskRule, MaskValue
from tmad.images import MAX_PIXELS
from tmad.inpaint import CONTEXT, LIMIT, Policy, Precision

MaskFrom = Literal["paired", "alpha", "colour", "column", "boxes", "one"]
NonNegativeInt = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HolesConfig:
    """Where the holes come from."""

    mask_from: MaskFrom = "paired"
    """`paired`: a mask for each image in masks; `alpha`: the transparent part of the image; `colour`: where the image
    has mask_colour; `column`: mask_column of a Parquet input; `boxes`: a JSON file, masks; `one`: one mask file, masks,
    for all images."""
    masks: str | None = None
    """Folder, tar files, Parquet, list or URI of the masks; with boxes the JSON file, with one the mask file."""
    mask_hole: Colour = "white"
    """Which colour of a mask is the hole."""
    mask_value: MaskValue = "grey"
    """What of a mask counts: `grey`, its brightest channel; `nonzero`, all that is not 0, such as labels;
    `alpha`, its alpha channel, where opaque is white."""
    mask_threshold: Annotated[int, Field(ge=0, le=254)] = MASK_THRESHOLD
    """Values of a mask above it are white, on a scale to 255."""
    scale_masks: bool = False
    """Bring masks to the size of their images (nearest pixel), instead of refusing those of another size."""
    mask_suffix: str = ""
    """What a mask's name has behind its image's: `_mask` pairs a/b.jpg with a/b_mask.png. Several masks of one image
    are joined: those whose names differ in their ending, and all in a folder a/b/."""
    mask_pattern: str | None = None
    """In place of the suffix: a regular expression for a mask's whole path without ending, whose first group is that of
    its image: `(.+)_mask\\d*`."""
    mask_column: str | None = None
    """Column of a Parquet input with the masks."""
    mask_colour: Annotated[str, Field(pattern="^#?[0-9a-fA-F]{6}$")] | None = None
    """Colour of the hole in the image itself, as #ff00ff."""
    mask_tolerance: NonNegativeInt = 0
    """Grey levels by which each channel may differ from mask_colour; JPEG needs some 40."""
    dilate: NonNegativeInt = 0
    """Pixels by which holes are grown."""
    without_hole: Literal["skip", "copy"] = "skip"
    """What is done with images that have no mask, or none with a hole in it: `copy` writes them as they are."""
    refuse_inverted: bool = False
    """Refuse masks that look inverted (most of the image and of its border is hole) instead of noting it."""

    def __post_init__(self) -> None:
        pictures = ("paired", "one", "column")
        check_choice(
            self,
            "mask_from",
            needs={"masks": ("paired", "boxes", "one"), "mask_column": ("column",), "mask_colour": ("colour",)},
            uses={
                **dict.fromkeys(("mask_hole", "mask_value", "mask_threshold", "scale_masks"), pictures),
                **{"mask_suffix": ("paired",), "mask_pattern": ("paired",), "mask_tolerance": ("colour",)},
            },
        )
        if self.mask_suffix and self.mask_pattern:
            raise ValueError("mask_suffix and mask_pattern both say how masks are paired; give one of them")
        self.mask_rule  # noqa: B018 - refuses what contradicts itself
        if self.mask_pattern is not None:
            try:
                groups = re.compile(self.mask_pattern).groups
            except re.error as error:
                raise ValueError(f"mask_pattern is no regular expression: {error}") from None
            if groups < 1:
                raise ValueError(f"mask_pattern needs a group for the image's path, got {self.mask_pattern!r}")

    @property
    def mask_rule(self) -> MaskRule:
        """How masks are read."""
        return MaskRule(self.mask_hole, self.mask_value, self.mask_threshold)

    @property
    def masks_may_lie_among_images(self) -> bool:
        """Whether names tell masks from images."""
        return self.mask_from == "paired" and bool(self.mask_suffix or self.mask_pattern)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InpaintConfig(HolesConfig):
    """A batch inpainting job."""

    input: str
    """Images: a folder, tar files, Parquet or a list, by path or URI. On several machines: where all of them see it."""
    output: str
    """Folder or URI of the results, with the same tree and names, and of ledger.parquet."""
    model: str = "builtin"
    """Model folder, checkpoint, run folder, URI, models:/name@alias, or `builtin`, the one in the box."""
    root: str | None = None
    """Where the images of a list are; default: the list's folder."""
    image_column: str | None = None
    """Column of a Parquet input with the encoded images; default: image, image_bytes, bytes or jpg."""
    key_column: str | None = None
    """Column of a Parquet input with the names of the results; default: FILE#ROW."""
    coarse_from: str | None = None
    """Results of another method for the same images, named like them: retrieval and PSNet refine these, and the coarse
    network is not asked."""
    format: Kind = "same"
    """`same`: each result in its image's format; `png`: all as PNG, ending .png."""
    policy: Policy = "crop"
    """What the coarse network sees: `crop`, each group of holes with context around it; `resize`, the whole picture
    reduced to limit; `original`, the whole picture. Texture is made at full size always."""
    context: NonNegativeInt = CONTEXT
    """Pixels around a hole that crop shows the networks."""
    limit: PositiveInt = LIMIT
    """Longest side, in pixels, that the coarse network is shown at full size; larger parts are reduced to it. Bounds
    memory, except with original."""
    feather: NonNegativeInt = 0
    """Pixels around the hole over which the result passes into the picture; these change, too."""
    in_place: bool = False
    """Allow an output that is the input, whose files are then replaced, or that lies in it."""
    retry_failed: bool = False
    """Try inputs again that the ledger says have failed; otherwise they are left as they are, unless image or mask have
    changed."""
    again: bool = False
    """Do everything again, whatever the ledger says."""
    tracking_uri: str | None = None
    """MLflow for a models:/ reference and for the record of this job; default: MLFLOW_TRACKING_URI, and without it no
    record; the word `none`: no record."""
    num_actors: PositiveInt | None = None
    """Copies of the model that work side by side; default: one per GPU, or per CPU."""
    cpus_per_actor: PositiveFloat | None = None
    """CPUs, and threads, of each copy; default: 1, and with use_gpu an equal share of all."""
    use_gpu: bool = False
    """Give each copy a GPU, or the share `gpus_per_actor` of one."""
    gpus_per_actor: PositiveFloat = 1.0
    """GPUs of each copy with `use_gpu`; below 1, several copies share one, where a single process cannot decode and
    encode fast enough for it."""
    precision: Precision | None = None
    """Of coarse network and PSNet: `bf16` or `fp32`; default: bf16 with use_gpu, else fp32."""
    cells_per_chunk: PositiveInt = 256
    """Hole cells synthesized at once: bounds the memory of large holes."""
    images_per_task: PositiveInt | None = None
    """Images that one call works through, and what is repeated when a copy is lost; default: 16, and 256 with
    use_gpu, as the device has nothing to do at a task's start and end."""
    seed: int = 0
    """Keys the choice of the texture memory; the same seed gives the same bytes."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Images of more pixels are refused before they are decoded."""
    lease_expiry_s: PositiveFloat = 60.0
    """Seconds without a sign of life after which another job may take the output over."""

    def with_absolute_places(self) -> InpaintConfig:
        """The same for any process, whatever its working directory."""
        names = ("input", "output", "masks", "root", "coarse_from")
        places: dict[str, Any] = {name: absolute(place) for name in names if (place := getattr(self, name))}
        return replace(self, **places)

    def identity(self, model_digest: str) -> str:
        """16 hex digits that stand for all that decides the bytes of a result, beside image and mask."""
        loose = {
            *("input", "output", "model", "root", "image_column", "in_place", "retry_failed", "again"),
            "tracking_uri",
            *(
                "num_actors",
                "cpus_per_actor",
                "gpus_per_actor",
                "images_per_task",
                "max_pixels",
                "lease_expiry_s",
                "masks",
                "key_column",
            ),
        }
        decides: dict[str, Any] = {name: value for name, value in asdict(self).items() if name not in loose}
        text = json.dumps([model_digest, decides], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
