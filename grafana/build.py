"""The dashboards as JSON; `make docs` writes them."""

from __future__ import annotations

import json

from grafana.boards import DASHBOARDS

FOLDER = "grafana/dashboards"


def files() -> dict[str, str]:
    """The text of every dashboard by its path in the repository."""
    return {
        f"{FOLDER}/{dashboard.uid}.json": json.dumps(dashboard.json(), indent=1, ensure_ascii=False) + "\n"
        for dashboard in DASHBOARDS
    }
