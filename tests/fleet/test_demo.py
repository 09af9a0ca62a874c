"""`balancer demo` as a person runs it: it proves that all agrees, and a fleet with a wrong script does not pass."""

from __future__ import annotations

import re

from tests.fleet.conftest import run_command

ARGUMENTS = ("demo", "--requests", "400", "--concurrency", "16")
RULES = ("in-turn", "by-tokens", "by-both", "by-weight")


def proof(out: str) -> dict[str, list[str]]:
    """The cells of the proof's table by rule."""
    _, _, table = out.partition(" proof ")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


async def test_the_demo_proves_every_pick_and_every_token_although_a_worker_is_killed(
    environment: dict[str, str],
) -> None:
    status, out, err = await run_command(*ARGUMENTS, environment=environment, timeout_s=60)

    assert (status, err) == (0, ""), out + err
    assert "Everything agrees: every pick, every counter, every token." in out
    assert re.search(r"worker process \d+ killed with -9 after \d+ requests", out)
    rows = proof(out)
    assert tuple(rows) == RULES
    assert {row[-1] for row in rows.values()} == {"exact"}
    picked, replayed = (sum(int(row[column]) for row in rows.values()) for column in (0, 1))
    assert picked == replayed
    # A request whose connection broke before its pick has none.
    broken = re.search(r"(\d+) connections broke, (\d+) lost", out)
    assert broken
    assert 400 - int(broken[1]) <= picked <= 400


async def test_the_demo_with_a_wrong_script_fails_and_names_the_rule_that_it_broke(
    environment: dict[str, str],
) -> None:
    status, out, err = await run_command(*ARGUMENTS, "--break", environment=environment, timeout_s=60)

    assert (status, err) == (1, ""), out + err
    assert "Everything agrees" not in out
    assert re.search(r"✗ position \d+ of epoch 1: rule openai/in-turn", out)
    assert re.search(r"\d+ disagreement", out)
    assert proof(out)["in-turn"][-1] == "wrong"


async def test_the_demo_says_what_it_needs(environment: dict[str, str]) -> None:
    status, out, err = await run_command("demo", "--requests", "10", environment=environment)

    assert (status, out) == (1, "")
    assert err == "balancer: the demo needs at least 400 requests, 2 workers and 8 requests at once\n"
