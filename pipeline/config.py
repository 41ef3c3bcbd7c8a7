"""Settings of a training run: one tree of frozen dataclasses, validated on creation, restored from JSON.

The method's own settings are those of `tmad.config`; here stand the data, the lengths, the machines and the records.
All lengths count images, so another batch size or number of workers keeps the schedule. The same tree is the command
line (`pipeline.runs.cli`), `runs/<name>/config.json`, the parameters in MLflow and a part of every checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.data.collection import ImagesConfig
from pipeline.errors import one_line
from pipeline.runs.settings import differences, flatten, matches
from tmad.config import (
    SMALLEST_IMAGE,
    STRICT,
    DiscriminatorsConfig,
    LossConfig,
    OptimConfig,
    PositiveFloat,
    PositiveInt,
    TMADConfig,
    TrainingConfig,
    from_dict,
)

NonNegativeInt = Annotated[int, Field(ge=0)]

ValidationMetric = Literal[
    "psnr_hole",
    "l1_hole_pct",
    "ssim_full",
    "swd_hole_truthscaled",
    "seam_ratio_hole",
    "retrieval_gain",
    "coarse_psnr_hole",
    "coarse_l1_hole_pct",
    "coarse_ssim_full",
]
"""What `train.validate` measures."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""What a run or a registered model may be called: it becomes a folder and a part of URIs."""

ALIAS = re.compile(r"(?!(?:latest|v\d+)$)[a-z0-9_-]{1,100}", re.IGNORECASE)
"""What an alias of a registered model may be called; MLflow keeps `latest` and `v3` for itself."""

VGG19_ADDRESS = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
"""torchvision's ImageNet weights of VGG-19."""

