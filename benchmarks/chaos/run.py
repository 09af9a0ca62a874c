"""One run: a store, accounts, two fleets and a balancer before them; a calm, the faults, a rest, and the reckoning."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from balancer import config
from balancer.audit import Checker
from balancer.store import connection, history, keys
from balancer.store.balance import Balance as StoreBalance
from balancer.store.topology import Topology
from balancer.store.views import PoolView
from benchmarks.chaos import books, report, stores
from benchmarks.chaos.account import Attempt
from benchmarks.chaos.causes import (
    OF_STORE_SILENCE,
    OF_THE_STORE,
    Cause,
    Fault,
    FaultKind,
    Judge,
    RetryBudget,
    by_request,
)
from benchmarks.chaos.client import Answer, Clients, End, Manner
from benchmarks.chaos.injector import Injector
from benchmarks.chaos.load import Asked, Load
from benchmarks.chaos.plan import kinds_of, one_after_the_other, overlapping
from benchmarks.chaos.processes import (
    CLIENTS_CORE,
    AccountProcess,
    Serve,
    Size,
    haproxy,
    haproxy_program,
    on_core,
    size_of,
)
from benchmarks.chaos.report import Bar, Growth, Report

POOL = "default"
ACCOUNTS = ("anna", "boris", "chen", "dora")
RULES = (
    Asked("chat", "openai", 5),
    Asked("claude", "anthropic", 5),
    Asked("tokens", "openai", 5),
    Asked("strict", "openai", 5),
    Asked("few", "openai", 1),
)
RPM = 15
"""Of each service of the rule `few`; there are as many as accounts, and more is asked for."""
LIMITED_RULES = frozenset({"few"})
ATTEMPTS, RETRY_RATIO, MOST_RETRIES = 3, 0.2, 100
CLOSED_RULES = frozenset({"strict"})
TACTICS: dict[str, dict[str, Any]] = {
    "chat": {"type": "round_robin", "params": {"request_threshold": 3}},
    "claude": {"type": "hybrid", "params": {"request_threshold": 10, "token_threshold": 5000}},
    "tokens": {"type": "token_based", "params": {"token_threshold": 3000}},
    "strict": {"type": "random"},
    "few": {"type": "round_robin", "params": {"request_threshold": 1}},
}
LEASE_S = 3.0
DEADLINE_MS = 250
OPEN_S = 2
_RECOVERY_S = OPEN_S * 8 * 1.2 + 1
"""A breaker that opens again and again stays open up to eightfold, and a fifth more."""
_MINUTE_S = 58.0
_KEEP = 10_000_000
_PAGE = 2000
_REAP_S = LEASE_S + 40.0
_STORE_GRACE_S = 6.0
"""From a store's return until every worker has noticed."""
_APART_S = 1.0
_MOST_GROWTH_MIB = 24.0
_MOST_NEW_FDS = 8
_IDLE_S = 30.0
_MOST_IDLE = 64
"""A connection to an account is kept for so long while idle; before that there may be so many more than before."""
_MOST_SLOPE_MIB_PER_H = 12.0
_SLOPE_FROM = 0.25
"""The share of a soak that is warm-up."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how much."""

    seed: int
    per_s: float
    calm_s: float
    lasts_s: float
    pause_s: float
    overlap_s: float
    every_s: float
    rest_s: float
    has_sequence: bool = True
    soak_s: float = 0.0
    logs: str = ""
    """A folder where the fleets' logs are kept, empty for none."""


