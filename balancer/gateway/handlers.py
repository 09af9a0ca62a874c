"""What happens with a request: who asks, for which rule, and what is refused before anything is picked."""

from __future__ import annotations

import hashlib
import hmac
import time
from typing import Protocol
from urllib.parse import unquote

from balancer import bodies, log
from balancer.config import Settings
from balancer.dialects import Dialect
from balancer.dialects.anthropic import ANTHROPIC
from balancer.dialects.openai import OPENAI
from balancer.dialects.paths import Route, route
from balancer.domain import Outcome, Provider, Rule
from balancer.errors import (
    BalancerError,
    ConfigurationError,
    ContentTypeError,
    NoServiceError,
    NotSupportedError,
    RequestError,
    UnauthorizedError,
    UnknownModelError,
    UnknownPathError,
)
from balancer.gateway.attempts import Forwarder
from balancer.gateway.messages import ClientGoneError, ClientRequest, ClientStream
from balancer.metrics import Metrics

_NAMES_SHOWN = 20


class Directory(Protocol):
    """The configuration that stands."""

    def rule(self, scenario: str, model: str) -> Rule | None:
        """The active rule of that scenario and model."""

    def rules(self, scenario: str) -> tuple[Rule, ...]:
        """The active rules of a scenario."""

    def provider(self, uuid: str) -> Provider | None:
        """The provider of that uuid."""


class Source(Protocol):
    """Where the configuration and the cursors are looked up."""

    def snapshot(self) -> Directory:
        """The configuration that stands. Raises StoreUnavailableError before the first is known."""

    def cursor(self, rule: Rule) -> str:
        """The service where this worker last saw the rule's cursor, empty if never."""


