"""Errors of one vendor as clients of another read them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.domain import ApiStyle
from balancer.failures import classify
from balancer.translation.faults import FaultError, fault

STYLES: tuple[ApiStyle, ...] = ("openai", "anthropic", "google")


def judged(client: ApiStyle, upstream: ApiStyle, status: int, body: bytes) -> FaultError:
    """What the client is told of an answer."""
    return fault(client, upstream, status, body, classify(upstream, status, (), body, 0))


def told(*args: Any) -> tuple[int, str, str]:
    """Status, code and message of the same."""
    error = judged(*args)
    return error.status, error.code, error.message


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"error":{"message":"m","code":"c","type":"t"}}', "m", "c"),
        (b'{"error":{"message":"m","code":400,"status":"INVALID_ARGUMENT"}}', "m", "INVALID_ARGUMENT"),
        (b'[{"error":{"message":"m","code":400,"status":"INVALID_ARGUMENT"}}]', "m", "INVALID_ARGUMENT"),
        (b'{"type":"error","error":{"type":"t","message":"m"}}', "m", "t"),
        (b'{"error":"m"}', "m", "invalid_request_error"),
        (b'{"message":"m"}', "m", "invalid_request_error"),
        (b'{"detail":"m"}', "m", "invalid_request_error"),
        (b"m", "m", "invalid_request_error"),
        (b'{"error":{"message":"m","code":"not a word"}}', "m", "invalid_request_error"),
        (b'{"error":{"message":7}}', "the upstream answered with status 400", "invalid_request_error"),
        (b"<html>", "the upstream answered with status 400", "invalid_request_error"),
        (b"[]", "the upstream answered with status 400", "invalid_request_error"),
        (b"", "the upstream answered with status 400", "invalid_request_error"),
    ],
)
def test_the_words_are_found_wherever_vendors_put_them(body: bytes, message: str, code: str) -> None:
    assert told("openai", "anthropic", 400, body) == (400, code, message)


@pytest.mark.parametrize(
    ("client", "upstream", "status", "body", "expected"),
    [
        ("openai", "anthropic", 529, b"{}", 503),
        ("anthropic", "openai", 503, b"{}", 529),
        ("anthropic", "anthropic", 529, b"{}", 529),
        ("openai", "anthropic", 402, b"{}", 429),
        ("openai", "google", 400, b'{"error":{"details":[{"reason":"API_KEY_INVALID"}],"message":"m"}}', 401),
        ("openai", "google", 403, b"{}", 403),
        ("openai", "anthropic", 413, b"{}", 413),
        ("openai", "anthropic", 422, b"{}", 422),
        ("openai", "anthropic", 408, b"{}", 408),
        ("openai", "anthropic", 500, b"{}", 500),
        ("anthropic", "openai", 404, b'{"error":{"code":"model_not_found"}}', 404),
        ("anthropic", "openai", 200, b'{"error":{"message":"m"}}', 502),
        ("anthropic", "openai", 200, b'{"error":{"message":"m","code":429}}', 429),
        ("openai", "anthropic", 0, b'{"error":{"type":"overloaded_error"}}', 503),
    ],
)
def test_a_status_is_the_one_by_which_the_client_s_sdk_knows_it(
    client: ApiStyle, upstream: ApiStyle, status: int, body: bytes, expected: int
) -> None:
    assert judged(client, upstream, status, body).status == expected


def test_clients_know_a_prompt_that_is_too_long_by_their_own_words() -> None:
    body = b'{"error":{"message":"This model\'s maximum context length is 8 tokens"}}'
    status, code, message = told("anthropic", "openai", 400, body)
    assert (status, code) == (400, "context_length_exceeded")
    assert message.startswith("prompt is too long: This model")
    assert told("openai", "anthropic", 400, b'{"error":{"message":"prompt is too long: 9 > 8"}}') == (
        400,
        "context_length_exceeded",
        "prompt is too long: 9 > 8",
    )


def test_google_s_wait_is_told_in_seconds() -> None:
    body = b'{"error":{"code":429,"details":[{"retryDelay":"1.5s"}]}}'
    assert judged("openai", "google", 429, body).retry_after_s == 2
    assert judged("openai", "anthropic", 429, b"{}").retry_after_s is None


def test_a_message_is_bounded() -> None:
    assert len(told("openai", "google", 400, b'{"error":{"message":"%b"}}' % (b"x" * 100_000))[2]) < 10_000


@given(st.sampled_from(STYLES), st.sampled_from(STYLES), st.integers(400, 599), st.binary(max_size=60))
def test_whatever_comes_it_is_an_error_that_can_be_told(
    client: ApiStyle, upstream: ApiStyle, status: int, body: bytes
) -> None:
    error = judged(client, upstream, status, body)
    assert 400 <= error.status < 600
    assert error.message
    assert error.code
