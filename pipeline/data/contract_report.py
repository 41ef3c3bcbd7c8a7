"""The report of a prepared set: images checked, images rejected and why, as JSON and as an HTML page.

Pictures of what was left out are read from the source once more, a few for each reason, so that preparing keeps none.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from pipeline.data.collection import UNUSABLE
from pipeline.data.contract import join_holes, polarity_warning
from pipeline.data.duplicates import Facts
from pipeline.data.prepare_config import PrepareConfig
from pipeline.data.receipts import shard_file
from pipeline.data.schema import Record, open_shard, set_folder
from pipeline.data.sources.base import Source
from pipeline.data.user_masks import join_counts, mask_warnings
from pipeline.report.page import Table, histogram, render
from pipeline.report.pictures import jpeg_bytes
from pipeline.storage import absolute, exists, join, read_bytes, remove, write_atomic
from tmad.images import decode_rgb

SHOWN = 24
"""Pictures shown for each reason."""
SAMPLED = 12
"""Records shown with their holes."""
THUMBNAIL = 160
"""Longer side of a shown picture, in pixels."""

MEANING = {
    "empty-file": "The file has no bytes.",
    "not-an-image": "The bytes are of no format that is read here.",
    "truncated": "The file ends before the picture does.",
    "damaged": "The decoder gave up.",
    "unsupported-mode": "A colour mode that has no rule.",
    "missing": "Listed, but not there when it was read.",
    "unreadable": "Storage refused to hand it out.",
    "too-large": "More pixels than max_pixels.",
    "too-small": "A side shorter than min_side.",
    "too-narrow": "Longer than max_aspect times its shorter side.",
    "no-mask": "No mask of its name, an empty cell, or no transparency.",
    "mask-size": "The mask is of another size than the image.",
    "empty-mask": "No hole in the mask, or in any crop that was drawn.",
    "full-mask": "Nothing but hole in the mask, or in every crop that was drawn.",
    "grey": "No colour, and drop_grey is set.",
    "duplicate": "The same bytes as a file with an earlier key, which stays.",
    "near-duplicate": "Looks like an image with an earlier key, which stays.",
    "in-other-set": "The same as, or looks like, an image of the set that this one is held against.",
}
"""What each reason in quarantine.jsonl means."""


def write_report(
    out: str,
    receipts: Sequence[dict[str, Any]],
    facts: Facts,
    kept_copies: Sequence[dict[str, Any]],
    *,
    listed: int,
    source: Source,
    config: PrepareConfig,
    other: Facts | None = None,
) -> str:
    """Write `report.json` and `report.html` for the shards with these *receipts*; the page's place.

    *facts*: those of these shards; *kept_copies*: copies that stay in the set; *listed*: images in the source;
    *other*: the facts of `config.against`.
    """
    findings = _summary(receipts, facts, kept_copies, listed, config.settings())
    text = (json.dumps(findings, indent=2) + "\n").encode()
    numbers, page = join(out, "report.json"), join(out, "report.html")
    # Numbers are removed first and written last, so beside them lies the page that belongs to them.
    if not (exists(page) and exists(numbers) and read_bytes(numbers) == text):
        remove(numbers)
        write_atomic(page, _page(findings, _Pictures(out, receipts, source, config, other)).encode())
        write_atomic(numbers, text)
    return page


def _summary(
    receipts: Sequence[dict[str, Any]],
    facts: Facts,
    kept_copies: Sequence[dict[str, Any]],
    listed: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The content of report.json."""
    left_out = sorted((drop for receipt in receipts for drop in receipt["drops"]), key=lambda drop: str(drop["key"]))
    gone = {drop["key"] for drop in left_out}
    looked_at = sum(receipt["images"] for receipt in receipts)
    grey = [key for key in facts.table.filter(facts.table["grey"])["key"].to_pylist() if key not in gone]
    holes = join_holes([receipt["holes"] for receipt in receipts])
    own_masks = settings.get("mask_from")
    mask_counts = join_counts([receipt.get("masks", {}) for receipt in receipts])
    if own_masks is None:
        warning = polarity_warning(holes["mean"])
        warnings = [warning] if warning else []
    else:
        warnings = mask_warnings(mask_counts, own_masks, settings["mask_hole"])
    if looked_at < listed:
        warnings.append(f"stopped after {looked_at} of {listed} images")
    return {
        "images_listed": listed,
        "images_looked_at": looked_at,
        "images_used": looked_at - len(left_out),
        "records": sum(receipt["rows"] for receipt in receipts),
        "drops": dict(sorted(Counter(drop["reason"] for drop in left_out).items())),
        "warnings": warnings,
        "decoded": _sizes(facts),
        "grey": {"count": len(grey), "first": grey[:SHOWN]},
        "holes": holes,
        **({} if own_masks is None else {"own_masks": mask_counts}),
        "copies_kept": list(kept_copies),
        "left_out": left_out,
        "settings": settings,
    }


def _sizes(facts: Facts) -> dict[str, Any]:
    """Sides and proportions of the images that passed the checks of a single image."""
    width, height = facts.table["width"].to_numpy(), facts.table["height"].to_numpy()
    if width.size == 0:
        return {"count": 0}
    short, long = np.minimum(width, height), np.maximum(width, height)
    return {
        "count": int(width.size),
        "short_side": {"min": int(short.min()), "median": float(np.median(short)), "max": int(short.max())},
        "aspect": {"median": round(float(np.median(long / short)), 3), "max": round(float((long / short).max()), 3)},
    }


