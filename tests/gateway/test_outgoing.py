"""Requests on their way up: what is kept from one to the next, and what is not."""

from __future__ import annotations

import msgspec
import pytest

from balancer import bodies
from balancer.dialects import Headers
from balancer.dialects.paths import Route, route
from balancer.domain import Provider
from balancer.errors import DeadlineError
from balancer.gateway import outgoing
from balancer.gateway.messages import ClientRequest
from balancer.gateway.outgoing import Outgoing, Preparer
from tests.builders import a_provider

BODY = b'{"model":"m"}'
SDK: Headers = (("Content-Type", "application/json"), ("Accept-Encoding", "gzip"), ("X-Own", "1"))


class Vault:
    """One provider, whose credential may change."""

    def __init__(self, provider: Provider) -> None:
        self.held = provider
        self.token = "sk-first-0123456789"
        self.asked = 0

    def provider(self, uuid: str) -> Provider | None:
        return self.held

    def access_token(self, provider: Provider) -> str:
        self.asked += 1
        return self.token

    def headers(self, provider: Provider) -> dict[str, str]:
        return dict(provider.headers)

    def query(self, provider: Provider) -> dict[str, str]:
        return dict(provider.query)

    def proxy_url(self, provider: Provider) -> str:
        return provider.proxy_url


class Clock:
    """The seconds that the module sees."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that the test moves."""
    fake = Clock()
    monkeypatch.setattr(outgoing, "time", fake)
    return fake


def made(
    preparer: Preparer, headers: Headers = SDK, *, request_id: str = "r1", plain: bool = False, elapsed_s: float = 0
) -> Outgoing:
    request = ClientRequest(
        method="POST", path="/v1/chat/completions", query="", headers=headers, body=BODY, request_id=request_id
    )
    found = route("POST", request.path, speaks_anthropic=False)
    assert isinstance(found, Route)
    peek = bodies.peek(BODY)
    return preparer.generation(request, found, peek, "eu:m", body=request.body, needs_plain=plain, elapsed_s=elapsed_s)


def test_equal_heads_share_what_goes_up_and_the_id_is_each_requests_own(clock: Clock) -> None:
    preparer = Preparer(Vault(a_provider("eu")))

    first, second = made(preparer), made(preparer, tuple(SDK), request_id="r2")

    assert first.request.headers is second.request.headers
    assert (first.request.more, second.request.more) == ((("x-request-id", "r1"),), (("x-request-id", "r2"),))


def test_other_heads_and_other_needs_have_headers_of_their_own(clock: Clock) -> None:
    preparer = Preparer(Vault(a_provider("eu")))

    sent = dict(made(preparer).request.headers)
    plain = dict(made(preparer, plain=True).request.headers)
    other = dict(made(preparer, (*SDK, ("X-More", "2"))).request.headers)

    assert (sent["Accept-Encoding"], plain["Accept-Encoding"]) == ("gzip", "identity")
    assert other == sent | {"X-More": "2"}


def test_a_new_credential_is_sent_after_a_second_and_masked_at_once(clock: Clock) -> None:
    vault = Vault(a_provider("eu"))
    preparer = Preparer(vault)
    assert dict(made(preparer).request.headers)["Authorization"] == "Bearer sk-first-0123456789"
    vault.token = "sk-second-0123456789"

    clock.now += 0.9
    assert dict(made(preparer).request.headers)["Authorization"] == "Bearer sk-first-0123456789"
    clock.now += 0.2
    renewed = made(preparer)

    assert dict(renewed.request.headers)["Authorization"] == "Bearer sk-second-0123456789"
    assert renewed.mask.over(b"sk-second-0123456789") == b"***"
    assert vault.asked == 2


def test_an_edited_provider_counts_at_once(clock: Clock) -> None:
    vault = Vault(a_provider("eu"))
    preparer = Preparer(vault)
    made(preparer)
    vault.held = msgspec.structs.replace(vault.held, api_base="https://other.example/v1", headers={"X-Region": "eu"})

    edited = made(preparer).request

    assert edited.url == "https://other.example/v1/chat/completions"
    assert dict(edited.headers)["X-Region"] == "eu"


def test_a_providers_own_request_id_is_the_only_one(clock: Clock) -> None:
    sent = made(Preparer(Vault(a_provider("eu", headers={"X-Request-ID": "fixed"})))).request

    assert sent.more == ()
    assert [value for name, value in sent.headers if name.lower() == "x-request-id"] == ["fixed"]


def test_clients_headers_are_not_kept_for_long(clock: Clock) -> None:
    """Clients' credentials are among them."""
    preparer = Preparer(Vault(a_provider("eu")))
    made(preparer, (*SDK, ("Authorization", "Bearer client-secret")))
    account = preparer._accounts["eu"]
    assert account._headers
    clock.now += 61

    made(preparer, SDK)

    assert all(("Authorization", "Bearer client-secret") not in client for client, *_ in account._headers)


def test_what_is_kept_is_bounded(clock: Clock) -> None:
    preparer = Preparer(Vault(a_provider("eu")))
    for number in range(500):
        made(preparer, (*SDK, ("X-Number", str(number))))

    assert len(preparer._accounts["eu"]._headers) <= 64


def test_a_request_whose_time_is_over_is_not_made(clock: Clock) -> None:
    preparer = Preparer(Vault(a_provider("eu", timeout=5)))

    with pytest.raises(DeadlineError, match="as long as the provider gives"):
        made(preparer, elapsed_s=5)
    assert made(preparer, elapsed_s=2).request.timeout_s == 3
