"""Builds the image of deploy/Dockerfile for real, runs it as a container would run, and says how large it is.

`make verify-deploy`, on Debian, as root, some two minutes. The two images that the Dockerfile starts from cannot be had
everywhere, so they are made here out of the packages they are made of: the first stage's is a Debian 13 by debootstrap,
with its Python 3.13 and pip; the last stage's has the packages of gcr.io/distroless/python3-debian13 (its list of
October 2026), unpacked as there, without a shell. The wheels of the locks are fetched before, in whatever way this
machine's pip is configured, and the build itself has no index.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml

from balancer.cli.accounts import FakeAccount
from deploy.container import Container, Image, command, running
from tests.topologies import Server, free_ports

ROOT = Path(__file__).resolve().parent.parent
LARGEST_BYTES = 150_000_000
SUITE = "trixie"
PYTHON = "3.13"
PROGRAMS = {"buildah": "buildah", "debootstrap": "debootstrap", "unshare": "util-linux", "ldconfig": "libc-bin"}
# What the runtime's image consists of.
PACKAGES = (
    "base-files ca-certificates libc6 libc-bin libssl3t64 netbase openssl tzdata tzdata-legacy media-types zlib1g "
    "libzstd1 gcc-14-base libgcc-s1 libgomp1 libstdc++6 libbz2-1.0 libcom-err2 libcrypt1 libdb5.3t64 libexpat1 libffi8 "
    "libgssapi-krb5-2 libk5crypto3 libkeyutils1 libkrb5-3 libkrb5support0 liblzma5 libncursesw6 libnsl2 "
    "libpython3.13-minimal libpython3.13-stdlib libreadline8t64 libsqlite3-0 libtinfo6 libtirpc3t64 libuuid1 "
    "python3.13-venv python3.13-minimal"
)
# Nothing of this may reach a build; where it lies, relative to the context.
DECOYS = (
    ".env",
    ".git/config",
    ".venv/bin/python",
    ".cache/kubernetes/helm",
    "balancer.yaml",
    "balancer/.env",
    "balancer/__pycache__/x.pyc",
    "balancer/server.key",
    "deploy/secrets.env",
    "lua/tls.pem",
    "node_modules/x.js",
    "tests/x.py",
)
KEY = "key-of-anna-0123"
_BEGAN = time.monotonic()
TEAM = "of-the-team"
WORDS = {"model": "chat", "max_tokens": 40, "messages": [{"role": "user", "content": "hello"}]}


def main() -> int:
    """Exit status 0 if everything holds, or if this machine cannot do it and is not the gate."""
    missing = [f"apt:{package}" for program, package in PROGRAMS.items() if not _program(program)]
    missing += ["root"] if os.geteuid() else []
    if missing:
        print(f"not run: building and running the image (needs {', '.join(missing)}); hadolint and tests/deploy do run")
        return 1 if os.environ.get("CI") else 0
    with tempfile.TemporaryDirectory(prefix="balancer-image-") as name, _buildah(Path(name)) as buildah:
        folder = Path(name)
        build_root, runtime_root = _roots(folder)
        mirror = _wheels(folder)
        for root, tag in ((build_root, "build"), (runtime_root, "runtime")):
            _from_root(buildah, root, tag)
            shutil.rmtree(root)
        _context_is_clean(buildah, folder)
        _build(buildah, folder, mirror)
        described = msgspec.json.decode(buildah("inspect", "--type", "image", "balancer"))
        image = msgspec.convert(described["Docker"]["config"], Image)
        container = buildah("from", "--pull-never", "balancer").strip()
        root = Path(buildah("mount", container).strip())
        _has_a_bearable_size(root, folder)
        exporter = "import opentelemetry.sdk.trace, opentelemetry.exporter.otlp.proto.http.trace_exporter"
        _run(*command(image, root, ("/usr/bin/python3", "-c", exporter), {}, folder))
        asyncio.run(_serves(image, root, folder))
    _say("all of it holds")
    return 0


def _say(text: str) -> None:
    print(f"{time.monotonic() - _BEGAN:4.0f} s  {text}", flush=True)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _run(*line: str | Path) -> str:
    """What the command wrote to stdout. A failed one ends us, and is shown."""
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, line))[:300]}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout


# -- what it is made of ------------------------------------------------------------------------------------------------


def _roots(folder: Path) -> tuple[Path, Path]:
    """Roots like those of the two images: one with a Python, pip and a shell, one with a Python alone."""
    build, runtime = folder / "build", folder / "runtime"
    mirror = [os.environ["DEBIAN_MIRROR"]] if os.environ.get("DEBIAN_MIRROR") else []
    _say(f"debootstrap: Debian {SUITE} with Python and pip …")
    include = "--include=python3,python3-pip,ca-certificates"
    _run(str(_program("debootstrap")), "--variant=minbase", include, SUITE, build, *mirror)
    _say("the packages of the runtime's image …")
    (build / "packages").mkdir()
    in_build: tuple[str | Path, ...] = ("chroot", build, "sh", "-c")
    _run(*in_build, f"apt-get update -qq && cd /packages && apt-get download -qq {PACKAGES}")
    runtime.mkdir()
    for package in sorted((build / "packages").iterdir()):
        _run("dpkg-deb", "--extract", package, runtime)
    # What the packages' scripts would do, and the image's makers do instead.
    shutil.copy(build / "etc/ssl/certs/ca-certificates.crt", runtime / "etc/ssl/certs/ca-certificates.crt")
    (runtime / "usr/bin/python3").symlink_to(f"python{PYTHON}")
    (runtime / "etc/passwd").write_text("root:x:0:0:root:/:/sbin/nologin\n", encoding="ascii")
    _run(str(_program("ldconfig")), "-r", runtime)
    assert not (runtime / "bin/sh").exists()
    for left_over in ("packages", "var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(build / left_over)
    return build, runtime


def _wheels(folder: Path) -> Path:
    """A folder with every wheel of the locks that the image's Python takes."""
    _say("the wheels of requirements-otel.txt and requirements-build.txt …")
    mirror, machine = folder / "mirror", platform.machine()
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(5, 42)] + [f"manylinux2014_{machine}"]
    line: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--dest",
        mirror,
        "--only-binary",
        ":all:",
    ]
    line += ["--python-version", PYTHON, "--implementation", "cp", "--require-hashes"]
    line += [word for each in platforms for word in ("--platform", each)]
    for lock in ("requirements-otel.txt", "requirements-build.txt"):
        _run(*line, "--requirement", ROOT / lock)
    return mirror


