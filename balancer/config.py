"""Settings: every variable, its default, its unit and what it means. Read once, at the start of a process.

Flags of the command line win over the environment, the environment over the defaults. A setting named `X` is the
variable `BALANCER_X`; one marked as a secret may also be given as a file, `BALANCER_X_FILE`.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from balancer import roles
from balancer.errors import ConfigurationError

PREFIX = "BALANCER_"
_WHOLE = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
DEFAULT_ADMIN_PORT = 8081
SEMCONV_VERSIONS = ("1.36", "1.41")


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the settings table."""

    name: str
    default: Any
    meaning: str
    is_secret: bool = False

    @property
    def variable(self) -> str:
        """The environment variable."""
        return PREFIX + self.name.upper()


SETTINGS: tuple[Setting, ...] = (
    Setting(name="config", default="", meaning="configuration file, YAML or JSON; published at start if it is new"),
    Setting(
        name="redis",
        default="",
        meaning="redis://, rediss://, unix://, redis+sentinel:// or redis+cluster:// URL; empty: the embedded server",
    ),
    Setting(name="host", default="", meaning="address to listen on; empty: all with client tokens, else 127.0.0.1"),
    Setting(name="port", default=8080, meaning="port of the data plane"),
    Setting(
        name="tls_cert_file",
        default="",
        meaning="certificate of the data plane in PEM, its chain behind it; empty: no TLS",
    ),
    Setting(name="tls_key_file", default="", meaning="the certificate's key in PEM, unencrypted"),
    Setting(name="fast_lane", default=True, meaning="serve the usual requests without aiohttp; off: all go through it"),
    Setting(name="metrics_port", default=0, meaning="port of its own for /metrics; 0 serves it on the data plane"),
    Setting(name="admin_host", default="127.0.0.1", meaning="address of the admin server"),
    Setting(
        name="admin_port",
        default=DEFAULT_ADMIN_PORT,
        meaning="port of the admin server; 0: no such server; left at 8081 with port 0: any free one",
    ),
    Setting(
        name="admin_token",
        default="",
        meaning="token for the admin server; empty: on loopback only, with a random one printed at the start",
        is_secret=True,
    ),
    Setting(
        name="admin_tokens",
        default="",
        meaning="further tokens for the admin server, name:role:token, with commas or a line each; "
        "roles: viewer, operator, admin",
        is_secret=True,
    ),
    Setting(
        name="admin_hosts",
        default="",
        meaning="comma-separated host names that the admin server answers to; on loopback those of loopback always, "
        "beyond it empty: all",
    ),
    Setting(name="workers", default=1, meaning="worker processes"),
    Setting(name="insecure", default=False, meaning="listen beyond loopback without client tokens"),
    Setting(name="client_tokens", default="", meaning="comma-separated tokens that clients present", is_secret=True),
    Setting(
        name="secret_key",
        default="",
        meaning="32 bytes in base64; seals literal credentials before they reach Redis",
        is_secret=True,
    ),
    Setting(
        name="secret_key_also",
        default="",
        meaning="a second key, which only opens: the old one, or the one to come, while keys are changed",
        is_secret=True,
    ),
    Setting(name="data_dir", default="", meaning="embedded store and its key; empty: ~/.local/share/balancer"),
    Setting(name="log_level", default="info", meaning="debug, info, warning or error"),
    Setting(
        name="access_log",
        default=False,
        meaning="a JSON line for each request on stdout, see docs/observability.md",
    ),
    Setting(
        name="otel",
        default=False,
        meaning="traces by OpenTelemetry, OTLP over HTTP; where to, and which of them, the variables OTEL_* say",
    ),
    Setting(
        name="otel_semconv",
        default="1.41",
        meaning="version of the semantic conventions that name what stands on spans: 1.36 or 1.41",
    ),
    Setting(name="redis_deadline_ms", default=250, meaning="milliseconds that a selection waits for Redis at most"),
    Setting(name="lease_s", default=30.0, meaning="seconds after which a silent worker's open attempts count as lost"),
    Setting(
        name="outbox_dir",
        default="",
        meaning="folder where settles that Redis has not acknowledged, and the configuration, outlive their process; "
        "empty: memory only",
    ),
    Setting(
        name="outbox_max_entries",
        default=200_000,
        meaning="unacknowledged settles that a worker holds in memory per pool; beyond it on disk alone, if it may",
    ),
    Setting(name="drain_timeout_s", default=30.0, meaning="seconds that open requests get to finish at shutdown"),
    Setting(name="drain_delay_s", default=0.0, meaning="seconds to go on accepting after SIGTERM, while not ready"),
    Setting(name="max_body_bytes", default=64 * 1024 * 1024, meaning="longest request body in bytes; beyond it: 413"),
    Setting(name="upstream_connections", default=1024, meaning="connections a worker opens per provider at most"),
    Setting(
        name="upstream_ca_file",
        default="",
        meaning="file of certificates in PEM that upstreams and proxies may be signed by, beside the system's",
    ),
    Setting(
        name="loop", default="asyncio", meaning="the workers' event loop: asyncio, or uvloop where it is installed"
    ),
    Setting(name="decision_headers", default=True, meaning="answer with x-balancer-decision, -service and -attempts"),
    Setting(
        name="audit_interval_s", default=60.0, meaning="seconds between checks of each pool's history; 0 checks none"
    ),
    Setting(name="scripts_dir", default="", meaning="folder of Lua scripts to run instead of ours, for experiments"),
)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one process, typed and checked."""

    config: str
    redis: str
    host: str
    port: int
    tls_cert_file: str
    tls_key_file: str
    fast_lane: bool
    metrics_port: int
    admin_host: str
    admin_port: int
    admin_token: str
    admin_tokens: tuple[roles.Principal, ...]
    admin_hosts: tuple[str, ...]
    workers: int
    insecure: bool
    client_tokens: tuple[str, ...]
    secret_key: str
    secret_key_also: str
    data_dir: Path
    log_level: str
    access_log: bool
    otel: bool
    otel_semconv: str
    redis_deadline_ms: int
    lease_s: float
    outbox_dir: str
    outbox_max_entries: int
    drain_timeout_s: float
    drain_delay_s: float
    max_body_bytes: int
    upstream_connections: int
    upstream_ca_file: str
    loop: str
    decision_headers: bool
    audit_interval_s: float
    scripts_dir: str

    @property
    def listen_host(self) -> str:
        """The address to bind: what was asked for, or all addresses with client tokens, or loopback."""
        if self.host:
            return self.host
        return "0.0.0.0" if self.client_tokens or self.insecure else "127.0.0.1"

    @property
    def admin_listen_port(self) -> int | None:
        """The admin server's port, 0 for any free one, None for no admin server."""
        if not self.admin_port:
            return None
        return 0 if self.port == 0 and self.admin_port == DEFAULT_ADMIN_PORT else self.admin_port

    def environment(self) -> dict[str, str]:
        """The variables that make another process read these same settings."""
        values: dict[str, str] = {}
        for setting in SETTINGS:
            value = getattr(self, setting.name)
            if setting.name == "admin_tokens":
                value = roles.listed(self.admin_tokens)
            values[setting.variable] = ",".join(value) if isinstance(value, tuple) else str(value)
        return values


