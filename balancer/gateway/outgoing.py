"""The request as it goes upstream: made anew for each service that is tried."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import msgspec

from balancer import bodies
from balancer.dialects import Accounts, Headers
from balancer.dialects.headers import is_of_an_api, request_headers
from balancer.dialects.paths import Route, upstream_url
from balancer.dialects.styles import ACCOUNTS
from balancer.domain import ApiStyle, Provider, is_secret_name
from balancer.errors import DeadlineError, NoServiceError
from balancer.gateway.attempts import Providers
from balancer.gateway.masking import Mask
from balancer.gateway.messages import ClientRequest, UpstreamRequest
from balancer.gateway.translating import Translated

LOOK_AGAIN_S = 1.0
_FORGET_S = 60.0
_URLS_KEPT = 64
_HEADERS_KEPT = 64
_USAGE_PATHS = ("/v1/chat/completions", "/v1/completions")
"""Streams that are asked for there tell their usage to who asks for it."""


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """A request for one service, and the mask over what must not come back of it.

    `hides_usage`: its stream will tell a usage that the client did not ask for.
    """

    request: UpstreamRequest
    mask: Mask
    hides_usage: bool = False
    translated: Translated | None = None
    """Where it goes out in another API than it came in."""

    @property
    def style(self) -> ApiStyle | None:
        """What the service speaks, None for what its client speaks."""
        return None if self.translated is None else self.translated.provider.api_style


class Account:
    """A provider with its credentials as they were last resolved, and what follows from them."""

    def __init__(
        self, provider: Provider, token: str, own: dict[str, str], query: dict[str, str], proxy_url: str
    ) -> None:
        self.provider = provider
        self.resolved = (token, own, query, proxy_url)
        self.looked_at = 0.0
        self._forgot_at = time.monotonic()
        self._urls: dict[tuple[str, str, str], str] = {}
        self._headers: dict[tuple[Headers, str, bool, bool], Headers] = {}
        self._has_request_id = any(name.lower() == "x-request-id" for name in own)
        self.mask = Mask((token, *_secrets(own, provider.headers), *_secrets(query, provider.query)))

    def forget(self, now: float) -> None:
        """Drops the headers of clients after a minute: their credentials are among them."""
        if now - self._forgot_at >= _FORGET_S:
            self._forgot_at = now
            self._headers.clear()

    def url(self, path: str, model: str, query: str) -> str:
        """Where a request goes; those that come again and again are kept."""
        key = (path, model, query)
        url = self._urls.get(key)
        if url is None:
            if len(self._urls) >= _URLS_KEPT:
                self._urls.clear()
            url = self._urls[key] = upstream_url(self.provider, path, model, query, self.resolved[2])
        return url

    def headers(
        self,
        client: ClientRequest,
        dialect: Accounts,
        *,
        is_plain: bool,
        drops: frozenset[str],
        is_translated: bool = False,
    ) -> tuple[Headers, Headers]:
        """What goes upstream, and of it what is this request's alone: most clients send the same again and again.

        Of the client's headers those that it `drops`, by their names in lower case, do not; where it `is_translated`,
        none that says something in the client's API.
        """
        asked = client.headers
        if drops and not drops.isdisjoint(client.first):
            asked = tuple(pair for pair in asked if pair[0].lower() not in drops)
        key = (asked, dialect.name, is_plain, is_translated)
        kept = self._headers.get(key)
        if kept is None:
            if len(self._headers) >= _HEADERS_KEPT:
                self._headers.clear()
            token, own, _, _ = self.resolved
            if is_translated:
                told = {"Content-Type": "application/json", "Accept": "*/*"}
                ours = told | dialect.credential_headers(self.provider, token, _nothing) | own
                asked = tuple(pair for pair in asked if not is_of_an_api(pair[0].lower()))
            else:
                ours = dialect.credential_headers(self.provider, token, client.joined) | own
            kept = self._headers[key] = request_headers(asked, ours, identity_only=is_plain)
        more: Headers = () if self._has_request_id else (("x-request-id", client.request_id),)
        return kept, more if client.witness is None else (*more, *client.witness.headers)


class Preparer:
    """Makes them, with the credentials of the providers."""

    def __init__(self, providers: Providers, drops: frozenset[str] = frozenset()) -> None:
        """`drops`: the names in lower case of client's headers that are for no upstream."""
        self._providers = providers
        self._drops = drops
        self._accounts: dict[str, Account] = {}

    def provider(self, service_id: str) -> Provider:
        """The provider of a service. Raises NoServiceError when it is gone."""
        provider = self._providers.provider(service_id.partition(":")[0])
        if provider is None:
            raise NoServiceError(f"the provider of service {service_id} is gone")
        return provider

    def generation(
        self,
        request: ClientRequest,
        route: Route,
        peek: bodies.Peek,
        service_id: str,
        *,
        body: bytes,
        needs_plain: bool,
        elapsed_s: float,
    ) -> Outgoing:
        """A request that a model answers, its body as it was peeked into.

        `needs_plain` when its answer is to be read or edited on its way.

        `elapsed_s` of its time have passed. Raises DeadlineError when that is all which the provider gives to it,
        ConfigurationError when a credential is not there.
        """
        provider = self.provider(service_id)
        if elapsed_s >= provider.timeout:
            raise _has_waited()
        hides_usage = lacks_usage(route, peek) and provider.stream_usage
        body = with_model(body, request.header("content-type"), peek, service_id.partition(":")[2])
        if hides_usage:
            body = bodies.ask_for_usage(body, peek)
        is_plain = needs_plain or hides_usage
        outgoing, mask = self._made(provider, request, route, service_id, body, is_plain, provider.timeout - elapsed_s)
        return Outgoing(request=outgoing, mask=mask, hides_usage=hides_usage)

    def translated(self, request: ClientRequest, translated: Translated, *, elapsed_s: float) -> Outgoing:
        """A request as a service of another API gets it, of whose time so much has passed. Raises as `generation`."""
        provider = translated.provider
        if elapsed_s >= provider.timeout:
            raise _has_waited()
        account = self._account(provider)
        headers, more = account.headers(
            request, ACCOUNTS[provider.api_style], is_plain=True, drops=self._drops, is_translated=True
        )
        outgoing = UpstreamRequest(
            provider=provider.name,
            method="POST",
            url=account.url(translated.path, translated.target.model, ""),
            headers=headers,
            more=more,
            body=translated.body,
            proxy_url=account.resolved[3],
            timeouts=provider.timeouts,
            timeout_s=provider.timeout - elapsed_s,
        )
        return Outgoing(request=outgoing, mask=account.mask, translated=translated)

    def account(self, service_id: str) -> Account:
        """The account that serves, as it is now. Raises NoServiceError, ConfigurationError."""
        return self._account(self.provider(service_id))

    def common(
        self, client: ClientRequest, route: Route, service_id: str, account: Account, *, lacks_usage: bool
    ) -> Outgoing | None:
        """What goes upstream of every request with this head, without a body; None where that is more than the body.

        `account` is the service's. `lacks_usage`: they are streams whose clients do not ask for their usage.
        """
        provider = account.provider
        hides_usage = lacks_usage and provider.stream_usage
        outgoing, mask = self._made(provider, client, route, service_id, b"", hides_usage, provider.timeout)
        if len(outgoing.more) != 1:
            return None
        outgoing = msgspec.structs.replace(outgoing, more=())
        return Outgoing(request=outgoing, mask=mask, hides_usage=hides_usage)

    def request(
        self, request: ClientRequest, route: Route, service_id: str, body: bytes, *, needs_plain: bool
    ) -> Outgoing:
        """A request with this body, as it is. Raises ConfigurationError when a credential is not there."""
        provider = self.provider(service_id)
        outgoing, mask = self._made(provider, request, route, service_id, body, needs_plain, provider.timeout)
        return Outgoing(request=outgoing, mask=mask)

    def _made(
        self,
        provider: Provider,
        request: ClientRequest,
        route: Route,
        service_id: str,
        body: bytes,
        is_plain: bool,
        timeout_s: float,
    ) -> tuple[UpstreamRequest, Mask]:
        account = self._account(provider)
        headers, more = account.headers(request, route.dialect, is_plain=is_plain, drops=self._drops)
        outgoing = UpstreamRequest(
            provider=provider.name,
            method=request.method,
            url=account.url(route.path, service_id.partition(":")[2], request.query),
            headers=headers,
            more=more,
            body=body,
            proxy_url=account.resolved[3],
            timeouts=provider.timeouts,
            timeout_s=timeout_s,
        )
        return outgoing, account.mask

    def _account(self, provider: Provider) -> Account:
        """The provider with its credentials, which are resolved again after a second: they may be in a file."""
        account, now = self._accounts.get(provider.uuid), time.monotonic()
        if account is not None and account.provider is provider and now - account.looked_at < LOOK_AGAIN_S:
            return account
        token = "" if provider.no_key_required else self._providers.access_token(provider)
        own, query = self._providers.headers(provider), self._providers.query(provider)
        proxy_url = self._providers.proxy_url(provider)
        if account is None or account.provider is not provider or account.resolved != (token, own, query, proxy_url):
            account = self._accounts[provider.uuid] = Account(provider, token, own, query, proxy_url)
        account.looked_at = now
        account.forget(now)
        return account


def _has_waited() -> DeadlineError:
    """It came free too late. Sent all the same, it would be a failure of a service that has done nothing wrong."""
    return DeadlineError("the request has waited for as long as the provider gives to a whole one")


def lacks_usage(route: Route, peek: bodies.Peek) -> bool:
    """True for a stream of OpenAI's whose client does not ask for its usage."""
    return bool(peek.stream) and route.path in _USAGE_PATHS and not peek.asks_for_usage


def with_model(body: bytes, content_type: str, peek: bodies.Peek, model: str) -> bytes:
    """The body, JSON or a form, with the service's model for the one that was asked for."""
    if not content_type.lower().startswith("multipart/"):
        return bodies.replace_model(body, model, peek)
    return body if model == peek.model else bodies.replace_form_model(body, content_type, model)


def _nothing(_: str) -> str:
    """What a client says with a header of another API's."""
    return ""


def _secrets(resolved: Mapping[str, str], kept: Mapping[str, str]) -> Iterator[str]:
    """Of a provider's headers or parameters the credentials: by their name, or because they are kept elsewhere."""
    for name, value in resolved.items():
        if is_secret_name(name) or value != kept[name]:
            yield from value.split()  # A scheme, as in `Bearer …`, may be left out where it is repeated.
