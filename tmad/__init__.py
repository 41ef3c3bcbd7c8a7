"""T-MAD: texture memory-augmented deep patch-based image inpainting (Xu et al., 2020), in PyTorch."""

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