class Run:
    """A run on one kind of store."""

    def __init__(self, kind: str, options: Options) -> None:
        self._kind = kind
        self._options = options
        # Of their own, so that the plan does not depend on how many requests there were.
        self._of_plan, self._of_faults = random.Random(f"plan {options.seed}"), random.Random(f"faults {options.seed}")
        self._samples: list[tuple[float, float]] = []
        """Hours, and the mean MiB of the workers that nobody kills."""

    async def run(self) -> Report:
        """Runs it; what it has shown."""
        began = time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
            stack.enter_context(on_core(CLIENTS_CORE))
            store = await stack.enter_async_context(stores.running(self._kind))
            accounts = [await stack.enter_async_context(AccountProcess.running(name, folder)) for name in ACCOUNTS]
            file = folder / "balancer.json"
            file.write_bytes(msgspec.json.encode(a_document(accounts)))
            fleets: list[Serve] = []
            logs = Path(self._options.logs or folder)
            for name in ("one", "two"):
                arguments = ["--redis", store.url, "--port", "0", "--workers", "2", "--config", str(file)]
                fleet = await Serve.start(
                    logs / f"{self._kind}-{name}.log", arguments, _environment(folder / f"outbox-{name}")
                )
                stack.push_async_callback(fleet.stop)
                fleets.append(fleet)
            ports = [fleet.port for fleet in fleets]
            behind = "connections to two fleets in turn"
            if haproxy_program():
                ports = [await stack.enter_async_context(haproxy(folder, ports, asks_readiness=False))]
                behind = "two fleets behind haproxy"
            calm = await self._load_for(ports, "calm", self._calm)
            await asyncio.sleep(self._options.rest_s)
            before = _sizes(fleets)
            chaos = await self._load_for(ports, "chaos", functools.partial(self._disturb, store, accounts, fleets))
            view, events = await self._reckon(store.url, fleets)
            await asyncio.sleep(self._options.rest_s)
            after = _sizes(fleets)
            status = [await fleet.stop() for fleet in fleets]
            attempts = [attempt for account in accounts for attempt in account.attempts()]
            return self._report(
                time.monotonic() - began, behind, calm, chaos, view, events, attempts, (before, after), status
            )

    # -- load ----------------------------------------------------------------------------------------------------------

    async def _load_for(self, ports: list[int], name: str, doing: Callable[[Load], Awaitable[list[Fault]]]) -> Loaded:
        load = Load(random.Random(f"{name} {self._options.seed}"), Clients(ports), RULES, self._options.per_s, name)
        load.start()
        faults = await doing(load)
        await load.stop()
        return Loaded(answers=load.answers, faults=faults, unasked=load.unasked)

    async def _calm(self, load: Load) -> list[Fault]:
        await asyncio.sleep(self._options.calm_s)
        return []

    async def _disturb(
        self, store: stores.Store, accounts: list[AccountProcess], fleets: list[Serve], load: Load
    ) -> list[Fault]:
        options = self._options
        # In a soak only the second fleet's workers are killed: the first one's live from its beginning to its end.
        victims = fleets[1:] if options.soak_s else fleets
        injector = Injector(self._of_faults, store, accounts, victims, load)
        kinds = kinds_of(self._kind)
        if options.soak_s:
            sampling = asyncio.create_task(self._sample(fleets[0]))
            plan = overlapping(self._of_plan, kinds, ACCOUNTS, options.soak_s, options.every_s, options.lasts_s)
            await injector.run(plan)
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
        else:
            if options.has_sequence:
                await injector.run(
                    one_after_the_other(self._of_plan, kinds, ACCOUNTS, options.lasts_s, options.pause_s)
                )
            await injector.run(
                overlapping(self._of_plan, kinds, ACCOUNTS, options.overlap_s, options.every_s, options.lasts_s)
            )
        await asyncio.sleep(options.pause_s)
        return injector.faults

    async def _sample(self, fleet: Serve) -> None:
        began = time.monotonic()
        while True:
            sizes = [size for pid in fleet.workers() if (size := size_of(pid))]
            if sizes:
                mean = sum(size.rss_bytes for size in sizes) / len(sizes) / 2**20
                self._samples.append(((time.monotonic() - began) / 3600, mean))
            await asyncio.sleep(10)

    # -- reckoning -----------------------------------------------------------------------------------------------------

    async def _reckon(self, url: str, fleets: list[Serve]) -> tuple[PoolView, Told]:
        """The pool once all is settled or reaped, and its history."""
        await _until_handed_in(fleets)
        balance = StoreBalance(url, config.load({"lease_s": LEASE_S, "audit_interval_s": 0.0}, {}))
        await balance.start()
        try:
            deadline = time.monotonic() + _REAP_S
            while True:
                views = await balance.views()
                if views and (time.monotonic() > deadline or not any(s.in_flight for s in views[0].services.values())):
                    view = views[0]
                    break
                await asyncio.sleep(0.2)
        finally:
            await balance.close()
        told, checker = Told(books.History(), []), Checker()
        commands = connection.Commands(Topology(url), timeout_s=30)
        try:
            send = functools.partial(commands.run, keys.partitions(POOL))
            async for page in history.pages(send, POOL, history.FIRST, _PAGE):
                for event in page.events:
                    told.history.feed(event)
                    checker.feed(event)
                await asyncio.sleep(0)
        finally:
            await commands.aclose()
        told.violations.extend(str(violation) for violation in checker.verdict.violations)
        return view, told

    def _report(
        self,
        seconds: float,
        behind: str,
        calm: Loaded,
        chaos: Loaded,
        view: PoolView,
        told: Told,
        attempts: list[Attempt],
        sizes: tuple[list[Size], list[Size]],
        status: list[int],
    ) -> Report:
        answers = calm.answers + chaos.answers
        judge = Judge(
            chaos.faults,
            by_request(attempts),
            closed_rules=CLOSED_RULES,
            limited_rules=LIMITED_RULES,
            most_attempts=ATTEMPTS,
            accounts=ACCOUNTS,
            has_budget=RetryBudget(attempts, RETRY_RATIO, MOST_RETRIES).is_left,
            recovery_s=_RECOVERY_S,
            serving_since=_serving_since(answers),
            store_grace_s=_STORE_GRACE_S,
        )
        needless = [answer for answer in answers if judge.is_needlessly_degraded(answer)]
        causes: list[Cause] = []
        without_cause: list[str] = []
        for answer in answers:
            if answer.end is End.WHOLE:
                continue
            cause = judge.cause(answer)
            if cause is not None:
                causes.append(cause)
            else:
                without_cause.append(_described(answer, judge))
        killed = [fault for fault in chaos.faults if fault.kind == FaultKind.KILL_WORKER]
        most_lost = sum(_open_at(fault, answers, chaos.faults) for fault in killed)
        balance = books.compare(
            view,
            told.history,
            attempts,
            most_lost=most_lost,
            most_vanished=sum(
                _open_at(fault, answers, chaos.faults) for fault in killed if _store_is_away(fault, chaos)
            ),
            most_unsent=sum(a.end is End.LEFT and not a.first for a in answers),
        )
        rows = _latencies(calm, chaos)
        growth = _growth(*sizes)
        slope = _slope(self._samples) if self._options.soak_s else None
        errors = report.counted([c for c in causes if c is not Cause.CLIENT_DISCONNECTED])
        lost_bar = f"{balance.lost} lost of {most_lost} open in {len(killed)} killed workers"
        away = rows.get("store away")
        # While the store is away each worker has its share of the limit, and on return nobody knows of what that was.
        most_rpm = RPM * (2 if any(fault.kind in OF_THE_STORE for fault in chaos.faults) else 1)
        most_new_fds = _MOST_NEW_FDS + (0 if self._options.rest_s > _IDLE_S else _MOST_IDLE)
        rpm = _most_in_a_minute(attempts)
        bars = [
            Bar(name="every error has a cause", holds=not without_cause, detail=f"{len(without_cause)} without"),
            Bar(
                name="every attempt and token is counted once",
                holds=not balance.faults,
                detail=f"{sum(r.seen for r in balance.rows.values())} attempts, "
                f"{sum(r.ours for r in balance.rows.values())} tokens, {lost_bar}, {balance.vanished} vanished "
                f"with a worker while the store was away, {balance.unsent} settled for clients that left unsent",
            ),
            Bar(name="every pick is right", holds=not told.violations, detail=f"{len(told.violations)} violations"),
            Bar(
                name="workers pick alone only while the store is away",
                holds=not needless,
                detail=f"{sum(bool(a.degraded) for a in answers)} answers without it, {len(needless)} needlessly",
            ),
            Bar(name="limits hold", holds=rpm <= most_rpm, detail=f"{rpm} of {RPM} a minute, bound {most_rpm}"),
            Bar(
                name="memory is flat",
                holds=growth.rss_mib[1] <= growth.rss_mib[0] + _MOST_GROWTH_MIB,
                detail=f"{growth.rss_mib[1] - growth.rss_mib[0]:+.1f} MiB, bound {_MOST_GROWTH_MIB:g}",
            ),
            Bar(
                name="open files are flat",
                holds=growth.fds[1] <= growth.fds[0] + most_new_fds,
                detail=f"{growth.fds[1] - growth.fds[0]:+d}, bound {most_new_fds}",
            ),
            Bar(
                name="the load kept its rate",
                holds=not calm.unasked and not chaos.unasked,
                detail=f"{calm.unasked + chaos.unasked} requests were not made",
            ),
            Bar(name="both fleets end well", holds=status == [0, 0], detail=f"status {status}"),
        ]
        if away is not None and away.requests:
            bound = DEADLINE_MS + rows["calm"].p99_ms
            bars.append(
                Bar(
                    name="nobody waits longer for a store that is away than the deadline",
                    holds=away.p99_ms <= bound,
                    detail=f"p99 {away.p99_ms:g} ms, bound {bound:g}",
                )
            )
        if slope is not None:
            bars.append(
                Bar(
                    name="memory does not grow by the hour",
                    holds=slope <= _MOST_SLOPE_MIB_PER_H,
                    detail=f"{slope:+.2f} MiB/h, bound {_MOST_SLOPE_MIB_PER_H:g}",
                )
            )
        return Report(
            store=self._kind,
            seed=self._options.seed,
            seconds=seconds,
            behind=behind,
            requests=len(answers),
            ends=report.counted([a.end for a in answers]),
            errors=errors,
            without_cause=without_cause,
            faults=report.counted([fault.kind for fault in chaos.faults]),
            latency=rows,
            growth=growth,
            slope_mib_per_h=slope,
            balance=balance,
            violations=told.violations,
            needless=[_described(answer, judge) for answer in needless],
            bars=bars,
        )


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What a load has brought, under which faults."""

    answers: list[Answer]
    faults: list[Fault]
    unasked: int


class Told(msgspec.Struct, frozen=True):
    """What the pool's history tells: how attempts ended, and picks that are not what they should be."""

    history: books.History
    violations: list[str]


