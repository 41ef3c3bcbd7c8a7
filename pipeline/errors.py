"""Exceptions: one class per situation that a caller may want to catch, with one root.

Every error survives pickling with its details, because Ray carries it from a worker to the driver. Wrong values of
settings and arguments are plain `ValueError`s and have no class here.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError


class TMADError(Exception):
    """Root of the errors that end a job with one clear line instead of a traceback.

    *message* says what happened, what was expected and where to change it; *details* are plain values for a program.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(kind: type[TMADError], message: str, details: dict[str, Any]) -> TMADError:
    return kind(message, **details)


class MissingInput(TMADError):
    """A file, a folder or an image that the job was asked to read is not there, or there is nothing usable in it."""


class StorageFailed(TMADError):
    """Storage refused to read or to write: unknown scheme, missing package, permission, network.

    `details["kind"]` is that of `pipeline.storage.s3.Cause`, or `other`.
    """


class CorruptSource(TMADError):
    """A collection of images that is not what it should be: a cut or compressed archive, a table without images, a
    list that contradicts itself."""


class WrongCount(TMADError):
    """A collection does not hold the images that its partition has; `details["report"]` has the numbers."""


class FolderInUse(TMADError):
    """Another job writes to the same folder, or took it over while this one gave no sign of life; `details["holder"]`
    says who."""


class VanishedImages(TMADError):
    """Images that a prepared set was made of are no longer in its source; `details["keys"]` names them."""


class UnfinishedSet(TMADError):
    """A prepared set whose manifest was never written: its preparation was stopped and has to be run again."""


class CorruptSet(TMADError):
    """A prepared set whose files are not what its manifest says."""


class WrongVersion(TMADError):
    """Something was written in a format that this version of the code does not read."""


class ConfigMismatch(TMADError):
    """Settings differ from those of what is already there; `details["differences"]` maps names to both values."""


class TooManyBadImages(TMADError):
    """More inputs were unusable than the settings allow; `details["reasons"]` counts them by reason."""


class SharedImages(TMADError):
    """Images of a set are also in the one that it was to share none with; `details["keys"]` names them."""


class UnfitResults(TMADError):
    """The results of another method do not fit the evaluation set; `details["missing"]`, `["sizes"]` and `["unknown"]`
    list the images that have none, those of another size, and files that belong to no image."""


class ClusterTooSmall(TMADError):
    """The job asks for more CPUs, GPUs or memory than the Ray cluster has."""


class ClusterUnreachable(TMADError):
    """Nothing answers where the Ray cluster should be."""


class TrackingUnreachable(TMADError):
    """The tracking server does not answer, or refuses."""


class ModelNotFound(TMADError):
    """No model where one was looked for; the message lists every place."""


class WeightsMismatch(TMADError):
    """A model's weights do not fit the networks that are to start from them; `details["report"]` lists every tensor."""


class CheckpointNotKept(TMADError):
    """Storage does not take a checkpoint, after all patience; raised on all workers alike."""


class CheckpointsDamaged(TMADError):
    """A run has checkpoints, and none of them is what was written; `details["damaged"]` says by name what is wrong."""


class Interrupted(TMADError):
    """Training was stopped and can continue from its newest checkpoint; `details["restart"]` says whether Ray is to
    start its workers again by itself."""


class TrainingFailed(TMADError):
    """Training stopped before its end; `details["checkpoint"]` names the last good one, if there is any."""


class SweepFailed(TMADError):
    """A trial of a sweep failed for good, or none came to its end."""


class NotPromoted(TMADError):
    """A version of a model stays without the alias; the message has the reason, `details["reasons"]` all of them."""


def one_line(error: BaseException) -> str:
    """The message of *error* without line breaks and without Ray's traceback around it; pydantic's are reduced to
    `field: what is wrong`."""
    # An error from a Ray task is a class of both kinds, whose text is the remote traceback.
    if isinstance(cause := getattr(error, "cause", None), Exception):
        error = cause
    if isinstance(error, ValidationError):
        parts = []
        for item in error.errors(include_url=False):
            place = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            parts.append(f"{place}: {message}, got {item['input']!r}" if place else message)
        return "; ".join(parts)
    return " ".join(str(error).split()) or type(error).__name__
