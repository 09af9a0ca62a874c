"""Anthropic's dialect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from balancer.domain import ApiStyle, Provider
from balancer.errors import BalancerError

VERSION = "2023-06-01"
OAUTH_BETA = "oauth-2025-04-20"
BINDING_BETA = ("anthropic-beta", "thinking-binding-controls-2026-08-01")
"""The header that admits `thinking.block_binding`; it may stand beside another of its name."""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_EPOCH = "1970-01-01T00:00:00Z"


class AnthropicDialect:
    """Errors as docs.anthropic.com/en/api/errors shows them (November 2026)."""

    name: ApiStyle = "anthropic"

    def error_body(self, error: BalancerError, request_id: str) -> bytes:
        """`{"type": "error", "error": {type, message}, "request_id": …}`."""
        return msgspec.json.encode({"type": "error", "error": _details(error), "request_id": request_id})

    def error_event(self, error: BalancerError, path: str) -> bytes:
        """An `error` event."""
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode({"type": "error", "error": _details(error)})

    def credential_headers(self, provider: Provider, access_token: str, client: Callable[[str], str]) -> dict[str, str]:
        """x-api-key; with OAuth a bearer token, and the beta that admits it beside those the client asks for."""
        headers = {} if client("anthropic-version") else {"anthropic-version": VERSION}
        if not access_token:
            return headers
        if provider.auth_type == "oauth":
            betas = [beta.strip() for beta in client("anthropic-beta").split(",") if beta.strip()]
            if OAUTH_BETA not in betas:
                betas.append(OAUTH_BETA)
            return headers | {"Authorization": f"Bearer {access_token}", "anthropic-beta": ",".join(betas)}
        return headers | {"x-api-key": access_token}

    def models_body(self, models: Sequence[str]) -> bytes:
        """A page that holds all."""
        page = {
            "data": [_model(model) for model in models],
            "has_more": False,
            "first_id": models[0] if models else None,
            "last_id": models[-1] if models else None,
        }
        return msgspec.json.encode(page)

    def model_body(self, model: str) -> bytes:
        """One entry of the list."""
        return msgspec.json.encode(_model(model))


def _details(error: BalancerError) -> dict[str, object]:
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": kind, "message": error.message}


def _model(model: str) -> dict[str, object]:
    return {"type": "model", "id": model, "display_name": model, "created_at": _EPOCH}


ANTHROPIC = AnthropicDialect()
