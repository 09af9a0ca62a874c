"""Traces by OpenTelemetry: a span for each request, one for each attempt, exported by a thread of its own.

The packages are imported where tracing is turned on, and nowhere else. A request draws the ids of its spans and asks
the sampler when it begins; its spans are made when it is over, out of what is known of it then.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING

from balancer import __version__, log
from balancer.dialects import Headers
from balancer.domain import Provider
from balancer.errors import ConfigurationError
from balancer.semconv import (
    CONVENTIONS,
    FIRST_TOKEN,
    Conventions,
    Peer,
    Told,
    attempt_attributes,
    attempt_name,
    is_attempt_fault,
    is_request_fault,
    peer_of,
    request_attributes,
    request_name,
)

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import Event, SpanProcessor, TracerProvider
    from opentelemetry.trace import SpanContext, TraceState

CONTEXT_HEADERS = frozenset(["traceparent", "tracestate", "baggage"])
"""What a client says of its trace: it ends here, where a trace of ours goes on. Baggage is for no vendor to read."""
_PEERS_KEPT = 1024


class Trace:
    """A request's place in its trace; `parent` is the client's span, if it has told one."""

    __slots__ = ("_tracing", "is_sampled", "name", "parent", "span_id", "state", "trace_id")

    def __init__(
        self, tracing: Tracing, trace_id: int, parent: SpanContext | None, state: TraceState | None, *, is_sampled: bool
    ) -> None:
        self._tracing = tracing
        self.trace_id = trace_id
        self.parent = parent
        self.state = state
        self.is_sampled = is_sampled
        self.span_id = tracing.new_span_id()

    @property
    def id(self) -> str:
        """The trace's id where its spans are kept, else empty: what a log line or an exemplar can name."""
        return f"{self.trace_id:032x}" if self.is_sampled else ""

    def new_span_id(self) -> int:
        """The id of an attempt's span; where none is kept, the request's."""
        return self._tracing.new_span_id() if self.is_sampled else self.span_id

    def headers(self, span_id: int) -> Headers:
        """What tells an upstream of the span that asks it (W3C Trace Context §3)."""
        parent = ("traceparent", f"00-{self.trace_id:032x}-{span_id:016x}-{self.is_sampled:02x}")
        return (parent, ("tracestate", self.state.to_header())) if self.state else (parent,)

    def end(self, told: Told) -> None:
        """Makes the spans of a request that is over, if they are kept."""
        if self.is_sampled:
            self._tracing.end(self, told)


class Tracing:
    """Makes traces. `provider` finds a provider by its uuid."""

    def __init__(
        self,
        sdk: SimpleNamespace,
        tracer_provider: TracerProvider,
        processor: SpanProcessor,
        names: Conventions,
        provider: Callable[[str], Provider | None],
    ) -> None:
        self._sdk = sdk
        self._processor = processor
        self._resource: Resource = tracer_provider.resource
        self._sample = tracer_provider.sampler.should_sample
        self.new_span_id = tracer_provider.id_generator.generate_span_id
        self._new_trace_id = tracer_provider.id_generator.generate_trace_id
        self._names = names
        self._scope = sdk.InstrumentationScope("balancer", __version__, names.schema_url)
        self._provider = provider
        self._peers: dict[str, tuple[Provider, Peer]] = {}
        self._root = sdk.Context()

    def begin(self, first: Mapping[str, str], state: str) -> Trace:
        """The trace of a request: its client's, where that has told it. One that is not kept, where that goes wrong.

        `first` has the first value of each header by its name in lower case; `state` all values of `tracestate`.
        """
        try:
            return self._begin(first, state)
        except Exception as exc:  # noqa: BLE001 - samplers and propagators may be anybody's, and a request is no less one.
            log.error("a trace could not begin", exc=exc)
            return Trace(self, self._new_trace_id(), None, None, is_sampled=False)

    def _begin(self, first: Mapping[str, str], state: str) -> Trace:
        sdk = self._sdk
        context: Context = self._root
        parent: SpanContext | None = None
        trace_id = 0
        if "traceparent" in first:
            carrier = {"traceparent": first["traceparent"], "tracestate": state}
            context = sdk.propagator.extract(carrier, self._root)
            told: SpanContext = sdk.get_current_span(context).get_span_context()
            if told.is_valid:
                parent, trace_id = told, told.trace_id
        trace_id = trace_id or self._new_trace_id()
        result = self._sample(context, trace_id, "request", sdk.SERVER)
        return Trace(self, trace_id, parent, result.trace_state, is_sampled=result.decision is sdk.RECORD_AND_SAMPLE)

    def end(self, trace: Trace, told: Told) -> None:
        """Makes the spans of a request that is over. They are exported some time soon."""
        sdk, ended_ns = self._sdk, time.time_ns()
        began_ns = ended_ns - _ns(told.duration_s)
        own = sdk.SpanContext(trace.trace_id, trace.span_id, False, sdk.SAMPLED, trace.state)
        for number, tried in enumerate(told.tried, 1):
            sent_ns = ended_ns - _ns(tried.began_s)
            events: tuple[Event, ...] = ()
            if tried.first_token_s:
                events = (sdk.Event(FIRST_TOKEN, {}, timestamp=sent_ns + _ns(tried.first_token_s)),)
            self._processor.on_end(
                sdk.ReadableSpan(
                    name=attempt_name(told, tried),
                    context=sdk.SpanContext(trace.trace_id, tried.span_id, False, sdk.SAMPLED, trace.state),
                    parent=own,
                    resource=self._resource,
                    attributes=attempt_attributes(told, tried, number, self._peer(tried.service), self._names),
                    events=events,
                    kind=sdk.CLIENT,
                    status=sdk.FAILED if is_attempt_fault(tried) else sdk.UNSET,
                    start_time=sent_ns,
                    end_time=sent_ns + _ns(tried.duration_s),
                    instrumentation_scope=self._scope,
                )
            )
        self._processor.on_end(
            sdk.ReadableSpan(
                name=request_name(told),
                context=own,
                parent=trace.parent,
                resource=self._resource,
                attributes=request_attributes(told),
                kind=sdk.SERVER,
                status=sdk.FAILED if is_request_fault(told) else sdk.UNSET,
                start_time=began_ns,
                end_time=ended_ns,
                instrumentation_scope=self._scope,
            )
        )

    def close(self) -> threading.Event:
        """Begins to export what is left, and ends then; set when it is done, which an exporter in trouble may delay.

        In a daemon's thread: who ends waits for it as long as he likes, and no longer.
        """
        done = threading.Event()

        def close() -> None:
            try:
                self._processor.shutdown()
            finally:
                done.set()

        threading.Thread(target=close, name="tracing-close", daemon=True).start()
        return done

    def _peer(self, service: str) -> Peer | None:
        provider = self._provider(service.partition(":")[0])
        if provider is None:
            return None
        known = self._peers.get(provider.uuid)
        if known is None or known[0] is not provider:
            if len(self._peers) >= _PEERS_KEPT:
                self._peers.clear()
            known = self._peers[provider.uuid] = provider, peer_of(provider)
        return known[1]


