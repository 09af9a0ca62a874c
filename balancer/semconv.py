"""What spans are called and what stands on them: OpenTelemetry's semantic conventions, by version, and names of ours.

The names under `gen_ai.` are in development and change between versions; all that differs is in `CONVENTIONS`. Nothing
of a prompt, a completion or a credential has a name here.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

import msgspec

from balancer.details import Details
from balancer.domain import Outcome, Pick, Provider, Usage

Value = str | int | float | bool | tuple[str, ...]
Attributes = dict[str, Value]


class Conventions(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the conventions: the names in which it differs from others, empty where it has none.

    `counts_cached_input`: its input tokens are all that the model read, as OpenAI counts them. Anthropic leaves out
    what came from a cache, or went into one.
    """

    schema_url: str
    provider: str
    cached: str = ""
    cache_creation: str = ""
    reasoning: str = ""
    is_stream: str = ""
    first_chunk_s: str = ""
    counts_cached_input: bool = False


CONVENTIONS: Mapping[str, Conventions] = {
    "1.36": Conventions(schema_url="https://opentelemetry.io/schemas/1.36.0", provider="gen_ai.system"),
    # The last version before the names moved to a repository of their own.
    "1.41": Conventions(
        schema_url="https://opentelemetry.io/schemas/1.41.0",
        provider="gen_ai.provider.name",
        cached="gen_ai.usage.cache_read.input_tokens",
        cache_creation="gen_ai.usage.cache_creation.input_tokens",
        reasoning="gen_ai.usage.reasoning.output_tokens",
        is_stream="gen_ai.request.stream",
        first_chunk_s="gen_ai.response.time_to_first_chunk",
        counts_cached_input=True,
    ),
}

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
_OTHER_OPERATION = "generate_content"
# Who is behind a host that speaks OpenAI's dialect, by the end of its name.
_VENDORS = (
    (".openai.azure.com", "azure.ai.openai"),
    (".amazonaws.com", "aws.bedrock"),
    (".cohere.com", "cohere"),
    (".deepseek.com", "deepseek"),
    (".googleapis.com", "gcp.gen_ai"),
    (".groq.com", "groq"),
    (".mistral.ai", "mistral_ai"),
    (".perplexity.ai", "perplexity"),
    (".x.ai", "x_ai"),
)
FIRST_TOKEN = "balancer.first_token"  # noqa: S105 - an event's name
_NO_FAULT = frozenset([Outcome.SUCCESS, Outcome.CANCELLED, Outcome.ABANDONED])
_CLIENT_S_FAULT = _NO_FAULT | {Outcome.REJECTED, Outcome.RATE_LIMITED}


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a provider's requests go to."""

    vendor: str
    address: str
    port: int


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of a request; `pick` is None for what no tactic picks for.

    `outcome` is empty while it is not known. Times are seconds: from the attempt's begin to the request's end, how long
    it took, and from its begin to the first token, 0 for none.
    """

    span_id: int
    service: str
    began_s: float
    duration_s: float
    pick: Pick | None = None
    outcome: str = ""
    status: int = 0
    fault: str = ""
    cooldown_ms: int = 0
    is_stream: bool = False
    first_token_s: float = 0.0
    usage: Usage | None = None
    details: Details | None = None
    api: str = ""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is over: `path` is its shape, `status` what the client was sent, 0 for nothing."""

    request: str
    client: str
    method: str
    path: str
    scenario: str
    rule: str
    status: int
    outcome: str
    error: str
    duration_s: float
    tried: tuple[Tried, ...]


def peer_of(provider: Provider) -> Peer:
    """Whom its requests go to, as its base tells."""
    base = urlsplit(provider.api_base)
    host = base.hostname or ""
    vendor: str = provider.api_style
    if provider.provider_type == "azure":
        vendor = "azure.ai.openai"
    elif provider.api_style == "openai":
        vendor = next((name for end, name in _VENDORS if host.endswith(end)), vendor)
    elif provider.api_style == "google":
        vendor = "gcp.vertex_ai" if host.endswith("aiplatform.googleapis.com") else "gcp.gemini"
    return Peer(vendor=vendor, address=host, port=base.port or (443 if base.scheme == "https" else 80))


def request_name(told: Told) -> str:
    """The name of a request's span."""
    return f"{told.method} {told.path}"


