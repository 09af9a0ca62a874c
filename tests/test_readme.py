"""What the README says, held against the program: settings, metrics, files, and the configuration it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from balancer import config, document
from balancer.__main__ import _FLAGS, main
from balancer.domain import BreakerSettings, Outcome, Retry
from balancer.metrics import BY_NAME
from balancer.tactics import TACTIC_NAMES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FAILURES = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")


def cell(value: object) -> str:
    """A default as the table shows it."""
    if isinstance(value, bool):
        return "`on`" if value else "`off`"
    return f"`{value}`" if value != "" else ""


def test_the_settings_table_is_what_the_program_reads() -> None:
    rows = [tuple(part.strip() for part in row.split("|")[1:-1]) for row in README.splitlines() if "`BALANCER_" in row]
    table = [row for row in rows if len(row) == 4]
    flags = {*_FLAGS, "insecure"}
    expected = [
        (f"`{s.variable}`", f"`--{s.name.replace('_', '-')}`" if s.name in flags else "", cell(s.default), s.meaning)
        for s in config.SETTINGS
    ]
    assert table == expected


def test_the_series_named_are_exported() -> None:
    named = set(re.findall(r"`(balancer_[a-z_]+)`", README))
    assert len(named) > 5
    assert named <= BY_NAME.keys()


def first_cells(text: str, heading: str) -> list[str]:
    """What the first column of the table under that first heading names in code."""
    rows = text.partition(f"\n| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_its_tables_of_tactics_and_outcomes_leave_none_out() -> None:
    assert sorted(first_cells(README, "tactic")) == sorted(TACTIC_NAMES)
    assert sorted(first_cells(README, "outcome")) == sorted(set(Outcome) - {Outcome.SUCCESS})
    assert sorted(first_cells(FAILURES, "outcome")) == sorted(Outcome)


def test_its_table_of_commands_is_the_program_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+)\b", capsys.readouterr().out, re.MULTILINE)
    assert sorted(re.findall(r"^\| `balancer (\w+)", README, re.MULTILINE)) == sorted(commands)


def test_the_defaults_it_names_are_the_program_s() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", FAILURES, re.MULTILINE))
    breaker = BreakerSettings()
    assert {name: float(value) for name, value in table.items()} == {
        name: float(getattr(breaker, name)) for name in BreakerSettings.__struct_fields__
    }
    for text in (README, FAILURES):
        for name, value in re.findall(r"`(?:retry\.)?(attempts|budget_ratio|backoff_ms)` \(([\d.]+)\)", text):
            assert float(value) == getattr(Retry(), name)
    for name, value in re.findall(r"`(failures|min_requests|ratio|successes)` \(([\d.]+)\)", README):
        assert float(value) == getattr(breaker, name)


def test_every_file_that_it_names_exists() -> None:
    named = re.findall(r"`((?:tests|balancer|lua|docs|benchmarks)/[\w./-]+)`", README + FAILURES)
    named += re.findall(r"\]\(([\w./-]+)\)", README)
    named += [f"docs/{name}" for name in re.findall(r"\]\(([\w./-]+)\)", FAILURES)]
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_configuration_it_shows_is_valid() -> None:
    parts = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(parts) == 3
    one, mixed, other = parts
    reading = document.read(document.parse(one + other), door="strict")
    assert [pool.record for pool in reading.configuration.pools] == ["full"]
    assert reading.warnings == ()
    styles = sorted(provider.api_style for provider in reading.configuration.providers)
    assert styles == ["anthropic", "openai", "openai"]
    reading = document.read(document.parse(mixed), door="strict")
    assert reading.warnings == ()
    styles = sorted(provider.api_style for provider in reading.configuration.providers)
    assert styles == ["anthropic", "google", "openai"]


def test_the_packages_with_a_reason_are_those_required() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    required = set(re.findall(r'^\s+"([a-z0-9-]+)', block, re.MULTILINE))
    section = README.partition("## What it stands on")[2].partition("##")[0]
    named = {
        name for row in re.findall(r"^\| ([a-z][a-z0-9, -]+) \|", section, re.MULTILINE) for name in row.split(", ")
    }
    assert named - {"package"} == required


def test_the_commands_it_names_exist(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"(?:^|`)balancer ([a-z]+)\b", README, re.MULTILINE))
    assert named >= {"check", "serve", "apply", "diff", "get", "rollback", "demo"}
    for name in named:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"balancer {name}" in capsys.readouterr().out
