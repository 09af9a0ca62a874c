"""Answers as outcomes, and how long to leave their services alone."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.dialects import Headers
from balancer.domain import Outcome
from balancer.failures import (
    MOST_COOLDOWN_MS,
    QUOTA_MS,
    RATE_LIMITED_MS,
    RETRYABLE,
    Verdict,
    classify,
    classify_error_event,
    retry_after_ms,
)

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)
NOW_MS = round(NOW.timestamp() * 1000)

SUCCESS = Verdict(outcome=Outcome.SUCCESS)
LIMITED = Verdict(outcome=Outcome.RATE_LIMITED, cooldown_ms=RATE_LIMITED_MS)
QUOTA = Verdict(outcome=Outcome.RATE_LIMITED, cooldown_ms=QUOTA_MS)
TOO_LARGE = Verdict(outcome=Outcome.RATE_LIMITED)
UNAUTHORIZED = Verdict(outcome=Outcome.UNAUTHORIZED)
OVERLOADED = Verdict(outcome=Outcome.OVERLOADED)
FAILED = Verdict(outcome=Outcome.FAILED)
REJECTED = Verdict(outcome=Outcome.REJECTED)
OVERFLOW = Verdict(outcome=Outcome.REJECTED, is_context_overflow=True)


def verdict(status: int, body: Any = b"", headers: Headers = ()) -> Verdict:
    """The verdict on an answer, its body given as what it says."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return classify("openai", status, headers, data, NOW_MS)


