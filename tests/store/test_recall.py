"""Who gave an answer is found by the answer's id, wherever the pools are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from balancer.store import keys
from balancer.store.balance import Recalled
from tests.store.test_balance import Start, pick, started, the_rule
from tests.store.test_limits import RULES
from tests.store.test_registry import a_configuration, a_rule


@pytest.fixture
async def start(url: str) -> AsyncIterator[Start]:
    start = Start(url)
    yield start
    await start.close()


async def test_an_answer_is_found_by_its_id_in_whichever_pool_gave_it(start: Start, control: Any) -> None:
    one, two = await started(start, a_configuration(*RULES), 2)
    for uuid in "xyz":
        await one.remember(await pick(one, the_rule(one, uuid)), f"resp_{uuid}")
    assert [await two.recall(f"resp_{uuid}") for uuid in "xyz"] == [
        Recalled(pool=pool, rule=rule, service="a:m") for rule, pool in (("x", "default"), ("y", "eu"), ("z", "us"))
    ]
    assert await two.recall("resp_of_nobody") is None
    key = keys.response("default", "resp_x")
    assert "resp_x" not in key
    assert 29 < await control.pttl(key) / 86_400_000 <= 30


async def test_an_answer_is_found_whichever_rule_it_is_asked_for_with(start: Start) -> None:
    one, two = await started(start, a_configuration(*RULES), 2)
    for uuid in "xyz":
        await one.remember(await pick(one, the_rule(one, uuid)), f"resp_{uuid}")
    for asked in [*(the_rule(two, uuid) for uuid in "xyz"), a_rule("gone", pool="gone")]:
        found = [await two.recall(f"resp_{uuid}", asked) for uuid in "xyz"]
        assert [recalled and (recalled.rule, recalled.pool) for recalled in found] == [
            ("x", "default"),
            ("y", "eu"),
            ("z", "us"),
        ]
        assert await two.recall("resp_of_nobody", asked) is None
