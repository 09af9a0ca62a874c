"""What is asked of a token endpoint, what its answers mean, and when it is asked."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import parse_qs

import msgspec
import pytest

from balancer import oauth
from balancer.domain import OAuthDetail
from balancer.oauth import (
    Refused,
    Renewed,
    due_ms,
    ends_ms,
    own_due_ms,
    pause_ms,
    read,
    renewal_of,
    request_of,
    seed_of,
)
from tests.builders import a_provider

MINUTE_MS, HOUR_MS = 60_000, 3_600_000
URL = "https://a.invalid/token"


def a_detail(**fields: Any) -> OAuthDetail:
    more = {name: fields.pop(name) for name in ("provider_type", "access_token", "expires_at") if name in fields}
    extra = {"token_url": URL, "client_id": "c"} | fields
    return OAuthDetail(refresh_token="r", extra_fields=extra, **more)


def asked(**fields: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Headers and fields of the request."""
    headers, body = request_of(renewal_of(a_detail(**fields)), "r t/+")
    if dict(headers)["Content-Type"] == "application/json":
        return dict(headers), msgspec.json.decode(body)
    return dict(headers), {name: values[0] for name, values in parse_qs(body.decode(), strict_parsing=True).items()}


def answered(status: int = 200, **body: Any) -> Renewed | Refused:
    return read(status, (), msgspec.json.encode(body), 0)


# -- whose tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "is_renewed"),
    [
        ({"auth_type": "oauth", "oauth_detail": OAuthDetail(refresh_token="r")}, True),
        ({"auth_type": "oauth", "oauth_detail": OAuthDetail(extra_fields={"grant": "client_credentials"})}, True),
        ({"auth_type": "oauth", "oauth_detail": OAuthDetail(access_token="a")}, False),
        ({"auth_type": "oauth", "oauth_detail": OAuthDetail(refresh_token="r"), "enabled": False}, False),
        ({"auth_type": "api_key", "oauth_detail": OAuthDetail(refresh_token="r")}, False),
        ({}, False),
    ],
)
def test_tokens_are_renewed_of_who_has_something_to_renew_them_with(more: dict[str, Any], is_renewed: bool) -> None:
    assert oauth.is_renewed(a_provider(**more)) is is_renewed


@pytest.mark.parametrize(
    ("kind", "host", "encoding", "rotates"),
    [
        ("anthropic", "console.anthropic.com", "json", True),
        ("claude_code", "console.anthropic.com", "json", True),
        ("openai", "auth.openai.com", "form", True),
        ("Codex", "auth.openai.com", "form", True),
        ("google", "oauth2.googleapis.com", "form", False),
    ],
)
def test_a_known_vendor_needs_no_endpoint(kind: str, host: str, encoding: str, rotates: bool) -> None:
    renewal = renewal_of(OAuthDetail(refresh_token="r", provider_type=kind, extra_fields={}))
    assert (renewal.token_url.split("/")[2], renewal.encoding, renewal.rotates) == (host, encoding, rotates)


def test_what_is_configured_wins_over_what_is_known() -> None:
    renewal = renewal_of(a_detail(provider_type="anthropic", encoding="form", rotates=False))
    assert (renewal.token_url, renewal.client_id, renewal.encoding, renewal.rotates) == (URL, "c", "form", False)


def test_a_refresh_token_is_taken_to_be_good_for_one_use_where_nobody_says_so() -> None:
    assert renewal_of(a_detail()).rotates
    assert not renewal_of(a_detail(grant="client_credentials", client_secret="s")).rotates


# -- the request -------------------------------------------------------------------------------------------------------


def test_a_refresh_names_the_client_in_the_form() -> None:
    headers, fields = asked(scopes=["a", "b"], parameters={"audience": "x"})
    assert fields == {
        "grant_type": "refresh_token",
        "refresh_token": "r t/+",
        "client_id": "c",
        "scope": "a b",
        "audience": "x",
    }
    assert headers == {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}


