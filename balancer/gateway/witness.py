"""What is told of requests when they are over: a line in the access log, and spans.

Where neither is on there is no watch, and nothing here runs. Telling is no part of a request: what goes wrong with it
is logged, and the client has its answer all the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from balancer import log
from balancer.access import AccessLog, Line, stamp
from balancer.details import Details
from balancer.dialects import Headers
from balancer.dialects.paths import shape
from balancer.domain import Outcome, Pick, Usage
from balancer.semconv import Told, Tried
from balancer.tracing import Trace, Tracing

CLIENT_LEFT = 499
"""The status of who left before an answer had begun, as nginx has it."""
_NOTHING_USED = Usage()
_METHODS = frozenset(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"])
_OTHER = "_OTHER"
"""A method that HTTP does not know, of which a client might have made anything (as OpenTelemetry has it)."""


class Tries(Protocol):
    """An attempt, as it is told of."""

    pick: Pick
    outcome: Outcome | None
    usage: Usage | None
    is_stream: bool
    trace_id: str
    span_id: int
    status: int
    fault: str
    cooldown_ms: int
    duration_s: float
    details: Details | None
    api: str

    @property
    def started(self) -> float:
        """When it began, of the monotonic clock."""

    @property
    def first_token_s(self) -> float:
        """Seconds from its begin to the first token, 0 for none."""


class Answered(Protocol):
    """The way back to a client, as it is told of."""

    @property
    def status(self) -> int:
        """What the client was sent, 0 for nothing yet."""

    @property
    def body_bytes(self) -> int:
        """How much of a body it was sent."""


class Asks(Protocol):
    """A request, as it is told of."""

    method: str
    path: str
    body: bytes
    request_id: str

    @property
    def first(self) -> Mapping[str, str]:
        """The first value of each header, by its name in lower case."""

    def joined(self, name: str) -> str:
        """All values of a header as one list."""


class Watch:
    """Tells of requests in the access log, by spans, or both."""

    def __init__(self, access: AccessLog | None, tracing: Tracing | None) -> None:
        self.access = access
        self.tracing = tracing

    def begin(self, request: Asks, client: str, began: float) -> Witness:
        """Looks on from now, or from when the request arrived, of the monotonic clock."""
        trace = self.tracing.begin(request.first, request.joined("tracestate")) if self.tracing is not None else None
        return Witness(self, request, client, trace, began)

    def tell_of_none(self, request: str, client: str, status: int, error: str, bytes_out: int) -> None:
        """Tells of what was no request, and how it was answered."""
        now = time.monotonic()
        self.tell(request, None, client, "", "", "", "", (), now, 0.0, status, Outcome.REJECTED, error, 0, bytes_out)

    def tell(
        self,
        request: str,
        trace: Trace | None,
        client: str,
        method: str,
        path: str,
        scenario: str,
        rule: str,
        attempts: Sequence[Tries],
        began: float,
        select_s: float,
        status: int,
        outcome: str,
        error: str,
        bytes_in: int,
        bytes_out: int,
        upstream_s: float = 0.0,
        uncounted: Sequence[Tried] = (),
    ) -> None:
        """Tells of a request that is over: `path` is what it asked for, `rule` the one that it asked.

        `upstream_s`: how long the last attempt took, where that does not say so itself.
        """
        try:
            duration_s = time.monotonic() - began
            method, path = method if method in _METHODS else _OTHER, shape(path)
            if self.access is not None:
                self.access.write(
                    _line(
                        request,
                        trace.id if trace is not None else "",
                        client,
                        method,
                        path,
                        scenario,
                        rule,
                        attempts,
                        duration_s,
                        select_s,
                        status,
                        outcome,
                        error,
                        bytes_in,
                        bytes_out,
                        upstream_s,
                        uncounted,
                    )
                )
            if trace is not None and trace.is_sampled:
                told = Told(
                    request=request,
                    client=client,
                    method=method,
                    path=path,
                    scenario=scenario,
                    rule=rule,
                    status=0 if status == CLIENT_LEFT else status,
                    outcome=outcome,
                    error=error,
                    duration_s=duration_s,
                    tried=(*(_tried(attempt, began + duration_s) for attempt in attempts), *uncounted),
                )
                trace.end(told)
        except Exception as exc:  # noqa: BLE001 - a root: the request is over, and nothing of it must depend on this.
            log.error("a request could not be told of", exc=exc, request=request)


def _line(
    request: str,
    trace: str,
    client: str,
    method: str,
    path: str,
    scenario: str,
    rule: str,
    attempts: Sequence[Tries],
    duration_s: float,
    select_s: float,
    status: int,
    outcome: str,
    error: str,
    bytes_in: int,
    bytes_out: int,
    upstream_s: float,
    uncounted: Sequence[Tried],
) -> Line:
    """The line of a request; by position, with whole microseconds: by name, or rounded, it would take twice as long."""
    now = stamp(time.time())
    if not attempts:
        service = uncounted[-1].service if uncounted else ""
        return Line(
            now,
            request,
            client,
            method,
            path,
            status,
            outcome,
            int(duration_s * 1_000_000) / 1000,
            bytes_in,
            bytes_out,
            len(uncounted),
            is_stream=False,
            scenario=scenario,
            rule=rule,
            service=service,
            select_ms=int(select_s * 1_000_000) / 1000 if select_s else None,
            error=error,
            trace=trace,
        )
    last = attempts[-1]
    pick, usage, first_token_s = last.pick, last.usage or _NOTHING_USED, last.first_token_s
    return Line(
        now,
        request,
        client,
        method,
        path,
        status,
        outcome,
        int(duration_s * 1_000_000) / 1000,
        bytes_in,
        bytes_out,
        len(attempts),
        last.is_stream,
        scenario,
        rule,
        pick.rule if pick.rule != rule else "",
        pick.pool,
        pick.service,
        pick.decision,
        usage.input,
        usage.output,
        usage.cached,
        usage.cache_creation,
        usage.reasoning,
        int(select_s * 1_000_000) / 1000,
        int((upstream_s or last.duration_s) * 1_000_000) / 1000,
        int(first_token_s * 1_000_000) / 1000 if first_token_s else None,
        pick.is_local,
        error,
        trace,
        pick.entry,
    )


def _tried(attempt: Tries, ended: float) -> Tried:
    return Tried(
        span_id=attempt.span_id,
        service=attempt.pick.service,
        began_s=ended - attempt.started,
        duration_s=attempt.duration_s,
        pick=attempt.pick,
        outcome=attempt.outcome or "",
        status=attempt.status,
        fault=attempt.fault,
        cooldown_ms=attempt.cooldown_ms,
        is_stream=attempt.is_stream,
        first_token_s=attempt.first_token_s,
        usage=attempt.usage,
        details=attempt.details,
        api=attempt.api,
    )


def follow(attempt: Tries, trace: Trace, span_id: int) -> None:
    """Has an attempt listened to for its span, where that is kept."""
    attempt.span_id = span_id
    if trace.is_sampled:
        attempt.trace_id = trace.id
        attempt.details = Details()


class Witness:
    """What becomes of one request on the ordinary way."""

    __slots__ = (
        "_attempts",
        "_began",
        "_bytes_in",
        "_client",
        "_request",
        "_select_s",
        "_sent_at",
        "_span_id",
        "_trace",
        "_uncounted",
        "_watch",
        "error",
    )

    def __init__(self, watch: Watch, request: Asks, client: str, trace: Trace | None, began: float) -> None:
        self._watch = watch
        self._request = request.request_id, request.method, request.path
        self._bytes_in = len(request.body)
        self._client = client
        self._trace = trace
        self._began = began
        self._select_s = self._sent_at = 0.0
        self._attempts: list[Tries] = []
        self._uncounted: list[Tried] = []
        self._span_id = trace.span_id if trace is not None else 0
        self.error = ""
        """The code of what the client was told by us."""

    @property
    def trace_id(self) -> str:
        """The trace's id, empty where its spans are not kept."""
        return self._trace.id if self._trace is not None else ""

    @property
    def headers(self) -> Headers:
        """What tells the upstream that is asked next of its span."""
        return self._trace.headers(self._span_id) if self._trace is not None else ()

    def waited(self, seconds: float) -> None:
        """Notes how long a selection took."""
        self._select_s += seconds

    def picked(self, attempt: Tries) -> None:
        """Notes an attempt, which is told of as it stands at the end."""
        self._attempts.append(attempt)
        trace = self._trace
        if trace is not None:
            if not attempt.span_id:
                follow(attempt, trace, trace.new_span_id())
            self._span_id = attempt.span_id

    def asks(self) -> None:
        """Notes that a service is asked which no tactic has picked."""
        self._sent_at = time.monotonic()
        if self._trace is not None:
            self._span_id = self._trace.new_span_id()

    def asked(self, service: str, status: int, fault: str) -> None:
        """Notes how that ended: its status, 0 without an answer, and the code of an error of ours."""
        now = time.monotonic()
        self._uncounted.append(
            Tried(
                span_id=self._span_id,
                service=service,
                began_s=now - self._sent_at,
                duration_s=now - self._sent_at,
                status=status,
                fault=fault,
            )
        )

    def ended(self, scenario: str, rule: str, outcome: Outcome, stream: Answered) -> None:
        """Tells of it."""
        status = stream.status
        if not status and outcome is Outcome.CANCELLED:
            status = CLIENT_LEFT
        self._watch.tell(
            self._request[0],
            self._trace,
            self._client,
            self._request[1],
            self._request[2],
            scenario,
            rule,
            self._attempts,
            self._began,
            self._select_s,
            status,
            outcome,
            self.error,
            self._bytes_in,
            stream.body_bytes,
            uncounted=self._uncounted,
        )
