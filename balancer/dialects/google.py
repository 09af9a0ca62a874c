"""Google's dialect, of Gemini and Vertex AI: spoken to upstreams only.

A request's path names the model and what is asked of it, ai.google.dev/api/generate-content (November 2026):
`/v1beta/models/gemini-3-pro:generateContent`. For that our paths are GENERATE, STREAM and COUNT_TOKENS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

from balancer.domain import ApiStyle, Provider

GENERATE = "/v1/generateContent"
STREAM = "/v1/streamGenerateContent"
COUNT_TOKENS = "/v1/countTokens"
METHODS = frozenset([GENERATE, STREAM, COUNT_TOKENS])
MODELS = "/v1/models"
VERSION = "v1beta"
"""Has what /v1 lacks: tools, system instructions, schemas, thoughts."""
_VERTEX = re.compile(r"/v\d+[a-z0-9]*/(?:projects/[^/]+/locations/[^/]+/)?publishers/google$")


class GoogleAccounts:
    """Keys in a header, not in the query: URLs are logged."""

    name: ApiStyle = "google"

    def credential_headers(self, provider: Provider, access_token: str, client: Callable[[str], str]) -> dict[str, str]:
        """x-goog-api-key; with OAuth, as Vertex AI wants it, a bearer token."""
        if not access_token:
            return {}
        if provider.auth_type == "oauth":
            return {"Authorization": f"Bearer {access_token}"}
        return {"x-goog-api-key": access_token}


def upstream_path(root: str, path: str, model: str, *, has_version: bool) -> str:
    """The path of a method, or of any other resource of the API, below the base's path.

    A model with a slash is a resource's whole name (`tunedModels/x`, `endpoints/123`), others are below `models/`.
    Vertex AI lists the models of a publisher, whatever the project (cloud.google.com/vertex-ai/docs/reference/rest,
    publishers.models).
    """
    if path == MODELS and _VERTEX.search(root):
        return _VERTEX.sub("/v1beta1/publishers/google/models", root)
    if not has_version:
        root = f"{root}/{VERSION}"
    if path not in METHODS:
        return root + path.removeprefix("/v1")
    resource = model if "/" in model else f"models/{model}"
    return f"{root}/{quote(resource, safe='/:@')}:{path.removeprefix('/v1/')}"


def model_name(resource: str) -> str:
    """The name of a listed model without its collection: `models/x`, `publishers/google/models/x`."""
    return resource.removeprefix("publishers/google/").removeprefix("models/")


GOOGLE = GoogleAccounts()
