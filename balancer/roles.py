"""Who may ask the admin API for what: named tokens, each with a role. A role may do all that those before it may."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import msgspec

from balancer.errors import ConfigurationError

Role = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
ADMIN_NAME = "admin"
"""The name of the token that is no list's: BALANCER_ADMIN_TOKEN."""
SHORTEST_TOKEN = 16
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_ENTRY = re.compile(r"[,\n]")


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Whose token it is, what it may do, and the token's SHA-256: the token itself is kept nowhere."""

    name: str
    role: Role
    digest: str

    def may(self, role: Role) -> bool:
        """True for what takes that role."""
        return ROLES.index(self.role) >= ROLES.index(role)

    def entry(self) -> str:
        """What `read_principals` reads as this."""
        return f"{self.name}:{self.role}:sha256:{self.digest}"


def read_principals(text: str) -> tuple[Principal, ...]:
    """The tokens of a list of `name:role:token` or `name:role:sha256:DIGEST`, with commas or on lines of their own.

    Empty entries and lines that begin with `#` count for nothing. Raises ConfigurationError, which tells no token.
    """
    faults: list[str] = []
    found: dict[str, Principal] = {}
    entries = [part for line in text.splitlines() if not line.lstrip().startswith("#") for part in _ENTRY.split(line)]
    for number, entry in enumerate(filter(None, map(str.strip, entries)), start=1):
        name, _, rest = entry.partition(":")
        role, _, token = rest.partition(":")
        fault = _fault(name, role, token)
        if not fault and name in found:
            fault = "an entry before it has the same name"
        if fault:
            faults.append(f"entry {number}: {fault}")
            continue
        known = _DIGEST.fullmatch(token)
        digest = known[1] if known else digest_of(token)
        if any(principal.digest == digest for principal in found.values()):
            faults.append(f"entry {number}: an entry before it has the same token")
        found[name] = Principal(name=name, role=msgspec.convert(role, Role), digest=digest)
    if faults:
        raise ConfigurationError("BALANCER_ADMIN_TOKENS: expected name:role:token", tuple(faults))
    return tuple(found.values())


def _fault(name: str, role: str, token: str) -> str:
    """What is wrong with an entry. It shows nothing of it: a token may stand in any wrong place."""
    if not _NAME.fullmatch(name):
        return "the name: expected 1 to 64 letters, digits, or any of . _ @ -, and a colon behind it"
    if name == ADMIN_NAME:
        return f"the name {ADMIN_NAME!r} is that of BALANCER_ADMIN_TOKEN"
    if role not in ROLES:
        return f"the role: expected {', '.join(ROLES)} between two colons"
    if token.startswith("sha256:"):
        return "" if _DIGEST.fullmatch(token) else "the token: expected 64 digits of SHA-256, in hex and lower case"
    if len(token) < SHORTEST_TOKEN:
        return f"the token: expected at least {SHORTEST_TOKEN} characters"
    return ""


def digest_of(token: str) -> str:
    """SHA-256 of a token, in hex."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def presented(token: str, principals: Sequence[Principal]) -> Principal | None:
    """Whose token it is, None for nobody's. Takes as long whichever it is: digests are compared with all of them."""
    digest = digest_of(token)
    found = None
    for principal in principals:
        if hmac.compare_digest(digest, principal.digest):
            found = principal
    return found


def listed(principals: Iterable[Principal]) -> str:
    """The list as `read_principals` reads it, with digests in the tokens' place."""
    return ",".join(principal.entry() for principal in principals)
