"""Redis' CPU for a selection and for a settled entry, by the server's own account (`INFO commandstats`).

Calls are measured one by one, and the cheapest twentieth of them counts: whatever else the machine does can only make a
call dearer.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import redis

from balancer.domain import (
    Entry,
    Outcome,
    PartitionDefinition,
    PoolSettings,
    ProviderDefinition,
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
from balancer.tactics import TACTIC_NAMES, tactic_from_map, tactic_params
from benchmarks.growth.figures import Part, Plot, Point, Table, Verdict, growth, quantile, slope
from tests import servers

_NEVER = 2**40
STAYING = ("round_robin", "token_based", "hybrid")
"""Tactics whose cursor stays below a threshold; all others look at every candidate each time."""
_RULES_PER_CALL = 100
_PINS_PER_CALL = 10_000
_AFFINITY_S = 3600
_PROVIDERS = 10
_LEASE_MS = 3_600_000
_REAP_LIMIT = 500

_SHARE = 0.05
_FIRST_CALLS = 5
_LOOKS, _REAPINGS = 8, 3

_PIN = """
for i = tonumber(ARGV[2]), tonumber(ARGV[3]) do
  redis.call('SET', ARGV[1] .. string.sub(redis.sha1hex(i), 1, 32), ARGV[4], 'PX', ARGV[5])
end
"""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    services: tuple[int, ...]
    rules: tuple[int, ...]
    pins: tuple[int, ...]
    pools: tuple[int, ...]
    holdings: tuple[int, ...]
    calls: int


FULL = Sizes(
    services=(2, 20, 200),
    rules=(10, 1_000, 10_000),
    pins=(1_000, 100_000, 1_000_000),
    pools=(1, 10, 100),
    holdings=(10, 1_000, 10_000),
    calls=150,
)
QUICK = Sizes(
    services=(2, 20, 200),
    rules=(10, 1_000),
    pins=(1_000, 20_000),
    pools=(1, 10),
    holdings=(10, 1_000, 10_000),
    calls=50,
)


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds of Redis for one selection and for one settled entry."""

    select_us: float
    settle_us: float


class Pool:
    """One pool on a server, called as a worker calls it."""

    def __init__(self, client: Any, name: str, worker: str = "w") -> None:
        self.name = name
        self._client = client
        self._worker = worker
        self._names = {
            "services": keys.services(name),
            "partitions": keys.partitions(name),
            "holdings": keys.holdings(name, worker),
            "leases": keys.leases(name),
            "decisions": keys.decisions(name),
        }
        self._batch = 0
        self._numbers = itertools.count(1)
        self._draws = itertools.count(1)

    def _tick(self, call: bytes, *pins: str) -> Any:
        return self._run("tick", {"worker": self._worker, "call": call}, *pins)

    def _run(self, name: str, arguments: Mapping[str, str | int | bytes], *pins: str) -> Any:
        script = load(name)
        command = script.command(self._names, arguments, (), pins)
        try:
            return self._client.execute_command("EVALSHA", script.sha, *command)
        except redis.exceptions.NoScriptError:
            return self._client.execute_command("EVAL", script.source, *command)

    def define(self, definitions: Sequence[RuleDefinition]) -> None:
        """Raises the fences of rules."""
        script = load("fence")
        names = {name: self._names[name] for name in script.keys}
        settings = PoolSettings(name=self.name, record="off")
        arguments: dict[str, str | int] = {"now_ms": 0, "epoch": 0, "position": 0, **fence_arguments(settings, 1)}
        for start in range(0, len(definitions), _RULES_PER_CALL):
            rest = [msgspec.json.encode(d).decode() for d in definitions[start : start + _RULES_PER_CALL]]
            self._client.execute_command("EVAL", script.source, *script.command(names, arguments, rest))

    def select(self, rules: Sequence[str], sessions: Sequence[str] = ()) -> list[tuple[int, str]]:
        """Picks for these rules in one call: numbers and services."""
        selections = [
            Selection(
                number=next(self._numbers),
                rule=rule,
                partition=keys.partition(rule),
                revision=1,
                draw=next(self._draws) * 2_654_435_761 % 2**32,
                reserved=100,
                deadline_ms=3_600_000,
                session=sessions[i] if sessions else "",
                affinity_ms=_AFFINITY_S * 1000 if sessions else 0,
            )
            for i, rule in enumerate(rules)
        ]
        call = call_argument(lease_ms=_LEASE_MS, selections=selections)
        _, *answers = self._tick(call, *pin_keys(self.name, selections))
        picked = []
        for selection, answer in zip(selections, answers, strict=True):
            assert answer[0] == b"pick", answer
            picked.append((selection.number, answer[1].decode()))
        return picked

    def settle(self, picked: Sequence[tuple[int, str]]) -> None:
        """Settles picks in one batch."""
        self._batch += 1
        usage = Usage(input=120, output=40)
        entries = [
            Entry(number=number, service=service, outcome=Outcome.SUCCESS, usage=usage, first_token_us=9)
            for number, service in picked
        ]
        self._tick(call_argument(lease_ms=_LEASE_MS, batch=self._batch, entries=entries))

    def reap(self, looker: str = "", place: str = "") -> str:
        """Looks at some of the worker's holdings, as itself or as another; where to go on, empty at the end."""
        arguments: dict[str, str | int] = {
            "now_ms": 0,
            "worker": looker or self._worker,
            "epoch": 0,
            "position": 0,
            "lease_ms": _LEASE_MS,
            "target": self._worker,
            "limit": _REAP_LIMIT,
            "place": place,
        }
        following: bytes = self._run("reap", arguments)[-1]
        return following.decode()

    def lapse(self) -> None:
        """The worker's lease has ended long ago."""
        self._client.zadd(self._names["leases"], {self._worker: 1})


