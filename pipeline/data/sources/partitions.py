"""The official partitions of the paper's data sets: how many images each has, and the files it comes in.

A download that lacks an archive, a list of another edition, a half-copied folder: all look like a data set. Comparing
with the published number shows them before days are spent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.data.sources.base import Source
from pipeline.data.sources.keylist import KeyList

PartitionName = Literal[
    "places365-standard-train",
    "places365-challenge-train",
    "places365-val",
    "places365-test",
    "celeba-hq",
    "celeba-hq-deepfill-train",
    "celeba-hq-deepfill-val",
    "paris-streetview-train",
    "paris-streetview-test",
]

_EXAMPLES = 10


@dataclass(frozen=True)
class Partition:
    """One part of a data set as its owners publish it."""

    images: int
    list_file: str = ""
    """The official list, whose paths begin at the folder in the archive."""
    small: str = ""
    """Archive and folder in it of the images of 256 x 256 pixels."""
    large: str = ""
    """Archive and folder in it of the images in their full size."""
    note: str = ""
    """Where it comes from, and what is disputed about it."""


_PLACES = "http://places2.csail.mit.edu, for research and education; its terms are on that page"
_PARIS = "only by request to the owners of Context Encoders (Pathak et al. 2016)"
_DEEPFILL = "the split of DeepFill's lists; there is no official one"

PARTITIONS: dict[PartitionName, Partition] = {
    "places365-standard-train": Partition(
        1_803_460,
        "places365_train_standard.txt",
        "train_256_places365standard.tar/data_256",
        "train_large_places365standard.tar/data_large",
        _PLACES,
    ),
    "places365-challenge-train": Partition(
        8_026_628,
        "places365_train_challenge.txt",
        "train_256_places365challenge.tar/data_256",
        "train_large_places365challenge.tar/data_large",
        f"{_PLACES}; its description also says 8,097,967",
    ),
    "places365-val": Partition(36_500, "places365_val.txt", "val_256.tar/val_256", "val_large.tar/val_large", _PLACES),
    "places365-test": Partition(
        328_500, "places365_test.txt", "test_256.tar/test_256", "test_large.tar/test_large", _PLACES
    ),
    "celeba-hq": Partition(30_000, note="https://github.com/tkarras/progressive_growing_of_gans, non-commercial"),
    "celeba-hq-deepfill-train": Partition(28_000, "train_shuffled.flist", note=_DEEPFILL),
    "celeba-hq-deepfill-val": Partition(2_000, "val_shuffled.flist", note=_DEEPFILL),
    "paris-streetview-train": Partition(14_900, note=_PARIS),
    "paris-streetview-test": Partition(100, note=_PARIS),
}


@dataclass(frozen=True)
class CountReport:
    """What a collection holds beside what its partition should hold."""

    partition: str
    expected: int
    listed: int
    missing: int = 0
    """Images that a list names and its root does not hold."""
    unlisted: int = 0
    """Images that the root holds and the list does not name: no fault, a root may hold more."""
    missing_examples: Sequence[str] = ()
    unlisted_examples: Sequence[str] = ()
    note: str = ""

    @property
    def agrees(self) -> bool:
        """True if the number is the published one and every listed image is there."""
        return self.listed == self.expected and not self.missing

    def message(self) -> str:
        """The report in one line."""
        parts = [f"{self.partition} has {self.expected:,} images, {self.listed:,} are listed here"]
        if self.listed != self.expected:
            parts.append(f"{abs(self.listed - self.expected):,} too {'few' if self.listed < self.expected else 'many'}")
        for count, what, examples in (
            (self.missing, "listed images are not in the root", self.missing_examples),
            (self.unlisted, "images in the root are not in the list", self.unlisted_examples),
        ):
            if count:
                parts.append(f"{count:,} {what}, e.g. {examples[0]!r}")
        return "; ".join(parts)


def compare(name: PartitionName, source: Source, keys: Sequence[str]) -> CountReport:
    """The *keys* of *source* beside the partition *name*; for a list, also beside what its root holds."""
    partition = PARTITIONS[name]
    facts: dict[str, Any] = {}
    if isinstance(source, KeyList):
        missing, unlisted = source.compare_with_root()
        facts = {
            "missing": len(missing),
            "unlisted": len(unlisted),
            "missing_examples": missing[:_EXAMPLES],
            "unlisted_examples": unlisted[:_EXAMPLES],
        }
    return CountReport(partition=name, expected=partition.images, listed=len(keys), note=partition.note, **facts)
