"""What a finished answer means for the service that gave it: the outcome, and how long to leave it alone.

Vendors disagree on statuses, and copy each other's words: so the words in an error's body count before its status,
whichever dialect the upstream is said to speak. A word counts only as the value of a field (`type`, `code`, `status`)
or at the very front of a message: further in, messages repeat what the client wrote, and no client may cool an account
or open its breaker by writing it. Nothing here raises, whatever the upstream sends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from balancer import lenient
from balancer.dialects import Headers
from balancer.dialects.headers import value_of
from balancer.domain import Outcome, Struct

RETRYABLE: frozenset[Outcome] = frozenset(
    {Outcome.RATE_LIMITED, Outcome.UNAUTHORIZED, Outcome.OVERLOADED, Outcome.FAILED}
)
"""What another service may do better. The rest is the client's own, or over."""

RATE_LIMITED_MS = 5_000
"""The pause of a service that is rate limited and does not say for how long."""
QUOTA_MS = 60_000
"""The least pause of an account that has used up its quota or its money: somebody has to act first."""
MOST_COOLDOWN_MS = 3_600_000

# From platform.openai.com/docs/guides/error-codes, docs.anthropic.com/en/api/errors, learn.microsoft.com (Azure OpenAI:
# quotas and limits), ai.google.dev/gemini-api/docs/troubleshooting, as of November 2026; in lower case.
_QUOTA = frozenset(
    [
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "billing_error",
        "quota_exceeded",
        "exceeded_current_quota_error",  # Moonshot
        "insufficient_balance",
        "insufficient_credits",
    ]
)
_RATE = frozenset(
    [
        "rate_limit_error",
        "rate_limit_exceeded",
        "rate_limit_reached_error",  # Moonshot
        "ratelimitreached",  # Azure AI
        "too_many_requests",
        "toomanyrequests",
        "resource_exhausted",  # Google
        "throttling_error",
        "throttlingexception",  # Amazon
        "usage_limit_reached",
    ]
)
_UNAUTHORIZED = frozenset(
    [
        "authentication_error",
        "invalid_authentication_error",
        "permission_error",
        "invalid_api_key",
        "api_key_invalid",  # Google, with status 400
        "account_deactivated",
        "unauthenticated",
        "permission_denied",
        "permissiondenied",
    ]
)
_CONTENT = frozenset(["content_filter", "content_policy_violation", "responsibleaipolicyviolation"])
_OVERFLOW = frozenset(
    [
        "context_length_exceeded",
        "exceed_context_size_error",  # llama.cpp
        "model_max_prompt_tokens_exceeded",
        "request_too_large",
    ]
)
_NO_MODEL = frozenset(["model_not_found", "deploymentnotfound", "modelnotfound"])
_OVERLOADED = frozenset(
    ["overloaded_error", "engine_overloaded", "engine_overloaded_error", "slow_down", "unavailable"]
)
_REJECTED = ("invalid_", "bad_request", "badrequest", "unsupported_", "image_", "content_", "responsibleai")

_QUOTA_MESSAGE = re.compile(r"your credit balance is too low|you have reached your specified (?:api )?usage limits")
_DISABLED_MESSAGE = re.compile(
    r"this organization has been disabled|user location is not supported|gemini api free tier is not available"
)
# The account serves others: this one request is larger than all that a minute, or the plan, grants.
_TOO_LARGE_MESSAGE = re.compile(r"request too large|extra usage is required for long context")
# What was written, not who wrote it: accounts are flagged and blocked too.
_CONTENT_MESSAGE = re.compile(
    r"\b(?:input|prompt|content|messages?|output)\b.{0,40}\b(?:flagged|blocked|violat)|requires moderation"
    r"|content (?:management )?(?:policy|filter)"
)
_NO_MODEL_MESSAGE = re.compile(
    r"(?:the )?(?:requested )?models?\b|(?:the )?(?:api )?deployment\b|no (?:such )?model\b|no endpoints found"
    r"|(?:unknown|invalid) model\b|could not (?:find|resolve) (?:the )?(?:foundation )?model"
)
# OpenAI, Anthropic, vLLM, SGLang, llama.cpp, Mistral, Bedrock, Gemini, xAI, Groq, Moonshot, LM Studio, TGI, Ollama.
# Searched anywhere: the worst that a client gets by writing it is the rule for long prompts.
_OVERFLOW_MESSAGE = re.compile(
    r"maximum context length|max(?:imum)? (?:model|prompt) length|model's context length|context length is only"
    r"|prompt (?:is )?too long|input is too long|exceeds? (?:the |your )?(?:available |model's )?context"
    r"|context window exceeds|requested tokens .{0,20}exceed|greater than the context length|exceeded model token limit"
    r"|input token count .{0,40}exceeds|prompt token count .{0,40}exceeds|token count is .{0,40}only supports"
    r"|reduce the length of the messages"
    r"|`?inputs`? (?:tokens \+|must have less than)|range of input length|tokens in request more than max"
)

