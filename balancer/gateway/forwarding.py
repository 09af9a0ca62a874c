"""A request on its way: pick, send, look at the answer's opening, and go on to the next service or relay it.

What is tried next is the course's to decide. Until the client was sent a byte, a failure is the next service's chance;
from then on the answer is what it is.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from balancer import bodies, log
from balancer.dialects import Headers
from balancer.dialects.headers import response_headers
from balancer.dialects.paths import Route
from balancer.domain import Outcome, Pick, Rule
from balancer.errors import (
    BalancerError,
    ConfigurationError,
    DeadlineError,
    NoServiceError,
    RequestError,
    StoreUnavailableError,
    UpstreamAnswerError,
)
from balancer.failures import Verdict
from balancer.gateway.attempts import Attempt, Balance, Providers
from balancer.gateway.clock import Clock
from balancer.gateway.counting import TokenCounter
from balancer.gateway.course import Course
from balancer.gateway.deadlines import Deadlines
from balancer.gateway.events import EventRelay, Remember
from balancer.gateway.matching import SELECT_S, Plan, Plans, deadline_ms
from balancer.gateway.messages import (
    BegunResponse,
    ClientGoneError,
    ClientRequest,
    ClientStream,
    Upstream,
    UpstreamRequest,
    UpstreamResponse,
)
from balancer.gateway.opening import Opening, described, opening_s, says_error
from balancer.gateway.outgoing import Outgoing, Preparer, with_model
from balancer.gateway.relay import Relay
from balancer.gateway.telling import decision_headers, incomplete, left_out_header, send_error
from balancer.gateway.translated import TranslatedRelay
from balancer.gateway.translating import Translated, Translation
from balancer.metrics import Metrics
from balancer.sessions import session_of
from balancer.store.pool import Asked
from balancer.translation.apis import is_native
from balancer.usage import usage_of

_WARN_INTERVAL_S = 10.0


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """What was begun of a request without a task, and is gone on with from there.

    `asked` has brought no pick; or an `attempt` is under way: its request was not sent, or `answer` has come of it, and
    is a stream that has begun if there are `events`. An `error` is a fault of ours, after which the client is only
    told.
    """

    rule: Rule
    peek: bodies.Peek
    clock: Clock
    asked: Asked | None = None
    attempt: Attempt | None = None
    outgoing: Outgoing | None = None
    answer: BegunResponse | None = None
    events: EventRelay | None = None
    error: Exception | None = None


class _Errand(msgspec.Struct, frozen=True, kw_only=True):
    """A request and what goes with it on its way."""

    request: ClientRequest
    route: Route
    peek: bodies.Peek
    course: Course
    stream: ClientStream
    clock: Clock
    translation: Translation


class Relays(Protocol):
    """Brings an answer to the client."""

    async def run(self, answer: Opening) -> None:
        """Relays it to its end. Raises UpstreamError while nothing was sent yet, ClientGoneError."""


class _Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that failed before the client was sent anything: it is settled, its connection given back.

    `tell` lets the client know of it, when nothing else is tried.
    """

    verdict: Verdict
    outcome: Outcome
    tell: Callable[[], Awaitable[None]]


