"""A pool behind the real scripts, with the interface of its reference: the same calls, the same replies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from balancer.domain import Entry, PoolSettings, Record, RuleDefinition, Selection
from balancer.store import keys, views
from balancer.store.calls import call_argument, fence_arguments, pin_keys
from balancer.store.scripts import load


class LuaPool:
    """Runs the scripts on a server, with the time given."""

    def __init__(self, client: Any, name: str, record: Record = "off", scripts: str = "") -> None:
        self.client = client
        self.name = name
        self.record = record
        self.scripts = scripts
        self.pins: dict[str, int] = {}

    def _run(
        self,
        script: str,
        names: dict[str, str],
        arguments: Mapping[str, str | int | bytes],
        rest: Sequence[Any],
        more_keys: Sequence[str] = (),
    ) -> Any:
        loaded = load(script, self.scripts)
        command = loaded.command(names, arguments, rest, more_keys)
        return _text(self.client.execute_command("EVAL", loaded.source, *command))

    def _keys(self, worker: str) -> dict[str, str]:
        return {
            "services": keys.services(self.name),
            "partitions": keys.partitions(self.name),
            "holdings": keys.holdings(self.name, worker),
            "leases": keys.leases(self.name),
            "decisions": keys.decisions(self.name),
        }

    def _arguments(self, now_ms: int, worker: str, lease_ms: int, seen: tuple[int, int]) -> dict[str, str | int]:
        return {
            "now_ms": now_ms,
            "worker": worker,
            "epoch": seen[0],
            "position": seen[1],
            "lease_ms": lease_ms,
        }

    def fence(self, now_ms: int, definitions: Sequence[RuleDefinition], seen: tuple[int, int] = (0, 0)) -> Any:
        names = self._keys("")
        del names["holdings"], names["leases"]
        arguments: dict[str, str | int] = {
            "now_ms": now_ms,
            "epoch": seen[0],
            "position": seen[1],
            **fence_arguments(PoolSettings(name=self.name, record=self.record, record_events=1_000_000), 0),
        }
        return self._run("fence", names, arguments, [msgspec.json.encode(d).decode() for d in definitions])

    def tick(
        self,
        now_ms: int,
        worker: str,
        batch: int,
        entries: Sequence[Entry],
        selections: Sequence[Selection],
        lease_ms: int,
        seen: tuple[int, int] = (0, 0),
        *,
        skip: bool = False,
    ) -> Any:
        """What the script says to a batch (number 0: none) and selections."""
        call = call_argument(
            now_ms=now_ms,
            seen=seen,
            lease_ms=lease_ms,
            batch=batch,
            skips=skip,
            entries=entries,
            selections=selections,
        )
        if selections:
            self._drop_pins(now_ms)
        pins = pin_keys(self.name, selections)
        reply = self._run("tick", self._keys(worker), {"worker": worker, "call": call}, (), pins)
        for selection in selections:
            self._hold_pin(now_ms, selection)
        return reply

    def select(
        self,
        now_ms: int,
        worker: str,
        selections: Sequence[Selection],
        lease_ms: int,
        seen: tuple[int, int] = (0, 0),
    ) -> Any:
        """The answers alone, and behind them the pool's place."""
        (_, _, *place), *answers = self.tick(now_ms, worker, 0, (), selections, lease_ms, seen)
        return [*answers, ["pool", *place]]

    def _drop_pins(self, now_ms: int) -> None:
        """Drops the pins whose time has passed: the server's own clock stands nearly still in a test."""
        for key in [key for key, until_ms in self.pins.items() if until_ms <= now_ms]:
            self.client.delete(key)
            del self.pins[key]

    def _hold_pin(self, now_ms: int, selection: Selection) -> None:
        """Notes until when a pin that was just set lives by the test's time, and keeps the server from dropping it."""
        key = keys.pin(self.name, selection.session)
        if selection.affinity_ms > 0 and 0 < self.client.pttl(key) <= selection.affinity_ms:
            self.pins[key] = now_ms + selection.affinity_ms
            self.client.pexpire(key, 10 * selection.affinity_ms)

    def pinned(self, now_ms: int, sessions: Iterable[str]) -> dict[str, tuple[str, int]]:
        """Those of the sessions that are pinned: to which service, and until when."""
        found = {}
        for session in sessions:
            key = keys.pin(self.name, session)
            service, until_ms = self.client.get(key), self.pins.get(key, 0)
            if service and until_ms > now_ms:
                found[session] = service.decode(), until_ms
        return found

    def settle(
        self,
        now_ms: int,
        worker: str,
        batch: int,
        entries: Sequence[Entry],
        lease_ms: int,
        seen: tuple[int, int] = (0, 0),
        *,
        skip: bool = False,
    ) -> Any:
        """What becomes of the batch alone."""
        ((word, last, *place),) = self.tick(now_ms, worker, batch, entries, (), lease_ms, seen, skip=skip)
        return [word, last, *place] if word == "applied" else [word, last]

    def reap(
        self,
        now_ms: int,
        worker: str,
        target: str,
        lease_ms: int,
        limit: int = 1000,
        seen: tuple[int, int] = (0, 0),
    ) -> Any:
        """What a call that begins says, but where to go on: the reference looks at all in any call."""
        *reply, _ = self.reap_from("", now_ms, worker, target, lease_ms, limit, seen)
        return reply

    def reap_from(
        self,
        place: str,
        now_ms: int,
        worker: str,
        target: str,
        lease_ms: int,
        limit: int = 1000,
        seen: tuple[int, int] = (0, 0),
    ) -> Any:
        """The reply of a call that goes on from a place."""
        more: dict[str, str | int] = {"target": target, "limit": limit, "place": place}
        return self._run("reap", self._keys(target), self._arguments(now_ms, worker, lease_ms, seen) | more, ())

    def clear(self, now_ms: int, services: Sequence[str], seen: tuple[int, int] = (0, 0)) -> Any:
        names = self._keys("")
        del names["holdings"], names["leases"]
        return self._run("clear", names, {"now_ms": now_ms, "epoch": seen[0], "position": seen[1]}, services)

    def health(self, now_ms: int, services: Sequence[str], is_alive: bool, seen: tuple[int, int] = (0, 0)) -> Any:
        names = self._keys("")
        del names["holdings"], names["leases"]
        place: dict[str, str | int] = {"now_ms": now_ms, "epoch": seen[0], "position": seen[1]}
        return self._run("health", names, place | {"is_alive": int(is_alive)}, services)

    def checkpoint(self, now_ms: int) -> Any:
        """What the script says, with the holdings of every worker that is listed."""
        names = self._keys("")
        del names["holdings"]
        workers = [worker.decode() for worker in self.client.zrange(keys.leases(self.name), 0, -1)]
        script = load("checkpoint", self.scripts)
        holdings = [keys.holdings(self.name, worker) for worker in workers]
        command = script.command(names, {"now_ms": now_ms}, workers, holdings)
        return _text(self.client.execute_command("EVAL", script.source, *command))

    def view(self) -> views.PoolView:
        services = self.client.hgetall(keys.services(self.name))
        partitions = self.client.hgetall(keys.partitions(self.name))
        return views.read_pool(self.name, partitions, services, now_ms=0)


def _text(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_text(item) for item in reply]
    return reply.decode() if isinstance(reply, bytes) else reply
