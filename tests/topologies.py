"""Real Redis topologies for tests on loopback: TLS with a limited user, a set under sentinels, a Cluster.

They are made by hand, since no wheel has redis-cli. Everything started here is ended here, also after a failed test.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests import servers

SERVICE = "balancer"
HOST = "127.0.0.1"
ADMIN_PASSWORD = "admin-of-the-test"
PASSWORD = "a-long/password@example"
ROOT = Path(__file__).resolve().parent.parent
_PATIENCE_S = 30.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment, all different."""
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server((HOST, 0))).getsockname()[1] for _ in range(count)]


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = _PATIENCE_S) -> None:
    """Returns as soon as the condition holds; an error of Redis counts as no. Fails after the time."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(redis.RedisError):
            if holds():
                return
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


class Process:
    """A process that may be killed, stopped and resumed, by its pid."""

    def __init__(self, process: subprocess.Popen[bytes] | None = None) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """False once it was killed."""
        return self._process is not None

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """SIGSTOP: it holds its connections and answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """The end, however it stands; a stopped process is killed too."""
        self.kill()


class Server(Process):
    """One server on a port of loopback; once killed it may be started again."""

    def __init__(self, kind: str, folder: Path, *arguments: str, with_bus: bool = False) -> None:
        self.program = servers.binary(kind) or ""
        assert self.program, f"{kind} is not installed"
        self.folder = folder
        self.arguments = arguments
        self.port = 0
        self._with_bus = with_bus
        super().__init__()
        folder.mkdir()
        for _ in range(5):
            ports = free_ports(2)
            self.port = ports[0]
            self._bus = ports[1]
            if self.start():
                return
        raise AssertionError(f"{kind} does not start: {self.log()[-500:]}")

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "log").read_text(errors="replace")

    def start(self, *more: str) -> bool:
        """Starts it on its port; False when that is taken."""
        command = [self.program, *self.arguments, *more, "--port", str(self.port), "--bind", HOST]
        if self._with_bus:
            command += ["--cluster-port", str(self._bus)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + _PATIENCE_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(redis.RedisError), self.client() as client:
                client.ping()
                return True
            time.sleep(0.01)
        self.kill()
        return False

    @functools.cached_property
    def control(self) -> Any:
        """A client that stays, for questions."""
        return self.client()

    def client(self) -> Any:
        """A client of its own, to be closed."""
        return redis.Redis(host=HOST, port=self.port, socket_timeout=5, socket_connect_timeout=5)

    def end(self) -> None:
        """The end, also of the client."""
        super().end()
        if "control" in self.__dict__:
            self.control.close()


class Group:
    """Servers that belong together, in a folder that goes with them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="b-"))
        self.servers: list[Process] = []
        self.lag_bytes = 0
        """So far a replica may be behind and count as in sync all the same: more than 0 under load."""
        self.patience_s = _PATIENCE_S

    def add(self, kind: str, *arguments: str, with_bus: bool = False) -> Server:
        """A new server of the group."""
        folder = self.folder / f"n{len(self.servers)}"
        server = Server(kind, folder, *arguments, with_bus=with_bus)
        self.servers.append(server)
        return server

    def end(self) -> None:
        """Ends all of it."""
        for server in self.servers:
            server.end()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


_DATA = (
    *("--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"),
    # Under load a replica that was away needs what was written meanwhile, and not all there is, over and over.
    *("--repl-backlog-size", "256mb", "--client-output-buffer-limit", "replica", "0", "0", "0"),
)


class SentinelSet(Group):
    """A master, two replicas and three sentinels that act after a second."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        try:
            first = self.add(kind, *_DATA)
            self.data = [first, *(self.add(kind, *_DATA, "--replicaof", HOST, str(first.port)) for _ in range(2))]
            self.sentinels = [self._sentinel(kind, first) for _ in range(3)]
            self.url = f"redis+sentinel://{','.join(s.address for s in self.sentinels)}/{SERVICE}"
            self.restore()
        except BaseException:
            self.end()
            raise

    def _sentinel(self, kind: str, master: Server) -> Server:
        file = self.folder / f"sentinel{len(self.servers)}.conf"
        file.write_text(
            f"sentinel monitor {SERVICE} {HOST} {master.port} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} 1000\n"
            f"sentinel failover-timeout {SERVICE} 4000\n"
        )
        sentinel = self.add(kind, str(file), "--sentinel")
        # They look every half second, not every ten, and make a master that comes back a replica in two, not eight.
        _raw(sentinel, "SENTINEL", "DEBUG", "INFO-PERIOD", "500", "PUBLISH-PERIOD", "500")
        return sentinel

    def master_of(self, _key: str) -> Server:
        """The server that all sentinels call the master; whoever asks waits until they agree."""
        found: list[Server] = []

        def agreed() -> bool:
            ports = {int(_raw(s, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1]) for s in self.sentinels}
            found[:] = [server for server in self.data if server.port in ports]
            return len(found) == 1

        wait_until(agreed, "the sentinels agree")
        return found[0]

    def replicas_of(self, master: Server) -> list[Server]:
        """The replicas of that master."""
        return [server for server in self.data if server is not master]

    def masters(self) -> list[Server]:
        """The one master."""
        return [self.master_of("")]

    def restore(self) -> None:
        """Starts what was killed, and returns once a failover could happen."""
        for server in self.data:
            if not server.is_running:
                # Without this it would come up as an empty master, until a sentinel notices some ten seconds later.
                assert server.start("--replicaof", HOST, str(self.master_of("").port))
            server.resume()

        def ready() -> bool:
            master = self.master_of("")
            if not _is_in_sync(master, self.replicas_of(master), self.lag_bytes):
                return False
            for sentinel in self.sentinels:
                flat = _raw(sentinel, "SENTINEL", "MASTER", SERVICE)
                state = _pairs(flat)
                if (state["num-slaves"], state["num-other-sentinels"], state["flags"]) != ("2", "2", "master"):
                    return False
                for replica in _raw(sentinel, "SENTINEL", "REPLICAS", SERVICE):
                    seen = _pairs(replica)
                    if seen["flags"] != "slave" or seen["master-port"] != str(master.port):
                        return False
            return True

        wait_until(ready, "the sentinels see a master and two replicas in sync", self.patience_s)

    def wait_in_sync(self) -> None:
        """Returns once both replicas have all that the master has."""
        master = self.master_of("")
        wait_until(lambda: _is_in_sync(master, self.replicas_of(master), self.lag_bytes), "the replicas catch up")


class Cluster(Group):
    """Three masters with a third of the slots each, a replica each; a node is given up after 1.5 s."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        own = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-node-timeout", "1500")
        try:
            self.data = [self.add(kind, *_DATA, *own, with_bus=True) for _ in range(6)]
            self._join()
            self.url = f"redis+cluster://{','.join(s.address for s in self.data[:3])}"
            self.restore()
        except BaseException:
            self.end()
            raise

    def _join(self) -> None:
        first = self.data[0]
        bounds = (0, 5461, 10923, 16384)
        for number, server in enumerate(self.data):
            server.control.execute_command("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
            if number < 3:
                last = bounds[number + 1] - 1
                server.control.execute_command("CLUSTER", "ADDSLOTSRANGE", str(bounds[number]), str(last))
            if number:
                server.control.execute_command("CLUSTER", "MEET", HOST, str(first.port), str(first._bus))
        for server in self.data:
            wait_until(lambda server=server: _info(server)["cluster_known_nodes"] == "6", "all nodes know each other")  # type: ignore[misc]
        for master, replica in zip(self.data[:3], self.data[3:], strict=True):
            replica.control.execute_command("CLUSTER", "REPLICATE", self.id_of(master))

    def id_of(self, server: Server) -> str:
        """The node's name in the Cluster."""
        return str(server.control.execute_command("CLUSTER", "MYID").decode())

    def slot_of(self, key: str) -> int:
        """The slot of a key."""
        return int(self.data[0].control.execute_command("CLUSTER", "KEYSLOT", key))

    def master_of(self, key: str) -> Server:
        """The server whose slot the key is in."""
        slot = self.slot_of(key)
        found: list[Server] = []

        def known() -> bool:
            asked = next(server for server in self.data if server.is_running)
            for first, last, (_, port, *_), *_ in _slots(asked):
                if first <= slot <= last:
                    found[:] = [server for server in self.data if server.port == port]
            return bool(found)

        wait_until(known, "the slot has a master")
        return found[0]

    def replicas_of(self, master: Server) -> list[Server]:
        """The replicas of that master."""
        ports = {port for _, _, (_, own, *_), *rest in _slots(master) for _, port, *_ in rest if own == master.port}
        return [server for server in self.data if server.port in ports]

    def wait_in_sync(self) -> None:
        """Returns once every replica has all that its master has."""
        wait_until(self._are_in_sync, "the replicas catch up")

    def _are_in_sync(self) -> bool:
        replicas = [(master, self.replicas_of(master)) for master in self.masters()]
        return all(found and _is_in_sync(master, found, self.lag_bytes) for master, found in replicas)

    def move(self, key: str, source: Server, target: Server) -> None:
        """Moves the slot of a key, with its keys, as redis-cli would; the other nodes learn it by gossip."""
        slot = self.slot_of(key)
        target.control.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.control.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))
        while found := source.control.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            source.control.execute_command("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *found)
        for server in (target, source):
            server.control.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.id_of(target))

    def masters(self) -> list[Server]:
        """All servers that have slots."""
        ports = {entry[2][1] for entry in _slots(next(server for server in self.data if server.is_running))}
        return [server for server in self.data if server.port in ports]

    def restore(self) -> None:
        """Starts what was killed, and returns once a failover could happen."""
        for server in self.data:
            if not server.is_running:
                assert server.start()
            server.resume()

        def ready() -> bool:
            if any(_info(server)["cluster_state"] != "ok" for server in self.data):
                return False
            maps = [{(first, last, master[1]) for first, last, master, *_ in _slots(server)} for server in self.data]
            return all(m == maps[0] for m in maps) and self._are_in_sync()

        wait_until(ready, "three masters, each with a replica in sync", self.patience_s)