class Forwarder:
    """Picks services for a request and forwards it."""

    def __init__(
        self,
        balance: Balance,
        providers: Providers,
        upstream: Upstream,
        metrics: Metrics,
        plans: Plans,
        *,
        decision_headers: bool,
        drops: frozenset[str] = frozenset(),
    ) -> None:
        """`drops`: the names in lower case of client's headers that are for no upstream."""
        self._balance = balance
        self._plans = plans
        self._deadlines = Deadlines()
        self.preparer = Preparer(providers, drops)
        self._upstream = upstream
        self._counter = TokenCounter(self.preparer, upstream)
        self._metrics = metrics
        self._decision_headers = decision_headers
        self._warned_at = 0.0

    async def forward(
        self,
        request: ClientRequest,
        route: Route,
        course: Course,
        peek: bodies.Peek,
        stream: ClientStream,
        translation: Translation,
        begun: Begun | None = None,
    ) -> Outcome:
        """Picks, sends and relays until the client has its answer, be it the last failure; the outcome of that.

        Raises BalancerError when nothing was sent to the client yet.
        """
        if begun is not None and begun.error is not None:
            course.pick = begun.attempt.pick if begun.attempt is not None else None
            raise begun.error
        clock = begun.clock if begun else Clock(request, self._deadlines)
        errand = _Errand(
            request=request,
            route=route,
            peek=peek,
            course=course,
            stream=stream,
            clock=clock,
            translation=translation,
        )
        failure: _Failure | None = None
        refusal: NoServiceError | RequestError | None = None
        while True:
            first, begun = begun, None
            try:
                if first is not None and first.attempt is not None:
                    attempt = first.attempt
                else:
                    attempt = await self._pick(errand, first.asked if first else None)
            except (NoServiceError, RequestError) as exc:
                refusal = refusal or exc
                if course.fall_back():
                    continue
                break
            except StoreUnavailableError:
                if failure is None:
                    raise
                break
            course.pick = attempt.pick
            course.picked(attempt.pick.service, attempt.rule)
            if course.attempts > 1:
                self._metrics.retried(attempt.pick)
            ended = await self._attempt(errand, attempt, first)
            if isinstance(ended, Outcome):
                return ended
            failure = ended
            if not course.go_on(failure.verdict):
                break
            pause_s = course.backoff_s(random.random())
            if pause_s >= errand.clock.left_s(self._plans.of(course.rule).longest_s):
                break
            await asyncio.sleep(pause_s)
        if failure is None:
            assert refusal is not None, "there is a reason why nothing was picked"
            raise refusal
        await failure.tell()
        return failure.outcome

    async def forward_uncounted(
        self,
        request: ClientRequest,
        route: Route,
        rule: Rule,
        service_id: str,
        stream: ClientStream,
        peek: bodies.Peek | None,
        body: bytes | None = None,
    ) -> None:
        """Sends a request that no tactic picks for and nothing counts; `peek` if a model stands in its body.

        `body`: another than the client's. Raises BalancerError when nothing was sent to the client yet.
        """
        body = request.body if body is None else body
        if peek is not None:
            body = with_model(body, request.header("content-type"), peek, service_id.partition(":")[2])
        needs_plain = bool(rule.response_model)
        witness = request.witness
        if witness is not None:
            witness.asks()
        outgoing = self.preparer.request(request, route, service_id, body, needs_plain=needs_plain)
        relay = Relay(
            request_id=request.request_id,
            route=route,
            stream=stream,
            extra_headers=(),
            mask=outgoing.mask,
            response_model=rule.response_model,
        )
        answer: Opening | None = None
        fault = ""
        clock = Clock(request, self._deadlines)
        try:
            clock.limit(stream, outgoing.request.timeout_s)
            with clock.until_first_byte(most_s=opening_s(outgoing.request.timeouts)):
                answer = Opening(await self._upstream.send(outgoing.request))
                await answer.look(route.dialect.name, _now_ms())
            await relay.run(answer)
        except BalancerError as exc:
            fault = exc.code
            raise
        finally:
            if witness is not None:
                witness.asked(service_id, answer.status if answer is not None else 0, fault)
            if answer is not None:
                await answer.close()

    async def count_tokens(
        self,
        request: ClientRequest,
        route: Route,
        rule: Rule,
        service_id: str,
        stream: ClientStream,
        translation: Translation,
        peek: bodies.Peek,
    ) -> None:
        """Answers how long a prompt is for a service. Raises as `forward_uncounted`."""
        if is_native(route.api, self.preparer.provider(service_id)):
            body, peek = translation.native(self._plans.of(rule), peek)
            await self.forward_uncounted(request, route, rule, service_id, stream, peek, body)
        else:
            await self._counter.tell(request, translation, service_id, peek, stream)

    def clock(self, request: ClientRequest, began: float) -> Clock:
        """How long a request may still take that arrived then."""
        return Clock(request, self._deadlines, began)

    # -- select --------------------------------------------------------------------------------------------------------

    async def _pick(self, errand: _Errand, asked: Asked | None) -> Attempt:
        began, witness = time.monotonic(), errand.request.witness
        try:
            pick, rule = await self._select(errand, asked)
        finally:
            if witness is not None:
                witness.waited(time.monotonic() - (asked.asked_at if asked is not None else began))
        self._metrics.picked(pick)
        attempt = Attempt(self._balance, self._metrics, rule, pick)
        if witness is not None:
            witness.picked(attempt)
        return attempt

    async def _select(self, errand: _Errand, asked: Asked | None) -> tuple[Pick, Rule]:
        course, clock, request = errand.course, errand.clock, errand.request
        rule = course.rule
        plan = self._plans.of(rule)
        elapsed_s = clock.elapsed_s

        def again(current: Rule) -> Rule:
            """An edited rule may have another entry for the request."""
            return self._plans.routed(self._plans.of(current), errand.peek, request_id=request.request_id).rule

        late: tuple[str, ...] = ()
        if elapsed_s >= plan.shortest_s:
            late = tuple(s.id for s in rule.services if plan.timeouts_s[s.provider] <= elapsed_s)
        try:
            with clock.until_first_byte(plan.longest_s, most_s=SELECT_S + rule.queue_timeout_ms / 1000):
                return await self._balance.select(
                    rule,
                    reserved=reserved(plan, errand.peek, request.body),
                    deadline_ms=deadline_ms(plan.longest_s - elapsed_s),
                    excluded=tuple(dict.fromkeys((*course.tried, *late))),
                    session="" if course.only else session_of(rule, request.first, errand.peek),
                    only=course.only,
                    begun=asked,
                    variant=None if course.only or course.tried else again,
                    barred=errand.translation.barred(plan, course.only),
                )
        except NoServiceError as exc:
            if not course.only:
                raise
            told = f"{exc.message}; the response that the request goes on from is kept by {course.only} alone"
            raise type(exc)(told, cause=exc.cause, retry_after_s=exc.retry_after_s) from exc

    # -- one attempt ---------------------------------------------------------------------------------------------------

    async def _attempt(self, errand: _Errand, attempt: Attempt, begun: Begun | None) -> Outcome | _Failure:
        """Sends, and relays the answer, unless it is a failure after which the course goes on, or none has come."""
        pick, stream = attempt.pick, errand.stream
        answer: Opening | None = None
        try:
            if begun is not None and begun.events is not None:
                assert begun.answer is not None, "it is what tells of events"
                answer = Opening(begun.answer)
                await begun.events.go_on(answer)
                return attempt.outcome or Outcome.FAILED
            clock, course = errand.clock, errand.course
            if begun is not None and begun.outgoing is not None:
                outgoing = begun.outgoing
            else:
                outgoing = self._outgoing(errand, attempt)
            clock.limit(stream, outgoing.request.timeout_s)
            with clock.until_first_byte(most_s=opening_s(outgoing.request.timeouts)):
                if begun is not None and begun.answer is not None:
                    response: UpstreamResponse = begun.answer
                    begun.answer.begun()
                else:
                    response = await self._upstream.send(outgoing.request)
                attempt.status = response.status
                body = response.whole() if outgoing.translated is None else None
                if body is None or not _is_plain(response, body, errand):
                    answer = Opening(response)
                    await answer.look(outgoing.style or errand.route.dialect.name, _now_ms())
            if answer is None:
                assert body is not None, "it is looked at otherwise"
                attempt.usage = usage_of(body)
                if attempt.details is not None:
                    attempt.details.read(body)
                await attempt.settle_before_last_byte(Outcome.SUCCESS)
                headers = outgoing.mask.over_headers(response_headers(response.headers))
                await stream.send(response.status, (*headers, *self._headers(errand, pick)), body)
                return Outcome.SUCCESS
            if answer.is_empty:
                raise UpstreamAnswerError("the upstream answered with nothing")
            relay = self._relay(errand, attempt, outgoing)
            if answer.verdict is not None and course.goes_on(answer.verdict):
                attempt.settle(answer.verdict.outcome, answer.verdict.cooldown_ms)
                return _held(answer, answer.verdict, relay, outgoing.request, errand)
            await relay.run(answer)
        except BalancerError as exc:
            if stream.is_started:
                raise
            return self._without_answer(errand, attempt, exc)
        except (ClientGoneError, asyncio.CancelledError):
            attempt.settle(Outcome.CANCELLED)
            raise
        finally:
            # Whatever else went wrong is ours: the attempt is over all the same.
            attempt.settle(Outcome.FAILED)
            if answer is not None:
                await answer.close()
            attempt.log(errand.request.request_id)
        return attempt.outcome or Outcome.FAILED

    def _outgoing(self, errand: _Errand, attempt: Attempt) -> Outgoing:
        elapsed_s, course, pick = errand.clock.elapsed_s, errand.course, attempt.pick
        translated = errand.translation.to(self.preparer.provider(pick.service), pick.service.partition(":")[2])
        if translated is not None:
            outgoing = self.preparer.translated(errand.request, translated, elapsed_s=elapsed_s)
            attempt.api = translated.service_api
            self._metrics.translated(pick, translated.client_api, translated.service_api)
        else:
            body, peek = errand.translation.native(self._plans.of(course.rule), errand.peek)
            outgoing = self.preparer.generation(
                errand.request,
                errand.route,
                peek,
                pick.service,
                body=body,
                needs_plain=bool(course.response_model),
                elapsed_s=elapsed_s,
            )
        if course.attempts == 1:
            self._metrics.overhead_s(elapsed_s)
        return outgoing

    def _without_answer(self, errand: _Errand, attempt: Attempt, error: BalancerError) -> _Failure:
        """Settles an attempt that has brought no answer."""
        # A service is not to blame for a client that waits no longer, nor for what it cannot be asked.
        is_ours = isinstance(error, DeadlineError | RequestError)
        outcome = Outcome.CANCELLED if is_ours else Outcome.FAILED
        attempt.settle(outcome)
        attempt.fault = error.code
        told = incomplete(error, errand.request) if isinstance(error, ConfigurationError) else error
        headers = self._headers(errand, attempt.pick)

        async def tell() -> None:
            await send_error(errand.route.dialect, told, errand.request, errand.stream, headers)

        if isinstance(error, RequestError):
            return _Failure(verdict=Verdict(outcome=Outcome.FAILED), outcome=Outcome.REJECTED, tell=tell)
        return _Failure(verdict=Verdict(outcome=outcome), outcome=Outcome.FAILED, tell=tell)

    def _relay(self, errand: _Errand, attempt: Attempt, outgoing: Outgoing) -> Relays:
        if outgoing.translated is not None:
            return TranslatedRelay(
                request_id=errand.request.request_id,
                route=errand.route,
                stream=errand.stream,
                extra_headers=self._headers(errand, attempt.pick, outgoing.translated),
                mask=outgoing.mask,
                attempt=attempt,
                translated=outgoing.translated,
                response_model=errand.course.response_model,
            )
        return Relay(
            request_id=errand.request.request_id,
            route=errand.route,
            stream=errand.stream,
            extra_headers=self._headers(errand, attempt.pick),
            mask=outgoing.mask,
            attempt=attempt,
            response_model=errand.course.response_model,
            hides_usage=outgoing.hides_usage,
            remember=self._remembers(attempt.pick, errand.request) if _is_kept(errand) else None,
        )

    def _headers(self, errand: _Errand, pick: Pick, translated: Translated | None = None) -> Headers:
        if not self._decision_headers:
            return ()
        told = decision_headers(pick, errand.course.attempts, errand.course.rule.entry)
        return told if translated is None else (*told, *left_out_header(translated.left_out))

    def _remembers(self, pick: Pick, request: ClientRequest) -> Remember:
        async def remember(response_id: str) -> None:
            try:
                await self._balance.remember(pick, response_id)
            except StoreUnavailableError as exc:
                now = time.monotonic()
                if now - self._warned_at >= _WARN_INTERVAL_S:
                    self._warned_at = now
                    facts = {"pool": pick.pool, "reason": exc.message} | request.facts
                    log.warning("a response cannot be asked for again", **facts)

        return remember


