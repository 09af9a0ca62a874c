"""Writes the dashboards' JSON: `python -m grafana.build`. What is checked in must be what it writes."""

from __future__ import annotations

import json
from pathlib import Path

from grafana.boards import DASHBOARDS

FOLDER = "grafana/dashboards"
ROOT = Path(__file__).resolve().parent.parent


def files() -> dict[str, str]:
    """The text of every dashboard by its path in the repository."""
    return {
        f"{FOLDER}/{dashboard.uid}.json": json.dumps(dashboard.json(), indent=1, ensure_ascii=False) + "\n"
        for dashboard in DASHBOARDS
    }


def main() -> None:
    """Writes them."""
    for name, text in files().items():
        (ROOT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
