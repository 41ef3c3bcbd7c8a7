"""The evaluation set: which crop of which photograph under which hole, reproducible from its description.

It is a prepared set of `split` val. Its digest, which every result names, covers photographs, crops and holes to the
last bit. The list beside the manifest says of each image and mask: the photograph's key and digest, the crop (the size
to which it was scaled, corner, side), the mask's family and seed, the digest of its bits, and the hole's share. Another
project draws the same hole by `tmad.masks.draw_mask(family, side, side, Generator(PCG64(seed)))`.
"""

from __future__ import annotations

import hashlib
import json

from pipeline.data.schema import Manifest, stored_rows

LISTING_NAME = "evaluation_set.jsonl"

_COLUMNS = ("image_id", "height", "masks", "hole_fraction", "label", "source", "crop", "mask_family", "mask_seed")


def listing(folder: str, manifest: Manifest) -> bytes:
    """The content of evaluation_set.jsonl for the shards of *manifest* in *folder*: a line an image and mask."""
    lines = (
        {
            "image_id": row["image_id"],
            "key": row["source"]["key"],
            "sha256": row["source"]["sha256"],
            "crop": {**row["crop"], "side": row["height"]},
            "variant": variant,
            "mask_family": row["mask_family"][variant],
            "mask_seed": row["mask_seed"][variant],
            "mask_sha256": hashlib.sha256(bits).hexdigest(),
            "hole_fraction": row["hole_fraction"][variant],
            "label": row["label"],
        }
        for row in stored_rows(folder, manifest, _COLUMNS)
        for variant, bits in enumerate(row["masks"])
    )
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()
