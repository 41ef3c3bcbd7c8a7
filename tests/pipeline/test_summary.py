"""Means and intervals: the bootstrap written out, groups, paired weights, missing values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.summary import bootstrap, hole_bin, photograph_weights, summarize


def rows(
    index: int, values: dict[str, float | None], *, family: str = "brush", hole: float = 0.15, label: int | None = None
) -> list[dict]:
    facts = {
        "image_id": f"{index}.png#0",
        "key": f"{index}.png",
        "variant": 0,
        "mask_family": family,
        "label": label,
        "hole_fraction": hole,
    }
    return [{**facts, "method": method, "psnr_hole": value} for method, value in values.items()]


def filled(images: list[list[dict]], confidence: float = 0.95) -> tuple[dict, dict]:
    """Of all images, and of groups."""
    table = pa.Table.from_pylist([row for image in images for row in image])
    table = table.cast(table.schema.set(table.schema.get_field_index("psnr_hole"), pa.field("psnr_hole", pa.float64())))
    return summarize(table, ["a", "b"], ["psnr_hole"], EvaluateConfig(resamples=400, seed=3, confidence=confidence))


def test_the_interval_is_that_of_the_draws_written_out() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(20, 3, 40)
    table, _ = filled([rows(index, {"a": value, "b": 1.0}) for index, value in enumerate(values)], 0.9)
    weights = np.stack([photograph_weights(3, f"{index}.png", 400) for index in range(40)])
    means = (weights * values[:, None]).sum(axis=0) / weights.sum(axis=0)
    entry = table["a"]["psnr_hole"]
    assert entry["mean"] == pytest.approx(values.mean())
    assert (entry["low"], entry["high"]) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])))
    # As wide as theory has it: 2 * 1.645 standard errors.
    assert entry["high"] - entry["low"] == pytest.approx(2 * 1.645 * values.std() / np.sqrt(40), rel=0.2)
    assert table["b"]["psnr_hole"]["low"] == 1.0


def test_crops_and_masks_of_one_photograph_are_drawn_together() -> None:
    one = [rows(0, {"a": float(value), "b": 0.0}) for value in range(20)]
    entry = filled(one)[0]["a"]["psnr_hole"]
    assert entry["low"] == entry["high"] == entry["mean"]


def test_values_that_are_missing_are_left_out_and_counted_and_the_cap_is_counted() -> None:
    found, _ = filled(
        [rows(0, {"a": 10.0, "b": None}), rows(1, {"a": None, "b": None}), rows(2, {"a": 100.0, "b": None})]
    )
    assert found["a"]["psnr_hole"] | {"low": 0, "high": 0} == {
        "mean": 55.0,
        "low": 0,
        "high": 0,
        "images": 2,
        "at_cap": 1,
    }
    assert found["b"]["psnr_hole"] == {"mean": None, "low": None, "high": None, "images": 0}


def test_groups_hold_their_images_in_natural_order() -> None:
    images = [
        rows(index, {"a": float(index), "b": 0.0}, family=family, hole=hole, label=label)
        for index, (family, hole, label) in enumerate(
            [("brush", 0.05, 2), ("rectangle", 0.1, 10), ("brush", 0.101, 2), ("brush", 0.7, 10)]
        )
    ]
    groups = filled(images)[1]
    assert list(groups["hole"]) == ["0% to 10%", "10% to 20%", "above 60%"]
    assert groups["hole"]["0% to 10%"]["images"] == 2
    assert groups["hole"]["0% to 10%"]["methods"]["a"]["psnr_hole"]["mean"] == 0.5
    assert list(groups["family"]) == ["brush", "rectangle"]
    assert groups["family"]["brush"]["methods"]["a"]["psnr_hole"]["mean"] == pytest.approx(5 / 3)
    assert list(groups["label"]) == ["2", "10"]
    assert "family" not in filled(images[:1])[1]


def test_bins_exclude_their_lower_end() -> None:
    assert [hole_bin(one) for one in (0.0, 0.1, 0.1001, 0.6, 0.61)] == [
        "0% to 10%", "0% to 10%", "10% to 20%", "50% to 60%", "above 60%"
    ]  # fmt: skip


def test_an_interval_of_one_image_is_none() -> None:
    found = bootstrap(np.full((1, 1, 1), 3.0), ["key"], ["a"], ["m"], EvaluateConfig(resamples=10))
    assert found["a"]["m"] == {"mean": 3.0, "low": None, "high": None, "images": 1}