def openai(message: str, kind: str | None = None, code: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropic(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_011"}


def google(code: int, status: str, message: str, *details: dict[str, Any]) -> list[Any]:
    return [{"error": {"code": code, "message": message, "status": status, "details": details}}]


# -- statuses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "statuses"),
    [
        (Outcome.SUCCESS, (200, 201, 204, 299)),
        (Outcome.RATE_LIMITED, (402, 429, 529)),
        (Outcome.UNAUTHORIZED, (401, 403)),
        (Outcome.OVERLOADED, (503,)),
        (Outcome.FAILED, (100, 301, 302, 307, 408, 424, 425, 500, 502, 504, 520, 599, 600)),
        (Outcome.REJECTED, (400, 404, 405, 409, 413, 422, 499)),
    ],
)
def test_a_status_means_an_outcome(outcome: Outcome, statuses: tuple[int, ...]) -> None:
    assert {classify("openai", status, (), b"", 0).outcome for status in statuses} == {outcome}


def test_another_service_is_tried_for_what_was_not_the_clients_doing() -> None:
    assert {Outcome.RATE_LIMITED, Outcome.UNAUTHORIZED, Outcome.OVERLOADED, Outcome.FAILED} == RETRYABLE


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (429, openai("Rate limit reached for gpt-5 in organization org-x", "requests", "rate_limit_exceeded")),
        (429, {"error": {"code": "429", "message": "Requests to the ChatCompletions_Create Operation have exceeded"}}),
        (429, {"statusCode": 429, "message": "Rate limit is exceeded. Try again in 50 seconds."}),
        (429, {"error": {"code": "RateLimitReached", "message": "Rate limit of 1 per 86400s exceeded"}}),
        (429, google(429, "RESOURCE_EXHAUSTED", "Resource has been exhausted (e.g. check quota).")),
        (429, b"<html>Too Many Requests</html>"),
        (429, b'{"error": {"message": "cut off in the mid'),
        (400, openai("Throttled", "invalid_request_error", "rate_limit_exceeded")),
        (503, google(429, "RESOURCE_EXHAUSTED", "Quota exceeded")),
        (500, anthropic("rate_limit_error", "This request would exceed your account's rate limit.")),
        (200, {"error": {"code": 429, "message": "Provider returned error", "metadata": {"raw": "x"}}}),
        (529, anthropic("overloaded_error", "Overloaded")),
        (500, b'{"error": {"type": "rate_limit_error", "message": "This request would ex'),
    ],
)
def test_a_rate_limit_is_one_in_any_vendors_words(status: int, body: Any) -> None:
    assert verdict(status, body) == LIMITED


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (
            429,
            openai(
                "You exceeded your current quota, please check your plan", "insufficient_quota", "insufficient_quota"
            ),
        ),
        (400, openai("Billing hard limit has been reached", "invalid_request_error", "billing_hard_limit_reached")),
        (403, openai("Quota exceeded", None, "insufficient_quota")),
        (
            400,
            anthropic("invalid_request_error", "Your credit balance is too low to access the Anthropic API. Please go"),
        ),
        (400, anthropic("invalid_request_error", "You have reached your specified API usage limits. You will regain")),
        (402, anthropic("billing_error", "Your payment method failed")),
        (402, openai("Insufficient Balance", "unknown_error", "invalid_request_error")),
        (402, {"error": {"code": 402, "message": "This request requires more credits"}}),
        (429, openai("Your account is suspended, please check your plan", "exceeded_current_quota_error")),
        (400, b'{"error": {"type": "x", "message": "Your credit balance is too low to ac'),
    ],
)
def test_an_account_without_money_rests_longer(status: int, body: Any) -> None:
    assert verdict(status, body) == QUOTA


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (
            429,
            openai("Request too large for gpt-5 in organization org-x on tokens per min (TPM): Limit 30000", "tokens"),
        ),
        (413, openai("Request too large for model `llama` on tokens per minute", "tokens", "rate_limit_exceeded")),
        (429, anthropic("rate_limit_error", "Extra usage is required for long context requests.")),
    ],
)
def test_one_request_that_is_too_large_does_not_cool_the_account(status: int, body: Any) -> None:
    assert verdict(status, body) == TOO_LARGE


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, openai("Incorrect API key provided: sk-x", "invalid_request_error", "invalid_api_key")),
        (401, {"error": {"code": "401", "message": "Access denied due to invalid subscription key"}}),
        (401, anthropic("authentication_error", "invalid x-api-key")),
        (401, {"detail": "Unauthorized"}),
        (403, anthropic("permission_error", "OAuth authentication is currently not allowed for this organization.")),
        (403, {"error": {"type": "forbidden", "message": "Request not allowed"}}),
        (403, openai("Project `p` does not have access to model `m`", "invalid_request_error", "model_not_found")),
        (403, openai("Your account was flagged for a violation of our terms", "invalid_request_error")),
        (403, b"<html>blocked</html>"),
        (400, google(400, "INVALID_ARGUMENT", "API key not valid.", {"reason": "API_KEY_INVALID"})),
        (400, google(400, "FAILED_PRECONDITION", "User location is not supported for the API use.")),
        (400, google(400, "FAILED_PRECONDITION", "Gemini API free tier is not available in your country.")),
        (400, anthropic("invalid_request_error", "This organization has been disabled.")),
        (500, anthropic("authentication_error", "x")),
    ],
)
def test_a_credential_that_is_no_good_is_the_accounts_fault(status: int, body: Any) -> None:
    assert verdict(status, body) == UNAUTHORIZED


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (503, openai("The engine is currently overloaded", "server_error")),
        (503, openai("Slow down", None, "slow_down")),
        (503, google(503, "UNAVAILABLE", "The model is overloaded. Please try again later.")),
        (500, anthropic("overloaded_error", "Overloaded")),
        (400, anthropic("overloaded_error", "Overloaded")),
        (200, {"error": {"code": 503, "message": "no instances"}}),
    ],
)
def test_an_overload_is_no_rate_limit_and_cools_nothing_by_itself(status: int, body: Any) -> None:
    assert verdict(status, body) == OVERLOADED


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, openai("The model `gpt-9` does not exist or you do not have access to it.", "x", "model_not_found")),
        (
            404,
            {
                "error": {
                    "code": "DeploymentNotFound",
                    "message": "The API deployment for this resource does not exist.",
                }
            },
        ),
        (404, anthropic("not_found_error", "model: claude-9")),
        (404, {"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}),
        (404, {"error": "model 'llama9' not found"}),
        (404, google(404, "NOT_FOUND", "models/gemini-9 is not found for API version v1main")),
        (404, {"error": {"code": 404, "message": "No endpoints found for a/b."}}),
        (500, openai("The server had an error", "server_error")),
        (500, {"error": None}),
        (502, b"<html>Bad Gateway</html>"),
        (200, openai("Internal error", "server_error")),
        (200, {"object": "response", "status": "failed", "error": {"code": "server_error", "message": "x"}}),
    ],
)
def test_what_the_account_does_not_have_or_cannot_do_is_its_failure(status: int, body: Any) -> None:
    assert verdict(status, body) == FAILED


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, openai("Invalid value: 'x'", "invalid_request_error", "invalid_value")),
        (400, openai("The model `gpt-9` does not exist", "invalid_request_error", "model_not_found")),
        (
            400,
            anthropic("invalid_request_error", "max_tokens: 10000 > 8192, the maximum allowed number of output tokens"),
        ),
        (400, {"error": {"code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
        (403, {"error": {"code": "x", "inner_error": {"code": "ResponsibleAIPolicyViolation"}}}),
        (403, {"error": {"code": 403, "message": 'm requires moderation. Your input was flagged for "violence".'}}),
        (403, openai("Your prompt was blocked", None, "content_policy_violation")),
        (404, b"404 page not found"),
        (404, openai("No such File object: the model", "invalid_request_error")),
        (404, openai("Previous response with id 'model' not found.", "x", "previous_response_not_found")),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "field required", "type": "value_error.missing"}]}),
        (200, {"error": {"code": 400, "message": "bad", "type": "invalid_request_error"}}),
    ],
)
def test_the_clients_own_mistake_is_rejected(status: int, body: Any) -> None:
    assert verdict(status, body) == REJECTED


