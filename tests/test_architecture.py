"""The shape of the program, held by a machine: imports point down, libraries have owners, nothing names a machine."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up; a module may import its own layer and those below. A name is a module or a package of `balancer`.
LAYERS: tuple[tuple[str, frozenset[str]], ...] = (
    ("vocabulary", frozenset({"__init__", "config", "domain", "errors", "roles"})),
    (
        "pure",
        frozenset(
            {
                "audit",
                "bodies",
                "breaker",
                "checkpoint",
                "details",
                "dialects",
                "document",
                "encoding",
                "explanation",
                "facts",
                "failures",
                "importing",
                "ledger",
                "lenient",
                "limits",
                "oauth",
                "reference",
                "routing",
                "sessions",
                "sse",
                "steps",
                "stored",
                "tactics",
                "translation",
                "usage",
            }
        ),
    ),
    (
        "instruments",
        frozenset(
            {
                "access",
                "cells",
                "exposition",
                "gauges",
                "log",
                "metrics",
                "polling",
                "semconv",
                "tally",
                "tracing",
            }
        ),
    ),
    ("store", frozenset({"store"})),
    ("services", frozenset({"admin", "gateway"})),
    ("composition", frozenset({"__main__", "cli"})),
)
RANKS = {name: rank for rank, (_, names) in enumerate(LAYERS) for name in names}

# Who may import a library. Everything else goes through the owner's own interface, so that the owner can be replaced.
OWNERS: dict[str, tuple[str, ...]] = {
    "redis": ("store/*",),
    "hiredis": ("store/*",),
    "aiohttp": (
        "admin/app.py",  # the HTTP front of the admin server
        "gateway/app.py",  # composes the front
        "gateway/front*.py",  # the HTTP front: requests in, bytes out
        "gateway/upstream/socks.py",  # the client that talks to providers behind SOCKS proxies
        "cli/*",  # the demo's fake accounts, clients of the admin API
    ),
    "opentelemetry": ("tracing.py",),
    "aiohttp_socks": ("gateway/upstream/socks.py",),
}

# Pure modules get the clock, the draw and the bytes as arguments.
IMPURE = frozenset(
    {
        "aiohttp",
        "asyncio",
        "http.client",
        "http.server",
        "multiprocessing",
        "os",
        "pathlib",
        "random",
        "redis",
        "secrets",
        "socket",
        "ssl",
        "subprocess",
        "threading",
        "time",
        "urllib.request",
    }
)

# In parts, so that this file does not name what it looks for.
REGISTRY_HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("deb", "debian", "org"),
    )
)
# Somebody's home or checkout, on its own: not the middle of a longer path, nor of a URL.
MACHINE_PATH = re.compile(r"(?<![\w.~$%{}*/-])/(?:home|root|Users|work)/\w[\w./-]*")


def sources(package: Path) -> list[Path]:
    """Every Python file of the package, in a fixed order."""
    return sorted(package.rglob("*.py"))


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, wherever in the file; relative names made absolute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = (package.name, *path.relative_to(package).parts[:-1])
                base = ".".join((*parents[: len(parents) - node.level + 1], *filter(None, [node.module])))
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def layer_of(dotted: str, package: Path) -> str | None:
    """The name in LAYERS that a dotted import falls under, or None for what is not ours."""
    first, *rest = dotted.split(".")
    if first != package.name:
        return None
    if rest and ((package / rest[0]).is_dir() or (package / f"{rest[0]}.py").is_file()):
        return rest[0]
    return "__init__"


def is_within(dotted: str, module: str) -> bool:
    """True if the import is of the module or of something in it."""
    return dotted == module or dotted.startswith(f"{module}.")


def faults(package: Path) -> list[str]:
    """One line for each import that the architecture forbids, and each module that has no layer."""
    found = []
    for path in sources(package):
        relative = path.relative_to(package)
        place = relative.parts[0].removesuffix(".py")
        if place not in RANKS:
            found.append(f"{relative}: has no layer; give {place!r} its place in LAYERS")
            continue
        layer = LAYERS[RANKS[place]][0]
        for line, dotted in imports(path, package):
            target = layer_of(dotted, package)
            if target is not None and RANKS.get(target, -1) > RANKS[place]:
                found.append(f"{relative}:{line}: {layer} imports {dotted} from above")
            for library, owners in OWNERS.items():
                if is_within(dotted, library) and not any(fnmatch(relative.as_posix(), owner) for owner in owners):
                    found.append(f"{relative}:{line}: only {', '.join(owners)} may import {library}")
            if layer == "pure" and any(is_within(dotted, module) for module in IMPURE):
                found.append(f"{relative}:{line}: a pure module imports {dotted}")
    return found


def test_imports_point_down_and_libraries_are_used_by_their_owners_only() -> None:
    assert faults(ROOT / "balancer") == []


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("tactics/cost.py", "from balancer.store import registry", "pure imports balancer.store.registry from above"),
        ("tactics/cost.py", "def f():\n    import random", "a pure module imports random"),
        ("tactics/cost.py", "from .. import store", "pure imports balancer.store from above"),
        ("store/keys.py", "from ..gateway.app import create_app", "store imports balancer.gateway.app"),
        ("store/keys.py", "from balancer import gateway", "store imports balancer.gateway from above"),
        ("gateway/app.py", "from balancer.cli import serve", "services imports balancer.cli.serve from above"),
        ("gateway/app.py", "import redis.asyncio as redis", "only store/* may import redis"),
        ("gateway/relay.py", "from aiohttp import web", "may import aiohttp"),
        ("gateway/upstream/socks.py", "import aiohttp, aiohttp_socks", None),
        ("gateway/app.py", "from balancer.store import registry\nfrom balancer import __version__", None),
        ("store/sub/deep.py", "from redis.asyncio import Redis\nfrom ...domain import Rule", None),
        ("stray.py", "", "has no layer"),
    ],
)
def test_a_forbidden_import_is_found_in_any_spelling(tmp_path: Path, name: str, source: str, fault: str | None) -> None:
    package = tmp_path / "balancer"
    for folder in ("cli", "gateway/upstream", "store/sub", "tactics"):
        (package / folder).mkdir(parents=True)
    (package / "domain.py").touch()
    (package / name).write_text(source, encoding="utf-8")

    found = faults(package)

    if fault is None:
        assert found == []
    else:
        assert len(found) == 1
        assert fault in found[0]


def strays(text: str) -> list[str]:
    """Registry hosts and paths of somebody's machine in a text."""
    return [host for host in REGISTRY_HOSTS if host in text] + MACHINE_PATH.findall(text)


def project_files() -> list[Path]:
    """The files that are, or are about to be, under version control."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        # An unpacked archive does not say which files are ours. The gate has a checkout, and fails on any skip.
        pytest.skip("needs a git checkout")
    listing = subprocess.run(
        [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_package_registry_or_a_path_of_some_machine() -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {stray}" for stray in strays(text)]

    assert found == []


def test_a_registry_or_a_machine_path_is_seen_and_a_url_or_a_home_is_not() -> None:
    home, host = Path("/").joinpath("home", "ann", "x").as_posix(), REGISTRY_HOSTS[0]

    assert strays(f"see https://{host}/simple and '{home}'") == [host, home]
    relative = " ".join(map("/".join, (("~", "work", "x"), ("${HOME}", "work", "y"), (".", "root", "z"))))
    assert strays(f"cd {relative}; GET https://example.com/home/ann") == []


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-build.txt", "requirements-dev.txt", "requirements-otel.txt"]
)
def test_a_lock_pins_every_package_with_hashes_and_names_no_address(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    entries = [line for line in text.splitlines() if line and not line.startswith("#")]

    assert entries
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9-]+==[^\s;]+( ; [^:/]+?)? +( *--hash=sha256:[0-9a-f]{64} *)+", entry), entry[:80]
