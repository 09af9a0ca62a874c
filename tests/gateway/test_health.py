"""Health probes as an upstream sees them, and what its answers mean."""

from __future__ import annotations

import socket

import pytest

from balancer.domain import Health, OAuthDetail, Provider, Timeouts
from balancer.gateway.health import HealthProbe, health_url, means_alive
from balancer.gateway.upstream import UpstreamClient
from tests.actors import Upstream
from tests.builders import a_provider
from tests.gateway.conftest import KEY, Serve, a_document
from tests.store.conftest import eventually

ALIVE = (200, 204, 301, 400, 404, 405, 429, 499)
DEAD = (100, 401, 403, 407, 408, 421, 500, 502, 503, 504, 529)


class Resolved:
    """Credentials that need no store."""

    def provider(self, uuid: str) -> Provider | None:
        raise AssertionError("a probe is given its provider, and looks up none")

    def access_token(self, provider: Provider) -> str:
        return provider.access_token

    def headers(self, provider: Provider) -> dict[str, str]:
        return provider.headers

    def query(self, provider: Provider) -> dict[str, str]:
        return provider.query

    def proxy_url(self, provider: Provider) -> str:
        return provider.proxy_url


async def ask(provider: Provider) -> bool:
    upstream = UpstreamClient(1)
    try:
        return await HealthProbe(Resolved(), upstream)(provider)
    finally:
        await upstream.close()


@pytest.mark.parametrize(("statuses", "is_alive"), [(ALIVE, True), (DEAD, False)])
def test_an_answer_means_alive_unless_it_is_what_a_request_would_fail_with(
    statuses: tuple[int, ...], is_alive: bool
) -> None:
    assert {status: means_alive(status) for status in statuses} == dict.fromkeys(statuses, is_alive)


@pytest.mark.parametrize(
    ("base", "path", "url"),
    [
        ("https://up.invalid/v1", "/health", "https://up.invalid/health?key=ours"),
        ("https://up.invalid:8443/proxy/v1/", "proxy/ready", "https://up.invalid:8443/proxy/ready?key=ours"),
        ("http://up.invalid", "", "http://up.invalid/?key=ours"),
        ("http://up.invalid", "/h?deep=1&key=theirs", "http://up.invalid/h?deep=1&key=ours"),
    ],
)
def test_the_path_is_one_of_the_providers_host(base: str, path: str, url: str) -> None:
    provider = a_provider(api_base=base, health=Health(path=path, interval_s=1))
    assert health_url(provider, {"key": "ours"}) == url


async def test_the_probe_is_a_get_with_the_providers_own_credential(upstream: Upstream) -> None:
    provider = a_provider(
        api_base=f"{upstream.url}/v1",
        token=KEY,
        headers={"x-org": "7"},
        query={"tenant": "t"},
        health=Health(path="/health", interval_s=1),
    )
    assert await ask(provider)
    sent = upstream.last
    assert (sent.method, sent.target, sent.body) == ("GET", "/health?tenant=t", b"")
    assert (sent.header("authorization"), sent.header("x-org")) == (f"Bearer {KEY}", "7")


async def test_an_anthropic_account_is_asked_as_one(upstream: Upstream) -> None:
    provider = a_provider(
        api_base=upstream.url,
        api_style="anthropic",
        auth_type="oauth",
        oauth_detail=OAuthDetail(access_token=KEY),
        health=Health(path="/v1/models", interval_s=1),
    )
    assert await ask(provider)
    assert upstream.last.header("authorization") == f"Bearer {KEY}"
    assert upstream.last.header("anthropic-version") is not None


@pytest.mark.parametrize("status", [200, 503])
async def test_what_the_upstream_answers_is_what_is_told(upstream: Upstream, status: int) -> None:
    upstream.answers(status)
    assert await ask(a_provider(api_base=upstream.url)) is (status == 200)


async def test_who_hangs_up_who_is_silent_and_who_is_not_there_is_dead(upstream: Upstream) -> None:
    upstream.sends(b"HTTP/1.1 2")
    assert not await ask(a_provider(api_base=upstream.url))
    upstream.stalls()
    assert not await ask(a_provider(api_base=upstream.url, timeouts=Timeouts(headers_s=0.05)))
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert not await ask(a_provider(api_base=f"http://127.0.0.1:{port}"))


async def test_a_gateway_notices_that_an_upstream_is_down_before_a_request_does(
    serve: Serve, upstream: Upstream
) -> None:
    upstream.answers(503)
    watched = {"health": {"path": "/health", "interval_s": 1}, "breaker": {"failures": 1, "open_s": 60}}
    served = await serve(a_document(upstream.url, **watched))

    async def is_open() -> bool:
        view = await served.view()
        return view.breaker_state("up:up-model") == "open" and view.breaker_state("ant:up-model") == "open"

    await eventually(is_open)
    async with served.session.get(f"{served.url}/metrics") as response:
        text = await response.text()
    assert 'balancer_breaker_state{pool="default",service="up:up-model"} 2.0' in text
    assert {request.target for request in upstream.received} == {"/health"}
    assert {request.header("authorization") for request in upstream.received} == {f"Bearer {KEY}", None}
