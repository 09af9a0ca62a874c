"""The scripts against their reference in Python."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lua.pool import LuaPool
from tests.lua.traces import RoutedTrace, Trace

_names = itertools.count()


@pytest.mark.parametrize("seed", range(12))
def test_scripts_and_reference_agree_on_every_reply_and_counter(new_pool: Callable[..., LuaPool], seed: int) -> None:
    Trace(new_pool(), random.Random(seed)).run(steps=400)


@pytest.mark.parametrize("seed", range(6))
def test_they_agree_where_rules_have_entries_that_share_services(new_pool: Callable[..., LuaPool], seed: int) -> None:
    trace = RoutedTrace(new_pool(), random.Random(seed))
    trace.run(steps=250)
    assert trace.met["entry long"] > 100


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rand=st.randoms(use_true_random=False), steps=st.integers(1, 60))
def test_no_history_that_can_be_drawn_makes_them_disagree(client: Any, rand: random.Random, steps: int) -> None:
    """As above, but every draw is hypothesis' own, so that a history that fails is made as short as it can be."""
    Trace(LuaPool(client, f"drawn-{next(_names)}"), rand).run(steps)