def start(version: str, worker: str, provider: Callable[[str], Provider | None]) -> Tracing:
    """Turns tracing on: where to, what is sampled and what the resource is called say the variables OTEL_*.

    `version` of the semantic conventions; `worker` names this process. Raises ConfigurationError where OpenTelemetry is
    not installed, or its variables are wrong.
    """
    try:
        from opentelemetry.context import Context
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import Decision
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        from opentelemetry.trace.status import Status, StatusCode
    except ImportError as exc:
        raise ConfigurationError(
            f"BALANCER_OTEL: OpenTelemetry is not installed, or only a part of it ({exc.name}): "
            "`pip install 'llm-balancer[otel]'`, or leave it off"
        ) from exc
    log.ignore("opentelemetry.trace.span")  # It would write down each `tracestate` that it cannot read.
    sdk = SimpleNamespace(
        CLIENT=SpanKind.CLIENT,
        Context=Context,
        Event=Event,
        FAILED=Status(StatusCode.ERROR),
        InstrumentationScope=InstrumentationScope,
        # A span that is made when it is over needs no lock, no copy and no processor at its start: a tenth of the time.
        ReadableSpan=ReadableSpan,
        RECORD_AND_SAMPLE=Decision.RECORD_AND_SAMPLE,
        SAMPLED=TraceFlags(TraceFlags.SAMPLED),
        SERVER=SpanKind.SERVER,
        SpanContext=SpanContext,
        UNSET=Status(StatusCode.UNSET),
        get_current_span=get_current_span,
        propagator=TraceContextTextMapPropagator(),
    )
    try:
        tracer_provider = TracerProvider(resource=Resource.create(_own_resource(worker)), shutdown_on_exit=False)
        processor = BatchSpanProcessor(OTLPSpanExporter())
    except ValueError as exc:
        raise ConfigurationError(f"OpenTelemetry refuses its variables OTEL_*: {exc}") from exc
    return Tracing(sdk, tracer_provider, processor, CONVENTIONS[version], provider)


def _own_resource(worker: str) -> dict[str, str]:
    """What the resource is called where the variables do not say: those given here would win over them."""
    said = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    named = {part.partition("=")[0].strip() for part in said.split(",")}
    own = {"service.name": "balancer", "service.version": __version__, "service.instance.id": worker}
    if os.environ.get("OTEL_SERVICE_NAME"):
        named.add("service.name")
    return {name: value for name, value in own.items() if name not in named}


def _ns(seconds: float) -> int:
    return int(seconds * 1_000_000_000)
