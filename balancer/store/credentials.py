"""Credentials: references that each worker resolves, and literals that are sealed before they reach Redis.

A value may be a literal, hold references (`${ENV}`, `${file:/path}`), or be sealed: `sealed:v2:<id of the key>:<base64
of nonce and ciphertext>`, AES-256-GCM with the place of the value as associated data, so that it opens nowhere else.
`sealed:v1:` has no id: each key is tried.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from balancer import oauth
from balancer.domain import Configuration, OAuthDetail, Provider, is_secret_name
from balancer.errors import ConfigurationError

_SEALED, _V1, _V2 = "sealed:v", "sealed:v1:", "sealed:v2:"
_REFERENCE = re.compile(r"\$\{(file:)?([^}]+)\}")
_KEY_ID = re.compile(r"[0-9a-f]{8}")
_NONCE_BYTES = 12
_MOST_KEPT = 10_000
_LOOK_AGAIN_S = 1.0
_HOW_TO_MAKE_ONE = "make one with `openssl rand -base64 32` and give it to every worker as BALANCER_SECRET_KEY"

Place = tuple[str, str]
"""A provider's uuid and the path of the field in it."""


class Sealer:
    """Seals literals with one key, and opens what that has sealed, or a second one. Its repr shows nothing of them.

    The second is the old key, or the one to come: while a fleet turns from one to the other, its workers hold both.
    """

    def __init__(self, key: str, also: str = "") -> None:
        """Each is 32 bytes in base64; `also` may be empty. Raises ConfigurationError for anything else."""
        raw = _raw(key, "BALANCER_SECRET_KEY")
        self.key_id = _key_id(raw)
        """Names the key that seals, and tells nothing of it."""
        self._aead = AESGCM(raw)
        self._opening = {self.key_id: self._aead}
        if also:
            raw = _raw(also, "BALANCER_SECRET_KEY_ALSO")
            self._opening.setdefault(_key_id(raw), AESGCM(raw))

    def seal(self, value: str, place: Place) -> str:
        """The value in a form that only this key opens, at this place."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._aead.encrypt(nonce, value.encode(), _associated(place))
        return f"{_V2}{self.key_id}:{base64.b64encode(sealed).decode()}"

    def open(self, value: str, place: Place) -> str:
        """What was sealed. Raises ConfigurationError when the key or the place is another one."""
        key_id, _, text = value.removeprefix(_V2).partition(":") if value.startswith(_V2) else ("", "", value)
        aeads = self._opening.values() if value.startswith(_V1) else filter(None, [self._opening.get(key_id)])
        for aead in aeads:
            try:
                raw = base64.b64decode(text.removeprefix(_V1), validate=True)
                return aead.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], _associated(place)).decode()
            except (InvalidTag, binascii.Error, ValueError):
                continue
        whose = "" if not _KEY_ID.fullmatch(key_id) else f", whose id is {key_id}"
        raise ConfigurationError(
            f"providers[{place[0]}].{place[1]}: cannot be opened: it was sealed with another BALANCER_SECRET_KEY{whose}"
        )

    def is_current(self, value: str) -> bool:
        """True for what the key that seals has sealed, as it would now."""
        return value.startswith(f"{_V2}{self.key_id}:")

    def resealed(self, value: str, place: Place) -> str:
        """What was sealed with the second key, or in an older form, sealed anew; anything else as it is.

        Raises ConfigurationError when it cannot be opened.
        """
        if not is_sealed(value) or self.is_current(value):
            return value
        return self.seal(self.open(value, place), place)


def _raw(key: str, variable: str) -> bytes:
    try:
        raw = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):  # The latter for what is no ASCII.
        raw = b""
    if len(raw) != 32:
        raise ConfigurationError(f"{variable}: expected 32 bytes in base64; {_HOW_TO_MAKE_ONE}")
    return raw


def _key_id(raw: bytes) -> str:
    return hashlib.sha256(b"balancer key id\n" + raw).hexdigest()[:8]


def _associated(place: Place) -> bytes:
    return "\n".join(place).encode()


def is_sealed(value: str) -> bool:
    """True for what `Sealer.seal` has made."""
    return value.startswith(_SEALED)


def is_reference(value: str) -> bool:
    """True for a value that takes its secret from the environment or a file."""
    return bool(_REFERENCE.search(value))


def _has_literal_password(value: str, place: Place) -> bool:
    """True for a proxy's URL with a password written out beside a reference, to its host perhaps."""
    if place[1] != "proxy_url":
        return False
    userinfo = value.rpartition("@")[0].rpartition("//")[2]
    return bool(_REFERENCE.sub("", userinfo.partition(":")[2]))


