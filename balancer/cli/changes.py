"""changes: the log of who changed what, over the admin API and by commands."""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime

import msgspec

from balancer import config
from balancer.cli.store import opened
from balancer.errors import ConfigurationError
from balancer.store import connection
from balancer.store.changes import KEPT, ChangeLog, Noted
from balancer.store.topology import Topology


def run(options: argparse.Namespace) -> int:
    """Prints the newest changes, the newest first; 0."""
    if not 1 <= options.limit <= KEPT:
        raise ConfigurationError(f"--limit: expected 1 to {KEPT}, not {options.limit}")
    settings = config.load(vars(options))
    with opened(settings) as store:
        found = asyncio.run(_newest(store.url, options.limit, options.before))
    for noted in found:
        print(msgspec.json.encode(noted).decode() if options.output == "json" else _text(noted))
    return 0


async def _newest(url: str, limit: int, before: str) -> list[Noted]:
    commands = connection.Commands(Topology(url))
    try:
        return await ChangeLog(commands).newest(limit, before)
    finally:
        await commands.aclose()


def _text(noted: Noted) -> str:
    change = noted.change
    when = datetime.fromtimestamp(noted.at_ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    revision = f", revision {change.revision}" if change.revision else ""
    lines = [f"{when}  {noted.id}  {change.who} ({change.via}): {change.action}{revision}"]
    lines += [f"  {line}" for line in change.differences]
    if change.left_out:
        lines.append(f"  … and {change.left_out} more")
    return "\n".join(lines)
