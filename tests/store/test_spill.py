"""The outbox on disk: what is written and when, who replays it, and that each attempt counts once all the same."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from balancer import config
from balancer.domain import Entry
from balancer.errors import ConfigurationError
from balancer.store import keys, spill, spiller
from balancer.store.balance import Balance
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.settlement import Batch
from balancer.store.spill import Spill
from balancer.store.topology import Topology
from balancer.store.views import ServiceView
from tests.store.conftest import eventually
from tests.store.test_pool import SERVICES, a_definition, a_selection, an_entry

# A worker of its own process: makes picks 1…count, then settles as many numbers as each line on stdin says.
_WORKER = """
import asyncio, sys
from pathlib import Path
from balancer.store.pool import PoolClient, PoolEvents
from balancer.store.topology import Topology
from tests.store.test_pool import a_selection, an_entry

async def main(url, folder, worker, count):
    pool = PoolClient(Topology(url), "default", worker, deadline_ms=2000, lease_ms=30_000, scripts_dir="",
                      events=PoolEvents(), outbox_dir=Path(folder))
    pool.start()
    await pool.wait_until_up(10)
    answers = await asyncio.gather(*(pool.select(a_selection(n)) for n in range(1, int(count) + 1)))
    print("picked", flush=True)
    settled = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        for answer in answers[settled : settled + int(line)]:
            settled += 1
            pool.settle(an_entry(settled, answer[1], tokens=settled))
        await pool.flushed()
        print("settled", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


class Gate:
    """The server behind a socket that can be taken away from those who connect through it."""

    def __init__(self, url: str, folder: Path, control: Any) -> None:
        self._target = url.removeprefix("unix://")
        self._path = folder / "gate.sock"
        self._control = control
        self.url = f"unix://{self._path}"
        self.open()

    def open(self) -> None:
        self._path.symlink_to(self._target)

    async def shut(self) -> None:
        self._path.unlink()
        await self._control.client_kill_filter(_type="normal", skipme=True)


@pytest.fixture
def gate(url: str, tmp_path: Path, control: Any) -> Gate:
    return Gate(url, tmp_path, control)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spill.prepare(tmp_path / "outbox")
    return tmp_path / "outbox"


Join = Callable[..., Any]


@pytest.fixture
async def join(url: str, folder: Path) -> AsyncIterator[Join]:
    """Makes pool clients with an outbox on disk, each a worker; closes them afterwards."""
    clients: list[PoolClient] = []

    async def make(worker: str, *, through: Gate | None = None, lost: list[int] | None = None, **more: Any) -> Any:
        events = PoolEvents(batches_lost=lambda _, count: lost.append(count) if lost is not None else None)
        options: dict[str, Any] = {"lease_ms": 30_000, "outbox_dir": folder} | more
        address = through.url if through else url
        pool = PoolClient(
            Topology(address), "default", worker, deadline_ms=2000, scripts_dir="", events=events, **options
        )
        pool.start()
        clients.append(pool)
        await pool.wait_until_up(5)
        return pool

    yield make
    for pool in clients:
        await pool.close(timeout_s=0)


async def totals(pool: PoolClient) -> list[ServiceView]:
    view = await pool.view()
    return [view.services[service] for service in SERVICES if service in view.services]


async def tokens(pool: PoolClient) -> int:
    return sum(service.input for service in await totals(pool))


def lines(folder: Path, worker: str = "*") -> list[dict[str, Any]]:
    """Every whole line on disk."""
    texts = [path.read_bytes() for path in sorted(folder.glob(f"default.{worker}/*.jsonl"))]
    return [msgspec.json.decode(line) for text in texts for line in text.split(b"\n")[:-1]]


def on_disk(folder: Path, worker: str = "*") -> int:
    return sum(len(line["entries"]) for line in lines(folder, worker))


async def wait_for_disk(folder: Path, entries: int) -> None:
    async def is_written() -> bool:
        return on_disk(folder) == entries

    await eventually(is_written)


async def wait_until_empty(folder: Path) -> None:
    async def is_empty() -> bool:
        return not names(folder)

    await eventually(is_empty)


def a_batch(number: int, *entries: Entry, made_at: float | None = None) -> Batch:
    made_at = time.monotonic() if made_at is None else made_at
    timed = tuple((entry, made_at) for entry in entries or (an_entry(number, "a:m"),))
    return Batch(number=number, entries=timed, count=len(timed))


def write(folder: Path, worker: str, *batches: Batch) -> Path:
    """Leaves batches as a process that is gone has left them."""
    left = Spill(folder, "default", worker)
    assert left.lock()
    left.append(batches)
    left.release()
    return folder / f"default.{worker}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the files ---------------------------------------------------------------------------------------------------------


def test_what_is_read_is_what_was_written_grown_older_by_the_time_between(folder: Path) -> None:
    now = {"clock": 100.0, "wall": 5000.0}
    left = Spill(folder, "p", "w", clock=lambda: now["clock"], wall=lambda: now["wall"])
    assert left.lock()
    entry = msgspec.structs.replace(an_entry(8, "a:m"), cooldown_ms=60_000)
    left.append([a_batch(3, entry, made_at=98.0)])
    left.release()

    for wall, age_s in ((5010.0, 12.0), (4000.0, 0.0)):
        other = Spill(folder, "p", "w", clock=lambda: 7.0, wall=lambda: wall)  # noqa: B023  used at once
        assert other.lock()
        places = other.index()
        assert list(places) == [3]
        assert other.read(places[3]) == {3: ((entry, 7.0 - age_s),)}
        assert other.newest_age_s == age_s
        other.release()


def test_a_line_of_an_older_version_is_read_though_it_knows_of_no_cooldown(folder: Path) -> None:
    write(folder, "w", a_batch(1, an_entry(1, "a:m")))
    (segment,) = (folder / "default.w").glob("*.jsonl")
    line = msgspec.json.decode(segment.read_bytes())
    line["entries"] = [item[:9] for item in line["entries"]]
    segment.write_bytes(msgspec.json.encode(line) + b"\n")
    spill = Spill(folder, "default", "w")
    assert spill.lock()
    ((entry, _),) = spill.read(spill.index()[1])[1]
    spill.release()
    assert entry == an_entry(1, "a:m")


def test_only_its_owner_may_read_what_is_written(folder: Path) -> None:
    place = write(folder, "w", a_batch(1))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, place)] == [0o700, 0o700]
    assert {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()} == {0o600}


