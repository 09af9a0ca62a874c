"""The log of changes: who did what to the fleet, and when. It is appended to, and never written over.

A publication is noted by the script that prepares its revision: there is none without the other. The newest 10 000 are
kept, for 400 days.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from balancer import document
from balancer.domain import Configuration
from balancer.errors import RequestError
from balancer.store import keys
from balancer.store.connection import Commands, translated
from balancer.store.scripts import load

KEPT = 10_000
AGE_MS = 400 * 24 * 3600 * 1000
MOST_TOLD_BYTES = 8192
"""So much of the differences is kept of one change."""
_ID = re.compile(r"\d{1,16}-\d{1,16}")


class Deed(msgspec.Struct, frozen=True, kw_only=True):
    """Who does what: the name of a token of the admin API, or the user of a command."""

    who: str
    via: Literal["api", "cli"]
    action: str


UNNAMED = Deed(who="unknown", via="cli", action="publish")


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What was done. `revision` is 0 for what published none; `left_out` counts differences that are not kept."""

    who: str
    via: str
    action: str
    revision: int = 0
    differences: tuple[str, ...] = ()
    left_out: int = 0


class Noted(msgspec.Struct, frozen=True, kw_only=True):
    """A change as it stands in the log, under its id there and with the server's time in ms."""

    id: str
    at_ms: int
    change: Change


def by_user(action: str) -> Deed:
    """A deed of whoever runs this process."""
    try:
        who = getpass.getuser()
    except (KeyError, OSError):
        who = f"uid {os.getuid()}"  # In a container its number need not have a name.
    return Deed(who=who, via="cli", action=action)


def of_revision(deed: Deed, revision: int, old: Configuration, new: Configuration) -> Change:
    """The change that a publication is. Credentials are in no difference, they only `changed`."""
    told, left_out = bounded(document.diff(old, new))
    return Change(
        who=deed.who, via=deed.via, action=deed.action, revision=revision, differences=told, left_out=left_out
    )


def bounded(lines: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Of the lines those that are kept, the long ones cut, and how many are not."""
    told: list[str] = []
    left = MOST_TOLD_BYTES
    for line in lines:
        short = line if len(line) <= 1000 else line[:999] + "…"
        left -= len(short.encode("utf-8", "replace"))
        if left < 0:
            break
        told.append(short)
    return tuple(told), len(lines) - len(told)


def arguments(change: Change) -> dict[str, str | int]:
    """What the scripts take of it."""
    return {"now_ms": 0, "change": msgspec.json.encode(change).decode(), "kept": KEPT, "age_ms": AGE_MS}


class ChangeLog:
    """Reads and appends. Raises StoreUnavailableError when Redis does not answer."""

    def __init__(self, commands: Commands, scripts_dir: str = "") -> None:
        self._commands = commands
        self._scripts_dir = scripts_dir

    async def note(self, deed: Deed, differences: Sequence[str] = ()) -> None:
        """Appends what publishes no revision."""
        told, left_out = bounded(differences)
        change = Change(who=deed.who, via=deed.via, action=deed.action, differences=told, left_out=left_out)
        script = load("note", self._scripts_dir)
        command = script.command({"changes": keys.CHANGES}, arguments(change))
        with translated("noting a change"):
            await self._commands.run(keys.CHANGES, "EVAL", script.source, *command)

    async def newest(self, limit: int, before: str = "") -> list[Noted]:
        """The newest changes, the newest first; those before an id if there is one. Raises RequestError for no id."""
        if before and not _ID.fullmatch(before):
            raise RequestError("expected the id of a change, as `next` gives it", param="before")
        end = f"({before}" if before else "+"
        with translated("reading the changes"):
            entries: Any = await self._commands.run(keys.CHANGES, "XREVRANGE", keys.CHANGES, end, "-", "COUNT", limit)
        return [_noted(id_, fields) for id_, fields in entries]


def _noted(id_: bytes, fields: Any) -> Noted:
    """The fields as a client parses them (a mapping), or as the server sends them (a flat list)."""
    pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
    name = id_.decode()
    try:
        change = msgspec.json.decode(dict(pairs)[b"change"], type=Change)
    except (KeyError, msgspec.DecodeError):
        change = Change(who="unknown", via="unknown", action="an entry that is not of this program")
    return Noted(id=name, at_ms=int(name.partition("-")[0]), change=change)
