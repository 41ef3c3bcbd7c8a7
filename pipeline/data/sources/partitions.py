"""The official partitions of the paper's data sets, and how many images each has.

A download that lacks an archive, a list of another edition, a half-copied folder: all look like a data set. Comparing
with the published number shows them before days are spent. docs/bring-your-own-data.md names the files they come in.
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
_PLACES = "http://places2.csail.mit.edu, for research and education; its terms are on that page"
_PARIS = "only by request to the owners of Context Encoders (Pathak et al. 2016)"
_DEEPFILL = "the split of DeepFill's lists; there is no official one"


@dataclass(frozen=True)
class Partition:
    """One part of a data set as its owners publish it."""

    images: int
    note: str
    """Where it comes from, and what is disputed about it."""


PARTITIONS: dict[PartitionName, Partition] = {
    "places365-standard-train": Partition(1_803_460, _PLACES),
    "places365-challenge-train": Partition(8_026_628, f"{_PLACES}; its description also says 8,097,967"),
    "places365-val": Partition(36_500, _PLACES),
    "places365-test": Partition(328_500, _PLACES),
    "celeba-hq": Partition(30_000, "https://github.com/tkarras/progressive_growing_of_gans, non-commercial"),
    "celeba-hq-deepfill-train": Partition(28_000, _DEEPFILL),
    "celeba-hq-deepfill-val": Partition(2_000, _DEEPFILL),
    "paris-streetview-train": Partition(14_900, _PARIS),
    "paris-streetview-test": Partition(100, _PARIS),
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
        if self.missing:
            parts.append(f"{self.missing:,} listed images are not in the root, e.g. {self.missing_examples[0]!r}")
        if self.unlisted:
            parts.append(
                f"{self.unlisted:,} images in the root are not in the list, e.g. {self.unlisted_examples[0]!r}"
            )
        return "; ".join(parts)


def compare(name: PartitionName, source: Source, keys: Sequence[str]) -> CountReport:
    """The *keys* of *source* beside the partition *name*; for a list, also beside what its root holds."""
    facts: dict[str, Any] = {}
    if isinstance(source, KeyList):
        for what, some in zip(("missing", "unlisted"), source.compare_with_root(), strict=True):
            facts |= {what: len(some), f"{what}_examples": some[:_EXAMPLES]}
    return CountReport(name, PARTITIONS[name].images, len(keys), note=PARTITIONS[name].note, **facts)