def test_a_line_cut_off_by_a_crash_is_ignored_and_all_before_it_counts(folder: Path) -> None:
    place = write(folder, "w", a_batch(1), a_batch(2), a_batch(3))
    (segment,) = place.glob("*.jsonl")
    os.truncate(segment, segment.stat().st_size - 5)
    left = Spill(folder, "default", "w")
    assert left.lock()
    assert list(left.index()) == [1, 2]
    left.release()
    assert names(folder) == [place.name]


@pytest.mark.parametrize(
    "broken",
    [
        b"\x00\xff garbage",
        b'{"version":2,"worker":"w","pool":"default","batch":2,"entries":[]}',
        b'{"version":1,"worker":"x","pool":"default","batch":2,"entries":[]}',
        b'{"version":1,"worker":"w","pool":"default","batch":2,"entries":[[1,"a:m","success",0,-1,0,0,0,0]]}',
        b'{"version":1,"worker":"w","pool":"default","batch":2,"entries":[[1,"","success",0,1,0,0,0,0]]}',
    ],
)
def test_a_line_that_cannot_be_read_sets_a_copy_aside_and_the_others_count(
    folder: Path, caplog: pytest.LogCaptureFixture, broken: bytes
) -> None:
    place = write(folder, "w", a_batch(1), a_batch(2), a_batch(3))
    (segment,) = place.glob("*.jsonl")
    first, _, third, _ = segment.read_bytes().split(b"\n")
    content = b"\n".join((first, broken, third, b""))
    segment.write_bytes(content)
    for _ in range(2):
        left = Spill(folder, "default", "w")
        assert left.lock()
        assert list(left.index()) == [1, 3]
        left.release()
    aside = folder / f"{place.name}.{segment.name}.unreadable"
    assert aside.read_bytes() == content
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert [record.getMessage() for record in caplog.records] == ["part of a spilled outbox is set aside"]
    assert spill.folders(folder) == [("default", "w")]


