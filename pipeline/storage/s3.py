"""S3 beyond fsspec: timeouts, retryable errors, and refusals in plain words.

Requests are repeated in one place each (`docs/decisions/019-retries.md`): a request that is not answered by botocore,
a body that arrives cut short by `pipeline.storage`, which is the only user of this module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SCHEMES = ("s3://", "s3a://")

ENVIRONMENT = {
    "attempts": "TMAD_STORAGE_ATTEMPTS",
    "connect_s": "TMAD_STORAGE_CONNECT_S",
    "silence_s": "TMAD_STORAGE_SILENCE_S",
    "total_s": "TMAD_STORAGE_TOTAL_S",
}
"""Variables that change `Patience`. Storage is used before and beside any configuration, in every worker; workers of
a Ray that a job starts inherit them."""

_CREDENTIALS = (
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "InvalidClientTokenId",
    "AuthFailure",
    "RequestTimeTooSkewed",
)
_LOOKED_AT = (
    "looked at AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials and the machine's role"
)


@dataclass(frozen=True)
class Patience:
    """How long storage is waited for. At most *attempts* x (*connect_s* + *silence_s*) and the pauses between attempts
    pass before a server that does not answer is an error; *total_s* bounds that again, whatever the server does."""

    attempts: int = 5
    """Times that a request is made before it is given up; the pauses are rand(0, 1) times 1, 2, 4, 8 ... 20 s."""
    connect_s: float = 5.0
    """Seconds to reach the endpoint."""
    silence_s: float = 20.0
    """Seconds without a byte until a request counts as lost."""
    total_s: float = 300.0
    """Seconds for one look-up, deletion, or part of a file (32 MiB read, 50 MiB written), attempts included."""

    @staticmethod
    def of_environment() -> Patience:
        """The defaults, changed by the variables of `ENVIRONMENT`. Raises `ValueError` naming one that is no positive
        number."""
        values: dict[str, Any] = {}
        for field, name in ENVIRONMENT.items():
            text = os.environ.get(name, "")
            if not text:
                continue
            kind = int if field == "attempts" else float
            try:
                values[field] = kind(text)
            except ValueError:
                values[field] = 0
            if not values[field] > 0:
                raise ValueError(f"{name} must be a positive number, got {text!r}")
        return Patience(**values)

    def client_settings(self) -> dict[str, Any]:
        """`botocore.client.Config` with this patience: exponential pauses with full jitter, for 5xx, SlowDown,
        resets and timeouts alone."""
        return {
            "retries": {"mode": "standard", "total_max_attempts": self.attempts},
            "connect_timeout": self.connect_s,
            "read_timeout": self.silence_s,
        }


@dataclass(frozen=True)
class Cause:
    """Why storage failed."""

    kind: str
    """`credentials`, `permission`, `bucket`, `endpoint`, `connection`, `timeout`, `server`, `incomplete`, `request`."""
    words: str
    """For the message; without secrets."""


class CutShort(OSError):
    """Fewer bytes of a file came than were asked for."""


def passes(error: BaseException) -> bool:
    """Whether *error* is a body that ended early: the one transient fault that botocore does not repeat, since it has
    handed the body over by then."""
    return isinstance(error, CutShort) or _is(
        error,
        "aiohttp.ClientPayloadError",
        "aiohttp.ClientConnectionError",
        "botocore.ResponseStreamingError",
        "botocore.IncompleteReadError",
        "aiobotocore.AioReadTimeoutError",
    )


def error_code(error: BaseException) -> str:
    """S3's error code (`NoSuchBucket`), the bare status where a HEAD was refused (`403`), empty for anything else."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def needs_code(error: BaseException) -> bool:
    """Whether S3 refused without saying why, as the answer to a HEAD has no body."""
    return error_code(error) in ("400", "403")


