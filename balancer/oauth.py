"""OAuth: how a new access token is asked for, what the answer means, and when to ask. No clock, no I/O.

Two grants: a refresh token (RFC 6749 §6) and client credentials (§4.4). Where a vendor is known, its endpoint need not
be written. Vendors' endpoints, client ids of their command lines and the forms that they take, as of November 2026:
Anthropic's Claude Code (JSON, refresh tokens rotate), OpenAI's Codex (`codex-rs`, module auth; they rotate),
developers.google.com/identity/protocols/oauth2 (they do not).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from balancer import lenient
from balancer.dialects import Headers
from balancer.domain import OAUTH_EXPIRY_MARGIN, OAuthDetail, Provider, is_secret_name
from balancer.failures import retry_after_ms

MARGIN_MS = round(OAUTH_EXPIRY_MARGIN.total_seconds() * 1000)
"""So long before it ends an access token is replaced; one that lives for less than twice as long, at half its life."""
NEVER_MS = -1
"""When a token is due whose end is not known: nobody replaces it before an upstream refuses it."""
LONGEST_ANSWER_BYTES = 64 * 1024
_LONGEST_LIFE_S = 10 * 366 * 86_400
_FIRST_PAUSE_MS, _LONGEST_PAUSE_MS, _LONGEST_ASKED_MS = 5_000, 60_000, 600_000
_TOKEN = re.compile(r"[\x21-\x7e]{1,16384}")

Grant = Literal["refresh_token", "client_credentials"]
ClientAuth = Literal["basic", "post", "none"]
Encoding = Literal["form", "json"]


class Vendor(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a vendor's token endpoint; empty is what must be configured."""

    token_url: str = ""
    client_id: str = ""
    encoding: Encoding = "form"
    rotates: bool = True
    """A refresh token is good for one use. So it is taken for where nothing is known: another use may end them all."""


VENDORS: dict[str, Vendor] = {
    "anthropic": Vendor(
        token_url="https://console.anthropic.com/v1/oauth/token",  # noqa: S106 - an address
        client_id="9d1c250a-e61b-44d9-88ed-5944d1962f5e",
        encoding="json",
    ),
    "openai": Vendor(
        token_url="https://auth.openai.com/oauth/token",  # noqa: S106 - an address
        client_id="app_EMoamEEZ73f0CkXaXp7hrann",
    ),
    "google": Vendor(token_url="https://oauth2.googleapis.com/token", rotates=False),  # noqa: S106 - an address
    "generic": Vendor(),
}
_OTHER_NAMES = {"": "generic", "claude": "anthropic", "claude_code": "anthropic", "codex": "openai", "gemini": "google"}
"""As tingly-box calls them."""


class Renewal(msgspec.Struct, frozen=True, kw_only=True):
    """How a provider's access tokens are renewed, by whichever grant."""

    grant: Grant
    token_url: str
    client_id: str
    client_secret: str = ""
    client_auth: ClientAuth = "none"
    encoding: Encoding = "form"
    scopes: str = ""
    parameters: dict[str, str] = {}
    rotates: bool = False


# -- the configuration -------------------------------------------------------------------------------------------------


def is_renewed(provider: Provider) -> bool:
    """True for a provider whose access token is renewed; any other's is used as given."""
    detail = provider.oauth_detail
    if detail is None or provider.auth_type != "oauth" or provider.no_key_required or not provider.enabled:
        return False
    return bool(detail.refresh_token) or _is_of_client(detail)


def _is_of_client(detail: OAuthDetail) -> bool:
    return detail.extra_fields.get("grant") == "client_credentials"


def renewal_of(detail: OAuthDetail) -> Renewal:
    """How it is renewed; `detail` is one that `faults_of` has no complaint about, with its references resolved."""
    vendor, fields = _vendor(detail), detail.extra_fields
    secret = str(fields.get("client_secret") or "")
    grant: Grant = "client_credentials" if _is_of_client(detail) else "refresh_token"
    return Renewal(
        grant=grant,
        token_url=str(fields.get("token_url") or vendor.token_url),
        client_id=str(fields.get("client_id") or vendor.client_id),
        client_secret=secret,
        client_auth=_auth_of(fields.get("client_auth"), secret),
        encoding="json" if (fields.get("encoding") or vendor.encoding) == "json" else "form",
        scopes=_scopes(fields.get("scopes")),
        parameters={str(name): str(value) for name, value in (fields.get("parameters") or {}).items()},
        rotates=grant == "refresh_token" and bool(fields.get("rotates", vendor.rotates)),
    )


def _vendor(detail: OAuthDetail) -> Vendor:
    name = detail.provider_type.lower()
    return VENDORS.get(_OTHER_NAMES.get(name, name), VENDORS["generic"])


def _auth_of(given: Any, secret: str) -> ClientAuth:
    match given:
        case "basic" | "post" | "none":
            auth: ClientAuth = given
            return auth
        case _:
            return "basic" if secret else "none"


def _scopes(given: Any) -> str:
    return " ".join(map(str, given)) if isinstance(given, list | tuple) else str(given or "")


