"""A request on its way: pick, send, look at the answer's opening, and go on to the next service or relay it.

What is tried next is the course's to decide. Until the client was sent a byte, a failure is the next service's chance;
from then on the answer is what it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable

import msgspec

from balancer import bodies, log
from balancer.dialects.headers import client_timeout_s, response_headers
from balancer.dialects.paths import Route
from balancer.domain import Outcome, Pick, Provider, Rule
from balancer.errors import (
    BalancerError,
    ConfigurationError,
    DeadlineError,
    NoServiceError,
    StoreUnavailableError,
    UpstreamAnswerError,
)
from balancer.failures import Verdict
from balancer.gateway.attempts import Attempt, Balance, Providers
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
from balancer.gateway.telling import decision_headers, incomplete, send_error
from balancer.metrics import Metrics
from balancer.sessions import session_of
from balancer.store.pool import Asked
from balancer.usage import usage_of

CLIENT_MARGIN_S = 1.0
"""Beyond a provider's timeout, until which what is written to a client may wait."""
_WARN_INTERVAL_S = 10.0
Renew = Callable[[Provider, str], Awaitable[bool]]
RENEW_S = 20.0
"""More than another access token is waited for."""


_UNLIMITED: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


class Clock:
    """How long a request may still take, counted from its arrival over all attempts."""

    def __init__(self, request: ClientRequest, deadlines: Deadlines, began: float | None = None) -> None:
        """`began`: when it arrived, of the monotonic clock; now unless it is given."""
        self._deadlines = deadlines
        self.began = time.monotonic() if began is None else began
        patience_s = client_timeout_s(request.first)
        self._client_at = self.began + patience_s if patience_s is not None else None

    @property
    def elapsed_s(self) -> float:
        """Since the request's arrival."""
        return time.monotonic() - self.began

    def left_s(self, timeout_s: float) -> float:
        """Until the whole request's limit, or the client's own if that is earlier."""
        return self._ends_at(timeout_s) - time.monotonic()

    def until_first_byte(
        self, timeout_s: float | None = None, *, most_s: float
    ) -> contextlib.AbstractContextManager[object]:
        """Raises DeadlineError when the client's time is over, or the whole request's where that is given.

        SDKs wait so long for the first byte; what comes behind it they wait for anew. `most_s`: what is waited for has
        limits of its own, which end it by then.
        """
        ends_at = self._client_at if timeout_s is None else self._ends_at(timeout_s)
        if ends_at is None or ends_at > time.monotonic() + most_s:
            return _UNLIMITED
        return self._deadlines.at(ends_at, _too_late)

    def limit(self, stream: ClientStream, timeout_s: float) -> None:
        """Lets nothing that is written to the client wait for longer than the provider's timeout.

        The upstream's part has limits of its own: only a client that does not read makes an attempt outlive it. It
        would be taken for lost, and what it holds given away, while it still lives.
        """
        stream.give_until(time.monotonic() + timeout_s + CLIENT_MARGIN_S)

    def _ends_at(self, timeout_s: float) -> float:
        ends_at = self.began + timeout_s
        return ends_at if self._client_at is None else min(ends_at, self._client_at)


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
        renew: Renew | None = None,
    ) -> None:
        """`drops`: the names in lower case of client's headers that are for no upstream.

        `renew` has another credential of a provider than the one that was refused, or says that there is none.
        """
        self._balance = balance
        self._plans = plans
        self._deadlines = Deadlines()
        self.preparer = Preparer(providers, drops)
        self._upstream = upstream
        self._metrics = metrics
        self._decision_headers = decision_headers
        self._renew = renew
        self._warned_at = 0.0

    async def forward(
        self,
        request: ClientRequest,
        route: Route,
        course: Course,
        peek: bodies.Peek,
        stream: ClientStream,
        begun: Begun | None = None,
    ) -> Outcome:
        """Picks, sends and relays until the client has its answer, be it the last failure; the outcome of that.

        Raises BalancerError when nothing was sent to the client yet.
        """
        if begun is not None and begun.error is not None:
            course.pick = begun.attempt.pick if begun.attempt is not None else None
            raise begun.error
        clock = begun.clock if begun else Clock(request, self._deadlines)
        errand = _Errand(request=request, route=route, peek=peek, course=course, stream=stream, clock=clock)
        failure: _Failure | None = None
        refusal: NoServiceError | None = None
        while True:
            first, begun = begun, None
            try:
                if first is not None and first.attempt is not None:
                    attempt = first.attempt
                else:
                    attempt = await self._pick(errand, first.asked if first else None)
            except NoServiceError as exc:
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
        *,
        peek: bodies.Peek | None,
    ) -> None:
        """Sends a request that no tactic picks for and nothing counts; `peek` if a model stands in its body.

        Raises BalancerError when nothing was sent to the client yet.
        """
        body = request.body
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
                outgoing = self._outgoing(errand, pick)
            clock.limit(stream, outgoing.request.timeout_s)
            with clock.until_first_byte(most_s=opening_s(outgoing.request.timeouts)):
                if begun is not None and begun.answer is not None:
                    response: UpstreamResponse = begun.answer
                    begun.answer.begun()
                else:
                    response = await self._upstream.send(outgoing.request)
                attempt.status = response.status
                body = response.whole()
                if body is None or not _is_plain(response, body, errand):
                    answer = Opening(response)
                    await answer.look(errand.route.dialect.name, _now_ms())
            if answer is not None and answer.status == 401 and self._renew is not None:
                answer = await self._sent_again(errand, attempt, outgoing, answer)
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

    async def _sent_again(self, errand: _Errand, attempt: Attempt, refused: Outgoing, answer: Opening) -> Opening:
        """The answer to the same attempt with another access token, where there is one; else the answer at hand.

        The client's time is what it was; the upstream counts two requests, we one attempt.
        """
        assert self._renew is not None, "who calls has looked"
        provider = self.preparer.provider(attempt.pick.service)
        with errand.clock.until_first_byte(most_s=RENEW_S):
            if not await self._renew(provider, refused.token):
                return answer
        outgoing = self._outgoing(errand, attempt.pick)
        if outgoing.token == refused.token:
            return answer
        with errand.clock.until_first_byte(most_s=opening_s(outgoing.request.timeouts)):
            response = await self._upstream.send(outgoing.request)
            attempt.status = response.status
            again = Opening(response)
            try:
                await again.look(errand.route.dialect.name, _now_ms())
            except BaseException:
                await again.close()
                raise
        await answer.close()
        return again

    def _outgoing(self, errand: _Errand, pick: Pick) -> Outgoing:
        elapsed_s, course = errand.clock.elapsed_s, errand.course
        outgoing = self.preparer.generation(
            errand.request,
            errand.route,
            errand.peek,
            pick.service,
            needs_plain=bool(course.response_model),
            elapsed_s=elapsed_s,
        )
        if course.attempts == 1:
            self._metrics.overhead_s(elapsed_s)
        return outgoing

    def _without_answer(self, errand: _Errand, attempt: Attempt, error: BalancerError) -> _Failure:
        """Settles an attempt that has brought no answer."""
        # A service is not to blame for a client that waits no longer.
        outcome = Outcome.CANCELLED if isinstance(error, DeadlineError) else Outcome.FAILED
        attempt.settle(outcome)
        attempt.fault = error.code
        told = incomplete(error, errand.request) if isinstance(error, ConfigurationError) else error
        headers = self._headers(errand, attempt.pick)

        async def tell() -> None:
            await send_error(errand.route.dialect, told, errand.request, errand.stream, headers)

        return _Failure(verdict=Verdict(outcome=outcome), outcome=Outcome.FAILED, tell=tell)

    def _relay(self, errand: _Errand, attempt: Attempt, outgoing: Outgoing) -> Relay:
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

    def _headers(self, errand: _Errand, pick: Pick) -> tuple[tuple[str, str], ...]:
        if not self._decision_headers:
            return ()
        return decision_headers(pick, errand.course.attempts, errand.course.rule.entry)

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


def _held(answer: Opening, verdict: Verdict, relay: Relay, outgoing: UpstreamRequest, errand: _Errand) -> _Failure:
    """An error that was answered, kept until it is known whether the client gets it."""

    async def tell() -> None:
        errand.clock.limit(errand.stream, outgoing.timeout_s)
        await relay.run(answer)

    return _Failure(verdict=verdict, outcome=verdict.outcome, tell=tell)


def _too_late() -> DeadlineError:
    return DeadlineError("no answer came in the time that the client, or the provider, gives to it")


def _now_ms() -> int:
    return round(time.time() * 1000)