def a_document(accounts: list[AccountProcess]) -> dict[str, Any]:
    """The rules over all accounts, and short patience with them."""
    timeouts = {"connect_s": 2, "headers_s": 2, "first_byte_s": 2, "idle_s": 2}
    return {
        "providers": [
            {
                "name": f"{account.name}-{style}",
                "api_base": account.url,
                "api_style": style,
                "no_key_required": True,
                "timeout": 20,
                "timeouts": timeouts,
                "breaker": {"failures": 3, "open_s": OPEN_S, "successes": 1},
            }
            for account in accounts
            for style in ("openai", "anthropic")
        ],
        "rules": [
            {
                "uuid": asked.rule,
                "scenario": asked.style,
                "request_model": asked.rule,
                "lb_tactic": TACTICS[asked.rule],
                "on_store_loss": "closed" if asked.rule in CLOSED_RULES else "local",
                "services": [
                    {
                        "provider": f"{account.name}-{asked.style}",
                        "model": asked.rule,
                        "limits": {"rpm": RPM} if asked.rule in LIMITED_RULES else {},
                    }
                    for account in accounts
                ],
            }
            for asked in RULES
        ],
        "pools": [{"name": POOL, "record": "full", "record_events": _KEEP}],
    }


def _environment(outbox: Path) -> dict[str, str]:
    outbox.mkdir()
    return {
        "BALANCER_LEASE_S": str(LEASE_S),
        "BALANCER_REDIS_DEADLINE_MS": str(DEADLINE_MS),
        "BALANCER_OUTBOX_DIR": str(outbox),
        "BALANCER_ADMIN_PORT": "0",
    }


