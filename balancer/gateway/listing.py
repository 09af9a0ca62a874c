"""Which models a provider offers: its own list, page by page, asked for with its own credential."""

from __future__ import annotations

from urllib.parse import urlencode

import msgspec

from balancer import lenient
from balancer.dialects.anthropic import ANTHROPIC
from balancer.dialects.headers import request_headers
from balancer.dialects.openai import OPENAI
from balancer.dialects.paths import upstream_url
from balancer.domain import Provider
from balancer.errors import UpstreamAnswerError
from balancer.gateway.attempts import Secrets
from balancer.gateway.messages import Upstream, UpstreamRequest, UpstreamResponse

_MOST_BYTES = 8 * 2**20
_MOST_PAGES = 50
_PAGE = 1000


class _Model(msgspec.Struct):
    id: str


class _Page(msgspec.Struct):
    data: list[_Model]
    has_more: bool = False
    last_id: str | None = None


_page = msgspec.json.Decoder(_Page)


async def models_of(provider: Provider, secrets: Secrets, upstream: Upstream) -> tuple[str, ...]:
    """The names of the models that the provider lists, in its order, each once.

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
            page = lenient.decode(_page, body)
        except lenient.UNREADABLE as exc:
            raise UpstreamAnswerError(f"{provider.name} answered /v1/models with no list of models") from exc
        names |= dict.fromkeys(model.id for model in page.data)
        if not (page.has_more and page.last_id) or page.last_id == after:
            return tuple(names)
        after = page.last_id
    raise UpstreamAnswerError(f"{provider.name} has more than {_MOST_PAGES} pages of models")


def _request(provider: Provider, secrets: Secrets, after: str) -> UpstreamRequest:
    token = "" if provider.no_key_required else secrets.access_token(provider)
    dialect = ANTHROPIC if provider.api_style == "anthropic" else OPENAI
    headers = dialect.credential_headers(provider, token, lambda name: "") | secrets.headers(provider)
    paging: dict[str, str] = {}
    if dialect is ANTHROPIC:
        paging = {"limit": str(_PAGE)} | ({"after_id": after} if after else {})
    return UpstreamRequest(
        provider=provider.name,
        method="GET",
        url=upstream_url(provider, "/v1/models", "", urlencode(paging), secrets.query(provider)),
        headers=request_headers((), headers, identity_only=True),
        body=b"",
        proxy_url=secrets.proxy_url(provider),
        timeouts=provider.timeouts,
        timeout_s=min(provider.timeout, 60),
    )


async def _read(provider: Provider, response: UpstreamResponse) -> bytes:
    chunks, held = [], 0
    while chunk := await response.read():
        chunks.append(chunk)
        held += len(chunk)
        if held > _MOST_BYTES:
            raise UpstreamAnswerError(f"{provider.name} answered /v1/models with more than {_MOST_BYTES} bytes")
    return b"".join(chunks)
