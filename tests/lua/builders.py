"""What the tests of the scripts are told with: rules, selections, entries, and a fleet at one pool."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import pytest
import redis

from balancer import stored
from balancer.domain import (
    Entry,
    Outcome,
    PartitionDefinition,
    ProviderDefinition,
    RuleDefinition,
    Selection,
    ServiceDefinition,
    Usage,
    WindowsDefinition,
)
from balancer.reference import Pool
from balancer.store import keys
from balancer.store.scripts import load
from balancer.store.views import PartitionView, PoolView, ServiceView
from balancer.tactics import tactic_from_map, tactic_params
from tests.lua.pool import LuaPool

NOW_MS = 1_800_000_000_000
LEASE_MS = 30_000
DEADLINE_MS = 60_000
NEVER = 2**53
A, B, C, D = "a:m", "b:m", "c:org/m 1", "d:llama3:8b"
ABC = (A, B, C)


def a_service(id_: str, *, active: bool = True, window_s: int = 300, weight: int = 1, **more: int) -> ServiceDefinition:
    """A service of a partition; `more` are its tier, limits and cost."""
    return ServiceDefinition(id=id_, active=int(active), window=window_s, weight=weight, **more)


def a_partition(
    tactic: str = "round_robin",
    services: Sequence[str | ServiceDefinition] = ABC,
    *,
    requests: int = 2,
    tokens: int = NEVER,
    params: Mapping[str, int] | None = None,
    cursor: str = "",
    refuses: bool = False,
    id_: str = keys.partition("chat"),
) -> PartitionDefinition:
    """A partition; the thresholds that its tactic has not are left out. All its numbers may be given as `params`."""
    known = tactic_params(tactic_from_map(tactic))
    given = params or {"request_threshold": requests, "token_threshold": tokens}
    return PartitionDefinition(
        id=id_,
        tactic=tactic,
        params=known | {name: value for name, value in given.items() if name in known},
        cursor=cursor,
        refuses=int(refuses),
        services=tuple(a_service(s) if isinstance(s, str) else s for s in services),
    )


def a_rule(
    tactic: str = "round_robin",
    services: Sequence[str | ServiceDefinition] = ABC,
    *,
    rule: str = "chat",
    revision: int = 1,
    lengths: Mapping[str, tuple[int, ...]] | None = None,
    providers: Sequence[ProviderDefinition] = (),
    retry_permille: int = 200,
    **partition: Any,
) -> RuleDefinition:
    """A rule of one partition; `lengths` names the windows of services that have others than this rule gives them."""
    part = a_partition(tactic, services, id_=keys.partition(rule), **partition)
    known = lengths or {}
    windows = tuple(WindowsDefinition(id=s.id, lengths=known.get(s.id, (s.window,))) for s in part.services)
    return RuleDefinition(
        rule=rule,
        revision=revision,
        retry_permille=retry_permille,
        partitions=(part,),
        windows=windows,
        providers=tuple(providers),
    )


def a_provider(id_: str = "a", **more: int) -> ProviderDefinition:
    """A provider with limits or a breaker; without `more` it has neither."""
    options = {"failures": 0, "ratio_permille": 0} | more
    return ProviderDefinition(id=id_, **options)


def a_tombstone(rule: str = "chat", *, revision: int) -> RuleDefinition:
    return RuleDefinition(rule=rule, revision=revision)


def a_selection(
    number: int,
    *,
    rule: str = "chat",
    revision: int = 1,
    draw: int = 0,
    reserved: int = 0,
    deadline_ms: int = DEADLINE_MS,
    session: str = "",
    affinity_ms: int = 0,
    only: str = "",
    excluded: Sequence[str] = (),
    barred: Sequence[str] = (),
) -> Selection:
    return Selection(
        number=number,
        rule=rule,
        partition=keys.partition(rule),
        revision=revision,
        draw=draw,
        reserved=reserved,
        deadline_ms=deadline_ms,
        session=session,
        affinity_ms=affinity_ms,
        only=only,
        excluded=tuple(excluded),
        barred=tuple(barred),
    )


def an_entry(
    number: int,
    service: str,
    outcome: Outcome = Outcome.SUCCESS,
    *,
    age_ms: int = 0,
    cooldown_ms: int = 0,
    first_token_us: int = 0,
    stream_us: int = 0,
    **usage: int,
) -> Entry:
    return Entry(
        number=number,
        service=service,
        outcome=outcome,
        age_ms=age_ms,
        usage=Usage(**usage),
        cooldown_ms=cooldown_ms,
        first_token_us=first_token_us,
        stream_us=stream_us,
    )


def an_abandoned(number: int) -> Entry:
    return an_entry(number, "", Outcome.ABANDONED)


class Fleet:
    """Workers at one pool, scripts or reference: names their picks and numbers their batches.

    Time stands still until `pass_ms`.
    """

    def __init__(self, pool: LuaPool | Pool, now_ms: int = NOW_MS) -> None:
        self.pool = pool
        self.now_ms = now_ms
        self.numbers: dict[str, int] = {}
        self.batches: dict[str, int] = {}

    def pass_ms(self, passed_ms: int) -> None:
        """Lets time pass; negative when the server's clock is set back."""
        self.now_ms += passed_ms

    def fence(self, *definitions: RuleDefinition, seen: tuple[int, int] = (0, 0)) -> Any:
        return self.pool.fence(self.now_ms, definitions, seen)

    def select(self, *selections: Selection, worker: str = "w1", seen: tuple[int, int] = (0, 0)) -> Any:
        """The whole reply of one call."""
        return self.pool.select(self.now_ms, worker, selections, LEASE_MS, seen)

    def ask(self, count: int = 1, *, worker: str = "w1", **selection: Any) -> list[list[Any]]:
        """The answers to so many new selections, in calls of 64 at most."""
        answers: list[list[Any]] = []
        while len(answers) < count:
            size = min(count - len(answers), 64)
            first = self.numbers.get(worker, 0) + 1
            self.numbers[worker] = first + size - 1
            asked = [a_selection(number, **selection) for number in range(first, first + size)]
            answers += self.select(*asked, worker=worker)[:-1]
        return answers

    def picks(self, count: int, **selection: Any) -> str:
        """The services picked, each by its first letter; `-` where there was none."""
        return "".join(answer[1][0] if answer[0] == "pick" else "-" for answer in self.ask(count, **selection))

    def settle(self, *entries: Entry, worker: str = "w1", seen: tuple[int, int] = (0, 0)) -> Any:
        """The reply to the worker's next batch."""
        self.batches[worker] = self.batches.get(worker, 0) + 1
        return self.batch(self.batches[worker], *entries, worker=worker, seen=seen)

    def batch(
        self, number: int, *entries: Entry, worker: str = "w1", seen: tuple[int, int] = (0, 0), skip: bool = False
    ) -> Any:
        """The reply to a batch of that number."""
        return self.pool.settle(self.now_ms, worker, number, entries, LEASE_MS, seen, skip=skip)

    def reap(self, target: str = "w1", *, worker: str = "w2", limit: int = 1000, seen: tuple[int, int] = (0, 0)) -> Any:
        return self.pool.reap(self.now_ms, worker, target, LEASE_MS, limit, seen)

    def use(self, service: str, *, requests: int = 0, tokens: int = 0, reserved: int = 0, window_s: int = 300) -> None:
        """Gives a service that many window requests and tokens, and reserved tokens of one that stays in flight.

        Another rule of the pool picks it, and another worker settles for it.
        """
        rule = f"only {service}"
        self.fence(a_rule("random", [a_service(service, window_s=window_s)], rule=rule))
        answers = self.ask(requests, rule=rule, worker="another")
        first = self.numbers.get("another", 0) - requests + 1
        assert all(answer[1] == service for answer in answers)
        self.settle(*(an_entry(first + i, service) for i in range(requests)), worker="another")
        if tokens:
            self.settle(an_entry(0, service, input=tokens), worker="another")
        if reserved:
            self.ask(1, rule=rule, worker="another", reserved=reserved)

    def view(self) -> PoolView:
        assert isinstance(self.pool, LuaPool), "the reference has no views"
        return self.pool.view()

    def service(self, service: str = A) -> ServiceView:
        return self.view().services[service]

    def windows(self, service: str = A) -> list[tuple[int, int, int, int]]:
        """Length in seconds, start as ms since NOW_MS, requests and tokens of each window."""
        return [(w.length_s, w.start_ms - NOW_MS, w.requests, w.tokens) for w in self.service(service).windows]

    def partition(self, rule: str = "chat") -> PartitionView:
        return self.view().partitions[keys.partition(rule)]

    def memory(self, rule: str = "chat") -> str:
        """What the rule's tactic remembers."""
        assert isinstance(self.pool, LuaPool)
        text: bytes = self.pool.client.hget(keys.partitions(self.pool.name), f"partition:{keys.partition(rule)}")
        return stored.partition(text.decode()).memory

    def cursor(self, rule: str = "chat") -> tuple[str, int]:
        """The rule's cursor and streak."""
        partition = self.partition(rule)
        return partition.cursor, partition.streak


