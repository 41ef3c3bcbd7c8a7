"""T-MAD: texture memory-augmented deep patch-based image inpainting (Xu et al., 2020), in PyTorch.

Names are loaded when they are asked for, so that a process that needs no network does not wait for PyTorch.
"""

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
    from tmad.model import TMAD as TMAD
    from tmad.model import TMADOutput as TMADOutput
    from tmad.step import NonFiniteLoss as NonFiniteLoss
    from tmad.step import TrainingState as TrainingState

_PLACES = {
    "Batch": "tmad.batch",
    "Sample": "tmad.batch",
    "collate": "tmad.batch",
    "make_sample": "tmad.batch",
    "load_model": "tmad.checkpoint",
    "load_state": "tmad.checkpoint",
    "model_digest": "tmad.checkpoint",
    "save_model": "tmad.checkpoint",
    "save_state": "tmad.checkpoint",
    "TMADConfig": "tmad.config",
    "TrainingConfig": "tmad.config",
    "TMAD": "tmad.model",
    "TMADOutput": "tmad.model",
    "NonFiniteLoss": "tmad.step",
    "TrainingState": "tmad.step",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(_PLACES)
