"""Settings of an evaluation."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.data.schema import set_folder
from pipeline.storage import absolute, redact
from pipeline.tracking import resolve_tracking_uri
from tmad.config import STRICT, PositiveInt
from tmad.metrics import METRICS

Method = Literal["tmad", "coarse", "blended", "patchmatch", "telea", "navier_stokes", "biharmonic"]

METHODS: tuple[Method, ...] = get_args(Method)

_METRICS = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics"
NETWORKS = {
    "inception": (
        f"{_METRICS}/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    ),
    "vgg16": (f"{_METRICS}/vgg16.pt", "b437eb095feaeb0b83eb3fa11200ebca4548ee39a07fb944a417ddc516cc07c3"),
}
"""Name -> address and SHA-256: the files of StyleGAN2-ADA's authors, TensorFlow's Inception for FID and KID, VGG-16 for
LPIPS."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NetworkConfig:
    """A network that measures, as TorchScript."""

    network: str | None = None
    """Path, URI or https address of the TorchScript file, or a name, `inception` for fid and `vgg16` for lpips, whose
    file is downloaded once; without one, its metrics are skipped."""
    sha256: str | None = None
    """SHA-256 of the file, 16 digits of it or more: nothing else is loaded. Names have their own."""

    def __post_init__(self) -> None:
        if self.network in NETWORKS and self.sha256 is None:
            object.__setattr__(self, "sha256", NETWORKS[self.network][1])
        if self.network is not None and self.sha256 is None:
            raise ValueError(f"network {redact(self.network)} needs sha256, the digest of its file (sha256sum FILE)")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{16,64}", self.sha256):
            raise ValueError(f"sha256 must be 16 to 64 hexadecimal digits, got {self.sha256!r}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateConfig:
    """One evaluation."""

    model: str = "builtin"
    """Model folder, checkpoint, run folder, URI, models:/name@alias, or `builtin`, the one in the box."""
    data: str = "data/val"
    """Folder or URI of a prepared set (jobs/prepare.py --split val)."""
    out: str = "runs/evaluation"
    """Folder or URI of the results. The same command continues where it stopped."""
    methods: tuple[Method, ...] = METHODS
    """What stands in the table; biharmonic needs scikit-image, telea and navier_stokes OpenCV ('tmad[baselines]')."""
    external: tuple[str, ...] = ()
    """Results of other methods, NAME=FOLDER each, named like the set's images (docs/evaluation.md)."""
    coarse_from: tuple[str, ...] = ()
    """The same, and T-MAD's retrieval and PSNet behind them: a row NAME and a row NAME + PSNet (Table V)."""
    metrics: tuple[str, ...] = ()
    """Only these metrics, by name (docs/metrics.md); default: all."""
    fid: NetworkConfig = NetworkConfig()
    """The features of fid_full and kid_full."""
    lpips: NetworkConfig = NetworkConfig()
    """The distance lpips_full."""
    limit: PositiveInt | None = None
    """Only the first images of the set, this many; default: all."""
    mask_variant: Annotated[int, Field(ge=0)] | None = None
    """Only this one of the masks stored with each image; default: all of them."""
    resamples: PositiveInt = 1000
    """Bootstrap draws behind each interval; photographs are drawn, with all their crops and masks."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Share of the draws that an interval holds."""
    num_pictures: Annotated[int, Field(ge=0)] = 8
    """Images shown in the report, evenly spread over the set."""
    num_extremes: Annotated[int, Field(ge=0)] = 3
    """Images shown of the best and of the worst, and of those that changed most."""
    keep: tuple[str, ...] = ("tmad",)
    """Methods whose results are kept as PNG below results/, for the eye and for `against`."""
    export: str | None = None
    """Write the set's pictures with holes, masks and truths there, for methods that run elsewhere, and stop."""
    against: str | None = None
    """Folder or URI of another evaluation of the same set: differences, image by image, with intervals."""
    images_per_task: PositiveInt = 16
    """Images that are measured, and lost by a failure, at once."""
    num_workers: PositiveInt | None = None
    """Copies of the model that work side by side, one thread each; default: one per GPU, or per CPU."""
    cells_per_chunk: PositiveInt = 256
    """Hole cells synthesized at once: bounds the memory of large holes."""
    use_gpu: bool = False
    """Run the model on GPUs."""
    seed: int = 0
    """Keys the choice of the texture memory, the search of patchmatch and the bootstrap."""
    tracking_uri: str | None = None
    """MLflow server or sqlite:///file, for a models:/ reference and for `mlflow_run`; default: MLFLOW_TRACKING_URI."""
    mlflow_run: str | None = None
    """Id of the MLflow run that gets the metrics, tables and pictures too."""

    def __post_init__(self) -> None:
        if not self.methods and not self.external and not self.coarse_from:
            raise ValueError(f"methods must name at least one of {', '.join(METHODS)}")
        for name in self.metrics:
            check_metric(name)
        names = [*self.methods, *(name for name, _ in (*self.external_folders, *self.coarse_folders))]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two methods are called {', '.join(sorted(twice))}: give each a NAME=FOLDER of its own")
        known = {*names, *METHODS, *map(behind, dict(self.coarse_folders))}
        if unknown := [name for name in self.keep if name not in known]:
            raise ValueError(f"keep must name methods of this evaluation, got {', '.join(unknown)}")
        if self.mlflow_run is not None and self.tracking is None:
            raise ValueError("mlflow_run needs tracking_uri (or MLFLOW_TRACKING_URI), the server or file that holds it")

    @property
    def external_folders(self) -> tuple[tuple[str, str], ...]:
        """Name and place of each entry of `external`."""
        return tuple(_named_folder(text, "external") for text in self.external)

    @property
    def coarse_folders(self) -> tuple[tuple[str, str], ...]:
        """Name and place of each entry of `coarse_from`."""
        return tuple(_named_folder(text, "coarse_from") for text in self.coarse_from)

    @property
    def tracking(self) -> str | None:
        """`tracking_uri`, resolved."""
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        return None if uri is None else resolve_tracking_uri(uri, "")

    @property
    def needs_model(self) -> bool:
        """Whether anything in the table comes from the model."""
        return bool({"tmad", "coarse", "blended"} & set(self.methods) or self.coarse_from)

    def shown_metrics(self) -> tuple[str, ...]:
        """The metrics that are asked for, in the order of tables."""
        return tuple(name for name in METRICS if not self.metrics or name in self.metrics)

    def deciding(self) -> dict[str, Any]:
        """What decides the content of a part, beside the set, the model and the folders' files."""
        names = ("methods", "external", "coarse_from", "metrics", "fid", "lpips", "mask_variant", "seed", "keep")
        values = dataclasses.asdict(self)
        return {name: values[name] for name in (*names, "use_gpu")} | {"data": redact(set_folder(absolute(self.data)))}


def check_metric(name: str) -> None:
    """Raise `ValueError` with near names unless *name* is a metric."""
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=3, cutoff=0.5) or list(METRICS)
        raise ValueError(f"no metric is called {name!r}; did you mean {', '.join(near)}?")


def behind(name: str) -> str:
    """The name of the row with PSNet behind the results called *name*."""
    return f"{name}+psnet"


def _named_folder(text: str, setting: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not equals or "/" in name:
        # A folder alone gives its own name.
        folder = text
        name = text.rstrip("/").rsplit("/", 1)[-1]
    if not _NAME.fullmatch(name) or not folder:
        raise ValueError(
            f"{setting} must be NAME=FOLDER with a name of letters, digits, '.', '_' and '-', got {text!r}"
        )
    return name, folder
