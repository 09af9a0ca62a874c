"""Preparing a revision and moving the head to it: compare-and-set, and no second effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import ANY

import pytest

from balancer.store import keys
from tests.lua.builders import contents, evaluate, nothing_written


@pytest.fixture(autouse=True)
def _empty(client: Any) -> Iterator[None]:
    client.flushall()
    yield
    client.flushall()


def publish(client: Any, base: int, revision: int, document: str = "{}") -> Any:
    names = {"head": keys.HEAD, "snapshot": keys.snapshot(revision), "changes": keys.CHANGES}
    log: dict[str, str | int] = {"now_ms": 0, "change": f"made {revision}", "kept": 3, "age_ms": 60_000}
    return evaluate(client, "publish", names, log | {"base": base, "revision": revision, "document": document})


def commit(client: Any, revision: int, digest: str = "", *, kept: int = 200, outdated: int = 0) -> Any:
    names = {"head": keys.HEAD, "digests": keys.DIGESTS, "outdated": keys.snapshot(outdated)}
    arguments: dict[str, str | int] = {"revision": revision, "digest": digest, "kept": kept, "feed": keys.FEED}
    return evaluate(client, "commit", names, arguments)


def head(client: Any) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in client.hgetall(keys.HEAD).items()}


def digests(client: Any) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in client.hgetall(keys.DIGESTS).items()}


def test_a_prepared_revision_is_pending_until_it_is_committed(client: Any) -> None:
    assert publish(client, 0, 1, "first") == ["prepared", 1]
    assert head(client) == {"pending": "1"}
    assert commit(client, 1, "d1") == ["committed", 1]
    assert contents(client) == {
        keys.HEAD: {b"revision": b"1", b"digest": b"d1"},
        keys.DIGESTS: {b"d1": b"1"},
        keys.snapshot(1): b"first",
        keys.CHANGES: [(ANY, {b"change": b"made 1"})],
    }


def test_the_head_stands_while_the_next_revision_is_pending(client: Any) -> None:
    publish(client, 0, 1, "first")
    commit(client, 1, "d1")
    assert publish(client, 1, 2, "second") == ["prepared", 2]
    assert head(client) == {"revision": "1", "digest": "d1", "pending": "2"}
    assert (client.get(keys.snapshot(1)), client.get(keys.snapshot(2))) == (b"first", b"second")


@pytest.mark.parametrize("base", [0, 1, 3])
def test_a_revision_made_from_another_than_the_head_is_a_conflict_and_changes_nothing(client: Any, base: int) -> None:
    for revision in (1, 2):
        publish(client, revision - 1, revision)
        commit(client, revision)
    with nothing_written(client):
        assert publish(client, base, base + 1, "mine") == ["conflict", 2]


def test_a_first_revision_may_be_high(client: Any) -> None:
    assert publish(client, 0, 41) == ["prepared", 41]
    assert commit(client, 41) == ["committed", 41]
    assert publish(client, 41, 42) == ["prepared", 42]


def test_while_one_publication_is_under_way_another_changes_nothing(client: Any) -> None:
    publish(client, 0, 1)
    commit(client, 1)
    publish(client, 1, 2, "theirs")
    with nothing_written(client):
        assert publish(client, 1, 2, "mine") == ["pending", 2]
        assert publish(client, 2, 3, "mine") == ["pending", 2]


@pytest.mark.parametrize("revision", [0, 1, 3])
def test_what_is_not_pending_is_not_committed(client: Any, revision: int) -> None:
    publish(client, 0, 1)
    commit(client, 1, "d1")
    publish(client, 1, 2)
    with nothing_written(client):
        assert commit(client, revision, "d9", outdated=1) == ["gone", 1]


def test_a_commit_done_twice_changes_nothing_more(client: Any) -> None:
    publish(client, 0, 1)
    commit(client, 1, "d1")
    with nothing_written(client):
        assert commit(client, 1, "d1") == ["gone", 1]
    publish(client, 1, 2)
    commit(client, 2, "d2")
    with nothing_written(client):
        assert commit(client, 1, "d1") == ["gone", 2]


def test_a_commit_is_announced_once(client: Any) -> None:
    with client.pubsub() as listener:
        listener.subscribe(keys.FEED)
        assert listener.get_message(timeout=5)["type"] == "subscribe"
        publish(client, 0, 1)
        commit(client, 1)
        commit(client, 1)
        publish(client, 1, 2)
        commit(client, 2)
        heard = [listener.get_message(timeout=5)["data"] for _ in range(2)]
        assert heard == [b"1", b"2"]
        assert listener.get_message(timeout=0) is None


def test_a_revision_that_no_file_made_takes_the_heads_digest_away(client: Any) -> None:
    publish(client, 0, 1)
    commit(client, 1, "d1")
    publish(client, 1, 2)
    commit(client, 2, "")
    assert head(client) == {"revision": "2", "digest": ""}
    assert digests(client) == {"d1": 1}


def test_the_outdated_snapshot_is_dropped_with_the_commit(client: Any) -> None:
    for revision in (1, 2, 3):
        publish(client, revision - 1, revision)
        commit(client, revision, outdated=max(0, revision - 2))
    assert sorted(contents(client)) == [keys.CHANGES, keys.HEAD, keys.snapshot(2), keys.snapshot(3)]


def test_of_the_digests_the_oldest_goes(client: Any) -> None:
    for revision in range(1, 13):
        publish(client, revision - 1, revision)
        commit(client, revision, f"d{revision}", kept=3)
    assert digests(client) == {"d10": 10, "d11": 11, "d12": 12}


def test_a_file_that_returns_is_known_by_its_newest_revision(client: Any) -> None:
    for revision, digest in enumerate(("d1", "d2", "d3", "d1"), start=1):
        publish(client, revision - 1, revision)
        commit(client, revision, digest, kept=3)
    assert digests(client) == {"d1": 4, "d2": 2, "d3": 3}


def noted(client: Any) -> list[bytes]:
    return [fields[b"change"] for _, fields in client.xrange(keys.CHANGES)]


def note(client: Any, change: str, now_ms: int = 0, age_ms: int = 60_000) -> Any:
    arguments: dict[str, str | int] = {"now_ms": now_ms, "change": change, "kept": 3, "age_ms": age_ms}
    return evaluate(client, "note", {"changes": keys.CHANGES}, arguments)


def test_a_revision_is_noted_as_it_is_prepared_and_one_that_is_refused_is_not(client: Any) -> None:
    publish(client, 0, 1)
    assert publish(client, 1, 2) == ["pending", 1]
    commit(client, 1)
    assert publish(client, 0, 1) == ["conflict", 1]
    assert noted(client) == [b"made 1"]


def test_the_log_keeps_so_many_changes(client: Any) -> None:
    for i in range(5):
        assert note(client, str(i))[0] == "noted"
    assert noted(client) == [b"2", b"3", b"4"]


def test_the_log_keeps_changes_for_so_long(client: Any) -> None:
    for at_ms in (1_000, 2_000, 3_000):
        client.xadd(keys.CHANGES, {"change": str(at_ms)}, id=f"{at_ms}-0")
    note(client, "new", now_ms=62_000)
    assert noted(client) == [b"2000", b"3000", b"new"]
