"""The recorded history, checked by the reference; and that the check can fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from balancer import audit
from balancer.store import keys, scripts
from tests.lua.pool import LuaPool
from tests.lua.traces import Trace


def history(pool: LuaPool) -> list[dict[str, str]]:
    entries = pool.client.xrange(keys.decisions(pool.name))
    return [{k.decode(): v.decode() for k, v in fields.items()} for _, fields in entries]


@pytest.mark.parametrize("seed", range(3))
def test_a_recorded_history_agrees_with_the_reference(new_pool: Callable[..., LuaPool], seed: int) -> None:
    pool = new_pool(record=1_000_000)
    Trace(pool, seed).run(steps=200)
    verdict = audit.check(history(pool))
    assert verdict.violations == []
    assert verdict.picks > 100
    assert verdict.settles > 50


MUTANTS = {
    "a streak one too long": ("include/tactic/round_robin.lua", "part.streak < part", "part.streak <= part"),
    "a tie broken the other way": ("include/candidates.lua", "value < least", "value <= least"),
    "a settle that drops its tokens": ("settle.lua", "entry.input + entry.output, now", "0, now"),
    "a reservation never released": ("include/ledger.lua", "service.reserved - reserved", "service.reserved"),
    "a window never reset": ("include/window.lua", ">= window.length * 1000", ">= window.length * 1e15"),
    "a retry that moves the cursor": (
        "select.lua",
        "if selection.is_retry then",
        "if selection.is_retry and false then",
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_script_is_found_out_by_its_history(
    new_pool: Callable[..., LuaPool], tmp_path: Path, mutant: str
) -> None:
    file, right, wrong = MUTANTS[mutant]
    shutil.copytree(scripts.folder(), tmp_path / "lua")
    source = (tmp_path / "lua" / file).read_text()
    assert source.count(right) == 1
    (tmp_path / "lua" / file).write_text(source.replace(right, wrong))
    pool = new_pool(record=1_000_000, scripts=str(tmp_path / "lua"))
    trace = Trace(pool, seed=1)
    with pytest.raises(AssertionError):
        trace.run(steps=400)  # The trace sees it at once; what follows is what the history alone would show.
    assert audit.check(history(pool)).violations
