"""audit: the verdict on live pools and on files, and what the exit status says."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from balancer import config
from balancer.domain import Outcome, Usage
from balancer.store import keys
from balancer.store.balance import Balance
from tests import stored as by_hand
from tests.cli.conftest import Run, Write, a_document


def recorded(record: str) -> dict[str, Any]:
    return a_document() | {"pools": [{"name": "default", "record": record}]}


def work(url: str, attempts: int) -> None:
    """Some attempts on the first rule that stands, each settled."""

    async def go() -> None:
        balance = Balance(url, config.load({"redis_deadline_ms": 5000}, {}))
        await balance.start()
        rule = balance.directory.configuration.rules[0]
        for _ in range(attempts):
            pick, _ = await balance.select(rule, reserved=3, deadline_ms=60_000)
            balance.settle(pick, Outcome.SUCCESS, Usage(input=5, output=2))
        await balance.close()

    asyncio.run(go())


@pytest.fixture
def history(on_store: Run, store_url: str, write: Write) -> str:
    """The URL of a store whose pool has a full record of ten attempts."""
    assert on_store("apply", write(recorded("full"))).status == 0
    work(store_url, 10)
    return store_url


def test_a_recorded_pool_is_replayed_from_its_first_event(on_store: Run, history: str) -> None:
    ran = on_store("audit")
    assert (ran.status, ran.err) == (0, "")
    first, second, third = ran.out.splitlines()
    assert first == "pool default: 23 events: 10 picks, 10 settles, 0 lost, 0 cleared"
    assert second == "full check: 23 events replayed against the reference, 1 checkpoints, 1 epochs"
    assert third == "no violation"


def test_a_counter_that_is_wrong_is_named_with_what_led_there_and_the_status_is_1(on_store: Run, history: str) -> None:
    with redis.Redis.from_url(history) as client:
        key, field = keys.services("default"), by_hand.field("up:m1", "input")
        client.hset(key, field, by_hand.with_added(client.hget(key, field), "input", 1))
    ran = on_store("audit", "--pool", "default")
    assert ran.status == 1
    assert "1 violation:" in ran.out
    assert "service up:m1" in ran.out
    assert "event='checkpoint'" in ran.out


def test_a_saved_history_is_checked_without_a_store(run: Run, on_store: Run, history: str, tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    live = on_store("audit", "--save", str(file))
    saved = run("audit", str(file))
    assert (saved.status, saved.err) == (0, "")
    assert saved.out == live.out.replace("pool default", str(file))
    events = [msgspec.json.decode(line) for line in file.read_bytes().splitlines()]
    picks = [i for i, event in enumerate(events) if event["event"] == "pick"]
    del events[picks[4]]
    file.write_bytes(b"\n".join(map(msgspec.json.encode, events)))
    cut = run("audit", str(file))
    assert cut.status == 1
    assert "is missing" in cut.out


def test_a_pool_without_a_record_has_its_invariants_checked_and_says_how_to_have_more(
    on_store: Run, store_url: str, write: Write
) -> None:
    assert on_store("apply", write(recorded("off"))).status == 0
    work(store_url, 3)
    ran = on_store("audit")
    assert ran.status == 0
    assert "only its invariants are checked" in ran.err
    assert "record: full" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pool", "nobody"), "there is no pool 'nobody'; there is: default"),
        (("/nowhere/at/all",), "cannot read /nowhere/at/all: No such file or directory"),
        (("--save", "/nowhere/at/all"), "cannot write /nowhere/at/all: No such file or directory"),
    ],
)
def test_what_cannot_be_audited_is_one_message(
    on_store: Run, history: str, arguments: tuple[str, ...], message: str
) -> None:
    ran = on_store("audit", *arguments)
    assert (ran.status, ran.out, ran.err) == (1, "", f"balancer: {message}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "expected one event a line, in JSON"), ('{"event": "pick"}', "line 1: no event of a pool")],
)
def test_a_file_that_is_no_history_is_told_as_such(run: Run, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text(text)
    ran = run("audit", str(file))
    assert ran.status == 1
    assert message in ran.err
