"""The console command `tmad`: `tmad JOB ...` is `python jobs/JOB.py ...`; `tmad inpaint PHOTO MASK -o RESULT` fills
one picture without Ray.

Nothing heavy is imported before the job is known.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHORT = {"train": "train_places"}
"""Commands whose job has a longer name."""


def commands() -> dict[str, str]:
    """Command -> module in this folder."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    long = {module: short for short, module in SHORT.items()}
    return {long.get(module, module).replace("_", "-"): module for module in modules}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that *argv* (default: the process's) names; ends the process with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if arguments == ["--version"]:
        print(f"tmad {version('tmad')}")
        sys.exit(0)
    if not arguments or arguments[0] not in known:
        asked_for_help = arguments[:1] in (["-h"], ["--help"])
        usage = f"usage: tmad {{{','.join(known)}}} ...\n\ntmad COMMAND --help explains each; one picture:\n"
        usage += "  tmad inpaint photo.jpg mask.png -o filled.jpg"
        print(usage, file=sys.stdout if asked_for_help else sys.stderr)
        sys.exit(0 if asked_for_help else 2)
    name, rest = arguments[0], arguments[1:]
    if name == "inpaint" and _names_one_file(rest):
        sys.exit(_inpaint_one(rest))
    from pipeline.runs.cli import run_job

    if name == "inpaint" and rest and not rest[0].startswith("-"):
        rest = _as_options(rest)
    run_job(import_module(f"jobs.{known[name]}").main, rest)


def _names_one_file(arguments: Sequence[str]) -> bool:
    """Whether the first argument is a picture rather than an option, a collection, or a place elsewhere."""
    first = arguments[0] if arguments else "-"
    collection = "://" in first or first.endswith((".tar", ".parquet", ".txt", ".lst", ".flist"))
    return not (first.startswith("-") or collection or Path(first).is_dir())


def _as_options(arguments: Sequence[str]) -> list[str]:
    """`PHOTOS [MASKS] -o OUT ...` as the options of the batch job."""
    short = {"-o": "--output", "-m": "--model"}
    rest = [short.get(text, text) for text in arguments[1:]]
    masks = ["--masks", rest.pop(0)] if rest and not rest[0].startswith("-") else []
    return ["--input", arguments[0], *masks, *rest]


def _inpaint_one(arguments: Sequence[str]) -> int:
    from tmad.shell import inpaint_one

    try:
        return inpaint_one(arguments)
    except ImportError:
        raise
    except Exception as error:  # one line for a user; --help, Ctrl-C and exits pass
        if not isinstance(error, ValueError | OSError) and type(error).__module__ != "pipeline.errors":
            raise
        print(f"tmad inpaint: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    main()
