"""What differs between the APIs: errors, credentials, lists of models, paths, headers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from balancer.dialects import Dialect, google
from balancer.dialects.anthropic import ANTHROPIC
from balancer.dialects.google import GOOGLE
from balancer.dialects.headers import client_timeout_s, request_headers, response_headers, value_of
from balancer.dialects.openai import OPENAI
from balancer.dialects.paths import route, upstream_url
from balancer.domain import Provider
from balancer.errors import (
    BalancerError,
    BodyTooLargeError,
    NoServiceError,
    RequestError,
    UnauthorizedError,
    UnknownModelError,
    UpstreamTimeoutError,
)
from balancer.sse import Parser

DIALECTS = pytest.mark.parametrize("dialect", [OPENAI, ANTHROPIC], ids=lambda dialect: str(dialect.name))


def a_provider(api_base: str = "https://up.test/v1", **fields: Any) -> Provider:
    return Provider(uuid="p", name="p", api_base=api_base, **fields)


def error_of(status: int) -> BalancerError:
    error = BalancerError("words")
    error.status = status
    return error


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_openai_error_has_its_four_fields() -> None:
    body = json.loads(OPENAI.error_body(UnknownModelError("no such model", param="model"), "r1"))

    assert body == {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "code": "model_not_found",
            "param": "model",
        }
    }


def test_an_anthropic_error_names_the_request() -> None:
    body = json.loads(ANTHROPIC.error_body(UnknownModelError("no such model", param="model"), "r1"))

    assert body == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "no such model"},
        "request_id": "r1",
    }


@pytest.mark.parametrize(
    ("error", "openai", "anthropic"),
    [
        (RequestError("x"), "invalid_request_error", "invalid_request_error"),
        (UnauthorizedError("x"), "authentication_error", "authentication_error"),
        (error_of(403), "permission_error", "permission_error"),
        (BodyTooLargeError("x"), "invalid_request_error", "request_too_large"),
        (error_of(429), "rate_limit_error", "rate_limit_error"),
        (BalancerError("x"), "server_error", "api_error"),
        (NoServiceError("x"), "server_error", "api_error"),
        (UpstreamTimeoutError("x"), "server_error", "timeout_error"),
        (error_of(529), "server_error", "overloaded_error"),
    ],
)
def test_a_status_has_the_vendors_word(error: BalancerError, openai: str, anthropic: str) -> None:
    assert json.loads(OPENAI.error_body(error, ""))["error"]["type"] == openai
    assert json.loads(ANTHROPIC.error_body(error, ""))["error"]["type"] == anthropic


@pytest.mark.parametrize(
    ("dialect", "path", "name", "table"),
    [
        (OPENAI, "/v1/chat/completions", "", {"error": {"message": "x\ny", "type": "server_error", "param": None}}),
        (OPENAI, "/v1/responses", "error", {"type": "error", "message": "x\ny", "param": None}),
        (ANTHROPIC, "/v1/messages", "error", {"type": "error", "error": {"type": "timeout_error", "message": "x\ny"}}),
    ],
)
def test_a_broken_stream_is_told_in_one_event(dialect: Dialect, path: str, name: str, table: dict[str, object]) -> None:
    [event] = Parser().feed(dialect.error_event(UpstreamTimeoutError("x\ny"), path))

    told = json.loads(event.data)
    holder = told["error"] if dialect is OPENAI and "error" in told else told
    if dialect is OPENAI:
        assert holder.pop("code") == "upstream_timeout"
    assert (event.name, told) == (name, table)


# -- models ------------------------------------------------------------------------------------------------------------


def test_models_are_listed_in_the_dialects_shape() -> None:
    assert json.loads(OPENAI.models_body(["a", "b"])) == {
        "object": "list",
        "data": [json.loads(OPENAI.model_body(model)) for model in ("a", "b")],
    }
    assert json.loads(ANTHROPIC.models_body(["a", "b"])) == {
        "data": [json.loads(ANTHROPIC.model_body(model)) for model in ("a", "b")],
        "has_more": False,
        "first_id": "a",
        "last_id": "b",
    }
    assert json.loads(ANTHROPIC.models_body([])) == {"data": [], "has_more": False, "first_id": None, "last_id": None}


@DIALECTS
def test_a_model_has_its_id(dialect: Dialect) -> None:
    assert json.loads(dialect.model_body("a/b"))["id"] == "a/b"


# -- credentials -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "fields", "client", "headers"),
    [
        (OPENAI, {}, {}, {"Authorization": "Bearer key"}),
        (OPENAI, {"auth_type": "oauth"}, {}, {"Authorization": "Bearer key"}),
        (OPENAI, {"provider_type": "azure"}, {}, {"api-key": "key"}),
        (OPENAI, {"provider_type": "azure", "auth_type": "oauth"}, {}, {"Authorization": "Bearer key"}),
        (ANTHROPIC, {}, {}, {"anthropic-version": "2023-06-01", "x-api-key": "key"}),
        (ANTHROPIC, {}, {"anthropic-version": "2024-01-01", "anthropic-beta": "a"}, {"x-api-key": "key"}),
        (
            ANTHROPIC,
            {"auth_type": "oauth"},
            {"anthropic-version": "x", "anthropic-beta": "a, b"},
            {"Authorization": "Bearer key", "anthropic-beta": "a,b,oauth-2025-04-20"},
        ),
        (
            ANTHROPIC,
            {"auth_type": "oauth"},
            {"anthropic-version": "x", "anthropic-beta": "oauth-2025-04-20,a"},
            {"Authorization": "Bearer key", "anthropic-beta": "oauth-2025-04-20,a"},
        ),
    ],
)
def test_a_credential_travels_as_the_vendor_wants_it(
    dialect: Dialect, fields: dict[str, Any], client: dict[str, str], headers: dict[str, str]
) -> None:
    assert dialect.credential_headers(a_provider(**fields), "key", lambda name: client.get(name, "")) == headers


def _silent(name: str) -> str:
    """A client that sends no headers."""
    return ""


def test_without_a_credential_none_is_sent() -> None:
    assert OPENAI.credential_headers(a_provider(), "", _silent) == {}
    assert ANTHROPIC.credential_headers(a_provider(), "", _silent) == {"anthropic-version": "2023-06-01"}


# -- headers -----------------------------------------------------------------------------------------------------------

HOP_BY_HOP = (
    ("Connection", "close, X-Listed"),
    ("X-Listed", "1"),
    ("Keep-Alive", "timeout=5"),
    ("Proxy-Connection", "close"),
    ("Proxy-Authenticate", "Basic"),
    ("Proxy-Authorization", "secret"),
    ("TE", "trailers"),
    ("Trailer", "X"),
    ("Transfer-Encoding", "chunked"),
    ("Upgrade", "h2c"),
)


def test_a_clients_connection_and_credentials_do_not_go_upstream() -> None:
    stay = (
        *HOP_BY_HOP,
        ("Host", "us"),
        ("Content-Length", "3"),
        ("Expect", "100-continue"),
        ("AUTHORIZATION", "secret"),
        ("x-api-key", "secret"),
        ("api-key", "secret"),
        ("x-goog-api-key", "secret"),
        ("Cookie", "secret"),
        ("OpenAI-Organization", "secret"),
        ("OpenAI-Project", "secret"),
        ("Forwarded", "for=1"),
        ("X-Forwarded-For", "1"),
        ("X-Forwarded-Anything", "1"),
        ("X-Real-IP", "1"),
        ("Via", "1.1 x"),
        ("X-Balancer-Pool", "x"),
        ("X-Request-Id", "theirs"),
    )
    pass_on = (("Content-Type", "application/json"), ("X-Own", "1"), ("X-Own", "2"), ("anthropic-beta", "a"))

    assert request_headers((*stay, *pass_on), {}) == (
        *pass_on,
        ("Accept-Encoding", "identity"),
    )


def test_our_headers_replace_the_clients_in_any_spelling() -> None:
    sent = request_headers((("anthropic-BETA", "a"), ("X-Own", "1")), {"Anthropic-Beta": "a,b"})

    assert sent == (("X-Own", "1"), ("Accept-Encoding", "identity"), ("Anthropic-Beta", "a,b"))


def test_a_providers_own_headers_replace_the_credential_and_the_rest() -> None:
    """Two headers that differ in case were once both sent."""
    ours = {"Authorization": "Bearer key", "authorization": "Basic own", "accept-encoding": "gzip", "X-Request-ID": "p"}

    assert request_headers((("Accept-Encoding", "zstd"),), ours) == (
        ("accept-encoding", "gzip"),
        ("authorization", "Basic own"),
        ("X-Request-ID", "p"),
    )


def test_of_the_accepted_codings_those_pass_that_we_can_decode() -> None:
    client = (("Accept-Encoding", "br, gzip"), ("accept-encoding", "zstd;q=0.5"))

    assert value_of(request_headers(client, {}), "accept-encoding") == "gzip, zstd;q=0.5"
    assert value_of(request_headers(client, {}, identity_only=True), "accept-encoding") == "identity"


def test_an_upstreams_connection_and_account_do_not_come_down() -> None:
    stay = (
        *HOP_BY_HOP,
        ("Content-Length", "3"),
        ("Date", "x"),
        ("Server", "x"),
        ("Via", "x"),
        ("Alt-Svc", "x"),
        ("Strict-Transport-Security", "x"),
        ("Set-Cookie", "secret"),
        ("OpenAI-Organization", "secret"),
        ("openai-project", "secret"),
        ("anthropic-organization-id", "secret"),
        ("x-balancer-service", "x"),
    )
    pass_on = (
        ("Content-Type", "text/event-stream"),
        ("Content-Encoding", "gzip"),
        ("Retry-After", "3"),
        ("x-ratelimit-remaining-tokens", "5"),
    )

    assert response_headers((*stay, ("X-Request-ID", "up1"), *pass_on)) == (
        ("x-upstream-request-id", "up1"),
        *pass_on,
    )


def test_a_header_is_looked_up_in_any_spelling() -> None:
    assert value_of((("X", "0"), ("Content-TYPE", "a"), ("content-type", "b")), "content-type") == "a"
    assert value_of((), "content-type") == ""


@pytest.mark.parametrize(
    ("value", "timeout_s"),
    [
        ("600", 600),
        (" 0.5 ", 0.5),
        ("600.0", 600),
        *(
            (odd, None)
            for odd in ("", "0", "0.0", "NaN", "inf", "None", "-1", "1e3", "1,5", "9" * 400, "٣", "not given")
        ),
    ],
)
def test_a_client_says_how_long_it_waits(value: str, timeout_s: float | None) -> None:
    said = {"x-stainless-timeout": value}
    said_twice = said | {"x-stainless-read-timeout": "9"}

    assert client_timeout_s(said) == timeout_s
    assert client_timeout_s(said_twice) == (timeout_s or 9)


def test_a_client_that_says_nothing_waits_for_ever() -> None:
    assert client_timeout_s({}) is None


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_line", "is_anthropic", "wanted"),
    [
        ("POST /v1/chat/completions", False, ("openai", "openai", "/v1/chat/completions", "generation")),
        ("POST /v1/embeddings", True, ("openai", "openai", "/v1/embeddings", "generation")),
        ("POST /v1/audio/transcriptions", False, ("openai", "openai", "/v1/audio/transcriptions", "generation")),
        ("POST /v1/messages", False, ("anthropic", "anthropic", "/v1/messages", "generation")),
        (
            "POST /v1/messages/count_tokens",
            False,
            ("anthropic", "anthropic", "/v1/messages/count_tokens", "count_tokens"),
        ),
        ("POST /claude_code/v1/messages", False, ("claude_code", "anthropic", "/v1/messages", "generation")),
        ("POST /tingly/opencode/v1/messages", False, ("opencode", "anthropic", "/v1/messages", "generation")),
        ("POST /tingly/openai/v1/responses", False, ("openai", "openai", "/v1/responses", "generation")),
        ("GET /v1/responses/r1", False, ("openai", "openai", "/v1/responses/r1", "by_id")),
        ("DELETE /v1/responses/r1", False, ("openai", "openai", "/v1/responses/r1", "by_id")),
        ("POST /v1/responses/r1/cancel", False, ("openai", "openai", "/v1/responses/r1/cancel", "by_id")),
        ("GET /v1/models", False, ("openai", "openai", "/v1/models", "models")),
        ("GET /v1/models", True, ("anthropic", "anthropic", "/v1/models", "models")),
        ("GET /claude_code/v1/models/a%2Fb", False, ("claude_code", "anthropic", "/v1/models/a%2Fb", "models")),
        ("GET /opencode/v1/models", False, ("opencode", "openai", "/v1/models", "models")),
        ("GET /v1/chat/completions", False, None),
        ("POST /", False, None),
        ("POST /v2/chat/completions", False, None),
        ("POST /nobody/v1/messages", False, None),
        ("POST /tingly/v1/messages", False, None),
    ],
)
def test_a_path_says_scenario_dialect_and_kind(
    request_line: str, is_anthropic: bool, wanted: tuple[str, str, str, str] | None
) -> None:
    method, path = request_line.split(" ")

    found = route(method, path, speaks_anthropic=is_anthropic)

    assert wanted == (found and (found.scenario, found.dialect.name, found.path, found.kind))


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../admin",
        "/v1/responses/../files",
        "/v1/responses/%2e%2E/files",
        "/v1/responses/%252e%252e/files",
        "/v1/responses/..%2ffiles",
        "/v1/responses/..%5Cfiles",
        "/openai/v1/./files",
        "/v1/..",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_no_path_walks_to_what_else_the_account_offers(method: str, path: str) -> None:
    """Such a path was once sent on, under our credential."""
    assert route(method, path, speaks_anthropic=False) is None


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/v1/Chat/completions",
        "/v1/chat/completions.",
        "/v1/chat/completions;x",
        "/v1/chat/c%6fmpletions",
        "/v1/chat/completions\\",
        "/v1/chat/completions\n",
        "/v1/..;/files",
        "/v1/responses/",
    ],
)
def test_a_path_has_one_spelling(path: str) -> None:
    """What an upstream may take for a path that we count, but we do not recognise, went past the books."""
    assert route("POST", path, speaks_anthropic=False) is None


def test_dots_within_a_name_are_no_walk() -> None:
    assert route("GET", "/v1/models/gpt-4.1..x", speaks_anthropic=False) is not None


@pytest.mark.parametrize(
    ("api_base", "url"),
    [
        ("https://up.test", "https://up.test/v1/chat/completions"),
        ("https://up.test/", "https://up.test/v1/chat/completions"),
        ("https://up.test/v1/", "https://up.test/v1/chat/completions"),
        ("https://up.test/api", "https://up.test/api/v1/chat/completions"),
        ("https://up.test/api/paas/v4", "https://up.test/api/paas/v4/chat/completions"),
        ("https://up.test/v1beta/openai", "https://up.test/v1beta/openai/chat/completions"),
        ("https://up.test/vendor", "https://up.test/vendor/v1/chat/completions"),
        ("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1/chat/completions"),
    ],
)
def test_a_base_without_a_version_gets_one(api_base: str, url: str) -> None:
    assert upstream_url(a_provider(api_base), "/v1/chat/completions", "m", "", {}) == url


@pytest.mark.parametrize(
    ("api_base", "query", "url"),
    [
        ("https://a.test", {}, "https://a.test/openai/deployments/m%2F1%3A%3F/chat/completions?api-version=2024-10-21"),
        (
            "https://a.test/openai/",
            {},
            "https://a.test/openai/deployments/m%2F1%3A%3F/chat/completions?api-version=2024-10-21",
        ),
        (
            "https://a.test",
            {"api-version": "x"},
            "https://a.test/openai/deployments/m%2F1%3A%3F/chat/completions?api-version=x",
        ),
        ("https://a.test/openai/v1", {}, "https://a.test/openai/v1/chat/completions"),
    ],
)
def test_azure_has_the_model_in_its_path_unless_the_base_has_a_version(
    api_base: str, query: dict[str, str], url: str
) -> None:
    provider = a_provider(api_base, provider_type="azure")

    assert upstream_url(provider, "/v1/chat/completions", "m/1:?", "", query) == url


def test_the_providers_query_wins_over_the_clients() -> None:
    own = {"k": "ours", "z": "a b"}

    assert upstream_url(a_provider(), "/v1/messages", "m", "beta=true&k=theirs&e=", own) == (
        "https://up.test/v1/messages?beta=true&e=&k=ours&z=a+b"
    )


# -- Google ------------------------------------------------------------------------------------------------------------

GEMINI = "https://generativelanguage.googleapis.com"
VERTEX = "https://eu-aiplatform.googleapis.com/v1/projects/p/locations/eu/publishers/google"


@pytest.mark.parametrize(
    ("base", "path", "model", "url"),
    [
        (GEMINI, google.GENERATE, "gemini-3-pro", f"{GEMINI}/v1beta/models/gemini-3-pro:generateContent"),
        (f"{GEMINI}/", google.COUNT_TOKENS, "gemini-3-pro", f"{GEMINI}/v1beta/models/gemini-3-pro:countTokens"),
        (f"{GEMINI}/v1alpha", google.GENERATE, "x", f"{GEMINI}/v1alpha/models/x:generateContent"),
        (GEMINI, google.STREAM, "x", f"{GEMINI}/v1beta/models/x:streamGenerateContent?alt=sse"),
        (GEMINI, google.GENERATE, "models/x", f"{GEMINI}/v1beta/models/x:generateContent"),
        (GEMINI, google.GENERATE, "tunedModels/a b?", f"{GEMINI}/v1beta/tunedModels/a%20b%3F:generateContent"),
        (VERTEX, google.STREAM, "gemini-3-pro", f"{VERTEX}/models/gemini-3-pro:streamGenerateContent?alt=sse"),
        (
            VERTEX.removesuffix("/publishers/google"),
            google.GENERATE,
            "endpoints/12",
            f"{VERTEX.removesuffix('/publishers/google')}/endpoints/12:generateContent",
        ),
        ("http://127.0.0.1:9/proxy", google.GENERATE, "x", "http://127.0.0.1:9/proxy/v1beta/models/x:generateContent"),
        (GEMINI, google.MODELS, "", f"{GEMINI}/v1beta/models"),
        (VERTEX, google.MODELS, "", "https://eu-aiplatform.googleapis.com/v1beta1/publishers/google/models"),
    ],
)
def test_googles_paths_name_the_model_and_what_is_asked_of_it(base: str, path: str, model: str, url: str) -> None:
    assert upstream_url(a_provider(base, api_style="google"), path, model, "", {}) == url


def test_google_is_not_sent_a_clients_parameters() -> None:
    """It answers 400 for one that it does not know, and Claude Code sends `beta=true`."""
    provider = a_provider(GEMINI, api_style="google")

    url = upstream_url(provider, google.STREAM, "x", "beta=true&alt=json", {"alt": "proto", "z": "1"})
    assert url == f"{GEMINI}/v1beta/models/x:streamGenerateContent?z=1&alt=sse"


@pytest.mark.parametrize(
    ("fields", "token", "headers"),
    [
        ({}, "key", {"x-goog-api-key": "key"}),
        ({"auth_type": "oauth"}, "key", {"Authorization": "Bearer key"}),
        ({}, "", {}),
    ],
)
def test_googles_credential_is_in_a_header(fields: dict[str, Any], token: str, headers: dict[str, str]) -> None:
    provider = a_provider(GEMINI, api_style="google", **fields)

    assert GOOGLE.credential_headers(provider, token, lambda _: "") == headers