_WITHOUT_ANSWER = (
    (
        "botocore.NoCredentialsError botocore.PartialCredentialsError botocore.CredentialRetrievalError",
        "credentials",
        f"no complete credentials were found; {_LOOKED_AT}",
    ),
    (
        "botocore.ProfileNotFound botocore.TokenRetrievalError botocore.SSOTokenLoadError "
        "botocore.UnauthorizedSSOTokenError",
        "credentials",
        f"AWS_PROFILE names no usable profile; {_LOOKED_AT}",
    ),
    ("fsspec.FSTimeoutError", "timeout", f"{{where}} was not done in time; {ENVIRONMENT['total_s']} is the bound"),
    (
        "botocore.ReadTimeoutError",
        "timeout",
        f"{{where}} stayed silent in each of {{attempts}} attempts; {ENVIRONMENT['silence_s']} is the bound",
    ),
    (
        "botocore.ResponseStreamingError botocore.IncompleteReadError aiohttp.ClientPayloadError",
        "incomplete",
        "the file arrived cut short in each of {attempts} attempts",
    ),
    ("pipeline.CutShort", "incomplete", "the file arrived cut short in each of {attempts} attempts ({error})"),
    (
        "botocore.ConnectTimeoutError botocore.ProxyConnectionError botocore.SSLError aiohttp.ClientConnectorError",
        "endpoint",
        "{where} cannot be reached ({attempts} attempts); AWS_ENDPOINT_URL names another",
    ),
    (
        "botocore.ConnectionError botocore.HTTPClientError aiohttp.ClientConnectionError",
        "connection",
        "{where} closed the connection without an answer in each of {attempts} attempts",
    ),
    (
        "botocore.ParamValidationError",
        "request",
        "the URI has no valid bucket or key; s3://bucket/key is expected",
    ),
    ("botocore.BotoCoreError aiohttp.ClientError", "request", "{kind}: {error}"),
)
"""Classes of errors that came without an answer of S3, the kind of the cause, and its words; the first that fits."""


def cause_of(error: BaseException, *, bucket: str, endpoint: str, attempts: int) -> Cause | None:
    """What *error* of s3fs, botocore or aiohttp means; `None` if it is not one of theirs.

    *endpoint* is named where it could be wrong; *attempts* is how often a request is made.
    """
    code, answer = error_code(error), _answer(error).get("ResponseMetadata", {})
    status, repeated = int(answer.get("HTTPStatusCode", 0)), answer.get("RetryAttempts")
    where = f"the endpoint {endpoint}" if endpoint else "the endpoint"
    answered = f"{where} answered {status}" + (f" {code}" if code not in ("", str(status)) else "")
    if code in _CREDENTIALS:
        return Cause("credentials", f"{where} refused the credentials ({code}); {_LOOKED_AT}")
    if code == "NoSuchBucket":
        return Cause("bucket", f"there is no bucket {bucket!r} at {where}")
    if status >= 500 or code in ("SlowDown", "Throttling", "RequestTimeout"):
        return Cause("server", f"{answered} to each of {attempts if repeated is None else int(repeated) + 1} attempts")
    if status in (401, 403):
        return Cause("permission", f"{where} does not allow it ({code or status}); {_LOOKED_AT}")
    if status >= 400 and status != 404:
        return Cause("request", answered)
    chain = list(_chain(error))
    for names, kind, words in _WITHOUT_ANSWER:
        if any(_is(one, *names.split()) for one in chain):
            said = " ".join(str(error).split())
            return Cause(kind, words.format(where=where, attempts=attempts, kind=type(error).__name__, error=said))
    return None


def endpoint_of(fs: Any, error: BaseException) -> str:
    """Scheme and host that *fs* talks to, without user and path; empty if unknown."""
    client = getattr(fs, "_s3", None)
    named = [getattr(one, "kwargs", {}) for one in _chain(error)]
    url = getattr(getattr(client, "meta", None), "endpoint_url", "") or next(
        (str(one["endpoint_url"]) for one in named if isinstance(one, dict) and "endpoint_url" in one), ""
    )
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}" if parts.netloc else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """*error*, what caused it, and what botocore wrapped in it."""
    seen: list[BaseException] = []
    todo = [error]
    while todo:
        one = todo.pop(0)
        if one is None or one in seen:
            continue
        seen.append(one)
        yield one
        wrapped = getattr(one, "kwargs", None)
        inner = wrapped.get("error") if isinstance(wrapped, dict) else None
        todo += [one.__cause__, inner if isinstance(inner, BaseException) else None]


def _is(error: BaseException, *names: str) -> bool:
    """Whether *error* is of one of these classes, `package.Name`, or of one derived from it: by name, because the
    packages are only imported where S3 is used."""
    return any(f"{kind.__module__.split('.')[0]}.{kind.__name__}" in names for kind in type(error).__mro__)


def _answer(error: BaseException) -> dict[str, Any]:
    """S3's answer that *error* came from, empty if there was none."""
    answers = (getattr(one, "response", None) for one in _chain(error))
    return next((one for one in answers if isinstance(one, dict)), {})
