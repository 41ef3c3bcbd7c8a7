"""Runs what the documents say: `make docs-check`. The tests run the quick part.

1. Every link between the documents leads to a file and a heading that are there.
2. Every `python jobs/...` command in them has options and values that exist.
3. Every block marked `sh run` runs, in order, in a folder with small photographs (one folder a document).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from PIL import Image

from pipeline.demo.photographs import write_photographs
from tmad.masks import draw_mask
from tmad.rng import numpy_generator

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests" / "schemas").glob("*.md")])

SIDE = 160
"""The sandbox's photographs are that large."""


def anchors(text: str) -> set[str]:
    """What `#...` can name in a document: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "") for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def broken_links() -> Iterator[str]:
    """`document: link` of each that leads nowhere; addresses of other sites are not followed."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            there = path.parent / name if name else path
            if not there.exists():
                yield f"{path.relative_to(ROOT)}: {target}"
            elif anchor and there.suffix == ".md" and anchor not in anchors(there.read_text(encoding="utf-8")):
                yield f"{path.relative_to(ROOT)}: {target}: no such heading"


def job_commands() -> Iterator[tuple[str, list[str]]]:
    """(document, arguments from the job's name on) of every `python jobs/...` or `python -m jobs...` in a block."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for match in re.finditer(
            r"^(?: {4}|```sh.*\n)?[^`\n|]*?python (?:-m )?jobs[/.](\w+)(?:\.py)?( [^\n`]*)?$", text, re.M
        ):
            options = shlex.split((match.group(2) or "").split(" # ")[0], comments=True)
            yield str(path.relative_to(ROOT)), [match.group(1), *(one for one in options if one != "...")]


def refused_commands() -> Iterator[str]:
    """`document: command: why` of each whose options are not what its job takes."""
    for document, (job, *options) in job_commands():
        said = io.StringIO()
        module = importlib.import_module(f"jobs.{job}")
        stop = _Parsed()
        before = module.parse
        module.parse = stop.wrap(before)  # type: ignore[attr-defined]
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                module.main(options)
        except _Parsed:
            continue
        except SystemExit as end:
            if not end.code:
                continue
        except ValueError as error:
            # A configuration file that only the reader has.
            if "--config" in options:
                continue
            said.write(str(error))
        finally:
            module.parse = before  # type: ignore[attr-defined]
        yield f"{document}: {job} {shlex.join(options)}: {' '.join(said.getvalue().split())[:300]}"


class _Parsed(BaseException):
    """The options were read; nothing else is to happen."""

    def wrap(self, parse: Callable[..., Any]) -> Callable[..., Any]:
        """*parse*, and the end after it."""

        def read(*args: Any, **kwargs: Any) -> None:
            parse(*args, **kwargs)
            raise self

        return read


def runnable(path: Path) -> str:
    """The `sh run` blocks of a document, one script."""
    return "\n".join(re.findall(r"^```sh run\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))


def make_sandbox(folder: Path) -> None:
    """What the documents take for granted: the project, and `photos` with `train`, `val`, `damaged` and `holes`."""
    for name in ("jobs", "pipeline", "tmad", "infra"):
        (folder / name).symlink_to(ROOT / name)
    with tempfile.TemporaryDirectory(prefix="tmad-") as temporary:
        write_photographs(Path(temporary))
        for path in Path(temporary).glob("*/*.*"):
            if path.suffix not in (".png", ".jpg"):
                continue
            picture = Image.open(path).convert("RGB").resize((SIDE, SIDE))
            for place in (path.parent.name, "damaged") if path.parent.name == "val" else ("train",):
                (folder / "photos" / place).mkdir(parents=True, exist_ok=True)
                picture.save(folder / "photos" / place / f"{path.stem}.jpg")
    (folder / "photos" / "holes").mkdir()
    for path in (folder / "photos" / "damaged").iterdir():
        hole = draw_mask("rectangle", SIDE, SIDE, numpy_generator(0, "docs", path.stem))
        Image.fromarray(hole * np.uint8(255)).save(folder / "photos" / "holes" / f"{path.stem}.png")


def run(path: Path) -> int:
    """Run the blocks of a document in a sandbox; returns the exit code of the first command that fails."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_", "AWS_"))}
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables.get("PATH", os.defpath)])
    with tempfile.TemporaryDirectory(prefix="tmad-docs-") as temporary:
        make_sandbox(Path(temporary))
        script = "set -euxo pipefail\n" + runnable(path)
        return subprocess.run(["bash", "-c", script], cwd=temporary, env=variables).returncode


def main() -> int:
    """Check all documents; prints what is wrong, returns 1 if anything is."""
    wrong = [*broken_links(), *refused_commands()]
    for path in DOCUMENTS:
        if runnable(path):
            began = time.monotonic()
            print(f"── {path.relative_to(ROOT)}", flush=True)
            if code := run(path):
                wrong.append(f"{path.relative_to(ROOT)}: a command ended with code {code}")
            print(f"── {path.relative_to(ROOT)}: {time.monotonic() - began:.0f} s", flush=True)
    print("\n".join(wrong) or f"{len(DOCUMENTS)} documents, {sum(1 for _ in job_commands())} commands: all as they say")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
