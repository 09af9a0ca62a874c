"""A thought's signature as a reasoning item's `encrypted_content`.

What is redacted says so itself: clients leave out empty summaries as they like, so those tell nothing.
"""

from __future__ import annotations

from balancer.translation import marks

_REDACTED = "redacted:"
_NATIVE = "openai"


def sealed(vendor: str, signature: str, *, is_redacted: bool) -> str:
    """What a client keeps of a vendor's signature."""
    return marks.sealed(vendor, _REDACTED + signature if is_redacted else signature)


def opened(encrypted: str) -> tuple[str, str, bool]:
    """The vendor, the signature, and whether it is the whole of the thought; OpenAI's own has no mark."""
    vendor, signature = marks.opened(encrypted, _NATIVE)
    if vendor == _NATIVE:
        return vendor, signature, True
    return vendor, signature.removeprefix(_REDACTED), signature.startswith(_REDACTED)
