"""One attempt: pick, send, relay, settle. However it ends, it is settled exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Protocol

from balancer import bodies, log
from balancer.dialects import Headers
from balancer.dialects.headers import request_headers
from balancer.dialects.paths import Route, upstream_url
from balancer.domain import Outcome, Pick, Provider, Rule, Usage, is_secret_name
from balancer.errors import NoServiceError, UpstreamError
from balancer.gateway.masking import Mask
from balancer.gateway.messages import (
    ClientGoneError,
    ClientRequest,
    ClientStream,
    Upstream,
    UpstreamRequest,
    UpstreamResponse,
)
from balancer.gateway.relay import Relay
from balancer.metrics import Metrics

_DEADLINE_MARGIN_S = 30.0
"""Beyond the provider's timeout: when it has passed, the attempt cannot be alive any more."""

_CLIENT_MARGIN_S = 1.0


class Balance(Protocol):
    """The shared choice and counters, as far as attempts need them."""

    async def select(
        self, rule: Rule, *, reserved: int, deadline_ms: int, excluded: tuple[str, ...] = ()
    ) -> tuple[Pick, Rule]:
        """The pick, and the rule as it stood at the pick."""

    def settle(self, pick: Pick, outcome: Outcome, usage: Usage | None) -> None:
        """Queues the end of an attempt."""

    async def flushed(self, pool: str) -> None:
        """Returns once everything settled before is written to Redis' socket."""

    async def settled(self, pick: Pick) -> None:
        """Returns once everything settled before is applied, or the deadline has passed."""


class Providers(Protocol):
    """Providers by uuid, and their credentials."""

    def provider(self, uuid: str) -> Provider | None:
        """The provider of that uuid."""

    def access_token(self, provider: Provider) -> str:
        """The credential to send, empty for none."""

    def headers(self, provider: Provider) -> dict[str, str]:
        """The provider's own headers."""

    def query(self, provider: Provider) -> dict[str, str]:
        """The provider's own query parameters."""

    def proxy_url(self, provider: Provider) -> str:
        """The proxy to go through, empty for none."""


class Attempt:
    """What one attempt has used so far, and whether it is settled."""

    def __init__(self, balance: Balance, metrics: Metrics, rule: Rule, pick: Pick) -> None:
        self.rule = rule
        self.pick = pick
        self.usage: Usage | None = None
        self.outcome: Outcome | None = None
        self._balance = balance
        self._metrics = metrics
        self._started = time.perf_counter()
        self._has_token = False

    def settle(self, outcome: Outcome) -> None:
        """Settles the attempt with the usage known by now; only the first call counts."""
        if self.outcome is not None:
            return
        self.outcome = outcome
        self._balance.settle(self.pick, outcome, self.usage)
        self._metrics.settled(self.pick, outcome, self.usage)
        self._metrics.upstream_duration.labels(self.pick.service).observe(time.perf_counter() - self._started)

    async def settle_before_last_byte(self, outcome: Outcome) -> None:
        """Settles, and returns when the client may be sent the rest: the settle is on its way before it."""
        self.settle(outcome)
        if self.rule.strict_settle:
            await self._balance.settled(self.pick)
        else:
            await self._balance.flushed(self.pick.pool)

    def saw_token(self) -> None:
        """Notes the first content token."""
        if not self._has_token:
            self._has_token = True
            self._metrics.first_token.labels(self.pick.service).observe(time.perf_counter() - self._started)