def request_attributes(told: Told) -> Attributes:
    """What stands on a request's span."""
    attributes: Attributes = {
        "http.request.method": told.method,
        "http.route": told.path,
        "balancer.request": told.request,
        "balancer.outcome": told.outcome,
        "balancer.attempts": len(told.tried),
    }
    if told.client:
        attributes["client.address"] = told.client
    if told.scenario:
        attributes["balancer.scenario"] = told.scenario
    if told.status:
        attributes["http.response.status_code"] = told.status
    if told.tried:
        last = told.tried[-1]
        attributes["balancer.service"] = last.service
        if last.pick is not None:
            attributes |= _picked(last.pick)
    if told.rule:
        attributes["balancer.rule"] = told.rule
    if is_request_fault(told):
        attributes["error.type"] = told.error or _kind(told.status, told.outcome)
    return attributes


def attempt_name(told: Told, tried: Tried) -> str:
    """The name of an attempt's span: what is asked of which model."""
    model = tried.service.partition(":")[2]
    return f"{_operation(told.path)} {model}" if tried.pick is not None else f"{told.method} {told.path}"


def attempt_attributes(told: Told, tried: Tried, number: int, peer: Peer | None, names: Conventions) -> Attributes:
    """What stands on an attempt's span; `number` is 1 for the first."""
    attributes: Attributes = {
        "http.request.method": told.method,
        "balancer.service": tried.service,
        "balancer.attempt": number,
    }
    if number > 1:
        attributes["http.request.resend_count"] = number - 1
    if peer is not None:
        attributes["server.address"] = peer.address
        attributes["server.port"] = peer.port
    if tried.status:
        attributes["http.response.status_code"] = tried.status
    if tried.outcome:
        attributes["balancer.outcome"] = tried.outcome
    if tried.api:
        attributes["balancer.translated_to"] = tried.api
    if tried.cooldown_ms:
        attributes["balancer.cooldown_ms"] = tried.cooldown_ms
    if is_attempt_fault(tried):
        attributes["error.type"] = tried.fault or _kind(tried.status, tried.outcome)
    if tried.pick is None:
        return attributes
    attributes |= _picked(tried.pick)
    attributes["gen_ai.operation.name"] = _operation(told.path)
    attributes["gen_ai.request.model"] = tried.service.partition(":")[2]
    if peer is not None:
        attributes[names.provider] = peer.vendor
    if names.is_stream and tried.is_stream:
        attributes[names.is_stream] = True
    if names.first_chunk_s and tried.first_token_s:
        attributes[names.first_chunk_s] = tried.first_token_s
    if tried.details is not None:
        attributes |= _detailed(tried.details)
    if tried.usage is not None:
        attributes |= _used(tried.usage, names, is_anthropic=peer is not None and peer.vendor == "anthropic")
    return attributes


def is_request_fault(told: Told) -> bool:
    """True where something here, or behind, has failed: what the client asked wrongly is no fault of ours."""
    return told.status >= 500 or told.outcome not in _CLIENT_S_FAULT


def is_attempt_fault(tried: Tried) -> bool:
    """True where the attempt was in vain, and not because the client had left."""
    if not tried.outcome:
        return tried.status >= 400 or bool(tried.fault)
    return tried.outcome not in _NO_FAULT


def _operation(path: str) -> str:
    return _OPERATIONS.get(path, _OTHER_OPERATION)


def _kind(status: int, outcome: str) -> str:
    return str(status) if status >= 400 else outcome or "_OTHER"


def _picked(pick: Pick) -> Attributes:
    attributes: Attributes = {
        "balancer.rule": pick.rule,
        "balancer.pool": pick.pool,
        "balancer.decision": pick.decision,
        "balancer.reason": pick.reason,
    }
    if pick.entry:
        attributes["balancer.entry"] = pick.entry
    if pick.is_local:
        attributes["balancer.degraded"] = True
    return attributes


def _detailed(details: Details) -> Attributes:
    attributes: Attributes = {}
    if details.model:
        attributes["gen_ai.response.model"] = details.model
    if details.id:
        attributes["gen_ai.response.id"] = details.id
    if details.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = details.finish_reasons
    return attributes


def _used(usage: Usage, names: Conventions, *, is_anthropic: bool) -> Attributes:
    is_apart = names.counts_cached_input and is_anthropic
    attributes: Attributes = {
        "gen_ai.usage.input_tokens": usage.input + (usage.cached + usage.cache_creation if is_apart else 0),
        "gen_ai.usage.output_tokens": usage.output,
    }
    rarer = (
        (names.cached, usage.cached),
        (names.cache_creation, usage.cache_creation),
        (names.reasoning, usage.reasoning),
    )
    return attributes | {name: count for name, count in rarer if name and count}