async def _until_handed_in(fleets: list[Serve]) -> None:
    """Returns once no worker has anything left that the store does not know, or after a while."""
    deadline = time.monotonic() + _REAP_S
    waiting = {pid for fleet in fleets for pid in fleet.workers()}
    while waiting and time.monotonic() < deadline:
        for fleet in fleets:
            async with aiohttp.ClientSession() as session:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"http://127.0.0.1:{fleet.port}/readyz") as response:
                        state = await response.json()
                        if not state["outbox_entries"]:
                            waiting.discard(state["pid"])
        await asyncio.sleep(0.02)


def _sizes(fleets: list[Serve]) -> list[Size]:
    return [size for fleet in fleets for pid in fleet.workers() if (size := size_of(pid))]


def _growth(before: list[Size], after: list[Size]) -> Growth:
    def greatest(sizes: list[Size]) -> tuple[float, int]:
        return max(s.rss_bytes for s in sizes) / 2**20, max(s.fds for s in sizes)

    (rss_before, fds_before), (rss_after, fds_after) = greatest(before), greatest(after)
    return Growth(rss_mib=(rss_before, rss_after), fds=(fds_before, fds_after))


def _slope(samples: list[tuple[float, float]]) -> float:
    """MiB an hour, by least squares over what comes after the warm-up."""
    samples = samples[int(len(samples) * _SLOPE_FROM) :]
    if len(samples) < 2:
        return 0.0
    mean_x = sum(x for x, _ in samples) / len(samples)
    mean_y = sum(y for _, y in samples) / len(samples)
    return sum((x - mean_x) * (y - mean_y) for x, y in samples) / sum((x - mean_x) ** 2 for x, _ in samples)