def _page(findings: dict[str, Any], pictures: _Pictures) -> str:
    drops, holes, settings = findings["drops"], findings["holes"], findings["settings"]
    facts = {"source": settings["source"], "held against": settings.get("against") or "nothing"}
    if findings["decoded"]["count"]:
        side, aspect = findings["decoded"]["short_side"], findings["decoded"]["aspect"]
        facts["shorter side, pixels"] = f"{side['min']} to {side['max']}, median {side['median']:g}"
        facts["longer to shorter side"] = f"up to {aspect['max']:g}, median {aspect['median']:g}"
    facts["images without colour, kept"] = findings["grey"]["count"]
    left_out, kept, grey = findings["left_out"], findings["copies_kept"], findings["grey"]
    sections = [(reason, [one for one in left_out if one["reason"] == reason], drops[reason]) for reason in drops]
    for reason, title in (("duplicate", "Duplicates that were kept"), ("near-duplicate", "Near duplicates, kept")):
        copies = [one for one in kept if one["reason"] == reason]
        sections.append((title, copies, len(copies)))
    colourless = [{"key": key, "detail": ""} for key in grey["first"]]
    sections.append(("Without colour, kept", colourless, grey["count"]))
    galleries = []
    for title, lines, total in sections:
        if lines:
            more = f", the first {SHOWN} by key" if total > SHOWN else ""
            galleries.append((f"{title}: {total}{more}", pictures.of(lines[:SHOWN]), "copy_of" in lines[0]))
    label = (
        f"{holes['masks']} masks by the share of the picture that is hole: from {holes['min']:.3f} to "
        f"{holes['max']:.3f}, {holes['mean']:.3f} on average."
    )
    listed = findings["images_listed"]
    reasons = [(reason, count, f"{count / listed:.2%}", MEANING.get(reason, "")) for reason, count in drops.items()]
    return render(
        "prepared.html",
        found=findings,
        sample=pictures.sample(),
        left_out=Table(["reason", "images", "share", "meaning"], reasons),
        galleries=galleries,
        holes=histogram(holes["histogram"], low=0, high=1, label=label),
        facts=facts,
    )


@dataclass(frozen=True)
class _Pictures:
    """Thumbnails of images of the source, of another set's records and of this set's."""

    out: str
    receipts: Sequence[dict[str, Any]]
    source: Source
    config: PrepareConfig
    other: Facts | None

    def of(self, lines: Sequence[dict[str, Any]]) -> list[tuple[str, str, list[bytes | None]]]:
        """Figures of a gallery; of copies the image that stays is on the right."""

        def figure(line: dict[str, Any]) -> tuple[str, str, list[bytes | None]]:
            shown = [self._of_source(line["key"])]
            if "copy_of" in line:
                elsewhere = line["reason"] == "in-other-set"
                shown.append((self._of_other_set if elsewhere else self._of_source)(line["copy_of"]))
            return line["key"], line["detail"], shown

        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(figure, lines))

    def sample(self) -> list[tuple[str, str, list[bytes]]]:
        """Records at equal distances, holes tinted."""
        ends = np.cumsum([receipt["rows"] for receipt in self.receipts])
        total = int(ends[-1]) if len(ends) else 0
        positions = np.unique(np.linspace(0, max(total - 1, 0), SAMPLED).astype(int))[:total]
        figures = []
        for position in positions:
            number = int(np.searchsorted(ends, position, side="right"))
            receipt = self.receipts[number]
            group, place = divmod(int(position - ends[number] + receipt["rows"]), self.config.row_group_rows)
            table = open_shard(self.out, receipt["file"]).read_row_group(group)
            record = Record(**table.slice(place, 1).to_pylist()[0])
            rgb, hole = record.pixels(), record.mask() != 0
            rgb = np.where(hole[..., None], rgb // 3 + np.array([150, 20, 20], np.uint8), rgb)
            figures.append((record.image_id, f"{record.hole_fraction[0]:.0%} hole", [thumbnail(rgb)]))
        return figures

    def _of_source(self, key: str) -> bytes | None:
        try:
            return thumbnail(decode_rgb(self.source.read(key), max_pixels=self.config.max_pixels))
        except UNUSABLE:
            return None

    def _of_other_set(self, key: str) -> bytes | None:
        assert self.other is not None, "only its images are copies of another set's"
        position = pc.index(self.other.table["key"], key).as_py()
        file = shard_file(self.other.shards[self.other.shard_of(position)], "parquet")
        try:
            table = open_shard(set_folder(absolute(str(self.config.against))), file).read(columns=["image", "source"])
            images = table.filter(pc.equal(pc.struct_field(table["source"], "key"), key))["image"]
            return thumbnail(decode_rgb(images[0].as_py()))
        except UNUSABLE:
            return None


def thumbnail(rgb: np.ndarray) -> bytes:
    """(H, W, 3), uint8, as a JPEG file of at most `THUMBNAIL` pixels a side."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return jpeg_bytes(image, quality=80)
