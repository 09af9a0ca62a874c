"""What recording costs: microseconds of Redis' CPU for a selection and for a settle, by how the pool records.

`python -m benchmarks.record` prints the table. The figures are the server's own (`INFO commandstats`), for calls of 16
selections and of 16 entries over rules of four tactics and three services each; modes are interleaved.
"""

from __future__ import annotations

import statistics
from typing import Any, get_args

import msgspec
import redis

from balancer.domain import (
    Entry,
    Outcome,
    PartitionDefinition,
    PoolSettings,
    Record,
    RuleDefinition,
    Selection,
    ServiceDefinition,
    Tactic,
    Usage,
    WindowsDefinition,
)
from balancer.store import keys
from balancer.store.calls import entry_arguments, fence_arguments, selection_arguments
from balancer.store.scripts import load
from balancer.tactics import Hybrid, Random, RoundRobin, TokenBased, tactic_name, tactic_params
from tests import servers

_TACTICS: dict[str, Tactic] = {tactic_name(t): t for t in (RoundRobin(), TokenBased(), Hybrid(), Random())}
_BATCH = 16
_ROUNDS = 5
_CALLS = 1000


class Pool:
    """A pool on a server, called as a worker calls it."""

    def __init__(self, client: Any, record: Record) -> None:
        self._client = client
        self._names = {
            "services": keys.services(record),
            "partitions": keys.partitions(record),
            "holdings": keys.holdings(record, "w"),
            "leases": keys.leases(record),
            "decisions": keys.decisions(record),
        }
        self._common: dict[str, str | int] = {"now_ms": 0, "worker": "w", "epoch": 0, "position": 0, "lease_ms": 30_000}
        self._batch = 0
        self._number = 0
        settings = PoolSettings(name=record, record=record, record_events=100_000)
        script = load("fence")
        names = {name: self._names[name] for name in script.keys}
        arguments: dict[str, str | int] = {"now_ms": 0, "epoch": 0, "position": 0, **fence_arguments(settings, 1)}
        rules = [_encoded(rule, tactic) for rule, tactic in _TACTICS.items()]
        client.execute_command("EVAL", script.source, *script.command(names, arguments, rules))
        for name in ("select", "settle"):
            client.script_load(load(name).source)

    def run(self, calls: int) -> tuple[float, float]:
        """Microseconds for one selection and for one settled entry, over so many calls of each."""
        picked: list[list[tuple[int, str]]] = []
        select_us = self._timed(lambda: picked.append(self._select()), calls)
        settle_us = self._timed(lambda: self._settle(picked.pop()), calls)
        return select_us, settle_us

    def _timed(self, call: Any, calls: int) -> float:
        self._client.config_resetstat()
        for _ in range(calls):
            call()
        return float(self._client.info("commandstats")["cmdstat_evalsha"]["usec"]) / calls / _BATCH

    def _select(self) -> list[tuple[int, str]]:
        arguments: list[str | int] = []
        numbers = []
        for i in range(_BATCH):
            self._number += 1
            numbers.append(self._number)
            rule = tuple(_TACTICS)[i % len(_TACTICS)]
            selection = Selection(
                number=self._number,
                rule=rule,
                partition=keys.partition(rule),
                revision=1,
                draw=self._number * 2_654_435_761 % 2**32,
                reserved=100,
                deadline_ms=60_000,
            )
            arguments += selection_arguments(selection)
        script = load("select")
        reply = self._client.execute_command(
            "EVALSHA", script.sha, *script.command(self._names, self._common, arguments)
        )
        return [(number, answer[1].decode()) for number, answer in zip(numbers, reply, strict=False)]

    def _settle(self, picked: list[tuple[int, str]]) -> None:
        self._batch += 1
        arguments = [
            argument
            for number, service in picked
            for argument in entry_arguments(
                Entry(number=number, service=service, outcome=Outcome.SUCCESS, usage=Usage(input=120, output=40))
            )
        ]
        script = load("settle")
        names = self._common | {"batch": self._batch, "skip": 0}
        self._client.execute_command("EVALSHA", script.sha, *script.command(self._names, names, arguments))


def _encoded(rule: str, tactic: Tactic) -> str:
    services = tuple(ServiceDefinition(id=f"{p}:{rule}", active=1, window=300, weight=1) for p in "abc")
    definition = RuleDefinition(
        rule=rule,
        revision=1,
        partitions=(
            PartitionDefinition(
                id=keys.partition(rule),
                tactic=rule,
                params=tactic_params(tactic),
                cursor="",
                services=services,
            ),
        ),
        windows=tuple(WindowsDefinition(id=service.id, lengths=(300,)) for service in services),
    )
    return msgspec.json.encode(definition).decode()


def main() -> None:
    """Prints the table."""
    modes: tuple[Record, ...] = get_args(Record)
    with servers.running("valkey-9") as url, redis.Redis.from_url(url) as client:
        pools = {mode: Pool(client, mode) for mode in modes}
        rows: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
        for _ in range(_ROUNDS):
            for mode, pool in pools.items():
                rows[mode].append(pool.run(_CALLS))
    base = [statistics.median(column) for column in zip(*rows["off"], strict=True)]
    print("| record | selection µs | settle µs | × off |")
    print("|---|--:|--:|--:|")
    for name, figures in rows.items():
        select_us, settle_us = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"| {name} | {select_us:.1f} | {settle_us:.1f} | {(select_us + settle_us) / sum(base):.2f} |")


if __name__ == "__main__":
    main()
