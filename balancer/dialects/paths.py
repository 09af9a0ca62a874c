"""Paths: which dialect and scenario a request's path means, and where it goes upstream."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Literal, get_args
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import msgspec

from balancer.dialects import Dialect, google
from balancer.dialects.anthropic import ANTHROPIC
from balancer.dialects.openai import OPENAI
from balancer.domain import Provider, ScenarioName
from balancer.translation.apis import ClientApi, client_api

AZURE_API_VERSION = "2024-10-21"
_VERSION_SEGMENT = re.compile(r"/v\d+[a-z0-9]*(?:/|$)")
_SCENARIOS = "|".join(get_args(ScenarioName))
# The one spelling. Many servers take another letter case, a slash more, an escape or a `;` for the same path, and would
# serve what we have not recognised, and so not counted; with `..` a client could walk to what else the account offers.
_PLAIN = re.compile(r"/v1(?:/[a-z0-9_-]+)+")
_ID = "/v1/responses/[A-Za-z0-9_-]+"
_BY_ID = re.compile(rf"(?:GET|DELETE) {_ID}|GET {_ID}/input_items|POST {_ID}/cancel")
# What may be told of paths, in logs and traces: of others a client might have made anything.
_SHAPES = frozenset(
    f"/v1/{rest}"
    for rest in (
        "audio/speech",
        "audio/transcriptions",
        "audio/translations",
        "chat/completions",
        "completions",
        "embeddings",
        "images/edits",
        "images/generations",
        "images/variations",
        "messages",
        "messages/count_tokens",
        "models",
        "moderations",
        "rerank",
        "responses",
    )
)
_SHAPE_BY_ID = re.compile(r"(/v1/responses/)[A-Za-z0-9_-]+(/input_items|/cancel)?|(/v1/models/).+")
OTHER_SHAPE = "_OTHER"
_PREFIX = re.compile(rf"^/(?:tingly/)?({_SCENARIOS})(/v1/.*)$")

Kind = Literal["models", "count_tokens", "generation", "by_id"]


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """What a path asks for: `path` begins with /v1, whatever stood before it."""

    scenario: ScenarioName
    dialect: Dialect
    path: str
    kind: Kind
    api: ClientApi = "other"
    """What is spoken there, where a model answers."""


@functools.lru_cache(maxsize=512)
def route(method: str, path: str, *, speaks_anthropic: bool) -> Route | None:
    """The route of a request, None for a path or method that is not served.

    `speaks_anthropic`: the client's headers say so; it decides where the path does not.
    """
    match = _PREFIX.match(path)
    named = msgspec.convert(match[1], ScenarioName) if match else None
    rest = match[2] if match else path
    is_messages = rest in ("/v1/messages", "/v1/messages/count_tokens")
    if method == "GET" and (rest == "/v1/models" or rest.startswith("/v1/models/")):
        is_anthropic = named in ("anthropic", "claude_code") or (named in (None, "opencode") and speaks_anthropic)
        scenario: ScenarioName = named or ("anthropic" if is_anthropic else "openai")
        return Route(scenario=scenario, dialect=ANTHROPIC if is_anthropic else OPENAI, path=rest, kind="models")
    dialect: Dialect = ANTHROPIC if is_messages else OPENAI
    scenario = named or ("anthropic" if is_messages else "openai")
    if _BY_ID.fullmatch(f"{method} {rest}"):
        return Route(scenario=scenario, dialect=dialect, path=rest, kind="by_id")
    if method != "POST" or not _PLAIN.fullmatch(rest):
        return None
    kind: Kind = "count_tokens" if rest == "/v1/messages/count_tokens" else "generation"
    return Route(scenario=scenario, dialect=dialect, path=rest, kind=kind, api=client_api(rest))


@functools.lru_cache(maxsize=512)
def shape(path: str) -> str:
    """What a path asks for, without its scenario, ids and names; `_OTHER` for one that no vendor's API has."""
    match = _PREFIX.match(path)
    rest = match[2] if match else path
    if rest in _SHAPES:
        return rest
    by_id = _SHAPE_BY_ID.fullmatch(rest)
    if by_id is None:
        return OTHER_SHAPE
    return f"{by_id[3]}{{model}}" if by_id[3] else f"{by_id[1]}{{id}}{by_id[2] or ''}"


def upstream_url(provider: Provider, path: str, model: str, query: str, own: Mapping[str, str]) -> str:
    """Where a request goes: the provider's base, /v1 if that has no version, and the path after /v1.

    Azure's deployments have the model in their path and an api-version in their query, unless the base has a version.
    Google has the model and the method in the path (`google.METHODS`), and refuses parameters that it does not know.
    `own`: the provider's query parameters, resolved; they win over the client's.
    """
    base = urlsplit(provider.api_base)
    root = base.path.rstrip("/")
    parameters = [(k, v) for k, v in parse_qsl(query, keep_blank_values=True) if k not in own]
    parameters += list(own.items())
    rest = path.removeprefix("/v1")
    if provider.api_style == "google":
        if path in google.METHODS:
            parameters = [*own.items()]
        if path == google.STREAM:
            parameters = [*((k, v) for k, v in parameters if k != "alt"), ("alt", "sse")]
        full = google.upstream_path(root, path, model, has_version=bool(_VERSION_SEGMENT.search(root)))
    elif _VERSION_SEGMENT.search(root):
        full = root + rest
    elif provider.provider_type == "azure":
        root = root.removesuffix("/openai")
        full = f"{root}/openai/deployments/{quote(model, safe='')}{rest}"
        if not any(name == "api-version" for name, _ in parameters):
            parameters.append(("api-version", AZURE_API_VERSION))
    else:
        full = f"{root}/v1{rest}"
    return urlunsplit((base.scheme, base.netloc, full, urlencode(parameters), ""))
