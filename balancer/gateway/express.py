"""The express way of the lane: the usual request, from its last byte to its answer's, in a few callbacks and no task.

Usual is a JSON request for a model, of a rule whose pool answers, to an upstream with an idle connection, and a JSON
answer without an error, or a stream of whole events whose client keeps up with it. At whatever else happens the
ordinary way takes over, from where the request stands: what was picked, sent or answered until then is not done again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import msgspec

from balancer import bodies, log
from balancer.bodies import Peek
from balancer.dialects import Headers
from balancer.dialects.headers import LIST_NOTHING, NOT_DOWN, OURS, client_timeout_s
from balancer.dialects.paths import Route
from balancer.domain import Outcome
from balancer.encoding import Decoder
from balancer.errors import BalancerError
from balancer.gateway.attempts import Attempt
from balancer.gateway.clock import CLIENT_MARGIN_S
from balancer.gateway.events import EventRelay, takes_none
from balancer.gateway.forwarding import Begun, Forwarder, reserved
from balancer.gateway.handlers import Handlers
from balancer.gateway.lane import Lane, request_of
from balancer.gateway.lane_head import Head
from balancer.gateway.lane_stream import CONTROLS, LaneStream, address_of, date
from balancer.gateway.masking import Mask
from balancer.gateway.matching import Plan, Plans
from balancer.gateway.messages import ClientRequest
from balancer.gateway.opening import begins_well, described, says_error
from balancer.gateway.outgoing import LOOK_AGAIN_S, Account, Outgoing, lacks_usage
from balancer.gateway.request_ids import new_request_id, request_id_of
from balancer.gateway.rewriting import Rewriter
from balancer.gateway.telling import header_text
from balancer.gateway.upstream import UpstreamClient
from balancer.gateway.upstream.answer import Answer
from balancer.gateway.upstream.client import Prepared
from balancer.gateway.witness import Watch, Witness
from balancer.metrics import Metrics
from balancer.sessions import session_of
from balancer.store.balance import Balance
from balancer.store.pool import Asked
from balancer.usage import usage_of

_KEPT_PATHS = ("/v1/responses",)
"""What is asked for there goes on from answers, and is kept."""
_LATE_S = 0.05
"""What has taken so long to be picked for has less time left than its like."""
_WHOLE_BYTES = 48 * 1024
_HEAD_BYTES = 12 * 1024
"""Of an answer beyond these a client might be too slow to take all at once.

Within, its transport holds what the client does not take, and does not ask us to wait: nobody would.
"""
_SERVICES_KEPT = 64
_PASSES, _HIDES = Rewriter("", hides_usage=False), Rewriter("", hides_usage=True)
_CLOSING = "Connection: close\r\n"


class _Sent(msgspec.Struct, frozen=True, gc=False):
    """What all requests with one head have in common on their way to a service."""

    plan: Plan
    account: Account
    outgoing: Outgoing
    prepared: Prepared
    telling: str
    """The header that tells the client where its request went, empty when it is not told."""


class _Approach:
    """What a client's head says, found out once; `first` tells it from another. Without a `route` it is not for us."""

    __slots__ = ("client", "first", "patience_s", "request", "route", "sent")

    def __init__(self, request: ClientRequest, route: Route | None, patience_s: float | None, client: str) -> None:
        self.first = request.first
        self.request = request
        self.route = route
        self.patience_s = patience_s
        self.sent: dict[tuple[str, bool], _Sent] = {}
        self.client = client
        """Its address, where that is told."""


