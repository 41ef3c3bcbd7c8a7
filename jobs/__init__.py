"""The commands: each parses its arguments, configures logging and calls one function of `pipeline`.

An installed wheel has this package as `tmad_jobs.jobs`, beside `tmad_jobs.pipeline`, where neither is in the way of a
user's own packages. Importing it puts that folder at the end of the path, so that both have their short names.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

_PLACE = Path(__file__).resolve().parent.parent
if str(_PLACE) not in sys.path:
    sys.path.append(str(_PLACE))


def find_model(ref: str, *, tracking_uri: str | None = None) -> Path:
    """`pipeline.models.find_model`, for `Inpainter.load`. Raises `ImportError` where the program has a package
    `pipeline` of its own."""
    found = find_spec("pipeline")
    if found is None or found.origin is None or Path(found.origin).resolve().parent.parent != _PLACE:
        raise ImportError(
            f"{ref!r} is no folder of this machine, and this program has another package `pipeline` than the "
            "one that finds models elsewhere: name the model's folder, or load it in another process"
        )
    from pipeline.models import find_model as find

    return find(ref, tracking_uri=tracking_uri)
