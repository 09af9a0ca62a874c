"""A collector of traces for tests: a real HTTP server that takes OTLP as exporters send it, and decodes it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import msgspec
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.actors import Received, read_request, served


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A span as it came. Ids are in hexadecimal digits, `parent` is empty for none."""

    name: str
    kind: str
    trace: str
    id: str
    parent: str
    state: str
    attributes: dict[str, Any]
    events: list[str]
    status: str
    began_ns: int
    ended_ns: int
    resource: dict[str, Any]
    scope: str
    schema: str


class Collector:
    """Keeps the spans that come, in order; `status` is what it answers, `gate` lets it answer at all."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.requests: list[Received] = []
        self.raw = b""
        self.status = 200
        self.gate = asyncio.Event()
        self.gate.set()
        self.came = asyncio.Event()
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Collector]:
        """Serves on a free port until the block ends."""
        async with served(self._connection) as port:
            self.url = f"http://127.0.0.1:{port}"
            yield self

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while request := await read_request(reader):
                self.requests.append(request)
                self.came.set()
                await self.gate.wait()
                if self.status == 200:
                    self.raw += request.body
                    self.spans += spans_in(request.body)
                writer.write(b"HTTP/1.1 %d Whatever\r\nContent-Length: 0\r\n\r\n" % self.status)
                await writer.drain()

    def of(self, kind: str) -> list[Span]:
        """The spans of a kind, `SERVER` or `CLIENT`."""
        return [span for span in self.spans if span.kind == kind]


def spans_in(body: bytes) -> list[Span]:
    """The spans of an export."""
    found = []
    for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        for of_scope in of_resource.scope_spans:
            found += [
                Span(
                    name=span.name,
                    kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    state=span.trace_state,
                    attributes=_values(span.attributes),
                    events=[event.name for event in span.events],
                    status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
                    began_ns=span.start_time_unix_nano,
                    ended_ns=span.end_time_unix_nano,
                    resource=_values(of_resource.resource.attributes),
                    scope=of_scope.scope.name,
                    schema=of_scope.schema_url,
                )
                for span in of_scope.spans
            ]
    return found


def _values(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind) if kind else None