class Express:
    """Begins what the lane gives it."""

    def __init__(
        self,
        handlers: Handlers,
        forwarder: Forwarder,
        balance: Balance,
        upstream: UpstreamClient,
        plans: Plans,
        metrics: Metrics,
        *,
        opened: Callable[[], None],
        closed: Callable[[], None],
        decision_headers: bool,
        way: type[Way] | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`opened` and `closed` are called for each request that is answered here.

        `way`: another kind of them, which tells `watch` of what was answered.
        """
        self.handlers = handlers
        self.forwarder = forwarder
        self.balance = balance
        self.upstream = upstream
        self.metrics = metrics
        self.preparer = forwarder.preparer
        self.opened = opened
        self.closed = closed
        self.decision_headers = decision_headers
        self._plans = plans
        self._way = way or Way
        self.watch = watch
        self.loop = asyncio.get_running_loop()

    def begin(self, lane: Lane, head: Head, body: bytes, is_last: bool) -> Way | None:
        """Begins to answer a request; None for one that is for the ordinary way, from its start."""
        approach = lane.kept
        if not isinstance(approach, _Approach) or approach.first is not head.first:
            approach = lane.kept = self._approach(head, lane)
        route = approach.route
        transport = lane.transport
        if route is None or transport is None or transport.get_write_buffer_size():
            return None
        given = head.first.get("x-request-id", "")
        request_id = request_id_of(given) if given else new_request_id()
        try:
            peek = bodies.peek(body)
            plan = self._plans.matching(route.scenario, peek.model)
            is_smart = False
            if plan is not None and plan.router is not None:
                is_smart = True
                plan = self._plans.routed(plan, peek, request_id=request_id)
        except BalancerError:
            return None
        if plan is None or not plan.is_usual or (plan.apart[route.api] and plan.is_apart(route.api, body)):
            return None
        patience_s = approach.patience_s
        if patience_s is not None and patience_s < plan.patience_s:
            return None
        way = self._way(self, lane, approach, route, head, body, peek, plan, is_last, time.monotonic(), request_id)
        rule = plan.rule
        way.asked = self.balance.begin(
            rule,
            reserved(plan, peek, body) if plan.needs_estimate else 0,
            plan.deadline_ms,
            session_of(rule, head.first, peek) if rule.session_affinity else "",
            way.picked,
        )
        if way.asked is None:
            return None
        if is_smart:
            self.metrics.routed(rule)
        self.opened()
        return way

    def _approach(self, head: Head, lane: Lane) -> _Approach:
        request = request_of(head, b"", "")
        route = self.handlers.may_pass(request)
        if route is not None and route.path in _KEPT_PATHS:
            route = None
        client = address_of(lane.transport) if self.watch is not None else ""
        return _Approach(request, route, client_timeout_s(head.first), client)

    def sent(self, way: Way, route: Route, plan: Plan, service: str, now: float) -> _Sent | None:
        """How a request of that kind goes to a service of the plan. Raises BalancerError."""
        approach = way.approach
        without_usage = bool(way.peek.stream) and lacks_usage(route, way.peek)
        key = (service, without_usage)
        sent = approach.sent.get(key)
        if sent is not None and sent.plan is plan and now - sent.account.looked_at < LOOK_AGAIN_S:
            return sent
        account = self.preparer.account(service)
        if sent is not None and sent.plan is plan and sent.account is account:
            return sent
        outgoing = self.preparer.common(approach.request, route, service, account, lacks_usage=without_usage)
        prepared = self.upstream.prepared(outgoing.request) if outgoing is not None else None
        if outgoing is None or prepared is None:
            return None
        if len(approach.sent) >= _SERVICES_KEPT:
            approach.sent.clear()
        telling = ""
        if self.decision_headers:
            entry = f"x-balancer-entry: {header_text(plan.rule.entry)}\r\n" if plan.rule.entry else ""
            telling = f"x-balancer-service: {header_text(service)}\r\n{entry}"
        sent = approach.sent[key] = _Sent(plan, account, outgoing, prepared, telling)
        return sent


class Way(msgspec.Struct, eq=False):
    """One request on its way, and how far it has come: `cancel` when its client has left."""

    express: Express
    lane: Lane
    approach: _Approach
    route: Route
    head: Head
    body: bytes
    peek: Peek
    plan: Plan
    is_last: bool
    began: float
    request_id: str
    asked: Asked | None = None
    """Until there is a pick."""
    attempt: Attempt | None = None
    sent: _Sent | None = None
    """Once something was sent."""
    answer: Answer | None = None
    head_out: bytes = b""
    body_out: bytes = b""
    stream: LaneStream | None = None
    events: EventRelay | None = None
    """Once the client was sent something of a stream."""
    task: asyncio.Task[None] | None = None
    """Once the ordinary way has it."""
    is_settling: bool = False
    """While a stream's last event waits for that."""
    is_over: bool = False
    is_counted: bool = False
    select_s: float = 0.0
    overhead_s: float = 0.0
    attempt_s: float = 0.0
    more: bytes = b""
    """Lines of the head that go upstream with this request alone."""

    def cancel(self) -> None:
        """The client has left: what was picked for it is settled, and its answer ended."""
        if self.is_over:
            return
        if self.task is not None:
            self.task.cancel()  # It has not begun: from then on it is the lane's work itself.
        try:
            self._drop(Outcome.CANCELLED)
        finally:
            self._end(Outcome.CANCELLED, is_whole=False)

    def _drop(self, outcome: Outcome) -> None:
        """Settles what was picked, and ends its answer."""
        if self.answer is not None:
            self.answer.leave()
            self.answer.abandon("was cancelled")
        if self.attempt is not None:
            self.attempt.settle(outcome)
        elif self.asked is not None:
            self.express.balance.give_up(self.plan.rule, self.asked)

    def _count(self) -> None:
        """Counts what was done so far of a request that does not go as usual to its end."""
        if self.is_counted:
            return
        self.is_counted = True
        attempt, asked, metrics = self.attempt, self.asked, self.express.metrics
        if attempt is None:
            if asked is not None and asked.answer is not None:
                metrics.select_s(self.plan.rule.pool, time.monotonic() - asked.asked_at)
            return
        metrics.select_s(attempt.pick.pool, self.select_s)
        metrics.picked(attempt.pick)
        if self.sent is not None:
            metrics.overhead_s(self.overhead_s)
        if self.attempt_s:
            metrics.settled(attempt.pick, Outcome.SUCCESS, attempt.usage, self.attempt_s, attempt.trace_id)

    def _end(self, outcome: Outcome, *, is_whole: bool) -> None:
        """The request is answered, or never will be."""
        self.is_over = True
        express = self.express
        try:
            self._count()
            express.metrics.request(
                self.route.scenario,
                self.plan.rule.uuid,
                outcome,
                time.monotonic() - self.began,
                self.attempt.pick if self.attempt is not None else None,
                self.attempt.trace_id if self.attempt is not None else "",
            )
        finally:
            express.closed()
            self.lane.answered(is_whole=is_whole, is_last=self.is_last)

    def _go_on(self, error: Exception | None = None) -> None:
        """Leaves the rest to the ordinary way."""
        self._count()
        if self.answer is not None:
            self.answer.leave()
        lane, express = self.lane, self.express
        request = request_of(self.head, self.body, self.request_id)
        request.witness = self.witness(request)
        stream = self.stream or lane.stream(self.request_id, is_last=self.is_last)
        begun = Begun(
            rule=self.plan.rule,
            peek=self.peek,
            clock=express.forwarder.clock(request, self.began),
            asked=self.asked,
            attempt=self.attempt,
            outgoing=self.sent.outgoing if self.sent is not None else None,
            answer=self.answer,
            events=self.events,
            error=error,
        )

        async def resume() -> None:
            lane.work = task
            try:
                await express.handlers.handle(request, stream, begun)
            finally:
                express.closed()
                if begun.attempt is not None:
                    begun.attempt.settle(Outcome.FAILED)  # Unless it was, as it is by all that gets so far.

        self.task = task = lane.task(request, stream, resume)

    def witness(self, request: ClientRequest) -> Witness | None:
        """Who tells of the request from now on, which is not over."""
        return None

    def facts(self) -> dict[str, str]:
        """What every line of the log about it says."""
        return {"request": self.request_id}

    # -- callbacks -----------------------------------------------------------------------------------------------------

    def picked(self, asked: Asked) -> None:
        """Sends the request to the service that was picked."""
        try:
            if not self._send(asked):
                self._go_on()
        except Exception as exc:  # noqa: BLE001 - a root: who calls has nothing to do with it; the ordinary way tells.
            self._fail(exc)

    def _fail(self, exc: Exception) -> None:
        """Lets the ordinary way tell of a fault of ours; where that is at fault too, the client's connection breaks."""
        try:
            try:
                self._drop(Outcome.FAILED)
            finally:
                self._go_on(exc)
        except Exception as more:  # noqa: BLE001 - who calls has others to call.
            log.error("a request failed in the gateway", exc=more, **self.facts())
            if self.task is None:
                self._break_off()

    def _break_off(self) -> None:
        """Ends what has no answer, unless one is on its way already."""
        if not self.is_over:
            with contextlib.suppress(Exception):  # Something else of it was logged.
                self._end(Outcome.FAILED, is_whole=False)

    def _send(self, asked: Asked) -> bool:
        express, plan = self.express, self.plan
        pick = express.balance.finish(plan.rule, asked)
        if pick is None:
            return False
        self.attempt = Attempt(express.balance, express.metrics, plan.rule, pick)
        self.asked = None
        now = time.monotonic()
        self.select_s = now - asked.asked_at
        elapsed_s = self.overhead_s = now - self.began
        if elapsed_s > _LATE_S:
            return False
        try:
            sent = express.sent(self, self.route, plan, pick.service, now)
        except BalancerError:
            return False  # It comes again, and is told.
        if sent is None:
            return False
        service = pick.service
        model = service[service.index(":") + 1 :]
        body = bodies.replace_model(self.body, model, self.peek)
        if sent.outgoing.hides_usage:
            body = bodies.ask_for_usage(body, self.peek)
        lines = b"%bx-request-id: %b\r\nContent-Length: %d\r\n\r\n" % (
            self.more,
            self.request_id.encode("ascii"),
            len(body),
        )
        began_at = express.loop.time() - elapsed_s
        self.answer = express.upstream.begin(sent.prepared, lines, body, began_at, self._on_news)
        if self.answer is None:
            return False
        self.sent = sent
        return True

    def _on_news(self) -> None:
        """Settles when the whole answer has come; what is a stream passes."""
        try:
            answer = self.answer
            assert answer is not None, "it is what there is news of"
            if self.events is not None:
                if not self._pass(answer, self.events):
                    self._go_on()
            elif answer.status == 200 and not answer.has_failed:
                is_stream = self.peek.stream and described(answer.headers)[0].startswith("text/event-stream")
                if not (self._open(answer) if is_stream else self._settle(answer)):
                    self._go_on()
            elif answer.status or answer.has_failed:
                self._go_on()
        except Exception as exc:  # noqa: BLE001 - as above.
            self._fail(exc)

    def _settle(self, answer: Answer) -> bool:
        attempt, sent = self.attempt, self.sent
        assert attempt is not None, "an answer is of an attempt"
        assert sent is not None, "which was sent"
        body = answer.whole()
        if body is None:
            if answer.is_over or answer.held_bytes > _WHOLE_BYTES or "json" not in described(answer.headers)[0]:
                return False
            if answer.beginning and not answer.beginning.startswith(b"{"):
                return False  # It may be spaces, sent in the meantime for somebody who would not wait so long.
            answer.expect_more()
            return True
        if len(body) > _WHOLE_BYTES or not body.startswith(b"{") or says_error(body):
            return False
        telling = self._telling(attempt, sent)
        head = answer_head(
            answer.headers,
            telling,
            self.request_id,
            f"Content-Length: {len(body)}",
            sent.outgoing.mask,
            is_last=self.is_last,
        )
        if head is None or len(head) > _HEAD_BYTES:
            return False
        answer.on_news = None
        attempt.usage = usage_of(body)
        self.attempt_s = attempt.end(Outcome.SUCCESS)
        self.head_out, self.body_out = head, body
        self.express.balance.when_flushed(attempt.pick.pool, self._tell)
        return True

    def _telling(self, attempt: Attempt, sent: _Sent) -> str:
        if not sent.telling:
            return ""
        return f"x-balancer-decision: {attempt.pick.decision}\r\n{sent.telling}x-balancer-attempts: 1\r\n"

    def _tell(self) -> None:
        """Sends the answer to the client."""
        if self.is_over:
            return
        try:
            attempt, transport = self.attempt, self.lane.transport
            assert attempt is not None, "an answer is of an attempt"
            attempt.log(self.request_id)
            if transport is None or transport.is_closing():
                self._end(Outcome.CANCELLED, is_whole=False)
                return
            self.lane.write(transport, self.head_out, self.body_out)
            self._arrive(attempt)
        except Exception as exc:  # noqa: BLE001 - as above.
            log.error("a request failed in the gateway", exc=exc, **self.facts())
            self._break_off()

    # -- streams -------------------------------------------------------------------------------------------------------

    def _open(self, answer: Answer) -> bool:
        """Begins a stream's answer with the first whole event; False, with nothing done, for the ordinary way."""
        attempt, sent = self.attempt, self.sent
        assert attempt is not None, "an answer is of an attempt"
        assert sent is not None, "which was sent"
        chunk = answer.held()
        if not chunk:
            if answer.is_over:
                return False
            answer.watch(takes_none)
            return True
        if not begins_well(chunk) or self.lane.is_held_up:
            return False
        outgoing, telling = sent.outgoing, self._telling(attempt, sent)
        head = answer_head(
            answer.headers,
            telling,
            self.request_id,
            "Transfer-Encoding: chunked",
            outgoing.mask,
            is_last=self.is_last,
            kind="event-stream",
        )
        if head is None:
            return False
        stream = self.lane.stream(self.request_id, is_last=self.is_last)
        # What is written waits for no longer than on the ordinary way: then the attempt would be taken for lost.
        stream.give_until(self.began + outgoing.request.timeout_s + CLIENT_MARGIN_S)
        dialect, path = self.route.dialect, self.route.path
        events = EventRelay(
            attempt=attempt,
            stream=stream,
            decoder=Decoder(""),
            rewriter=_HIDES if outgoing.hides_usage else _PASSES,
            mask=outgoing.mask,
            style=dialect.name,
            path=path,
            error_event=lambda error: dialect.error_event(error, path),
        )
        stream.begin(head)
        self.stream, self.events = stream, events
        return self._pass(answer, events)

    def _pass(self, answer: Answer, events: EventRelay) -> bool:
        """Sends on what has come of a stream; False, with nothing of it lost, for the ordinary way."""
        if self.is_settling:
            return True
        chunk = answer.held()
        if chunk:
            if not events.hear(chunk):
                return False
            answer.skip()
            attempt = self.attempt
            assert attempt is not None, "an answer is of an attempt"
            if events.is_complete and attempt.outcome is None:
                self.attempt_s = attempt.end(Outcome.SUCCESS)
                self.is_settling = True
                self.express.balance.when_flushed(attempt.pick.pool, self._tell_rest)
                return True
        return self._send_on(answer, events)

    def _tell_rest(self) -> None:
        """Sends the client what was held back until its attempt was settled."""
        if self.is_over or not self.is_settling or self.task is not None:
            return
        self.is_settling = False
        try:
            assert self.answer is not None, "it was settled"
            assert self.events is not None, "behind its last event"
            if not self._send_on(self.answer, self.events):
                self._go_on()
        except Exception as exc:  # noqa: BLE001 - as above.
            self._fail(exc)

    def _send_on(self, answer: Answer, events: EventRelay) -> bool:
        """Sends what is put aside, and the stream's end if it has come; False for the ordinary way."""
        attempt, stream = self.attempt, self.stream
        assert attempt is not None, "an answer is of an attempt"
        assert stream is not None, "which has begun"
        if answer.is_at_end and events.is_complete:
            if not stream.end_now(events.put_aside()):
                return False
            answer.leave()
            attempt.log(self.request_id)
            self._arrive(attempt)
            return True
        if answer.is_over or answer.has_failed or not events.send_now():
            return False
        if answer.held():
            return self._pass(answer, events)
        answer.watch(events.take)
        return True

    def _arrive(self, attempt: Attempt) -> None:
        """The client has its answer."""
        self.is_over = True
        express, pick, usage = self.express, attempt.pick, attempt.usage
        try:
            express.metrics.answered(
                (
                    (self.route.scenario, pick.pool, pick.rule, pick.service, pick.reason),
                    usage.input if usage is not None else 0,
                    usage.output if usage is not None else 0,
                    pick.is_switch,
                    self.select_s,
                    self.overhead_s,
                    self.attempt_s,
                    time.monotonic() - self.began,
                    pick,
                    attempt.trace_id,
                ),
                usage,
            )
            if pick.is_saved:
                express.metrics.saved_switch(pick)
        finally:
            express.closed()
            self.lane.answered(is_whole=True, is_last=self.is_last)


class _Shape(msgspec.Struct, frozen=True, gc=False):
    """What an upstream's headers come down as, by their names: `lines` are to be filled with their values in order.

    The places of Content-Type and of Connection among them, -1 for none. `lines` are empty where more is to be done.
    """

    lines: str
    count: int
    type_at: int
    connection_at: int


_SHAPES_KEPT = 256
_shapes: dict[tuple[str, ...], _Shape] = {}
"""By the names as the upstream spells them; they recur."""


def _shape_of(names: tuple[str, ...]) -> _Shape:
    lower = [name.lower() for name in names]
    lines, count = "", 0
    for name, low in zip(names, lower, strict=True):
        if low in NOT_DOWN or low.startswith(OURS):
            lines += "%.0s"  # The value, cut to nothing.
            continue
        lines += f"{'x-upstream-request-id' if low == 'x-request-id' else name.replace('%', '%%')}: %s\r\n"
        count += 1
    is_usual = lower.count("content-type") == 1 and lower.count("connection") <= 1 and "content-encoding" not in lower
    shape = _Shape(
        lines if is_usual else "",
        count,
        lower.index("content-type") if is_usual else -1,
        lower.index("connection") if "connection" in lower else -1,
    )
    if len(_shapes) >= _SHAPES_KEPT:
        _shapes.clear()
    _shapes[names] = shape
    return shape


def answer_head(
    headers: Headers,
    telling: str,
    request_id: str,
    framing: str,
    mask: Mask,
    *,
    is_last: bool,
    kind: str = "json",
) -> bytes | None:
    """The head of a plain answer, by the rules of `dialects.headers.response_headers` and `lane_stream.answer_head`.

    None for one that is not of that `kind`, or coded, or whose head needs more than to be passed on. `framing` is the
    header that tells where the body ends.
    """
    if not headers:
        return None
    names, values = zip(*headers)  # noqa: B905 - pairs; `strict` would take as long again.
    shape = _shapes.get(names) or _shape_of(names)
    if not shape.lines or kind not in values[shape.type_at].lower():
        return None
    if shape.connection_at >= 0 and values[shape.connection_at] not in LIST_NOTHING:
        return None
    text = (
        f"HTTP/1.1 200 OK\r\n{shape.lines % values}{telling}x-request-id: {request_id}\r\n"
        f"{framing}\r\nDate: {date()}\r\n{_CLOSING if is_last else ''}\r\n"
    )
    if mask.shows_in_text(text):
        return None
    head = text.encode("utf-8", "ignore")
    # All control characters in it must be the line ends that were meant.
    told = (3 + ("\nx-balancer-entry:" in telling)) if telling else 0
    lines = 5 + shape.count + told + is_last
    return head if len(head) - len(head.translate(None, CONTROLS)) == 2 * lines else None
