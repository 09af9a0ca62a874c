"""OpenAI's dialect, spoken by many vendors, Azure among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from balancer.domain import ApiStyle, Provider
from balancer.errors import BalancerError

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class OpenAIDialect:
    """Errors as platform.openai.com/docs/guides/error-codes shows them (November 2026)."""

    name: ApiStyle = "openai"

    def error_body(self, error: BalancerError, request_id: str) -> bytes:
        """`{"error": {message, type, code, param}}`."""
        return msgspec.json.encode({"error": _details(error)})

    def error_event(self, error: BalancerError, path: str) -> bytes:
        """A chunk with an error in it; the Responses API has an event of its own."""
        if path.startswith("/v1/responses"):
            event = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
            return b"event: error\ndata: %b\n\n" % msgspec.json.encode(event)
        return b"data: %b\n\n" % msgspec.json.encode({"error": _details(error)})

    def credential_headers(self, provider: Provider, access_token: str, client: Callable[[str], str]) -> dict[str, str]:
        """A bearer token; Azure's keys have a header of their own."""
        if not access_token:
            return {}
        if provider.provider_type == "azure" and provider.auth_type == "api_key":
            return {"api-key": access_token}
        return {"Authorization": f"Bearer {access_token}"}

    def models_body(self, models: Sequence[str]) -> bytes:
        """`{"object": "list", "data": [...]}`."""
        return msgspec.json.encode({"object": "list", "data": [_model(model) for model in models]})

    def model_body(self, model: str) -> bytes:
        """One entry of the list."""
        return msgspec.json.encode(_model(model))


def _details(error: BalancerError) -> dict[str, object]:
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"message": error.message, "type": kind, "code": error.code, "param": error.param}


def _model(model: str) -> dict[str, object]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "balancer"}


OPENAI = OpenAIDialect()