def load(flags: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings from flags (absent or None: not given), environment and defaults.

    Raises ConfigurationError that names the variable and what was expected.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        flag = (flags or {}).get(setting.name)
        raw = flag if flag is not None else _from_environment(setting, environ)
        values[setting.name] = setting.default if raw is None else _typed(setting, raw)
    for name in ("client_tokens", "admin_hosts"):
        values[name] = tuple(part.strip() for part in values[name].split(",") if part.strip())
    values["admin_tokens"] = roles.read_principals(values["admin_tokens"])
    values["data_dir"] = Path(values["data_dir"] or _default_data_dir(environ)).expanduser().absolute()
    settings = Settings(**values)
    _check(settings)
    return settings


def _default_data_dir(environ: Mapping[str, str]) -> str:
    base = environ.get("XDG_DATA_HOME") or "~/.local/share"
    return f"{base}/balancer"


def _from_environment(setting: Setting, environ: Mapping[str, str]) -> str | None:
    value = environ.get(setting.variable)
    path = environ.get(setting.variable + "_FILE") if setting.is_secret else None
    if path and not value:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except OSError as exc:
            raise ConfigurationError(f"{setting.variable}_FILE: cannot read {path}: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise ConfigurationError(f"{setting.variable}_FILE: {path} is no UTF-8 text") from exc
    return value or None


def _typed(setting: Setting, raw: object) -> object:
    kind = type(setting.default)
    if isinstance(raw, kind) and not (kind is int and isinstance(raw, bool)):
        return raw
    text = str(raw).strip()
    if kind is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ConfigurationError(f"{setting.variable}: expected on or off, not {text!r}")
    if (_WHOLE if kind is int else _NUMBER).fullmatch(text):
        return kind(text)
    word = "a whole number" if kind is int else "a number"
    raise ConfigurationError(f"{setting.variable}: expected {word}, not {text!r} ({setting.meaning})")


def _check(settings: Settings) -> None:
    faults: list[str] = []

    def require(name: str, holds: bool, expected: str) -> None:
        if not holds:
            faults.append(f"{PREFIX}{name.upper()}: expected {expected}, not {getattr(settings, name)!r}")

    for name in ("port", "metrics_port", "admin_port"):
        require(name, 0 <= getattr(settings, name) <= 65535, "a port, 0 to 65535")
    require("admin_host", bool(settings.admin_host), "an address")
    require("workers", 1 <= settings.workers <= 1024, "1 to 1024")
    require("log_level", settings.log_level in ("debug", "info", "warning", "error"), "debug, info, warning or error")
    require("redis_deadline_ms", settings.redis_deadline_ms > 0, "more than 0 milliseconds")
    require("lease_s", 1 <= settings.lease_s <= 3600, "1 to 3600 seconds")
    require("outbox_max_entries", settings.outbox_max_entries >= 1000, "1000 or more")
    require("drain_timeout_s", settings.drain_timeout_s >= 0, "0 seconds or more")
    require("drain_delay_s", settings.drain_delay_s >= 0, "0 seconds or more")
    require("max_body_bytes", settings.max_body_bytes > 0, "more than 0 bytes")
    require("upstream_connections", settings.upstream_connections > 0, "1 or more")
    require("loop", settings.loop in ("asyncio", "uvloop"), "asyncio or uvloop")
    require("audit_interval_s", settings.audit_interval_s >= 0, "0 seconds or more")
    require("otel_semconv", settings.otel_semconv in SEMCONV_VERSIONS, " or ".join(SEMCONV_VERSIONS))
    if settings.otel and not _has_opentelemetry():
        faults.append(
            f"{PREFIX}OTEL: OpenTelemetry is not installed: `pip install 'llm-balancer[otel]'`, or leave it off"
        )
    if settings.loop == "uvloop" and importlib.util.find_spec("uvloop") is None:
        faults.append(f"{PREFIX}LOOP: uvloop is not installed: `pip install uvloop`, or leave it at asyncio")
    if bool(settings.tls_cert_file) != bool(settings.tls_key_file):
        given, missing = ("CERT", "KEY") if settings.tls_cert_file else ("KEY", "CERT")
        faults.append(f"{PREFIX}TLS_{missing}_FILE: expected a file too, since {PREFIX}TLS_{given}_FILE is given")
    if faults:
        raise ConfigurationError("settings refused", tuple(faults))
    if settings.host and not is_loopback(settings.host) and not settings.client_tokens and not settings.insecure:
        raise ConfigurationError(
            f"refusing to listen on {settings.host} without client tokens: set {PREFIX}CLIENT_TOKENS, "
            "or say --insecure if whoever can reach this address may use your accounts"
        )
    has_token = bool(settings.admin_token or settings.admin_tokens)
    if settings.admin_port and not is_loopback(settings.admin_host) and not has_token:
        raise ConfigurationError(
            f"refusing to serve the admin API on {settings.admin_host} without a token: set {PREFIX}ADMIN_TOKEN "
            f"or {PREFIX}ADMIN_TOKEN_FILE, or leave --admin-host at 127.0.0.1"
        )


def _has_opentelemetry() -> bool:
    try:
        return all(map(importlib.util.find_spec, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")))
    except ModuleNotFoundError:
        return False


def is_loopback(host: str) -> bool:
    """True for localhost, 127.0.0.0/8 and ::1."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
