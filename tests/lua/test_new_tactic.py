"""docs/tactics.md: the two files that it shows are a tactic, and its twins agree."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from balancer import document, tactics
from balancer.domain import Tactic
from balancer.reference import Pool
from balancer.store.calls import Definer
from balancer.tactics.base import CHOOSERS
from tests.builders import a_document
from tests.lua.builders import LEASE_MS, NOW_MS, a_selection, an_entry
from tests.lua.pool import LuaPool

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tactics.md").read_text(encoding="utf-8")


def code(language: str) -> str:
    """The page's one piece of code in that language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(text)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of our scripts with the page's one more; the page's module is loaded as ours are."""
    folder = tmp_path / "lua"
    shutil.copytree(ROOT / "lua", folder)
    (folder / "include" / "tactic" / "fill.lua").write_text(code("lua"), encoding="utf-8")
    path = tmp_path / "fill.py"
    path.write_text(code("python"), encoding="utf-8")
    spec = spec_from_file_location("balancer.tactics.fill", path)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    kind: type[Tactic] = module.Fill
    monkeypatch.setitem(CHOOSERS, kind, CHOOSERS.pop(kind))
    kinds = (*tactics.TACTICS, kind)
    names = (*tactics.TACTIC_NAMES, "fill")
    for owner in (tactics, sys.modules["balancer.document.reading"]):
        monkeypatch.setattr(owner, "TACTICS", kinds)
        monkeypatch.setattr(owner, "TACTIC_NAMES", names)
    return str(folder)


def test_a_tactic_of_one_s_own_is_two_files(scripts: str, new_pool: Callable[..., LuaPool]) -> None:
    lua, twin = new_pool(scripts=scripts), Pool()
    services = [{"provider": "a", "model": model} for model in ("x", "y", "z")]
    rule = {"services": services, "lb_tactic": {"type": "fill", "params": {"most_in_flight": 2}}}
    configuration = document.read(a_document(rule=rule), door="strict").configuration
    definition = Definer(configuration).definition(configuration.rules[0], 1)
    picks: list[Any] = []
    for pool in (lua, twin):
        pool.fence(NOW_MS, [definition])
    for number in range(1, 10):
        selection = a_selection(number, rule="openai/chat")
        answers: list[Any] = [pool.select(NOW_MS + number, "w", [selection], LEASE_MS) for pool in (lua, twin)]
        assert answers[0] == answers[1]
        picks.append(answers[0][0][1].partition(":")[2])
        if number == 5:
            for pool in (lua, twin):
                pool.settle(NOW_MS + number, "w", 1, [an_entry(1, "a:x")], LEASE_MS)

    assert "".join(picks) == "xxyyzxzxy"