def _is_kept(errand: _Errand) -> bool:
    """True for an answer that can be asked for again."""
    return errand.route.path == "/v1/responses" and errand.peek.store


def _is_plain(response: UpstreamResponse, body: bytes, errand: _Errand) -> bool:
    """True for JSON that passes as it is, and of which only the usage is read: most answers that are no stream."""
    if response.status != 200 or errand.course.response_model or _is_kept(errand):
        return False
    kind, coding = described(response.headers)
    return "json" in kind and not coding and body.startswith(b"{") and not says_error(body)


def reserved(plan: Plan, peek: bodies.Peek, body: bytes) -> int:
    """The tokens that the request holds while it is in flight."""
    if not plan.needs_estimate:
        return 0
    tactic = plan.rule.lb_tactic
    most_output = peek.most_output if tactic.reserve == "full" else 0
    return min(bodies.estimate_tokens(body) + most_output, tactic.reserve_cap)


def _held(answer: Opening, verdict: Verdict, relay: Relays, outgoing: UpstreamRequest, errand: _Errand) -> _Failure:
    """An error that was answered, kept until it is known whether the client gets it."""

    async def tell() -> None:
        errand.clock.limit(errand.stream, outgoing.timeout_s)
        await relay.run(answer)

    return _Failure(verdict=verdict, outcome=verdict.outcome, tell=tell)


def _now_ms() -> int:
    return round(time.time() * 1000)
