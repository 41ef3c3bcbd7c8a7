"""Which image goes into which shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.data.own_masks import OwnMasks
from pipeline.data.schema import SCHEMA_VERSION
from pipeline.data.sources.base import Source

if TYPE_CHECKING:
    from pipeline.data.prepare import PrepareConfig


def shard_tasks(
    keys: Sequence[str], source: Source, config: PrepareConfig, masks: OwnMasks | None = None
) -> list[dict[str, Any]]:
    """Consecutive slices of the keys; `inputs` identifies what a shard is made of."""
    settings = json.dumps([SCHEMA_VERSION, config.settings()], sort_keys=True)
    tasks = []
    for index, start in enumerate(range(0, len(keys), config.images_per_shard)):
        part = list(keys[start : start + config.images_per_shard])
        labels = [source.label(key) for key in part]
        made_of = [settings, part] if set(labels) == {None} else [settings, part, labels]
        if masks is not None:
            made_of = [*made_of, masks.made_of(part)]
        inputs = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        tasks.append({"index": index, "keys": part, "inputs": inputs})
    return tasks
