"""healthcheck: what an image asks its gateway, over the settings that `serve` reads."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.topologies import free_ports, make_certificates


class Answers(http.server.BaseHTTPRequestHandler):
    """A gateway that is alive and not ready."""

    def do_GET(self) -> None:
        status, body = (200, b"{}") if self.path == "/healthz" else (503, b'{"ready":false,"draining":true}')
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


@contextlib.contextmanager
def answering(tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The port of such a gateway."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield str(server.server_port)
        finally:
            server.shutdown()
            thread.join()


def test_a_gateway_that_is_alive_passes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as port:
        monkeypatch.setenv("BALANCER_PORT", port)
        # Listens on all addresses, as in a container, and is asked over loopback.
        monkeypatch.setenv("BALANCER_CLIENT_TOKENS", "of-the-team")
        ran = run("healthcheck")
    assert (ran.status, ran.out, ran.err) == (0, "", "")


def test_one_that_is_not_ready_fails_the_check_that_asks_for_it_and_says_why(run: Run) -> None:
    with answering() as port:
        ran = run("healthcheck", "--ready", "--port", port)
    assert ran.status == 1
    assert ran.err == (
        f'balancer: healthcheck: 127.0.0.1:{port}/readyz answered 503: {{"ready":false,"draining":true}}\n'
    )


def test_one_that_speaks_tls_is_asked_over_tls_whoever_signed_its_certificate(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    monkeypatch.setenv("BALANCER_TLS_CERT_FILE", str(tmp_path / "server.pem"))
    monkeypatch.setenv("BALANCER_TLS_KEY_FILE", str(tmp_path / "server.key"))
    with answering(context) as port:
        assert run("healthcheck", "--port", port).status == 0


def test_no_gateway_is_told_by_one_line(run: Run) -> None:
    (port,) = free_ports(1)
    ran = run("healthcheck", "--host", "127.0.0.1", "--port", str(port))
    assert ran.status == 1
    assert ran.err.startswith(f"balancer: healthcheck: no answer from 127.0.0.1:{port}/healthz: ")
    assert ran.err.count("\n") == 1


def test_a_port_that_only_the_gateway_knows_is_asked_for(run: Run) -> None:
    assert "name it with --port" in run("healthcheck", "--port", "0").err