# -- the build ---------------------------------------------------------------------------------------------------------

Buildah = Callable[..., str]


@contextlib.contextmanager
def _buildah(folder: Path) -> Iterator[Buildah]:
    """Buildah on a storage of its own, which is gone at the end."""
    overlay: list[str | Path] = ["buildah", "--root", folder / "trial", "--runroot", folder / "run"]
    overlay += ["--storage-driver", "overlay"]
    tried = subprocess.run([*overlay, "from", "scratch"], capture_output=True, check=False)
    # Some kernels and file systems cannot lay one folder over another; copies are slow, and always work.
    driver = "vfs" if tried.returncode else "overlay"

    def call(*arguments: str | Path) -> str:
        storage: list[str | Path] = ["--root", folder / "storage", "--runroot", folder / "run"]
        return _run("buildah", *storage, "--storage-driver", driver, *arguments)

    try:
        yield call
    finally:
        call("umount", "--all")
        call("rm", "--all")
        call("rmi", "--all", "--force")


def _from_root(buildah: Buildah, root: Path, tag: str) -> None:
    """Makes a root an image."""
    container = buildah("from", "scratch").strip()
    buildah("add", "--quiet", container, root, "/")
    buildah("config", "--env", "LANG=C.UTF-8", container)
    buildah("commit", "--quiet", "--rm", container, f"localhost/{tag}")


def _context_is_clean(buildah: Buildah, folder: Path) -> None:
    """Fails if .dockerignore lets anything through that no image should have."""
    context = folder / "context"
    context.mkdir()
    for name in ("README.md", "balancer/__init__.py", "lua/tick.lua", "deploy/compile.py", *DECOYS):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text("x", encoding="ascii")
    everything = folder / "Everything"
    everything.write_text("FROM scratch\nCOPY . /\n", encoding="ascii")
    ignore = ROOT / ".dockerignore"
    buildah("bud", "--quiet", "--ignorefile", ignore, "--file", everything, "--tag", "context", context)
    container = buildah("from", "--pull-never", "context").strip()
    root = Path(buildah("mount", container).strip())
    sent = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert sent == ["README.md", "balancer/__init__.py", "deploy/compile.py", "lua/tick.lua"], sent
    buildah("umount", container)
    buildah("rm", container)
    _say(f".dockerignore: none of {len(DECOYS)} files that should stay out gets in")


