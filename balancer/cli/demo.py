"""demo: a fleet under load, a worker killed in the middle, and the proof that every pick and token is right."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from rich.console import Console
from rich.live import Live
from rich.table import Table

from balancer import audit
from balancer.cli.accounts import Count, Ledger
from balancer.errors import BalancerError, ConfigurationError
from balancer.store import connection, embedded, keys, scripts
from balancer.store.views import PoolView, read_pool

POOL = "default"
ACCOUNTS = ("anna", "boris", "chen")
LEASE_S = 3.0
_KEEP = 10_000_000
_START_S = 30.0
_SETTLE_S = LEASE_S + 12.0
_REQUEST_S = 60.0


class DemoRule(msgspec.Struct, frozen=True, kw_only=True):
    """One rule of the demo, and how it is asked."""

    model: str
    scenario: str
    tactic: dict[str, Any]
    weights: tuple[int, ...] = (1, 1, 1)

    @property
    def uuid(self) -> str:
        """The rule's uuid."""
        return f"{self.scenario}/{self.model}"

    @property
    def services(self) -> tuple[str, ...]:
        """The ids of its services."""
        return tuple(f"{name}-{self.scenario}:{self.model}" for name in ACCOUNTS)


RULES = (
    DemoRule(model="in-turn", scenario="openai", tactic={"type": "round_robin", "params": {"request_threshold": 5}}),
    DemoRule(model="by-tokens", scenario="openai", tactic={"type": "token_based", "params": {"token_threshold": 3000}}),
    DemoRule(
        model="by-both",
        scenario="anthropic",
        tactic={"type": "hybrid", "params": {"request_threshold": 40, "token_threshold": 4000}},
    ),
    DemoRule(model="by-weight", scenario="openai", tactic={"type": "random"}, weights=(5, 3, 2)),
)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """How one request ended for its client."""

    request_id: str
    decision: str
    is_whole: bool
    status: int = 0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What the proof found."""

    table: Table
    problems: tuple[str, ...]


def run(options: argparse.Namespace) -> int:
    """Runs the demo; 0 only if everything agrees."""
    if options.requests < 400 or options.workers < 2 or options.concurrency < 8:
        raise ConfigurationError("the demo needs at least 400 requests, 2 workers and 8 requests at once")
    with tempfile.TemporaryDirectory(prefix="balancer-demo-") as folder, contextlib.suppress(KeyboardInterrupt):
        return asyncio.run(_Demo(options, Path(folder)).run())
    return 130


class _Demo:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options = options
        self._folder = folder
        # Where the output is no terminal, rich would take 80 columns and cut words.
        self._console = Console() if sys.stdout.isatty() else Console(width=110)
        self._answers: list[Answer] = []
        self._url = ""
        self._notes: list[str] = []

    async def run(self) -> int:
        """Starts everything, sends, kills, checks."""
        say = self._console.print
        async with contextlib.AsyncExitStack() as stack:
            accounts = [await stack.enter_async_context(_account(name)) for name in ACCOUNTS]
            say(f"three fake accounts: {', '.join(accounts)}")
            held = stack.enter_context(embedded.acquire(self._folder / "data"))
            say(f"the embedded store (a real Valkey): process {held.server_pid}")
            self._url = await stack.enter_async_context(self._gateway(accounts))
            say(f"{self._options.workers} workers behind {self._url}")
            client = connection.client(held.url)
            stack.push_async_callback(client.aclose)
            if self._options.sabotage:
                say("[bold red]with a wrong script: round_robin stays one request too long[/]")
            await self._load(client)
            await self._wait_until_settled(client)
            outcome = await self._prove(client, accounts)
            say("")
            say(outcome.table)
            for problem in outcome.problems[:10]:
                say(f"[red]✗ {problem}[/]")
            if outcome.problems:
                say(f"[bold red]{len(outcome.problems)} disagreement{'s' if len(outcome.problems) > 1 else ''}[/]")
            else:
                say("[bold green]Everything agrees: every pick, every counter, every token.[/]")
            if self._options.keep:
                await self._keep()
            return 1 if outcome.problems else 0

    # -- the parts -----------------------------------------------------------------------------------------------------

    def _configuration(self, accounts: list[str]) -> dict[str, Any]:
        providers = [
            {"name": f"{name}-{style}", "api_base": url, "api_style": style, "token": f"demo-key-of-{name}"}
            for name, url in zip(ACCOUNTS, accounts, strict=True)
            for style in ("openai", "anthropic")
        ]
        rules = [
            {
                "scenario": rule.scenario,
                "request_model": rule.model,
                "lb_tactic": rule.tactic,
                "on_store_loss": "closed",  # What a worker picks alone cannot be proven.
                "services": [
                    {"provider": f"{name}-{rule.scenario}", "model": rule.model, "weight": weight}
                    for name, weight in zip(ACCOUNTS, rule.weights, strict=True)
                ],
            }
            for rule in RULES
        ]
        return {
            "providers": providers,
            "rules": rules,
            "pools": [{"name": POOL, "record": "full", "record_events": _KEEP}],
        }

    @contextlib.asynccontextmanager
    async def _gateway(self, accounts: list[str]) -> AsyncIterator[str]:
        """The URL of `balancer serve`, started as a user would."""
        file = self._folder / "balancer.json"
        file.write_bytes(msgspec.json.encode(self._configuration(accounts)))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER_")}
        environment["BALANCER_LEASE_S"] = str(LEASE_S)
        if self._options.sabotage:
            environment["BALANCER_SCRIPTS_DIR"] = str(self._wrong_scripts())
        log = self._folder / "serve.log"
        command = [sys.executable, "-m", "balancer", "serve", "--config", str(file), "--port", "0"]
        command += ["--workers", str(self._options.workers), "--data-dir", str(self._folder / "data")]
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *command, env=environment, stderr=stderr, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
            )
        try:
            yield await _serving_url(process, log)
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()

    def _wrong_scripts(self) -> Path:
        """A copy of the scripts in which round_robin compares with <= instead of <."""
        folder = self._folder / "lua"
        shutil.copytree(scripts.folder(), folder)
        file = folder / "include" / "tactic" / "round_robin.lua"
        right = "turn.streak < turn.params.request_threshold"
        source = file.read_text(encoding="utf-8")
        if right not in source:
            raise BalancerError("the script to break is not what the demo expects")
        file.write_text(source.replace(right, right.replace("<", "<=")), encoding="utf-8")
        return folder

    # -- load ----------------------------------------------------------------------------------------------------------

    async def _load(self, client: Any) -> None:
        """Sends the requests, kills a worker half-way, and shows what happens."""
        numbers = iter(range(self._options.requests))
        half = asyncio.Event()
        timeout = aiohttp.ClientTimeout(total=_REQUEST_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            pids = await self._worker_pids(session)

            async def send_some() -> None:
                for number in numbers:
                    self._answers.append(await self._send(session, number))
                    if len(self._answers) >= self._options.requests // 2:
                        half.set()

            async def kill_one() -> None:
                await half.wait()
                os.kill(pids[0], signal.SIGKILL)
                self._notes.append(f"worker process {pids[0]} killed with -9 after {len(self._answers)} requests")

            with Live(console=self._console, refresh_per_second=4) as live:
                showing = asyncio.create_task(self._show(client, live))
                await asyncio.gather(kill_one(), *(send_some() for _ in range(self._options.concurrency)))
                showing.cancel()
                await asyncio.gather(showing, return_exceptions=True)
                live.update(await self._picture(client))

    async def _worker_pids(self, session: aiohttp.ClientSession) -> list[int]:
        """The processes of all workers: each new connection may reach another one."""
        pids: set[int] = set()
        for _ in range(500):
            async with session.get(f"{self._url}/readyz", headers={"Connection": "close"}) as response:
                state = await response.json()
                if state["ready"]:
                    pids.add(state["pid"])
            if len(pids) == self._options.workers:
                return sorted(pids)
        raise BalancerError(f"only {len(pids)} of {self._options.workers} workers answer")

    async def _send(self, session: aiohttp.ClientSession, number: int) -> Answer:
        rule = RULES[number % len(RULES)]
        is_stream = number // len(RULES) % 3 == 0
        request_id = f"demo-{number}"
        text = "tell me about fleets " * (1 + number % 7)
        body: dict[str, Any] = {
            "model": rule.model,
            "max_tokens": 60,
            "stream": is_stream,
            "messages": [{"role": "user", "content": text}],
        }
        path = "/v1/messages" if rule.scenario == "anthropic" else "/v1/chat/completions"
        decision = ""
        try:
            async with session.post(self._url + path, json=body, headers={"x-request-id": request_id}) as response:
                decision = response.headers.get("x-balancer-decision", "")
                text = await response.text()
                ends = "message_stop" in text if rule.scenario == "anthropic" else "[DONE]" in text
                is_whole = response.status == 200 and (ends or not is_stream)
                return Answer(request_id=request_id, decision=decision, is_whole=is_whole, status=response.status)
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            return Answer(request_id=request_id, decision=decision, is_whole=False)

    async def _show(self, client: Any, live: Live) -> None:
        while True:
            live.update(await self._picture(client))
            await asyncio.sleep(0.25)

    async def _picture(self, client: Any) -> Table:
        view = await _view(client)
        done = len(self._answers)
        broken = sum(not answer.is_whole for answer in self._answers)
        table = Table(
            title=f"{done} of {self._options.requests} requests answered, {broken} broken",
            caption="\n".join(self._notes) or None,
        )
        for column in ("rule", "tactic", "picks", *ACCOUNTS, "current", "streak", "in flight", "tokens"):
            table.add_column(column, justify="left" if column in ("rule", "tactic", "current") else "right")
        for rule in RULES:
            states = [view.services.get(service) for service in rule.services]
            partition = view.partitions.get(keys.partition(rule.uuid))
            table.add_row(
                rule.model,
                rule.tactic["type"],
                str(view.rules[rule.uuid].seq if rule.uuid in view.rules else 0),
                *(str(state.picks if state else 0) for state in states),
                partition.cursor.partition("-")[0] if partition else "",
                str(partition.streak if partition else 0),
                str(sum(state.in_flight for state in states if state)),
                str(sum(state.input + state.output for state in states if state)),
            )
        return table

    # -- proof ---------------------------------------------------------------------------------------------------------

    async def _wait_until_settled(self, client: Any) -> None:
        """Returns when nothing is in flight: the killed worker's lease has ended, and its attempts are reaped."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _SETTLE_S
        with self._console.status(f"waiting for the killed worker's lease ({LEASE_S:g} s) to end"):
            while loop.time() < deadline:
                view = await _view(client)
                if not any(state.in_flight for state in view.services.values()):
                    return
                await asyncio.sleep(0.1)

    async def _prove(self, client: Any, accounts: list[str]) -> Outcome:
        with self._console.status("replaying the history against the reference"):
            events = [
                {k.decode(): v.decode() for k, v in fields.items()}
                for _, fields in await client.xrange(keys.decisions(POOL))
            ]
            verdict = await asyncio.to_thread(audit.check, events)
        view, ledger = await _view(client), await _ledgers(accounts)
        problems = [str(violation) for violation in verdict.violations]
        if verdict.picks == 0:
            problems.append("no history was recorded")
        problems += [
            f"{name}: {state.in_flight} in flight and {state.reserved} tokens reserved, long after the end"
            for name, state in view.services.items()
            if state.in_flight or state.reserved
        ]
        refused = [a for a in self._answers if not a.is_whole and a.status not in (0, 200)]
        problems += [f"request {a.request_id} was answered with {a.status}" for a in refused]
        lost = sum(state.lost for state in view.services.values())
        broken = [a for a in self._answers if not a.is_whole]
        if lost > len(broken):
            problems.append(f"{lost} attempts were lost, but only {len(broken)} connections broke")
        unseen = _attempts_without_a_settle(events, self._answers, ledger)
        table = Table(title="proof", caption="\n".join((*self._notes, f"{len(broken)} connections broke, {lost} lost")))
        for column in ("rule", "picks", "replayed", "switches", "workers", "settled", "lost", "tokens = accounts'"):
            table.add_column(column, justify="left" if column == "rule" else "right")
        table.add_column("verdict")
        picks = [event for event in events if event["event"] == "pick"]
        for rule in RULES:
            mine = [event for event in picks if event["rule"] == rule.uuid]
            states = [view.services[service] for service in rule.services if service in view.services]
            here = sum(state.input + state.output for state in states)
            there = ledger.models.get(rule.model, Count())
            lost_there = unseen.get(rule.model, Count())
            expected = there.input + there.output - lost_there.input - lost_there.output
            requests = sum(state.requests - state.lost for state in states)
            found = _rule_problems(rule, mine, here, expected, requests, there.requests - lost_there.requests)
            problems += found
            wrong = bool(found) or any(rule.uuid in str(violation) for violation in verdict.violations)
            table.add_row(
                rule.model,
                str(len(mine)),
                str(verdict.picks_by_rule.get(rule.uuid, 0)),
                str(sum(e["cursor"] != f["cursor"] for e, f in itertools.pairwise(mine))),
                str(len({event["worker"] for event in mine})),
                str(requests),
                str(sum(state.lost for state in states)),
                f"{here} {'=' if here == expected else '≠'} {expected}",
                "[red]wrong[/]" if wrong else "[green]exact[/]",
            )
        return Outcome(table=table, problems=tuple(problems))

    async def _keep(self) -> None:
        self._console.print(
            f"\nStill running; Ctrl-C ends it. Metrics: {self._url}/metrics  readiness: {self._url}/readyz"
        )
        body = '{"model": "in-turn", "messages": [{"role": "user", "content": "hello"}]}'
        self._console.print(
            f"curl -i {self._url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
        await asyncio.Event().wait()


def _rule_problems(
    rule: DemoRule, picks: list[dict[str, str]], here: int, there: int, requests: int, seen: int
) -> list[str]:
    problems = []
    if not picks:
        problems.append(f"{rule.uuid}: nothing was picked")
    if len({event["worker"] for event in picks}) < 2:
        problems.append(f"{rule.uuid}: fewer than two workers picked")
    if [int(event["seq"]) for event in picks] != list(range(1, len(picks) + 1)):
        problems.append(f"{rule.uuid}: a pick is missing in its sequence")
    if here != there:
        problems.append(f"{rule.uuid}: {here} tokens counted, the accounts reported {there}")
    if requests != seen:
        problems.append(f"{rule.uuid}: {requests} attempts settled, the accounts saw {seen}")
    return problems


def _attempts_without_a_settle(events: list[dict[str, str]], answers: list[Answer], ledger: Ledger) -> dict[str, Count]:
    """What the accounts did for attempts that their worker could not settle any more, by model.

    A broken request whose decision its client knows is looked up. Where the client saw not even the headers, the
    attempt may have been settled all the same: then some settle that belongs to no known request has just its usage.
    """
    picks = {(e["worker"], e["number"]): e for e in events if e["event"] == "pick"}
    settled: dict[str, dict[str, str]] = {}
    for event in events:
        pick = picks.get((event.get("worker", ""), event.get("number", "")))
        if event["event"] == "settle" and pick:
            settled[f"{POOL}.{pick['epoch']}.{pick['position']}"] = event
    known = {answer.decision for answer in answers if answer.decision}
    orphans = Counter(
        (event["service"].partition(":")[2], int(event["input"]), int(event["output"]))
        for decision, event in settled.items()
        if decision not in known
    )
    models = {f"demo-{number}": RULES[number % len(RULES)].model for number in range(len(answers))}
    unseen: dict[str, Count] = defaultdict(Count)
    for answer in answers:
        count = ledger.requests.get(answer.request_id)
        if answer.is_whole or count is None or answer.decision in settled:
            continue
        model = models[answer.request_id]
        key = (model, count.input, count.output)
        if not answer.decision and orphans[key]:
            orphans[key] -= 1
            continue
        total = unseen[model]
        total.requests += count.requests
        total.input += count.input
        total.output += count.output
    return unseen


@contextlib.asynccontextmanager
async def _account(name: str) -> AsyncIterator[str]:
    """The URL of a fake account in a process of its own, which ends with us."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "balancer.cli.accounts", "--name", name, "--key", f"demo-key-of-{name}"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(_START_S):
            url = (await process.stdout.readline()).decode().strip()
        if not url:
            raise BalancerError(f"the fake account {name} did not start")
        yield url
    finally:
        process.stdin.close()
        await process.wait()


async def _serving_url(process: asyncio.subprocess.Process, log: Path) -> str:
    """Where the gateway listens, from its log."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _START_S
    while loop.time() < deadline and process.returncode is None:
        for line in (await asyncio.to_thread(log.read_bytes)).splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                entry = msgspec.json.decode(line)
                if entry.get("event") == "serving":
                    return str(entry["url"])
        await asyncio.sleep(0.05)
    end = (await asyncio.to_thread(log.read_bytes))[-2000:].decode("utf-8", "replace")
    raise BalancerError(f"the gateway did not start:\n{end}")


async def _ledgers(accounts: list[str]) -> Ledger:
    """The books of all accounts, added up."""
    total = Ledger()
    async with aiohttp.ClientSession() as session:
        for url in accounts:
            async with session.get(f"{url}/__ledger") as response:
                ledger = msgspec.json.decode(await response.read(), type=Ledger)
            for book, other in ((total.models, ledger.models), (total.requests, ledger.requests)):
                for key, count in other.items():
                    sum_ = book.setdefault(key, Count())
                    sum_.requests += count.requests
                    sum_.input += count.input
                    sum_.output += count.output
                    sum_.cut += count.cut
    return total


async def _view(client: Any) -> PoolView:
    partitions = await client.hgetall(keys.partitions(POOL))
    services = await client.hgetall(keys.services(POOL))
    return read_pool(POOL, partitions, services, now_ms=0)