# -- raw calls ---------------------------------------------------------------------------------------------------------


def pool_keys(pool: str, worker: str) -> dict[str, str]:
    """The keys that select and settle take."""
    return {
        "services": keys.services(pool),
        "partitions": keys.partitions(pool),
        "holdings": keys.holdings(pool, worker),
        "leases": keys.leases(pool),
        "decisions": keys.decisions(pool),
    }


def evaluate(
    client: Any, script: str, names: Mapping[str, str], arguments: Mapping[str, str | int], rest: Sequence[Any] = ()
) -> Any:
    """The script's reply, with every argument as given, malformed or not."""
    loaded = load(script)
    return _text(client.execute_command("EVAL", loaded.source, *loaded.command(names, arguments, rest)))


def evaluate_tick(
    client: Any,
    names: Mapping[str, str],
    numbers: Mapping[str, Any],
    entries: Any = (),
    selections: Any = (),
    pins: Sequence[str] = (),
) -> Any:
    """As `evaluate`, for tick, given the numbers of its call by their names: without them all is as in a usual call."""
    usual = {"now_ms": NOW_MS, "epoch": 0, "position": 0, "lease_ms": LEASE_MS, "batch": 0, "skips": False}
    return evaluate_packed(client, names, [*(usual | dict(numbers)).values(), entries, selections], pins)