_TEXT_BYTES = 64 * 1024
_MESSAGE_LENGTH = 4096
# A quote within a string has its backslash before it: what a message quotes matches neither.
_CUT_WORD = re.compile(r'"(?:type|code|status|reason)"\s*+:\s*+"([^"\\]{1,64})"')
_CUT_MESSAGE = re.compile(r'"(?:message|error|detail)"\s*+:\s*+"((?:[^"\\]|\\.)*+)')


class Verdict(Struct, frozen=True, kw_only=True):
    """What an answer means: its outcome, how long its service is left alone, whether the prompt was too long."""

    outcome: Outcome
    cooldown_ms: int = 0
    is_context_overflow: bool = False


def classify(dialect: str, status: int, headers: Headers, body: bytes, now_ms: int) -> Verdict:
    """The verdict on a finished answer; its body is decoded, and may be cut, empty or no JSON at all.

    Rate limited: 429, 529, and a quota or a balance used up, whatever the status (402 always). Unauthorized: 401, 403,
    unless that is about the client's content, and an account that was disabled. Overloaded: 503. Rejected, the client's
    own fault: the rest of 4xx. Failed: everything else; redirects too, since no API answers with one.

    A 404 that misses a model or a deployment is failed, not rejected: the client's name was found, it is our service
    that names what its account does not have. Another account may have it, and the breaker shuts this one out. A 400
    stays the client's. A 2xx with an error for its body (OpenRouter, llama.cpp) is what that error says.

    Rate limits cool for as long as the headers ask, or else Google's RetryInfo in the body (google.rpc,
    error_details.proto). An overloaded service cools only if it asks to.
    """
    if 200 <= status < 300:
        error = _read(body) if b'"error"' in body else None
        if error is None or not error.is_error:
            return Verdict(outcome=Outcome.SUCCESS)
        status = error.status
    else:
        error = _read(body)
    verdict = _judge(status, error)
    match verdict.outcome:
        case Outcome.RATE_LIMITED if verdict.cooldown_ms:
            told = retry_after_ms(headers, now_ms, MOST_COOLDOWN_MS)
            told = error.delay_ms if told is None else told
            least = QUOTA_MS if verdict.cooldown_ms == QUOTA_MS else 0
            cooldown_ms = verdict.cooldown_ms if told is None else max(told, least)
        case Outcome.OVERLOADED:
            cooldown_ms = _asked_ms(headers, now_ms, MOST_COOLDOWN_MS) or 0
        case _:
            return verdict
    return msgspec.structs.replace(verdict, cooldown_ms=cooldown_ms)


def classify_error_event(dialect: str, data: bytes) -> Verdict:
    """The verdict on an error in a stream that began with 200: an event's data.

    Anthropic's `error` event, OpenAI's chunk with an `error`, the events `error` and `response.failed` of Responses. An
    error that names no reason is failed: the stream broke.
    """
    error = _read(data)
    verdict = _judge(error.status, error)
    if verdict.cooldown_ms == RATE_LIMITED_MS and error.delay_ms is not None:
        return msgspec.structs.replace(verdict, cooldown_ms=error.delay_ms)
    return verdict


