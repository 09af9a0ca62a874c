"""Settings: where each comes from, what is refused, and where the server may listen."""

from __future__ import annotations

from pathlib import Path

import pytest

from balancer import config
from balancer.config import SETTINGS, Settings, is_loopback, load
from balancer.errors import ConfigurationError

HOME = {"XDG_DATA_HOME": "/data"}


def refusal(environ: dict[str, str], flags: dict[str, object] | None = None) -> ConfigurationError:
    """What is said to these variables and flags."""
    with pytest.raises(ConfigurationError) as caught:
        load(flags, HOME | environ)
    return caught.value


def test_with_nothing_given_every_setting_has_its_default() -> None:
    assert load({}, HOME) == Settings(
        config="",
        redis="",
        host="",
        port=8080,
        tls_cert_file="",
        tls_key_file="",
        fast_lane=True,
        metrics_port=0,
        admin_host="127.0.0.1",
        admin_port=8081,
        admin_token="",
        admin_tokens=(),
        admin_hosts=(),
        workers=1,
        insecure=False,
        client_tokens=(),
        secret_key="",
        secret_key_also="",
        data_dir=Path("/data/balancer"),
        access_log=False,
        otel=False,
        otel_semconv="1.41",
        log_level="info",
        redis_deadline_ms=250,
        lease_s=30.0,
        drain_timeout_s=30.0,
        drain_delay_s=0.0,
        max_body_bytes=64 * 1024 * 1024,
        upstream_connections=1024,
        upstream_ca_file="",
        loop="asyncio",
        decision_headers=True,
        audit_interval_s=60.0,
        outbox_dir="",
        outbox_max_entries=200_000,
        scripts_dir="",
    )


@pytest.mark.parametrize(
    ("flags", "environ", "port"),
    [
        ({"port": "1"}, {"BALANCER_PORT": "2"}, 1),
        ({"port": 0}, {"BALANCER_PORT": "2"}, 0),
        ({"port": None}, {"BALANCER_PORT": "2"}, 2),
        ({}, {"BALANCER_PORT": " 2 "}, 2),
        ({}, {"BALANCER_PORT": ""}, 8080),
        ({}, {"PORT": "2"}, 8080),
    ],
)
def test_a_flag_wins_over_the_environment_and_that_over_the_default(
    flags: dict[str, object], environ: dict[str, str], port: int
) -> None:
    assert load(flags, HOME | environ).port == port


def test_an_empty_flag_is_given_all_the_same() -> None:
    assert load({"host": ""}, HOME | {"BALANCER_HOST": "::1"}).host == ""


def test_the_process_environment_is_read_when_no_other_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALANCER_PORT", "18")

    assert load().port == 18


@pytest.mark.parametrize(
    ("said", "means"),
    [
        *((word, True) for word in ("1", "true", "TRUE", "yes", "on", " On ")),
        *((word, False) for word in ("0", "false", "no", "off", "OFF")),
    ],
)
def test_a_switch_is_said_in_any_usual_way(said: str, means: bool) -> None:
    assert load({}, HOME | {"BALANCER_DECISION_HEADERS": said}).decision_headers is means


def test_client_tokens_are_separated_by_commas_and_blanks_are_none() -> None:
    assert load({}, HOME | {"BALANCER_CLIENT_TOKENS": " one, two ,,"}).client_tokens == ("one", "two")


# -- secrets in files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["client_tokens", "secret_key"])
def test_a_secret_may_stand_in_a_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "secret"
    file.write_text("one\n", encoding="utf-8")

    read = getattr(load({}, HOME | {f"BALANCER_{name.upper()}_FILE": str(file)}), name)

    assert read in ("one", ("one",))


def test_a_secret_given_itself_wins_over_its_file(tmp_path: Path) -> None:
    environ = {"BALANCER_SECRET_KEY": "one", "BALANCER_SECRET_KEY_FILE": str(tmp_path / "absent")}

    assert load({}, HOME | environ).secret_key == "one"


def test_what_is_no_secret_is_read_from_no_file(tmp_path: Path) -> None:
    file = tmp_path / "port"
    file.write_text("1", encoding="utf-8")

    assert load({}, HOME | {"BALANCER_PORT_FILE": str(file)}).port == 8080


def test_a_secret_file_that_cannot_be_read_is_named_with_its_variable(tmp_path: Path) -> None:
    message = refusal({"BALANCER_SECRET_KEY_FILE": str(tmp_path / "absent")}).message

    assert message.startswith("BALANCER_SECRET_KEY_FILE: ")
    assert str(tmp_path / "absent") in message


def test_a_secret_file_that_is_no_text_is_refused_like_any_other(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"\xff\xfe\x00")

    assert refusal({"BALANCER_SECRET_KEY_FILE": str(file)}).message.startswith("BALANCER_SECRET_KEY_FILE: ")


# -- complaints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("BALANCER_PORT", "http", "a whole number"),
        ("BALANCER_PORT", "80.5", "a whole number"),
        ("BALANCER_PORT", "65536", "0 to 65535"),
        ("BALANCER_METRICS_PORT", "-1", "0 to 65535"),
        ("BALANCER_WORKERS", "0", "1 to"),
        ("BALANCER_LEASE_S", "soon", "a number"),
        ("BALANCER_LEASE_S", "nan", "a number"),
        ("BALANCER_LEASE_S", "0.5", "1 to 3600"),
        ("BALANCER_INSECURE", "maybe", "on or off"),
        ("BALANCER_LOG_LEVEL", "loud", "debug, info, warning or error"),
        ("BALANCER_REDIS_DEADLINE_MS", "0", "more than 0"),
        ("BALANCER_DRAIN_TIMEOUT_S", "-1", "0 seconds or more"),
        ("BALANCER_DRAIN_DELAY_S", "-0.1", "0 seconds or more"),
        ("BALANCER_MAX_BODY_BYTES", "0", "more than 0"),
        ("BALANCER_UPSTREAM_CONNECTIONS", "0", "1 or more"),
        ("BALANCER_AUDIT_INTERVAL_S", "-1", "0 seconds or more"),
    ],
)
def test_a_complaint_names_the_variable_the_value_and_what_was_expected(
    variable: str, value: str, expected: str
) -> None:
    complaint = str(refusal({variable: value}))

    assert f"{variable}: expected " in complaint
    assert expected in complaint
    assert value in complaint


