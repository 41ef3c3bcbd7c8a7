"""Settings of `tmad web`, of `tmad serve`, and of the application that Ray Serve runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from tmad.config import STRICT, PositiveFloat, PositiveInt
from tmad.inpaint import Policy

TOKEN = "TMAD_WEB_TOKEN"
Port = Annotated[int, Field(ge=0, le=65535)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AnswersConfig:
    """What is filled, how, and what is refused."""

    model: str = "builtin"
    """Model: folder, run, URI, `models:/name@alias`, or `builtin`, the one in the box. On a cluster a place that all
    machines see."""
    tracking_uri: str | None = None
    """MLflow server of a `models:/` or `runs:/` model; none = MLFLOW_TRACKING_URI."""
    policy: Policy = "crop"
    """What the coarse network sees, as in `jobs/inpaint.py`."""
    max_mb: PositiveInt = 64
    """Largest request, photograph and mask, in MiB."""
    max_pixels: PositiveInt = 50_000_000
    """Pixels of the largest picture."""
    max_s: PositiveFloat = 120.0
    """Seconds until a request that has no answer is given up (504)."""
    max_waiting: PositiveInt = 8
    """Requests that may wait for their turn; more are asked to come again (503)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WebConfig(AnswersConfig):
    """Settings of `tmad web`."""

    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own asks for a token: `TMAD_WEB_TOKEN`, or one that is made
    up and printed."""
    port: Port = 7860
    """Port to listen at; 0 = any that is free."""
    device: str = "cpu"
    """`cpu` or `cuda`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServiceConfig(AnswersConfig):
    """Arguments of the application `pipeline.service.replicas:build` in a Serve configuration."""

    refresh_s: PositiveFloat = 60.0
    """Seconds after which an alias (`models:/tmad@champion`) is looked up again."""
    use_gpu: bool = False
    """One GPU for each replica of the model."""
    cpus: PositiveInt = 1
    """CPUs, and PyTorch's threads, of a replica of the model."""
    min_replicas: PositiveInt = 1
    """Replicas of the model that are always there."""
    max_replicas: PositiveInt = 4
    """Replicas of the model when many ask."""
    target_ongoing: PositiveFloat = 4.0
    """Requests for each replica, running and waiting, above which there are to be more of them."""
    max_batch: PositiveInt = 8
    """Requests that a replica takes at once."""
    batch_wait_s: PositiveFloat = 0.02
    """Seconds that the first of them waits for others."""
    max_waiting: PositiveInt = 64
    """Requests that wait for a replica; more are asked to come again (503)."""
    page: bool = True
    """Whether the page of `tmad web` is at the root."""

    def __post_init__(self) -> None:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas must be at least min_replicas, {self.min_replicas}, got {self.max_replicas}"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServeConfig(ServiceConfig):
    """Settings of `tmad serve`."""

    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own asks for a token: `TMAD_WEB_TOKEN`, or one that is made
    up and printed."""
    port: Port = 8000
    """Port to listen at."""
