"""The tests' own tools, run on small suites of their own: what was not run is listed, nothing leaves loopback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml

from tests import actors, prometheus
from tests.needs import FINDERS, program

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder for tests that run under our two plugins in a process of their own, none of the programs on PATH."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("BALANCER_TEST_REQUIRE_ALL", raising=False)
    pytester.makeconftest('pytest_plugins = ("tests.needs", "tests.loopback")')
    pytester.makeini("[pytest]\nmarkers =\n    needs: as in the project\n")
    return pytester


NEEDY = """
    import pytest

    @pytest.mark.needs("apt:redis-server", "apt:lua-check")
    def test_on_a_packaged_redis():
        raise AssertionError("must not run")

    def test_other():
        pass
"""


def test_a_test_whose_need_is_absent_is_listed_and_the_run_passes(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_needy=NEEDY)

    result = suite.runpytest_subprocess()

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["not run: test_needy.py::test_on_a_packaged_redis (needs apt:redis-server, apt:lua-check)"]
    )
    assert result.ret == 0


def test_the_gate_fails_when_a_test_was_not_run_whatever_skipped_it(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BALANCER_TEST_REQUIRE_ALL", "1")
    # The skip is what is tested: a suite of its own, in a process of its own, that the gate must refuse.
    suite.makepyfile(test_skips="import pytest\n\ndef test_it():\n    pytest.skip('not today')\n")

    result = suite.runpytest_subprocess()

    result.stdout.fnmatch_lines(["not run: test_skips.py::test_it (not today)"])
    assert result.ret == 1


def test_the_gate_passes_when_all_were_run(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BALANCER_TEST_REQUIRE_ALL", "1")
    suite.makepyfile(test_fine="def test_it():\n    pass\n")

    result = suite.runpytest_subprocess()

    result.stdout.no_fnmatch_line("not run:*")
    assert result.ret == 0


def test_a_misspelt_need_stops_the_run(suite: pytest.Pytester) -> None:
    suite.makepyfile("import pytest\n\n@pytest.mark.needs('apt:reddis')\ndef test_it():\n    pass\n")

    result = suite.runpytest_subprocess()

    result.stderr.fnmatch_lines(["*unknown need 'apt:reddis'*"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    "reach",
    [
        "socket.create_connection(('192.0.2.1', 9), timeout=0.1)",
        "socket.create_connection(('2001:db8::1', 9), timeout=0.1)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 9))",
        "socket.getaddrinfo('example.com', 80)",
    ],
)
def test_reaching_beyond_loopback_fails_the_test_even_if_it_swallows_the_error(
    suite: pytest.Pytester, reach: str
) -> None:
    suite.makepyfile(f"""
        import contextlib, socket

        def test_it():
            with contextlib.suppress(OSError):
                {reach}

        def test_another():
            pass
    """)

    result = suite.runpytest_subprocess()

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*reached beyond loopback: *"])


def test_loopback_in_every_spelling_and_names_that_never_resolve_are_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, server.getsockname()[1]), timeout=5).close()
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo("upstream.invalid", 443)


def test_programs_are_looked_for_under_every_known_need() -> None:
    for need in FINDERS:
        path = program(need)
        assert path is None or Path(path).exists()


@pytest.mark.needs("apt:prometheus")
async def test_the_prometheus_of_the_tests_scrapes_evaluates_rules_and_answers(tmp_path: Path) -> None:
    alert = {"alert": "ItIsSo", "expr": "max by (pod) (some_gauge) > 2"}
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": [alert]}]}), encoding="utf-8")
    upstream = actors.Upstream()
    upstream.answers(body=b"# TYPE some_gauge gauge\nsome_gauge 3\n", content_type="text/plain")

    async with upstream.running():
        address = upstream.url.removeprefix("http://")
        configuration = prometheus.scraping({"pod-0": address}, namespace="here", rule_files=[rules])
        async with prometheus.running(configuration) as server:
            await server.until_scraped()
            found = await server.until("some_gauge")
            await server.until('ALERTS{alertname="ItIsSo", alertstate="firing"}')
            alerts, metadata = await server.alerts(), await server.metadata()
            pods = await server.label_values("pod", "some_gauge")
            nothing, sum_ = await server.value("sum(other_gauge)"), await server.value("sum(some_gauge) - 1")
            with pytest.raises(prometheus.QueryError, match=r"unclosed left parenthesis.*sum\(some"):
                await server.query("sum(some_gauge")

    labels = {"namespace": "here", "pod": "pod-0", "job": "balancer", "instance": address}
    assert [(one.labels, one.values) for one in found] == [(labels | {"__name__": "some_gauge"}, [3.0])]
    assert (alerts, metadata, pods) == ({"ItIsSo": "firing"}, {"some_gauge": "gauge"}, ["pod-0"])
    assert (nothing, sum_) == (None, 2.0)