def faults_of(detail: OAuthDetail) -> Iterator[tuple[str, str]]:
    """What is wrong with how a token is to be renewed, each with the field's name below `extra_fields`."""
    if not detail.refresh_token and not _is_of_client(detail):
        if "grant" in detail.extra_fields:
            yield "grant", "client_credentials is the only one without a refresh_token"
        return
    fields, vendor = detail.extra_fields, _vendor(detail)
    url = fields.get("token_url") or vendor.token_url
    if not url:
        yield "token_url", f"missing: provider_type names none of {', '.join(v for v in VENDORS if v != 'generic')}"
    elif not isinstance(url, str) or not (url.startswith(("${", "sealed:")) or _is_url(url)):
        yield "token_url", "expected an http:// or https:// URL with a host, and no credentials or fragment in it"
    if not (fields.get("client_id") or vendor.client_id):
        yield "client_id", "missing"
    for name in ("client_id", "client_secret"):
        if not isinstance(fields.get(name, ""), str):
            yield name, "expected text"
    if fields.get("grant") not in (None, "refresh_token", "client_credentials"):
        yield "grant", "expected refresh_token or client_credentials"
    if _is_of_client(detail) and not fields.get("client_secret"):
        yield "client_secret", "missing: grant is client_credentials"
    if fields.get("client_auth") not in (None, "basic", "post", "none"):
        yield "client_auth", "expected basic, post or none"
    elif fields.get("client_auth") in ("basic", "post") and not fields.get("client_secret"):
        yield "client_secret", "missing: client_auth sends it"
    if fields.get("encoding") not in (None, "form", "json"):
        yield "encoding", "expected form or json"
    if not isinstance(fields.get("rotates", True), bool):
        yield "rotates", "expected true or false"
    scopes = fields.get("scopes", "")
    if not isinstance(scopes, str) and not (isinstance(scopes, list) and all(isinstance(one, str) for one in scopes)):
        yield "scopes", "expected text, or a list of it"
    parameters = fields.get("parameters") or {}
    if not isinstance(parameters, dict) or not all(isinstance(value, str) for value in parameters.values()):
        yield "parameters", "expected a mapping to text"
    elif any(map(is_secret_name, parameters)):
        yield "parameters", "must hold no credentials: they would be stored as they are"


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - looked at for its error
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None and not parts.fragment


def seed_of(renewal: Renewal, refresh_token: str) -> str:
    """What names a family of tokens: a digest of what it began with. The same name is the same login."""
    if renewal.grant == "refresh_token":
        return f"r{_digest(refresh_token)}"
    began = (renewal.token_url, renewal.client_id, renewal.scopes, *sorted(renewal.parameters.items()))
    return f"c{_digest(repr(began))}"