def test_acknowledged_segments_go_and_the_folder_holds_no_more_than_what_waits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spill, "SEGMENT_BYTES", 1000)
    left = Spill(folder, "default", "w")
    assert left.lock()
    sizes = []
    for number in range(1, 200):
        left.append([a_batch(number)])
        left.drop(number - 3)
        sizes.append(sum(path.stat().st_size for path in (folder / "default.w").iterdir()))
    assert max(sizes) < 3000
    left.drop(199)
    assert left.is_empty
    left.remove()
    assert names(folder) == []


def test_a_disk_that_was_full_half_way_through_a_line_is_written_to_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Spill(folder, "default", "w")
    assert left.lock()
    left.append([a_batch(1)])
    write = os.write

    def fills_up(descriptor: int, data: memoryview) -> int:
        if len(data) < 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:30])

    with monkeypatch.context() as full:
        full.setattr(os, "write", fills_up)
        with pytest.raises(OSError, match="No space"):
            left.append([a_batch(2)])
    left.append([a_batch(2), a_batch(3)])
    left.release()
    other = Spill(folder, "default", "w")
    assert other.lock()
    assert list(other.index()) == [1, 2, 3]
    other.release()


_LOCK_AND_WAIT = """
import sys
from pathlib import Path
from balancer.store.spill import Spill
print(Spill(Path(sys.argv[1]), "default", "w").lock(), flush=True)
sys.stdin.read()
"""


def test_a_lock_is_held_against_other_processes_until_its_owner_is_killed(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _LOCK_AND_WAIT, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout
        assert owner.stdout.readline() == b"True\n"
        ours = Spill(folder, "default", "w")
        assert not ours.lock()
        owner.kill()
        owner.wait()
        assert ours.lock()
        ours.remove()


def test_a_folder_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    spill.prepare(tmp_path / "deep" / "er")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"BALANCER_OUTBOX_DIR: cannot write to .*file"):
        spill.prepare(tmp_path / "file")


# -- with a server -----------------------------------------------------------------------------------------------------


async def test_while_redis_answers_nothing_is_written(join: Join, folder: Path) -> None:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    loop = asyncio.get_running_loop()
    end = loop.time() + 8 * spiller.LOOK_S
    number = 0
    while loop.time() < end:
        number += 1
        answer = await pool.select(a_selection(number))
        pool.settle(an_entry(number, answer[1]))
    assert await pool.acknowledged(5)
    assert names(folder) == []
    assert await tokens(pool) == 10 * number


async def test_what_is_settled_in_an_outage_is_on_disk_until_redis_has_it(join: Join, gate: Gate, folder: Path) -> None:
    pool: PoolClient = await join("w", through=gate)
    await pool.raise_fence([a_definition()])
    answers = [await pool.select(a_selection(n)) for n in range(1, 301)]
    await gate.shut()
    for number, answer in enumerate(answers[:290], start=1):
        pool.settle(an_entry(number, answer[1], tokens=number))
    await wait_for_disk(folder, 290)
    for number, answer in enumerate(answers[290:], start=291):
        pool.settle(an_entry(number, answer[1], tokens=number))
    await wait_for_disk(folder, 300)
    gate.open()
    assert await pool.acknowledged(10)
    await wait_for_disk(folder, 0)
    assert await tokens(pool) == sum(range(301))
    assert [service.in_flight for service in await totals(pool)] == [0, 0]
    await pool.close()
    assert names(folder) == []


async def test_a_server_that_stalls_is_an_outage_too(join: Join, control: Any, folder: Path) -> None:
    pool: PoolClient = await join("w")
    await pool.raise_fence([a_definition()])
    answer = await pool.select(a_selection(1))
    await control.client_pause(1000)
    pool.settle(an_entry(1, answer[1]))
    await wait_for_disk(folder, 1)
    assert len(pool.outbox) == 1
    assert await pool.acknowledged(5)
    await wait_for_disk(folder, 0)
    assert await tokens(pool) == 10


