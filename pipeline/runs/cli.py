"""The command line of every job: a configuration class, presets, overrides, one-line errors.

`parse` makes the options out of the class itself (tyro): the help text is the docstring under each field, a value is
read by its field's type, and an unknown option lists the near ones. `run_job` sets up logging and turns the errors that
a caller can cause into one line and exit code 1.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TextIO, TypeVar

from pydantic import ValidationError

from pipeline import storage
from pipeline.errors import Interrupted, TMADError, one_line
from pipeline.observe.logs import formatter
from pipeline.runs.progress import LogHandler
from tmad.config import from_dict

ConfigT = TypeVar("ConfigT")

PLACES = {
    "runs": "runs",
    "out": "out",
    "output": "output",
    "export": "export",
    "data": "data",
    "training_set": "train",
    "validation_set": "val",
}
"""Attributes of configurations that are places of runs, sets and results, each with its option."""

ENDS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a job as Ctrl-C does."""

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
    range. Raises `ValueError` for an unknown preset, for a configuration file that does not fit, and for relative
    places in a submitted job.
    """
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config")
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--debug", action="store_true")
    known, rest = first.parse_known_args(arguments)
    if "" in (known.preset, known.config):
        raise ValueError(f"--{'preset' if known.preset == '' else 'config'} is empty; give a value, or leave it out")
    if known.preset and known.config:
        raise ValueError("--preset and --config exclude each other: a configuration file is complete by itself")
    start: dict[str, Any] = {}
    if known.preset:
        start["default"] = _preset(known.preset, presets or {})
    elif known.config:
        start["default"] = _from_file(kind, known.config)
    if start:
        _check_sets(rest, start["default"])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config = tyro.cli(kind, args=rest, prog=prog, description=_help_text(description, presets or {}), **start)
    except SystemExit as end:
        if (wrong := _refused_value(end)) is None:
            print(said.getvalue(), end="", file=sys.stderr)
            raise
        print(f"{one_line(wrong)}; --help explains the options", file=sys.stderr)
        sys.exit(2)
    _check_filled(config)
    _check_places(config)
    command = Command(config=config, dry_run=known.dry_run)
    if storage.elsewhere:
        raise _Parsed(command)
    return command


def _refused_value(end: BaseException) -> ValueError | None:
    """What a configuration said against its values, if that is why the command line's reader ended: it would show
    pydantic's own text."""
    error = end.__context__
    while error is not None and not isinstance(error, ValidationError):
        error = error.__context__
    return error


class _Parsed(BaseException):
    """A job has come to its configuration and is to go no further; no `except Exception` of its holds this up."""

    def __init__(self, command: Command[Any]) -> None:
        super().__init__(command)
        self.command = command


def parse_elsewhere(main: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> Command[Any]:
    """What `main(argv)` would parse where it was submitted, and nothing else of it. Raises and exits as `parse`."""
    storage.elsewhere.append(True)
    try:
        main(argv)
    except _Parsed as parsed:
        return parsed.command
    finally:
        storage.elsewhere.clear()
    raise AssertionError("a job parses its command line")


def _check_filled(config: Any, prefix: str = "") -> None:
    """Raise `ValueError` for an option that is empty, as one from an unset variable of a shell is: as a place it would
    be the current folder."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            _check_filled(value, f"{name}.")
        elif value == "" and field.default != "":
            raise ValueError(f"--{name} is empty; give a value, or leave the option out")


def _check_places(config: Any) -> None:
    """Raise `ValueError` for a relative place in a submitted job: it would lie in Ray's copy of the uploaded folder,
    which is another one after each change of the code."""
    relative = [
        f"--{name} {place}"
        for name, place in _places(config)
        if not storage.is_remote(place) and not place.startswith(("/", "file://"))
    ]
    if storage.submitted() and relative:
        raise ValueError(
            "a submitted job runs in Ray's copy of the uploaded folder, where nothing lasts: each place must be a URI "
            f"(s3://bucket/...) or an absolute folder that all machines see, got {', '.join(relative)}"
        )


def _places(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Option and value of each place."""
    for attribute, option in PLACES.items():
        if isinstance(place := getattr(config, attribute, None), str):
            yield prefix + option, place
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(inner := getattr(config, field.name)):
            yield from _places(inner, f"{prefix}{field.name.replace('_', '-')}.")


def _preset(name: str, presets: Mapping[str, Callable[[], ConfigT]]) -> ConfigT:
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=3) or list(presets)
        raise ValueError(f"unknown preset {name!r}; did you mean {', '.join(near) or 'none: this job has no presets'}?")
    return presets[name]()