class Forwarder:
    """Picks a service for a request and forwards it."""

    def __init__(
        self, balance: Balance, providers: Providers, upstream: Upstream, metrics: Metrics, *, decision_headers: bool
    ) -> None:
        self._balance = balance
        self._providers = providers
        self._upstream = upstream
        self._metrics = metrics
        self._decision_headers = decision_headers

    async def forward(
        self, request: ClientRequest, route: Route, rule: Rule, peek: bodies.Peek, stream: ClientStream
    ) -> Outcome:
        """Picks, sends and relays; the outcome. Raises BalancerError when nothing was sent to the client yet."""
        began = time.perf_counter()
        timeout_s = max((p.timeout for s in rule.services if (p := self._providers.provider(s.provider))), default=0)
        pick, rule = await self._balance.select(
            rule,
            reserved=_reserved(rule, peek, request.body),
            deadline_ms=round((timeout_s + _DEADLINE_MARGIN_S) * 1000),
        )
        self._metrics.picked(pick)
        attempt = Attempt(self._balance, self._metrics, rule, pick)
        response: UpstreamResponse | None = None
        try:
            outgoing, relay = self._prepare(request, route, peek, attempt, stream)
            self._metrics.overhead.observe(time.perf_counter() - began)
            async with _no_longer_than(outgoing.timeout_s, stream):
                response = await self._upstream.send(outgoing)
                await relay.run(response)
        except UpstreamError:
            attempt.settle(Outcome.FAILED)
            raise
        except (ClientGoneError, asyncio.CancelledError):
            attempt.settle(Outcome.CANCELLED)
            raise
        finally:
            # Whatever else went wrong is ours: the attempt is over all the same.
            attempt.settle(Outcome.FAILED)
            if response is not None:
                await response.close()
            log.debug(
                "attempt",
                request=request.request_id,
                decision=pick.decision,
                service=pick.service,
                outcome=attempt.outcome,
            )
        return attempt.outcome or Outcome.FAILED

    async def forward_uncounted(
        self, request: ClientRequest, route: Route, rule: Rule, service_id: str, stream: ClientStream
    ) -> None:
        """Sends a request that no tactic picks for and nothing counts (count_tokens) to a service."""
        outgoing, mask = self._outgoing(request, route, rule, service_id, request.body, identity_only=False)
        response = await self._upstream.send(outgoing)
        relay = Relay(request_id=request.request_id, route=route, stream=stream, extra_headers=(), mask=mask)
        try:
            async with _no_longer_than(outgoing.timeout_s, stream):
                await relay.run(response)
        finally:
            await response.close()

    def _prepare(
        self, request: ClientRequest, route: Route, peek: bodies.Peek, attempt: Attempt, stream: ClientStream
    ) -> tuple[UpstreamRequest, Relay]:
        rule, pick = attempt.rule, attempt.pick
        body = request.body
        hides_usage = False
        if peek.stream and route.path in ("/v1/chat/completions", "/v1/completions") and not peek.asks_for_usage:
            provider = self._provider(pick.service)
            if provider.stream_usage:
                body, hides_usage = bodies.ask_for_usage(body), True
        outgoing, mask = self._outgoing(
            request, route, rule, pick.service, body, identity_only=hides_usage or bool(rule.response_model)
        )
        relay = Relay(
            request_id=request.request_id,
            route=route,
            stream=stream,
            extra_headers=decision_headers(pick) if self._decision_headers else (),
            mask=mask,
            attempt=attempt,
            response_model=rule.response_model,
            hides_usage=hides_usage,
        )
        return outgoing, relay

    def _provider(self, service_id: str) -> Provider:
        provider = self._providers.provider(service_id.partition(":")[0])
        if provider is None:
            raise NoServiceError(f"the provider of service {service_id} is gone")
        return provider

    def _outgoing(
        self, request: ClientRequest, route: Route, rule: Rule, service_id: str, body: bytes, *, identity_only: bool
    ) -> tuple[UpstreamRequest, Mask]:
        """The request as it goes upstream, and the mask over what must not come back of it."""
        provider = self._provider(service_id)
        model = service_id.partition(":")[2]
        content_type = request.header("content-type")
        if not content_type.lower().startswith("multipart/"):
            body = bodies.replace_model(body, model, known=rule.request_model)
        elif model != rule.request_model:
            body = bodies.replace_form_model(body, content_type, model)
        token = "" if provider.no_key_required else self._providers.access_token(provider)
        own, query = self._providers.headers(provider), self._providers.query(provider)
        ours = route.dialect.credential_headers(provider, token, _joined(request.headers)) | own
        outgoing = UpstreamRequest(
            provider=provider.name,
            method=request.method,
            url=upstream_url(provider, route.path, model, request.query, query),
            headers=request_headers(request.headers, ours, identity_only=identity_only, request_id=request.request_id),
            body=body,
            proxy_url=self._providers.proxy_url(provider),
            timeouts=provider.timeouts,
            timeout_s=provider.timeout,
        )
        return outgoing, Mask((token, *_secrets(own, provider.headers), *_secrets(query, provider.query)))


@contextlib.asynccontextmanager
async def _no_longer_than(timeout_s: float, stream: ClientStream) -> AsyncIterator[None]:
    """Breaks the client's connection, and raises ClientGoneError, when a request outlives its provider's timeout.

    The upstream's part has limits of its own, which end it first: what is late here is a client that does not read.
    Its attempt would be taken for lost, and what it holds given away, while it still lives.
    """
    try:
        async with asyncio.timeout(timeout_s + _CLIENT_MARGIN_S) as deadline:
            yield
    except TimeoutError:
        if not deadline.expired():
            raise
        stream.abort()
        raise ClientGoneError from None


def decision_headers(pick: Pick) -> Headers:
    """What tells a client where its request went."""
    service = pick.service.encode("ascii", "backslashreplace").decode()
    return (
        ("x-balancer-decision", pick.decision),
        ("x-balancer-service", service),
        ("x-balancer-attempts", "1"),
    )


def _secrets(resolved: Mapping[str, str], kept: Mapping[str, str]) -> Iterator[str]:
    """Of a provider's headers or parameters the credentials: by their name, or because they are kept elsewhere."""
    for name, value in resolved.items():
        if is_secret_name(name) or value != kept[name]:
            yield from value.split()  # A scheme, as in `Bearer …`, may be left out where it is repeated.


def _joined(headers: Headers) -> dict[str, str]:
    """The headers by name in lower case; what came in several lines is one list (RFC 9110 §5.3)."""
    joined: dict[str, str] = {}
    for name, value in headers:
        key = name.lower()
        joined[key] = f"{joined[key]}, {value}" if key in joined else value
    return joined


def _reserved(rule: Rule, peek: bodies.Peek, body: bytes) -> int:
    """The tokens that the request holds while it is in flight."""
    tactic = rule.lb_tactic
    match tactic.reserve:
        case "none":
            return 0
        case "input":
            return min(bodies.estimate_tokens(body), tactic.reserve_cap)
        case "full":
            return min(bodies.estimate_tokens(body) + peek.most_output, tactic.reserve_cap)
