"""Writes the pages of this folder out of the code: `make docs`. A test says when they are stale."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from pipeline.config import RunConfig, difference
from pipeline.data.prepare_config import PrepareConfig
from pipeline.demo.run import DemoConfig
from pipeline.evaluation.config import EvaluateConfig
from pipeline.inpaint.config import InpaintConfig
from pipeline.presets import PRESETS
from pipeline.promotion.promote import PromoteConfig
from pipeline.runs.submit import SubmitConfig
from pipeline.service.config import ServeConfig, WebConfig
from pipeline.sweep.ablate import AblateConfig
from pipeline.sweep.config import SweepConfig

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "docs" / "reference"

JOBS: dict[str, type] = {
    "train_places": RunConfig,
    "prepare": PrepareConfig,
    "sweep": SweepConfig,
    "ablate": AblateConfig,
    "promote": PromoteConfig,
    "evaluate": EvaluateConfig,
    "inpaint": InpaintConfig,
    "web": WebConfig,
    "serve": ServeConfig,
    "submit": SubmitConfig,
    "demo": DemoConfig,
}

VARIABLES = {
    "AWS_*": "credentials and region of S3, as every AWS client reads them; `AWS_ENDPOINT_URL` names another server",
    "MLFLOW_TRACKING_URI": "tracking server where `tracking.uri` and `--tracking-uri` say nothing",
    "RAY_ADDRESS": "cluster to join; `ray job submit` sets it. Without it a job starts Ray on this machine",
    "RAY_AUTH_MODE": "`token` or `disabled`, the same on every node and for every command",
    "RAY_AUTH_TOKEN": "the cluster's token; or `RAY_AUTH_TOKEN_PATH`, or the file `~/.ray/auth_token`",
    "TMAD_COMMIT": "commit that runs record where the code arrives without its repository",
    "TMAD_LOG": "`json`: log lines as JSON objects with run, rank and step (`pipeline/observe/logs.py`)",
    "TMAD_STACK": "set by `make stack` in the environment of its own processes",
    "TMAD_STORAGE_ATTEMPTS": "times that a request to storage is made",
    "TMAD_STORAGE_CONNECT_S": "seconds to reach it",
    "TMAD_STORAGE_SILENCE_S": "seconds without a byte until a request counts as lost",
    "TMAD_STORAGE_TOTAL_S": "seconds for one look-up or part of a file, attempts included",
    "TMAD_MODEL": "the model that `tmad inpaint`, `web` and `serve` take when none is named",
    "TMAD_WEB_TOKEN": "the token that `tmad web` and `tmad serve` ask for",
    "TMAD_SOAK_S": "has pytest run the soaks; those at random moments go on for so many seconds (`make soak`)",
}

NOTE = "<!-- Written by docs/reference/generate.py (`make docs`); changes belong into the code. -->\n\n"


def field_docstrings(kind: type) -> dict[str, str]:
    """The string under each field of the dataclass *kind*, its bases included, in one line."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(definition, ast.ClassDef)
        for field, after in zip(definition.body, definition.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[field.target.id] = " ".join(str(after.value.value).split())
    return found


def shown_type(kind: Any) -> str:
    """`int`, `"fp32" or "bf16"`, `text or none`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return shown_type(arguments[0])
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(shown_type(one) for one in arguments)
    if origin is not None:
        return f"{origin.__name__} of {', '.join(shown_type(one) for one in arguments if one is not ...)}"
    names = {str: "text", int: "integer", float: "number", bool: "yes or no", type(None): "none"}
    return names.get(kind) or str(getattr(kind, "__name__", kind))


def settings(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(name, type, default, meaning) of every setting below the dataclass *kind*, nested ones dotted."""
    hints, meanings = typing.get_type_hints(kind, include_extras=True), field_docstrings(kind)
    for field in dataclasses.fields(kind):
        default = field.default
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            yield from settings(type(default), f"{prefix}{field.name}.")
            continue
        words = {None: "none", True: "yes", False: "no"} if default is None or isinstance(default, bool) else {}
        shown = "" if default is dataclasses.MISSING else words.get(default, str(default))
        yield f"{prefix}{field.name}", shown_type(hints[field.name]), shown, meanings.get(field.name, "")


def option(name: str) -> str:
    """As the command line spells it."""
    return "--" + name.replace("_", "-")


def cell(text: str) -> str:
    """*text* inside a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def configuration() -> str:
    """The page of settings, presets and environment variables."""
    lines = [
        "# Configuration",
        "",
        "Every setting of every job, with its default. [P]: the paper's value; [D]: settled here,",
    ]
    lines += [
        "[decisions](../decisions/README.md). `config.json` of a run has these names, with `_` for `-`. A setting that",
        "is yes or no is switched by itself: `--workers.use-gpu`, `--workers.no-use-gpu`.",
        "",
    ]
    for job, kind in JOBS.items():
        lines += [f"## jobs/{job}.py", "", " ".join((kind.__doc__ or "").split()), ""]
        lines += ["| Setting | Value | Default | Meaning |", "|---|---|---|---|"]
        for name, type_, default, meaning in settings(kind):
            shown = f"`{default}`" if default else "needed"
            lines.append(f"| `{option(name)}` | {cell(type_)} | {cell(shown)} | {cell(meaning)} |")
        lines.append("")
    lines += ["## Presets", "", "`jobs/train_places.py --preset NAME`: what differs from the defaults above.", ""]
    for name, make in PRESETS.items():
        lines += [f"### {name}", "", (make.__doc__ or "").split("\n")[0], ""]
        for change in difference(RunConfig(), make()):
            setting, _, values = change.partition(": ")
            value = values.partition(" -> ")[2]
            plain = option(setting) if value != "False" else re.sub(r"([^.-][^.]*)$", r"no-\1", option(setting))
            lines.append(f"- `{plain}`" if value in ("True", "False") else f"- `{plain} {value}`")
        lines.append("")
    lines += ["## Environment variables", "", "| Variable | Meaning |", "|---|---|"]
    lines += [f"| `{name}` | {cell(meaning)} |" for name, meaning in VARIABLES.items()]
    return NOTE + "\n".join(lines).rstrip() + "\n"


def pages() -> dict[Path, str]:
    """Every page of this folder and what it should say."""
    return {FOLDER / "configuration.md": configuration()}


if __name__ == "__main__":
    for path, content in pages().items():
        path.write_text(content)
