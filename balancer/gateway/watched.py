"""The express way where requests are told of: the same, with what the access log and traces want to know."""

from __future__ import annotations

from collections.abc import Sequence

from balancer.domain import Outcome
from balancer.gateway.attempts import Attempt
from balancer.gateway.express import Way
from balancer.gateway.messages import ClientRequest
from balancer.gateway.witness import CLIENT_LEFT, Watch, Witness, follow
from balancer.store.pool import Asked
from balancer.tracing import Trace


class WatchedWay(Way, eq=False):
    """One request on its way, of which is told when it is over."""

    trace: Trace | None = None
    span_id: int = 0

    def witness(self, request: ClientRequest) -> Witness:
        """Who tells of the request from now on, with what was done so far."""
        assert self.express.watch is not None, "or it were a way of the other kind"
        witness = Witness(self.express.watch, request, self.approach.client, self.trace, self.began)
        attempt = self.attempt
        if attempt is not None:
            if self.answer is not None:
                attempt.status = self.answer.status
            if self.attempt_s:
                attempt.duration_s = self.attempt_s
            witness.waited(self.select_s)
            witness.picked(attempt)
        return witness

    def _end(self, outcome: Outcome, *, is_whole: bool) -> None:
        status = self.stream.status if self.stream is not None else 0
        if not status and outcome is Outcome.CANCELLED:
            status = CLIENT_LEFT
        attempt = self.attempt
        if attempt is not None:
            if self.answer is not None:
                attempt.status = self.answer.status
            if self.attempt_s:
                attempt.duration_s = self.attempt_s
        bytes_out = self.stream.body_bytes if self.stream is not None else 0
        self._tell_of((attempt,) if attempt is not None else (), status, outcome, bytes_out)
        Way._end(self, outcome, is_whole=is_whole)

    def _arrive(self, attempt: Attempt) -> None:
        bytes_out = self.stream.body_bytes if self.stream is not None else len(self.body_out)
        self._tell_of((attempt,), 200, Outcome.SUCCESS, bytes_out)
        Way._arrive(self, attempt)

    def _tell_of(self, attempts: Sequence[Attempt], status: int, outcome: Outcome, bytes_out: int) -> None:
        """Tells of the request, which is over."""
        watch = self.express.watch
        assert watch is not None, "or it were a way of the other kind"
        watch.tell(
            self.request_id,
            self.trace,
            self.approach.client,
            "POST",
            self.route.path,
            self.route.scenario,
            self.plan.rule.uuid,
            attempts,
            self.began,
            self.select_s,
            status,
            outcome,
            "",
            len(self.body),
            bytes_out,
            self.attempt_s,
        )


class TracedWay(WatchedWay, eq=False):
    """The same where there are traces: what is sent upstream goes on in one."""

    def __post_init__(self) -> None:
        assert self.express.watch is not None, "or it were a way of the other kind"
        tracing = self.express.watch.tracing
        assert tracing is not None, "likewise"
        first = self.head.first
        state = self.approach.request.joined("tracestate") if "tracestate" in first else ""
        self.trace = trace = tracing.begin(first, state)
        self.span_id = trace.new_span_id()
        lines = "".join([f"{name}: {value}\r\n" for name, value in trace.headers(self.span_id)])
        self.more = lines.encode("ascii")

    def facts(self) -> dict[str, str]:
        """What every line of the log about it says."""
        facts = Way.facts(self)
        return facts | {"trace": self.trace.id} if self.trace is not None and self.trace.is_sampled else facts

    def _arrive(self, attempt: Attempt) -> None:
        attempt.status, attempt.duration_s = 200, self.attempt_s
        if attempt.details is not None and self.body_out:
            attempt.details.read(self.body_out)
        WatchedWay._arrive(self, attempt)

    def _send(self, asked: Asked) -> bool:
        is_sent = Way._send(self, asked)
        if self.trace is not None and self.attempt is not None:
            follow(self.attempt, self.trace, self.span_id)
        return is_sent


def way_of(watch: Watch | None) -> type[Way]:
    """The kind of way of which such a watch, or none, can tell."""
    if watch is None:
        return Way
    return WatchedWay if watch.tracing is None else TracedWay
