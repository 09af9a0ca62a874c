"""A fleet of two pods under the load of a day, watched by a real Prometheus: calm, then every fault, then calm again.

What the dashboards' test and their pictures look at. A pod is a `balancer serve` with two workers; all share one store,
over fake accounts that fail when told to. A third pod, of a fleet of its own, runs a script that is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml
from aiohttp import web

from balancer.cli.accounts import FakeAccount, Handler
from balancer.store import scripts
from tests import prometheus
from tests.fleet.conftest import Fleet
from tests.prometheus import Prometheus
from tests.topologies import Server

NAMESPACE, TRIAL = "llm", "trial"
TOKEN = {"Authorization": "Bearer token-of-the-clients"}
ADMIN = {"Authorization": "Bearer admin-of-the-fleet"}
LEASE_S = 1.0
INTERVAL_S = 0.5
"""Between scrapes: one that waits for Redis in vain takes half of it."""

Json = dict[str, Any]


class Account(FakeAccount):
    """A fake account that takes its time, and fails as it is told."""

    def __init__(self, name: str, *, hold_s: float, chunk_interval_s: float) -> None:
        super().__init__(name, f"key-of-{name}", chunk_interval_s=chunk_interval_s)
        self.hold_s = hold_s
        self.fault: tuple[int, str] | None = None
        """Status and Retry-After of every answer."""

    def _guarded(self, handler: Handler) -> Handler:
        inner = super()._guarded(handler)

        async def answered(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(self.hold_s * random.uniform(0.6, 1.4))
            if self.fault is None:
                return await inner(request)
            status, retry_after = self.fault
            error = {"message": "out of order", "type": "server_error", "code": "server_error"}
            headers = {"Retry-After": retry_after} if retry_after else {}
            return web.json_response({"error": error}, status=status, headers=headers)

        return answered


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """So many clients that ask for a rule, each a pause after its last answer."""

    rule: str
    clients: int
    pause_s: float
    path: str = "/v1/chat/completions"
    words: int = 20


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """When something was so, in seconds since the epoch."""

    name: str
    start: float
    end: float


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How long all is calm, each fault lasts, and all is calm again; and thresholds that suit it."""

    calm_s: float = 7.0
    fault_s: float = 2.5
    after_s: float = 6.0
    streak: int = 12
    window_s: int = 15
    window_tokens: int = 2500
    cooldown_s: int = 1


LOADS = (
    Load(rule="gpt-5", clients=4, pause_s=0.15),
    Load(rule="gpt-5-mini", clients=3, pause_s=0.2),
    Load(rule="claude-opus-5", clients=4, pause_s=0.2, path="/v1/messages", words=60),
    Load(rule="embeddings", clients=2, pause_s=0.15, path="/v1/embeddings"),
    Load(rule="summaries", clients=2, pause_s=0.3, words=120),
    Load(rule="reviews", clients=1, pause_s=0.3),
)


