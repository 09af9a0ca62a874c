"""The wheel that users install: it carries what runs, and runs from wherever it lies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from balancer import __version__
from balancer.__main__ import main
from balancer.cli.accounts import FakeAccount
from balancer.store import scripts
from tests.fleet.conftest import Start, a_document

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("balancer", "lua", "tests", "pyproject.toml", "README.md", "LICENSE")
COMMANDS = (
    "serve",
    "healthcheck",
    "demo",
    "check",
    "apply",
    "diff",
    "get",
    "audit",
    "changes",
    "explain",
    "import",
    "models",
    "secrets",
    "rollback",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A wheel built from a copy of the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    built = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(out), str(tree)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    yield found
    shutil.rmtree(tree)


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where the wheel's files lie, as an installation has them."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_carries_the_package_and_every_script_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}

    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "balancer").rglob("*.py")}
    lua = {f"balancer/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "lua").rglob("*") if path.is_file()}
    assert "balancer/lua/include/tactic/hybrid.lua" in lua
    assert {name for name in names if name.endswith(".lua")} == {name for name in lua if name.endswith(".lua")}
    assert names <= package | lua
    assert package <= names


def test_the_wheel_says_who_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"llm_balancer-{__version__}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()

    assert "balancer = balancer.__main__:main" in entry_points
    assert f"Name: llm-balancer\nVersion: {__version__}\n" in metadata


def from_(folder: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with the unpacked wheel before all else, somewhere else."""
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]},
    )


def test_the_unpacked_wheel_checks_a_file_and_finds_its_own_scripts(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "balancer.yaml").write_text("rules: []\n", encoding="utf-8")
    (tmp_path / "faulty.yaml").write_text("rules: {}\n", encoding="utf-8")
    code = "from balancer.store.scripts import folder, load; print(folder()); print(load('tick').sha)"

    check = from_(unpacked, "-m", "balancer", "check", "balancer.yaml", cwd=tmp_path)
    faulty = from_(unpacked, "-m", "balancer", "check", "faulty.yaml", cwd=tmp_path)
    found = from_(unpacked, "-c", code, cwd=tmp_path)

    assert (check.returncode, check.stdout, check.stderr) == (0, "ok: 0 providers, 0 rules\n", "")
    assert (faulty.returncode, faulty.stdout) == (1, "")
    assert found.stdout.splitlines() == [str(unpacked / "balancer" / "lua"), scripts.load("tick").sha], found.stderr


async def test_the_unpacked_wheel_serves_from_anywhere(
    start: Start, accounts: list[FakeAccount], unpacked: Path, tmp_path: Path
) -> None:
    """Supervisor, worker, embedded store and scripts, all out of the wheel."""
    fleet = await start(
        *("--data-dir", str(tmp_path / "data")),
        document=a_document(accounts),
        workers=1,
        variables={"PYTHONPATH": str(unpacked)},
    )
    async with fleet.asker() as asker:
        assert await asker.is_whole("chat", stream=True)
    assert await fleet.stopped() == 0


def test_the_command_is_installed_and_tells_its_version_and_commands() -> None:
    program = shutil.which("balancer", path=Path(sys.executable).parent)
    assert program

    version, help_ = (
        subprocess.run([program, flag], check=True, capture_output=True, text=True) for flag in ("--version", "--help")
    )

    assert (version.stdout, version.stderr) == (f"balancer {__version__}\n", "")
    listed = re.findall(r"^    (\w+)\b", help_.stdout.partition("commands:")[2], re.MULTILINE)
    assert listed == list(COMMANDS)
    assert help_.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main([command, "--help"])

    assert ending.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: balancer {command}")
