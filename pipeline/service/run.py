"""`tmad serve`: the application on a Ray that is started here, or on the cluster that is there, until Ctrl-C."""

from __future__ import annotations

import time
from importlib.util import find_spec

from pipeline.models import absolute_model, find_model
from pipeline.service.config import ServeConfig

NAME = "tmad"
"""The application's, in Serve's status and metrics."""
NEEDS = ("python_multipart", "starlette", "uvicorn", "watchfiles", "grpc_reflection")


def serve(config: ServeConfig) -> None:
    """Start the application, print its address, wait. Raises `ValueError` for an address that cannot be had or a
    package that is missing, and what `find_model` raises."""
    if any(find_spec(name) is None for name in NEEDS):
        raise ValueError("the service needs more packages: pip install 'tmad[serve]'")
    from dataclasses import replace

    from pipeline.cluster import start_ray
    from pipeline.service.web import access, address, listen

    listen(config.host, config.port).close()
    find_model(config.model, tracking_uri=config.tracking_uri)  # here, where what is wrong with it is one line
    config = replace(config, model=absolute_model(config.model))
    token, own = access(config.host)
    start_ray()
    from ray import serve as ray_serve

    from pipeline.service.replicas import application

    ray_serve.start(http_options={"host": config.host, "port": config.port})
    try:
        ray_serve.run(application(config, token=token, loopback=own), name=NAME, route_prefix="/")
        print(address(config.host, config.port, token))
        print(
            f"model {config.model}, {config.min_replicas} to {config.max_replicas} replicas; Ctrl-C ends it", flush=True
        )
        while True:
            time.sleep(1)
    finally:
        ray_serve.shutdown()
