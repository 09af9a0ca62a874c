"""Asks a pool's providers for their health, as often as they say, and notes the answers on their breakers.

One prober in the fleet at a time has the pool. It opens the breaker of a provider that does not answer before any
request meets it, and closes an open one without risking a request. Two at once, for a moment after one was away, do
no harm: what they note is true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec

from balancer import log
from balancer.domain import Configuration, Provider
from balancer.errors import BalancerError, StoreUnavailableError
from balancer.store import keys

Probe = Callable[[Provider], Awaitable[bool]]
"""Asks a provider once: True when it answers as one that is well. Raises BalancerError when it cannot be asked."""

_LEASE_MS = 10_000
_CLAIM_S = 3.0
_TICK_S = 1.0


class Pool(Protocol):
    """A pool, as far as a prober needs it."""

    pool: str

    async def command(self, *command: str | int) -> Any:
        """The reply to one command. Raises StoreUnavailableError."""

    async def health(self, services: Sequence[str], is_alive: bool) -> None:
        """Notes whether services are alive. Raises StoreUnavailableError."""


class Probed(msgspec.Struct, frozen=True, kw_only=True):
    """A provider that is asked, and its services in the pool."""

    provider: Provider
    services: tuple[str, ...]


def plans(configuration: Configuration) -> dict[str, list[Probed]]:
    """For each pool the providers of its active services that are to be asked; pools without one are left out.

    Looks at all rules, unless no provider is to be asked: once for a configuration, not whenever somebody asks.
    """
    asked = {
        provider.uuid: provider
        for provider in configuration.providers
        if provider.enabled and provider.health.interval_s > 0
    }
    served: dict[str, dict[str, list[str]]] = {}
    for rule in configuration.rules if asked else ():
        if rule.active:
            for service in rule.active_services():
                if service.provider in asked:
                    served.setdefault(rule.pool, {}).setdefault(service.provider, []).append(service.id)
    return {
        pool: [
            Probed(provider=provider, services=tuple(dict.fromkeys(services[uuid])))
            for uuid, provider in asked.items()
            if uuid in services
        ]
        for pool, services in served.items()
    }


class Prober:
    """Asks as long as it runs; `plan` says whom."""

    def __init__(self, pool: Pool, worker: str, plan: Callable[[], Sequence[Probed]], probe: Probe) -> None:
        self._pool = pool
        self._worker = worker
        self._plan = plan
        self._probe = probe
        self._is_ours = False
        self._claim_at = float("-inf")
        self._due: dict[str, float] = {}
        self._is_alive: dict[str, bool] = {}
        self._faults: dict[str, str] = {}
        self._asking: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Asks each provider once an interval while nobody else does, until cancelled."""
        now = asyncio.get_running_loop().time
        try:
            while True:
                plan = {each.provider.uuid: each for each in self._plan()}
                if plan and await self._has_the_pool(now()):
                    self._ask_those_due(plan, now())
                    await asyncio.sleep(max(0.0, min(_TICK_S, *(at - now() for at in self._due.values()))))
                else:
                    self._due.clear()
                    await asyncio.sleep(_TICK_S)
        finally:
            asking = list(self._asking.values())
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _has_the_pool(self, now: float) -> bool:
        """Takes the pool, or keeps it; looks every few seconds only."""
        if now < self._claim_at:
            return self._is_ours
        self._claim_at = now + _CLAIM_S
        self._is_ours = False
        key = keys.prober(self._pool.pool)
        try:
            if await self._pool.command("SET", key, self._worker, "NX", "PX", _LEASE_MS):
                self._is_ours = True
            elif await self._pool.command("GET", key) == self._worker.encode():
                self._is_ours = bool(await self._pool.command("PEXPIRE", key, _LEASE_MS))
        except StoreUnavailableError as exc:
            self._claim_at = now
            log.debug("cannot tell who asks for health", pool=self._pool.pool, reason=exc.message)
        return self._is_ours

    def _ask_those_due(self, plan: dict[str, Probed], now: float) -> None:
        self._due = {uuid: self._due.get(uuid, now) for uuid in plan}
        for uuid, each in plan.items():
            if self._due[uuid] > now:
                continue
            self._due[uuid] = now + each.provider.health.interval_s
            if uuid not in self._asking:
                task = self._asking[uuid] = asyncio.create_task(self._ask(each))
                task.add_done_callback(lambda _, uuid=uuid: self._asking.pop(uuid))  # type: ignore[misc]

    async def _ask(self, each: Probed) -> None:
        provider = each.provider
        limit_s = min(provider.health.interval_s, provider.timeouts.headers_s)
        try:
            try:
                async with asyncio.timeout(limit_s):
                    is_alive = await self._probe(provider)
            except TimeoutError:
                is_alive = False
            self._tell(provider, is_alive)
            await self._pool.health(each.services, is_alive)
        except StoreUnavailableError as exc:
            log.debug("cannot note a provider's health", pool=self._pool.pool, reason=exc.message)
        except BalancerError as exc:
            if self._faults.get(provider.uuid) != exc.message:  # Once, not once an interval.
                self._faults[provider.uuid] = exc.message
                log.warning("a provider cannot be asked for its health", provider=provider.name, reason=exc.message)
        except Exception as exc:  # noqa: BLE001 - a task's root: the next interval asks again.
            log.error("asking a provider for its health broke", exc=exc, provider=provider.name)

    def _tell(self, provider: Provider, is_alive: bool) -> None:
        if self._is_alive.get(provider.uuid, True) != is_alive:
            if is_alive:
                log.info("a provider answers its health probe again", provider=provider.name)
            else:
                log.warning("a provider does not answer its health probe", provider=provider.name)
        self._is_alive[provider.uuid] = is_alive