@pytest.mark.parametrize(
    "message",
    [
        "Invalid value: 'insufficient_quota'",
        "tools.0.name: 'Your credit balance is too low' is no name",
        'messages: "type": "rate_limit_error", \\"code\\": \\"insufficient_quota\\"',
        "unknown field `overloaded_error`",
        "This organization is not: this organization has been disabled",
    ],
)
def test_a_client_cannot_cool_an_account_by_what_it_writes(message: str) -> None:
    body = json.dumps(openai(message, "invalid_request_error")).encode()

    assert verdict(400, body) == REJECTED
    assert verdict(400, body[:-2]) == REJECTED


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, openai("Too long.", "invalid_request_error", "context_length_exceeded")),
        (400, openai("Please reduce the length of the messages or completion.", "invalid_request_error")),
        (
            400,
            openai("Your input exceeds the context window of this model. Please adjust it.", "invalid_request_error"),
        ),
        (400, openai("This model's maximum context length is 4096 tokens. However, your messages resulted in 9", "x")),
        (400, anthropic("invalid_request_error", "prompt is too long: 345320 tokens > 199999 maximum")),
        (400, anthropic("invalid_request_error", "input length and `max_tokens` exceed context limit: 190000 + 21333")),
        (413, anthropic("request_too_large", "Request exceeds the maximum size")),
        (413, b"<html>413 Request Entity Too Large</html>"),
        (
            400,
            {
                "object": "error",
                "message": "This model's maximum context length is 9 tokens.",
                "type": "BadRequestError",
            },
        ),
        (400, openai("You passed 5000 input tokens. However, the model's context length is only 4096 tokens.", "x")),
        (400, openai("The input (9 tokens) is longer than the model's context length (8 tokens).", "BadRequest")),
        (
            400,
            {"error": {"code": 400, "message": "the request exceeds", "type": "exceed_context_size_error", "n_ctx": 2}},
        ),
        (500, {"error": {"code": 500, "message": "the request exceeds the available context size. try increasing"}}),
        (500, {"error": {"message": "Requested tokens (2285) exceed context window of 2048", "type": "server_error"}}),
        (400, {"message": "Prompt contains 66385 tokens, too large for model with 32768 maximum context length"}),
        (400, {"message": "Input is too long for requested model."}),
        (
            400,
            google(400, "INVALID_ARGUMENT", "The input token count (9) exceeds the maximum number of tokens allowed"),
        ),
        (400, google(400, "INVALID_ARGUMENT", "The input token count is 9 but model only supports up to 8.")),
        (400, openai("This model's maximum prompt length is 131072 but the request contains 200000 tokens.")),
        (400, openai("Invalid request: Your request exceeded model token limit: 262144", "invalid_request_error")),
        (400, {"error": "The number of tokens to keep is greater than the context length. Try to load"}),
        (
            422,
            {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096", "error_type": "x"},
        ),
        (
            400,
            openai("prompt token count of 70000 exceeds the limit of 64000", None, "model_max_prompt_tokens_exceeded"),
        ),
        (400, {"error": "prompt too long; exceeded max context length by 4 tokens"}),
        (400, {"code": "InvalidParameter", "message": "Range of input length should be [1, 30720]"}),
        (200, {"error": {"code": 400, "message": "the request exceeds", "type": "exceed_context_size_error"}}),
        (400, b'{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 3'),
    ],
)
def test_a_prompt_that_is_too_long_is_known_in_any_vendors_words(status: int, body: Any) -> None:
    assert verdict(status, body) == OVERFLOW


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\x00",
        {"error": None, "object": "response", "status": "completed"},
        {"choices": [{"message": {"content": '{"error": {"code": "insufficient_quota"}}'}}]},
        b'{"error": null, "output": [{"text": "cut',
        {"x": [{"error": {"code": 500}}], "error": {}},
    ],
)
def test_a_success_stays_one_whatever_it_speaks_of(body: Any) -> None:
    assert verdict(200, body) == SUCCESS


