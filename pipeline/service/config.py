"""Settings of `tmad web` and `tmad serve`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from tmad.config import STRICT, NonNegativeFloat, PositiveFloat, PositiveInt
from tmad.inpaint import Policy

TOKEN = "TMAD_WEB_TOKEN"
Port = Annotated[int, Field(ge=0, le=65535)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AnswerConfig:
    """What both answer with, and how much they take."""

    model: str = "builtin"
    """Model: folder, run, URI, `models:/name@alias`, or `builtin`, the one in the box."""
    tracking_uri: str | None = None
    """MLflow server of a `models:/` or `runs:/` model; default: MLFLOW_TRACKING_URI."""
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
class WebConfig(AnswerConfig):
    """Settings of `tmad web`."""

    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own asks for a token: `TMAD_WEB_TOKEN`, or one that is made
    up and printed."""
    port: Port = 7860
    """Port to listen at; 0 = any that is free."""
    device: str = "cpu"
    """`cpu` or `cuda`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServiceConfig(AnswerConfig):
    """The application: `args` of `pipeline.service.application:application` in a configuration of Ray Serve."""

    max_waiting: PositiveInt = 32
    """Requests that may wait for a replica; more are asked to come again (503)."""
    open: bool = False
    """Answer without a token: for where something else decides who may ask, a proxy say."""
    min_replicas: PositiveInt = 1
    """Copies of the model when nobody asks."""
    max_replicas: PositiveInt = 2
    """Copies when many do."""
    cpus: PositiveFloat = 1.0
    """CPUs of a replica."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of a replica, parts too (0.5: two replicas share one); 0 = it computes on CPUs."""
    batch_size: PositiveInt | None = None
    """Pictures that go through the networks together; default: 8 on a GPU, 1 on a CPU, where it saves nothing."""
    batch_wait_s: NonNegativeFloat = 0.01
    """Seconds that the first picture of a batch waits for others."""
    look_s: PositiveFloat = 30.0
    """Seconds between two looks at which version `models:/name@alias` is; a new one is loaded beside the old one."""

    def __post_init__(self) -> None:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas must be at least min_replicas ({self.min_replicas}), got {self.max_replicas}"
            )

    @property
    def at_once(self) -> int:
        """`batch_size`, decided."""
        return self.batch_size or (8 if self.gpus else 1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServeConfig(ServiceConfig):
    """Settings of `tmad serve`."""

    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own asks for a token: `TMAD_WEB_TOKEN`, or one that is made
    up and printed."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen at."""
