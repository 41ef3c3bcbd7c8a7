"""The inpainter as an MLflow model: this file is what MLflow stores and runs ("models from code").

It needs the installed `tmad` package and the model artifact beside it, nothing of Ray. In: `image` (n, H, W, 3) uint8
and `mask` (n, H, W) uint8, 1 or 255 = hole; out: (n, H, W, 3) uint8, valid pixels bit-identical to the input. It fills
as `Inpainter.load` and the commands do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from tmad.inpaint import Inpainter, InpaintResult

logger = logging.getLogger(__name__)

ARTIFACT = "tmad_model"
"""Name of the model artifact (folder with `config.json` and `model.safetensors`) inside the MLflow model."""


class InpainterModel(PythonModel):
    """T-MAD behind MLflow's `predict`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights, once a process; on the GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.inpainter = Inpainter.load(Path(context.artifacts[ARTIFACT]), device=device)

    # The signature states the types; MLflow would warn that hints of `predict` are missing, or not its own kind.
    _skip_type_hint_validation = True

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Fill the holes of a stack of images of one size.

        Each image is treated as if it came alone: its place in the stack decides nothing. One that cannot be filled
        (nothing but hole) comes back as it was, and the log says which and why. Raises `ValueError` that names what is
        wrong with which input.
        """
        image, mask = _checked(model_input)
        filled = image.copy()
        for number, result in enumerate(self.inpainter.batch(list(image), list(mask))):
            if isinstance(result, InpaintResult):
                filled[number] = result.output
            else:
                logger.warning("image %d of %d comes back as it was: %s", number, len(image), result)
        return filled


def _checked(model_input: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(model_input, Mapping) or not {"image", "mask"} <= set(model_input):
        raise ValueError(
            "the input must be {'image': (n, H, W, 3) uint8, 'mask': (n, H, W) uint8}, "
            f"got {type(model_input).__name__}"
            + (f" with {sorted(map(str, model_input))}" if isinstance(model_input, Mapping) else "")
        )
    image, mask = np.asarray(model_input["image"]), np.asarray(model_input["mask"])
    for name, array, dimensions in (("image", image, 4), ("mask", mask, 3)):
        if array.dtype != np.uint8:
            raise ValueError(f"{name} must be uint8, got {array.dtype}; a float image is image*255 rounded")
        if array.ndim != dimensions:
            raise ValueError(
                f"{name} must have {dimensions} dimensions, the first of them the number, got {array.shape}"
            )
    if image.shape[:3] != mask.shape or image.shape[3] != 3:
        raise ValueError(
            f"image must be (n, H, W, 3) and mask (n, H, W) of the same n, H, W, got {image.shape} and {mask.shape}"
        )
    return image, mask


set_model(InpainterModel())
