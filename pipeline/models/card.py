"""The model card: architecture, training data, metrics, limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config import RunConfig, digest
from pipeline.data.schema import Manifest
from pipeline.storage import redact

CARD_FILE = "README.md"
"""Beside the weights, in the run's folder."""


def model_card(
    config: RunConfig,
    summary: Mapping[str, Any],
    *,
    name: str,
    model_digest: str,
    sets: Mapping[str, Manifest],
    code: Mapping[str, Any],
) -> str:
    """Markdown about the model of a finished run: *summary* as `train_loop` gives it, *sets* by `train` and `val`,
    *code* as `environment.code_state` gives it; *name* is what it is registered as."""
    model, schedule = config.model, config.schedule
    train, val = sets["train"], sets["val"]
    multiple = model.size_multiple
    rows = [f"| `{metric}` | {value:.4g} |" for metric, value in sorted(summary["validation"].items())]
    perceptual = {
        "vgg19": "VGG-19's, of ImageNet",
        "untrained": "of an untrained VGG-19: not the paper's method",
        "off": "left out: not the paper's method",
    }[config.perceptual.features]
    begun = f"from the weights of `{redact(config.init_from)}`" if config.init_from else "from random weights"
    commit = code["commit"] or "unknown"
    return "\n".join(
        [
            f"# {name}",
            "",
            "Fills holes in photographs: texture memory-augmented deep patch-based image inpainting (Xu et al., 2020).",
            "",
            "## Use",
            "",
            "An image (H, W, 3) uint8 of any size and a mask (H, W), white where the hole is. Pixels outside the hole",
            "come back unchanged, bit for bit.",
            "",
            "```python",
            "from tmad import Inpainter",
            f'filled = Inpainter.load("{redact(config.runs)}/{config.name}").inpaint(image, mask)',
            "```",
            "",
            "Out of the registry, any process with this package runs it with `mlflow.pyfunc.load_model`: `image`",
            "(n, H, W, 3) and `mask` (n, H, W), both uint8, to (n, H, W, 3) uint8.",
            "",
            "## What it is",
            "",
            f"- digest of configuration and weights `{model_digest}`",
            f"- cells of {model.patch_size} pixels, memory of up to {model.memory.pool_size} windows "
            f"(`{model.memory.rule}`), {model.retrieval.num_candidates} candidates a cell; sizes are padded to "
            f"multiples of {multiple}",
            "",
            "## What it was trained on",
            "",
            f"- training set `{train.digest}`: {train.records:,} records, crops of {train.crop_size} pixels, holes "
            f"{_holes(train)}",
            f"- {begun}; {schedule.coarse_images:,} images coarse, then jointly to {summary['images']:,}, "
            f"{schedule.batch_images} a step, {config.precision}, seed {config.seed}",
            f"- perceptual loss {perceptual}",
            f"- configuration `{digest(config)}`, code {commit}{' with local changes' if code['dirty'] else ''}",
            f"- steps skipped because a loss was not finite: {summary['bad_steps']}, roll-backs: "
            f"{summary['rollbacks']}" + (f"; ended early: {summary['stopped']}" if summary["stopped"] else ""),
            "",
            "## How good it was",
            "",
            f"On the first {min(schedule.validation_images, val.records):,} records of validation set `{val.digest}` "
            f"(crops of {val.crop_size} pixels, holes {_holes(val)}):",
            "",
            "| metric | value |",
            "|---|---:|",
            *rows,
            "",
            "`docs/metrics.md` says what each means; `jobs/evaluate.py` gives the whole table with intervals.",
            "",
            "## What not to expect",
            "",
            "- It paints what is likely beside what is there, never what was there: no evidence, no identification.",
            "- Texture comes from the picture itself. Where the intact part shows nothing like it, it stays smooth.",
            "- Kinds of pictures and holes that training has not seen are filled worse than the table says.",
            "- Rights in the training photographs are their owners': whoever passes the weights on sees to those.",
            "",
        ]
    )


def _holes(manifest: Manifest) -> str:
    """What kind of holes a set has, as its preparation was told."""
    settings = manifest.settings
    if settings.get("mask_from", "family") != "family":
        return f"of its own masks ({settings['mask_from']})"
    return ", ".join(f"`{family}`" for family in settings.get("families") or [settings["mask"]])
