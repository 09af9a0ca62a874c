"""aiohttp's server as strangers may meet it: what is no request gets an error in JSON, and none of it reaches a log.

aiohttp logs a malformed request with the bytes that it stumbled over, which may be a credential or a prompt.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpProcessingError, HttpVersion, HttpVersion10, HttpVersion11, RawRequestMessage
from aiohttp.streams import StreamReader

from balancer import log
from balancer.dialects.openai import OPENAI
from balancer.errors import BalancerError, RequestError
from balancer.gateway.accepting import Acceptor
from balancer.gateway.lane import SLOW_S, Lanes
from balancer.gateway.lane_stream import address_of
from balancer.gateway.request_ids import new_request_id
from balancer.gateway.witness import Watch

BACKLOG = 1024
"""Connections that may wait to be accepted."""

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class _NoMalformedRequests(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError))


QUIET = logging.getLogger("balancer.http")
"""For aiohttp to log to: passes on all but malformed requests."""
QUIET.addFilter(_NoMalformedRequests())


async def drop_server_header(_: web.BaseRequest, response: web.StreamResponse) -> None:
    """Leaves out which versions run here: nobody but an attacker has a use for it."""
    response.headers.popall("Server", None)


def is_spoken(request: web.BaseRequest) -> bool:
    """True for HTTP/1.1 and HTTP/1.0: what aiohttp lets pass may be of another version."""
    return request._message.version in (HttpVersion10, HttpVersion11)


class _Request(web.BaseRequest):
    @property
    def version(self) -> HttpVersion:
        """The version to answer in: where the client's is none of ours, the one that everybody reads."""
        return self._version if is_spoken(self) else HttpVersion10

    @property
    def keep_alive(self) -> bool:
        """False behind an offer of another protocol too: aiohttp may then lose what follows in the same read.

        The rest of that would be read as a request, whoever wrote it.
        """
        return super().keep_alive and not self._message.upgrade

    async def _prepare_hook(self, resp: web.StreamResponse) -> None:
        await drop_server_header(self, resp)


class _Protocol(web.RequestHandler):
    __slots__ = ("_slow",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins to wait for the first request."""
        self._slow: asyncio.TimerHandle | None = None
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancels what is being answered."""
        if self._slow is not None:
            self._slow.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes what came. A body that turns out to be malformed ends: aiohttp would wait for the rest of it."""
        super().data_received(data)
        if not self._messages:
            if self._slow is None and (self._is_waiting or not self._request_count):
                # The beginning of a head: aiohttp would wait for its end as long as for the first byte.
                self._slow = self._loop.call_later(SLOW_S, self._end_of_patience)
            return
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
        if isinstance(self._messages[-1][0], RawRequestMessage):
            return
        request = self._current_request
        payloads = [payload for _, payload in self._messages]
        for payload in payloads if request is None else [*payloads, request.content]:
            if not payload.is_eof() and payload.exception() is None:
                payload.set_exception(web.RequestPayloadError("no valid chunks"))

    @property
    def _is_waiting(self) -> bool:
        """True while no request is there to be answered."""
        return self._waiter is not None and not self._waiter.done()

    def _end_of_patience(self) -> None:
        self._slow = None
        if self._is_waiting:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no request (400), or to one that failed in our hands (500)."""
        request_id = new_request_id()
        if status >= 500:
            log.error("a request failed in the gateway", exc=exc, request=request_id)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        error = BalancerError("internal error")
        if status < 500:
            error = RequestError("this is no valid HTTP/1.1 request, or its head is too long")
        if isinstance(self._manager, Server):
            self._manager.refused("", error.reason)
        # There may be no path to tell the dialect by.
        body = OPENAI.error_body(error, request_id)
        watch = self._manager.watch if isinstance(self._manager, Server) else None
        if watch is not None and status < 500:
            watch.tell_of_none(request_id, address_of(request.transport), status, error.code, len(body))
        response = web.Response(
            status=status,
            body=body,
            content_type="application/json",
            headers={"x-request-id": request_id},
        )
        response.force_close()
        return response


class Server(web.Server):
    """Serves one function, without routes. A client that goes away cancels its handler at once.

    A body with a Content-Encoding is not decoded: aiohttp would log what it cannot decode.
    """

    def __init__(self, answer: Answer, watch: Watch | None = None) -> None:
        """`watch` tells of what is no request."""
        super().__init__(answer, handler_cancellation=True, access_log=None, auto_decompress=False, logger=QUIET)
        self.lanes: Lanes | None = None
        """Connections that are served beside those of aiohttp, and are closed with them."""
        self.watch = watch
        self.refused: Callable[[str, str], None] = lambda scenario, reason: None
        """Counts what is no request, by its scenario, which is none, and the reason."""

    def pre_shutdown(self) -> None:
        """Closes idle connections."""
        super().pre_shutdown()
        if self.lanes is not None:
            self.lanes.close_idle()

    async def shutdown(self, timeout: float | None = None) -> None:
        """Ends all connections; requests that are being answered get that long."""
        lanes = [self.lanes.close(timeout or 0.0)] if self.lanes is not None else []
        await asyncio.gather(super().shutdown(timeout), *lanes)

    def __call__(self) -> web.RequestHandler:
        """The protocol of a new connection."""
        return _Protocol(self, loop=self._loop, **self._kwargs)

    def _make_request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> Any:
        return _Request(message, payload, protocol, writer, task, self._loop)


class Site(web.SockSite):
    """A listening socket, whose connections are the lane's until it hands them over; without a lane, aiohttp's."""

    def __init__(self, runner: web.ServerRunner, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        super().__init__(runner, listener, ssl_context=tls, backlog=BACKLOG)
        self._acceptor: Acceptor | None = None

    async def start(self) -> None:
        """Accepts connections from now on."""
        await web.BaseSite.start(self)
        server = self._runner.server
        assert isinstance(server, Server), "ours"
        protocol = server if server.lanes is None else server.lanes
        self._acceptor = Acceptor(self._sock, protocol, self._ssl_context, self._backlog)

    async def stop(self) -> None:
        """Accepts none from now on."""
        await super().stop()
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
