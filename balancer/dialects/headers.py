"""Which headers pass, in both directions (RFC 9110 §7.6.1), and who stays on which side.

A client's credentials never go upstream; an upstream account's never come down.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

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
_NOT_UP = HOP_BY_HOP | _FROM_CLIENT
NOT_DOWN = HOP_BY_HOP | _FROM_UPSTREAM
OURS = "x-balancer-"
_OURS_OR_FORWARDED = (OURS, "x-forwarded-")
_OF_APIS = ("anthropic-", "openai-", "x-stainless-", "x-goog-", "content-", "accept")
"""What begins so is said to the API of a vendor, or of the body as the client sent it."""
LIST_NOTHING = ("keep-alive", "close")
_SECONDS = re.compile(r"[0-9]+(?:\.[0-9]*)?")


def request_headers(client: Headers, ours: Mapping[str, str], *, identity_only: bool = False) -> Headers:
    """What goes upstream: the client's headers that may pass, then ours, which win; of equal names the last.

    Content-Length is left to whoever frames the body. Of Accept-Encoding only codings that we can decode pass.
    """
    # By lower-case name: a provider's own `authorization` replaces our `Authorization`, and does not stand beside it.
    added = {name.lower(): (name, value) for name, value in ours.items()}
    asked, listed, kept = [], [], []
    for pair in client:
        name = pair[0].lower()
        if name in _NOT_UP:
            if name == "accept-encoding":
                asked.append(pair[1])
            elif name == "connection" and pair[1] not in LIST_NOTHING:
                listed.append(pair[1])
        elif name not in added and not name.startswith(_OURS_OR_FORWARDED):
            kept.append(pair)
    if listed:
        kept = _unlisted(kept, listed)
    coding = "identity" if identity_only else restrict_accept_encoding(",".join(asked))
    first = {"accept-encoding": ("Accept-Encoding", coding)}
    return (*kept, *(first | added).values())


def is_of_an_api(name: str) -> bool:
    """True for a client's header (its name in lower case) that is not for services of another API."""
    return name.startswith(_OF_APIS)


def response_headers(upstream: Headers) -> Headers:
    """What comes down: the upstream's headers that may pass; its x-request-id under another name, ours has that one."""
    listed, kept = [], []
    for pair in upstream:
        name = pair[0].lower()
        if name in NOT_DOWN:
            if name == "connection" and pair[1] not in LIST_NOTHING:
                listed.append(pair[1])
        elif name == "x-request-id":
            kept.append(("x-upstream-request-id", pair[1]))
        elif not name.startswith(OURS):
            kept.append(pair)
    return tuple(_unlisted(kept, listed) if listed else kept)


def value_of(headers: Iterable[tuple[str, str]], name: str) -> str:
    """The first value of a header (its name in lower case), empty when it is absent."""
    for key, value in headers:
        if key.lower() == name:
            return value
    return ""


def client_timeout_s(first: Mapping[str, str]) -> float | None:
    """Seconds that a client waits for the first byte, None when it does not say, or says no limit.

    `first` has the first value of each of its headers, by the name in lower case.

    The SDKs of OpenAI and Anthropic tell it: `x-stainless-timeout`, those in Python `x-stainless-read-timeout` (openai
    3.54 only that, anthropic 2.12 both).
    """
    for name in ("x-stainless-timeout", "x-stainless-read-timeout"):
        text = first.get(name, "").strip()
        if text and _SECONDS.fullmatch(text) and 0 < (seconds := float(text)) < math.inf:
            return seconds
    return None


def _unlisted(headers: list[tuple[str, str]], connection: Sequence[str]) -> list[tuple[str, str]]:
    """Those that Connection, in any of its lines, does not declare to be hop-by-hop too."""
    listed = {token.strip().lower() for value in connection for token in value.split(",")}
    return [pair for pair in headers if pair[0].lower() not in listed]