FREE_TO_CHANGE = (
    "data.images.max_bad_fraction",
    "init_allow_partial",
    "name",
    "runs",
    "perceptual.weights",
    "schedule.checkpoint_every_images",
    "schedule.keep_checkpoints",
    "schedule.log_every_images",
    "tracking.",
    "workers.",
)
"""Settings (a final dot: the whole group) that may differ when a run is resumed: they do not touch what is learned."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Where images come from: prepared sets, as `jobs/prepare.py` writes them; for training also photographs."""

    train: str | None = None
    """Folder or URI of the prepared training set; default: data/train, unless images.source names photographs."""
    val: str | None = None
    """Folder or URI of the prepared validation set, whose images are never trained on; default: the folder val
    beside the training set, data/val with images.source."""
    coarse_from: str | None = None
    """Folder or URI of precomputed coarse results that replace the coarse network (Table V): one file per image of both
    sets, matched by stem, of the crops' size."""
    flip: bool = True
    """Mirror training images left-right, every other time [D]."""
    images: ImagesConfig = ImagesConfig()

    def __post_init__(self) -> None:
        if self.train is not None and self.images.source is not None:
            raise ValueError(
                f"data.train ({self.train!r}) and data.images.source ({self.images.source!r}) both say what to train "
                "on; take one of them (`--data.train None` takes back what a preset says)"
            )
        if self.coarse_from is not None and self.images.source is not None:
            raise ValueError("data.coarse_from goes with a prepared set (data.train), not with data.images.source")
        if self.training_set == self.validation_set:
            raise ValueError(f"data.train and data.val must be different sets, both are {self.training_set!r}")

    @property
    def training_set(self) -> str | None:
        """`train`, resolved; `None` when training from photographs."""
        return (self.train or "data/train") if self.images.source is None else None

    @property
    def validation_set(self) -> str:
        """`val`, resolved."""
        if self.val is not None:
            return self.val
        beside, _, _ = (self.training_set or "data/train").rstrip("/").rpartition("/")
        return f"{beside}/val" if beside else "val"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleConfig:
    """Lengths of the run, all of them in images."""

    coarse_images: NonNegativeInt = 7_200_000
    """Images of the coarse phase, which trains the coarse network alone [P: 4 epochs of 1.8 million, Places]."""
    joint_images: NonNegativeInt = 16_000_000
    """Images of the joint phase, which trains everything [D: the paper does not say how long]."""
    batch_images: PositiveInt = 16
    """Global batch: images of one step over all workers [P: 4 on each of 4 GPUs]."""
    patches_per_image: PositiveInt = 64
    """N_ps, cells synthesized in each training image, a square number: they are drawn as a block. 25 covers every
    128-pixel rectangle, 64 all of 256x256 [D]."""
    validate_every_images: PositiveInt = 200_000
    """Images between validations of the averaged model; each phase ends with one."""
    validation_images: PositiveInt = 500
    """Images of a validation: the first of the validation set, with fixed masks."""
    checkpoint_every_images: PositiveInt = 50_000
    """Images between checkpoints, the most that a failure repeats; the end keeps one too."""
    keep_checkpoints: PositiveInt = 3
    """Checkpoints that stay in storage, the newest ones; with 1 there is none to fall back to if it is damaged."""
    best_metric: ValidationMetric = "psnr_hole"
    """The model with the best value of this metric of the validations (`val/...`) is kept too, in `best/`. Without
    `coarse_` it is measured in the joint phase alone."""
    stop_after_validations: PositiveInt | None = None
    """End the joint phase after this many validations in a row without a better `best_metric`; default: never."""
    log_every_images: PositiveInt = 1_600
    """Images between progress lines; metrics and the check that all workers hold equal weights come with them."""

    def __post_init__(self) -> None:
        if math.isqrt(self.patches_per_image) ** 2 != self.patches_per_image:
            raise ValueError(
                f"schedule.patches_per_image must be a square number (4, 9, 16, 25, ...), got "
                f"{self.patches_per_image}: the cells of an image are drawn as a block"
            )
        if self.coarse_images + self.joint_images < self.batch_images:
            raise ValueError(
                f"a run must train at least one batch ({self.batch_images} images), got schedule.coarse_images="
                f"{self.coarse_images} and schedule.joint_images={self.joint_images}"
            )

    @property
    def total_images(self) -> int:
        """Images of both phases."""
        return self.coarse_images + self.joint_images


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WorkersConfig:
    """Processes that train, what each gets, and how often they may fail."""

    num_workers: PositiveInt = 1
    """Training processes; they share each batch and compute what one process would."""
    min_workers: PositiveInt | None = None
    """Train with fewer workers, this many at least, while machines are missing, and with more as they return;
    default: wait for all `num_workers`. Each change resumes from the newest checkpoint. Ray counts only what workers
    ask for: without GPUs, choose `cpus_per_worker` so that one CPU stays free to read data."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray sets aside for each; one more must be free in the cluster to read data."""
    record_tasks: PositiveInt | None = None
    """With data.images.source, tasks that make records for each worker side by side; default: as many as the CPUs that
    training leaves free, 16 at most."""
    use_gpu: bool = False
    """Give each a GPU, or the share `gpus_per_worker` of one."""
    gpus_per_worker: PositiveFloat = 1.0
    """GPUs of each with `use_gpu`; below 1, runs of one worker share a GPU and its memory."""
    threads: PositiveInt | None = None
    """Threads of PyTorch's CPU operations in each; default: `cpus_per_worker`, rounded down."""
    compile: bool = False
    """Have PyTorch compile the networks and the gradient penalty when a worker starts, which takes a minute or more
    and wants a C++ compiler (CPU) or Triton (GPU). Results differ in the last bits."""
    channels_last: bool | None = None
    """Keep the colours of a pixel beside each other in the networks' weights and activations; default: on GPUs. Results
    differ in the last bits."""
    tf32: bool = True
    """On GPUs, let convolutions and matrix products that stay in float32 round their factors to TF32."""
    max_failures: NonNegativeInt = 8
    """Worker failures that the run survives, each time from its newest checkpoint; one more stops it."""
    controller_failure_limit: NonNegativeInt = 10
    """Attempts to get the workers that may fail (a node gone for good) before the run stops instead of waiting for
    ever."""
    stop_grace_s: Annotated[float, Field(ge=0)] = 30.0
    """Seconds after SIGTERM for the step under way and a last checkpoint; 0 ends the job at once, without one."""
    start_timeout_s: PositiveFloat = 600.0
    """Seconds to wait for a joined cluster to grow to the resources asked for."""

    def __post_init__(self) -> None:
        if not self.fewest <= self.num_workers:
            raise ValueError(f"min_workers must be at most num_workers ({self.num_workers}), got {self.min_workers}")

    @property
    def fewest(self) -> int:
        """`min_workers`, resolved."""
        return self.min_workers or self.num_workers

    @property
    def lays_channels_last(self) -> bool:
        """`channels_last`, resolved."""
        return self.use_gpu if self.channels_last is None else self.channels_last

    @property
    def numbers(self) -> range:
        """How many workers there may be, the most first."""
        return range(self.num_workers, self.fewest - 1, -1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingConfig:
    """MLflow: where the run is recorded and under which name its model is registered."""

    uri: str | None = None
    """Tracking server or `sqlite:///path/mlflow.db`; default: MLFLOW_TRACKING_URI, else SQLite under `runs`; `none` in
    words = no MLflow."""
    wait_s: Annotated[float, Field(ge=0)] = 600.0
    """Seconds to wait at the end of a run for a server that is away. Then the job ends with code 1, the model is in the
    run's folder, and the same command does the rest."""
    experiment: Annotated[str, Field(min_length=1, max_length=500)] = "tmad"
    """MLflow experiment."""
    register: bool = True
    """Register the model at the end."""
    registered_name: str = "tmad"
    """Name in the model registry."""
    alias: str = "champion"
    """Alias that the first version of a name gets, `models:/<registered_name>@<alias>`; later ones have to earn it
    (jobs/promote.py)."""
    parent_run: str | None = None
    """Id of the MLflow run that this one is nested in, a sweep's."""

    def __post_init__(self) -> None:
        check_registered("tracking.registered_name", self.registered_name, "tracking.alias", self.alias)


def check_registered(name_setting: str, name: str, alias_setting: str, alias: str) -> None:
    """Raise `ValueError` unless `models:/<name>@<alias>` can be; the settings are those that say so."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name_setting} must be letters, digits, '.', '_' and '-', at most 100, starting with a letter or digit, "
            f"got {name!r}"
        )
    if not ALIAS.fullmatch(alias):
        raise ValueError(
            f"{alias_setting} must be letters, digits, '_' and '-', at most 100, and neither `latest` nor like `v3`, "
            f"which MLflow keeps for itself, got {alias!r}"
        )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PerceptualConfig:
    """Features of the perceptual loss (Eq. 8) and where their weights come from."""

    features: Literal["vgg19", "untrained", "off"] = "vgg19"
    """`vgg19`: ImageNet weights [P]; `untrained`: the same network with seeded random weights; `off`: no such term.
    The last two depart from the paper: the run says so and records it."""
    convolutions: tuple[Annotated[int, Field(ge=1, le=15)], ...] = (5, 9, 15)
    """Convolutions of VGG-19, counted from 1, whose outputs before the ReLU are compared [P]. Without 9 and 15
    the deeper layers are not computed and need not be in the file."""
    weights: str = "download"
    """File or URI of torchvision's VGG-19 (.pth), or `download` for its standard address."""
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{0,64}$")] = "dcbb9e9d"
    """First digits of the file's SHA-256; empty = take the file as it is."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """One training run."""

    name: str | None = None
    """Name of the run and of its folder; default: a new unique one. An unfinished run of that name is continued, a
    finished one left as it is; one with other settings is refused."""
    seed: NonNegativeInt = 0
    """Seed of everything random: first weights, order of images, flips, cells."""
    runs: str = "runs"
    """Folder or URI that holds all runs; on several machines one that all of them see."""
    init_from: str | None = None
    """Model that a new run takes its first weights from: artifact folder, checkpoint, run, URI or
    `models:/name@alias`; a checkpoint gives both discriminators too. Default: random weights. Optimizers and averages
    start fresh; a run that is continued does not look at it again."""
    init_networks: Literal["all", "coarse"] = "all"
    """Networks that are taken from there: all that it has, or the coarse network alone, which goes with
    schedule.coarse_images = 0 for joint training from a given coarse network."""
    init_allow_partial: bool = False
    """Take the layers that fit and leave the others random, instead of stopping at the first that does not."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: networks under autocast, losses and gradient penalty in fp32; `fp32` everywhere."""
    model: TMADConfig = TMADConfig()
    discriminators: DiscriminatorsConfig = DiscriminatorsConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    workers: WorkersConfig = WorkersConfig()
    perceptual: PerceptualConfig = PerceptualConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ValueError(
                f"name must be letters, digits, '.', '_' and '-', at most 100, starting with a letter or digit, "
                f"got {self.name!r}"
            )
        for number in self.workers.numbers:
            if self.schedule.batch_images % number:
                what = (
                    "workers.num_workers" if number == self.workers.num_workers else "each number from min_workers on"
                )
                raise ValueError(
                    f"schedule.batch_images must be a multiple of {what} ({number}), "
                    f"got {self.schedule.batch_images}: every worker takes an equal share of each batch"
                )
        block = math.isqrt(self.schedule.patches_per_image) * self.model.patch_size
        if self.loss.weight_gan_global and block < SMALLEST_IMAGE:
            raise ValueError(
                f"the global discriminator needs {SMALLEST_IMAGE} pixels: schedule.patches_per_image "
                f"({self.schedule.patches_per_image}) cells of {self.model.patch_size} are a block of {block}; take "
                "more cells, or set loss.weight_gan_global to 0"
            )
        if self.data.coarse_from is not None and self.schedule.coarse_images:
            raise ValueError(
                f"with data.coarse_from the coarse network is not trained: schedule.coarse_images must be 0, got "
                f"{self.schedule.coarse_images}"
            )
        if self.init_from is None and (self.init_networks != "all" or self.init_allow_partial):
            raise ValueError("init_networks and init_allow_partial say how init_from is taken; it is not given")
        if self.data.images.source is not None:
            try:
                self.data.images.records(patch_size=self.model.patch_size, memory=self.model.memory)
            except ValueError as error:
                raise ValueError(f"data.images does not fit model: {one_line(error)}") from None

    @property
    def training(self) -> TrainingConfig:
        """The part that the training step needs; `perceptual.features = off` is weights of 0 there."""
        loss = (
            self.loss
            if self.perceptual.features != "off"
            else replace(self.loss, weight_perceptual=0.0, weight_style=0.0)
        )
        return TrainingConfig(
            model=self.model, discriminators=self.discriminators, loss=loss, optim=self.optim, precision=self.precision
        )

    @property
    def threads(self) -> int:
        """Threads of each worker."""
        return self.workers.threads or max(1, int(self.workers.cpus_per_worker))


def to_json(config: RunConfig) -> str:
    """The configuration as indented JSON; `from_json` reads it back to an equal object."""
    return json.dumps(asdict(config), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str | bytes) -> RunConfig:
    """Read what `to_json` wrote. Raises `ValueError` for broken JSON, unknown names (with near ones) and bad values."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a run configuration: broken JSON in line {error.lineno} ({error.msg})") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"not a run configuration: expected a JSON object, got {type(values).__name__}")
    return from_dict(RunConfig, values)


def digest(config: RunConfig) -> str:
    """16 hex digits that name what is learned: equal for configurations that `resumable` calls equal."""
    text = json.dumps(_what_is_learned(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(old: RunConfig, new: RunConfig, *, ignore: Iterable[str] = ()) -> list[str]:
    """Changed settings, one readable line each: `optim.lr: 0.0001 -> 0.0002`; *ignore* as in `FREE_TO_CHANGE`."""
    return differences(asdict(old), asdict(new), free=ignore)


def refusal(old: RunConfig, new: RunConfig) -> list[str]:
    """Why *new* cannot continue a run begun with *old*: differences in what is learned; `None` if it can."""
    return difference(old, new, ignore=FREE_TO_CHANGE)


def with_name(config: RunConfig, name: str) -> RunConfig:
    """The same run under *name*."""
    return replace(config, name=name)


def _what_is_learned(config: RunConfig) -> dict[str, Any]:
    # A run without what came later keeps the digest that it had before.
    unused = [] if config.init_from is not None else ["init_from", "init_networks"]
    unused += [] if config.data.coarse_from is not None else ["data.coarse_from"]
    return {
        key: value for key, value in flatten(asdict(config)).items() if not matches(key, (*FREE_TO_CHANGE, *unused))
    }
