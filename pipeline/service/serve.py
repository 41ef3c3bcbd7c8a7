"""`tmad serve`: the application on this machine's Ray, or on the cluster of `RAY_ADDRESS`, until Ctrl-C."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from importlib.util import find_spec

from pipeline.errors import TMADError
from pipeline.models import locate_model, model_version
from pipeline.runs.cluster import joined, start_ray
from pipeline.service.config import ServeConfig, ServiceConfig
from pipeline.service.web import access, address, listen


def serve(config: ServeConfig) -> None:
    """Answer until Ctrl-C. Raises `ValueError` for an address that cannot be had, what `find_model` raises, and
    `TMADError` if no replica comes up."""
    if any(find_spec(name) is None for name in ("mmh3", "python_multipart", "watchfiles")):
        raise ValueError("the service needs more packages: pip install 'tmad[serve]'")
    locate_model(config.model, tracking_uri=config.tracking_uri)
    token, own = access(config.host)
    if not joined():
        listen(config.host, config.port).close()
    # Ray gives the process that takes requests five seconds, which are over before it has started on a busy machine.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    start_ray(dashboard=True)
    from ray import serve as ray_serve

    from pipeline.service.application import NAME, build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    fields = {one.name: getattr(config, one.name) for one in dataclasses.fields(ServiceConfig)}
    ray_serve.start(http_options={"host": config.host, "port": config.port})
    try:
        app = build(ServiceConfig(**fields), token=None if config.open else token, loopback=own)
        try:
            ray_serve.run(app, name=NAME)
        except RuntimeError as error:
            raise TMADError(f"the service did not start: {error}") from None
        print(address(config.host, config.port, None if config.open else token))
        name = model_version(config.model, tracking_uri=config.tracking_uri)
        print(f"model {name}; Ctrl-C ends it", flush=True)
        threading.Event().wait()
    finally:
        ray_serve.delete(NAME)
