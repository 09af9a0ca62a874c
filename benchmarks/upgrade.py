"""Two versions at once: `python -m benchmarks.upgrade OLD [--seconds N] [--rate N]`, OLD being a revision of git.

Two gateways of two workers each stand behind haproxy over one Redis, under load. They are replaced one after the other,
first old ones by new, then back; while both versions serve, each publishes a configuration. Then each version finds
what the other one, killed with Redis away, has left in the outbox. 0 only if no request failed, every attempt and token
is counted once, and `audit`, of both versions, finds every pick and counter as the reference model has them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import redis
import yaml

from balancer.cli.accounts import FakeAccount
from balancer.store import keys
from balancer.store.views import PoolView, read_pool
from benchmarks.chaos.client import Clients, End
from benchmarks.chaos.load import Asked, Load
from benchmarks.chaos.processes import Serve, haproxy
from tests import topologies

ROOT = Path(__file__).resolve().parent.parent
NEW = "new"
RULES = (Asked("chat", "openai", 3), Asked("claude", "anthropic", 2), Asked("tokens", "openai", 2))
TACTICS: dict[str, dict[str, Any]] = {
    "chat": {"type": "round_robin", "params": {"request_threshold": 3}},
    "claude": {"type": "hybrid", "params": {"request_threshold": 10, "token_threshold": 5000}},
    "tokens": {"type": "token_based", "params": {"token_threshold": 3000}},
}
STYLES = ("openai", "anthropic")
PORTS = 2
_LEASE_S = 3.0
_DRAIN_S = 3.0
_DEADLINE_MS = 2000
"""Versions are on trial here, and not how busy the machine is."""
_START_S = 20.0
_DEGRADED_REQUESTS = 40
_MOST_DEGRADED = 0.01


class _FaultError(Exception):
    """Something is not as it should be."""


class Version:
    """The code of one version, and how its commands are run."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.variables = {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}

    @staticmethod
    def of(revision: str, folder: Path) -> Version:
        """A revision of git, taken out into the folder."""
        name = _git("rev-parse", "--short", revision).decode().strip()
        with tarfile.open(fileobj=io.BytesIO(_git("archive", revision, "balancer", "lua"))) as archive:
            archive.extractall(folder, filter="data")
        return Version(name, folder)


def _git(*arguments: str) -> bytes:
    """What a command of git prints."""
    program = shutil.which("git")
    if program is None:
        raise SystemExit("git is not installed: the other version is a revision of it")
    return subprocess.run([program, *arguments], cwd=ROOT, check=True, capture_output=True).stdout


