"""All that is made out of the program, and checked in: pages, dashboards, manifests.

`python -m docs.build` (`make docs`) writes what is not as it would be made now, and fails if something was not.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Each is a module with a function `files()`, which gives texts by their paths below the root.
GENERATORS = (
    "docs.metrics",
    "grafana.build",
    "deploy.build",
)  # fmt: skip


def made(generator: str) -> dict[str, str]:
    """What a generator makes: texts by their paths below the root."""
    files: dict[str, str] = importlib.import_module(generator).files()
    return files


def stale(generator: str) -> Iterator[tuple[Path, str]]:
    """The files of a generator that are not as it makes them, with what should be in them."""
    for name, text in made(generator).items():
        path = ROOT / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            yield path, text


def main() -> int:
    """Writes what is stale; 1 if anything was."""
    found = [one for generator in GENERATORS for one in stale(generator)]
    for path, text in found:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        sys.stderr.write(f"stale, and made anew: {path.relative_to(ROOT)}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
