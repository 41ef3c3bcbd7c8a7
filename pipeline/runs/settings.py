"""A resumed job must have the settings it was started with; otherwise it is refused with the differences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline import storage
from pipeline.errors import ConfigMismatch


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names: `{"optim": {"lr": 1}}` gives `{"optim.lr": 1}`."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the dotted *name* is one of *patterns*, or below one that ends with a dot."""
    return any(name == pattern or (pattern.endswith(".") and name.startswith(pattern)) for pattern in patterns)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, free: Iterable[str] = ()) -> list[str]:
    """Changed settings, one readable line each: `optim.lr: 0.0001 -> 0.0002`; those of *free* may change."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before.get(name)} -> {after.get(name)}"
        for name in {**before, **after}
        if before.get(name) != after.get(name) and not matches(name, free)
    ]


def refuse(what: str, lines: list[str], remedy: str) -> None:
    """Raise `ConfigMismatch` if there are *lines* of differences."""
    if lines:
        raise ConfigMismatch(f"{what} was begun with other settings ({'; '.join(lines)}); {remedy}", differences=lines)


def compare_settings(
    uri: str, settings: Mapping[str, Any], *, what: str, remedy: str, free: Iterable[str] = ()
) -> bool:
    """Whether *what* was begun there, with these *settings*. Raises `ConfigMismatch` for others."""
    if (before := storage.read_json(uri)) is None:
        return False
    refuse(what, differences(before, json.loads(json.dumps(settings)), free=free), remedy)
    return True


def settle(
    uri: str,
    settings: Mapping[str, Any],
    *,
    what: str,
    remedy: str,
    free: Iterable[str] = (),
    write: Callable[[bytes], None] | None = None,
) -> None:
    """Write *settings* as JSON to *uri*, or compare them with those that are there. Raises `ConfigMismatch`."""
    if compare_settings(uri, settings, what=what, remedy=remedy, free=free):
        return
    data = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    write(data) if write is not None else storage.write_atomic(uri, data)
