"""TLS on the data plane's port."""

from __future__ import annotations

import ssl
from pathlib import Path

from balancer.config import PREFIX, Settings
from balancer.errors import ConfigurationError

_CERT, _KEY = f"{PREFIX}TLS_CERT_FILE", f"{PREFIX}TLS_KEY_FILE"


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """What clients are met with: TLS 1.2 or later and HTTP/1.1; None where the settings ask for none.

    Raises ConfigurationError that names the variable of the file that is missing, unreadable, or does not fit.
    """
    if not settings.tls_cert_file:
        return None
    for variable, name in ((_CERT, settings.tls_cert_file), (_KEY, settings.tls_key_file)):
        try:
            Path(name).read_bytes()
        except OSError as exc:
            raise ConfigurationError(f"{variable}: cannot read {name}: {exc.strerror}") from exc
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        # A password, so that an encrypted key is an error and not a question on the terminal.
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file, password="")
    except ssl.SSLError as exc:
        raise ConfigurationError(
            f"{_CERT} and {_KEY}: {settings.tls_cert_file} must be a certificate (with its chain behind it) in PEM, "
            f"{settings.tls_key_file} its key, unencrypted: {exc.reason or exc}"
        ) from exc
    return context
