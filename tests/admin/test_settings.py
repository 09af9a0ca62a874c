"""Where the admin server listens, and with which token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from balancer import config
from balancer.errors import ConfigurationError


@pytest.mark.parametrize(
    ("flags", "port"),
    [
        ({}, 8081),
        ({"admin_port": 0}, None),
        ({"admin_port": 9000}, 9000),
        ({"port": 0}, 0),
        ({"port": 0, "admin_port": 9000}, 9000),
        ({"port": 0, "admin_port": 0}, None),
    ],
)
def test_the_admin_port_is_free_where_the_data_port_is_and_nobody_named_another(
    flags: dict[str, Any], port: int | None
) -> None:
    assert config.load(flags, {}).admin_listen_port == port


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "admin.invalid"])
def test_without_a_token_it_is_on_loopback_alone(host: str) -> None:
    with pytest.raises(ConfigurationError, match="BALANCER_ADMIN_TOKEN"):
        config.load({"admin_host": host}, {})
    assert config.load({"admin_host": host, "admin_port": 0}, {}).admin_listen_port is None
    assert config.load({"admin_host": host}, {"BALANCER_ADMIN_TOKEN": "x"}).admin_host == host


def test_client_tokens_do_not_open_the_admin_server_to_others() -> None:
    with pytest.raises(ConfigurationError, match="refusing to serve the admin API"):
        config.load({"admin_host": "0.0.0.0", "insecure": True}, {"BALANCER_CLIENT_TOKENS": "x"})


def test_the_token_may_come_out_of_a_file_and_reaches_the_workers(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("of-a-file\n", encoding="utf-8")
    settings = config.load({}, {"BALANCER_ADMIN_TOKEN_FILE": str(file)})
    assert settings.admin_token == "of-a-file"
    assert config.load({}, settings.environment()).admin_token == "of-a-file"
