"""Which models a provider offers: its own list, page by page, asked for with its own credential."""

from __future__ import annotations

from urllib.parse import urlencode

import msgspec

from balancer import lenient
from balancer.dialects import google
from balancer.dialects.headers import request_headers
from balancer.dialects.paths import upstream_url
from balancer.dialects.styles import ACCOUNTS
from balancer.domain import Provider
from balancer.errors import UpstreamAnswerError
from balancer.gateway.attempts import Secrets
from balancer.gateway.messages import Upstream, UpstreamRequest, UpstreamResponse

_MOST_BYTES = 8 * 2**20
_MOST_PAGES = 50
_PAGE = 1000
_PUBLISHERS_PAGE = 100


class _Model(msgspec.Struct):
    id: str


class _Page(msgspec.Struct):
    data: list[_Model]
    has_more: bool = False
    last_id: str | None = None

    def names(self) -> list[str]:
        return [model.id for model in self.data]

    def after(self) -> str:
        return (self.has_more and self.last_id) or ""


class _GoogleModel(msgspec.Struct, rename="camel"):
    name: str
    supported_generation_methods: list[str] | None = None


class _GooglePage(msgspec.Struct, rename="camel"):
    """Of Gemini's list the `models`, of Vertex AI's the `publisher_models`, which do not tell what they can."""

    models: list[_GoogleModel] = []
    publisher_models: list[_GoogleModel] = []
    next_page_token: str = ""

    def names(self) -> list[str]:
        return [
            google.model_name(model.name)
            for model in (*self.models, *self.publisher_models)
            if model.supported_generation_methods is None or "generateContent" in model.supported_generation_methods
        ]

    def after(self) -> str:
        return self.next_page_token


_page = msgspec.json.Decoder(_Page)
_google_page = msgspec.json.Decoder(_GooglePage)


async def models_of(provider: Provider, secrets: Secrets, upstream: Upstream) -> tuple[str, ...]:
    """The names of the models that the provider lists, in its order, each once; of Google's those that generate.

    Raises UpstreamError when it does not answer, or with something else; ConfigurationError when its secrets are not
    there.
    """
    names: dict[str, None] = {}
    after = ""
    for _ in range(_MOST_PAGES):
        response = await upstream.send(_request(provider, secrets, after))
        try:
            body = await _read(provider, response)
        finally:
            await response.close()
        if response.status != 200:
            raise UpstreamAnswerError(f"{provider.name} answered {response.status} to /v1/models")
        try:
            page = _page_of(provider, body)
        except lenient.UNREADABLE as exc:
            raise UpstreamAnswerError(f"{provider.name} answered /v1/models with no list of models") from exc
        names |= dict.fromkeys(page.names())
        if page.after() in ("", after):
            return tuple(names)
        after = page.after()
    raise UpstreamAnswerError(f"{provider.name} has more than {_MOST_PAGES} pages of models")


def _request(provider: Provider, secrets: Secrets, after: str) -> UpstreamRequest:
    token = "" if provider.no_key_required else secrets.access_token(provider)
    accounts = ACCOUNTS[provider.api_style]
    headers = accounts.credential_headers(provider, token, lambda name: "") | secrets.headers(provider)
    return UpstreamRequest(
        provider=provider.name,
        method="GET",
        url=upstream_url(provider, google.MODELS, "", urlencode(_paging(provider, after)), secrets.query(provider)),
        headers=request_headers((), headers, identity_only=True),
        body=b"",
        proxy_url=secrets.proxy_url(provider),
        timeouts=provider.timeouts,
        timeout_s=min(provider.timeout, 60),
    )


def _page_of(provider: Provider, body: bytes) -> _Page | _GooglePage:
    return lenient.decode(_google_page, body) if provider.api_style == "google" else lenient.decode(_page, body)


def _paging(provider: Provider, after: str) -> dict[str, str]:
    """What asks for the page that comes after another, or for the first."""
    match provider.api_style:
        case "openai":
            return {}
        case "anthropic":
            return {"limit": str(_PAGE)} | ({"after_id": after} if after else {})
        case "google":
            is_vertex = provider.api_base.rstrip("/").endswith("/publishers/google")
            size = {"pageSize": str(_PUBLISHERS_PAGE if is_vertex else _PAGE)}
            return size | ({"pageToken": after} if after else {})


async def _read(provider: Provider, response: UpstreamResponse) -> bytes:
    chunks, held = [], 0
    while chunk := await response.read():
        chunks.append(chunk)
        held += len(chunk)
        if held > _MOST_BYTES:
            raise UpstreamAnswerError(f"{provider.name} answered /v1/models with more than {_MOST_BYTES} bytes")
    return b"".join(chunks)