def a_document(accounts: Mapping[str, Account], pace: Pace) -> Json:
    """Six rules in two pools, of every tactic that has a threshold or a share; one of them needs translation."""
    breaker = {"failures": 3, "open_s": 1, "successes": 2}
    price = {"input": 1.25, "output": 10, "cached": 0.125}

    def provider(name: str, style: str = "openai", **more: object) -> Json:
        account = accounts[name.partition("-")[0]]
        token = {"token": f"${{{account.name}}}"}
        return {"name": name, "api_base": account.url, "api_style": style, "breaker": breaker, **token, **more}

    def rule(model: str, tactic: str, services: list[Json], params: Json | None = None, **more: object) -> Json:
        lb_tactic = {"type": tactic, "params": params or {}}
        windowed = [{"time_window": pace.window_s, "model": model, **service} for service in services]
        return {"uuid": model, "request_model": model, "lb_tactic": lb_tactic, "services": windowed, **more}

    def of(*names: str) -> list[Json]:
        return [{"provider": name} for name in names]

    openai = ("anna-openai", "boris-openai", "chen-openai")
    anthropic = ("anna-anthropic", "boris-anthropic", "chen-anthropic")
    return {
        "providers": [
            *(provider(name, price=price) for name in openai),
            *(provider(name, "anthropic", price={"input": 5, "output": 25, "cached": 0.5}) for name in anthropic),
            provider("dora", limits={"rpm": 1200, "tpm": 400_000, "in_flight": 6}),
        ],
        "rules": [
            rule("gpt-5", "round_robin", of(*openai), {"request_threshold": pace.streak}),
            rule(
                "gpt-5-mini",
                "token_based",
                of(*openai[:2]),
                {"token_threshold": pace.window_tokens},
                on_exhausted="refuse",
                smart_enabled=True,
                smart_routing=[
                    {
                        "uuid": "long",
                        "ops": [{"position": "token", "operation": "ge", "value": 100_000}],
                        "services": [{"provider": "chen-openai", "model": "gpt-5"}],
                    }
                ],
            ),
            rule(
                "claude-opus-5",
                "hybrid",
                of(*anthropic[:2]),
                {"request_threshold": 4 * pace.streak, "token_threshold": 2 * pace.window_tokens},
                scenario="anthropic",
                session_affinity=60,
                session_header="x-session",
            ),
            rule(
                "embeddings",
                "weighted_round_robin",
                [{"provider": name, "weight": weight} for name, weight in zip(openai, (5, 3, 2), strict=True)],
                pool="batch",
            ),
            rule("summaries", "round_robin", of("dora"), on_store_loss="closed"),
            rule("reviews", "round_robin", of("chen-anthropic")),
        ],
    }