def _judge(status: int, error: _Error) -> Verdict:
    """The verdict by words and status, the latter 0 where there is none; cooldowns are those without any word."""
    words, message = error.words, error.message
    if status == 402 or words & _QUOTA or _QUOTA_MESSAGE.match(message):
        return Verdict(outcome=Outcome.RATE_LIMITED, cooldown_ms=QUOTA_MS)
    if status in (429, 529) or words & _RATE:
        cooldown_ms = 0 if _TOO_LARGE_MESSAGE.match(message) else RATE_LIMITED_MS
        return Verdict(outcome=Outcome.RATE_LIMITED, cooldown_ms=cooldown_ms)
    if status == 403 and (words & _CONTENT or _CONTENT_MESSAGE.search(message)):
        return Verdict(outcome=Outcome.REJECTED)
    if status in (401, 403) or words & _UNAUTHORIZED or _DISABLED_MESSAGE.match(message):
        return Verdict(outcome=Outcome.UNAUTHORIZED)
    if status == 413 or words & _OVERFLOW or _OVERFLOW_MESSAGE.search(message):
        return Verdict(outcome=Outcome.REJECTED, is_context_overflow=True)
    if status == 503 or words & _OVERLOADED:
        return Verdict(outcome=Outcome.OVERLOADED)
    if status == 404 and (words & _NO_MODEL or _NO_MODEL_MESSAGE.match(message)):
        return Verdict(outcome=Outcome.FAILED)
    if status == 0:
        is_rejected = any(word.startswith(_REJECTED) for word in words)
        return Verdict(outcome=Outcome.REJECTED if is_rejected else Outcome.FAILED)
    # 408 and 425 ask for another try (RFC 9110 §15.5.9, RFC 8470 §5.2); 424 is a model that broke down (Amazon, TGI).
    is_rejected = 400 <= status < 500 and status not in (408, 424, 425)
    return Verdict(outcome=Outcome.REJECTED if is_rejected else Outcome.FAILED)


# -- what an error says ------------------------------------------------------------------------------------------------


class _Error(Struct, frozen=True, kw_only=True):
    """An error's words and message in lower case, the HTTP status that it names, the wait that it asks for.

    `is_error`: there is one for certain, whatever the answer's status.
    """

    words: frozenset[str] = frozenset()
    message: str = ""
    status: int = 0
    delay_ms: int | None = None
    is_error: bool = False


class _Body(msgspec.Struct):
    """Where errors stand: under `error` (or `response.error`), or the body is the error itself (vLLM, Mistral)."""

    error: Any = None
    response: msgspec.Raw = msgspec.Raw(b"null")
    message: Any = None
    detail: Any = None
    type: Any = None
    code: Any = None
    status: Any = None


class _Holder(msgspec.Struct):
    error: Any = None


_body: msgspec.json.Decoder[_Body | list[_Body]] = msgspec.json.Decoder(_Body | list[_Body])
_holder = msgspec.json.Decoder(_Holder)


def _read(body: bytes) -> _Error:
    """The error in a body or an event, of whichever shape; an empty one if there is none."""
    try:
        found = lenient.decode(_body, body)
        if isinstance(found, list):  # Gemini, behind its OpenAI-compatible path.
            found = found[0] if found else _Body()
        held = None if bytes(found.response) == b"null" else lenient.decode(_holder, found.response).error
    except lenient.UNREADABLE:
        return _read_cut(body[:_TEXT_BYTES].decode("utf-8", "replace"))
    error = held or found.error
    table = error if isinstance(error, dict) else {}
    inner = table.get("innererror") or table.get("inner_error")
    details = [detail for detail in _items(table.get("details")) if isinstance(detail, dict)]
    named = (
        *(table.get(name) for name in ("type", "code", "status")),
        *((inner.get("code"),) if isinstance(inner, dict) else ()),
        *(detail.get("reason") for detail in details),
        *(found.type, found.code, found.status),
    )
    texts = (table.get("message"), error, found.message, found.detail)
    return _Error(
        words=frozenset(word.strip().lower() for word in named if isinstance(word, str)),
        message=next((text for text in texts if isinstance(text, str)), "")[:_MESSAGE_LENGTH].strip().lower(),
        status=next(_statuses(named), 0),
        delay_ms=next(
            (ms for d in details if (ms := _duration_ms(d.get("retryDelay"), MOST_COOLDOWN_MS)) is not None), None
        ),
        is_error=bool(error),
    )


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _statuses(named: tuple[object, ...]) -> Iterator[int]:
    """The values that are HTTP statuses of errors, as numbers or in digits."""
    for value in named:
        number = int(value) if isinstance(value, str) and re.fullmatch("[45][0-9][0-9]", value) else value
        if isinstance(number, int) and 400 <= number < 600:
            yield number


def _read_cut(text: str) -> _Error:
    """The error in what is no whole JSON: a body that was cut, or a text."""
    if not text.lstrip().startswith(("{", "[")):
        return _Error(message=text[:_MESSAGE_LENGTH].strip().lower())
    message = _CUT_MESSAGE.search(text)
    return _Error(
        words=frozenset(word.lower() for word in _CUT_WORD.findall(text)),
        message=message[1][:_MESSAGE_LENGTH].strip().lower() if message else "",
    )