# -- cooldowns ---------------------------------------------------------------------------------------------------------


def test_a_limit_cools_for_as_long_as_it_asks_up_to_an_hour() -> None:
    assert verdict(429, headers=(("Retry-After", "7"),)).cooldown_ms == 7000
    assert verdict(429, headers=(("Retry-After", "0"),)).cooldown_ms == 0
    assert verdict(429, headers=(("Retry-After", "soon"),)).cooldown_ms == RATE_LIMITED_MS
    assert verdict(529, headers=(("Retry-After", "86400"),)).cooldown_ms == MOST_COOLDOWN_MS


def test_a_quota_that_is_used_up_cools_no_shorter_than_without_a_word() -> None:
    """Other limits, whose headers come along, are reset in milliseconds."""
    body = openai("You exceeded", "insufficient_quota")

    assert verdict(429, body, (("x-ratelimit-reset-requests", "12ms"),)).cooldown_ms == QUOTA_MS
    assert verdict(429, body, (("retry-after", "600"),)).cooldown_ms == 600_000


def test_googles_own_delay_counts_where_no_header_speaks() -> None:
    retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}
    body = google(429, "RESOURCE_EXHAUSTED", "You exceeded your current quota", retry)

    assert verdict(429, body).cooldown_ms == 34_500
    assert verdict(429, body, (("retry-after", "2"),)).cooldown_ms == 2000
    assert classify_error_event("openai", json.dumps(body).encode()).cooldown_ms == 34_500


@pytest.mark.parametrize(("status", "cooldown_ms"), [(503, 3000), (500, 0), (502, 0), (401, 0), (400, 0), (200, 0)])
def test_of_the_other_outcomes_only_an_overload_that_asks_cools(status: int, cooldown_ms: int) -> None:
    assert verdict(status, headers=(("retry-after", "3"),)).cooldown_ms == cooldown_ms


def test_an_overload_is_not_held_to_limits_that_it_has_not_reached() -> None:
    headers = (("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", "6m0s"))

    assert verdict(503, headers=headers) == OVERLOADED


@pytest.mark.parametrize(
    ("headers", "wait_ms"),
    [
        ({}, None),
        ({"Retry-After": "2"}, 2000),
        ({"retry-after": " 0.25 "}, 250),
        ({"retry-after": "0.0001"}, 1),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "Tue, 24 Nov 2026 12:00:30 GMT"}, 30_000),
        ({"retry-after": "Tuesday, 24-Nov-26 12:00:30 GMT"}, 30_000),
        ({"retry-after": "Tue Nov 24 12:00:30 2026"}, 30_000),
        ({"retry-after": "Tue, 24 Nov 2026 11:00:00 GMT"}, 0),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, 0),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 3_600_000),
        ({"retry-after": "99999999999999999999"}, 3_600_000),
        ({"retry-after": "9" * 400}, 3_600_000),
        ({"retry-after-ms": "120", "retry-after": "2"}, 120),
        ({"retry-after-ms": "x", "retry-after": "2"}, 2000),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "1,000"}, None),
        ({"retry-after": "2, 3"}, None),
        ({"retry-after": "1e3"}, None),
        ({"retry-after": "٣"}, None),
        ({"retry-after": "Tue, 99 Nov 2026 99:00:30 GMT"}, None),
        ({"retry-after": "Tue, 24 Nov 202020202026 12:00:30 GMT"}, None),
        ({"retry-after": "Tue"}, None),
        ({"retry-after": "soon", "x-ratelimit-reset-tokens": "3s"}, 3000),
    ],
)
def test_the_wait_is_what_the_upstream_asks_for(headers: dict[str, str], wait_ms: int | None) -> None:
    assert retry_after_ms(tuple(headers.items()), NOW_MS, 3_600_000) == wait_ms


