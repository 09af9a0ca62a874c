"""Which API a path belongs to, and which a provider's services speak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from balancer.domain import ApiStyle, Provider

ClientApi = Literal["chat", "messages", "responses", "other"]
"""`other`: what passes as it is or not at all: embeddings, images, audio, plain completions."""
ServiceApi = Literal["chat", "messages", "google"]
"""What requests are written for."""

_OF_PATHS: Mapping[str, ClientApi] = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "messages",
    "/v1/responses": "responses",
}
_OF_STYLES: Mapping[ApiStyle, ServiceApi] = {"openai": "chat", "anthropic": "messages", "google": "google"}


def client_api(path: str) -> ClientApi:
    """The API that a path (which begins with /v1) belongs to."""
    return _OF_PATHS.get(path, "other")


def service_api(provider: Provider) -> ServiceApi:
    """What is written for the provider's services where they do not speak a client's API."""
    return _OF_STYLES[provider.api_style]


def is_native(api: ClientApi, provider: Provider) -> bool:
    """True when the provider's services take a client's requests as they are."""
    match api:
        case "messages":
            return provider.api_style == "anthropic"
        case "responses":
            return provider.api_style == "openai" and provider.responses
        case "chat" | "other":
            return provider.api_style == "openai"
