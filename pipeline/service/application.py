"""The Ray Serve application: the page's requests, answered by replicas that fill in batches.

Two deployments. `requests` reads forms and says no; `model` has the networks, decodes, fills and encodes. A replica of
`model` that is lost takes with it what it had in hand, and `requests` is there to say so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from pipeline import observe
from pipeline.models import absolute_model, find_model, model_version
from pipeline.runs.cli import one_line
from pipeline.service.config import TOKEN, ServiceConfig
from pipeline.service.http import make_app
from pipeline.service.work import Answer, Begun, Refused, Request, begin, compute, end, refusal, too_long
from tmad import builtin
from tmad.checkpoint import model_digest
from tmad.config import from_dict
from tmad.files import allow_pixels
from tmad.inpaint import Inpainter

NAME = "tmad"
"""The application's."""
READ_AT_ONCE = 64
"""Requests that are read or wait for their answer at one time; what follows waits unread."""
HEALTH_S = 10.0
"""Seconds between two looks at whether a replica is well."""

log = logging.getLogger(__name__)


def application(args: dict[str, Any]) -> serve.Application:
    """What a configuration of Ray Serve imports; *args* are the fields of `ServiceConfig`.

    Raises `ValueError` for wrong ones, and where neither `TMAD_WEB_TOKEN` is set nor `open`.
    """
    config = from_dict(ServiceConfig, args)
    token = os.environ.get(TOKEN)
    if not token and not config.open:
        raise ValueError(
            f"set {TOKEN}, which requests then need, or `open: true` if something else decides who may ask"
        )
    return build(config, token=token)


def build(config: ServiceConfig, *, token: str | None, loopback: bool = False) -> serve.Application:
    """The application of *config*; *token* and *loopback* as in `make_app`."""
    replicas = serve.deployment(
        name="model",
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.at_once,
        ),
        # One batch in the networks, the next one being read, encoded or both.
        max_ongoing_requests=2 * config.at_once,
        max_queued_requests=config.max_waiting,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=config.max_s,
    )(Model)
    requests = serve.deployment(name="requests", max_ongoing_requests=READ_AT_ONCE, ray_actor_options={"num_cpus": 0})(
        Requests
    )
    model = replicas.bind(replace(config, model=absolute_model(config.model)))
    return requests.bind(model, config, token, loopback)


@dataclass(frozen=True)
class _Loaded:
    """A model that answers."""

    version: str
    """As `model_version` says it."""
    shown: str
    """What clients are told: the version, or the digest where the name is a place of ours."""
    inpainter: Inpainter


class Model:
    """A replica: the networks, and the threads before and behind them."""

    def __init__(self, config: ServiceConfig) -> None:
        """Raises what `find_model` and `load_model` raise."""
        torch.set_num_threads(max(1, int(config.cpus)))
        warnings.simplefilter("ignore", UserWarning)  # what they say stands in the answer's notes
        allow_pixels(config.max_pixels)
        self._config = config
        self._loaded = self._load(model_version(config.model, tracking_uri=config.tracking_uri))
        self._networks = ThreadPoolExecutor(1, "networks")
        self._since: float | None = None
        batches: Any = self._compute
        batches.set_max_batch_size(config.at_once)
        batches.set_batch_wait_timeout_s(config.batch_wait_s)
        if config.model.startswith("models:/") and "@" in config.model:
            threading.Thread(target=self._look, name="alias", daemon=True).start()

    async def fill(self, request: Request) -> Answer | Refused:
        """The file, or why there is none."""
        loaded = self._loaded
        try:
            begun = await asyncio.to_thread(begin, loaded.inpainter, request, max_pixels=self._config.max_pixels)
            if (error := await self._compute(begun)) is not None:
                raise error
            answer = await asyncio.to_thread(end, begun)
        except Exception as error:
            return refusal(error)
        return replace(answer, about={**answer.about, "model": loaded.shown})

    async def state(self) -> Mapping[str, Any]:
        """`model`: the version that answers now."""
        return {"model": self._loaded.shown}

    def check_health(self) -> None:
        """Raise where the networks have been at one batch for longer than anybody waits: Serve then takes another
        replica."""
        if self._since is not None and time.monotonic() - self._since > self._config.max_s:
            raise RuntimeError(f"a batch has taken more than {self._config.max_s:g} s")

    @serve.batch
    async def _compute(self, begun: list[Begun]) -> list[Exception | None]:
        self._since = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._networks, compute, begun)
        finally:
            self._since = None

    def _load(self, version: str) -> _Loaded:
        config = self._config
        # Not by its alias, which may be another version's by now.
        named = version if version.startswith("models:/") else config.model
        folder = find_model(named, tracking_uri=config.tracking_uri)
        inpainter = Inpainter.load(folder, device="cuda" if config.gpus else "cpu", policy=config.policy)
        known = version.startswith("models:/") or version == builtin.NAME
        return _Loaded(version, version if known else model_digest(folder), inpainter)

    def _look(self) -> None:
        """Follow the alias. Pictures that have begun end with the networks that they began with."""
        said = ""
        while True:
            time.sleep(self._config.look_s)
            try:
                version = model_version(self._config.model, tracking_uri=self._config.tracking_uri)
                if version != self._loaded.version:
                    self._loaded = self._load(version)
                    observe.count("model_taken_over")
                    log.info("%s answers now", version)
            except Exception as error:
                if (trouble := one_line(error)) != said:
                    log.warning("%s stays: %s", self._loaded.version, trouble)
                said = trouble


@serve.ingress()
class Requests:
    """What speaks HTTP."""

    def __init__(self, model: DeploymentHandle, config: ServiceConfig, token: str | None, loopback: bool) -> None:
        """*token* and *loopback* as in `make_app`."""
        self._model, self._config, self._token, self._loopback = model, config, token, loopback

    def __serve_build_asgi_app__(self) -> Any:
        return make_app(
            self._fill,
            state=self._state,
            max_bytes=self._config.max_mb * 2**20,
            max_pixels=self._config.max_pixels,
            token=self._token,
            loopback=self._loopback,
            page=False,
        )

    async def _fill(self, request: Request, _: Any) -> Answer:
        try:
            answer: Answer | Refused = await self._asked(self._model.fill, request)
            if isinstance(answer, Refused):
                raise answer
        except Refused as refused:
            observe.count(f"refused_{refused.reason}")
            raise
        observe.count("filled")
        return answer

    async def _state(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = await self._asked(self._model.state)
        return state

    async def _asked(self, method: Any, *arguments: Any) -> Any:
        """What a replica answers. Raises `Refused` where none does."""
        response = method.remote(*arguments)
        waited = asyncio.ensure_future(response)
        try:
            done, _ = await asyncio.wait([waited], timeout=self._config.max_s)
            if not done:
                raise too_long(self._config.max_s)
            return waited.result()
        except BackPressureError:
            message = f"{self._config.max_waiting} pictures wait already; try again in a minute"
            raise Refused(503, "too-many", message) from None
        except (RayActorError, ReplicaUnavailableError):
            raise Refused(503, "replica-died", "the process that held this picture has ended; ask again") from None
        except DeploymentUnavailableError:
            raise Refused(503, "no-replica", "the model cannot be loaded; the service's log says why") from None
        finally:
            if not waited.done():  # too late, or nobody waits any more
                response.cancel()
                waited.cancel()
