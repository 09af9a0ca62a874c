"""Schemathesis at the admin server: told which names there are, so that it gets behind the first look at them."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from tests.admin.conftest import RULE, TOKEN, Admin

KNOWN: dict[str, list[str]] = {
    "rule": [RULE, "side", "off", "later"],
    "provider": ["a", "b", "c"],
    "scenario": ["openai", "anthropic", "claude_code", "opencode"],
    "service": ["a:m:1", "b:org/m 2", "c:m"],
    "If-Match": ["*"],
}
SETTINGS = """\
[checks.not_a_server_error]
# No service of a rule may be active: a pick is told so.
expected-statuses = ["2xx", "3xx", "4xx", 503]
[checks.negative_data_rejection]
# What the client has not read is looked at before what it wrote.
expected-statuses = [400, 401, 403, 404, 405, 409, 412, 413, 415, 428]
"""
MODELS = ["m:1", "org/m 2", "m"]


def told(description: dict[str, Any]) -> dict[str, Any]:
    """The description, in which names are often those that there are."""
    for methods in description["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] in KNOWN:
                    parameter["schema"] = _often(KNOWN[parameter["name"]], parameter["schema"])
    schemas = description["components"]["schemas"]
    for name, field, known in (
        ("Service", "provider", KNOWN["provider"]),
        ("Service", "model", MODELS),
        ("PickRequest", "rule", KNOWN["rule"]),
        ("Rule", "pool", ["default", "side.1"]),
    ):
        schemas[name]["properties"][field] = _often(known, schemas[name]["properties"][field])
    return description


def _often(known: list[str], schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [{"enum": known}, schema]}


async def fuzz(admin: Admin, folder: Path, seconds: int, *excluded: str) -> tuple[int, str]:
    """The exit status of a run of so many seconds with all checks but those, and what it printed."""
    file = folder / "openapi.json"
    file.write_bytes(msgspec.json.encode(told(await admin.get("/openapi.json"))))
    (folder / "schemathesis.toml").write_text(SETTINGS, encoding="utf-8")
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", admin.url]
    command += ["-H", f"Authorization: Bearer {TOKEN}", "--max-time", str(seconds), "--no-color", "--seed", "1"]
    command += ["--checks", "all", "--exclude-checks", ",".join(excluded), "--phases", "coverage,fuzzing"]
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(("BALANCER_", "PYTEST_"))},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    return process.returncode or 0, printed.decode()
