"""Cuts a published schema down to what tests need: `python tests/schemas/cut.py CRD_OR_SCHEMA OUT [KEPT ...]`.

Descriptions go. Of a Kubernetes CRD the schema of the served version's `spec` is kept. Every property's name and type
stay, so that a misspelled field is still found; below the top levels, the insides stay only of properties named in
KEPT, `*` = all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

FREE = {"x-kubernetes-preserve-unknown-fields": True}


def cut(schema: Any, kept: set[str], name: str = "", depth: int = 0) -> Any:
    """*schema* without descriptions, defaults and the insides of objects that are not in *kept*."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") in ("object", "array") and depth > 1 and "*" not in kept and name not in kept:
        return {"type": schema["type"]} | (FREE if schema["type"] == "object" else {})
    slim = {}
    for key, value in schema.items():
        if key in ("description", "default", "$comment") and not isinstance(value, dict):
            continue
        if key == "properties":
            slim[key] = {one: cut(inner, kept, one, depth + 1) for one, inner in value.items()}
        elif key in ("items", "additionalProperties"):
            slim[key] = cut(value, kept, name, depth)
        elif "*" in kept and isinstance(value, dict):
            slim[key] = {one: cut(inner, kept) for one, inner in value.items()}
        elif "*" in kept and isinstance(value, list):
            slim[key] = [cut(one, kept) for one in value]
        else:
            slim[key] = value
    return slim


def main(source: str, out: str, *kept: str) -> None:
    """Write the cut of the file *source* to *out*."""
    schema = yaml.safe_load(Path(source).read_text())
    if schema.get("kind") == "CustomResourceDefinition":
        version = next(one for one in schema["spec"]["versions"] if one["name"] == "v1")
        schema = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
        # The clusters inside jobs are those of the other definition.
        if "rayClusterSpec" in schema["properties"]:
            schema["properties"]["rayClusterSpec"] = {"type": "object", **FREE}
    Path(out).write_text(json.dumps(cut(schema, set(kept)), separators=(",", ":")).replace("},", "},\n") + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
