"""What the guides in docs name is there: links, chapters, series, settings, commands, targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from balancer import config, document, oauth
from balancer.__main__ import main
from balancer.metrics import BY_NAME

ROOT = Path(__file__).resolve().parent.parent
GUIDES = (
    "docs/operations.md",
    "docs/migration.md",
    "docs/observability.md",
    "docs/oauth.md",
    "docs/translation.md",
)
VARIABLES = {setting.variable for setting in config.SETTINGS}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The chapters of a page, as links name them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", GUIDES)
def test_every_link_of_a_guide_leads_somewhere(name: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", text(name)):
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


def test_the_configuration_that_a_guide_shows_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", text("docs/oauth.md"), re.DOTALL)
    providers = document.read(document.parse(block, "the guide"), door="strict").configuration.providers
    assert [oauth.is_renewed(provider) for provider in providers] == [True, True]


@pytest.mark.parametrize("name", GUIDES)
def test_every_file_that_a_guide_names_exists(name: str) -> None:
    named = re.findall(r"`((?:tests|balancer|benchmarks|grafana|deploy)/[\w./-]+)`", text(name))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", GUIDES)
def test_every_series_and_setting_of_a_guide_exists(name: str) -> None:
    assert set(re.findall(r"`(balancer_[a-z_]+)", text(name))) <= BY_NAME.keys()
    assert set(re.findall(r"BALANCER_[A-Z_]+[A-Z]", text(name))) <= VARIABLES


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_and_target_of_a_guide_exists(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = set(re.findall(r"^    (\w+)\b", capsys.readouterr().out, re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^|… )balancer ([a-z]+)", text(name), re.MULTILINE)) <= commands
    assert set(re.findall(r"`make ([a-z-]+)", text(name))) <= targets
