"""The exported graph gives what `Inpainter` gives."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tmad.tiny import MODEL, make_image, with_noise
from tmad.draws import hole_cells
from tmad.export import export_fill
from tmad.images import to_model, to_uint8
from tmad.inpaint import Inpainter
from tmad.memory import select_pool
from tmad.model import TMAD
from tmad.rng import numpy_generator


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_graph_saved_and_loaded_again_fills_as_the_inpainter_does() -> None:
    # Every layer is traced, so there are as few as make a network.
    few = replace(MODEL, coarse=replace(MODEL.coarse, num_down_blocks=1, num_res_blocks=1))
    model = with_noise(TMAD(few, seed=3)).eval()
    file = io.BytesIO()
    torch.export.save(export_fill(model, height=64, width=64), file)
    file.seek(0)
    graph = torch.export.load(file).module()
    config, image = model.config, make_image(0, 64)
    for box in ((slice(20, 40), slice(10, 35)), (slice(3, 60), slice(30, 50))):
        mask = np.zeros((64, 64), np.uint8)
        mask[box] = 1
        pool_yx = select_pool(
            mask,
            patch_size=config.patch_size,
            stride=config.memory_stride,
            pool_size=config.memory.pool_size,
            rule=config.memory.rule,
            rng=numpy_generator(0, "pool", "a"),
        )
        with torch.no_grad():
            made = graph(
                to_model(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]),
                torch.from_numpy(mask)[None, None].float(),
                torch.from_numpy(pool_yx.astype(np.int64))[None],
                torch.from_numpy(hole_cells(mask, config.patch_size).astype(np.int64))[None],
            )
        filled = np.where(mask[..., None] > 0, to_uint8(made)[0].permute(1, 2, 0).numpy(), image)
        assert np.array_equal(filled, Inpainter(model, coherence=0)(image, mask, image_id="a").output)


def test_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="height and width must be multiples of 16"):
        export_fill(TMAD(MODEL), height=64, width=50)