def _from_file(kind: type[ConfigT], uri: str) -> ConfigT:
    if not storage.exists(uri):
        raise ValueError(f"--config: there is no {storage.redact(uri)}; runs keep theirs in runs/<name>/config.json")
    try:
        values = json.loads(storage.read_bytes(uri), object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config: {storage.redact(uri)} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: {storage.redact(uri)} must hold a JSON object, got {type(values).__name__}")
    return from_dict(kind, values)


def _no_name_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python's reader alone would silently keep the last of equal names."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
        raise ValueError(f"it says {', '.join(twice)} twice")
    return values


def _check_sets(arguments: Sequence[str], start: Any) -> None:
    """Raise `ValueError` if *arguments* name another training set than *start* has, and leave it its validation set."""
    options = {argument.split("=", 1)[0] for argument in arguments}
    for option in options:
        beside = option.removesuffix("train") + "val"
        if option.endswith("data.train") and beside not in options:
            val = getattr(start, "run", start).data.val
            raise ValueError(
                f"{option} without {beside}: the run would be validated on {val}, which goes with another training "
                f"set; give both, or `{beside} None` for the folder val beside the training set"
            )


def _help_text(description: str, presets: Mapping[str, Callable[[], Any]]) -> str:
    lines = [description.strip(), "", "Before single settings:"]
    if presets:
        lines.append(f"  --preset NAME    start from a named configuration: {', '.join(presets)}")
    lines += [
        "  --config FILE    start from the config.json of an earlier run (file or URI)",
        "  --dry-run        print the resolved configuration, look at all that the job needs, and stop",
        "  --debug          show where an error came from",
    ]
    return "\n".join(lines)


def with_model(argv: Sequence[str]) -> list[str]:
    """*argv* with the model of `TMAD_MODEL`, if it names none itself."""
    model = os.environ.get("TMAD_MODEL")
    named = any(one in ("--config", "--model") or one.startswith(("--config=", "--model=")) for one in argv)
    return [*argv, "--model", model] if model and not named else list(argv)


def run_job(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run `main(argv)` as a program: logging to stderr, errors as one line, exit code.

    Exit code 1 with one line for `TMADError`, `ValueError`, what a system refuses and what MLflow refuses or Ray has
    lost, with the traceback for anything unexpected or with `--debug`; 130 after Ctrl-C. SIGTERM (code 143) and the end
    of its terminal (129) end it as Ctrl-C does, so that what a job holds is released.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _split_stderr()
    configure_logging()
    # `nohup` has the terminal's end ignored.
    heard = [number for number in ENDS if signal.getsignal(number) is not signal.SIG_IGN]
    _signals.clear()
    _gone.clear()
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        code = main(arguments)
    except KeyboardInterrupt:
        if _gone:
            reason, _gone[0] = _gone[0], ""
            log.error("%s", reason)
            sys.exit(1)
        number = _signals[0] if _signals else signal.SIGINT
        log.error("stopped by %s; the same command continues where it stopped", signal.Signals(number).name)
        sys.exit(128 + number)
    except Interrupted as error:
        log.error("%s", one_line(error))
        sys.exit(128 + (error.details.get("signal") or signal.SIGTERM))
    except Exception as error:
        if not isinstance(error, TMADError | ValueError | OSError) and not _of_a_library(error):
            raise
        if "--debug" in arguments:
            log.exception("failed")
        else:
            log.error("%s", storage.redact(_loss_of_ray(error) or one_line(error)))
        sys.exit(1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    sys.exit(code or 0)


_STDERR = 2
_own_stderr: list[TextIO] = []
"""That of Python alone, in a job."""


def _split_stderr() -> None:
    """Have Python write to stderr by a descriptor of its own, and leave the common one to libraries."""
    if (common := sys.__stderr__) is not None and sys.stderr is common:
        mine = os.fdopen(os.dup(_STDERR), "w", 1, encoding=common.encoding, errors=common.errors)
        _own_stderr.append(mine)
        sys.stderr = mine


def silence_libraries() -> None:
    """Let only Python write to a job's stderr from now on. Ray's C++ shows errors about processes of its own, about
    which nobody can do anything; its log files have them too."""
    if _own_stderr:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, _STDERR)
        os.close(nowhere)


_signals: list[int] = []
"""Those that have ended the job."""


def interrupt(number: int, _: Any = None) -> NoReturn:
    """End the job by signal *number*, as Ctrl-C does: Ray's waiting calls let no other exception of a handler pass."""
    _signals.append(number)
    raise KeyboardInterrupt


_gone: list[str] = []
"""Why the job cannot continue, as found by another thread."""


def give_up(reason: str, *, within_s: float) -> None:
    """End the job with *reason* and exit code 1, from any thread: as Ctrl-C does, or, where the job does not come to
    hear of it *within_s*, at once."""
    _gone.append(reason)
    _thread.interrupt_main()
    time.sleep(within_s)
    if _gone[0]:
        log.error("%s", reason)
    os._exit(1)


def given_up() -> bool:
    """Whether the job is being ended by `give_up`."""
    return bool(_gone)


def _loss_of_ray(error: Exception) -> str | None:
    """That the cluster is gone, where this is what *error* of Ray's came from: Ray names an actor and a socket."""
    if not type(error).__module__.startswith("ray."):
        return None
    from pipeline.runs.cluster import loss

    return loss()


def _of_a_library(error: Exception) -> bool:
    """Whether *error* is what MLflow refuses or Ray has lost, which its message tells; what a task raised is not."""
    task = any(kind.__name__ == "RayTaskError" for kind in type(error).__mro__)
    return type(error).__module__.startswith(("mlflow.", "ray.")) and not task


def configure_logging(run: str = "", rank: int | None = None) -> None:
    """Send log lines to stderr with time, level, run name and rank where given (`pipeline.observe.logs` says how they
    look); libraries only from warnings up."""
    handler = LogHandler()
    handler.setFormatter(formatter(run, rank))
    root = logging.getLogger()
    for old in [one for one in root.handlers if isinstance(one, logging.StreamHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for ours in ("tmad", "pipeline", "jobs", "__main__"):
        logging.getLogger(ours).setLevel(logging.INFO)
    # Ray Data shows what a task raised with all of its own frames, before whoever called it says it in a line.
    for twice in ("exceptions", "_internal.execution.streaming_executor_state"):
        logging.getLogger(f"ray.data.{twice}").setLevel(logging.CRITICAL)
