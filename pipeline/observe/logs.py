"""How a log line looks: for people, or with `TMAD_LOG=json` one JSON object a line with run, rank and step.

`pipeline.runs.cli.configure_logging` sets it up. Ray's workers take the variable from their node, or from the job's
`env_vars`.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

VARIABLE = "TMAD_LOG"
"""`text` (default) or `json`."""

_place: dict[str, Any] = {}

log = logging.getLogger(__name__)


def set_place(**fields: Any) -> None:
    """Say where this process is (`run`, `rank`, `step` in images); every following JSON line has it. A process works on
    one run, so this is its, not a thread's."""
    _place.update(fields)


def place() -> dict[str, Any]:
    """What `set_place` was told."""
    return dict(_place)


def formatter(run: str = "", rank: int | None = None) -> logging.Formatter:
    """What `TMAD_LOG` asks for; another value than `text` and `json` is a warning, and text."""
    kind = os.environ.get(VARIABLE, "") or "text"
    if kind not in ("text", "json"):
        log.warning("%s must be text or json, got %r: text it is", VARIABLE, kind)
    if kind == "json":
        _place.clear()
        set_place(**({"run": run} if run else {}), **({} if rank is None else {"rank": rank}))
        return JsonFormatter()
    where = "" if not run else f"{run} " if rank is None else f"{run}[{rank}] "
    return logging.Formatter(f"%(asctime)s %(levelname).1s {where.replace('%', '%%')}%(message)s", datefmt="%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """A record as `{"time", "level", "logger", "message"}` and the place of its process; `trace` where there is one.

    A record with an attribute `place` (of another process, whose line is passed on) keeps that.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, without line breaks."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            **getattr(record, "place", _place),
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["trace"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)