def _slots(server: Server) -> Any:
    return _raw(server, "CLUSTER", "SLOTS")


def _raw(server: Server, *command: str) -> Any:
    """A reply without redis-py's reading of it."""
    connection = server.control.connection_pool.get_connection()
    try:
        connection.send_command(*command)
        return connection.read_response()
    finally:
        server.control.connection_pool.release(connection)


def _info(server: Server) -> dict[str, str]:
    text = _raw(server, "CLUSTER", "INFO").decode()
    return dict(line.split(":", 1) for line in text.split("\r\n") if ":" in line)


def _pairs(flat: Any) -> dict[str, str]:
    pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
    return {name.decode(): value.decode() for name, value in pairs}


def _is_in_sync(master: Server, replicas: list[Server], lag_bytes: int = 0) -> bool:
    """True when the replicas have what the master had at the start of the question, but for so many bytes."""
    info: dict[str, Any] = master.control.info("replication")
    if info["role"] != "master" or info["connected_slaves"] < len(replicas):
        return False
    theirs = [replica.control.info("replication") for replica in replicas]
    return all(
        state["role"] == "slave"
        and state["master_link_status"] == "up"
        and state["slave_repl_offset"] >= info["master_repl_offset"] - lag_bytes
        for state in theirs
    )


# -- TLS and a limited user --------------------------------------------------------------------------------------------