def _digest(text: str) -> str:
    return hashlib.sha256(b"balancer grant\n" + text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


# -- the request -------------------------------------------------------------------------------------------------------


def request_of(renewal: Renewal, refresh_token: str) -> tuple[Headers, bytes]:
    """Headers and body of the POST that asks for an access token."""
    fields = dict(renewal.parameters)
    fields["grant_type"] = renewal.grant
    if renewal.grant == "refresh_token":
        fields["refresh_token"] = refresh_token
    if renewal.scopes:
        fields["scope"] = renewal.scopes
    headers = [("Accept", "application/json")]
    match renewal.client_auth:
        case "basic":
            # Both are encoded as in a form before they are joined (RFC 6749 §2.3.1); no + for a space, which some miss.
            pair = f"{quote(renewal.client_id, safe='')}:{quote(renewal.client_secret, safe='')}"
            headers.append(("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}"))
        case "post":
            fields |= {"client_id": renewal.client_id, "client_secret": renewal.client_secret}
        case "none":
            fields["client_id"] = renewal.client_id
    if renewal.encoding == "json":
        return (*headers, ("Content-Type", "application/json")), msgspec.json.encode(fields)
    return (*headers, ("Content-Type", "application/x-www-form-urlencoded")), urlencode(fields).encode()


# -- the answer --------------------------------------------------------------------------------------------------------


class Renewed(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens: `refresh_token` is empty where the old one stays, `life_ms` None where nobody says it."""

    access_token: str
    refresh_token: str = ""
    life_ms: int | None = None


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """No new tokens, and what that means for the refresh token; `reason` is in words of ours.

    `failed`: it was not used, another time it may be. `lost`: it is no good (any more). `in_doubt`: nobody knows
    whether it was used.
    """

    outcome: Literal["failed", "lost", "in_doubt"]
    reason: str
    after_ms: int | None = None
    """So long the endpoint asks to be left alone."""


class _Answer(msgspec.Struct):
    access_token: Any = None
    refresh_token: Any = None
    token_type: Any = None
    expires_in: Any = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Answer)
_LOST = frozenset(
    # RFC 6749 §5.2, and Codex' own (codex-rs, module auth).
    ["invalid_grant", "refresh_token_expired", "refresh_token_reused", "refresh_token_invalidated"]
)
_KNOWN = _LOST | {
    *("invalid_request", "invalid_client", "unauthorized_client", "unsupported_grant_type", "invalid_scope"),
    *("access_denied", "server_error", "temporarily_unavailable", "slow_down", "rate_limit_error", "invalid_token"),
}


def read(status: int, headers: Headers, body: bytes, now_ms: int) -> Renewed | Refused:
    """What a token endpoint's answer means. Its words are repeated only where they are known ones.

    A status of 4xx, and 503, say that nothing was done; any other that is no success leaves open what was.
    """
    try:
        answer = lenient.decode(_decoder, body)
    except lenient.UNREADABLE:
        answer = None
    codes = _codes(answer.error) if answer is not None else ()
    code = next((code for code in codes if code in _KNOWN), "")
    if answer is not None and 200 <= status < 300 and not answer.error:
        return _renewed(answer)
    reason = f"the token endpoint answered with status {status}" + (f", {code}" if code else "")
    if code in _LOST:
        return Refused(outcome="lost", reason=reason)
    if 300 <= status < 500 or status == 503 or (200 <= status < 300 and code):
        return Refused(outcome="failed", reason=reason, after_ms=retry_after_ms(headers, now_ms, _LONGEST_ASKED_MS))
    return Refused(outcome="in_doubt", reason=reason)


def _codes(error: Any) -> tuple[str, ...]:
    """An error's names: text (RFC 6749 §5.2), or a table as the vendors' APIs have it."""
    named = (error.get("code"), error.get("type")) if isinstance(error, dict) else (error,)
    return tuple(name for name in named if isinstance(name, str))


def _renewed(answer: _Answer) -> Renewed | Refused:
    access, refresh, kind = answer.access_token, answer.refresh_token, answer.token_type
    if not isinstance(access, str) or not _TOKEN.fullmatch(access):
        return Refused(outcome="in_doubt", reason="the token endpoint answered without an access token")
    if isinstance(kind, str) and kind.lower() != "bearer":
        return Refused(outcome="in_doubt", reason="the token endpoint answered with a token that is no bearer's")
    if refresh is not None and (not isinstance(refresh, str) or not _TOKEN.fullmatch(refresh or "-")):
        return Refused(outcome="in_doubt", reason="the token endpoint answered with a refresh token that is none")
    life_ms = _life_ms(answer.expires_in)
    return Renewed(
        access_token=access, refresh_token=refresh or "", life_ms=_life_of(access) if life_ms is None else life_ms
    )


def _life_ms(seconds: Any) -> int | None:
    """`expires_in`, a number or one in digits (some send those); None for what is none."""
    if isinstance(seconds, str) and re.fullmatch(r"[0-9]{1,12}", seconds):
        seconds = int(seconds)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        return None
    return round(min(seconds, _LONGEST_LIFE_S) * 1000)


class _Claims(msgspec.Struct):
    exp: float | None = None
    iat: float | None = None


_claims = msgspec.json.Decoder(_Claims)


def _life_of(access_token: str) -> int | None:
    """How long a JWT (RFC 7519) lives, from its own dates: the difference holds whatever its issuer's clock says."""
    parts = access_token.split(".")
    if len(parts) != 3:
        return None
    try:
        text = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        claims = lenient.decode(_claims, text)
    except (ValueError, *lenient.UNREADABLE):
        return None
    return _life_ms(claims.exp - claims.iat) if claims.exp is not None and claims.iat is not None else None


# -- when --------------------------------------------------------------------------------------------------------------


def ends_ms(asked_ms: int, life_ms: int | None) -> int:
    """When a token ends that was asked for then, by the same clock; 0 where nobody knows.

    Counted from the asking, not from the answer: however slow that was, the token does not end before.
    """
    return 0 if life_ms is None else asked_ms + life_ms


def due_ms(asked_ms: int, life_ms: int | None) -> int:
    """When it is to be replaced: five minutes before its end, or at half of a life that is too short for that."""
    return NEVER_MS if life_ms is None else asked_ms + life_ms - min(MARGIN_MS, life_ms // 2)


def own_ends_ms(detail: OAuthDetail) -> int:
    """When the access token of the configuration ends, 0 where it does not say."""
    try:
        ends_at = datetime.fromisoformat(detail.expires_at)
    except ValueError:
        return 0
    if ends_at.tzinfo is None:
        ends_at = ends_at.replace(tzinfo=UTC)
    return max(1, round(ends_at.timestamp() * 1000))


def own_due_ms(detail: OAuthDetail) -> int:
    """When that is to be replaced; at once where there is none."""
    if not detail.access_token:
        return 0
    ends = own_ends_ms(detail)
    return max(0, ends - MARGIN_MS) if ends else NEVER_MS


def pause_ms(failures: int, asked_ms: int | None) -> int:
    """The pause after so many failures in a row: what the endpoint asks for, or twice as long each time."""
    pause = min(_FIRST_PAUSE_MS << min(failures - 1, 10), _LONGEST_PAUSE_MS)
    return pause if asked_ms is None else max(pause, asked_ms)