def seal_configuration(
    configuration: Configuration, sealer: Sealer | None, previous: Configuration | None = None
) -> Configuration:
    """The configuration with its literal credentials sealed; references stay as they are.

    A literal that `previous` holds sealed already keeps that form, so that it does not look like a change. Raises
    ConfigurationError, naming every place, for literals when there is no key.
    """
    faults: list[str] = []
    old = {provider.uuid: _values(provider) for provider in previous.providers} if previous else {}

    def seal(value: str, place: Place) -> str:
        if not value or is_sealed(value) or (is_reference(value) and not _has_literal_password(value, place)):
            return value
        if sealer is None:
            faults.append(f"providers[{place[0]}].{place[1]}: a literal credential would reach Redis in the clear")
            return value
        before = old.get(place[0], {}).get(place[1], "")
        if is_sealed(before):
            try:
                if sealer.open(before, place) == value:
                    return before
            except ConfigurationError:
                pass  # Sealed with a key that is no longer ours: seal it anew.
        return sealer.seal(value, place)

    providers = tuple(map_values(provider, seal) for provider in configuration.providers)
    if sealer is None:
        faults += [
            f"providers[{provider.uuid}].oauth_detail: its tokens are renewed, and would reach Redis in the clear"
            for provider in configuration.providers
            if oauth.is_renewed(provider)
        ]
    if faults:
        raise ConfigurationError(
            f"refused without a key; {_HOW_TO_MAKE_ONE}, or write ${{ENV}} or ${{file:/path}} instead", tuple(faults)
        )
    return msgspec.structs.replace(configuration, providers=providers)


def map_values(provider: Provider, change: Callable[[str, Place], str]) -> Provider:
    """The provider with each of its credentials changed."""

    def changed(value: str, path: str) -> str:
        return change(value, (provider.uuid, path))

    detail = provider.oauth_detail
    if detail is not None:
        detail = msgspec.structs.replace(
            detail,
            access_token=changed(detail.access_token, "oauth_detail.access_token"),
            refresh_token=changed(detail.refresh_token, "oauth_detail.refresh_token"),
            extra_fields=_mapped(detail.extra_fields, "oauth_detail.extra_fields", changed),
        )
    return msgspec.structs.replace(
        provider,
        token=changed(provider.token, "token"),
        oauth_detail=detail,
        headers={
            name: changed(value, f"headers.{name}") if is_secret_name(name) else value
            for name, value in provider.headers.items()
        },
        query={
            name: changed(value, f"query.{name}") if is_secret_name(name) else value
            for name, value in provider.query.items()
        },
        proxy_url=changed(provider.proxy_url, "proxy_url") if "@" in provider.proxy_url else provider.proxy_url,
    )


def _mapped(value: Any, path: str, change: Callable[[str, str], str]) -> Any:
    """A field's value with each credential in it changed, however deep: what has a secret's name, or is sealed."""
    match value:
        case dict():
            return {
                name: change(inner, f"{path}.{name}")
                if isinstance(inner, str) and (is_secret_name(name) or is_sealed(inner))
                else _mapped(inner, f"{path}.{name}", change)
                for name, inner in value.items()
            }
        case list():
            return [_mapped(inner, f"{path}[{at}]", change) for at, inner in enumerate(value)]
        case _:
            return value


def _values(provider: Provider) -> dict[str, str]:
    """The provider's credentials by their path."""
    values: dict[str, str] = {}

    def note(value: str, place: Place) -> str:
        values[place[1]] = value
        return value

    map_values(provider, note)
    if is_sealed(provider.proxy_url):
        values["proxy_url"] = provider.proxy_url
    return values