class Watched:
    """The fleet while it runs; `phases` is what happened to it and when."""

    def __init__(
        self, folder: Path, pace: Pace, accounts: Mapping[str, Account], store: Server, server: Prometheus
    ) -> None:
        self.folder = folder
        self.pace = pace
        self.accounts = accounts
        self.store = store
        self.prometheus = server
        self.pods: dict[str, Fleet] = {}
        self.trial: Fleet | None = None
        self.phases: list[Phase] = []
        self._session: aiohttp.ClientSession | None = None

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        (found,) = (phase for phase in self.phases if phase.name == name)
        return found

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        start = time.time()
        yield
        self.phases.append(Phase(name=name, start=start, end=time.time()))

    # -- what happens --------------------------------------------------------------------------------------------------

    async def live(self) -> None:
        """Lives through all of it."""
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            asyncio.TaskGroup() as all_,
        ):
            self._session = session
            urls = [pod.url for pod in self.pods.values()]
            clients = [
                all_.create_task(self._ask_on(urls, load, number)) for load in LOADS for number in range(load.clients)
            ]
            await asyncio.sleep(2)  # Until the first windows have something in them, and rates two samples.
            with self._named("calm"):
                await asyncio.sleep(self.pace.calm_s)
            with self._named("faults"):
                await self._faults(urls)
            with self._named("mended"):
                await asyncio.sleep(self.pace.after_s)
            for client in clients:
                client.cancel()

    async def _faults(self, urls: list[str]) -> None:
        assert self.trial
        async with asyncio.TaskGroup() as group:
            turns = Load(rule="turns", clients=1, pause_s=0.05)
            trial = group.create_task(self._ask_on([self.trial.url], turns, 0))
            await self._in_turn(urls)
            trial.cancel()

    async def _in_turn(self, urls: list[str]) -> None:
        """One fault after the other, each until Prometheus has seen it."""
        fault_s, accounts = self.pace.fault_s, self.accounts
        with self._named("a worker killed"):
            holds = {account.name: account.hold_s for account in accounts.values()}
            for account in accounts.values():
                account.hold_s = 0.3  # So that it dies with attempts open.
            await asyncio.sleep(0.3)
            os.kill(next(iter(await self.pods["balancer-1"].workers())), signal.SIGKILL)
            for name, hold_s in holds.items():
                accounts[name].hold_s = hold_s
            await asyncio.sleep(fault_s / 4)
        with self._named("an account fails"):
            accounts["anna"].fault = (503, "")
            await asyncio.sleep(fault_s)
            await self._is_seen('balancer_breaker_state{service="anna-openai:gpt-5"} == 2')
        with self._named("another is at its limits"):
            accounts["boris"].fault = (429, str(self.pace.cooldown_s))
            await asyncio.sleep(fault_s)
            await self._is_seen('balancer_cooldown_seconds{service="boris-openai:gpt-5"} > 0')
            await self._is_seen('rate(balancer_attempts_total{outcome="rate_limited"}[3s]) > 0')
            await self._is_seen('rate(balancer_refused_total{reason="exhausted"}[3s]) > 0')
        for account in accounts.values():
            account.fault = None
        with self._named("clients ask for too much"):
            more = (Load(rule="summaries", clients=14, pause_s=0.2), Load(rule="unheard-of", clients=1, pause_s=0.2))
            everybody = [self._ask_on(urls, load, number) for load in more for number in range(load.clients)]
            everybody.append(self._ask_on(urls, Load(rule="gpt-5", clients=1, pause_s=0.2), 0, headers={}))
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one) for one in everybody]
                await asyncio.sleep(fault_s)
                await self._is_seen('balancer_limit_used{kind="in_flight"} == balancer_limit{kind="in_flight"}')
                for reason in ("limited", "unauthorized", "unknown_model"):
                    await self._is_seen(f'rate(balancer_refused_total{{reason="{reason}"}}[3s]) > 0')
                for task in tasks:
                    task.cancel()
        with self._named("the configuration changes"):
            # Over and over, until a worker has picked under the one before.
            seeing = asyncio.create_task(self._is_seen("rate(balancer_stale_picks_total[3s]) > 0"))
            for number in itertools.count():
                await self._change_tactic(self.pace.streak + 1 - number % 2)
                await asyncio.sleep(0.05)
                if seeing.done() and number > 10:
                    break
            await seeing
            await asyncio.sleep(fault_s / 2)
            await self._is_seen("balancer_leases_expired_total > 0")
        self.store.control.save()
        with self._named("after the snapshot"):
            await asyncio.sleep(fault_s)
        with self._named("the store is away"):
            self.store.kill()
            await asyncio.sleep(fault_s)
            await self._is_seen("rate(balancer_degraded_picks_total[3s]) > 0")
            await self._is_seen('rate(balancer_refused_total{reason="store_lost"}[3s]) > 0')
            await asyncio.to_thread(self.store.start)

    async def _is_seen(self, expression: str) -> None:
        await self.prometheus.until(expression)

    async def _change_tactic(self, threshold: int) -> None:
        url = self.pods["balancer-0"].entries("serving")[0]["admin_url"]
        change = {"tactic": "round_robin", "params": {"request_threshold": threshold}}
        assert self._session
        async with self._session.put(
            f"{url}/api/v1/load-balancer/rules/gpt-5/tactic", json=change, headers=ADMIN
        ) as response:
            assert response.status == 200, await response.text()

    async def _ask_on(self, urls: list[str], load: Load, number: int, headers: Mapping[str, str] = TOKEN) -> None:
        """Asks by pods in turn until it is cancelled, whatever comes."""
        chance = random.Random(f"{load.rule} {number}")
        # Every other client goes on with a session of its own.
        session = {"x-session": f"{load.rule} {number}"} if number % 2 else {}
        assert self._session
        for count in range(number, 10**9):
            text = "tell me about fleets " * chance.randint(1, load.words)
            said: Json = (
                {"input": text}
                if load.path.endswith("embeddings")
                else {
                    "messages": [{"role": "user", "content": text}],
                    "max_tokens": 3 * load.words,
                    "stream": count % 2 == 0,
                }
            )
            url = urls[count % len(urls)] + load.path
            with contextlib.suppress(aiohttp.ClientError):  # A worker is killed on the way.
                async with self._session.post(
                    url, json={"model": load.rule, **said}, headers={**headers, **session}
                ) as response:
                    await response.read()
            await asyncio.sleep(load.pause_s * chance.uniform(0.5, 1.5))


