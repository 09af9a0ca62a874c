"""Runs the proof: phases of decisions under faults, each checked from its first event to its last.

`python -m benchmarks.prove [--decisions N] [--phases N] [--topology NAME …] [--workers N] [--seed N]`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from balancer import config, document, log
from balancer.audit import Checker, Verdict
from balancer.errors import ConflictError, StoreUnavailableError
from balancer.store import connection, history, keys
from balancer.store.balance import Balance
from balancer.store.publishing import publish_file
from balancer.store.registry import Registry
from balancer.store.topology import Topology
from benchmarks.prove import stores
from benchmarks.prove.books import Books, Ledger, compare, totals
from benchmarks.prove.journal import read, workers_of
from benchmarks.prove.worker import DEADLINE_MS, LEASE_S

POOLS = stores.POOLS
PROVIDERS = ("p0", "p1", "p2", "p3", "p4")
TACTICS = ("round_robin", "token_based", "hybrid", "random")
_PAGE = 2000
_STALL_S = 30.0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a phase has shown."""

    name: str
    decisions: int
    seconds: float
    faults: dict[str, int]
    verdicts: dict[str, Verdict]
    books: Books

    @property
    def is_right(self) -> bool:
        """True when nothing is wrong."""
        return not self.books.faults and not any(verdict.violation_count for verdict in self.verdicts.values())


def a_document(rand: random.Random) -> dict[str, Any]:
    """Rules of every tactic in two pools over shared providers, as an operator may have them at some moment."""
    rules = []
    for pool in POOLS:
        for tactic in TACTICS:
            services = [
                {
                    "provider": provider,
                    "model": "m",
                    "weight": rand.choice((0, 1, 3)),
                    "active": rand.random() < 0.9,
                    "time_window": rand.choice((2, 300)),
                }
                for provider in rand.sample(PROVIDERS, rand.randint(2, 5))
            ]
            params: dict[str, Any] = {"reserve": rand.choice(("none", "input", "full"))}
            if tactic in ("round_robin", "hybrid"):
                params["request_threshold"] = rand.choice((1, 3, 10, 50))
            if tactic in ("token_based", "hybrid"):
                params["token_threshold"] = rand.choice((50, 500, 5000))
            rule: dict[str, Any] = {
                "uuid": f"{pool}/{tactic}",
                "request_model": f"{pool}-{tactic}",
                "pool": pool,
                "lb_tactic": {"type": tactic, "params": params},
                "services": services,
                "on_store_loss": "closed",  # What a worker picks alone is in no history, and nothing of it is proven.
            }
            if rand.random() < 0.2:
                rule["current_service_index"] = rand.randrange(len(services))
            rules.append(rule)
    return {
        "providers": [
            {
                "name": name,
                "api_base": "http://127.0.0.1:9",
                "no_key_required": True,
                "enabled": name == "p0" or rand.random() < 0.95,
            }
            for name in PROVIDERS
        ],
        "rules": rules,
        "pools": [{"name": pool, "record": "full", "record_events": 50_000_000} for pool in POOLS],
    }


class Fleet:
    """The workers of a phase."""

    def __init__(self, url: str, folder: Path, seed: int) -> None:
        self._url = url
        self._folder = folder
        self._seed = seed
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._readers: list[asyncio.Task[None]] = []
        self._log = (folder / "workers.log").open("wb")
        self.picks = 0
        self.last_pick = time.monotonic()
        self.killed: set[str] = set()
        """The journals of workers that were killed."""

    async def start_one(self) -> None:
        """One worker more."""
        self._seed += 1
        journal = f"{self._seed}.journal"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.prove.worker"),
            *(self._url, str(self._folder / journal), str(self._seed)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=self._log,
        )
        self._processes[journal] = process
        self._readers.append(asyncio.create_task(self._count(process)))

    async def _count(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            self.picks += int(line)
            self.last_pick = time.monotonic()

    def alive(self) -> dict[str, asyncio.subprocess.Process]:
        """Those that run, by their journals."""
        return {journal: process for journal, process in self._processes.items() if process.returncode is None}

    def kill_one(self, rand: random.Random) -> None:
        """Kills a worker as `kill -9` does."""
        journal = rand.choice(list(self.alive()))
        self.killed.add(journal)
        self._processes[journal].kill()

    async def stop(self) -> None:
        """Lets every worker end its attempts."""
        for process in self.alive().values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*(process.wait() for process in self._processes.values()))
        finally:
            for journal, process in self.alive().items():
                self.killed.add(journal)
                process.kill()
                await process.wait()
            await asyncio.gather(*self._readers, return_exceptions=True)
            self._log.close()