class Handlers:
    """Answers requests of the data plane. Every request gets an answer or a broken connection, in its own dialect."""

    def __init__(self, settings: Settings, source: Source, forwarder: Forwarder, metrics: Metrics) -> None:
        self._source = source
        self._forwarder = forwarder
        self._metrics = metrics
        # Digests are of one length, so that comparing them tells nothing of a token.
        self._tokens = tuple(_digest(token) for token in settings.client_tokens)

    async def handle(self, request: ClientRequest, stream: ClientStream) -> None:
        """Answers the request on the stream."""
        began = time.perf_counter()
        speaks_anthropic = bool(request.header("anthropic-version") or request.header("x-api-key"))
        wanted = route(request.method, request.path, speaks_anthropic=speaks_anthropic)
        dialect = wanted.dialect if wanted else self.dialect_of(request.path)
        rule: Rule | None = None
        outcome = Outcome.REJECTED
        try:
            self._authenticate(request)
            if wanted is None:
                raise UnknownPathError(f"{request.method} {request.path} is not served here")
            if wanted.kind == "models":
                outcome = Outcome.SUCCESS
                await self._models(wanted, stream)
                return
            rule, peek = self._match(request, wanted)
            if wanted.kind == "count_tokens":
                service = self._current_service(rule)
                await self._forwarder.forward_uncounted(request, wanted, rule, service, stream)
                outcome = Outcome.SUCCESS
            else:
                outcome = await self._forwarder.forward(request, wanted, rule, peek, stream)
        except ConfigurationError as exc:
            outcome = Outcome.FAILED
            log.error("a request needs what the configuration does not give", reason=str(exc))
            told = BalancerError("the gateway's configuration is incomplete; its log says what is missing")
            await send_error(dialect, told, request, stream)
        except BalancerError as exc:
            outcome = Outcome.REJECTED if exc.status < 500 else Outcome.FAILED
            await send_error(dialect, exc, request, stream)
        except ClientGoneError:
            outcome = Outcome.CANCELLED
        except Exception as exc:  # noqa: BLE001 - a task's root: whatever went wrong is logged, the worker lives.
            outcome = Outcome.FAILED
            log.error("a request failed in the gateway", exc=exc, request=request.request_id)
            await send_error(dialect, BalancerError("internal error"), request, stream)
        finally:
            scenario = wanted.scenario if wanted else ""
            self._metrics.requests.labels(scenario, rule.uuid if rule else "", outcome.value).inc()
            self._metrics.request_duration.labels(scenario).observe(time.perf_counter() - began)

    def dialect_of(self, path: str) -> Dialect:
        """The dialect in which an error on any path is told."""
        return ANTHROPIC if "/v1/messages" in path else OPENAI

    def _authenticate(self, request: ClientRequest) -> None:
        if not self._tokens:
            return
        bearer = request.header("authorization")
        presented = bearer[7:].strip() if bearer[:7].lower() == "bearer " else request.header("x-api-key")
        if not presented:
            raise UnauthorizedError("no credential: send `Authorization: Bearer …` or `x-api-key`")
        digest = _digest(presented)
        # All are compared, so that the time tells nothing of which was near.
        if not sum(hmac.compare_digest(digest, token) for token in self._tokens):
            raise UnauthorizedError("the credential is not known here")

    async def _models(self, wanted: Route, stream: ClientStream) -> None:
        names = list(dict.fromkeys(rule.request_model for rule in self._source.snapshot().rules(wanted.scenario)))
        model = unquote(wanted.path.removeprefix("/v1/models").lstrip("/"))
        if model and model not in names:
            raise _unknown_model(model, wanted.scenario, names)
        body = wanted.dialect.model_body(model) if model else wanted.dialect.models_body(names)
        await stream.start(200, (("Content-Type", "application/json"),), len(body))
        await stream.write(body)
        await stream.end()

    def _match(self, request: ClientRequest, wanted: Route) -> tuple[Rule, bodies.Peek]:
        """The rule of a request, once nothing speaks against picking a service for it."""
        if wanted.kind == "by_id":
            raise NotSupportedError("responses by id are not supported yet: which account has it is not kept")
        peek = self._peek(request)
        directory = self._source.snapshot()
        rule = directory.rule(wanted.scenario, peek.model)
        if rule is None:
            names = [rule.request_model for rule in directory.rules(wanted.scenario)]
            raise _unknown_model(peek.model, wanted.scenario, names)
        services = self._usable(rule)
        if not services:
            raise NoServiceError(f"rule {rule.uuid} has no active service with an enabled provider")
        others = [s for s in services if (p := directory.provider(s[0])) and p.api_style != wanted.dialect.name]
        if others:
            raise NotSupportedError(
                f"translation is not supported yet: {wanted.dialect.name} clients cannot be served by "
                + ", ".join(f"{provider}:{model}" for provider, model in others[:_NAMES_SHOWN])
            )
        if peek.previous_response_id is not None and len(services) > 1:
            raise NotSupportedError(
                "previous_response_id is not supported yet with several services: which account has it is not kept",
                param="previous_response_id",
            )
        return rule, peek

    def _peek(self, request: ClientRequest) -> bodies.Peek:
        content_type = request.header("content-type").lower()
        if content_type.startswith("multipart/form-data"):
            return bodies.peek_form(request.body, request.header("content-type"))
        if content_type and not (content_type.startswith("application/json") or "+json" in content_type):
            raise ContentTypeError("expected Content-Type: application/json or multipart/form-data")
        if request.header("content-encoding").lower() not in ("", "identity"):
            raise ContentTypeError("request bodies with a Content-Encoding are not read")
        if not request.body:
            raise RequestError("the request has no body")
        return bodies.peek(request.body)

    def _usable(self, rule: Rule) -> list[tuple[str, str]]:
        """Provider and model of the services that may serve at all."""
        directory = self._source.snapshot()
        return [
            (service.provider, service.model)
            for service in rule.active_services()
            if (provider := directory.provider(service.provider)) and provider.enabled
        ]

    def _current_service(self, rule: Rule) -> str:
        """Where the cursor was last seen, or the first usable service."""
        usable = [f"{provider}:{model}" for provider, model in self._usable(rule)]
        cursor = self._source.cursor(rule)
        return cursor if cursor in usable else usable[0]


async def send_error(dialect: Dialect, error: BalancerError, request: ClientRequest, stream: ClientStream) -> None:
    """Tells the client of an error, or breaks its connection when its answer has begun already."""
    if stream.is_started:
        stream.abort()
        return
    body = dialect.error_body(error, request.request_id)
    retry = (("Retry-After", "1"),) if error.status == 503 else ()
    challenge = (("WWW-Authenticate", "Bearer"),) if error.status == 401 else ()
    try:
        await stream.start(error.status, (("Content-Type", "application/json"), *retry, *challenge), len(body))
        await stream.write(body)
        await stream.end()
    except ClientGoneError:
        log.debug("a client left before its error", request=request.request_id)


def _unknown_model(model: str, scenario: str, names: list[str]) -> UnknownModelError:
    shown = ", ".join(names[:_NAMES_SHOWN]) + (" …" if len(names) > _NAMES_SHOWN else "")
    return UnknownModelError(
        f"model {model[:200]!r} is not known in scenario {scenario}; there is: {shown or 'none'}", param="model"
    )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
