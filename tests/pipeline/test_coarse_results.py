"""PSNet alone on precomputed coarse results (Table V): pictures paired with records, a run that trains nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import DataConfig, RunConfig
from pipeline.data.batches import evaluation_batches
from pipeline.data.coarse_results import CoarseResults
from pipeline.data.schema import read_manifest
from pipeline.errors import CorruptSource, MissingInput
from pipeline.train.launch import check_set
from pipeline.train.loop import Feed
from tests.pipeline.conftest import SetMaker
from tests.pipeline.runs import CONFIG, Recorder, run_in
from tests.tmad.tiny import Features, make_batch, make_image, make_mask
from tmad.batch import Batch, make_sample
from tmad.checkpoint import load_state
from tmad.step import TrainingState


def save_results(folder: Path, *, side: int = 64, first: int = 0, count: int = 3, ending: str = "png") -> CoarseResults:
    """Results of the photographs of `make_set`."""
    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        Image.fromarray(make_image(50 + number, side)).save(folder / f"photo-{number}.{ending}")
    return CoarseResults(str(folder))


def test_batches_carry_the_result_of_each_image_whatever_its_ending(make_set: SetMaker, tmp_path: Path) -> None:
    results = save_results(tmp_path / "results", count=2, ending="bmp")
    save_results(tmp_path / "results", first=2, count=1)
    batch = next(evaluation_batches(make_set(), batch_images=3, coarse=results))
    assert batch.image_id == [f"photo-{number}.png#0" for number in range(3)]
    for number in range(3):
        assert np.array_equal(batch.filled[number].permute(1, 2, 0).numpy(), make_image(50 + number, 64))


def test_a_flip_mirrors_the_result_with_the_image() -> None:
    image, pool = make_image(1), np.zeros((1, 2), np.int16)

    def sample(seed: int):
        rng = np.random.default_rng(seed)
        return make_sample(
            "a", image, make_mask(), pool, patch_size=16, num_cells=9, rng=rng, flip=True, filled=image.copy()
        )

    samples = [sample(seed) for seed in range(8)]
    assert {np.array_equal(one.image, image) for one in samples} == {True, False}
    assert all(np.array_equal(one.image, one.filled) for one in samples)


def test_a_result_that_is_missing_twice_there_of_another_size_or_broken_is_named(tmp_path: Path) -> None:
    results = save_results(tmp_path / "results")
    with pytest.raises(
        MissingInput, match=r"no result of photo-7.png#0: looked for photo-7 with any ending in .*results"
    ):
        results.read("photo-7.png#0", 64, 64)
    with pytest.raises(CorruptSource, match=r"photo-1.png has 64x64 pixels, the record photo-1.png#0 32x32"):
        results.read("photo-1.png#0", 32, 32)
    (tmp_path / "results" / "photo-2.png").write_bytes(b"no picture")
    with pytest.raises(CorruptSource, match=r"photo-2.png cannot be decoded: not-an-image"):
        results.read("photo-2.png#0", 64, 64)
    save_results(tmp_path / "results", count=1, ending="bmp")
    with pytest.raises(CorruptSource, match=r"two results of one image: photo-0.bmp and photo-0.png"):
        CoarseResults(str(tmp_path / "results")).read("photo-0.png#0", 64, 64)


def test_settings_that_do_not_go_with_results_are_refused(make_set: SetMaker, tmp_path: Path) -> None:
    data = DataConfig(coarse_from="results")
    with pytest.raises(ValueError, match=r"schedule.coarse_images must be 0, got 7200000"):
        RunConfig(data=data)
    config = replace(CONFIG, data=data, schedule=replace(CONFIG.schedule, coarse_images=0))
    manifest = read_manifest(make_set())
    settings = {**manifest.settings, "masks_per_image": 2, "memory": vars(config.model.memory)}
    with pytest.raises(ValueError, match=r"has 2 masks an image, data\.coarse_from one result"):
        check_set(config, replace(manifest, settings=settings), "train")


def test_a_run_on_results_trains_all_but_the_coarse_network(tmp_path: Path) -> None:
    def batches(start: int) -> Iterator[Batch]:
        for images in range(start, 100, 2):
            batch = make_batch(images)
            yield replace(batch, filled=batch.image.roll(5, 3))

    schedule = replace(CONFIG.schedule, coarse_images=0, joint_images=6)
    config, recorder = replace(CONFIG, schedule=schedule), Recorder()
    feed = Feed(training=batches, validation=lambda: batches(90))
    summary = run_in(tmp_path, config, feed=feed, tracker=recorder)
    begun, ended = (TrainingState(config.training, perceptual=Features()) for _ in range(2))
    load_state(ended, tmp_path / summary["checkpoint"])
    moved = {
        name.split(".")[0]
        for name, value in begun.model.named_parameters()
        if not torch.equal(value, ended.model.get_parameter(name))
    }
    assert moved == {"retrieval", "psnet"}
    for network in ("patch_discriminator", "global_discriminator"):
        before, after = (list(getattr(state, network).parameters()) for state in (begun, ended))
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    terms = {name for _, values in recorder.values for name in values}
    assert {"loss/l1", "loss/gan_patch"} <= terms
    assert not terms & {"loss/coarse_hole", "loss/coarse_valid", "grad_norm/coarse"}
    # What PSNet is shown is the result, so what it is compared with is that too.
    assert summary["validation"]["val/coarse_psnr_hole"] < 30
