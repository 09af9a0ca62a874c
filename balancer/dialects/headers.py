"""Which headers pass, in both directions (RFC 9110 §7.6.1), and who stays on which side.

A client's credentials never go upstream; an upstream account's never come down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from balancer.dialects import Headers
from balancer.encoding import restrict_accept_encoding

HOP_BY_HOP = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    ]
)
_FROM_CLIENT = frozenset(
    [
        "host",
        "content-length",
        "expect",
        "accept-encoding",
        "x-request-id",
        "authorization",
        "x-api-key",
        "api-key",
        "x-goog-api-key",
        "cookie",
        "openai-organization",
        "openai-project",
        "forwarded",
        "x-real-ip",
        "via",
    ]
)
_FROM_UPSTREAM = frozenset(
    [
        "content-length",
        "date",
        "server",
        "via",
        "alt-svc",
        "strict-transport-security",
        "set-cookie",
        "location",
        "www-authenticate",
        "openai-organization",
        "openai-project",
        "anthropic-organization-id",
    ]
)
_OURS = "x-balancer-"
_FORWARDED = "x-forwarded-"
_SECONDS = re.compile(r"[0-9]+(?:\.[0-9]*)?")


def request_headers(
    client: Headers, ours: Mapping[str, str], *, identity_only: bool = False, request_id: str = ""
) -> Headers:
    """What goes upstream: the client's headers that may pass, then ours, which win; of equal names the last.

    Content-Length is left to whoever frames the body. Of Accept-Encoding only codings that we can decode pass.
    """
    asked = ",".join(value for name, value in client if name.lower() == "accept-encoding")
    added = {"accept-encoding": ("Accept-Encoding", "identity" if identity_only else restrict_accept_encoding(asked))}
    if request_id:
        added["x-request-id"] = ("x-request-id", request_id)
    # By lower-case name: a provider's own `authorization` replaces our `Authorization`, and does not stand beside it.
    added |= {name.lower(): (name, value) for name, value in ours.items()}
    dropped = HOP_BY_HOP | _FROM_CLIENT | added.keys() | _listed(client)
    kept = [(n, v) for n, v in client if n.lower() not in dropped and not n.lower().startswith((_OURS, _FORWARDED))]
    return (*kept, *added.values())


def response_headers(upstream: Headers) -> Headers:
    """What comes down: the upstream's headers that may pass; its x-request-id under another name, ours has that one."""
    dropped = HOP_BY_HOP | _FROM_UPSTREAM | _listed(upstream)
    return tuple(
        ("x-upstream-request-id" if name.lower() == "x-request-id" else name, value)
        for name, value in upstream
        if name.lower() not in dropped and not name.lower().startswith(_OURS)
    )


def value_of(headers: Iterable[tuple[str, str]], name: str) -> str:
    """The first value of a header (its name in lower case), empty when it is absent."""
    return next((value for key, value in headers if key.lower() == name), "")


def client_timeout_s(headers: Headers) -> float | None:
    """Seconds that a client waits for the first byte, None when it does not say, or says no limit.

    The SDKs of OpenAI and Anthropic tell it: `x-stainless-timeout`, those in Python `x-stainless-read-timeout` (openai
    3.54 only that, anthropic 2.12 both).
    """
    for name in ("x-stainless-timeout", "x-stainless-read-timeout"):
        text = value_of(headers, name).strip()
        if _SECONDS.fullmatch(text) and 0 < (seconds := float(text)) < math.inf:
            return seconds
    return None


def _listed(headers: Headers) -> frozenset[str]:
    """The names that Connection declares to be hop-by-hop too."""
    return frozenset(
        token.strip().lower() for name, value in headers if name.lower() == "connection" for token in value.split(",")
    )
