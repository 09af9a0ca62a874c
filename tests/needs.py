"""What tests need beyond wheels, and the list of those that were therefore not run.

`@pytest.mark.needs("apt:redis-server")` skips a test where the package is absent. Every skipped test, whatever skipped
it, is listed at the end; with `BALANCER_TEST_REQUIRE_ALL=1`, as in the gate, a list that is not empty fails the run.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

_CACHE = Path(__file__).resolve().parent.parent / ".cache"
NPM_BIN = _CACHE / "npm" / "node_modules" / ".bin"


def _aimock() -> str | None:
    path = os.environ.get("BALANCER_TEST_AIMOCK") or shutil.which("aimock", path=NPM_BIN)
    return path if path and shutil.which("node") else None


def _kubernetes(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=_CACHE / "kubernetes" / name)


FINDERS: dict[str, Callable[[], str | None]] = {
    "apt:gcc": lambda: shutil.which("gcc"),
    "apt:haproxy": lambda: shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin"),
    "apt:lua-check": lambda: shutil.which("luacheck"),
    "apt:nginx": lambda: shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin"),
    "apt:prometheus": lambda: shutil.which("promtool") and shutil.which("prometheus"),
    "apt:redis-server": lambda: shutil.which("redis-server"),
    "npm:helm": lambda: _kubernetes("helm"),
    "npm:kubectl": lambda: _kubernetes("kubectl"),
    "npm:@copilotkit/aimock": _aimock,
}


def program(need: str) -> str | None:
    """Path of the program that the need is about, or None if this machine has none."""
    return FINDERS[need]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests whose needs are not there."""
    for item in items:
        needs = [need for marker in item.iter_markers("needs") for need in marker.args]
        if unknown := [need for need in needs if need not in FINDERS]:
            raise pytest.UsageError(
                f"{item.nodeid}: unknown need {unknown[0]!r}; tests/needs.py knows {sorted(FINDERS)}"
            )
        if missing := [need for need in needs if program(need) is None]:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was not run, each with the reason."""
    for nodeid, reason in _not_run(terminalreporter):
        terminalreporter.write_line(f"not run: {nodeid} ({reason})", yellow=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that had to be complete and was not."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("BALANCER_TEST_REQUIRE_ALL") == "1" and reporter is not None and _not_run(reporter):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def _not_run(reporter: pytest.TerminalReporter) -> list[tuple[str, str]]:
    listed = []
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        listed.append((report.nodeid, reason.removeprefix("Skipped: ")))
    return listed