class Trial:
    """One run: a store, accounts, and two gateways of either version."""

    def __init__(self, versions: dict[str, Version], folder: Path, seconds: float, rate: float) -> None:
        self._versions = versions
        self._folder = folder
        self._seconds = seconds
        self._rate = rate
        self._url = ""
        self._accounts: list[FakeAccount] = []
        self._gateways: list[tuple[str, Serve]] = []
        self._numbers = 0
        self._environment: dict[str, str] = {}

    async def run(self) -> None:
        """Returns if all is as it should be. Raises _FaultError."""
        async with contextlib.AsyncExitStack() as stack:
            group = stack.enter_context(topologies.Group())
            server = group.add("valkey-9", "--save", "", "--appendonly", "yes", "--appendfsync", "no")
            self._url = f"redis://{server.address}"
            names = {"anna": "key-of-anna-0123", "boris": "key-of-boris-0123"}
            for name, key in names.items():
                self._accounts.append(await stack.enter_async_context(FakeAccount(name, key)))
            clean = {name: value for name, value in os.environ.items() if not name.startswith("BALANCER_")}
            self._environment = (
                clean
                | names
                | {
                    "BALANCER_REDIS": self._url,
                    "BALANCER_LEASE_S": str(_LEASE_S),
                    "BALANCER_DRAIN_DELAY_S": str(_DRAIN_S),
                    "BALANCER_REDIS_DEADLINE_MS": str(_DEADLINE_MS),
                    "BALANCER_ADMIN_PORT": "0",
                    "BALANCER_LOG_LEVEL": "info",
                }
            )
            stack.push_async_callback(self._stop_all)
            for version in self._versions.values():
                await self._is_itself(version)
            await self._roll()
            for first, second in ((self._old, NEW), (NEW, self._old)):
                await self._inherit(server, first, second)

    @property
    def _old(self) -> str:
        return next(name for name in self._versions if name != NEW)

    # -- replacing gateways under load ---------------------------------------------------------------------------------

    async def _roll(self) -> None:
        ports = topologies.free_ports(PORTS)
        for port in ports:
            self._gateways.append((self._old, await self._start(self._old, port)))
        async with haproxy(self._folder, ports, asks_readiness=True) as port:
            load = Load(random.Random(7), Clients([port]), RULES, self._rate, "upgrade")
            load.start()
            await asyncio.sleep(self._seconds)
            threshold = 3
            for version in (NEW, NEW, self._old, self._old):
                index = next(i for i, (name, _) in enumerate(self._gateways) if name != version)
                await self._replace(index, version, ports[index])
                serving = " and ".join(name for name, _ in self._gateways)
                print(f"serving: {serving}", flush=True)
                for publisher in self._versions:
                    threshold += 1
                    await self._command(publisher, "apply", self._write(threshold))
                    await asyncio.sleep(self._seconds / 2)
            await load.stop()
        failed = [answer for answer in load.answers if answer.end is not End.WHOLE]
        for answer in failed[:10]:
            print(f"  {answer.ask.request_id}: {answer.end}, {answer.status} {answer.code} {answer.message}")
        degraded = sum(bool(answer.degraded) for answer in load.answers)
        print(f"requests: {len(load.answers)}, failed: {len(failed)}, without the store: {degraded}")
        await self._check("after replacing all, there and back")
        # A machine that is busy keeps a selection waiting beyond its deadline now and then.
        if failed or load.unasked or degraded > len(load.answers) * _MOST_DEGRADED:
            raise _FaultError(f"{len(failed)} failed, {load.unasked} not asked, {degraded} without the store")
        await self._stop_all()

    async def _replace(self, index: int, version: str, port: int) -> None:
        _, gateway = self._gateways[index]
        if status := await gateway.stop():
            raise _FaultError(f"a gateway ended with {status}: {gateway.log}")
        self._gateways[index] = (version, await self._start(version, port))
        await asyncio.sleep(1)  # Until the balancer's health check has seen it.

    # -- what one leaves to the other ----------------------------------------------------------------------------------

    async def _inherit(self, server: Any, first: str, second: str) -> None:
        """One version is killed with settles that Redis never had; the other one finds them in the outbox."""
        self._numbers += 1
        variables = {"BALANCER_OUTBOX_DIR": str(self._folder / f"outbox-{self._numbers}")}
        gateway = await self._start(first, 0, variables)
        self._gateways.append((first, gateway))
        await self._ask(gateway.port, 5)
        server.kill()
        await self._ask(gateway.port, _DEGRADED_REQUESTS)
        await asyncio.sleep(1)  # What Redis does not acknowledge is written within some 0.1 s.
        os.killpg(gateway.process.pid, signal.SIGKILL)
        await gateway.process.wait()
        self._gateways.pop()
        if not server.start():
            raise _FaultError("the store does not start again")
        heir = await self._start(second, 0, variables)
        self._gateways.append((second, heir))
        await self._ask(heir.port, 5)
        await self._check(f"{second} after {first} was killed with Redis away")
        await self._stop_all()

    async def _ask(self, port: int, count: int) -> None:
        async with aiohttp.ClientSession() as session:
            for number in range(count):
                body = {"model": "chat", "max_tokens": 40, "messages": [{"role": "user", "content": f"text {number}"}]}
                async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as response:
                    if response.status != 200:
                        raise _FaultError(f"a request got {response.status}: {await response.text()}")

    # -- processes -----------------------------------------------------------------------------------------------------

    async def _start(self, version: str, port: int, variables: dict[str, str] | None = None) -> Serve:
        self._numbers += 1
        log = self._folder / f"serve-{self._numbers}.log"
        arguments = ["--workers", "2", "--port", str(port), "--config", self._write(3)]
        known = self._environment | self._versions[version].variables | (variables or {})
        # What begins with BALANCER_ is left out of the environment there, and stands in the variables.
        return await Serve.start(log, arguments, known)

    async def _stop_all(self) -> None:
        while self._gateways:
            _, gateway = self._gateways.pop()
            status = await gateway.stop()
            text = gateway.log.read_text(encoding="utf-8", errors="replace")
            if status or '"traceback"' in text:
                print(text[-3000:])
                raise _FaultError(f"a gateway ended with {status}, or logged a traceback")

    async def _command(self, version: str, *arguments: str) -> str:
        """What a command of that version printed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "balancer", *arguments),
            env=self._environment | self._versions[version].variables,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        text = out.decode()
        if process.returncode:
            raise _FaultError(f"{version}: balancer {' '.join(arguments)} ended with {process.returncode}:\n{text}")
        return text

    async def _is_itself(self, version: Version) -> None:
        """Raises _FaultError where that version's commands would run other code, and the trial would prove nothing."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", "import balancer; print(balancer.__file__)"),
            env=self._environment | version.variables,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        if not out.decode().startswith(version.variables["PYTHONPATH"]):
            raise _FaultError(f"{version.name} would run {out.decode().strip()}")

    def _write(self, threshold: int) -> str:
        """A file with the configuration, in which one number varies."""
        providers = [
            {
                "name": f"{account.name}-{style}",
                "api_base": account.url,
                "api_style": style,
                "token": f"${{{account.name}}}",
                "limits": {"rpm": 1_000_000, "tpm": 1_000_000_000, "in_flight": 10_000},
            }
            for account in self._accounts
            for style in STYLES
        ]
        rules = [
            {
                "uuid": asked.rule,
                "scenario": asked.style,
                "request_model": asked.rule,
                "lb_tactic": TACTICS[asked.rule],
                "services": [
                    {"provider": f"{account.name}-{asked.style}", "model": f"{asked.style}-m"}
                    for account in self._accounts
                ],
            }
            for asked in RULES
        ]
        rules[0]["lb_tactic"] = {"type": "round_robin", "params": {"request_threshold": threshold}}
        pools = [{"name": "default", "record": "full", "record_events": 10_000_000}]
        file = self._folder / f"balancer-{threshold}.yaml"
        file.write_text(yaml.safe_dump({"providers": providers, "rules": rules, "pools": pools}), encoding="utf-8")
        return str(file)

    # -- the reckoning -------------------------------------------------------------------------------------------------

    async def _check(self, when: str) -> None:
        """Raises _FaultError unless the books agree and both versions' audits find nothing."""
        view = await self._idle()
        ours = {name: (s.requests, s.input, s.output) for name, s in view.services.items() if s.requests}
        theirs = {
            f"{account.name}-{style}:{style}-m": (count.requests, count.input, count.output)
            for account in self._accounts
            for style in STYLES
            if (count := account.ledger.models.get(f"{style}-m"))
        }
        lost = sum(state.lost for state in view.services.values())
        print(f"{when}: {sum(n for n, _, _ in ours.values())} attempts counted, {lost} lost, epoch {view.epoch}")
        if ours != theirs or lost:
            raise _FaultError(f"{when}: counted {ours}, the accounts' books say {theirs}, {lost} lost")
        for version in self._versions:
            print(f"  audit by {version}: {(await self._command(version, 'audit')).strip()}", flush=True)

    async def _idle(self) -> PoolView:
        """The pool once nothing is in flight, and every settle has come."""
        deadline = time.monotonic() + _START_S
        seen = sum(count.requests for account in self._accounts for count in account.ledger.models.values())
        with redis.Redis.from_url(self._url) as client:
            while True:
                partitions: Any = client.hgetall(keys.partitions("default"))
                services: Any = client.hgetall(keys.services("default"))
                view = read_pool("default", partitions, services, now_ms=0)
                busy = any(state.in_flight or state.reserved for state in view.services.values())
                counted = sum(state.requests for state in view.services.values())
                if (not busy and counted >= seen) or time.monotonic() > deadline:
                    return view
                await asyncio.sleep(0.1)


async def main(options: argparse.Namespace) -> int:
    """Runs it; 0 if all is as it should be."""
    async with _folder() as folder:
        old = await asyncio.to_thread(Version.of, options.old, folder / "old")
        trial = Trial({old.name: old, NEW: Version(NEW, ROOT)}, folder, options.seconds, options.rate)
        try:
            await trial.run()
        except _FaultError as exc:
            print(f"{exc}\n{old.name} and this version: FALLS")
            return 1
        print(f"{old.name} and this version serve together: STANDS")
        return 0


@contextlib.asynccontextmanager
async def _folder() -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(prefix="upgrade-") as name:
        yield Path(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", help="the other version: a revision of git")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each pair of versions serves")
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second")
    sys.exit(asyncio.run(main(parser.parse_args())))