def documented_acl(name: str = "balancer") -> list[str]:
    """The words of an ACL line as docs/redis.md has it, with our password."""
    (line,) = (
        line
        for line in (ROOT / "docs" / "redis.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"ACL SETUSER {name} ")
    )
    return line.replace(">PASSWORD", f">{PASSWORD}").split()


def _certificate_options(folder: Path) -> list[str]:
    files = (("cert", "server.pem"), ("key", "server.key"), ("ca-cert", "ca.pem"))
    return [word for option, name in files for word in (f"--tls-{option}-file", str(folder / name))]


class LimitedTls(Group):
    """A server that speaks TLS only, to a user who may do what docs/redis.md says and no more."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        try:
            make_certificates(self.folder)
            self.socket = self.folder / "s.sock"
            (self.port,) = free_ports(1)
            self.server = self.add(
                kind,
                *_DATA,
                *_certificate_options(self.folder),
                "--tls-port",
                str(self.port),
                "--tls-auth-clients",
                "no",
                "--unixsocket",
                str(self.socket),
            )
            self.admin_url = f"unix://{self.socket}?password={ADMIN_PASSWORD}"
            self.server.control.config_set("requirepass", ADMIN_PASSWORD)
            self.server.control.execute_command("AUTH", ADMIN_PASSWORD)
            with redis.Redis.from_url(self.admin_url) as admin:
                admin.execute_command(*documented_acl())
            secret = quote(PASSWORD, safe="")
            self.url = f"rediss://balancer:{secret}@{HOST}:{self.port}?ssl_ca_certs={self.folder / 'ca.pem'}"
        except BaseException:
            self.end()
            raise


class TlsEverywhere(Group):
    """A Cluster of one node, and a sentinel with a server, that speak TLS and nothing else; each wants a password."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        try:
            make_certificates(self.folder)
            tls = ["--tls-auth-clients", "no", "--tls-replication", "yes", "--tls-cluster", "yes"]
            tls += ["--requirepass", PASSWORD, *_certificate_options(self.folder)]
            ports = free_ports(4)
            self._start(kind, 0, *_DATA, *tls, "--tls-port", str(ports[0]))
            own = ("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-port", str(ports[3]))
            self._start(kind, 1, *_DATA, *tls, *own, "--tls-port", str(ports[1]))
            with self._client(1) as client:
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
                wait_until(
                    lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"), "all slots are served"
                )
            file = self.folder / "sentinel.conf"
            file.write_text(
                f"sentinel monitor {SERVICE} {HOST} {ports[0]} 1\nsentinel auth-pass {SERVICE} {PASSWORD}\n"
            )
            self._start(kind, 2, str(file), "--sentinel", *tls, "--tls-port", str(ports[2]))
            with self._client(2) as client:
                client.execute_command(*documented_acl("balancer-sentinel"))
            secret = quote(PASSWORD, safe="")
            rest = f"ssl_ca_certs={self.folder / 'ca.pem'}"
            self.cluster_url = f"rediss+cluster://:{secret}@{HOST}:{ports[1]}?{rest}"
            self.sentinel_url = (
                f"rediss+sentinel://:{secret}@{HOST}:{ports[2]}/{SERVICE}/3"
                f"?sentinel_username=balancer-sentinel&sentinel_password={secret}&{rest}"
            )
        except BaseException:
            self.end()
            raise

    def _client(self, number: int) -> Any:
        return redis.Redis(unix_socket_path=str(self.folder / f"{number}.sock"), password=PASSWORD)

    def _start(self, kind: str, number: int, *arguments: str) -> None:
        """A server without a plain port; asked over a socket whether it is there."""
        socket_option = ("--port", "0", "--unixsocket", str(self.folder / f"{number}.sock"))
        command = [servers.binary(kind) or "", *arguments, *socket_option]
        process = subprocess.Popen(command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.servers.append(Process(process))
        with self._client(number) as client:
            wait_until(lambda: bool(client.ping()), "the server answers")


def make_certificates(folder: Path) -> None:
    """ca.pem, and server.pem with server.key for loopback, signed by it."""
    now = datetime.datetime.now(datetime.UTC)
    lifetime = (now - datetime.timedelta(hours=1), now + datetime.timedelta(days=1))

    def builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (subject, issuer)]
        return (
            x509.CertificateBuilder()
            .subject_name(names[0])
            .issuer_name(names[1])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(lifetime[0])
            .not_valid_after(lifetime[1])
        )

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = builder("tests", "tests", ca_key).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))])
    server = builder("server", "tests", key).add_extension(names, critical=False)
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    (folder / "server.pem").write_bytes(server.sign(ca_key, hashes.SHA256()).public_bytes(pem))
    private = (pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(key.private_bytes(*private))


@contextlib.contextmanager
def named(name: str) -> Iterator[Any]:
    """A running topology by its name in the matrix: `url`, and what it offers beyond."""
    match name:
        case "sentinel":
            group: Group = SentinelSet("valkey-9")
        case "cluster":
            group = Cluster("redis-8")
        case "tls-acl":
            group = LimitedTls("redis-7")
        case _:
            raise AssertionError(name)
    with group:
        yield group
