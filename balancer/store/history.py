"""A pool's decision stream, read page by page, and checkpoints put into it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from balancer import stored
from balancer.errors import StoreUnavailableError
from balancer.store import keys
from balancer.store.scripts import load

Send = Callable[..., Awaitable[Any]]
"""Sends one command to the server that has the pool, and gives its reply."""

FIRST = "-"
_TRIES = 10


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Events in order, and the id of the last.

    `follows` is False when events between the last page and this one may have been trimmed.
    """

    events: list[dict[str, str]]
    last: str
    follows: bool


async def pages(send: Send, pool: str, after: str, size: int) -> AsyncIterator[Page]:
    """The events after an id (FIRST for all), to the stream's end as it is when it is reached."""
    key = keys.decisions(pool)
    while True:
        entries = await send("XRANGE", key, after if after == FIRST else f"({after}", "+", "COUNT", size)
        if not entries:
            return
        # Asked after the page: while the entry before it was still there, nothing in between was trimmed.
        first = await send("XRANGE", key, FIRST, "+", "COUNT", 1)
        follows = after == FIRST or (bool(first) and _order(first[0][0]) <= _order(after))
        after = _text(entries[-1][0])
        yield Page(events=[_event(fields) for _, fields in entries], last=after, follows=follows)
        if len(entries) < size:
            return


async def newest(send: Send, pool: str, size: int, most: int) -> AsyncIterator[list[dict[str, str]]]:
    """The events backwards, the newest first, in lists of `size`, to the stream's beginning or after `most`."""
    key, before = keys.decisions(pool), "+"
    for _ in range(0, most, size):
        entries = await send("XREVRANGE", key, before, FIRST, "COUNT", size)
        if not entries:
            return
        yield [_event(fields) for _, fields in entries]
        before = f"({_text(entries[-1][0])}"


async def recording(send: Send, pool: str) -> str:
    """How the pool's events are recorded: off, sampled or full."""
    text = _text(await send("HGET", keys.services(pool), "record") or stored.NEW_RECORD)
    return stored.record({"record": text})


async def last_id(send: Send, pool: str) -> str:
    """The id of the newest event, FIRST when there is none."""
    entries = await send("XREVRANGE", keys.decisions(pool), "+", FIRST, "COUNT", 1)
    return _text(entries[0][0]) if entries else FIRST


async def checkpoint(send: Send, pool: str, scripts_dir: str = "") -> str:
    """The pool's whole state as JSON (`balancer.checkpoint` reads it); where events are recorded it is one of them.

    Raises StoreUnavailableError when workers come faster than they can be listed.
    """
    script = load("checkpoint", scripts_dir)
    names = {
        "services": keys.services(pool),
        "partitions": keys.partitions(pool),
        "leases": keys.leases(pool),
        "decisions": keys.decisions(pool),
    }
    for _ in range(_TRIES):
        workers = [_text(worker) for worker in await send("ZRANGE", keys.leases(pool), 0, -1)]
        holdings = [keys.holdings(pool, worker) for worker in workers]
        reply = await send("EVAL", script.source, *script.command(names, {"now_ms": 0}, workers, holdings))
        if reply[0] == b"checkpoint":
            return _text(reply[4])
    raise StoreUnavailableError(f"pool {pool}: workers come faster than they can be listed")


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _order(id_: bytes | str) -> tuple[int, int]:
    milliseconds, _, number = _text(id_).partition("-")
    return int(milliseconds), int(number)


def _event(fields: Any) -> dict[str, str]:
    """The fields as a client parses them (a mapping), or as the server sends them (a flat list)."""
    pairs = fields.items() if isinstance(fields, dict) else zip(fields[::2], fields[1::2], strict=True)
    return {_text(name): _text(value) for name, value in pairs}
