"""What one request costs Redis: microseconds of its CPU for a selection and its settle, which share calls.

`python -m benchmarks.record` prints two tables: by what is switched on and how many requests share a call, nothing
being recorded; then by how the pool records. The figures are the server's own medians (`INFO latencystats`), which
do not mind what else the machine does; calls are pipelined as on a busy server, cases are interleaved, and each figure
is the median of its rounds. Names of cases after the command print no others.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any, get_args

import msgspec
import redis

from balancer.domain import (
    Entry,
    Outcome,
    PartitionDefinition,
    PoolSettings,
    ProviderDefinition,
    Record,
    RuleDefinition,
    Selection,
    ServiceDefinition,
    Tactic,
    Usage,
    WindowsDefinition,
)
from balancer.store import keys
from balancer.store.calls import call_argument, fence_arguments, pin_keys
from balancer.store.scripts import load
from balancer.tactics import Hybrid, Random, RoundRobin, TokenBased, tactic_name, tactic_params
from tests import servers

_SIZES = (1, 4, 16)
_ROUNDS = 5
_CALLS = 400
_AT_ONCE = 20
_NEVER = 2**40
_ALL_TACTICS: tuple[Tactic, ...] = (RoundRobin(), TokenBased(), Hybrid(), Random())


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A pool with a rule for each tactic, and what is switched on in it."""

    tactics: tuple[Tactic, ...] = (RoundRobin(),)
    services: int = 3
    limits: dict[str, int] = {}
    has_provider_limits: bool = False
    has_breaker: bool = False
    has_rates: bool = False
    """Whether settles tell how fast the service was."""
    reserved: int = 0
    affinity_ms: int = 0
    record: Record = "off"


_LIMITS = {"rpm": _NEVER, "in_flight": _NEVER}
_ALL_LIMITS = _LIMITS | {"tpm": _NEVER}
_FEATURES: dict[str, Case] = {
    "round robin": Case(),
    "+ limits": Case(limits=_LIMITS),
    "+ breaker": Case(has_breaker=True),
    "+ reservation, tpm": Case(limits=_ALL_LIMITS, reserved=100),
    "+ session pin": Case(affinity_ms=600_000),
    "hybrid, reservation": Case(tactics=(Hybrid(),), reserved=100),
    "cursor stays, 2 services": Case(tactics=(RoundRobin(request_threshold=_NEVER),), services=2),
    "cursor stays, 200 services": Case(tactics=(RoundRobin(request_threshold=_NEVER),), services=200),
    "round robin, 200 services": Case(services=200),
    "all on": Case(limits=_ALL_LIMITS, has_provider_limits=True, has_breaker=True, has_rates=True, reserved=100),
    "all on, in turn": Case(
        tactics=(RoundRobin(request_threshold=1),),
        limits=_ALL_LIMITS,
        has_provider_limits=True,
        has_breaker=True,
        has_rates=True,
        reserved=100,
    ),
    "all on, hybrid": Case(
        tactics=(Hybrid(),),
        limits=_ALL_LIMITS,
        has_provider_limits=True,
        has_breaker=True,
        has_rates=True,
        reserved=100,
    ),
    "four rules": Case(tactics=_ALL_TACTICS, reserved=100),
}
_RECORDS: dict[str, Case] = {
    record: Case(tactics=_ALL_TACTICS, reserved=100, record=record) for record in get_args(Record)
}


