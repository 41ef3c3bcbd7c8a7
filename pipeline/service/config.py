"""Settings of `tmad web`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from tmad.config import STRICT, PositiveFloat, PositiveInt
from tmad.inpaint import Policy

TOKEN = "TMAD_WEB_TOKEN"
Port = Annotated[int, Field(ge=0, le=65535)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WebConfig:
    """Settings of `tmad web`."""

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

    host: str = "127.0.0.1"
    """Address to listen at. Any other than this machine's own asks for a token: `TMAD_WEB_TOKEN`, or one that is made
    up and printed."""
    port: Port = 7860
    """Port to listen at; 0 = any that is free."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
