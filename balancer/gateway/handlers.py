"""What happens with a request: who asks, for which rule, and what is refused before anything is picked."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import unquote

from balancer import bodies, log
from balancer.config import Settings
from balancer.dialects import Dialect
from balancer.dialects.anthropic import ANTHROPIC
from balancer.dialects.openai import OPENAI
from balancer.dialects.paths import Route, route
from balancer.domain import Outcome, Rule
from balancer.errors import (
    BalancerError,
    ConfigurationError,
    ContentTypeError,
    NoServiceError,
    NotFoundError,
    RateLimitedError,
    RequestError,
    StoreUnavailableError,
    UnauthorizedError,
    UnknownModelError,
    UnknownPathError,
    UnknownResponseError,
    UpstreamError,
)
from balancer.gateway.course import Course
from balancer.gateway.forwarding import Begun, Forwarder
from balancer.gateway.matching import Directory, Plans, standing_in
from balancer.gateway.messages import ClientGoneError, ClientRequest, ClientStream, WayBack
from balancer.gateway.telling import incomplete, send_error
from balancer.gateway.translating import Translation
from balancer.gateway.witness import Watch
from balancer.metrics import Metrics

_NAMES_SHOWN = 20
_ID_SHOWN = 100
_PLAIN = ("", "identity")


class Recalled(Protocol):
    """Who keeps a response."""

    @property
    def rule(self) -> str:
        """The uuid of the rule under which it was asked for."""

    @property
    def service(self) -> str:
        """The id of the service that gave it."""


class Source(Protocol):
    """Where the configuration and the cursors are looked up."""

    def snapshot(self) -> Directory:
        """The configuration that stands. Raises StoreUnavailableError before the first is known."""

    def cursor(self, rule: Rule) -> str:
        """The service where this worker last saw the rule's cursor, empty if never."""

    async def recall(self, response_id: str, rule: Rule | None = None) -> Recalled | None:
        """Who keeps a response, None for one that is not known (any more). Raises StoreUnavailableError.

        `rule` is one that may have given it.
        """


