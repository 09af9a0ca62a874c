"""One attempt at one service: what it used, and that it is settled exactly once, however it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from balancer import log
from balancer.details import Details
from balancer.domain import Outcome, Pick, Provider, Rule, Usage
from balancer.metrics import Metrics
from balancer.store.pool import Asked


class Balance(Protocol):
    """The shared choice and counters, as far as attempts need them."""

    async def select(
        self,
        rule: Rule,
        *,
        reserved: int,
        deadline_ms: int,
        excluded: tuple[str, ...] = (),
        session: str = "",
        only: str = "",
        begun: Asked | None = None,
        variant: Callable[[Rule], Rule] | None = None,
        barred: tuple[str, ...] = (),
    ) -> tuple[Pick, Rule]:
        """The pick, and the rule as it stood at the pick; `begun` was asked already, and has brought none."""

    def settle(
        self,
        pick: Pick,
        outcome: Outcome,
        usage: Usage | None,
        *,
        cooldown_ms: int = 0,
        first_token_us: int = 0,
        stream_us: int = 0,
    ) -> None:
        """Queues the end of an attempt."""

    async def flushed(self, pool: str) -> None:
        """Returns once everything settled before is written to Redis' socket."""

    async def settled(self, pick: Pick) -> None:
        """Returns once everything settled before is applied, or the deadline has passed."""

    async def remember(self, pick: Pick, response_id: str) -> None:
        """Keeps which service has a response; returns once every worker can look it up.

        Raises StoreUnavailableError.
        """


class Secrets(Protocol):
    """The credentials of providers."""

    def access_token(self, provider: Provider) -> str:
        """The credential to send, empty for none."""

    def headers(self, provider: Provider) -> dict[str, str]:
        """The provider's own headers."""

    def query(self, provider: Provider) -> dict[str, str]:
        """The provider's own query parameters."""

    def proxy_url(self, provider: Provider) -> str:
        """The proxy to go through, empty for none."""


class Providers(Secrets, Protocol):
    """Providers by uuid, and their credentials."""

    def provider(self, uuid: str) -> Provider | None:
        """The provider of that uuid."""


class Attempt:
    """What one attempt has used so far, and whether it is settled."""

    # What is told of it, where that is told.
    trace_id = ""
    """Empty where its span is not kept."""
    span_id = 0
    status = 0
    """Of the upstream's answer, 0 without one."""
    fault = ""
    """The code of an error of ours."""
    cooldown_ms = 0
    duration_s = 0.0
    api = ""
    """What its service was asked in, where that is not its client's API."""
    details: Details | None = None
    """Listens to what the answer says of itself."""

    def __init__(self, balance: Balance, metrics: Metrics, rule: Rule, pick: Pick) -> None:
        self.rule = rule
        self.pick = pick
        self.usage: Usage | None = None
        self.outcome: Outcome | None = None
        self.is_stream = False
        self._balance = balance
        self._metrics = metrics
        self._started = time.monotonic()
        self._first_token: float | None = None

    def settle(self, outcome: Outcome, cooldown_ms: int = 0) -> None:
        """Settles the attempt with the usage known by now; only the first call counts."""
        if self.outcome is None:
            self.cooldown_ms = cooldown_ms
            self.duration_s = duration_s = self.end(outcome, cooldown_ms)
            self._metrics.settled(self.pick, outcome, self.usage, duration_s, self.trace_id)

    def end(self, outcome: Outcome, cooldown_ms: int = 0) -> float:
        """Settles the attempt, which was not, for somebody who counts it for the metrics; how long it took."""
        self.outcome = outcome
        now = time.monotonic()
        first_token_us = stream_us = 0
        if outcome is Outcome.SUCCESS and self._first_token is not None:
            first_token_us = _us(self._first_token - self._started)
            stream_us = _us(now - self._first_token)
        elif outcome is Outcome.SUCCESS and not self.is_stream:
            stream_us = _us(now - self._started)
        self._balance.settle(
            self.pick,
            outcome,
            self.usage,
            cooldown_ms=cooldown_ms,
            first_token_us=first_token_us,
            stream_us=stream_us,
        )
        return now - self._started

    @property
    def started(self) -> float:
        """When it began, of the monotonic clock."""
        return self._started

    @property
    def first_token_s(self) -> float:
        """Seconds from its begin to the first token, 0 for none."""
        return self._first_token - self._started if self._first_token is not None else 0.0

    def log(self, request_id: str) -> None:
        """Writes for somebody who looks for it how it ended."""
        if log.is_debugging():
            log.debug(
                "attempt",
                request=request_id,
                **({"trace": self.trace_id} if self.trace_id else {}),
                decision=self.pick.decision,
                service=self.pick.service,
                outcome=self.outcome,
            )

    async def settle_before_last_byte(self, outcome: Outcome, cooldown_ms: int = 0) -> None:
        """Settles, and returns when the client may be sent the rest: the settle is on its way before it."""
        self.settle(outcome, cooldown_ms)
        if self.rule.strict_settle:
            await self._balance.settled(self.pick)
        else:
            await self._balance.flushed(self.pick.pool)

    def saw_token(self) -> None:
        """Notes the first content token."""
        if self._first_token is None:
            self._first_token = time.monotonic()
            self._metrics.first_token_s(self.pick, self.first_token_s, self.trace_id)


def _us(seconds: float) -> int:
    """Whole microseconds, at least 1: 0 would mean that nothing was measured."""
    return int(seconds * 1_000_000 + 0.5) or 1
