"""The parent of the embedded server, run as a script of its own: it starts the server and stops it with the last user.

Each user (a supervisor, a worker) holds one connection to the guardian's unix socket. The kernel closes it however the
user ends, so the guardian always knows who is left. The lock on the data directory is inherited by the guardian and by
the server: it is free only when both are gone, and nobody can start a second server on files that are still written.

Only the standard library is imported, and not `balancer`: this process lives as long as the store and should be small.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType

GUARDIAN_SOCKET = "guardian.sock"
STORE_SOCKET = "store.sock"

GRACE_S = 1.0  # a restarting user finds its server still there
STOP_TIMEOUT_S = 10.0
PING_TIMEOUT_S = 0.5
STARTING_POLL_S = 0.01
IDLE_POLL_S = 1.0  # how soon the loss of the sockets' directory is noticed; everything else wakes the loop at once
SETTLED_AFTER_S = 60.0  # a server that lived this long does not count as failing to start
MAX_RESTARTS = 5

PR_SET_PDEATHSIG = 1


class Guardian:
    """One server, its users, and the time at which it must end."""

    def __init__(self, listener: socket.socket, lock_fd: int, runtime_dir: str, command: list[str]) -> None:
        self._listener = listener
        self._lock_fd = lock_fd
        self._command = command
        self._own_path = os.path.join(runtime_dir, GUARDIAN_SOCKET)
        self._store_path = os.path.join(runtime_dir, STORE_SOCKET)
        self._runtime_dir = runtime_dir
        self._users: set[socket.socket] = set()
        self._waiting: set[socket.socket] = set()  # users that have not been greeted
        self._server: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._greeting = ""  # what a user is told, once, when the server answers; empty while it does not
        self._was_ready = False
        self._restarts = 0
        self._started_at = 0.0
        self._start_at = 0.0
        self._grace_s = GRACE_S
        self._leave_at: float | None = time.monotonic()
        self._failure = ""
        self._selector = selectors.DefaultSelector()
        self._wake, wake_writer = socket.socketpair()
        self._wake.setblocking(False)
        wake_writer.setblocking(False)
        self._wake_writer = wake_writer
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)

    def run(self) -> None:
        """Serves until the last user has left, or the server cannot be kept alive; then nothing of it remains."""
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _do_nothing)
        for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signal_number, self._told_to_stop)
        try:
            self._read(self._listener)  # Whoever started us is in its queue already, and keeps us alive from now on.
            while not self._is_over():
                self._tend_server()
                for key, _ in self._selector.select(self._patience_s()):
                    self._read(key.fileobj)
        finally:
            self._stop()

    def _told_to_stop(self, _signal_number: int, _frame: FrameType | None) -> None:
        # A service manager signals every process of a unit at once, while the workers still drain and settle: they go
        # first, we follow without delay.
        self._grace_s = 0.0
        if self._leave_at is not None:
            self._leave_at = time.monotonic()

    def _is_over(self) -> bool:
        if self._failure:
            return True
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
            return True
        if not os.path.exists(self._own_path):
            # A logout removes $XDG_RUNTIME_DIR. Nobody could find us any more; the users left start again elsewhere.
            self._failure = f"the directory {self._runtime_dir} was removed"
            return True
        return False

    def _patience_s(self) -> float:
        patience_s = IDLE_POLL_S if self._greeting else STARTING_POLL_S
        if self._leave_at is None:
            return patience_s
        return max(0.0, min(patience_s, self._leave_at - time.monotonic()))

    def _read(self, source: object) -> None:
        if source is self._wake:
            self._wake.recv(4096)
        elif source is self._listener:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                user, _ = self._listener.accept()
                user.setblocking(False)
                self._users.add(user)
                self._waiting.add(user)
                self._selector.register(user, selectors.EVENT_READ)
                self._leave_at = None
                self._greet()
        elif isinstance(source, socket.socket):
            try:
                has_left = not source.recv(4096)
            except BlockingIOError:
                return
            except ConnectionError:
                has_left = True
            if has_left:
                self._selector.unregister(source)
                self._users.discard(source)
                self._waiting.discard(source)
                source.close()
                if not self._users:
                    self._leave_at = time.monotonic() + self._grace_s

    def _greet(self) -> None:
        while self._greeting and self._waiting:
            _send(self._waiting.pop(), self._greeting)

    def _tend_server(self) -> None:
        if self._server is None:
            if time.monotonic() >= self._start_at:
                self._start()
        elif (status := self._server.poll()) is not None:
            self._server_ended(status)
        elif not self._greeting and answers(self._store_path):
            self._was_ready = True
            self._greeting = f"ready {os.getpid()} {self._server.pid} {self._store_path}\n"
            self._greet()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        on_linux = sys.platform == "linux"
        try:
            self._server = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                pass_fds=(self._lock_fd,),
                preexec_fn=ends_with_parent(os.getpid()) if on_linux else None,  # noqa: PLW1509  no threads here
            )
        except OSError as exc:
            self._failure = f"cannot run {self._command[0]}: {exc.strerror}"
            return
        if not on_linux:
            self._watchdog = start_watchdog(self._server.pid)

    def _server_ended(self, status: int) -> None:
        now = time.monotonic()
        self._server = None
        self._dismiss_watchdog()
        self._greeting = ""
        self._restarts = 0 if now - self._started_at >= SETTLED_AFTER_S else self._restarts + 1
        if not self._was_ready or self._restarts > MAX_RESTARTS:
            self._failure = f"the server ended with status {status}"
            return
        self._start_at = now + (0.1 * 2**self._restarts if self._restarts > 1 else 0.0)
        _note(f"the server ended with status {status}, starting it again")

    def _dismiss_watchdog(self) -> None:
        if self._watchdog is not None:
            # Before its pipe closes: the server's pid may be somebody else's by now.
            self._watchdog.kill()
            self._watchdog.wait()
            self._watchdog = None

    def _stop(self) -> None:
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._own_path)
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._dismiss_watchdog()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._store_path)
        with contextlib.suppress(OSError):  # Somebody keeps a file of theirs in it.
            os.rmdir(self._runtime_dir)
        if self._failure:
            _note(self._failure)
        for user in self._users:
            _send(user, f"failed {self._failure or 'the guardian broke'}\n")
            user.close()


def ends_with_parent(parent_pid: int) -> Callable[[], None]:
    """What a child calls before exec on Linux, so that the kernel sends it SIGTERM when its parent dies."""
    libc = ctypes.CDLL(None)

    def before_exec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent_pid:  # It died before the call.
            os._exit(1)

    return before_exec


def start_watchdog(pid: int) -> subprocess.Popen[bytes]:
    """A process that sends SIGTERM to `pid` once we are dead: where the kernel does not offer it (macOS)."""
    return subprocess.Popen(["/bin/sh", "-c", 'read _; kill "$1"', "sh", str(pid)], stdin=subprocess.PIPE)


def _do_nothing(_signal_number: int, _frame: FrameType | None) -> None:
    """A handler, because the wake-up descriptor is only written for signals that have one."""


def answers(path: str) -> bool:
    """True when the server on `path` answers PING: it is up and has loaded its data."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(PING_TIMEOUT_S)
        try:
            connection.connect(path)
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        except OSError:  # Not there yet, or busy loading.
            return False


def _note(text: str) -> None:
    sys.stderr.write(f"guardian: {text}\n")  # is the store's log


def _send(user: socket.socket, line: str) -> None:
    with contextlib.suppress(OSError):  # It has left; its end of the connection says so next.
        user.sendall(os.fsencode(line))


def main(lock_fd: int, listener_fd: int, runtime_dir: str, command: list[str]) -> None:
    """Leaves a guardian behind, no child of the caller, and returns; the guardian ends with the last user."""
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    Guardian(socket.socket(fileno=listener_fd), lock_fd, runtime_dir, command).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