def _build(buildah: Buildah, folder: Path, mirror: Path) -> None:
    """The Dockerfile as it stands, without network."""
    _say("the image, by deploy/Dockerfile …")
    pip = folder / "pip.conf"
    pip.write_text("[global]\nno-index = true\nfind-links = /mirror\n", encoding="ascii")
    line: list[str | Path] = ["bud", "--isolation", "chroot", "--format", "docker", "--pull-never"]
    line += ["--file", ROOT / "deploy" / "Dockerfile", "--ignorefile", ROOT / ".dockerignore"]
    line += ["--secret", f"id=pip.conf,src={pip}", "--volume", f"{mirror}:/mirror:ro"]
    line += ["--build-arg", "BUILD_IMAGE=localhost/build", "--build-arg", "RUNTIME_IMAGE=localhost/runtime"]
    buildah(*line, "--tag", "balancer", ROOT)


# -- what came of it ---------------------------------------------------------------------------------------------------


def _has_a_bearable_size(root: Path, folder: Path) -> None:
    """Fails if the image is too large, or has what it should not have."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    ours = sum(path.stat().st_size for path in files if path.is_relative_to(root / "opt"))
    _run("tar", "cz", "-C", root, "-f", folder / "image.tar.gz", ".")
    packed = (folder / "image.tar.gz").stat().st_size
    _say(f"the image: {size / 1e6:.0f} MB unpacked, {ours / 1e6:.0f} of them ours, {packed / 1e6:.0f} MB compressed")
    assert size < LARGEST_BYTES
    for stray in ("bin/sh", "opt/balancer/pip", "opt/tools", "build", "etc/pip.conf"):
        assert not (root / stray).exists(), f"{stray} has got into the image"
    assert not any(path.stat().st_mode & 0o6000 for path in files), "something in the image is setuid"


async def _serves(image: Image, root: Path, folder: Path) -> None:
    """Fails unless the image's own command serves, is healthy, drains and ends, as on a cluster."""
    port, metrics_port = free_ports(2)
    url, metrics = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics"
    store = Server("valkey-9", folder / "store", "--save", "")
    try:
        async with FakeAccount("anna", KEY, chunk_interval_s=0.2) as account:
            (root / "etc/balancer").mkdir()
            (root / "etc/balancer/balancer.yaml").write_text(yaml.safe_dump(_document(account)), encoding="utf-8")
            variables = {
                "ANNA": KEY,
                "BALANCER_ADMIN_PORT": "0",
                "BALANCER_CLIENT_TOKENS": TEAM,
                "BALANCER_CONFIG": "/etc/balancer/balancer.yaml",
                "BALANCER_METRICS_PORT": str(metrics_port),
                "BALANCER_OUTBOX_DIR": "/var/lib/balancer/outbox",
                "BALANCER_PORT": str(port),
                "BALANCER_REDIS": f"redis://{store.address}/0",
                "BALANCER_WORKERS": "2",
            }
            began = time.monotonic()
            with running(image, root, variables, folder) as container:
                async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TEAM}"}) as session:
                    await _is_ready(session, url, container)
                    _say(f"ready {time.monotonic() - began:.1f} s after its start, as process 1, on a read-only root")
                    assert container.ids() == (10001, 10001)
                    assert container.mounted_read_only()
                    _run(*command(image, root, image.healthcheck.test[1:], variables, folder))
                    async with session.get(f"{url}/healthz") as response:
                        assert response.status == 200
                    async with session.post(f"{url}/v1/chat/completions", json=WORDS) as response:
                        assert response.status == 200, await response.text()
                    async with session.get(metrics) as response:
                        assert "balancer_attempts_total{" in await response.text()
                    async with session.post(f"{url}/v1/chat/completions", json=WORDS | {"stream": True}) as response:
                        began_with = await response.content.readany()
                        container.signal(image.stop_signal)
                        ended_with = await response.content.read()
                assert began_with
                assert ended_with.endswith(b"data: [DONE]\n\n"), ended_with[-300:]
                assert container.zombies() == []
                assert await asyncio.to_thread(container.ended) == 0
            assert account.ledger.models["m"].requests == 2
            assert '"event":"stopped","pid":1}' in container.text()
            assert "Traceback" not in container.text()
            _say("its health check passes; it answered, and at SIGTERM let an open stream end, then ended with 0")
            with contextlib.suppress(SystemExit):
                _run(*command(image, root, image.healthcheck.test[1:], variables, folder))
                raise AssertionError("the health check passes where nobody serves")
    finally:
        store.kill()


def _document(account: FakeAccount) -> dict[str, Any]:
    return {
        "providers": [{"name": "anna", "api_base": account.url, "token": "${ANNA}"}],
        "rules": [{"request_model": "chat", "services": [{"provider": "anna", "model": "m"}]}],
    }


async def _is_ready(session: aiohttp.ClientSession, url: str, container: Container) -> None:
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            async with session.get(f"{url}/readyz") as response:
                if response.status == 200:
                    return
        assert time.monotonic() < deadline, f"never ready:\n{container.text()}"
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
