"""An upstream's error as one of ours: its own words, and the status by which the client's SDK knows what it is."""

from __future__ import annotations

import math
import re
from typing import Any

import msgspec

from balancer import lenient
from balancer.domain import ApiStyle, Outcome
from balancer.errors import UpstreamError
from balancer.failures import Verdict

_MESSAGE_LENGTH = 8192
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OVERFLOW_CODE = "context_length_exceeded"
_TOO_LONG = "prompt is too long"
"""By these words clients of Anthropic's (Claude Code, 2026) know that they have to shorten a conversation."""
_OF_OUTCOMES = {
    Outcome.RATE_LIMITED: 429,
    Outcome.UNAUTHORIZED: 401,
    Outcome.OVERLOADED: 503,
    Outcome.REJECTED: 400,
}
_OVERLOADED = 529
"""Anthropic's own; others say 503."""


class FaultError(UpstreamError):
    """What an upstream told of a failure, for a client that speaks another API.

    `retry_after_s` is when it is worth to ask again, None when that is not told.
    """

    def __init__(self, message: str, *, status: int, code: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class _Body(msgspec.Struct):
    error: Any = None
    response: Any = None
    message: Any = None
    detail: Any = None
    code: Any = None
    type: Any = None


_body: msgspec.json.Decoder[_Body | list[_Body]] = msgspec.json.Decoder(_Body | list[_Body])


def fault(client: ApiStyle, upstream: ApiStyle, status: int, body: bytes, verdict: Verdict) -> FaultError:
    """The error of an answer, or of an event, which is decoded and masked; its status is 0 or 200 where it has none."""
    message, code = _read(body)
    told = _status(client, upstream, status, verdict)
    if not message:
        message = f"the upstream answered with status {status}" if status >= 400 else "the upstream reports an error"
    if verdict.is_context_overflow:
        code = _OVERFLOW_CODE
        if client == "anthropic" and _TOO_LONG not in message.lower():
            message = f"{_TOO_LONG}: {message}"
    wait_s = math.ceil(verdict.cooldown_ms / 1000) if upstream == "google" and verdict.cooldown_ms else None
    return FaultError(message, status=told, code=code or _code(told), retry_after_s=wait_s)


def broken(client: ApiStyle, upstream: ApiStyle, message: str, code: str, status: int, verdict: Verdict) -> FaultError:
    """The error with which a stream broke off, in the words of who has read it."""
    told = _status(client, upstream, status, verdict)
    return FaultError(message or "the upstream's stream broke off", status=told, code=code or _code(told))


def _status(client: ApiStyle, upstream: ApiStyle, status: int, verdict: Verdict) -> int:
    """What the client's SDK takes for the exception that it is."""
    outcome = verdict.outcome
    if status == _OVERLOADED or outcome is Outcome.OVERLOADED:
        return _OVERLOADED if client == "anthropic" else 503
    known = _OF_OUTCOMES.get(outcome)
    if status < 400:
        return known or 502
    if outcome is Outcome.RATE_LIMITED:
        return 429
    if outcome is Outcome.UNAUTHORIZED and status not in (401, 403):
        return 401  # Google's 400 for a key that is none.
    if outcome is Outcome.REJECTED and status >= 500:
        return 400
    return status


def _code(status: int) -> str:
    """OpenAI's word for an error that names none."""
    match status:
        case 401 | 403:
            return "invalid_api_key"
        case 404:
            return "not_found"
        case 429:
            return "rate_limit_exceeded"
        case _:
            return "invalid_request_error" if status < 500 else "upstream_error"


def _read(body: bytes) -> tuple[str, str]:
    """The message and the code, as far as they are there."""
    try:
        found = lenient.decode(_body, body)
    except lenient.UNREADABLE:
        return _plain(body), ""
    if isinstance(found, list):
        found = found[0] if found else _Body()
    held = found.response.get("error") if isinstance(found.response, dict) else None
    error = held or found.error
    table = error if isinstance(error, dict) else {}
    texts = (table.get("message"), error, found.message, found.detail)
    message = next((text for text in texts if isinstance(text, str) and text), "")
    names = (table.get("code"), table.get("status"), table.get("type"), found.code)
    code = next((name for name in names if isinstance(name, str) and _CODE.fullmatch(name)), "")
    return message[:_MESSAGE_LENGTH], code


def _plain(body: bytes) -> str:
    """An error that is a line of text; of a page of HTML, or broken JSON, nothing."""
    text = body.decode("utf-8", "replace").strip()
    return "" if not text or text[0] in "<{[" or len(text) > 500 or "\n" in text else text