# -- how long to wait --------------------------------------------------------------------------------------------------

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?")
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?)(ms|us|µs|ns|d|h|m|s)")
_DURATION = re.compile(rf"(?:{_PART.pattern})+")
_UNIT_MS = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1, "us": 1e-3, "µs": 1e-3, "ns": 1e-6}
_EPOCH_S, _EPOCH_MS = 10**9, 10**12
_LIMIT = re.compile(
    r"x-ratelimit-(?P<field>remaining|reset)(?:-(?P<name>.+))?"
    r"|anthropic-ratelimit-(?P<its_name>.+)-(?P<its_field>remaining|reset|status)"
)


def retry_after_ms(headers: Headers, now_ms: int, cap_ms: int) -> int | None:
    """Milliseconds the upstream asks us to wait, or None if it does not say.

    `retry-after-ms` (Azure OpenAI; the OpenAI SDKs prefer it too), else Retry-After: delay-seconds, fractions allowed,
    or HTTP-date (RFC 9110 §10.2.3). Else until the last of the limits that are used up is reset: `x-ratelimit-reset-*`
    (platform.openai.com/docs/guides/rate-limits, November 2026: durations; others send seconds or a Unix time) and
    `anthropic-ratelimit-*-reset` (docs.anthropic.com/en/api/rate-limits, November 2026: RFC 3339; for subscriptions a
    Unix time). Used up is a limit of which 0 remain, or whose status is `rejected`. If none is known to be, the first
    reset counts of those that do not tell what remains: asking once too early is cheap, an idle account is not.
    A past date is 0; long waits are cut to `cap_ms`; what makes no sense says nothing.
    """
    asked = _asked_ms(headers, now_ms, cap_ms)
    return _reset_ms(headers, now_ms, cap_ms) if asked is None else asked


def _asked_ms(headers: Headers, now_ms: int, cap_ms: int) -> int | None:
    in_ms = _number_ms(value_of(headers, "retry-after-ms"), 1, cap_ms)
    if in_ms is not None:
        return in_ms
    text = value_of(headers, "retry-after").strip()
    in_s = _number_ms(text, 1000, cap_ms)
    if in_s is not None or not text[:1].isalpha():
        return in_s
    try:
        return _until_ms(parsedate_to_datetime(text), now_ms, cap_ms)
    except (ValueError, OverflowError):
        return None


def _reset_ms(headers: Headers, now_ms: int, cap_ms: int) -> int | None:
    limits: dict[str, dict[str, str]] = {}
    for key, value in headers:
        if match := _LIMIT.fullmatch(key.lower()):
            name = match["its_name"] or match["name"] or ""
            limits.setdefault(name, {}).setdefault(match["its_field"] or match["field"], value.strip())
    used_up, unknown = [], []
    for fields in limits.values():
        wait = _moment_ms(fields.get("reset", ""), now_ms, cap_ms)
        if wait is None:
            continue
        remaining, status = fields.get("remaining"), fields.get("status")
        if status == "rejected" or (remaining is not None and _number_ms(remaining, 1, 1) == 0):
            used_up.append(wait)
        elif remaining is None and status is None:
            unknown.append(wait)
    return max(used_up) if used_up else min(unknown, default=None)


def _number_ms(text: str, unit_ms: float, cap_ms: int) -> int | None:
    """A plain number of units, rounded up."""
    text = text.strip()
    return _cut(float(text) * unit_ms, cap_ms) if _NUMBER.fullmatch(text) else None


def _duration_ms(text: object, cap_ms: int) -> int | None:
    """A duration as Go writes it: 1s, 6m0s, 1h2m3.5s, 120ms."""
    if not isinstance(text, str) or not _DURATION.fullmatch(text):
        return None
    return _cut(sum(float(number) * _UNIT_MS[unit] for number, unit in _PART.findall(text)), cap_ms)


def _moment_ms(text: str, now_ms: int, cap_ms: int) -> int | None:
    """From now to a reset: a duration, seconds, a Unix time in seconds or milliseconds, or an RFC 3339 date."""
    if _NUMBER.fullmatch(text):
        number = float(text)
        if number >= _EPOCH_MS:
            return _cut(number - now_ms, cap_ms)
        return _cut(number * 1000 - (now_ms if number >= _EPOCH_S else 0), cap_ms)
    duration = _duration_ms(text, cap_ms)
    if duration is not None:
        return duration
    try:
        return _until_ms(datetime.fromisoformat(text), now_ms, cap_ms)
    except ValueError:
        return None


def _until_ms(moment: datetime, now_ms: int, cap_ms: int) -> int:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return _cut(moment.timestamp() * 1000 - now_ms, cap_ms)


def _cut(ms: float, cap_ms: int) -> int:
    return math.ceil(min(max(ms, 0.0), cap_ms))