class Phase:
    """Decisions under faults on one topology, and their check."""

    def __init__(self, kind: str, decisions: int, workers: int, seed: int) -> None:
        self._kind = kind
        self._decisions = decisions
        self._workers = workers
        self._random = random.Random(seed)
        self._seed = seed
        self._faults: dict[str, int] = {}

    async def run(self) -> Result:
        """Runs it. Raises TimeoutError when the workers make no picks any more."""
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="prove-") as temporary:
            folder = Path(temporary)
            async with stores.running(self._kind, folder) as store:
                commands = connection.Commands(Topology(store.url), timeout_s=30)
                try:
                    await self._publish(commands)
                    fleet = Fleet(store.workers_url, folder, self._seed * 1000)
                    for _ in range(self._workers):
                        await fleet.start_one()
                    try:
                        await self._disturb(fleet, commands, store)
                    finally:
                        await fleet.stop()
                    await wait_until_reaped(store.url, LEASE_S + DEADLINE_MS / 1000)
                    seconds = time.monotonic() - started
                    return await self._check(folder, commands, seconds, fleet.killed)
                finally:
                    await commands.aclose()

    async def _publish(self, commands: connection.Commands) -> None:
        configuration = document.read(a_document(self._random), door="strict").configuration
        await publish_file(Registry(commands), configuration, None, force=True)

    # -- faults --------------------------------------------------------------------------------------------------------

    async def _disturb(self, fleet: Fleet, commands: connection.Commands, store: stores.Store) -> None:
        """Faults, one after the other, until enough decisions were made."""

        async def kill() -> None:
            fleet.kill_one(self._random)
            await fleet.start_one()

        async def freeze() -> None:
            """Longer than the lease: what it holds is reaped, and it settles all the same when it wakes."""
            process = self._random.choice(list(fleet.alive().values()))
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(LEASE_S + 1.5)
            process.send_signal(signal.SIGCONT)

        async def edit() -> None:
            # While a failover is under way: the next edit comes soon, and completes this one.
            with contextlib.suppress(StoreUnavailableError, ConflictError):
                await self._publish(commands)

        async def on_masters(*command: str) -> None:
            for url in await asyncio.to_thread(store.masters):
                async with connection.client(url) as client:
                    await client.execute_command(*command)  # type: ignore[no-untyped-call]

        async def forget_scripts() -> None:
            await on_masters("SCRIPT", "FLUSH")

        async def cut_clients() -> None:
            await on_masters("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        doings = [kill, freeze, edit, edit, edit, forget_scripts, cut_clients, *store.faults]
        while fleet.picks < self._decisions:
            if time.monotonic() - fleet.last_pick > _STALL_S:
                raise TimeoutError(f"no picks for {_STALL_S:g} s")
            doing = self._random.choice(doings)
            self._faults[doing.__name__] = self._faults.get(doing.__name__, 0) + 1
            await doing()
            await asyncio.sleep(self._random.uniform(0.5, 2.0))

    # -- check ---------------------------------------------------------------------------------------------------------

    async def _check(self, folder: Path, commands: connection.Commands, seconds: float, killed: set[str]) -> Result:
        ledger = Ledger(has_failovers=self._kind != "standalone")
        verdicts: dict[str, Verdict] = {}
        counted: dict[str, tuple[int, int, int]] = {}
        for pool in POOLS:
            send = functools.partial(commands.run, keys.partitions(pool))
            await history.checkpoint(send, pool)
            checker = Checker()
            async for page in history.pages(send, pool, history.FIRST, _PAGE):
                for event in page.events:
                    checker.feed(event)
                    ledger.feed(pool, event)
            verdicts[pool] = checker.verdict
            for name, state in (checker.pool.services if checker.pool else {}).items():
                if state.requests:
                    counted[f"{pool} {name}"] = (state.requests, state.input + state.output, state.lost)
        attempts = await asyncio.to_thread(read, folder)
        books = compare(ledger, attempts, workers_of(folder) - workers_of(folder, killed))
        for service, row in totals(ledger, attempts).items():
            if counted.get(service) != row:
                books.faults.append(
                    f"{service}: the store counts {counted.get(service)} (requests, tokens, lost), the books say {row}"
                )
        return Result(
            name=self._kind,
            decisions=sum(verdict.picks for verdict in verdicts.values()),
            seconds=seconds,
            faults=dict(sorted(self._faults.items())),
            verdicts=verdicts,
            books=books,
        )


async def wait_until_reaped(url: str, timeout_s: float) -> None:
    """Returns once a worker that picks nothing has looked after all that the others have left."""
    balance = Balance(url, config.load({"lease_s": LEASE_S, "audit_interval_s": 0.0}, {}))
    await balance.start()
    try:
        async with asyncio.timeout(timeout_s + 10):
            while True:
                views = await balance.views()
                if len(views) == len(POOLS) and not any(s.in_flight for v in views for s in v.services.values()):
                    return
                await asyncio.sleep(0.2)
    finally:
        await balance.close()


def show(result: Result) -> None:
    """Prints what a phase has shown."""
    books = result.books
    print(
        f"{result.name}: {result.decisions} decisions in {result.seconds:.0f} s; faults: "
        + ", ".join(f"{name} {count}" for name, count in result.faults.items())
    )
    for pool, verdict in result.verdicts.items():
        print(f"  pool {pool}: " + verdict.summary().replace("\n", "\n  "))
    print(
        f"  upstreams saw {books.seen} attempts: {books.settled} settled once, {books.lost} lost with their worker, "
        f"{books.lost_to_failover} picks lost to failover; {books.tokens} tokens agree; "
        f"{books.lost_unseen} were picked for a worker that was killed before it sent them"
    )
    for fault in books.faults[:10]:
        print(f"  WRONG: {fault}")
    if len(books.faults) > 10:
        print(f"  … and {len(books.faults) - 10} more")
    print(f"  {'right' if result.is_right else 'WRONG'}", flush=True)


async def main(options: argparse.Namespace) -> int:
    """Runs all phases; 0 if nothing is wrong."""
    log.configure("error")
    results = []
    for number in range(options.phases):
        kind = options.topology[number % len(options.topology)]
        phase = Phase(kind, options.decisions // options.phases, options.workers, options.seed + number)
        results.append(await phase.run())
        show(results[-1])
    by_kind = {kind: sum(r.decisions for r in results if r.name == kind) for kind in options.topology}
    print("decisions: " + ", ".join(f"{kind} {count}" for kind, count in by_kind.items()))
    total = sum(result.decisions for result in results)
    is_right = all(result.is_right for result in results)
    violations = sum(v.violation_count for result in results for v in result.verdicts.values())
    seen = sum(result.books.seen for result in results)
    faults = sum(len(result.books.faults) for result in results)
    verdict = "PROVEN" if is_right else "REFUTED"
    print(f"{total} decisions, {seen} attempts, {violations} violations, {faults} faults in the books: {verdict}")
    return 0 if is_right else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=2_000_000)
    parser.add_argument("--phases", type=int, default=12, help="each begins with an empty store")
    parser.add_argument("--topology", nargs="+", choices=stores.KINDS, default=list(stores.KINDS))
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"))
    sys.exit(asyncio.run(main(parser.parse_args())))
