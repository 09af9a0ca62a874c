"""The admin API's front door: who may ask, which route answers, and errors as `{"error": "what is wrong"}`.

Everything but `/healthz` needs `Authorization: Bearer`. There are no cookies and no CORS headers, so that no web page
of somebody else can ask in a visitor's name.
"""

from __future__ import annotations

import hashlib
import hmac

import msgspec

from balancer import log
from balancer.admin.decisions import Decisions
from balancer.admin.explain import Explain
from balancer.admin.live import Live
from balancer.admin.picks import Picks
from balancer.admin.routing import Call, Route, Routes
from balancer.config import Settings
from balancer.dialects import Headers
from balancer.errors import (
    BalancerError,
    ContentTypeError,
    MethodNotAllowedError,
    UnauthorizedError,
    UnknownPathError,
)
from balancer.gateway.messages import ClientRequest
from balancer.metrics import Metrics
from balancer.store.balance import Balance


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer in JSON."""

    status: int
    body: bytes
    headers: Headers = ()


class Api:
    """Answers every request of the admin server."""

    def __init__(self, settings: Settings, balance: Balance, metrics: Metrics) -> None:
        self._token = _digest(settings.admin_token) if settings.admin_token else b""
        resources = (Live(balance), Picks(balance, metrics), Decisions(balance), Explain(balance))
        health = Route(method="GET", path="/healthz", handler=_healthz)
        self._routes = Routes([health, *(route for resource in resources for route in resource.routes())])

    async def answer(self, request: ClientRequest) -> Answer:
        """The answer to a request."""
        try:
            return _encoded(200, await self._handle(request))
        except BalancerError as exc:
            return refusal(exc, self._allowed(request.path) if isinstance(exc, MethodNotAllowedError) else "")
        except Exception as exc:  # noqa: BLE001 - a task's root: whatever went wrong is logged, the worker lives.
            log.error("a request failed in the admin server", exc=exc, path=request.path)
            return refusal(BalancerError("internal error"))

    async def _handle(self, request: ClientRequest) -> object:
        if request.path != "/healthz":
            self._authenticate(request)
        found = self._routes.find(request.path)
        if not found:
            raise UnknownPathError(f"{request.path} is not served here")
        method = "GET" if request.method == "HEAD" else request.method
        if method not in found:
            raise MethodNotAllowedError(f"{request.method} is not allowed here: {self._allowed(request.path)}")
        if request.body:
            _check_content(request)
        handler, named = found[method]
        return await handler(Call(path=named, query=request.query, body=request.body))

    def _allowed(self, path: str) -> str:
        methods = set(self._routes.find(path))
        return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))

    def _authenticate(self, request: ClientRequest) -> None:
        header = request.header("authorization")
        presented = header[7:].strip() if header[:7].lower() == "bearer " else ""
        if not presented:
            raise UnauthorizedError("no credential: send `Authorization: Bearer …` with the admin token")
        # Digests are of one length, so that comparing them tells nothing of the token. Without one, none is equal.
        if not hmac.compare_digest(_digest(presented), self._token):
            raise UnauthorizedError("the credential is not the admin token")


def refusal(error: BalancerError, allow: str = "") -> Answer:
    """The answer that tells an error."""
    headers: Headers = ()
    if error.status == 401:
        headers = (("WWW-Authenticate", "Bearer"),)
    elif error.status == 503:
        headers = (("Retry-After", "1"),)
    elif allow:
        headers = (("Allow", allow),)
    return _encoded(error.status, {"error": error.message}, headers)


async def _healthz(call: Call) -> object:
    return {"status": "alive"}


def _encoded(status: int, value: object, headers: Headers = ()) -> Answer:
    return Answer(status=status, body=msgspec.json.encode(value), headers=headers)


def _check_content(request: ClientRequest) -> None:
    kind = request.header("content-type").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise ContentTypeError("expected Content-Type: application/json")
    if request.header("content-encoding") not in ("", "identity"):
        raise ContentTypeError("request bodies with a Content-Encoding are not read")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
