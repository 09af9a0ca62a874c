"""An authorization server, and an API behind it: Authlib's own, on loopback, with what can go wrong on the way.

Refresh tokens rotate, and who uses one twice loses the whole family (RFC 9700 §4.14.2), as with the vendors.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from aiohttp import web
from authlib.oauth2.rfc6749 import (
    AuthorizationServer,
    ClientMixin,
    OAuth2Request,
    TokenMixin,
    grants,
)
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload

ANSWER = {
    "id": "c1",
    "object": "chat.completion",
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
}
CLIENT_ID, CLIENT_SECRET = "a client", "s3cret/with+signs"


class Client(ClientMixin):  # type: ignore[misc]
    """The one client, which may do what it likes."""

    def get_client_id(self) -> str:
        return CLIENT_ID

    def get_default_redirect_uri(self) -> str:
        return ""

    def get_allowed_scope(self, scope: str) -> str:
        return scope or ""

    def check_client_secret(self, client_secret: str) -> bool:
        return client_secret == CLIENT_SECRET

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return True

    def check_grant_type(self, grant_type: str) -> bool:
        return True


class Token(TokenMixin):  # type: ignore[misc]
    """What was issued: an access token, and perhaps a refresh token."""

    def __init__(self, family: str, access: str, refresh: str, scope: str, ends_at: float) -> None:
        self.family = family
        self.access = access
        self.refresh = refresh
        self.scope = scope
        self.ends_at = ends_at
        self.is_used = False

    def check_client(self, client: Client) -> bool:
        return True

    def get_scope(self) -> str:
        return self.scope

    def get_expires_in(self) -> int:
        return round(self.ends_at - time.monotonic())

    def is_expired(self) -> bool:
        return time.monotonic() > self.ends_at

    def is_revoked(self) -> bool:
        return self.is_used


class _Request(OAuth2Request):  # type: ignore[misc]
    """A request as Authlib wants it; the form is read already."""

    def __init__(self, headers: dict[str, str], form: dict[str, str]) -> None:
        super().__init__("POST", "https://authority.example/token", headers=headers)
        self.payload = BasicOAuth2Payload(form)
        self._form = form

    @property
    def form(self) -> dict[str, str]:
        return self._form

    @property
    def args(self) -> dict[str, str]:
        return {}


_METHODS = ["client_secret_basic", "client_secret_post", "none"]


class _ClientCredentials(grants.ClientCredentialsGrant):  # type: ignore[misc]
    TOKEN_ENDPOINT_AUTH_METHODS = _METHODS[:2]


class Authority(AuthorizationServer):  # type: ignore[misc]
    """The server; `used` are the refresh tokens that came, in order, `reused` those that came again."""

    def __init__(self) -> None:
        super().__init__()
        self.lives_s = 3600.0
        self.rotates = True
        self.delay_s = 0.0
        self.tells_life = True
        self.prefix = ""
        """Of all tokens."""
        self.used: list[str] = []
        self.reused: list[str] = []
        self.forms: list[dict[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.issued: list[Token] = []
        self.revoked: set[str] = set()
        self.refused: set[str] = set()
        self.asked: list[str] = []
        """The access tokens with which the API was asked."""
        self.url = ""
        self.api = ""
        self._next: list[str | tuple[int, bytes]] = []
        self.arrived = asyncio.Event()
        self.register_token_generator("default", self._generated)
        self.register_grant(_grant(self))
        self.register_grant(_ClientCredentials)

    # -- what a test tells it ------------------------------------------------------------------------------------------

    def logs_in(self, lives_s: float | None = None) -> Token:
        """The tokens of a new login."""
        return self._issue(secrets.token_hex(4), "", refreshes=True, lives_s=lives_s)

    def breaks_before(self) -> None:
        """The next request is dropped unseen."""
        self._next.append("before")

    def breaks_after(self) -> None:
        """The next request is done, and its answer dropped."""
        self._next.append("after")

    def hangs(self) -> None:
        """The next request is done, and never answered."""
        self._next.append("hangs")

    def answers(self, status: int, body: bytes = b"{}") -> None:
        """The next request gets this, undone."""
        self._next.append((status, body))

    def revoke(self, access: str) -> None:
        """The API refuses an access token from now on."""
        self.refused.add(access)

    @property
    def newest(self) -> Token:
        """What was issued last."""
        return self.issued[-1]

    # -- Authlib's side ------------------------------------------------------------------------------------------------

    def query_client(self, client_id: str) -> Client | None:
        return Client() if client_id == CLIENT_ID else None

    def save_token(self, token: dict[str, Any], request: Any) -> None:
        pass  # It was noted when it was made.

    def send_signal(self, name: str, *args: Any, **more: Any) -> None:
        pass

    def create_oauth2_request(self, request: _Request) -> _Request:
        return request

    def handle_response(self, status: int, body: Any, headers: Any) -> tuple[int, Any]:
        return status, body

    def _generated(self, *, include_refresh_token: bool, scope: str | None = None, user: Any = None, **_: Any) -> Any:
        family = user or secrets.token_hex(4)
        token = self._issue(family, scope or "", refreshes=include_refresh_token)
        made: dict[str, Any] = {"token_type": "Bearer", "access_token": token.access}
        if self.tells_life:
            made["expires_in"] = round(self.lives_s)
        return made | ({"refresh_token": token.refresh} if token.refresh else {})

    def _issue(self, family: str, scope: str, *, refreshes: bool, lives_s: float | None = None) -> Token:
        number = len(self.issued)
        token = Token(
            family,
            f"{self.prefix}access-{number}-{secrets.token_hex(6)}",
            f"{self.prefix}refresh-{number}-{secrets.token_hex(6)}" if refreshes else "",
            scope,
            time.monotonic() + (self.lives_s if lives_s is None else lives_s),
        )
        self.issued.append(token)
        return token

    def take(self, refresh_token: str) -> Token | None:
        """The token that a refresh token belongs to; one that comes again ends its family."""
        self.used.append(refresh_token)
        token = next((token for token in self.issued if token.refresh == refresh_token), None)
        if token is None or token.family in self.revoked:
            return None
        if token.is_used:
            self.reused.append(refresh_token)
            self.revoked.add(token.family)
            return None
        return token

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    async def _token(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.content_type == "application/json":
            form = msgspec.json.decode(body, type=dict[str, str])
        else:
            form = {name: str(value) for name, value in (await request.post()).items()}
        self.forms.append(form)
        self.headers.append(dict(request.headers))
        self.arrived.set()
        how = self._next.pop(0) if self._next else ""
        if how == "before":
            self.forms.pop()
            return _dropped(request)
        if isinstance(how, tuple):
            return web.Response(status=how[0], body=how[1], content_type="application/json")
        status, answer = self.create_token_response(_Request(dict(request.headers), form))
        await asyncio.sleep(self.delay_s)
        if how == "after":
            return _dropped(request)
        if how == "hangs":
            await asyncio.Event().wait()
        return web.json_response(answer, status=status)

    async def _answer(self, request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.asked.append(given)
        token = next((token for token in self.issued if token.access == given), None)
        is_good = token is not None and not token.is_expired() and token.family not in self.revoked
        if not is_good or given in self.refused:
            return web.json_response({"error": {"message": "no", "code": "invalid_api_key"}}, status=401)
        return web.json_response(ANSWER)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Authority]:
        """Serves until the block ends."""
        app = web.Application()
        app.router.add_post("/token", self._token)
        app.router.add_route("*", "/v1/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.api = f"http://{host}:{port}"
        self.url = f"{self.api}/token"
        try:
            yield self
        finally:
            await runner.cleanup()


def _dropped(request: web.Request) -> web.Response:
    assert request.transport is not None, "its request has just come"
    request.transport.abort()
    return web.Response()


def _grant(authority: Authority) -> type[grants.RefreshTokenGrant]:
    class RefreshTokens(grants.RefreshTokenGrant):  # type: ignore[misc]
        TOKEN_ENDPOINT_AUTH_METHODS = _METHODS

        @property
        def INCLUDE_NEW_REFRESH_TOKEN(self) -> bool:  # noqa: N802 - Authlib's name
            return authority.rotates

        def authenticate_refresh_token(self, refresh_token: str) -> Token | None:
            return authority.take(refresh_token)

        def authenticate_user(self, refresh_token: Token) -> str:
            return refresh_token.family

        def revoke_old_credential(self, refresh_token: Token) -> None:
            refresh_token.is_used = authority.rotates

    return RefreshTokens
