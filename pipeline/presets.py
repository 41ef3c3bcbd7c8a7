"""Named training runs: functions that return a complete configuration. Variants call one and `replace` fields.

`jobs/train_places.py --preset NAME` starts from one; single settings go on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.config import DataConfig, PerceptualConfig, RunConfig, ScheduleConfig, TrackingConfig, WorkersConfig
from tmad.config import (
    CarafeConfig,
    CoarseConfig,
    DiscriminatorsConfig,
    LossConfig,
    MemoryConfig,
    OptimConfig,
    PSNetConfig,
    RetrievalConfig,
    TMADConfig,
)

PSNET_ITERATIONS = 10_000
"""Steps of PSNet on precomputed coarse results [P]."""

COARSE_EPOCHS = 4
"""Epochs of the coarse network alone [P]."""

PAPER_BATCH = 16
"""Images of a step: four on each of four GPUs [P]."""

GPU_IMAGES = 32
"""Images of a step on each of today's GPUs: in joint steps of 25 cells an H200 made 21.5 images/s with four, 68 with
16, 130 with 64."""


def paper() -> RunConfig:
    """Places365-Standard with free-form holes as the paper trains: Table II, memory of the windows with the fewest hole
    pixels, four images on each of four GPUs.

    `python jobs/train_places.py --preset paper --data.train s3://bucket/places/train --data.val s3://bucket/places/val
    --name paper`. It took three days (Titan V); today's GPUs are idle with four images: see `places`.
    """
    return RunConfig(
        data=DataConfig(train="data/places/train", val="data/places/val"),
        schedule=ScheduleConfig(batch_images=PAPER_BATCH, patches_per_image=64),
        workers=WorkersConfig(num_workers=4, use_gpu=True, cpus_per_worker=4),
        precision="bf16",
    )


def places() -> RunConfig:
    """`paper` for today's GPUs: 32 images on each of four, the same number of images in all.

    `python jobs/train_places.py --preset places --data.train s3://bucket/places/train --data.val s3://bucket/places/val
    --name places`. Rates grow with the root of the batch; the gradient penalty is taken at every fourth step, four
    times as strong [D]. For another number of GPUs leave the preset out, or set workers.num_workers,
    schedule.batch_images and the rate. Not trained to the end here: `--dry-run` on a machine with such GPUs measures
    the rate and tells the days.
    """
    base = with_batch(paper(), 4 * GPU_IMAGES)
    return replace(base, loss=replace(base.loss, gp_every=4))


def with_batch(config: RunConfig, images: int) -> RunConfig:
    """*config* with *images* a step and the rates that go with them.

    Adam's rate grows with the root of the batch (Malladi et al. 2022) [D].
    """
    factor = math.sqrt(images / config.schedule.batch_images)
    optim = config.optim
    rates: dict[str, Any] = {
        name: float(f"{factor * rate:.2g}")
        for name in ("lr", "lr_discriminators", "lr_retrieval", "lr_coarse_joint")
        if (rate := getattr(optim, name)) is not None
    }
    return replace(config, schedule=replace(config.schedule, batch_images=images), optim=replace(optim, **rates))


def fitted(config: RunConfig, there: Mapping[str, float]) -> RunConfig:
    """*config* on all that is *there* (`cluster.available`): a worker for each GPU, in bfloat16, with `GPU_IMAGES`
    images of each step; without a GPU one worker on all processors but the one that reads data."""
    gpus, cpus = int(there.get("GPU", 0)), there.get("CPU", 1.0)
    if not gpus:
        workers = replace(config.workers, num_workers=1, use_gpu=False, cpus_per_worker=max(1.0, cpus - 1))
        return replace(config, workers=workers, precision="fp32")
    each = max(1.0, (cpus - 1) // gpus)
    workers = replace(config.workers, num_workers=gpus, use_gpu=True, cpus_per_worker=each)
    config = with_batch(config, gpus * GPU_IMAGES)
    return replace(config, workers=workers, precision="bf16", loss=replace(config.loss, gp_every=4))


def psnet() -> RunConfig:
    """PSNet behind precomputed coarse results for 10,000 iterations, from a trained model (Table V).

    `python jobs/train_places.py --preset psnet --name behind-edgeconnect --init-from models:/tmad@champion --data.train
    data/edgeconnect/train --data.val data/edgeconnect/val --data.coarse-from data/edgeconnect/results`. The sets have
    one mask an image, which the results were made for (`jobs/prepare.py --mask-from paired`). Hardware as for `places`;
    not measured here.
    """
    base = places()
    images = PSNET_ITERATIONS * PAPER_BATCH
    return replace(
        base,
        data=DataConfig(train="data/train", val="data/val", coarse_from="data/results"),
        schedule=replace(base.schedule, coarse_images=0, joint_images=images, validate_every_images=16_000),
    )


def places_rectangle() -> RunConfig:
    """Places365-Standard with rectangular holes up to 128x128, Table III: hole-free windows only, 25 cells an image.

    `python jobs/train_places.py --preset places_rectangle --data.train s3://bucket/places-box/train --data.val
    s3://bucket/places-box/val --name places-rectangle`. Hardware and duration as for `places`.
    """
    base = places()
    return replace(
        base,
        data=DataConfig(train="data/places-rectangle/train", val="data/places-rectangle/val"),
        model=replace(base.model, memory=MemoryConfig(rule="clean", stride_divisor=2)),
        # Sec. IV's weights of Eq. 1 for rectangles; Table II has 6 and 1.
        loss=replace(base.loss, weight_hole=5.0, weight_valid=0.0),
        schedule=replace(base.schedule, patches_per_image=25),
    )


def celebahq() -> RunConfig:
    """CelebA-HQ, DeepFill's 28,000 training images, with rectangular holes: the settings of `places_rectangle`.

    `python jobs/train_places.py --preset celebahq --data.train s3://bucket/celebahq/train --data.val
    s3://bucket/celebahq/val --name celebahq`. Hardware as for `places`. The coarse network has
    its four epochs; the joint phase is as long as on Places, since the paper names one duration for all, three days on
    Titan V [D]. Not measured here. For another number of images, set `schedule.coarse_images` to four times that.
    """
    return _rectangles("celebahq", images=28_000)


def paris() -> RunConfig:
    """Paris StreetView, 14,900 training images, with rectangular holes: the settings of `places_rectangle`.

    `python jobs/train_places.py --preset paris --data.train s3://bucket/paris/train --data.val s3://bucket/paris/val
    --name paris`. Lengths, hardware and what is known of the duration as for `celebahq`. The joint phase goes through
    so few images a thousand times: watch the validation, and shorten `schedule.joint_images` where it turns.
    """
    return _rectangles("paris", images=14_900)


def _rectangles(name: str, *, images: int) -> RunConfig:
    """Rectangular holes on a set of this many *images*, prepared in data/*name*."""
    base = places_rectangle()
    return replace(
        base,
        data=DataConfig(train=f"data/{name}/train", val=f"data/{name}/val"),
        schedule=replace(base.schedule, coarse_images=COARSE_EPOCHS * images),
        tracking=TrackingConfig(registered_name=f"tmad-{name}"),
    )


def photographs() -> RunConfig:
    """Some thousand photographs of any kind, from a given coarse network: the run that made the model in the box.

    `python jobs/train_places.py --preset photographs --name photographs --init-from builtin --init-networks coarse
    --data.train data/train --data.val data/val` after preparing both sets (docs/recipe.md, which also says why these
    settings). The coarse network stays as it came; PSNet and retrieval learn in an hour on two quiet cores.
    """
    return RunConfig(
        model=TMADConfig(coarse=CoarseConfig(base_width=32)),
        discriminators=DiscriminatorsConfig(global_base_width=24),
        loss=LossConfig(
            weight_l1=0.5,
            weight_perceptual=0.05,
            weight_style=60.0,
            weight_tv=0.0,
            weight_gan_patch=0.0,
            weight_gan_global=0.0,
            gp_every=4,
        ),
        optim=OptimConfig(
            lr=4e-4,
            lr_retrieval=4e-3,
            lr_coarse_joint=0.0,
            betas=(0.5, 0.99),
            cosine_periods=1,
            ema_halflife_images=300,
        ),
        data=DataConfig(train="data/train", val="data/val"),
        schedule=ScheduleConfig(
            coarse_images=0,
            joint_images=3_600,
            batch_images=4,
            patches_per_image=16,
            validate_every_images=1_200,
            validation_images=32,
            checkpoint_every_images=500,
            log_every_images=60,
        ),
        workers=WorkersConfig(num_workers=2),
        perceptual=PerceptualConfig(convolutions=(3, 5)),
        tracking=TrackingConfig(experiment="photographs", registered_name="tmad-photographs"),
    )


def demo() -> RunConfig:
    """The model in the box, fine-tuned for minutes on a dozen photographs by two workers of one thread.

    `make demo` runs it after preparing its photographs; by hand: `python jobs/train_places.py --preset demo`. The
    settings are those of `photographs`, at an eighth of the rate and without VGG-19, whose weights would have to be
    downloaded; the discriminators take part with a tenth of the paper's weights, so that every module is trained.
    """
    base = photographs()
    return replace(
        base,
        name="demo",
        init_from="builtin",
        loss=replace(
            base.loss,
            weight_l1=0.1,
            weight_perceptual=0.0,
            weight_style=0.0,
            weight_gan_patch=0.005,
            weight_gan_global=0.002,
        ),
        optim=replace(base.optim, lr=5e-5, lr_retrieval=2e-4, ema_halflife_images=100),
        data=DataConfig(train="runs/demo-data/train", val="runs/demo-data/val"),
        schedule=replace(
            base.schedule,
            joint_images=160,
            validate_every_images=160,
            validation_images=12,
            checkpoint_every_images=80,
            log_every_images=20,
        ),
        perceptual=PerceptualConfig(features="off"),
        tracking=TrackingConfig(experiment="demo", registered_name="tmad-demo"),
    )


def smoke() -> RunConfig:
    """The whole path in seconds, for tests: two workers, 32-pixel images, 8-pixel patches. It learns nothing of use.

    `python jobs/train_places.py --preset smoke --data.train DIR --data.val DIR`.
    """
    return RunConfig(
        model=TMADConfig(
            patch_size=8,
            carafe=CarafeConfig(mid_channels=4),
            coarse=CoarseConfig(base_width=4, num_down_blocks=2, num_res_blocks=1),
            memory=MemoryConfig(pool_size=8),
            retrieval=RetrievalConfig(num_candidates=2, hidden_channels=4, embed_channels=2),
            psnet=PSNetConfig(base_width=4, num_res_blocks=1, num_texture_res_blocks=1),
        ),
        discriminators=DiscriminatorsConfig(patch_base_width=4, global_base_width=4),
        optim=OptimConfig(ema_halflife_images=8),
        schedule=ScheduleConfig(
            coarse_images=8,
            joint_images=16,
            batch_images=4,
            patches_per_image=16,
            validate_every_images=8,
            validation_images=4,
            checkpoint_every_images=8,
            keep_checkpoints=2,
            log_every_images=8,
        ),
        workers=WorkersConfig(num_workers=2, cpus_per_worker=0.5, max_failures=2, controller_failure_limit=2),
        perceptual=PerceptualConfig(features="off"),
        tracking=TrackingConfig(experiment="smoke", registered_name="tmad-smoke"),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (places, paper, places_rectangle, celebahq, paris, psnet, photographs, demo, smoke)
}
"""By name, for `--preset`."""