def _latencies(calm: Loaded, chaos: Loaded) -> dict[str, report.Latency]:
    """Milliseconds to the first byte of whole answers to clients that read."""

    def of(answers: list[Answer]) -> report.Latency:
        read = [a for a in answers if a.end is End.WHOLE and a.ask.manner is Manner.READS]
        return report.latency([(a.first - a.began) * 1000 for a in read])

    silences = [
        fault
        for fault in chaos.faults
        if fault.kind in OF_STORE_SILENCE
        and not any(f is not fault and f.meets(fault.began, fault.ended, _APART_S) for f in chaos.faults)
    ]
    away = [
        a
        for a in chaos.answers
        if a.ask.rule not in CLOSED_RULES and any(fault.began <= a.began <= fault.ended for fault in silences)
    ]
    return {"calm": of(calm.answers), "under faults": of(chaos.answers), "store away": of(away)}


def _serving_since(answers: list[Answer]) -> dict[int, float]:
    """When each worker gave its first whole answer, by its process."""
    since: dict[int, float] = {}
    for answer in answers:
        if answer.end is End.WHOLE:
            since[answer.pid] = min(answer.ended, since.get(answer.pid, answer.ended))
    return since


def _most_in_a_minute(attempts: list[Attempt]) -> int:
    """The most attempts that a service of the limited rules has seen within a minute, less what underways may shift."""
    most = 0
    by_service: dict[str, list[float]] = {}
    for attempt in attempts:
        if attempt.service.partition(":")[2] in LIMITED_RULES:
            by_service.setdefault(attempt.service, []).append(attempt.at)
    for times in by_service.values():
        recent: deque[float] = deque()
        for at in sorted(times):
            recent.append(at)
            while at - recent[0] > _MINUTE_S:
                recent.popleft()
            most = max(most, len(recent))
    return most


def _open_at(kill: Fault, answers: list[Answer], faults: list[Fault]) -> int:
    """Requests whose settle a killed worker may not have handed in: those it had open, and all since the store left."""
    since = min(
        (f.began for f in faults if f.kind in OF_THE_STORE and f.meets(kill.began, kill.began, _STORE_GRACE_S)),
        default=kill.began - 0.5,
    )
    return sum(str(a.pid) == kill.target and a.began <= kill.began and a.ended >= since for a in answers)


def _store_is_away(kill: Fault, chaos: Loaded) -> bool:
    return any(f.kind in OF_THE_STORE and f.meets(kill.began, kill.began, _STORE_GRACE_S) for f in chaos.faults)


def _described(answer: Answer, judge: Judge) -> str:
    """All that is known of an answer that should not be."""
    ask = answer.ask
    attempts = ", ".join(f"{a.service} {a.storm or 'calm'}" for a in judge.attempts_of(ask.request_id))
    during = ", ".join(f"{f.kind} {f.target}" for f in judge.faults_during(answer))
    return (
        f"{ask.request_id} {ask.rule} {'stream' if ask.is_stream else 'json'} {ask.manner}: {answer.end} "
        f"{answer.status} {answer.code} {answer.message!r} after {answer.ended - answer.began:.2f} s at worker "
        f"{answer.pid} {answer.service}; attempts: {attempts or 'none'}; meanwhile: {during or 'nothing'}"
    )
