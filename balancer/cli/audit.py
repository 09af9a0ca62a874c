"""audit: a pool's recorded history, live or from a file, checked against the reference."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import msgspec

from balancer import checkpoint, config
from balancer.audit import Checker, Event, Verdict
from balancer.cli.store import opened
from balancer.errors import ConfigurationError
from balancer.store import connection, history, keys
from balancer.store.registry import Registry
from balancer.store.topology import Topology

_PAGE = 1000


def run(options: argparse.Namespace) -> int:
    """Prints the verdict on a file, or on every pool; 1 if there is a violation."""
    if options.file:
        return _print({options.file: _check_file(Path(options.file))})
    settings = config.load(vars(options))
    with opened(settings) as store, _opened_to_write(options.save) as file:
        return _print(asyncio.run(_check_live(store.url, options.pool, file)))


@contextlib.contextmanager
def _opened_to_write(path: str) -> Iterator[TextIO | None]:
    if not path:
        yield None
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            yield file
    except OSError as exc:
        raise ConfigurationError(f"cannot write {path}: {exc.strerror}") from exc


def _print(verdicts: dict[str, Verdict]) -> int:
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict.summary()}")
    return 1 if any(verdict.violation_count for verdict in verdicts.values()) else 0


def _check_file(path: Path) -> Verdict:
    checker = Checker()
    for number, event in _read(path):
        try:
            checker.feed(event)
        except (KeyError, ValueError) as exc:
            raise ConfigurationError(f"{path}, line {number}: no event of a pool: {exc!r}") from exc
    return checker.verdict


def _read(path: Path) -> Iterator[tuple[int, Event]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, msgspec.json.decode(line, type=dict[str, str])
    except OSError as exc:
        raise ConfigurationError(f"cannot read {path}: {exc.strerror}") from exc
    except msgspec.DecodeError as exc:
        raise ConfigurationError(f"{path}: expected one event a line, in JSON: {exc}") from exc


async def _check_live(url: str, pool: str, save: TextIO | None) -> dict[str, Verdict]:
    await connection.check_server(url)
    commands = connection.Commands(Topology(url))
    try:
        snapshot = await Registry(commands).current()
        pools = snapshot.configuration.pool_names() if snapshot else ()
        if pool and pool not in pools:
            raise ConfigurationError(f"there is no pool {pool!r}; there is: {', '.join(pools) or 'none'}")
        if save and not pool and len(pools) > 1:
            raise ConfigurationError(f"--save takes one pool: say --pool; there is: {', '.join(pools)}")
        chosen = [name for name in pools if pool in ("", name)]
        return {f"pool {name}": await _check_pool(commands, name, save) for name in chosen}
    finally:
        await commands.aclose()


async def _check_pool(commands: connection.Commands, pool: str, save: TextIO | None) -> Verdict:
    """The pool's history up to now. The checkpoint at its end compares every counter with what the events make."""
    send = functools.partial(commands.run, keys.partitions(pool))
    with connection.translated("reading the history"):
        state = checkpoint.read(await history.checkpoint(send, pool))
        checker = Checker()
        async for page in history.pages(send, pool, history.FIRST, _PAGE):
            if not page.follows:
                checker.lose_track("the record was trimmed while it was read")
            for event in page.events:
                checker.feed(event)
                if save:
                    save.write(msgspec.json.encode(event).decode() + "\n")
    if state.record == "off":
        print(
            f"pool {pool} records no events: only its invariants are checked. "
            f"`pools: [{{name: {pool}, record: full}}]` in the configuration records them",
            file=sys.stderr,
        )
        checker.check_invariants(state.pool)
    return checker.verdict