def evaluate_packed(client: Any, names: Mapping[str, str], call: Any, pins: Sequence[str] = ()) -> Any:
    """As `evaluate`, for tick, given its call, which is packed unless it is bytes."""
    script = load("tick")
    packed = call if isinstance(call, bytes) else msgspec.msgpack.encode(call)
    command = script.command(names, {"worker": "w1", "call": packed}, (), pins)
    return _text(client.execute_command("EVAL", script.source, *command))


def contents(client: Any) -> dict[str, Any]:
    """Every key of the server with its value."""
    readers = {
        b"hash": client.hgetall,
        b"string": client.get,
        b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        b"stream": client.xrange,
    }
    return {key.decode(): readers[client.type(key)](key) for key in client.scan_iter("*")}


@contextlib.contextmanager
def nothing_written(client: Any) -> Iterator[None]:
    """Fails when a key of the server changes within, or only the time it has to live."""
    soon_ms = 3_600_000
    for key in client.scan_iter("*"):
        client.pexpire(key, soon_ms)
    before = contents(client)
    yield
    assert contents(client) == before
    assert [key for key in client.scan_iter("*") if client.pttl(key) > soon_ms] == []


@contextlib.contextmanager
def refused(client: Any, script: str) -> Iterator[None]:
    """Fails unless the call within is answered with an error of that script, and writes nothing."""
    with nothing_written(client), pytest.raises(redis.ResponseError, match=f"BALANCER {script}"):
        yield


def _text(reply: Any) -> Any:
    if isinstance(reply, list):
        return [_text(item) for item in reply]
    return reply.decode() if isinstance(reply, bytes) else reply