@contextlib.asynccontextmanager
async def watched(folder: Path, pace: Pace | None = None) -> AsyncIterator[Watched]:
    """The fleet, once every pod serves and is scraped; `live()` is what is left to do."""
    pace = pace or Pace()
    async with contextlib.AsyncExitStack() as stack:
        made = [
            Account(name, hold_s=hold_s, chunk_interval_s=chunk_s)
            for name, hold_s, chunk_s in (
                ("anna", 0.03, 0.004),
                ("boris", 0.05, 0.006),
                ("chen", 0.08, 0.01),
                ("dora", 0.06, 0.006),
            )
        ]
        for account in made:
            await stack.enter_async_context(account)
        accounts = {account.name: account for account in made}
        store = Server("valkey-9", folder / "store", "--save", "", "--appendonly", "no")
        stack.callback(store.end)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER_")} | {
            **{name: account.api_key for name, account in accounts.items()},
            "XDG_RUNTIME_DIR": str(folder),
            "XDG_DATA_HOME": str(folder),
            "BALANCER_LEASE_S": str(LEASE_S),
            "BALANCER_ADMIN_TOKEN": "admin-of-the-fleet",
            "BALANCER_CLIENT_TOKENS": "token-of-the-clients",
            "BALANCER_HOST": "127.0.0.1",
        }
        url = f"redis://{store.address}"
        document = a_document(accounts, pace)
        trial = {
            "providers": document["providers"][:2],
            "rules": [
                {
                    "uuid": "turns",
                    "request_model": "turns",
                    "lb_tactic": {"type": "round_robin", "params": {"request_threshold": 3}},
                    "services": [{"provider": name, "model": "m"} for name in ("anna-openai", "boris-openai")],
                }
            ],
            "pools": [{"name": "default", "record": "full"}],
        }
        wrong = {"BALANCER_SCRIPTS_DIR": str(wrong_scripts(folder)), "BALANCER_AUDIT_INTERVAL_S": "0.5"}
        fleets = await asyncio.gather(
            stack.enter_async_context(_serving(folder, "balancer-0", url, document, 2, environment)),
            stack.enter_async_context(_serving(folder, "balancer-1", url, document, 2, environment)),
            stack.enter_async_context(_serving(folder, "trial-0", f"{url}/1", trial, 1, environment | wrong)),
        )
        pods = dict(zip(("balancer-0", "balancer-1"), fleets, strict=False))
        configuration = prometheus.scraping(
            {name: _address(fleet) for name, fleet in pods.items()}, namespace=NAMESPACE
        )
        more = prometheus.scraping(
            {"trial-0": _address(fleets[2])}, namespace=TRIAL, job="trial", interval_s=INTERVAL_S
        )
        configuration["scrape_configs"] += more["scrape_configs"]
        server = await stack.enter_async_context(prometheus.running(configuration))
        found = Watched(folder, pace, accounts, store, server)
        found.pods, found.trial = pods, fleets[2]
        await server.until_scraped()
        yield found


@contextlib.asynccontextmanager
async def _serving(
    folder: Path, name: str, store_url: str, document: Json, workers: int, environment: Mapping[str, str]
) -> AsyncIterator[Fleet]:
    file, log = folder / f"{name}.yaml", folder / f"{name}.log"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    arguments = ("--redis", store_url, "--config", str(file), "--workers", str(workers), "--port", "0")
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balancer", "serve", *arguments),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=stderr,
        )
    fleet = Fleet(process, log, workers)
    try:
        fleet.url = (await fleet.logged("serving"))[0]["url"]
        yield fleet
    finally:
        await fleet.stopped()


def _address(fleet: Fleet) -> str:
    return fleet.url.removeprefix("http://")


def wrong_scripts(folder: Path) -> Path:
    """A copy of the scripts in which round_robin stays one request too long."""
    copy = folder / "lua"
    shutil.copytree(scripts.folder(), copy)
    file = copy / "include" / "tactic" / "round_robin.lua"
    right = "turn.streak < turn.params.request_threshold"
    source = file.read_text(encoding="utf-8")
    assert right in source
    file.write_text(source.replace(right, right.replace("<", "<=")), encoding="utf-8")
    return copy