async def test_a_worker_killed_in_an_outage_is_replayed_by_the_next_to_the_token(
    join: Join, gate: Gate, folder: Path
) -> None:
    one: PoolClient = await join("one", lease_ms=1000, outbox_dir=None)  # It looks for ended leases often.
    await one.raise_fence([a_definition()])
    victim = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _WORKER, gate.url, str(folder), "victim", "400"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert victim.stdin
    assert victim.stdout
    try:
        assert await victim.stdout.readline() == b"picked\n"
        victim.stdin.write(b"100\n")
        assert await victim.stdout.readline() == b"settled\n"

        async def are_applied() -> bool:
            return await tokens(one) == sum(range(101))

        await eventually(are_applied)
        await gate.shut()
        for _ in range(2):
            victim.stdin.write(b"100\n")
            assert await victim.stdout.readline() == b"settled\n"
        await wait_for_disk(folder, 200)
        assert min(line["batch"] for line in lines(folder)) > 1
    finally:
        victim.kill()
        await victim.wait()
        victim._transport.close()  # type: ignore[attr-defined]
    kept = shutil.copytree(folder / "default.victim", folder.parent / "kept")

    two: PoolClient = await join("two")
    await wait_until_empty(folder)
    assert await tokens(two) == sum(range(301))

    # What it left open is reaped now, long before its lease of 30 s would have ended.
    async def is_reaped() -> bool:
        return sum(service.lost for service in await totals(two)) == 100

    await eventually(is_reaped)
    services = await totals(two)
    assert [(s.in_flight, s.reserved, s.requests) for s in services] == [(0, 0, 200), (0, 0, 200)]

    await two.close()
    os.rename(kept, folder / "default.victim")
    three: PoolClient = await join("three")
    await wait_until_empty(folder)
    assert await totals(three) == services


async def test_two_processes_that_start_at_once_replay_once(join: Join, folder: Path) -> None:
    write(folder, "gone", *(a_batch(number) for number in range(1, 101)))
    pools = await asyncio.gather(join("one"), join("two"), join("three"))
    await wait_until_empty(folder)
    assert [(s.requests, s.input) for s in await totals(pools[0])] == [(100, 1000)]


async def test_of_two_workers_in_a_folder_only_the_dead_one_is_replayed(join: Join, gate: Gate, folder: Path) -> None:
    living: PoolClient = await join("living", through=gate)
    await living.raise_fence([a_definition()])
    await gate.shut()
    living.settle(an_entry(1, "a:m", tokens=7))
    await wait_for_disk(folder, 1)
    write(folder, "dead", a_batch(1, an_entry(1, "b:m", tokens=5)))
    other: PoolClient = await join("other")

    async def is_replayed() -> bool:
        return not (folder / "default.dead").exists()

    await eventually(is_replayed)
    assert [(s.input, s.requests) for s in await totals(other)] == [(0, 0), (5, 1)]
    assert on_disk(folder, "living") == 1
    gate.open()
    assert await living.acknowledged(10)
    assert [(s.input, s.requests) for s in await totals(other)] == [(7, 1), (5, 1)]


async def test_attempts_that_were_counted_as_lost_are_corrected_by_the_replay(
    join: Join, gate: Gate, control: Any, folder: Path
) -> None:
    late: PoolClient = await join("late", through=gate)
    await late.raise_fence([a_definition()])
    answer = await late.select(a_selection(1, reserved=70))
    await gate.shut()
    late.settle(an_entry(1, answer[1], tokens=33))
    await late.close(timeout_s=0)
    assert on_disk(folder) == 1
    await control.zadd(keys.leases("default"), {"late": 1})
    other: PoolClient = await join("other", outbox_dir=None)

    async def is_reaped() -> bool:
        return [(s.requests, s.lost) for s in await totals(other)][:1] == [(1, 1)]

    await eventually(is_reaped)
    await join("next")
    await wait_until_empty(folder)
    state = (await totals(other))[0]
    assert (state.requests, state.lost, state.lost_tokens, state.input, state.in_flight) == (1, 0, 0, 33, 0)
    assert state.windows[0].tokens == 33


