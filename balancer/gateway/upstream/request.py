"""A request's head as bytes: where its URL leads, and its headers, checked so that none can end early.

URLs and names of headers recur, so what was found out about them is kept, up to a bound.
"""

from __future__ import annotations

import base64
import re
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import yarl

from balancer.dialects import Headers
from balancer.errors import UpstreamError
from balancer.gateway.messages import UpstreamRequest

_KEPT = 1024
_HEADS_KEPT = 256
_PORTS = {"http": 80, "https": 443}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_WITH_LENGTH = frozenset({"POST", "PUT", "PATCH"})
"""Methods whose body, when it is empty, is said to be so (RFC 9110 §8.6)."""
_OURS = frozenset(
    {"connection", "content-length", "keep-alive", "proxy-connection", "te", "transfer-encoding", "upgrade"}
)
"""Headers about the connection, and about where the body ends: who frames it says it, and nobody else."""
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_UNSENDABLE = re.compile(r"[\x00-\x20\x7f]")


class Origin(NamedTuple):
    """Whom a connection leads to, and through which proxy; connections of one origin are alike."""

    scheme: str
    host: str
    port: int
    proxy_url: str

    @property
    def is_tunnelled(self) -> bool:
        """True when the proxy hands on bytes, and not requests."""
        return bool(self.proxy_url) and self.scheme == "https"


class Target(NamedTuple):
    """A URL taken apart: its origin, and what of it stands in a request's first lines."""

    origin: Origin
    line: str
    """What follows the method: the target and the version."""
    host: str
    """The Host header, unless the request has one of its own."""
    proxy_lines: str
    """What the proxy is told beside the request."""


class Targets:
    """Targets by URL and proxy."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], Target] = {}

    def of(self, url: str, proxy_url: str) -> Target:
        """The target. Raises UpstreamError for a URL that cannot be sent."""
        key = (url, proxy_url)
        target = self._kept.get(key)
        if target is None:
            target = _parsed(url, proxy_url)
            if len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = target
        return target


def _parsed(url: str, proxy_url: str) -> Target:
    if _UNSENDABLE.search(url):
        raise UpstreamError(
            "the upstream's URL holds white space or control characters: it cannot be requested", was_sent=False
        )
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        if not host.isascii():
            host = yarl.URL(url).raw_host or ""  # IDNA 2008; Python's own codec makes another host of some.
        port = parts.port
    except ValueError as exc:  # Among them UnicodeError.
        raise UpstreamError("the upstream's URL has no valid host and port", was_sent=False) from exc
    if parts.scheme not in _PORTS or not host:
        raise UpstreamError("the upstream's URL is none of http:// or https:// with a host", was_sent=False)
    default = _PORTS[parts.scheme]
    name = f"[{host}]" if ":" in host else host
    authority = name if port in (None, default) else f"{name}:{port}"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    origin = Origin(parts.scheme, host, default if port is None else port, proxy_url)
    asked_of_proxy = bool(proxy_url) and not origin.is_tunnelled
    return Target(
        origin=origin,
        line=f" {f'http://{authority}' if asked_of_proxy else ''}{path} HTTP/1.1\r\n",
        host=f"Host: {authority}\r\n",
        proxy_lines=proxy_authorization(proxy_url) if asked_of_proxy else "",
    )


def proxy_authorization(proxy_url: str) -> str:
    """The header line with the credentials in a proxy's URL, empty when it has none."""
    parts = urlsplit(proxy_url)
    if parts.username is None:
        return ""
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Proxy-Authorization: Basic {base64.b64encode(pair.encode()).decode()}\r\n"


_starts: dict[str, str] = {}
"""How a header's line begins, by its name as it was given; empty for those that are not passed on."""


class Heads:
    """Heads of requests; the part that many have in common is kept."""

    def __init__(self) -> None:
        # By the headers' identity, which is theirs as long as they are held here.
        self._kept: dict[int, tuple[Headers, Target, str, bytes]] = {}

    def of(self, request: UpstreamRequest, target: Target) -> bytes:
        """The request's head. Raises UpstreamError that names the header which cannot be sent."""
        if not request.more:
            return head_of(request, target, request.headers) + _end_of(request, ())
        headers, method = request.headers, request.method
        kept = self._kept.get(id(headers))
        if kept is not None and kept[0] is headers and kept[1] is target and kept[2] == method:
            return kept[3] + _end_of(request, request.more)
        head = head_of(request, target, headers)
        if len(self._kept) >= _HEADS_KEPT:
            self._kept.clear()
        self._kept[id(headers)] = headers, target, method, head
        return head + _end_of(request, request.more)


def _end_of(request: UpstreamRequest, headers: Headers) -> bytes:
    """The lines that stand in no other request's head, and the empty one."""
    text = "".join([f"{name}: {value}\r\n" for name, value in headers])
    _check(request, headers, text, len(headers))
    if request.body or request.method in _WITH_LENGTH:
        text = f"{text}Content-Length: {len(request.body)}\r\n\r\n"
    else:
        text = f"{text}\r\n"
    return text.encode("utf-8", "surrogateescape")


def head_of(request: UpstreamRequest, target: Target, headers: Headers) -> bytes:
    """The first line, and those of these headers. Raises UpstreamError that names the header which cannot be sent."""
    method = request.method
    if method not in _METHODS and not _TOKEN.fullmatch(method):
        raise UpstreamError("the request's method is none", was_sent=False)
    parts = [method, target.line, target.host, target.proxy_lines]
    lines = 3 if target.proxy_lines else 2
    starts = _starts
    for name, value in headers:
        start = starts.get(name)
        if start is None:
            start = _start_of(name)
        if start:
            parts += (start, value, "\r\n")
            lines += 1
            if start == "Host: ":
                lines -= bool(parts[2])
                parts[2] = ""
    text = "".join(parts)
    _check(request, headers, text, lines)
    return text.encode("utf-8", "surrogateescape")


def _start_of(name: str) -> str:
    if not _TOKEN.fullmatch(name):
        raise UpstreamError(
            f"the header {name[:64]!r} has a name that cannot be sent; see the provider's `headers`", was_sent=False
        )
    lower = name.lower()
    start = "" if lower in _OURS else "Host: " if lower == "host" else f"{name}: "
    if len(_starts) < _KEPT:
        _starts[name] = start
    return start


def _check(request: UpstreamRequest, headers: Headers, text: str, lines: int) -> None:
    """Raises UpstreamError for text that has other lines than those that were meant."""
    if text.count("\n") == lines and text.count("\r") == lines and "\0" not in text:
        return
    for name, value in headers:
        if any(sign in value for sign in "\r\n\0"):
            raise UpstreamError(
                f"the header {name!r} for {request.provider} holds a line break or NUL and is not sent; "
                "see the provider's token and `headers`",
                was_sent=False,
            )
    raise UpstreamError(
        f"a line of the request for {request.provider} holds a line break or NUL and is not sent", was_sent=False
    )
