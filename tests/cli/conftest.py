"""The commands on configurations, as a person runs them, against a real server."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
import yaml

from balancer.__main__ import main
from tests import servers

SEALING_KEY = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command."""

    status: int
    out: str
    err: str


Run = Callable[..., Ran]
Write = Callable[..., str]


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of a real server."""
    with servers.running("valkey-9") as url:
        yield url


@pytest.fixture
def store_url(server: str) -> str:
    """The same, emptied."""
    with redis.Redis.from_url(server) as client:
        client.flushall()
    return server


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment without settings of ours, whose default data directory is nobody's."""
    for name in list(os.environ):
        if name.startswith("BALANCER_"):
            monkeypatch.delenv(name)
    folder = tempfile.mkdtemp(prefix="b-")
    monkeypatch.setenv("XDG_DATA_HOME", folder)
    monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
    yield
    shutil.rmtree(folder)


@pytest.fixture
def run(bare: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def ran(*arguments: str) -> Ran:
        capsys.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as exc:
            status = int(str(exc.code))
        out, err = capsys.readouterr()
        return Ran(status=status, out=out, err=err)

    return ran


@pytest.fixture
def on_store(run: Run, store_url: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command with the real server and a sealing key."""
    monkeypatch.setenv("BALANCER_REDIS", store_url)
    monkeypatch.setenv("BALANCER_SECRET_KEY", SEALING_KEY)
    return run


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a document, or text as it is, into a file; its path."""

    def written(content: Any, name: str = "balancer.yaml") -> str:
        path = tmp_path / name
        is_json = name.endswith(".json")
        text = msgspec.json.encode(content).decode() if is_json else yaml.safe_dump(content, sort_keys=False)
        path.write_text(content if isinstance(content, str) else text, encoding="utf-8")
        return str(path)

    return written


def a_document(*, token: str = "${UP_KEY}", threshold: int = 10, **rule: Any) -> dict[str, Any]:
    """One rule over two services of one provider."""
    return {
        "providers": [{"name": "up", "api_base": "https://up.invalid", "api_style": "openai", "token": token}],
        "rules": [
            {
                "uuid": "gpt",
                "request_model": "gpt",
                "lb_tactic": {"type": "round_robin", "params": {"request_threshold": threshold}},
                "services": [{"provider": "up", "model": "m1"}, {"provider": "up", "model": "m2"}],
            }
            | rule
        ],
    }
