"""Credentials: references that each worker resolves, and literals that are sealed before they reach Redis.

A value may be a literal, hold references (`${ENV}`, `${file:/path}`), or be sealed: `sealed:v1:<base64 of nonce and
ciphertext>`, AES-256-GCM with the place of the value as associated data, so that it opens nowhere else.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from balancer.domain import Configuration, Provider, is_secret_name
from balancer.errors import ConfigurationError

_SEALED = "sealed:v1:"
_REFERENCE = re.compile(r"\$\{(file:)?([^}]+)\}")
_NONCE_BYTES = 12
_MOST_KEPT = 10_000
_LOOK_AGAIN_S = 1.0
_HOW_TO_MAKE_ONE = "make one with `openssl rand -base64 32` and give it to every worker as BALANCER_SECRET_KEY"

Place = tuple[str, str]
"""A provider's uuid and the path of the field in it."""


class Sealer:
    """Seals and opens literals with one key. Its repr shows nothing of it."""

    def __init__(self, key: str) -> None:
        """`key`: 32 bytes in base64. Raises ConfigurationError for anything else."""
        try:
            raw = base64.b64decode(key, validate=True)
        except binascii.Error:
            raw = b""
        if len(raw) != 32:
            raise ConfigurationError(f"BALANCER_SECRET_KEY: expected 32 bytes in base64; {_HOW_TO_MAKE_ONE}")
        self._aead = AESGCM(raw)

    def seal(self, value: str, place: Place) -> str:
        """The value in a form that only this key opens, at this place."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._aead.encrypt(nonce, value.encode(), _associated(place))
        return _SEALED + base64.b64encode(sealed).decode()

    def open(self, value: str, place: Place) -> str:
        """What was sealed. Raises ConfigurationError when the key or the place is another one."""
        try:
            raw = base64.b64decode(value.removeprefix(_SEALED), validate=True)
            return self._aead.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], _associated(place)).decode()
        except (InvalidTag, binascii.Error, ValueError) as exc:
            raise ConfigurationError(
                f"providers[{place[0]}].{place[1]}: cannot be opened: it was sealed with another BALANCER_SECRET_KEY"
            ) from exc


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

    providers = tuple(_map_values(provider, seal) for provider in configuration.providers)
    if faults:
        raise ConfigurationError(
            f"refused without a key; {_HOW_TO_MAKE_ONE}, or write ${{ENV}} or ${{file:/path}} instead", tuple(faults)
        )
    return msgspec.structs.replace(configuration, providers=providers)


def _map_values(provider: Provider, change: Callable[[str, Place], str]) -> Provider:
    """The provider with each of its credentials changed."""

    def changed(value: str, path: str) -> str:
        return change(value, (provider.uuid, path))

    detail = provider.oauth_detail
    if detail is not None:
        detail = msgspec.structs.replace(
            detail,
            access_token=changed(detail.access_token, "oauth_detail.access_token"),
            refresh_token=changed(detail.refresh_token, "oauth_detail.refresh_token"),
            extra_fields={
                name: changed(value, f"oauth_detail.extra_fields.{name}")
                if is_secret_name(name) and isinstance(value, str)
                else value
                for name, value in detail.extra_fields.items()
            },
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


def _values(provider: Provider) -> dict[str, str]:
    """The provider's credentials by their path."""
    values: dict[str, str] = {}

    def note(value: str, place: Place) -> str:
        values[place[1]] = value
        return value

    _map_values(provider, note)
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
        self._files: dict[str, tuple[int, str]] = {}

    def access_token(self, provider: Provider) -> str:
        """The credential to send, empty for none. Raises ConfigurationError that names the variable or file."""
        path = "oauth_detail.access_token" if provider.auth_type == "oauth" else "token"
        return self._resolve(provider.access_token, (provider.uuid, path))

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
            changed = Path(name).stat().st_mtime_ns
            cached = self._files.get(name)
            if cached is None or cached[0] != changed:
                cached = self._files[name] = (changed, Path(name).read_text(encoding="utf-8").strip())
        except OSError as exc:
            raise ConfigurationError(f"providers[{place[0]}].{place[1]}: cannot read {name}: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise ConfigurationError(f"providers[{place[0]}].{place[1]}: {name} is no UTF-8 text") from exc
        return cached[1]
