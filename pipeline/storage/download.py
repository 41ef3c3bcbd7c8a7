"""Files from the web: weights that others publish."""

from __future__ import annotations

import logging
import sys
import urllib.request
from http.client import HTTPException

from tqdm import tqdm

from pipeline.errors import MissingInput, one_line
from pipeline.storage import redact

TIMEOUT_S = 60.0
PART_BYTES = 2**20

log = logging.getLogger(__name__)


def download(address: str) -> bytes:
    """The whole file at *address*, through the proxies of the environment. Raises `MissingInput` if it cannot be had
    or arrives cut short."""
    found = bytearray()
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            log.info("downloading %s (%s, once)", redact(address), f"{size / 1e6:.0f} MB" if size else "size unknown")
            with tqdm(total=size or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
                while part := answer.read(PART_BYTES):
                    found += part
                    bar.update(len(part))
    except (OSError, HTTPException, ValueError) as error:
        raise MissingInput(f"cannot download {redact(address)} ({redact(one_line(error))})") from error
    if len(found) < size:
        raise MissingInput(f"cannot download {redact(address)} ({len(found)} of {size} bytes arrived); try again")
    return bytes(found)