class Meter:
    """Reads what Redis has spent on scripts."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @contextmanager
    def measuring(self, found: list[float], units: int) -> Iterator[None]:
        """Appends the microseconds for each unit of what the block asks for.

        Redis takes the time of a script by the clock, and that of its thread by its CPU, with all that is around a
        script: either is too much at times, and never too little.
        """
        self._client.config_resetstat()
        before_us = self._cpu_us()
        yield
        cpu_us = self._cpu_us() - before_us
        stats = self._client.info("commandstats")
        spent_us = sum(stats.get(f"cmdstat_{name}", {}).get("usec", 0) for name in ("evalsha", "eval"))
        found.append(min(spent_us, cpu_us) / units)

    def _cpu_us(self) -> float:
        used = self._client.info("cpu")
        return (float(used["used_cpu_sys_main_thread"]) + float(used["used_cpu_user_main_thread"])) * 1e6

    def cost(self, select: Callable[[], Any], settle: Callable[[Any], None], batch: int, sizes: Sizes) -> Cost:
        """What a selection and an entry cost in calls of so many."""
        for _ in range(_FIRST_CALLS):  # The scripts are there, every counter has its field.
            settle(select())
        selected: list[float] = []
        settled: list[float] = []
        for _ in range(sizes.calls):
            with self.measuring(selected, batch):
                picked = select()
            with self.measuring(settled, batch):
                settle(picked)
        return Cost(select_us=quantile(selected, _SHARE), settle_us=quantile(settled, _SHARE))


def definition(rule: str, tactic: Tactic, name: str, services: int) -> RuleDefinition:
    """A rule over so many services of ten providers, without limits."""
    ids = [f"p{i % _PROVIDERS}:{rule}-{i}" for i in range(services)]
    part = PartitionDefinition(
        id=keys.partition(rule),
        tactic=name,
        params=tactic_params(tactic),
        cursor="",
        services=tuple(ServiceDefinition(id=id_, active=1, window=300, weight=1) for id_ in ids),
    )
    return RuleDefinition(
        rule=rule,
        revision=1,
        retry_permille=200,
        partitions=(part,),
        windows=tuple(WindowsDefinition(id=id_, lengths=(300,)) for id_ in ids),
        providers=tuple(
            ProviderDefinition(
                id=f"p{i}",
                failures=3,
                ratio_permille=500,
                min_requests=20,
                window_ms=60_000,
                open_ms=30_000,
                successes=3,
            )
            for i in range(min(services, _PROVIDERS))
        ),
    )


def tactic(name: str, *, stays: bool) -> Tactic:
    """The tactic with thresholds that are never reached, or at once."""
    threshold = _NEVER if stays else 1
    return tactic_from_map(name, {"request_threshold": threshold, "token_threshold": threshold})


def _same(claim: str, points: Sequence[Point], bound: float = 1.4) -> Verdict:
    """That the most costs about what the least does."""
    return Verdict(claim=claim, figure=growth(points), bound=bound)


# -- questions ---------------------------------------------------------------------------------------------------------


def by_services(client: Any, sizes: Sizes) -> Part:
    """Selections and settles of rules with few and many services."""
    meter, costs = Meter(client), dict[tuple[str, int, int], Cost]()
    ways = [(name, True) for name in STAYING] + [(name, False) for name in TACTIC_NAMES]
    for name, stays in ways:
        word = "stays" if stays else "switches" if name in STAYING else "looks at all"
        for services in sizes.services:
            client.flushall()
            pool = Pool(client, "p")
            pool.define([definition("r", tactic(name, stays=stays), name, services)])
            for batch in (1, 16):
                costs[f"{name}, {word}", services, batch] = meter.cost(
                    functools.partial(pool.select, ["r"] * batch), pool.settle, batch, sizes
                )
    names = list(dict.fromkeys(name for name, _, _ in costs))
    least, most = sizes.services[0], sizes.services[-1]
    rows = tuple(
        (
            name,
            *(f"{costs[name, services, 1].select_us:.1f}" for services in sizes.services),
            *(f"{costs[name, services, 16].select_us:.1f}" for services in sizes.services),
            *(f"{costs[name, services, 1].settle_us:.1f}" for services in (least, most)),
        )
        for name in names
    )
    columns = (
        "tactic",
        *(f"{services} services, alone" for services in sizes.services),
        *(f"{services}, 16 a call" for services in sizes.services),
        *(f"settle alone, {services}" for services in (least, most)),
    )
    verdicts = []
    for name in names:
        of_select = [(float(s), costs[name, s, 1].select_us) for s in sizes.services]
        if name.endswith("stays"):
            verdicts.append(_same(f"select, {name}: {most} services cost what {least} do", of_select, 1.3))
        else:
            verdicts.append(
                Verdict(claim=f"select, {name}: for each service", figure=slope(of_select), bound=8.0, unit="µs")
            )
    settles = max(growth([(float(s), costs[name, s, 1].settle_us) for s in sizes.services]) for name in names)
    verdicts.append(Verdict(claim=f"settle: {most} services cost what {least} do", figure=settles, bound=1.5))
    curves: dict[str, list[Point]] = {
        name: [(float(s), costs[name, s, 1].select_us) for s in sizes.services] for name in names
    }
    return Part(
        title="Services of a rule",
        text="Microseconds of Redis' CPU for one selection, and for one settled entry.",
        tables=(Table(columns=columns, rows=rows),),
        plots=(Plot(name="services", x="services of the rule", y="µs of Redis for a selection", curves=curves),),
        verdicts=tuple(verdicts),
    )


def by_rules(client: Any, sizes: Sizes) -> Part:
    """The same call in pools of few and many rules, and what reading such a pool as a whole costs."""
    meter, costs, pictures = Meter(client), dict[int, dict[int, Cost]](), dict[int, tuple[float, int]]()
    for rules in sizes.rules:
        client.flushall()
        pool = Pool(client, "p")
        chosen = tactic("hybrid", stays=True)
        pool.define([definition(f"r{i}", chosen, "hybrid", 2) for i in range(rules)])
        step = max(1, rules // 97)
        names = itertools.cycle([f"r{i}" for i in range(0, rules, step)])

        def select(size: int, names: Iterator[str] = names, pool: Pool = pool) -> list[tuple[int, str]]:
            return pool.select([next(names) for _ in range(size)])

        costs[rules] = {
            batch: meter.cost(functools.partial(select, batch), pool.settle, batch, sizes) for batch in (1, 16)
        }
        pictures[rules] = _picture(client, "p")
    rows = tuple(
        (
            str(rules),
            *(f"{costs[rules][batch].select_us:.1f}" for batch in (1, 16)),
            *(f"{costs[rules][batch].settle_us:.1f}" for batch in (1, 16)),
            f"{pictures[rules][0] / 1000:.2f}",
            f"{pictures[rules][1] / 1024:.0f}",
        )
        for rules in sizes.rules
    )
    of_select = [(float(rules), costs[rules][1].select_us) for rules in sizes.rules]
    of_settle = [(float(rules), costs[rules][1].settle_us) for rules in sizes.rules]
    most = sizes.rules[-1]
    return Part(
        title="Rules in a pool",
        text="A picture is the whole state of a pool: each worker reads one about every 10 s (more rarely in a large "
        "fleet, so that all together read two a second at most), and one for each scrape of its metrics.",
        tables=(
            Table(
                columns=(
                    "rules",
                    "select alone, µs",
                    "16 a call, µs",
                    "settle alone, µs",
                    "16 a batch, µs",
                    "a picture, ms of Redis",
                    "a picture, KiB",
                ),
                rows=rows,
            ),
        ),
        plots=(
            Plot(
                name="rules",
                x="rules in the pool",
                y="µs of Redis",
                curves={
                    "select": of_select,
                    "settle": of_settle,
                    "a picture": [(float(rules), pictures[rules][0]) for rules in sizes.rules],
                },
            ),
        ),
        verdicts=(
            _same(f"select: a pool of {most} rules costs what a small one does", of_select),
            _same(f"settle: a pool of {most} rules costs what a small one does", of_settle),
            Verdict(
                claim=f"reading the whole pool of {most} rules holds Redis up for",
                figure=pictures[most][0] / 1000,
                bound=50.0,
                unit="ms",
            ),
        ),
    )


def _picture(client: Any, pool: str) -> tuple[float, int]:
    """Microseconds of Redis and bytes for the two hashes of a pool."""
    spent = []
    for _ in range(_LOOKS):
        client.config_resetstat()
        hashes = [client.execute_command("HGETALL", key) for key in (keys.partitions(pool), keys.services(pool))]
        spent.append(client.info("commandstats")["cmdstat_hgetall"]["usec"])
    size = sum(len(field) + len(value) for each in hashes for field, value in each.items())
    return min(spent), size


def by_pins(client: Any, sizes: Sizes) -> Part:
    """Selections of pinned sessions among few and many pins."""
    meter, costs, bytes_each, known = Meter(client), dict[int, Cost](), dict[int, float](), 0
    client.execute_command("FLUSHALL", "SYNC")  # What is freed in the background would count against the pins.
    pool = Pool(client, "p")
    pool.define([definition("r", tactic("hybrid", stays=True), "hybrid", 2)])
    prefix = keys.pin("p", "")
    script = client.register_script(_PIN)
    before = client.info("memory")["used_memory"]
    for pins in sizes.pins:
        for start in range(known, pins, _PINS_PER_CALL):
            last = min(start + _PINS_PER_CALL, pins) - 1
            script(args=[prefix, start, last, "p0:r-0", _AFFINITY_S * 1000])
        known = pins
        bytes_each[pins] = (client.info("memory")["used_memory"] - before) / pins
        sessions = itertools.cycle([_session(i) for i in range(0, pins, max(1, pins // 997))])

        def select(sessions: Iterator[str] = sessions) -> list[tuple[int, str]]:
            return pool.select(["r"], [next(sessions)])

        costs[pins] = meter.cost(select, pool.settle, 1, sizes)
    of_select = [(float(pins), costs[pins].select_us) for pins in sizes.pins]
    most = sizes.pins[-1]
    return Part(
        title="Pins of sessions",
        text="One selection with session affinity, on the pin's service; and what Redis keeps for a pin.",
        tables=(
            Table(
                columns=("pins", "select, µs", "settle, µs", "bytes a pin"),
                rows=tuple(
                    (str(p), f"{costs[p].select_us:.1f}", f"{costs[p].settle_us:.1f}", f"{bytes_each[p]:.0f}")
                    for p in sizes.pins
                ),
            ),
        ),
        plots=(Plot(name="pins", x="pins in Redis", y="µs of Redis for a selection", curves={"select": of_select}),),
        verdicts=(
            _same(f"select among {most} pins costs what it does among few", of_select, 1.5),
            Verdict(claim="Redis' memory for a pin", figure=bytes_each[most], bound=256, unit="bytes"),
        ),
    )


def _session(number: int) -> str:
    """The digest that the script above makes of a number."""
    return hashlib.sha1(str(number).encode(), usedforsecurity=False).hexdigest()[:32]


def by_pools(client: Any, sizes: Sizes) -> Part:
    """Calls that go to one pool after the other."""
    meter, costs = Meter(client), dict[int, Cost]()
    for count in sizes.pools:
        client.flushall()
        pools = [Pool(client, f"pool-{i}") for i in range(count)]
        for pool in pools:
            pool.define([definition("r", tactic("hybrid", stays=True), "hybrid", 2)])
        turn = itertools.cycle(pools)

        def select(turn: Iterator[Pool] = turn) -> tuple[Pool, list[tuple[int, str]]]:
            pool = next(turn)
            return pool, pool.select(["r"])

        costs[count] = meter.cost(select, lambda picked: picked[0].settle(picked[1]), 1, sizes)
    of_select = [(float(count), costs[count].select_us) for count in sizes.pools]
    of_settle = [(float(count), costs[count].settle_us) for count in sizes.pools]
    most = sizes.pools[-1]
    return Part(
        title="Pools on one server",
        text="Microseconds of Redis for calls that go to one pool after the other.",
        tables=(
            Table(
                columns=("pools", "select, µs", "settle, µs"),
                rows=tuple((str(n), f"{costs[n].select_us:.1f}", f"{costs[n].settle_us:.1f}") for n in sizes.pools),
            ),
        ),
        plots=(Plot(name="pools", x="pools", y="µs of Redis", curves={"select": of_select, "settle": of_settle}),),
        verdicts=(
            _same(f"select with {most} pools costs what it does with one", of_select),
            _same(f"settle with {most} pools costs what it does with one", of_settle),
        ),
    )


def by_holdings(client: Any, sizes: Sizes) -> Part:
    """Calls of a worker with few and many requests in flight, and the looks at what it holds."""
    meter, costs = Meter(client), dict[int, Cost]()
    own, at_once, dead, calls_of_dead = dict[int, float](), dict[int, float](), dict[int, float](), dict[int, int]()
    for held in sizes.holdings:
        pool = _holding(client, held)
        costs[held] = meter.cost(functools.partial(pool.select, ["r"]), pool.settle, 1, sizes)
        looks = [_looked(meter, pool, "") for _ in range(_LOOKS)]
        own[held], at_once[held] = min(map(sum, looks)), min(map(max, looks))
        times = [_reaped(meter, _holding(client, held)) for _ in range(_REAPINGS)]
        dead[held], calls_of_dead[held] = min(map(sum, times)), len(times[0])
    of_select = [(float(held), costs[held].select_us) for held in sizes.holdings]
    of_settle = [(float(held), costs[held].settle_us) for held in sizes.holdings]
    of_look = [(float(held), own[held]) for held in sizes.holdings]
    of_reap = [(float(held), dead[held]) for held in sizes.holdings]
    few, most = sizes.holdings[-2:]
    return Part(
        title="Requests in flight of one worker",
        text="A worker looks at its own holdings, and at those of the next worker, a few times a lease; those of a "
        "dead worker are reaped. Either is done some hundred a call, and each call holds Redis up as a whole.",
        tables=(
            Table(
                columns=(
                    "in flight",
                    "select, µs",
                    "settle, µs",
                    "a look, ms",
                    "of that at once, ms",
                    "reaping all, ms",
                    "in calls",
                ),
                rows=tuple(
                    (
                        str(held),
                        f"{costs[held].select_us:.1f}",
                        f"{costs[held].settle_us:.1f}",
                        f"{own[held] / 1000:.2f}",
                        f"{at_once[held] / 1000:.2f}",
                        f"{dead[held] / 1000:.1f}",
                        str(calls_of_dead[held]),
                    )
                    for held in sizes.holdings
                ),
            ),
        ),
        plots=(
            Plot(
                name="holdings",
                x="requests in flight of one worker",
                y="µs of Redis",
                curves={"select": of_select, "settle": of_settle, "a look": of_look, "reaping all": of_reap},
            ),
        ),
        verdicts=(
            _same(f"select with {most} in flight costs what it does with few", of_select),
            _same(f"settle with {most} in flight costs what it does with few", of_settle),
            Verdict(
                claim=f"a look at {most} holdings holds Redis up for", figure=at_once[most] / 1000, bound=5, unit="ms"
            ),
            Verdict(
                claim=f"reaping one of {most} costs what it does of {few}",
                figure=(dead[most] / most) / (dead[few] / few),
                bound=1.5,
            ),
        ),
    )


def _holding(client: Any, held: int) -> Pool:
    """A worker with so many requests in flight."""
    client.flushall()
    pool = Pool(client, "p")
    pool.define([definition("r", tactic("hybrid", stays=True), "hybrid", 2)])
    for start in range(0, held, 50):
        pool.select(["r"] * min(50, held - start))
    return pool


def _reaped(meter: Meter, pool: Pool) -> list[float]:
    """Microseconds of each call until all that a dead worker held is reaped."""
    pool.lapse()
    return _looked(meter, pool, "other")


def _looked(meter: Meter, pool: Pool, looker: str) -> list[float]:
    """Microseconds of each call until all holdings were looked at."""
    spent: list[float] = []
    place = ""
    while place or not spent:
        with meter.measuring(spent, 1):
            place = pool.reap(looker, place)
    return spent


def measure(*, is_quick: bool) -> list[Part]:
    """All of it, on a server of its own."""
    sizes = QUICK if is_quick else FULL
    with servers.running("valkey-9") as url, redis.Redis.from_url(url) as client:
        return [question(client, sizes) for question in (by_services, by_rules, by_pins, by_pools, by_holdings)]
