"""Signatures that travel through a client of another API, and know whose they are when they come back.

A vendor takes back only what it signed itself, and refuses a request with anything else in that place. A client keeps
what it was given, and returns it to whichever service is picked next. So a signature goes to clients of another API as
`balancer:<vendor>:<signature>`, and only that vendor is given it again.
"""

from __future__ import annotations

from balancer.domain import ApiStyle

PREFIX = "balancer:"
PREFIX_BYTES = PREFIX.encode()


def vendor(style: ApiStyle, provider: str) -> str:
    """Who signs: Anthropic and Google for all their accounts; of those that speak OpenAI's dialect each for itself."""
    return f"openai/{provider}" if style == "openai" else style


def sealed(vendor: str, signature: str) -> str:
    """A vendor's signature as a client of another API gets it; the signature may be empty."""
    return f"{PREFIX}{vendor}:{signature}"


def opened(text: str, native: str) -> tuple[str, str]:
    """The vendor and the signature in what a client returns; without a mark it is its own API's, `native`'s."""
    if not text.startswith(PREFIX):
        return native, text
    signer, _, signature = text.removeprefix(PREFIX).partition(":")
    return signer, signature