class Pool:
    """A pool on a server, called as a worker calls it."""

    def __init__(self, client: Any, name: str, case: Case) -> None:
        self._client = client
        self._name = name
        self._case = case
        self._rules = tuple(tactic_name(tactic) for tactic in case.tactics)
        self._names = {
            "services": keys.services(name),
            "partitions": keys.partitions(name),
            "holdings": keys.holdings(name, "w"),
            "leases": keys.leases(name),
            "decisions": keys.decisions(name),
        }
        self._batch = 0
        self._number = 0
        settings = PoolSettings(name=name, record=case.record, record_events=100_000)
        script = load("fence")
        names = {key: self._names[key] for key in script.keys}
        arguments: dict[str, str | int] = {"now_ms": 0, "epoch": 0, "position": 0, **fence_arguments(settings, 1)}
        rules = [_encoded(rule, tactic, case) for rule, tactic in zip(self._rules, case.tactics, strict=True)]
        client.execute_command("EVAL", script.source, *script.command(names, arguments, rules))
        client.script_load(load("tick").source)

    def run(self, size: int) -> float:
        """Microseconds for one request, its settle and the next one's selection, in calls of `size` of them."""
        picked = self._tick([[]] * _AT_ONCE, size)
        self._client.config_resetstat()
        for _ in range(0, _CALLS, _AT_ONCE):
            picked = self._tick(picked, size)
        us = float(self._client.info("latencystats")["latency_percentiles_usec_evalsha"]["p50"])
        self._tick(picked, 0)
        return us / size

    def _tick(self, settled: Sequence[Sequence[tuple[int, str]]], size: int) -> list[list[tuple[int, str]]]:
        """Pipelined calls that settle these, each a batch, and select so many; the picks of each."""
        script = load("tick")
        pipeline = self._client.pipeline(transaction=False)
        asked = [[self._selection() for _ in range(size)] for _ in settled]
        for entries, selections in zip(settled, asked, strict=True):
            self._batch += bool(entries)
            call = call_argument(
                lease_ms=30_000,
                batch=self._batch if entries else 0,
                entries=[self._entry(number, service) for number, service in entries],
                selections=selections,
            )
            pins = pin_keys(self._name, selections)
            command = script.command(self._names, {"worker": "w", "call": call}, (), pins)
            pipeline.execute_command("EVALSHA", script.sha, *command)
        replies = pipeline.execute()
        assert {reply[0][0] for reply in replies} <= {b"applied", b"none"}
        return [
            [(one.number, answer[1].decode()) for one, answer in zip(selections, reply[1:], strict=True)]
            for selections, reply in zip(asked, replies, strict=True)
        ]

    def _selection(self) -> Selection:
        self._number += 1
        rule = self._rules[self._number % len(self._rules)]
        return Selection(
            number=self._number,
            rule=rule,
            partition=keys.partition(rule),
            revision=1,
            draw=self._number * 2_654_435_761 % 2**32,
            reserved=self._case.reserved,
            deadline_ms=60_000,
            session=keys.session(rule, str(self._number % 100)),
            affinity_ms=self._case.affinity_ms,
        )

    def _entry(self, number: int, service: str) -> Entry:
        first_token_us, stream_us = (300_000, 2_000_000) if self._case.has_rates else (0, 0)
        return Entry(
            number=number,
            service=service,
            outcome=Outcome.SUCCESS,
            usage=Usage(input=120, output=40),
            first_token_us=first_token_us,
            stream_us=stream_us,
        )


def _encoded(rule: str, tactic: Tactic, case: Case) -> str:
    services = tuple(
        ServiceDefinition(id=f"provider-{i}:{rule}-model", active=1, window=300, weight=1, **case.limits)
        for i in range(case.services)
    )
    definition = RuleDefinition(
        rule=rule,
        revision=1,
        retry_permille=200,
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
        providers=tuple(_provider(i, case) for i in range(case.services)),
    )
    return msgspec.json.encode(definition).decode()


def _provider(place: int, case: Case) -> ProviderDefinition:
    limits = _ALL_LIMITS if case.has_provider_limits else {}
    breaker = {"failures": 3, "ratio_permille": 500} if case.has_breaker else {"failures": 0, "ratio_permille": 0}
    return ProviderDefinition(id=f"provider-{place}", **limits, **breaker)


def _measured(client: Any, cases: dict[str, Case], sizes: Sequence[int]) -> dict[str, dict[int, float]]:
    """The figures by case and size."""
    pools = {name: Pool(client, f"pool-{name}".replace(" ", "-"), case) for name, case in cases.items()}
    found: dict[str, dict[int, list[float]]] = {name: {size: [] for size in sizes} for name in cases}
    for _ in range(_ROUNDS):
        for name, pool in pools.items():
            for size in sizes:
                found[name][size].append(pool.run(size))
    return {name: {size: statistics.median(us) for size, us in by_size.items()} for name, by_size in found.items()}


def main() -> None:
    """Prints the tables."""
    wanted = set(sys.argv[1:])
    with servers.running("valkey-9") as url, redis.Redis.from_url(url) as client:
        features = _measured(client, {n: c for n, c in _FEATURES.items() if not wanted or n in wanted}, _SIZES)
        records = _measured(client, {n: c for n, c in _RECORDS.items() if not wanted or n in wanted}, (16,))
    print("µs of Redis for a request, by requests in a call")
    print("| switched on |", " | ".join(f"{size}" for size in _SIZES), "|")
    print("|---|" + "--:|" * len(_SIZES))
    for name, figures in features.items():
        print(f"| {name} |", " | ".join(f"{us:.1f}" for us in figures.values()), "|")
    print()
    print("| record | µs a request |")
    print("|---|--:|")
    for name, figures in records.items():
        print(f"| {name} | {figures[16]:.1f} |")


if __name__ == "__main__":
    main()
