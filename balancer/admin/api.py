"""The admin API's front door: who may ask for what, which route answers, and errors as `{"error": "what is wrong"}`.

Everything but `/healthz` needs `Authorization: Bearer`. There are no cookies and no CORS headers, so that no web page
of somebody else can ask in a visitor's name; and on loopback no other host's name is answered to, so that none can call
its own name ours (DNS rebinding).
"""

from __future__ import annotations

import json

import msgspec

from balancer import log, roles
from balancer.admin.changes import Changes
from balancer.admin.decisions import Decisions
from balancer.admin.explain import Explain
from balancer.admin.live import Live
from balancer.admin.openapi import described
from balancer.admin.picks import Picks
from balancer.admin.resources import Resources
from balancer.admin.routing import Call, Reply, Route, Routes, parameters
from balancer.admin.shapes import Alive, Fault, Problem
from balancer.config import Settings, is_loopback
from balancer.dialects import Headers
from balancer.errors import (
    BalancerError,
    ConfigurationError,
    ContentTypeError,
    ForbiddenError,
    MethodNotAllowedError,
    MisdirectedError,
    UnauthorizedError,
    UnknownPathError,
)
from balancer.gateway.messages import ClientRequest
from balancer.metrics import Metrics
from balancer.roles import Principal
from balancer.store.balance import Balance
from balancer.store.credentials import Sealer

_NOBODY = Principal(name="", role="viewer", digest="")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer in JSON."""

    status: int
    body: bytes
    headers: Headers = ()


class Api:
    """Answers every request of the admin server."""

    def __init__(self, settings: Settings, balance: Balance, metrics: Metrics, sealer: Sealer | None) -> None:
        own = settings.admin_token
        owner = Principal(name=roles.ADMIN_NAME, role="admin", digest=roles.digest_of(own)) if own else None
        self._principals = (*((owner,) if owner else ()), *settings.admin_tokens)
        self._hosts = frozenset(host.lower() for host in settings.admin_hosts)
        self._checks_host = bool(self._hosts) or is_loopback(settings.admin_host)
        resources = (
            Resources(balance, sealer),
            Live(balance, sealer),
            Picks(balance, metrics),
            Decisions(balance),
            Explain(balance),
            Changes(balance),
        )
        routes = [
            Route(method="GET", path="/healthz", handler=_healthz, gives=Alive, is_open=True),
            Route(method="GET", path="/openapi.json", handler=self._openapi),
            *(route for resource in resources for route in resource.routes()),
        ]
        self._routes = Routes(routes)
        self._description: object = None

    async def answer(self, request: ClientRequest) -> Answer:
        """The answer to a request."""
        try:
            reply = await self._handle(request)
            if isinstance(reply, Reply):
                return _encoded(reply.status, reply.value, reply.headers)
            return _encoded(200, reply)
        except BalancerError as exc:
            return refusal(exc, self._allowed(request.path) if isinstance(exc, MethodNotAllowedError) else "")
        except Exception as exc:  # noqa: BLE001 - a task's root: whatever went wrong is logged, the worker lives.
            log.error("a request failed in the admin server", exc=exc, path=request.path)
            return refusal(BalancerError("internal error"))

    async def _handle(self, request: ClientRequest) -> object:
        self._check_host(request)
        found = self._routes.find(request.path)
        is_open = any(route.is_open for route, _ in found.values())
        principal = _NOBODY if is_open else self._authenticated(request)
        if not found:
            raise UnknownPathError(f"{request.path} is not served here")
        method = "GET" if request.method == "HEAD" else request.method
        if method not in found:
            raise MethodNotAllowedError(f"{request.method} is not allowed here: {self._allowed(request.path)}")
        route, named = found[method]
        if not principal.may(route.role):
            log.warning("refused in the admin server", who=principal.name, method=route.method, route=route.path)
            raise ForbiddenError(f"this takes the role {route.role}, and {principal.name} is a {principal.role}")
        if request.body:
            _check_content(request)
        call = Call(
            path=named,
            principal=principal,
            query=parameters(route, request.query),
            body=request.body,
            if_match=request.header("if-match"),
            if_none_match=request.header("if-none-match"),
        )
        return await route.handler(call)

    def _allowed(self, path: str) -> str:
        methods = set(self._routes.find(path))
        return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))

    def _authenticated(self, request: ClientRequest) -> Principal:
        header = request.header("authorization")
        token = header[7:].strip() if header[:7].lower() == "bearer " else ""
        if not token:
            raise UnauthorizedError("no credential: send `Authorization: Bearer …` with the admin token")
        principal = roles.presented(token, self._principals)
        if principal is None:
            raise UnauthorizedError("the credential is not the admin token")
        return principal

    def _check_host(self, request: ClientRequest) -> None:
        if not self._checks_host:
            return
        host = _host_name(request.header("host"))
        if host not in self._hosts and not is_loopback(host):
            raise MisdirectedError(
                "this server does not answer to the host that the request names: "
                "ask it as localhost, or name that one in BALANCER_ADMIN_HOSTS"
            )

    async def _openapi(self, call: Call) -> object:
        """This description, in OpenAPI 3.1."""
        if self._description is None:
            self._description = described(self._routes.all)
        return self._description


def refusal(error: BalancerError, allow: str = "") -> Answer:
    """The answer that tells an error."""
    headers: Headers = ()
    if error.status == 401:
        headers = (("WWW-Authenticate", "Bearer"),)
    elif error.status == 503:
        headers = (("Retry-After", "1"),)
    elif allow:
        headers = (("Allow", allow),)
    faults = tuple(map(_fault, error.faults)) if isinstance(error, ConfigurationError) else ()
    return _encoded(error.status, Problem(error=error.message, faults=faults), headers)


def _fault(line: str) -> Fault:
    path, separator, message = line.partition(": ")
    return Fault(path=path, message=message) if separator else Fault(path="", message=line)


async def _healthz(call: Call) -> object:
    """The process is alive."""
    return {"status": "alive"}


def _encoded(status: int, value: object, headers: Headers = ()) -> Answer:
    if status == 304:
        return Answer(status=status, body=b"", headers=headers)
    try:
        body = msgspec.json.encode(value)
    except UnicodeEncodeError:
        # Half a surrogate pair, from a path that was no text to begin with.
        text = json.dumps(msgspec.to_builtins(value), ensure_ascii=False)
        body = text.encode("utf-8", "replace")
    return Answer(status=status, body=body, headers=headers)


def _host_name(header: str) -> str:
    """The host of a Host header, without its port and the brackets of IPv6."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def _check_content(request: ClientRequest) -> None:
    kind = request.header("content-type").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise ContentTypeError("expected Content-Type: application/json")
    if request.header("content-encoding") not in ("", "identity"):
        raise ContentTypeError("request bodies with a Content-Encoding are not read")
