"""TLS to upstreams: one context a client, certificates verified, sessions resumed."""

from __future__ import annotations

import ssl
from typing import Any

from balancer.errors import ConfigurationError
from balancer.gateway.upstream.connection import Connection

_SESSIONS = 256


class ClientContext(ssl.SSLContext):
    """A context that offers each host its last session, which spares most of a handshake (TLS 1.2 and 1.3).

    The event loops make their TLS objects with `wrap_bio`, and have no other way to be told of a session.
    """

    _sessions: dict[str, ssl.SSLSession]
    _has_authorities = False

    def wrap_bio(
        self, incoming: Any, outgoing: Any, server_side: bool = False, server_hostname: Any = None, session: Any = None
    ) -> ssl.SSLObject:
        """A TLS object, with the host's last session. The first costs 20 ms: it reads the system's certificates."""
        if not self._has_authorities:
            self._has_authorities = True
            self.load_default_certs()
        session = session or self._sessions.get(server_hostname)
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)

    def remember(self, connection: Connection) -> None:
        """Keeps a TLS session for its host's next connection; in TLS 1.3 there is none before the first answer."""
        tls = connection.transport.get_extra_info("ssl_object") if connection.transport is not None else None
        if tls is None:
            return
        session, host = tls.session, tls.server_hostname
        if session is not None and session.has_ticket and host:
            if len(self._sessions) >= _SESSIONS and host not in self._sessions:
                del self._sessions[next(iter(self._sessions))]
            self._sessions[host] = session


def client_context(ca_file: str) -> ClientContext:
    """The context: the system's certificate authorities, and those in the file, if one is named."""
    context = ClientContext(ssl.PROTOCOL_TLS_CLIENT)
    context._sessions = {}
    context.set_alpn_protocols(["http/1.1"])
    if ca_file:
        try:
            context.load_verify_locations(ca_file)
        except OSError as exc:  # Among them ssl.SSLError.
            raise ConfigurationError(f"BALANCER_UPSTREAM_CA_FILE: {ca_file} has no certificates in PEM: {exc}") from exc
    return context