def test_a_client_with_a_secret_says_it_in_a_header_in_which_colons_cannot_mislead() -> None:
    headers, fields = asked(client_id="c:1 ü", client_secret="s:/+ %")
    pair = base64.b64decode(headers["Authorization"].removeprefix("Basic ")).decode()
    assert pair == "c%3A1%20%C3%BC:s%3A%2F%2B%20%25"
    assert fields == {"grant_type": "refresh_token", "refresh_token": "r t/+"}


def test_or_in_the_form() -> None:
    headers, fields = asked(client_secret="s", client_auth="post", grant="client_credentials")
    assert fields == {"grant_type": "client_credentials", "client_id": "c", "client_secret": "s"}
    assert "Authorization" not in headers


def test_a_vendor_that_wants_json_gets_it() -> None:
    assert asked(encoding="json")[1] == {"grant_type": "refresh_token", "refresh_token": "r t/+", "client_id": "c"}


def test_a_family_is_named_by_its_login_and_a_client_by_whom_it_asks_for_what() -> None:
    renewal = renewal_of(a_detail())
    assert seed_of(renewal, "one") == seed_of(renewal_of(a_detail(client_id="other")), "one")
    assert seed_of(renewal, "one") != seed_of(renewal, "two")
    client = renewal_of(a_detail(grant="client_credentials", client_secret="s"))
    other = renewal_of(a_detail(grant="client_credentials", client_secret="another", scopes="x"))
    assert seed_of(client, "") == seed_of(msgspec.structs.replace(client, client_secret="another"), "")
    assert seed_of(client, "") != seed_of(other, "")
    assert (seed_of(renewal, "one")[0], seed_of(client, "")[0]) == ("r", "c")
    assert "one" not in seed_of(renewal, "one")


# -- the answer --------------------------------------------------------------------------------------------------------


def a_jwt(**claims: Any) -> str:
    parts = (msgspec.json.encode(part) for part in ({"alg": "none"}, claims))
    return ".".join([*(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts), "signature"])


@pytest.mark.parametrize(
    ("body", "renewed"),
    [
        (
            {"access_token": "a", "refresh_token": "r2", "expires_in": 3600, "token_type": "bearer"},
            Renewed(access_token="a", refresh_token="r2", life_ms=HOUR_MS),
        ),
        ({"access_token": "a", "expires_in": "3600"}, Renewed(access_token="a", life_ms=HOUR_MS)),
        ({"access_token": "a", "expires_in": 1.5}, Renewed(access_token="a", life_ms=1500)),
        ({"access_token": "a", "expires_in": 0, "refresh_token": ""}, Renewed(access_token="a")),
        ({"access_token": "a", "expires_in": -5, "error": None}, Renewed(access_token="a")),
        ({"access_token": "a", "expires_in": True, "scope": 7}, Renewed(access_token="a")),
        ({"access_token": "a.b.c"}, Renewed(access_token="a.b.c")),
    ],
)
def test_new_tokens_are_read_as_endpoints_write_them(body: dict[str, Any], renewed: Renewed) -> None:
    assert answered(**body) == renewed


def test_a_token_that_says_itself_how_long_it_lives_is_believed_whatever_its_clock() -> None:
    token = a_jwt(iat=1_000_000, exp=1_003_600)
    assert answered(access_token=token) == Renewed(access_token=token, life_ms=HOUR_MS)
    assert answered(access_token=token, expires_in=60) == Renewed(access_token=token, life_ms=MINUTE_MS)


