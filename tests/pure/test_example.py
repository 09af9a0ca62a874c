"""docs/example.yaml: accepted as it stands, and with every field that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer import document
from balancer.domain import (
    BreakerSettings,
    Health,
    Limits,
    OAuthDetail,
    PoolSettings,
    Price,
    Provider,
    Retry,
    Rule,
    ScenarioConfig,
    ScenarioFlags,
    Service,
    SmartOp,
    SmartRoute,
    Timeouts,
)

EXAMPLE = Path(__file__).parents[2] / "docs" / "example.yaml"
RAW = document.parse(EXAMPLE.read_text(encoding="utf-8"), "example.yaml")


def keys_of(tables: list[dict[str, Any]], *path: str) -> set[str]:
    """The keys of these tables, or of what is below them."""
    for name in path:
        tables = [item for table in tables if name in table for item in _listed(table[name])]
    return {key for table in tables for key in table}


def _listed(value: Any) -> list[dict[str, Any]]:
    return value if isinstance(value, list) else [value]


def test_the_example_is_accepted_without_a_word() -> None:
    reading = document.read(RAW, door="strict")

    assert reading.warnings == ()
    assert len(reading.configuration.rules) == len(RAW["rules"])


@pytest.mark.parametrize(
    ("struct", "place", "path", "absent"),
    [
        (Provider, "providers", (), set()),
        (Timeouts, "providers", ("timeouts",), set()),
        (Limits, "providers", ("limits",), set()),
        (BreakerSettings, "providers", ("breaker",), set()),
        (Price, "providers", ("price",), set()),
        (Health, "providers", ("health",), set()),
        (OAuthDetail, "providers", ("oauth_detail",), set()),
        (Rule, "rules", (), set()),
        (SmartRoute, "rules", ("smart_routing",), set()),
        (SmartOp, "rules", ("smart_routing", "ops"), {"meta"}),
        (ScenarioConfig, "scenarios", (), set()),
        (ScenarioFlags, "scenarios", ("flags",), set()),
        (Service, "rules", ("services",), set()),
        (Limits, "rules", ("services", "limits"), {"split"}),
        (Retry, "rules", ("retry",), set()),
        (PoolSettings, "pools", (), set()),
    ],
)
def test_the_example_has_every_field_that_works(
    struct: type[msgspec.Struct], place: str, path: tuple[str, ...], absent: set[str]
) -> None:
    assert keys_of(RAW[place], *path) == set(struct.__struct_fields__) - absent
