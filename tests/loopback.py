"""The guard of all tests: one that reaches beyond loopback fails, also where the program swallows the refusal.

It sees the process that runs the tests, not the servers that a test starts.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Generator

import pytest

_strays: list[str] = []


def is_local(host: str | bytes | None) -> bool:
    """True for what stays on this machine: no host, localhost, 127.0.0.0/8, ::1."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _watch(event: str, args: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.sendto"):
        sock, address = args
        if not isinstance(sock, socket.socket) or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        host = address[0] if isinstance(address, tuple) else None
        if not is_local(host):
            _strays.append(f"{event} {address}")
            raise ConnectionRefusedError(f"tests stay on loopback: {address}")
    elif event == "socket.getaddrinfo":
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
        if not isinstance(host, str) or is_local(host) or _is_numeric(host):
            return
        # `.invalid` never resolves (RFC 6761); answering here spares the network the question.
        if not host.rstrip(".").endswith(".invalid"):
            _strays.append(f"look-up of {host}")
        raise socket.gaierror(socket.EAI_NONAME, "tests ask no name server")


sys.addaudithook(_watch)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Fail the test that reached out."""
    try:
        result = yield
    finally:
        strays = ", ".join(_strays)
        _strays.clear()
    if strays:
        pytest.fail(f"reached beyond loopback: {strays}", pytrace=False)
    return result