def test_a_life_beyond_reason_is_cut() -> None:
    renewed = answered(access_token="a", expires_in=10**300)
    assert isinstance(renewed, Renewed)
    assert renewed.life_ms is not None
    assert renewed.life_ms < 2**53


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (400, {"error": "invalid_grant"}, "lost"),
        (401, {"error": {"code": "refresh_token_reused", "message": "SECRET"}}, "lost"),
        (403, {"error": {"type": "invalid_grant"}}, "lost"),
        (200, {"error": "invalid_grant"}, "lost"),
        (500, {"error": "invalid_grant"}, "lost"),
        (401, {"error": "invalid_client"}, "failed"),
        (400, {"error": "SECRET"}, "failed"),
        (404, {}, "failed"),
        (302, {}, "failed"),
        (429, {}, "failed"),
        (503, {}, "failed"),
        (200, {"error": "invalid_client"}, "failed"),
        (500, {}, "in_doubt"),
        (502, {}, "in_doubt"),
        (529, {"error": "SECRET"}, "in_doubt"),
        (200, {}, "in_doubt"),
        (200, {"access_token": ""}, "in_doubt"),
        (200, {"access_token": "SECRET\r\nx: y"}, "in_doubt"),
        (200, {"access_token": "SECRET ü"}, "in_doubt"),
        (200, {"access_token": 7}, "in_doubt"),
        (200, {"access_token": "SECRET", "token_type": "mac"}, "in_doubt"),
        (200, {"access_token": "SECRET", "refresh_token": 7}, "in_doubt"),
        (200, {"access_token": "SECRET", "error": "SECRET"}, "in_doubt"),
        (101, {}, "in_doubt"),
    ],
)
def test_anything_else_is_refused_in_words_of_ours(status: int, body: dict[str, Any], outcome: str) -> None:
    refused = answered(status, **body)
    assert isinstance(refused, Refused)
    assert refused.outcome == outcome
    assert "SECRET" not in refused.reason


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'"text"', b"\xff", b'{"access_token"'])
def test_what_is_no_answer_leaves_a_doubt_where_it_says_success(body: bytes) -> None:
    assert [getattr(read(status, (), body, 0), "outcome", None) for status in (200, 400)] == ["in_doubt", "failed"]


def test_a_pause_that_the_endpoint_asks_for_is_told() -> None:
    refused = read(429, (("Retry-After", "90"),), b"{}", 0)
    assert isinstance(refused, Refused)
    assert refused.after_ms == 90_000


# -- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("life_ms", "ends", "due"),
    [
        (HOUR_MS, 1000 + HOUR_MS, 1000 + 55 * MINUTE_MS),
        (10 * MINUTE_MS, 1000 + 10 * MINUTE_MS, 1000 + 5 * MINUTE_MS),
        (4 * MINUTE_MS, 1000 + 4 * MINUTE_MS, 1000 + 2 * MINUTE_MS),
        (1, 1001, 1001),
        (None, 0, oauth.NEVER_MS),
    ],
)
def test_a_token_is_due_five_minutes_before_its_end_or_at_half_of_a_short_life(
    life_ms: int | None, ends: int, due: int
) -> None:
    assert (ends_ms(1000, life_ms), due_ms(1000, life_ms)) == (ends, due)


def test_the_configurations_own_token_is_due_by_its_date() -> None:
    assert own_due_ms(OAuthDetail()) == 0
    assert own_due_ms(OAuthDetail(access_token="a")) == oauth.NEVER_MS
    detail = OAuthDetail(access_token="a", expires_at="1970-01-01T01:00:00+00:00")
    assert own_due_ms(detail) == 55 * MINUTE_MS
    assert own_due_ms(msgspec.structs.replace(detail, expires_at="1970-01-01T00:01:00")) == 0
    assert own_due_ms(msgspec.structs.replace(detail, expires_at="1960-01-01T00:01:00Z")) == 0


def test_pauses_grow_to_a_minute_and_give_way_to_what_is_asked_for() -> None:
    assert [pause_ms(n, None) for n in (1, 2, 3, 4, 5, 99)] == [5000, 10_000, 20_000, 40_000, 60_000, 60_000]
    assert (pause_ms(1, 90_000), pause_ms(1, 0)) == (90_000, 5000)