@pytest.mark.parametrize(
    ("reset", "wait_ms"),
    [
        ("1s", 1000),
        ("6m0s", 360_000),
        ("120ms", 120),
        ("2m59.56s", 179_560),
        ("1h0m0.5s", 3_600_000),
        ("850µs", 1),
        ("12", 12_000),
        ("1.5", 1500),
        (str(NOW_MS // 1000 + 9), 9000),
        (str(NOW_MS + 9500), 9500),
        ("2026-11-24T12:00:09Z", 9000),
        ("2026-11-24T13:00:09+01:00", 9000),
        ("2026-11-24T12:00:09", 9000),
        ("2026-11-24T11:00:00Z", 0),
        ("0001-01-01T00:00:00+23:59", 0),
        ("", None),
        ("-5", None),
        ("nan", None),
        ("1s ago", None),
        ("1 000", None),
    ],
)
def test_a_reset_is_a_duration_or_a_time(reset: str, wait_ms: int | None) -> None:
    openai_style = (("x-ratelimit-remaining-tokens", "0"), ("x-ratelimit-reset-tokens", reset))
    anthropic_style = (
        ("Anthropic-RateLimit-Input-Tokens-Remaining", "0"),
        ("Anthropic-RateLimit-Input-Tokens-Reset", reset),
    )

    assert retry_after_ms(openai_style, NOW_MS, 3_600_000) == wait_ms
    assert retry_after_ms(anthropic_style, NOW_MS, 3_600_000) == wait_ms


@pytest.mark.parametrize(
    ("limits", "wait_ms"),
    [
        ({"requests": ("0", "2s"), "tokens": ("9", "6m0s")}, 2000),
        ({"requests": ("4999", "12ms"), "tokens": ("0", "6m0s")}, 360_000),
        ({"requests": ("0", "2s"), "tokens": ("0", "6s")}, 6000),
        ({"requests": ("5", "2s"), "tokens": ("9", "6s")}, None),
        ({"requests": (None, "6s"), "tokens": (None, "2s")}, 2000),
        ({"requests": ("5", "2s"), "tokens": (None, "6s")}, 6000),
        ({"tokens": ("-1", "0")}, None),
        ({"tokens": ("0", "nonsense"), "requests": (None, "1s")}, 1000),
    ],
)
def test_of_the_limits_those_count_that_are_used_up(
    limits: dict[str, tuple[str | None, str]], wait_ms: int | None
) -> None:
    """Azure says -1 of what it does not count."""
    headers: list[tuple[str, str]] = []
    for name, (remaining, reset) in limits.items():
        headers += [(f"x-ratelimit-remaining-{name}", remaining)] if remaining is not None else []
        headers += [(f"x-ratelimit-reset-{name}", reset)]

    assert retry_after_ms(tuple(headers), NOW_MS, 3_600_000) == wait_ms


def test_a_subscription_waits_for_the_last_of_the_windows_that_refuse() -> None:
    headers = (
        ("anthropic-ratelimit-unified-status", "rejected"),
        ("anthropic-ratelimit-unified-reset", str(NOW_MS // 1000 + 60)),
        ("anthropic-ratelimit-unified-5h-status", "rejected"),
        ("anthropic-ratelimit-unified-5h-reset", str(NOW_MS // 1000 + 60)),
        ("anthropic-ratelimit-unified-7d-status", "allowed"),
        ("anthropic-ratelimit-unified-7d-reset", str(NOW_MS // 1000 + 900)),
    )

    assert retry_after_ms(headers, NOW_MS, 3_600_000) == 60_000


def test_a_limit_without_a_name_has_its_reset_too() -> None:
    headers = (("X-RateLimit-Remaining", "0"), ("X-RateLimit-Reset", str(NOW_MS + 7000)))

    assert retry_after_ms(headers, NOW_MS, 3_600_000) == 7000


# -- errors in streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (anthropic("overloaded_error", "Overloaded"), OVERLOADED),
        (anthropic("rate_limit_error", "x"), LIMITED),
        (anthropic("api_error", "Internal server error"), FAILED),
        (anthropic("timeout_error", "x"), FAILED),
        (anthropic("invalid_request_error", "Output blocked by content filtering policy"), REJECTED),
        (anthropic("invalid_request_error", "prompt is too long: 2 tokens > 1 maximum"), OVERFLOW),
        (anthropic("authentication_error", "x"), UNAUTHORIZED),
        (openai("The server had an error", "server_error"), FAILED),
        (openai("x", "insufficient_quota"), QUOTA),
        (openai("x", None, 502), FAILED),
        (openai("x", None, 429), LIMITED),
        (openai("x", None, "503"), OVERLOADED),
        ({"error": {"code": 400, "message": "x"}, "choices": []}, REJECTED),
        ({"error": "CUDA out of memory"}, FAILED),
        ({"type": "error", "code": "rate_limit_exceeded", "message": "x", "param": None}, LIMITED),
        ({"type": "error", "code": "server_error", "message": "x", "param": None}, FAILED),
        ({"type": "error", "error": {"type": "invalid_request_error", "code": "context_length_exceeded"}}, OVERFLOW),
        ({"type": "response.failed", "response": {"error": {"code": "rate_limit_exceeded", "message": "x"}}}, LIMITED),
        ({"type": "response.failed", "response": {"error": {"code": "server_error", "message": "x"}}}, FAILED),
        ({"type": "response.failed", "response": {"error": {"code": "invalid_prompt", "message": "x"}}}, REJECTED),
        ({"type": "response.failed", "response": {"error": None}}, FAILED),
        ({"type": "response.failed", "response": 7}, FAILED),
    ],
)
def test_an_error_in_a_stream_means_what_it_says(data: Any, wanted: Verdict) -> None:
    assert classify_error_event("openai", json.dumps(data).encode()) == wanted


@pytest.mark.parametrize("data", [b"", b"Internal Server Error", b"[DONE]", b"[]", b"7", b"\xff", b'{"error": {"ty'])
def test_an_error_in_a_stream_that_says_nothing_is_a_failure(data: bytes) -> None:
    assert classify_error_event("anthropic", data) == FAILED


# -- whatever comes ----------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    [
        *(
            "retry-after",
            "retry-after-ms",
            "x-ratelimit-reset",
            "x-ratelimit-reset-tokens",
            "x-ratelimit-remaining-tokens",
        ),
        *("anthropic-ratelimit-tokens-reset", "anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit--reset"),
        "anthropic-ratelimit-unified-status",
    ]
)
DATES = st.datetimes(timezones=st.just(UTC)).map(lambda date: format_datetime(date, usegmt=True))
VALUES = (
    st.text(max_size=30)
    | st.text("0123456789.smhµ:-TZ+e,", max_size=30)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.datetimes().map(str)
    | DATES
    | st.tuples(DATES, st.integers(0, 30), st.text(max_size=2)).map(lambda d: d[0][: d[1]] + d[2] + d[0][d[1] :])
)
FIELDS = st.sampled_from(
    [
        "error",
        "message",
        "type",
        "code",
        "status",
        "details",
        "detail",
        "innererror",
        "reason",
        "retryDelay",
        "response",
    ]
)
ERRORS: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["429", "1s"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=12,
)
BODIES = st.binary(max_size=60) | ERRORS.map(lambda error: json.dumps(error).encode())


@given(st.lists(st.tuples(NAMES, VALUES), max_size=5).map(tuple), st.integers(0, 2**50))
def test_any_headers_mean_a_wait_within_the_cap_or_none(headers: Headers, now_ms: int) -> None:
    wait_ms = retry_after_ms(headers, now_ms, 1000)

    assert wait_ms is None or 0 <= wait_ms <= 1000


@given(st.integers(100, 700), BODIES, st.integers(0, 60), st.lists(st.tuples(NAMES, VALUES), max_size=3).map(tuple))
def test_any_answer_has_a_verdict(status: int, body: bytes, cut: int, headers: Headers) -> None:
    for data in (body, body[: len(body) - cut]):
        found = classify("openai", status, headers, data, NOW_MS)

        assert 0 <= found.cooldown_ms <= MOST_COOLDOWN_MS
        assert found.outcome in RETRYABLE | {Outcome.REJECTED, Outcome.SUCCESS}
        assert classify_error_event("openai", data).outcome in RETRYABLE | {Outcome.REJECTED}


# -- Google in its own words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "outcome"),
    [
        (429, "RESOURCE_EXHAUSTED", Outcome.RATE_LIMITED),
        (503, "UNAVAILABLE", Outcome.OVERLOADED),
        (500, "INTERNAL", Outcome.FAILED),
        (504, "DEADLINE_EXCEEDED", Outcome.FAILED),
        (403, "PERMISSION_DENIED", Outcome.UNAUTHORIZED),
        (400, "INVALID_ARGUMENT", Outcome.REJECTED),
        (400, "FAILED_PRECONDITION", Outcome.REJECTED),
    ],
)
def test_googles_error_means_the_same_as_an_answer_and_in_a_stream(code: int, status: str, outcome: Outcome) -> None:
    (error,) = google(code, status, "words")

    assert verdict(code, error).outcome == outcome
    assert classify_error_event("google", json.dumps(error).encode()).outcome == outcome
