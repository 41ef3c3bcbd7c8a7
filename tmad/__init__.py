"""T-MAD: texture memory-augmented deep patch-based image inpainting (Xu et al., 2020), in PyTorch.

Names are imported when they are first asked for: `import tmad` is instant, `from tmad import Inpainter` loads PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tmad.batch import Batch as Batch
    from tmad.batch import Sample as Sample
    from tmad.batch import collate as collate
    from tmad.batch import make_sample as make_sample
    from tmad.checkpoint import load_model as load_model
    from tmad.checkpoint import load_state as load_state
    from tmad.checkpoint import model_digest as model_digest
    from tmad.checkpoint import save_model as save_model
    from tmad.checkpoint import save_state as save_state
    from tmad.config import TMADConfig as TMADConfig
    from tmad.config import TrainingConfig as TrainingConfig
    from tmad.inpaint import Inpainter as Inpainter
    from tmad.inpaint import InpaintResult as InpaintResult
    from tmad.model import TMAD as TMAD
    from tmad.model import TMADOutput as TMADOutput
    from tmad.step import NonFiniteLoss as NonFiniteLoss
    from tmad.step import TrainingState as TrainingState

_MODULES = {
    "batch": ("Batch", "Sample", "collate", "make_sample"),
    "checkpoint": ("load_model", "load_state", "model_digest", "save_model", "save_state"),
    "config": ("TMADConfig", "TrainingConfig"),
    "inpaint": ("InpaintResult", "Inpainter"),
    "model": ("TMAD", "TMADOutput"),
    "step": ("NonFiniteLoss", "TrainingState"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tmad' has no attribute {name!r}")
    return getattr(import_module(f"tmad.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