class Credentials:
    """Resolves credentials in a worker. What is sealed is opened once; files are looked at again after a second."""

    def __init__(self, sealer: Sealer | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._sealer = sealer
        self._clock = clock
        self._resolved: dict[tuple[str, Place], tuple[float, str]] = {}
        self._opened: dict[tuple[str, Place], str] = {}
        self._files: dict[str, tuple[tuple[int, int, int], str]] = {}

    def access_token(self, provider: Provider) -> str:
        """The credential to send, empty for none. Raises ConfigurationError that names the variable or file."""
        path = "oauth_detail.access_token" if provider.auth_type == "oauth" else "token"
        return self._resolve(provider.access_token, (provider.uuid, path))

    def oauth(self, provider: Provider) -> OAuthDetail:
        """What its tokens are renewed with. Raises as `access_token`, and for a provider without OAuth."""
        detail = provider.oauth_detail
        if detail is None:
            raise ConfigurationError(f"providers[{provider.uuid}].oauth_detail: missing")

        def resolved(value: Any, path: str) -> Any:
            match value:
                case str():
                    return self._resolve(value, (provider.uuid, path))
                case dict():
                    return {name: resolved(inner, f"{path}.{name}") for name, inner in value.items()}
                case _:
                    return value

        return msgspec.structs.replace(
            detail,
            access_token=resolved(detail.access_token, "oauth_detail.access_token"),
            refresh_token=resolved(detail.refresh_token, "oauth_detail.refresh_token"),
            extra_fields=resolved(detail.extra_fields, "oauth_detail.extra_fields"),
        )

    def headers(self, provider: Provider) -> dict[str, str]:
        """The provider's own headers."""
        return {
            name: self._resolve(value, (provider.uuid, f"headers.{name}")) for name, value in provider.headers.items()
        }

    def query(self, provider: Provider) -> dict[str, str]:
        """The provider's own query parameters."""
        return {name: self._resolve(value, (provider.uuid, f"query.{name}")) for name, value in provider.query.items()}

    def proxy_url(self, provider: Provider) -> str:
        """The proxy to go through, empty for none."""
        return self._resolve(provider.proxy_url, (provider.uuid, "proxy_url"))

    def _resolve(self, value: str, place: Place) -> str:
        if "${" not in value and not is_sealed(value):
            return value  # A literal that is no secret, or none at all.
        known = self._resolved.get((value, place))
        now = self._clock()
        if known is not None and now < known[0]:
            return known[1]
        resolved = self._resolve_now(value, place)
        if len(self._resolved) >= _MOST_KEPT:
            self._resolved.clear()  # Those of configurations long gone.
        self._resolved[value, place] = now + _LOOK_AGAIN_S, resolved
        return resolved

    def _resolve_now(self, value: str, place: Place) -> str:
        if is_sealed(value):
            if self._sealer is None:
                raise ConfigurationError(
                    f"providers[{place[0]}].{place[1]} is sealed, and this worker has no BALANCER_SECRET_KEY"
                )
            value = self._open(self._sealer, value, place)
        if "${" not in value:
            return value
        return _REFERENCE.sub(lambda match: self._refer(match, place), value)

    def _open(self, sealer: Sealer, value: str, place: Place) -> str:
        opened = self._opened.get((value, place))
        if opened is None:
            if len(self._opened) >= _MOST_KEPT:
                self._opened.clear()  # Those of configurations long gone.
            opened = self._opened[value, place] = sealer.open(value, place)
        return opened

    def _refer(self, match: re.Match[str], place: Place) -> str:
        is_file, name = match.groups()
        if is_file:
            return self._read(name, place)
        value = os.environ.get(name)
        if value is None:
            raise ConfigurationError(f"providers[{place[0]}].{place[1]}: the variable {name} is not set in this worker")
        return value

    def _read(self, name: str, place: Place) -> str:
        try:
            stat = Path(name).stat()  # Of the file that links lead to: Kubernetes swaps the link of a whole folder.
            changed = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            cached = self._files.get(name)
            if cached is None or cached[0] != changed:
                cached = self._files[name] = (changed, Path(name).read_text(encoding="utf-8").strip())
        except OSError as exc:
            raise ConfigurationError(f"providers[{place[0]}].{place[1]}: cannot read {name}: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise ConfigurationError(f"providers[{place[0]}].{place[1]}: {name} is no UTF-8 text") from exc
        return cached[1]
