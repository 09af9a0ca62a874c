"""Upstreams behind SOCKS proxies: aiohttp's client, which does for the few who need it."""

from __future__ import annotations

import asyncio
import io
import ssl
from typing import Any

import aiohttp
import yarl
from aiohttp.client_proto import ResponseHandler
from aiohttp_socks import ProxyConnectionError, ProxyConnector, ProxyError, ProxyTimeoutError

from balancer.dialects import Headers
from balancer.errors import UpstreamError, UpstreamTimeoutError
from balancer.gateway.messages import Take, UpstreamRequest

_KEEPALIVE_S = 15.0
_READ_BYTES = 2**16
_LARGE_BYTES = 2**20
_AUTO_HEADERS = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")


class _Connector(ProxyConnector):
    """A pool that gives out no connection on which the upstream spoke unasked.

    aiohttp looks at that when a connection comes back only, so that a late 408, or a second answer, was once read as
    the answer to the next request.
    """

    async def _get(self, key: Any, traces: Any) -> Any:
        while (connection := await super()._get(key, traces)) is not None:
            if connection.protocol is not None and not connection.protocol.should_close:
                break
            connection.close()
        return connection

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> ResponseHandler:
        protocol = await super()._create_connection(req, traces, timeout)
        closed = protocol.closed
        if closed is not None:
            # So that no loss of an idle connection is logged as an error that nobody saw.
            closed.add_done_callback(asyncio.Future.exception)
        return protocol


class SocksAnswer:
    """An answer from aiohttp, its body undecoded."""

    def __init__(self, request: UpstreamRequest, response: aiohttp.ClientResponse, deadline: float) -> None:
        self.status = response.status
        self.length = response.content_length
        self._request = request
        self._response = response
        self._deadline = deadline
        self._has_begun = False
        protocol = response.connection.protocol if response.connection is not None else None
        self._closed = protocol.closed if protocol is not None else None
        if self._closed is not None:
            self._closed.add_done_callback(self._break_off)

    def _break_off(self, _: asyncio.Future[None]) -> None:
        """Tells who reads that the connection is gone: aiohttp does not when it closed it over a malformed chunk."""
        content = self._response.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("the connection is closed"))

    @property
    def headers(self) -> Headers:
        """Its headers in order."""
        return tuple(
            (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
            for name, value in self._response.raw_headers
        )

    async def read(self) -> bytes:
        """The next bytes as they came, b"" at the end."""
        timeouts = self._request.timeouts
        limit_s, name = (timeouts.idle_s, "idle_s") if self._has_begun else (timeouts.first_byte_s, "first_byte_s")
        left_s = self._deadline - asyncio.get_running_loop().time()
        if left_s < limit_s:
            limit_s, name = left_s, "timeout"
        try:
            async with asyncio.timeout(limit_s):
                chunk = await self._response.content.readany()
        except TimeoutError:
            raise UpstreamTimeoutError(f"{self._request.provider} was silent for too long ({name})") from None
        except (aiohttp.ClientError, ConnectionError) as exc:
            raise UpstreamError(f"{self._request.provider} broke off its answer") from exc
        self._has_begun = True
        return chunk

    @property
    def is_at_end(self) -> bool:
        """False: whether more comes is not known before it is asked for."""
        return False

    def whole(self) -> bytes | None:
        """None: what has come is not looked at before it is read."""
        return None

    async def pump(self, take: Take) -> bytes:
        """The next chunk that is not taken."""
        while (chunk := await self.read()) and take(chunk):
            pass
        return chunk

    async def close(self) -> None:
        """Gives the connection back if the answer was read to its end, else ends it."""
        if self._closed is not None:
            self._closed.remove_done_callback(self._break_off)
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class SocksUpstream:
    """A session for each proxy, with a limit of connections per host."""

    def __init__(self, connections: int, tls: ssl.SSLContext) -> None:
        self._limit = connections
        self._tls = tls
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    def _session(self, proxy_url: str) -> aiohttp.ClientSession:
        if proxy_url not in self._sessions:
            connector = _Connector.from_url(
                proxy_url.replace("socks5h://", "socks5://"),
                rdns=True,
                limit=0,
                limit_per_host=self._limit,
                keepalive_timeout=_KEEPALIVE_S,
                ssl=self._tls,
            )
            self._sessions[proxy_url] = aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=_AUTO_HEADERS,
                read_bufsize=_READ_BYTES,
                trust_env=False,
            )
        return self._sessions[proxy_url]

    async def send(self, request: UpstreamRequest) -> SocksAnswer:
        """The answer, as soon as its headers are there. Redirects are not followed."""
        deadline = asyncio.get_running_loop().time() + request.timeout_s
        headers_s = min(request.timeouts.headers_s, request.timeout_s)
        connect_s = min(request.timeouts.connect_s, headers_s)
        try:
            async with asyncio.timeout(headers_s):
                response = await self._session(request.proxy_url).request(
                    request.method,
                    yarl.URL(request.url, encoded=True),
                    headers=(*request.headers, *request.more),
                    data=io.BytesIO(request.body) if len(request.body) > _LARGE_BYTES else request.body or None,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
                )
        except (aiohttp.ConnectionTimeoutError, aiohttp.ServerTimeoutError, ProxyTimeoutError) as exc:
            raise UpstreamTimeoutError(
                f"{request.provider} could not be reached in time (connect_s)", was_sent=False
            ) from exc
        except TimeoutError:
            name = "headers_s" if headers_s < request.timeout_s else "timeout"
            raise UpstreamTimeoutError(f"{request.provider} did not answer in time ({name})") from None
        except (aiohttp.ClientConnectorError, ProxyConnectionError, ProxyError) as exc:
            raise UpstreamError(f"{request.provider} cannot be reached", was_sent=False) from exc
        except (aiohttp.ClientError, OSError) as exc:
            raise UpstreamError(f"{request.provider} broke off before it answered") from exc
        return SocksAnswer(request, response, deadline)

    async def close(self) -> None:
        """Closes all connections."""
        for session in self._sessions.values():
            await session.close()
