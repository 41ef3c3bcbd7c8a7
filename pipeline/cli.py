"""The command line of every job: a configuration class, presets, overrides, and errors that are one line.

`parse` makes the options out of the class itself (tyro): the help text is the docstring under each field, a value is
read by its field's type, and an unknown option lists the near ones. `run_job` sets up logging and turns the errors that
a caller can cause into one line and exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

from pydantic import ValidationError

from pipeline import storage
from pipeline.errors import Interrupted, TMADError
from pipeline.logs import formatter
from tmad.config import from_dict

ConfigT = TypeVar("ConfigT")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command(Generic[ConfigT]):
    """What a command line asks for."""

    config: ConfigT
    dry_run: bool
    """Print the configuration and stop."""

    def resolved(self) -> str:
        """The configuration as JSON, as `--config` reads it."""
        return json.dumps(dataclasses.asdict(self.config), indent=2, ensure_ascii=False)  # type: ignore[call-overload]


def parse(
    kind: type[ConfigT],
    argv: Sequence[str] | None = None,
    presets: Mapping[str, Callable[[], ConfigT]] | None = None,
    *,
    prog: str | None = None,
    description: str = "",
) -> Command[ConfigT]:
    """Read *argv* (default: the process's) into a *kind*: `--preset` or `--config`, then single settings on top.

    *presets* are functions that make complete configurations; *description* is printed above the options and should
    show examples. `--debug` is left to `run_job`. Exits 0 after `--help`, 2 on an option that is unknown or out of
    range. Raises `ValueError` for an unknown preset and for a configuration file that does not fit.
    """
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--debug", action="store_true")
    known, rest = first.parse_known_args(arguments)
    if known.preset and known.config:
        raise ValueError("--preset and --config exclude each other: a configuration file is complete by itself")
    start: dict[str, Any] = {}
    if known.preset:
        start["default"] = _preset(known.preset, presets or {})
    elif known.config:
        start["default"] = _from_file(kind, known.config)
    config = tyro.cli(kind, args=rest, prog=prog, description=_help_text(description, presets or {}), **start)
    return Command(config=config, dry_run=known.dry_run)


def _preset(name: str, presets: Mapping[str, Callable[[], ConfigT]]) -> ConfigT:
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=3) or list(presets)
        raise ValueError(f"unknown preset {name!r}; did you mean {', '.join(near) or 'none: this job has no presets'}?")
    return presets[name]()


def _from_file(kind: type[ConfigT], uri: str) -> ConfigT:
    if not storage.exists(uri):
        raise ValueError(f"--config: there is no {storage.redact(uri)}; runs keep theirs in runs/<name>/config.json")
    try:
        values = json.loads(storage.read_bytes(uri))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {storage.redact(uri)} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: {storage.redact(uri)} must hold a JSON object, got {type(values).__name__}")
    return from_dict(kind, values)


def _help_text(description: str, presets: Mapping[str, Callable[[], Any]]) -> str:
    lines = [description.strip(), "", "Before single settings:"]
    if presets:
        lines.append(f"  --preset NAME    start from a named configuration: {', '.join(presets)}")
    lines += [
        "  --config FILE    start from the config.json of an earlier run (file or URI)",
        "  --dry-run        print the resolved configuration and stop",
        "  --debug          show where an error came from",
    ]
    return "\n".join(lines)


def run_job(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main(argv)` as a program: logging to stderr, errors as one line, exit code.

    Exit code 1 with one line for `TMADError` and `ValueError`, with the traceback for anything unexpected or with
    `--debug`; 130 after Ctrl-C. SIGTERM ends it as Ctrl-C does, so that what a job holds is released, with code 143.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    configure_logging()
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = main(arguments)
    except KeyboardInterrupt:
        log.error("interrupted; the same command with the same --name goes on")
        sys.exit(130)
    except Interrupted as error:
        log.error("%s", one_line(error))
        sys.exit(128 + signal.SIGTERM)
    except (TMADError, ValueError) as error:
        if "--debug" in arguments:
            log.exception("failed")
        else:
            log.error("%s", one_line(error))
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code or 0)


def configure_logging(run: str = "", rank: int | None = None) -> None:
    """Send log lines to stderr with time, level, run name and rank where given (`pipeline.logs` says how they look);
    libraries only from warnings up."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(run, rank))
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, logging.StreamHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for ours in ("tmad", "pipeline", "jobs", "__main__"):
        logging.getLogger(ours).setLevel(logging.INFO)


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
