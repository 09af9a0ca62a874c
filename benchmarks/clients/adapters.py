"""Each client library behind the same two calls, used as its own documentation shows for many requests to one host.

A library is imported only by its own adapter: each runs in a process where the others need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

CONNECTIONS = 256
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer sk-upstream"}


class Client(NamedTuple):
    """Sends a body to a URL: `whole` gives the answer's body, `stream` its parts as they come."""

    whole: Callable[[str, bytes], Awaitable[bytes]]
    stream: Callable[[str, bytes], AsyncIterator[bytes]]


def _library(name: str) -> Any:
    return importlib.import_module(name)


async def aiohttp() -> Client:
    """ClientSession on aiohttp's own connector."""
    library = _library("aiohttp")
    session = library.ClientSession(
        connector=library.TCPConnector(limit=0), cookie_jar=library.DummyCookieJar(), auto_decompress=False
    )

    async def whole(url: str, body: bytes) -> bytes:
        async with session.post(url, data=body, headers=HEADERS) as answer:
            return bytes(await answer.read())

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        async with session.post(url, data=body, headers=HEADERS) as answer:
            async for chunk in answer.content.iter_any():
                yield chunk

    return Client(whole, stream)


async def httpcore() -> Client:
    """AsyncConnectionPool, what httpx stands on."""
    pool = _library("httpcore").AsyncConnectionPool(max_connections=CONNECTIONS)

    async def whole(url: str, body: bytes) -> bytes:
        answer = await pool.request("POST", url, headers=HEADERS, content=body)
        return bytes(answer.content)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        async with pool.stream("POST", url, headers=HEADERS, content=body) as answer:
            async for chunk in answer.aiter_stream():
                yield chunk

    return Client(whole, stream)


async def httpx() -> Client:
    """AsyncClient."""
    return _httpx("httpx")


async def httpx2() -> Client:
    """AsyncClient of its successor."""
    return _httpx("httpx2")


def _httpx(name: str) -> Client:
    library = _library(name)
    limits = library.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    client = library.AsyncClient(limits=limits, timeout=60, trust_env=False)

    async def whole(url: str, body: bytes) -> bytes:
        return bytes((await client.post(url, content=body, headers=HEADERS)).content)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        async with client.stream("POST", url, content=body, headers=HEADERS) as answer:
            async for chunk in answer.aiter_raw():
                yield chunk

    return Client(whole, stream)


def _like_httpx(client: Any) -> Client:
    """A client whose calls are named as httpx names them."""

    async def whole(url: str, body: bytes) -> bytes:
        return bytes((await client.post(url, headers=HEADERS, content=body)).content)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        async with client.stream("POST", url, headers=HEADERS, content=body) as answer:
            async for chunk in answer.aiter_bytes():
                yield bytes(chunk)

    return Client(whole, stream)


async def niquests() -> Client:
    """AsyncSession."""
    library = _library("niquests")
    session = library.AsyncSession(pool_maxsize=CONNECTIONS, disable_http2=True, disable_http3=True)

    async def whole(url: str, body: bytes) -> bytes:
        return bytes((await session.post(url, data=body, headers=HEADERS)).content)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        answer = await session.post(url, data=body, headers=HEADERS, stream=True)
        async for chunk in await answer.iter_raw(-1):
            yield chunk
        await answer.close()

    return Client(whole, stream)


async def urllib3_future() -> Client:
    """AsyncPoolManager of urllib3.future, what niquests stands on."""
    manager = _library("urllib3_future").AsyncPoolManager(maxsize=CONNECTIONS)

    async def whole(url: str, body: bytes) -> bytes:
        answer = await manager.request("POST", url, body=body, headers=HEADERS)
        return bytes(await answer.data)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        answer = await manager.request("POST", url, body=body, headers=HEADERS, preload_content=False)
        async for chunk in answer.stream(-1):
            yield chunk

    return Client(whole, stream)


async def aiosonic() -> Client:
    """HTTPClient."""
    library = _library("aiosonic")
    pool = _library("aiosonic.pools").PoolConfig(size=CONNECTIONS)
    client = library.HTTPClient(_library("aiosonic.connectors").TCPConnector(pool_configs={":default": pool}))

    async def whole(url: str, body: bytes) -> bytes:
        return bytes(await (await client.post(url, data=body, headers=HEADERS)).content())

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        answer = await client.post(url, data=body, headers=HEADERS)
        async for chunk in answer.read_chunks():
            yield chunk

    return Client(whole, stream)


async def curl_cffi() -> Client:
    """AsyncSession, on libcurl."""
    session = _library("curl_cffi").AsyncSession(max_clients=CONNECTIONS, default_headers=False)

    async def whole(url: str, body: bytes) -> bytes:
        return bytes((await session.post(url, data=body, headers=HEADERS)).content)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        async with session.stream("POST", url, data=body, headers=HEADERS) as answer:
            async for chunk in answer.aiter_content():
                yield chunk

    return Client(whole, stream)