class Handlers:
    """Answers requests of the data plane. Every request gets an answer or a broken connection, in its own dialect."""

    def __init__(
        self,
        settings: Settings,
        source: Source,
        forwarder: Forwarder,
        metrics: Metrics,
        plans: Plans,
        watch: Watch | None = None,
    ) -> None:
        """`watch` tells of the requests that are answered."""
        self._source = source
        self._plans = plans
        self._forwarder = forwarder
        self._metrics = metrics
        self._watch = watch
        # Digests are of one length, so that comparing them tells nothing of a token.
        self._tokens = tuple(_digest(token) for token in settings.client_tokens)

    async def handle(self, request: ClientRequest, stream: WayBack, begun: Begun | None = None) -> None:
        """Answers the request on the stream, from its start or from where it was `begun`."""
        began = begun.clock.began if begun else time.monotonic()
        if self._watch is not None and request.witness is None:
            request.witness = self._watch.begin(request, stream.client, began)
        first = request.first
        speaks_anthropic = "anthropic-version" in first or "x-api-key" in first
        wanted = route(request.method, request.path, speaks_anthropic=speaks_anthropic)
        dialect = wanted.dialect if wanted else self.dialect_of(request.path)
        rule: Rule | None = None
        course: Course | None = None
        refusal: BalancerError | None = None
        outcome = Outcome.REJECTED
        try:
            self._authenticate(request)
            if wanted is None:
                raise UnknownPathError(f"{request.method} {request.path} is not served here")
            if wanted.kind == "models":
                outcome = Outcome.SUCCESS
                await self._models(wanted, stream)
                return
            if wanted.kind == "by_id":
                rule, service = await self._keeper(wanted)
                await self._forwarder.forward_uncounted(request, wanted, rule, service, stream, None)
                outcome = Outcome.SUCCESS
                return
            rule, peek = (begun.rule, begun.peek) if begun else self._match(request, wanted)
            translation = Translation(request, wanted, self._source.snapshot().provider)
            if wanted.kind == "count_tokens":
                service = self._current_service(rule)
                await self._forwarder.count_tokens(request, wanted, rule, service, stream, translation, peek)
                outcome = Outcome.SUCCESS
            else:
                course = await self._course(rule, peek, wanted, request.request_id)
                outcome = await self._forwarder.forward(request, wanted, course, peek, stream, translation, begun)
        except ConfigurationError as exc:
            outcome, refusal = Outcome.FAILED, exc
            await send_error(dialect, incomplete(exc, request), request, stream)
        except RateLimitedError as exc:
            outcome, refusal = Outcome.RATE_LIMITED, exc
            await send_error(dialect, exc, request, stream)
        except BalancerError as exc:
            outcome, refusal = Outcome.REJECTED if exc.status < 500 else Outcome.FAILED, exc
            await send_error(dialect, exc, request, stream)
        except ClientGoneError:
            outcome = Outcome.CANCELLED
        except asyncio.CancelledError:
            outcome = Outcome.CANCELLED
            raise
        except Exception as exc:  # noqa: BLE001 - a task's root: whatever went wrong is logged, the worker lives.
            outcome, refusal = Outcome.FAILED, BalancerError("internal error")
            log.error("a request failed in the gateway", exc=exc, **request.facts)
            await send_error(dialect, refusal, request, stream)
        finally:
            scenario = wanted.scenario if wanted else ""
            pick = course.pick if course else None
            trace_id = request.witness.trace_id if request.witness is not None else ""
            self._metrics.request(
                scenario, rule.uuid if rule else "", outcome, time.monotonic() - began, pick, trace_id
            )
            if refusal is not None and pick is None and not isinstance(refusal, UpstreamError):
                self._metrics.refused(scenario, refusal.reason)
            if request.witness is not None:
                request.witness.ended(scenario, rule.uuid if rule else "", outcome, stream)

    def refused(self, request: ClientRequest, error: BalancerError, began: float) -> str:
        """Counts a request that the front has refused already, and that arrived then; its scenario."""
        first = request.first
        speaks_anthropic = "anthropic-version" in first or "x-api-key" in first
        wanted = route(request.method, request.path, speaks_anthropic=speaks_anthropic)
        scenario = wanted.scenario if wanted else ""
        self._metrics.request(scenario, "", Outcome.REJECTED, time.monotonic() - began)
        self._metrics.refused(scenario, error.reason)
        return scenario

    def may_pass(self, head: ClientRequest) -> Route | None:
        """The route of a request for a model with this head, when nothing in that speaks against it; else None.

        What does, `handle` tells.
        """
        first = head.first
        wanted = route(head.method, head.path, speaks_anthropic="anthropic-version" in first or "x-api-key" in first)
        if wanted is None or wanted.kind != "generation" or not _is_json(first):
            return None
        try:
            self._authenticate(head)
        except UnauthorizedError:
            return None
        return wanted

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
        peek = self._peek(request)
        directory = self._source.snapshot()
        rule = directory.rule(wanted.scenario, peek.model)
        if rule is None:
            rules = directory.rules(wanted.scenario)[: _NAMES_SHOWN + 1]
            raise _unknown_model(peek.model, wanted.scenario, [rule.request_model for rule in rules])
        asked = self._plans.of(rule)
        plan = self._plans.routed(asked, peek, request_id=request.request_id)
        rule = plan.rule
        if asked.router is not None:
            self._metrics.routed(rule)
        if not plan.usable and not (rule.entry and _previous(peek, wanted)):
            what = f"entry {rule.entry} of rule {rule.uuid}" if rule.entry else f"rule {rule.uuid}"
            raise NoServiceError(f"{what} has no active service with an enabled provider")
        return rule, peek

    async def _course(self, rule: Rule, peek: bodies.Peek, wanted: Route, request_id: str) -> Course:
        """The way of a request, which is short where it goes on from a response: only one service has that."""
        directory = self._source.snapshot()

        def find(uuid: str) -> Rule | None:
            """The rule, if it can serve requests: not gone, off, or empty."""
            other = directory.by_uuid.get(uuid)
            if other is None or not other.active:
                return None
            plan = self._plans.routed(self._plans.of(other), peek, request_id=request_id)
            return plan.rule if plan.usable else None

        previous = _previous(peek, wanted)
        if not previous:
            return Course(rule, find)
        has_choice = len(self._plans.of(rule).usable) > 1
        try:
            recalled = await self._source.recall(previous, rule)
        except StoreUnavailableError:
            if has_choice:
                raise
            recalled = None
        if recalled is not None:
            for other in standing_in(rule, find):
                # Whatever this request matches, the one before it may have matched something else.
                for variant in (other, *directory.by_uuid.get(other.uuid, other).variants()):
                    if any(service.id == recalled.service for service in variant.services):
                        return Course(rule, find, under=variant, only=recalled.service)
            why = f"it is kept by {recalled.service}, which is no service of rule {rule.uuid}"
        elif has_choice:
            why = "this gateway did not hand it out, or has forgotten it after 30 days"
        else:
            return Course(rule, find, is_bound=True)
        raise UnknownResponseError(
            f"previous response {previous[:_ID_SHOWN]!r} is not found: {why}", param="previous_response_id"
        )

    async def _keeper(self, wanted: Route) -> tuple[Rule, str]:
        """The rule and the service of a response that is asked for by its id."""
        response_id = wanted.path.split("/")[3]
        directory = self._source.snapshot()
        recalled = await self._source.recall(response_id)
        rule = directory.by_uuid.get(recalled.rule) if recalled else None
        if recalled is None or rule is None or rule.scenario != wanted.scenario:
            raise NotFoundError(
                f"response {response_id[:_ID_SHOWN]!r} is not found in scenario {wanted.scenario}: "
                "this gateway did not hand it out there, or has forgotten it after 30 days"
            )
        provider = directory.provider(recalled.service.partition(":")[0])
        if provider is None or not provider.enabled:
            raise NoServiceError(f"the response is kept by {recalled.service}, whose provider is not enabled")
        return rule, recalled.service

    def _peek(self, request: ClientRequest) -> bodies.Peek:
        content_type = request.header("content-type").lower()
        if content_type.startswith("multipart/form-data"):
            return bodies.peek_form(request.body, request.header("content-type"))
        if not _is_json_type(content_type):
            raise ContentTypeError("expected Content-Type: application/json or multipart/form-data")
        if request.header("content-encoding").lower() not in _PLAIN:
            raise ContentTypeError("request bodies with a Content-Encoding are not read")
        if not request.body:
            raise RequestError("the request has no body")
        return bodies.peek(request.body)

    def _current_service(self, rule: Rule) -> str:
        """Where the cursor was last seen, or the first usable service."""
        services = [service.id for service in self._plans.of(rule).usable]
        cursor = self._source.cursor(rule)
        return cursor if cursor in services else services[0]


def _previous(peek: bodies.Peek, wanted: Route) -> str:
    """The response that a request goes on from, empty when there is none."""
    previous = peek.previous_response_id
    return previous if wanted.path.startswith("/v1/responses") and isinstance(previous, str) else ""


def _is_json_type(content_type: str) -> bool:
    return not content_type or content_type.startswith("application/json") or "+json" in content_type


def _is_json(first: Mapping[str, str]) -> bool:
    """True for a head whose body can be nothing else."""
    is_plain = first.get("content-encoding", "").lower() in _PLAIN
    return is_plain and _is_json_type(first.get("content-type", "").lower())


def _unknown_model(model: str, scenario: str, names: list[str]) -> UnknownModelError:
    shown = ", ".join(names[:_NAMES_SHOWN]) + (" …" if len(names) > _NAMES_SHOWN else "")
    return UnknownModelError(
        f"model {model[:200]!r} is not known in scenario {scenario}; there is: {shown or 'none'}", param="model"
    )


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
