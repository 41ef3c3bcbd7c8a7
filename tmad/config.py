"""The settings of the method: one frozen dataclass a part, the paper's values as defaults.

Under each field stands its meaning, its unit and its origin: **[P]** the paper states it, **[A]** the authors' own
published parts settle it, **[D]** decided here (docs/decisions). Values are checked when an object is made; an unknown
name or a value out of range raises `pydantic.ValidationError` (a `ValueError`) that names the field.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

RENAMED = {
    "critics": "discriminators",
    "lr_critics": "lr_discriminators",
    "results": "coarse_from",
    "best_measure": "best_metric",
}
"""Former names of settings, which saved runs still have."""

log = logging.getLogger(__name__)

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Unknown names, infinity and NaN are refused; shared by every settings class of the project."""

PositiveInt = Annotated[int, Field(gt=0)]
Width = Annotated[int, Field(gt=0, le=1024)]
"""Channels of a layer, capped so that a typo cannot exhaust memory."""
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]

SMALLEST_IMAGE = 32
"""Side of the smallest image that the global discriminator gives a score, pixels."""

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CarafeConfig:
    """Content-aware up-sampling (Wang et al. 2019), used by every up-block [P: Sec. IV]."""

    kernel: Annotated[int, Field(gt=0)] = 5
    """Side k_up of the reassembly kernel, in pixels of the input; odd [A]."""
    encoder_kernel: Annotated[int, Field(gt=0)] = 3
    """Side k_enc of the convolution that predicts the kernels; odd [A]."""
    mid_channels: Width = 64
    """Channels C_mid after compression; never more than the layer has [A]."""

    def __post_init__(self) -> None:
        for name in ("kernel", "encoder_kernel"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"carafe.{name} must be odd, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CoarseConfig:
    """Coarse network, Sec. III-A and Table I, first column."""

    base_width: Width = 16
    """Channels after the input convolution, doubled by each down-block; 16, 32 or 48 [A]."""
    num_down_blocks: PositiveInt = 3
    """Down-blocks, and as many up-blocks [P]."""
    num_res_blocks: PositiveInt = 8
    """Dilated residual blocks [P]."""
    dilations: tuple[PositiveInt, ...] = (2,)
    """Dilation of each residual block, repeated in turn [A: 2 in all of them]."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MemoryConfig:
    """Texture memory, Sec. III-B: which k x k windows of the intact area enter the pool."""

    pool_size: PositiveInt = 100
    """N_pool, patches in the memory of one image [P]."""
    rule: Literal["clean", "fewest"] = "fewest"
    """`clean`: windows without a hole pixel, at random (rectangles); `fewest`: those with the fewest hole pixels,
    ties at random (free-form) [P]."""
    stride_divisor: PositiveInt = 4
    """Candidate windows stand patch_size / stride_divisor pixels apart: 2 for rectangles, 4 for free-form [P]."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RetrievalConfig:
    """Patch retrieval, Eq. 2-5."""

    num_candidates: PositiveInt = 4
    """N_c, memory patches handed to PSNet for each cell [P]."""
    mode: Literal["sample", "weighted_sum"] = "sample"
    """`sample`: the exact patches, straight-through gradient (Eq. 4-5); `weighted_sum`: their softmax mean (Table IV,
    W-Sum)."""
    hidden_channels: Width = 32
    """Channels between conv3x3 and conv1x1 of theta and phi [D]."""
    embed_channels: Width = 8
    """Channels of theta and phi's output, flattened over the patch [D]."""
    temperature: PositiveFloat = 1.0
    """Divides the similarity before the softmax [P: 1]. Changes no ranking."""
    straight_through: bool = False
    """Let the gradients of PSNet's losses reach the softmax (Eq. 4-5) [P]. Off, retrieval learns from
    `loss.weight_retrieval` alone [D]: with the paper's path it collapses to one patch for all cells."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PSNetConfig:
    """Patch synthesis network, Sec. III-C and Table I, second and third column."""

    base_width: Width = 16
    """Channels after the input convolutions of backbone and texture encoder, doubled by each down-block [A]."""
    num_res_blocks: PositiveInt = 5
    """Residual blocks of the backbone [P]."""
    num_texture_res_blocks: PositiveInt = 2
    """Residual blocks of the texture encoder [P]."""
    spectral_norm: bool = True
    """Spectral normalisation of every convolution [P: "in PSNet"]."""
    overlap: Annotated[float, Field(ge=0, le=0.5)] = 0.5
    """How far a borrowed window reaches into each neighbouring cell, where the two are blended, as a share of
    patch_size; 0 = it ends at its cell's border [D]."""
    residual: Literal["none", "coarse", "detail"] = "detail"
    """What the linear output is added to: `none`, it is the result [P]; `coarse`, the coarse result; `detail`, the
    coarse result and the candidates' blended detail, with gains that PSNet predicts from place to place. Added to
    something it starts at zero, so that training starts there [D]."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TMADConfig:
    """The generator: everything that inference needs, and the `config.json` of a model artifact."""

    patch_size: PositiveInt = 32
    """k_p, side of a cell and of a memory patch, in pixels; a multiple of 4 [P]."""
    carafe: CarafeConfig = CarafeConfig()
    coarse: CoarseConfig = CoarseConfig()
    memory: MemoryConfig = MemoryConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    psnet: PSNetConfig = PSNetConfig()

    def __post_init__(self) -> None:
        if self.patch_size % 4 or self.patch_size < 8:
            raise ValueError(f"patch_size must be a multiple of 4 and at least 8, got {self.patch_size}")
        if self.patch_size % self.memory.stride_divisor:
            raise ValueError(
                f"memory.stride_divisor must divide patch_size ({self.patch_size}), got {self.memory.stride_divisor}"
            )
        if self.memory.pool_size < self.retrieval.num_candidates:
            raise ValueError(
                f"memory.pool_size must be at least retrieval.num_candidates ({self.retrieval.num_candidates}), "
                f"got {self.memory.pool_size}"
            )

    @property
    def overlap(self) -> int:
        """Pixels that a borrowed window reaches into each neighbouring cell."""
        return round(self.patch_size * self.psnet.overlap)

    @property
    def memory_stride(self) -> int:
        """s_pool, pixels between neighbouring candidate windows of the memory."""
        return self.patch_size // self.memory.stride_divisor

    @property
    def size_multiple(self) -> int:
        """Both sides of what the networks see are a multiple of this many pixels."""
        return math.lcm(self.patch_size, 2**self.coarse.num_down_blocks)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DiscriminatorsConfig:
    """The two discriminators, Sec. III-C."""

    patch_base_width: Width = 16
    """Channels after the patch discriminator's first convolution, doubled by each of its two down-blocks [A]."""
    global_base_width: Width = 64
    """Channels after the 70x70 discriminator's first convolution, up to 8 times that at the end [A]."""
    spectral_norm: bool = True
    """Spectral normalisation of both [D]."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """Weights of Eq. 1, 8 and 9 (Table II) and the penalty of the discriminators."""

    weight_hole: NonNegativeFloat = 6.0
    """lambda_hole of Eq. 1: l1 of the coarse output inside the hole [P]."""
    weight_valid: NonNegativeFloat = 1.0
    """lambda_valid of Eq. 1: l1 of the coarse output outside the hole [P]."""
    weight_l1: NonNegativeFloat = 1.0
    """lambda_l1 of Eq. 8: l1 between synthesized and true patch [P]."""
    weight_gan_patch: NonNegativeFloat = 0.05
    """lambda_gan^pd of Eq. 8: patch distribution loss [P]."""
    weight_perceptual: NonNegativeFloat = 0.02
    """lambda_percep of Eq. 8: VGG-19 features [P]."""
    weight_style: NonNegativeFloat = 0.0
    """Of the Gram matrices of the same features: they ask for the true patch's texture, wherever in the patch [D]."""
    weight_retrieval: NonNegativeFloat = 1.0
    """Of the expected l1 distance between the true patch and the memory's, sum_j S_j |T_j - p_gt|, which teaches
    retrieval; 0 = the paper's path alone, see `retrieval.straight_through` [D]."""
    weight_tv: NonNegativeFloat = 0.02
    """lambda_tv of Eq. 9: total variation over the hole and its one-pixel rim [P]."""
    weight_gan_global: NonNegativeFloat = 0.02
    """lambda_gan^blend of Eq. 9: global 70x70 discriminator [P]."""
    patch_region: Literal["cell", "hole"] = "hole"
    """What the terms of Eq. 6-8 see of a synthesized cell: `cell`, PSNet's whole output [P]; `hole`, the cell as it
    stands in the result, with the image's own pixels outside the hole [D]."""
    relativistic: bool = True
    """Relativistic patch distribution loss (Eq. 6-7); off = the ablation of Fig. 7."""
    gradient_penalty: NonNegativeFloat = 10.0
    """Weight of the gradient penalty in both discriminators [D: the value every related code base uses]."""
    gp_every: PositiveInt = 1
    """Apply the penalty at every n-th step, n times as strong [D]."""

    @property
    def uses_features(self) -> bool:
        """Whether a feature network is needed."""
        return bool(self.weight_perceptual or self.weight_style)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    """Adam, its schedule in images, and the averaged weights that are evaluated."""

    lr: PositiveFloat = 1e-4
    """Adam's learning rate at the start of each cosine period [P]."""
    lr_discriminators: PositiveFloat | None = None
    """The same for both discriminators; default: `lr` [P]."""
    lr_retrieval: PositiveFloat | None = None
    """The same for theta and phi; default: `lr` [P]. Two small layers bear a higher one [D]."""
    lr_coarse_joint: NonNegativeFloat | None = None
    """The same for the coarse network in the joint phase; default: `lr` [P]. Lower keeps PSNet's input from moving
    faster than PSNet learns; 0: the coarse network stays as it is, which saves its backward pass [D]."""
    min_lr: NonNegativeFloat = 1e-7
    """Learning rate at the end of each cosine period [A]."""
    betas: tuple[float, float] = (0.5, 0.999)
    """Adam's moment decays [D]."""
    cosine_periods: PositiveInt = 4
    """Cosine periods, with a restart between them, in each phase [P: "cosine restart"; A: four periods]."""
    clip_grad_norm: NonNegativeFloat = 10.0
    """Largest gradient norm of the generator and of each discriminator; 0 = no clipping [D]."""
    ema_halflife_images: NonNegativeFloat = 10_000.0
    """Images after which an old weight counts half in the averaged generator; 0 = no averaging [D]."""
    max_bad_steps: PositiveInt = 20
    """So many steps in a row with a loss or gradient that is not finite send the run back to its newest checkpoint;
    again before the next checkpoint, they stop it [D]."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingConfig:
    """Everything the optimisation step depends on."""

    model: TMADConfig = TMADConfig()
    discriminators: DiscriminatorsConfig = DiscriminatorsConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the networks' convolutions; losses, softmax and gradient penalty are always float32 [D]."""

    def __post_init__(self) -> None:
        if self.loss.uses_features and self.model.patch_size < 16:
            raise ValueError(
                f"VGG-19 halves a patch four times: with loss.weight_perceptual or loss.weight_style above 0, "
                f"model.patch_size must be at least 16, got {self.model.patch_size}"
            )


def check_choice(
    config: Any, choice: str, *, needs: Mapping[str, Sequence[str]], uses: Mapping[str, Sequence[str]]
) -> None:
    """Raise `ValueError` for a setting that the value of the setting *choice* needs and that is not given, or that has
    no effect beside it. *needs* and *uses*: settings, and the values of *choice* that each goes with."""
    chosen = getattr(config, choice)
    for name, kinds in {**needs, **uses}.items():
        value = getattr(config, name)
        given = value != type(config).__dataclass_fields__[name].default
        if given == (chosen in kinds) or (name in uses and not given):
            continue
        what = f"does not use {name} (got {value!r})" if given else f"needs {name}"
        with_ = " or ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
        raise ValueError(f"{choice}={chosen} {what}; {name} goes with {choice} {with_}")


def from_dict(kind: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Make a settings object from nested dictionaries, as `dataclasses.asdict` and JSON give them; former names are
    read as the present ones.

    Raises `ValueError` that lists every unknown name with the nearest known ones, or names the field whose value is
    of the wrong type or out of range.
    """
    values = renamed(values)
    unknown = list(_unknown_names(kind, values, ""))
    if unknown:
        raise ValueError(f"unknown setting in {kind.__name__}: " + "; ".join(unknown))
    return TypeAdapter(kind).validate_python(values)


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a saved run under their present names."""
    found = {}
    for name, value in values.items():
        # Beside its present name, a former one is refused like any unknown name.
        present = name if RENAMED.get(name) in values else RENAMED.get(name, name)
        if present != name:
            log.info("the setting %s is called %s now", name, present)
        found[present] = renamed(value) if isinstance(value, Mapping) else value
    return found


def _unknown_names(kind: Any, values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    types = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or known
            yield f"{prefix}{name} (did you mean {', '.join(near)}?)"
        elif is_dataclass(types[name]) and isinstance(value, Mapping):
            yield from _unknown_names(types[name], value, f"{prefix}{name}.")