async def redc() -> Client:
    """Client, on libcurl; it streams into a callback only, so the parts come all at once at the end."""
    library = _library("redc")
    client = library.Client(http_version="1.1", max_host_connections=CONNECTIONS)

    async def whole(url: str, body: bytes) -> bytes:
        return bytes((await client.post(url, data=body, headers=HEADERS)).content)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        parts: list[bytes] = []
        callback = library.StreamCallback(lambda data, size: parts.append(data))
        await client.post(url, data=body, headers=HEADERS, stream_callback=callback)
        for part in parts:
            yield part

    return Client(whole, stream)


async def pyreqwest() -> Client:
    """Rust, on reqwest."""
    client = _library("pyreqwest.client").ClientBuilder().pool_max_idle_per_host(CONNECTIONS).build()

    async def whole(url: str, body: bytes) -> bytes:
        answer = await client.post(url).headers(HEADERS).body_bytes(body).build().send()
        return bytes(await answer.bytes())

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        async with client.post(url).headers(HEADERS).body_bytes(body).build_streamed() as answer:
            while chunk := await answer.body_reader.read_chunk():
                yield bytes(chunk)

    return Client(whole, stream)


async def pyqwest() -> Client:
    """Rust, on reqwest."""
    library = _library("pyqwest")
    transport = library.HTTPTransport(pool_max_idle_per_host=CONNECTIONS, use_system_dns=True, enable_otel=False)
    client = library.Client(transport)

    async def whole(url: str, body: bytes) -> bytes:
        return bytes((await client.post(url, headers=HEADERS, content=body)).content)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        async with client.stream("POST", url, headers=HEADERS, content=body) as answer:
            async for chunk in answer.content:
                yield bytes(chunk)

    return Client(whole, stream)


async def wreq() -> Client:
    """Rust, on a fork of reqwest; called rnet before."""
    client = _library("wreq").Client(pool_max_idle_per_host=CONNECTIONS)

    async def whole(url: str, body: bytes) -> bytes:
        return bytes(await (await client.post(url, headers=HEADERS, body=body)).bytes())

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        answer = await client.post(url, headers=HEADERS, body=body)
        async with answer.stream() as chunks:
            async for chunk in chunks:
                yield bytes(chunk)

    return Client(whole, stream)


async def primp() -> Client:
    """Rust, on a fork of reqwest."""
    client = _library("primp").AsyncClient()

    async def whole(url: str, body: bytes) -> bytes:
        return bytes((await client.post(url, headers=HEADERS, content=body)).content)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        async with await client.post(url, headers=HEADERS, content=body, stream=True) as answer:
            async for chunk in answer.aiter_bytes():
                yield bytes(chunk)

    return Client(whole, stream)


async def impit() -> Client:
    """Rust, on a fork of reqwest."""
    return _like_httpx(_library("impit").AsyncClient())


async def ry() -> Client:
    """Rust, on reqwest."""
    client = _library("ry").Client()

    async def whole(url: str, body: bytes) -> bytes:
        return bytes(await (await client.post(url, headers=HEADERS, body=body)).bytes())

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        answer = await client.post(url, headers=HEADERS, body=body)
        async for chunk in answer.bytes_stream():
            yield bytes(chunk)

    return Client(whole, stream)


async def foghttp() -> Client:
    """Rust, on hyper."""
    return _like_httpx(_library("foghttp").AsyncClient())


async def ours() -> Client:
    """The gateway's own upstream client, of this version."""
    domain, messages = _library("balancer.domain"), _library("balancer.gateway.messages")
    upstream = _library("balancer.gateway.upstream")
    client = upstream.UpstreamClient(CONNECTIONS)
    timeouts = domain.Timeouts()

    async def send(url: str, body: bytes) -> Any:
        request = messages.UpstreamRequest(
            provider="account",
            method="POST",
            url=url,
            headers=tuple(HEADERS.items()),
            body=body,
            proxy_url="",
            timeouts=timeouts,
            timeout_s=60,
        )
        return await client.send(request)

    async def whole(url: str, body: bytes) -> bytes:
        answer = await send(url, body)
        parts = []
        while chunk := await answer.read():
            parts.append(chunk)
        await answer.close()
        return b"".join(parts)

    async def stream(url: str, body: bytes) -> AsyncIterator[bytes]:
        # As the gateway does: each part is taken within the callback that brought it.
        answer = await send(url, body)
        taken: list[bytes] = []

        def take(chunk: bytes, _: bytes = b"", /) -> bool:
            taken.append(chunk)
            return True

        while chunk := await answer.pump(take):
            taken.append(chunk)
        await answer.close()
        for chunk in taken:
            yield chunk

    return Client(whole, stream)


ADAPTERS: dict[str, Callable[[], Awaitable[Client]]] = {
    "aiohttp": aiohttp,
    "httpcore": httpcore,
    "httpx": httpx,
    "httpx2": httpx2,
    "niquests": niquests,
    "urllib3.future": urllib3_future,
    "aiosonic": aiosonic,
    "curl_cffi": curl_cffi,
    "redc": redc,
    "pyreqwest": pyreqwest,
    "pyqwest": pyqwest,
    "wreq": wreq,
    "primp": primp,
    "impit": impit,
    "ry": ry,
    "foghttp": foghttp,
    "ours": ours,
}
