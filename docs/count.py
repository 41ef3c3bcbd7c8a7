"""Counts the house: files, lines, comments, arrows between packages, ways onto Ray, ways to say finished.

    python docs/count.py [FOLDER ...]

Each FOLDER is a checkout (default: this one); one column each.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import sys
import tokenize
from pathlib import Path

PRODUCT = ("tmad", "pipeline", "jobs")
ONTO_RAY = ("from_items", "read_datasource", "ray.remote", "TorchTrainer(", "Tuner(", "ray.init(")
FINISHED = ("finished.json", "receipt", "LEDGER", "SUMMARY_FILE", "MANIFEST_NAME")
"""Words by which a module says, or asks, that something is finished."""


ENDINGS = (".html", ".css", ".md")
"""Of templates."""

MARKUP = re.compile(r"</[a-z]+>|['\"]<[a-z]+[ >']")


def files(root: Path, *parts: str, ending: str = ".py") -> list[Path]:
    """The files of these folders of the checkout *root*."""
    return sorted(path for part in parts for path in (root / part).rglob(f"*{ending}"))


def lines(paths: list[Path]) -> list[int]:
    """Lines of each."""
    return [len(path.read_text(encoding="utf-8").splitlines()) for path in paths]


def comments(path: Path) -> int:
    """Comments, not docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def arrows(root: Path) -> set[tuple[str, str]]:
    """Which folder of the product imports from which other one."""
    found = set()
    folders = {path.parent.relative_to(root).as_posix() for path in files(root, *PRODUCT)}

    def folder_of(module: str) -> str:
        place = module.replace(".", "/")
        return place if place in folders else place.rpartition("/")[0]

    for path in files(root, *PRODUCT):
        here = path.parent.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PRODUCT:
                found.add((here, folder_of(node.module)))
    return {(one, other) for one, other in found if one != other}


def words_in(root: Path, words: tuple[str, ...]) -> str:
    """How many of *words* the product uses, and in how many files."""
    texts = [path.read_text(encoding="utf-8") for path in files(root, *PRODUCT)]
    used = [word for word in words if any(word in text for text in texts)]
    return f"{len(used)} in {sum(any(word in text for word in used) for text in texts)} files"


def counts(root: Path) -> dict[str, str]:
    """One column of the table."""
    product = files(root, *PRODUCT)
    numbers = lines(product)
    text = "\n".join(path.read_text(encoding="utf-8") for path in product)
    found = {
        "files": f"{len(product)}",
        "lines": f"{sum(numbers):,}",
        "median of a file": f"{statistics.median(numbers):.0f}",
        "lines of templates": f"{sum(sum(lines(files(root, 'pipeline', ending=end))) for end in ENDINGS):,}",
        "comments a 100 lines": f"{100 * sum(map(comments, product)) / sum(numbers):.2f}",
        "modules at the top of pipeline": f"{len(list((root / 'pipeline').glob('*.py'))) - 1}",
        "folders": f"{len({path.parent for path in product})}",
        "arrows between folders": f"{len(arrows(root))}",
        "ways onto Ray": words_in(root, ONTO_RAY),
        "words for finished": words_in(root, FINISHED),
        "lines of HTML or SVG in Python": f"{sum(bool(MARKUP.search(line)) for line in text.splitlines())}",
    }
    for part in ("tmad", "pipeline", "jobs", "benchmarks", "tests"):
        found[f"lines of {part}"] = f"{sum(lines(files(root, part))):,}"
    reference = files(root, "docs/reference", ending=".md")
    found["generated pages, kB"] = f"{sum(path.stat().st_size for path in reference) / 1000:.0f}"
    return found


def main() -> None:
    """Print the table."""
    roots = [Path(one) for one in sys.argv[1:]] or [Path(__file__).resolve().parent.parent]
    columns = [counts(root) for root in roots]
    print("| |" + "".join(f" {root.resolve().name} |" for root in roots))
    print("|---|" + "---:|" * len(roots))
    for name in columns[0]:
        print(f"| {name} |" + "".join(f" {column[name]} |" for column in columns))


if __name__ == "__main__":
    main()