def test_a_flag_that_is_wrong_is_named_by_its_variable() -> None:
    assert refusal({}, {"workers": "many"}).message.startswith("BALANCER_WORKERS: ")


def test_values_out_of_range_are_all_told_at_once() -> None:
    faults = refusal({"BALANCER_PORT": "-1", "BALANCER_WORKERS": "0", "BALANCER_LOG_LEVEL": "loud"}).faults

    assert [fault.partition(":")[0] for fault in faults] == [
        "BALANCER_PORT",
        "BALANCER_WORKERS",
        "BALANCER_LOG_LEVEL",
    ]


def test_every_variable_is_told_with_its_meaning() -> None:
    assert {s.name for s in SETTINGS} == set(Settings.__struct_fields__)
    assert all(s.variable == f"BALANCER_{s.name.upper()}" and s.meaning for s in SETTINGS)


# -- where the server listens ------------------------------------------------------------------------------------------

TOKENS = {"BALANCER_CLIENT_TOKENS": "one"}
INSECURE = {"BALANCER_INSECURE": "on"}


@pytest.mark.parametrize(
    ("environ", "listens_on"),
    [
        ({}, "127.0.0.1"),
        ({"BALANCER_CLIENT_TOKENS": " , "}, "127.0.0.1"),
        (TOKENS, "0.0.0.0"),
        (INSECURE, "0.0.0.0"),
        ({"BALANCER_HOST": "localhost"}, "localhost"),
        ({"BALANCER_HOST": "127.0.0.2"}, "127.0.0.2"),
        ({"BALANCER_HOST": "::1"}, "::1"),
        ({"BALANCER_HOST": "192.0.2.1"} | TOKENS, "192.0.2.1"),
        ({"BALANCER_HOST": "::"} | INSECURE, "::"),
    ],
)
def test_without_client_tokens_only_loopback_is_listened_on(environ: dict[str, str], listens_on: str) -> None:
    assert load({}, HOME | environ).listen_host == listens_on


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com", "1127.0.0.1"])
@pytest.mark.parametrize("tokens", ["", " ,"])
def test_any_other_address_is_refused_without_client_tokens(host: str, tokens: str) -> None:
    message = refusal({"BALANCER_CLIENT_TOKENS": tokens}, {"host": host}).message

    assert host in message
    assert "BALANCER_CLIENT_TOKENS" in message
    assert "--insecure" in message


@pytest.mark.parametrize(
    ("host", "is_one"),
    [("127.0.0.1", True), ("127.255.255.254", True), ("::1", True), ("localhost", True), ("128.0.0.1", False)],
)
def test_loopback_is_localhost_the_whole_127_net_and_one_address_of_ipv6(host: str, is_one: bool) -> None:
    assert is_loopback(host) is is_one


def test_a_host_name_is_no_loopback_address_however_it_begins() -> None:
    """Such a name resolves to whatever its owner likes, an address of this machine that others reach included."""
    assert not is_loopback("127.example.com")
    assert "--insecure" in refusal({"BALANCER_HOST": "127.example.com"}).message


# -- for another process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {
            "config": "balancer.yaml",
            "redis": "unix:///tmp/s.sock",
            "host": "::",
            "port": 0,
            "metrics_port": 9090,
            "admin_host": "127.0.0.2",
            "admin_port": 9091,
            "admin_token": "admin",
            "workers": 3,
            "insecure": True,
            "client_tokens": "one,two",
            "secret_key": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
            "data_dir": "/var/lib/balancer",
            "log_level": "debug",
            "redis_deadline_ms": 1,
            "lease_s": 1.5,
            "drain_timeout_s": 0.0,
            "drain_delay_s": 0.1,
            "max_body_bytes": 1,
            "upstream_connections": 1,
            "decision_headers": False,
            "audit_interval_s": 7.5,
            "outbox_dir": "/var/spool/balancer",
            "outbox_max_entries": 1000,
            "scripts_dir": "lua",
        },
    ],
    ids=["defaults", "everything"],
)
def test_another_process_reads_the_same_settings_from_their_environment(flags: dict[str, object]) -> None:
    settings = load(flags, HOME)

    assert load({}, settings.environment()) == settings


def test_settings_handed_on_win_over_what_the_environment_said(tmp_path: Path) -> None:
    """The worker's environment is the supervisor's with its settings laid over it, secret files included."""
    file = tmp_path / "tokens"
    file.write_text("one", encoding="utf-8")
    environ = HOME | {"BALANCER_PORT": "1", "BALANCER_CLIENT_TOKENS_FILE": str(file)}
    settings = load({"port": "2"}, environ)
    file.write_text("two", encoding="utf-8")

    assert load({}, environ | settings.environment()) == settings


def test_a_folder_is_made_absolute_so_that_every_process_means_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nowhere")

    assert config.load({"data_dir": "here"}, {}).data_dir == tmp_path / "here"
    assert config.load({}, {}).data_dir == Path("/nowhere/.local/share/balancer")