async def test_an_entry_made_before_the_window_opened_adds_to_totals_only(join: Join, folder: Path) -> None:
    one: PoolClient = await join("one")
    await one.raise_fence([a_definition()])
    await one.select(a_selection(1))
    now = time.monotonic()
    old, fresh = an_entry(1, "a:m", tokens=40), an_entry(2, "a:m", tokens=2)
    write(folder, "gone", a_batch(1, old, made_at=now - 400), a_batch(2, fresh, made_at=now))
    two: PoolClient = await join("two")
    await wait_until_empty(folder)
    state = (await totals(two))[0]
    assert (state.input, state.requests) == (42, 2)
    assert state.windows[0].tokens == 2


async def test_batches_that_the_store_has_lost_and_nobody_holds_are_skipped_and_counted(
    join: Join, folder: Path
) -> None:
    lost: list[int] = []
    write(folder, "gone", a_batch(5), a_batch(6), a_batch(9))
    pool: PoolClient = await join("w", lost=lost)
    await wait_until_empty(folder)
    assert [(s.requests, s.input) for s in await totals(pool)] == [(3, 30)]
    assert lost == [4, 2]


async def test_what_redis_may_have_forgotten_is_set_aside_and_not_replayed(
    join: Join, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost: list[int] = []
    week_ago = time.monotonic() - 7 * 86_400
    write(folder, "gone", a_batch(1, made_at=week_ago), a_batch(2, made_at=week_ago))
    pool: PoolClient = await join("w", lost=lost)

    async def is_gone() -> bool:
        return spill.folders(folder) == []

    await eventually(is_gone)
    assert names(folder) == ["default.gone.00000001.jsonl.old"]
    assert lost == [2]
    assert await totals(pool) == []
    assert "part of a spilled outbox is set aside" in caplog.messages


async def test_an_outbox_beyond_its_bound_lives_on_disk_and_arrives_whole(join: Join, gate: Gate, folder: Path) -> None:
    pool: PoolClient = await join("w", through=gate, outbox_max_entries=1000)
    await gate.shut()
    for number in range(1, 10_001):
        pool.settle(an_entry(number, SERVICES[number % 2], tokens=number))
    assert pool.outbox.is_full
    await wait_for_disk(folder, 10_000)

    async def is_within_bound() -> bool:
        return not pool.outbox.is_full

    await eventually(is_within_bound)
    assert len(pool.outbox) == 10_000
    gate.open()
    assert await pool.acknowledged(10)
    assert [(s.requests, s.input) for s in await totals(pool)] == [(5000, 25_005_000), (5000, 25_000_000)]
    await wait_for_disk(folder, 0)


@pytest.mark.parametrize(
    ("is_kept", "message"),
    [
        (True, "settled attempts wait on disk for the next process"),
        (False, "settled attempts were not acknowledged in time"),
    ],
)
async def test_a_drain_without_redis_says_what_becomes_of_the_settles(
    join: Join, gate: Gate, folder: Path, caplog: pytest.LogCaptureFixture, is_kept: bool, message: str
) -> None:
    pool: PoolClient = await join("w", through=gate, outbox_dir=folder if is_kept else None)
    await gate.shut()
    pool.settle(an_entry(1, "a:m"))
    pool.settle(an_entry(2, "a:m"))
    assert not await pool.close(timeout_s=0)
    (record,) = [record for record in caplog.records if record.getMessage().startswith("settled")]
    facts = record.facts  # type: ignore[attr-defined]
    assert (record.getMessage(), facts["entries"]) == (message, 2)
    assert is_kept or "BALANCER_OUTBOX_DIR" in facts["note"]
    assert on_disk(folder) == (2 if is_kept else 0)


async def test_a_pool_that_is_no_longer_configured_is_replayed_all_the_same(url: str, folder: Path) -> None:
    write(folder, "gone", a_batch(1))
    settings = config.load(environ={"BALANCER_OUTBOX_DIR": str(folder)})
    balance = Balance(url, settings)
    await balance.start()
    try:
        await wait_until_empty(folder)
        assert [view.services["a:m"].input for view in await balance.views()] == [10]
    finally:
        await balance.close()
