"""The service on Ray Serve: one deployment reads requests, another one's replicas hold the model and fill batches.

`build` is what `serve run`, a RayService manifest and `jobs/serve.py` start. A request travels as the files that it
came as; what a replica has in hands when it dies is answered with 503, everything else goes to the others. A model
named by an alias of the registry is looked up again every `refresh_s`; a new version is loaded beside the old one,
which answers until then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from pipeline.models import find_model, model_version
from pipeline.observe import count
from pipeline.service.config import TOKEN, ServiceConfig
from pipeline.service.http import Gone, make_app
from pipeline.service.work import Answer, Refused, Request, fill
from tmad.checkpoint import load_model
from tmad.config import from_dict
from tmad.files import allow_pixels

log = logging.getLogger(__name__)


class Model:
    """A replica: the model, and batches of requests."""

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self._device = "cuda" if config.use_gpu else "cpu"
        torch.set_num_threads(config.cpus)
        allow_pixels(config.max_pixels)
        warnings.simplefilter("ignore", UserWarning)  # what they say stands in the answer's notes
        self._current = self._load(), model_version(config.model, tracking_uri=config.tracking_uri)
        batches: Any = self.fill
        batches.set_max_batch_size(config.max_batch)
        batches.set_batch_wait_timeout_s(config.batch_wait_s)
        if "@" in config.model:
            threading.Thread(target=self._refresh, daemon=True).start()

    def _load(self) -> Any:
        config = self._config
        return load_model(find_model(config.model, tracking_uri=config.tracking_uri), device=self._device)

    def _refresh(self) -> None:
        config = self._config
        while True:
            time.sleep(config.refresh_s)
            try:
                version = model_version(config.model, tracking_uri=config.tracking_uri)
                if version != self._current[1]:
                    # Batches that have begun keep the model that they began with.
                    self._current = self._load(), version
                    log.info("%s is now %s", config.model, version)
            except Exception as error:
                log.warning("%s cannot be looked up, %s goes on: %s", config.model, self._current[1], error)

    @serve.batch
    async def fill(self, requests: list[Request]) -> list[tuple[str, Answer | Refused]]:
        """(version of the model, answer) for each of *requests*."""
        return await asyncio.to_thread(self._fill_all, *self._current, requests)

    def _fill_all(self, model: Any, version: str, requests: list[Request]) -> list[tuple[str, Answer | Refused]]:
        return [(version, self._fill_one(model, request)) for request in requests]

    def _fill_one(self, model: Any, request: Request) -> Answer | Refused:
        try:
            return fill(model, request, max_pixels=self._config.max_pixels, policy=self._config.policy)
        except Refused as refused:
            return refused
        except Exception as error:  # one picture must not take its neighbours with it
            log.exception("a picture could not be filled")
            return Refused(500, "failed", f"this picture could not be filled: {type(error).__name__}")


class Front:
    """How a request reaches a replica of the model, and what is said when it does not."""

    def __init__(self, handle: DeploymentHandle, config: ServiceConfig) -> None:
        self._handle, self._config = handle, config
        self._here = 0

    async def fill(self, request: Request, _: Gone) -> Answer:
        """A replica's answer. Raises `Refused`."""
        self._here += 1
        try:
            version, answer = await asyncio.wait_for(self._handle.fill.remote(request), self._config.max_s)
        except TimeoutError:
            answer = Refused(504, "too-long", f"there was no answer within {self._config.max_s:g} s; mark less of it")
        except BackPressureError:
            answer = Refused(503, "too-many", "too many requests are waiting; try again in a minute")
        except RayActorError:
            answer = Refused(503, "replica-died", "the replica that worked on it ended; ask again")
        except (RayServeException, RayError) as error:
            log.warning("a request failed: %s", error)
            answer = Refused(503, "unavailable", "no replica could answer; ask again")
        finally:
            self._here -= 1
        count(f"service_{answer.reason}" if isinstance(answer, Refused) else "service_filled")
        if isinstance(answer, Refused):
            raise answer
        answer.about["model"] = version
        return answer

    async def state(self) -> Mapping[str, Any]:
        """`here`: requests in this process."""
        return {"here": self._here}


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application with *arguments*, settings of `ServiceConfig`. Raises `ValueError` for one that is unknown or out
    of range."""
    config = from_dict(ServiceConfig, dict(arguments))
    return application(config)


def application(config: ServiceConfig, *, token: str | None = None, loopback: bool = False) -> serve.Application:
    """The application; *token* (else `TMAD_WEB_TOKEN` of the replicas) and *loopback* as for `make_app`."""
    resources: dict[str, Any] = {"num_cpus": config.cpus}
    if config.use_gpu:
        resources["num_gpus"] = 1
    model = serve.deployment(
        Model,
        name="Model",
        ray_actor_options=resources,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing,
        },
        max_ongoing_requests=2 * config.max_batch,
        max_queued_requests=config.max_waiting,
        health_check_period_s=10,
        health_check_timeout_s=config.max_s + 30,
        graceful_shutdown_timeout_s=config.max_s,
    )

    def build_front() -> Any:
        handle = serve.get_deployment_handle("Model", app_name=serve.get_replica_context().app_name)
        front = Front(handle, config)
        return make_app(
            front.fill,
            state=front.state,
            max_bytes=config.max_mb * 2**20,
            max_pixels=config.max_pixels,
            token=token or os.environ.get(TOKEN),
            loopback=loopback,
            page=config.page,
        )

    front: Any = serve.deployment(
        serve.ingress(build_front)(_Ingress),
        name="Front",
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=10 * config.max_waiting,
    )
    application: serve.Application = front.bind(model.bind(config))
    return application


class _Ingress:
    """Holds on to the model's deployment, so that it starts and ends with this one."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model
