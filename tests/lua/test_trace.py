"""The scripts against their reference in Python."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.lua.pool import LuaPool
from tests.lua.traces import Trace


@pytest.mark.parametrize("seed", range(12))
def test_scripts_and_reference_agree_on_every_reply_and_counter(new_pool: Callable[..., LuaPool], seed: int) -> None:
    Trace(new_pool(), seed).run(steps=400)
