"""Progress: a bar on a terminal, periodic log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TextIO

from tqdm import tqdm

from pipeline import observe

EVERY_S = 10.0
"""Seconds between two log lines."""

log = logging.getLogger(__name__)


class Progress(AbstractContextManager["Progress"]):
    """Counts images inside its `with` block; the first `add` ends the loading of models."""

    def __init__(self, total: int, *, done: int = 0, exported_as: tuple[str, str] | None = None) -> None:
        """*done* of *total* images are there already. *exported_as*: job and group of the metrics for Prometheus."""
        self.total, self.done = total, done
        self.megapixels = 0.0
        self.reasons: Counter[str] = Counter()
        """Images that were left out, by reason."""
        self._exported_as = exported_as
        self._began = (time.monotonic(), done, 0.0)
        self._first: tuple[float, int, float] | None = None
        self._last = self._began[0]
        self._bar = tqdm(total=total, initial=done, unit=" images", disable=not sys.stderr.isatty(), leave=False)

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, images: int, *, megapixels: float = 0.0, reasons: Mapping[str, int] | None = None) -> None:
        """Count *images* more, those left out among them."""
        now = time.monotonic()
        self.done += images
        self.megapixels += megapixels
        self.reasons.update(reasons or {})
        self._first = self._first or (now, self.done, self.megapixels)
        self._bar.set_postfix_str(by_reason(self.reasons), refresh=False)
        self._bar.update(images)
        if now - self._last >= EVERY_S or self.done >= self.total:
            self._last = now
            self._tell(now)

    def _tell(self, now: float) -> None:
        loaded = self._first is not None and self.done > self._first[1]
        since, before, pixels = self._first if self._first is not None and loaded else self._began
        spent = max(now - since, 1e-9)
        rate = (self.done - before) / spent
        if self._exported_as is not None:
            job, group = self._exported_as
            values = {"images": self.done, "of": self.total, "left_out": self.reasons.total(), "images_per_s": rate}
            observe.export(job, {f"{group}/{name}": value for name, value in values.items()})
        if not self._bar.disable and self.done < self.total:
            return
        parts = [f"{self.done} of {self.total} images", f"{rate:.3g} images/s"]
        if self.megapixels:
            parts.append(f"{(self.megapixels - pixels) / spent:.3g} megapixels/s")
        # Of the first task nothing is known of the time that it took beside loading.
        parts.append(
            f"{(self.total - self.done) / rate:.0f} s to go" if loaded or self.done >= self.total else "? to go"
        )
        left_out = f"; left out: {by_reason(self.reasons)}" if self.reasons else ""
        log.info("%s%s", ", ".join(parts), left_out)


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes log lines above a bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            tqdm.write(self.format(record), file=self.stream)
            self.flush()
        except Exception:
            self.handleError(record)


def by_reason(reasons: Mapping[str, int]) -> str:
    """`3 no-mask, 1 truncated`."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())
