"""The access log's lines as bytes, and a writer whom nobody waits for."""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from balancer.access import AccessLog, Line, encoded, pieces, stamp


def a_line(request: str = "r1", **more: object) -> Line:
    fields = {
        "ts": stamp(0),
        "client": "",
        "method": "POST",
        "path": "/v1/messages",
        "status": 200,
        "outcome": "success",
        "duration_ms": 1.5,
        "bytes_in": 1,
        "bytes_out": 2,
        "attempts": 0,
        "is_stream": False,
    }
    return Line(request=request, **(fields | more))  # type: ignore[arg-type]


def test_a_line_is_json_without_what_says_nothing() -> None:
    (line,) = encoded([a_line(rule="gpt")]).splitlines()

    assert msgspec.json.decode(line) == {
        "event": "request",
        "ts": "1970-01-01T00:00:00.000+00:00",
        "request": "r1",
        "client": "",
        "method": "POST",
        "path": "/v1/messages",
        "status": 200,
        "outcome": "success",
        "duration_ms": 1.5,
        "bytes_in": 1,
        "bytes_out": 2,
        "attempts": 0,
        "stream": False,
        "rule": "gpt",
    }


def test_no_field_of_a_line_can_hold_more_than_a_name_or_a_number() -> None:
    kinds = {field.type for field in msgspec.structs.fields(Line)}
    assert kinds == {str, int, float, bool, float | None}
    assert not {"body", "headers", "query", "prompt", "token"} & set(Line.__struct_fields__)


@pytest.mark.parametrize("now", [0.0, 1_700_000_000.0, 1_700_000_000.9995, 1_799_999_999.123])
def test_a_stamp_is_the_time_in_milliseconds(now: float) -> None:
    told = datetime.fromtimestamp(int(now * 1000) / 1000, UTC).isoformat(timespec="milliseconds")
    assert stamp(now) == told


def test_a_name_that_is_no_text_costs_no_line() -> None:
    lines = encoded([a_line("a"), a_line("b", rule="\ud83d"), a_line("c")]).splitlines()

    assert [msgspec.json.decode(line)["request"] for line in lines] == ["a", "b", "c"]


@pytest.mark.parametrize("most_bytes", [1, 3, 4, 5, 6, 7, 9, 1000])
def test_pieces_are_whole_lines(most_bytes: int) -> None:
    data = b"a\nbb\nccccc\nd\n\nee\n"
    found = list(pieces(data, most_bytes))

    assert b"".join(found) == data
    assert all(piece.endswith(b"\n") for piece in found)
    assert all(len(piece) <= most_bytes or piece.count(b"\n") == 1 for piece in found)


async def test_lines_come_together_and_soon() -> None:
    read, write = os.pipe()
    log = AccessLog(write)
    for number in range(3):
        log.write(a_line(f"r{number}"))
    data = await asyncio.to_thread(os.read, read, 65536)
    await log.close(5)
    os.close(read)
    os.close(write)

    assert [msgspec.json.decode(line)["request"] for line in data.splitlines()] == ["r0", "r1", "r2"]


async def test_who_reads_slowly_loses_lines_and_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    read, write = os.pipe()
    log = AccessLog(write, most_bytes=100_000)
    for number in range(5000):
        log.write(a_line(f"r{number}"))
    log.flush()
    closing = asyncio.create_task(log.close(10))
    data = b""
    while log._given_bytes > len(data):
        data += await asyncio.to_thread(os.read, read, 65536)
    await closing
    os.close(read)
    os.close(write)
    kept = [msgspec.json.decode(line)["request"] for line in data.splitlines()]

    numbers = [int(request[1:]) for request in kept]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    assert 0 < len(kept) < 5000
    dropped = [record.__dict__["facts"]["lines"] for record in caplog.records if "were dropped" in record.message]
    assert sum(dropped) == 5000 - len(kept)
    assert len(dropped) <= 2


async def test_a_stdout_that_is_gone_ends_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    read, write = os.pipe()
    os.close(read)
    log = AccessLog(write)
    for _ in range(3):
        log.write(a_line())
        log.flush()
    await log.close(5)
    os.close(write)

    assert [record.message for record in caplog.records] == ["the access log ends: stdout cannot be written to"]


async def test_closing_does_not_wait_for_who_never_reads() -> None:
    read, write = os.pipe()
    log = AccessLog(write)
    for number in range(1000):
        log.write(a_line(f"r{number}"))
    async with asyncio.timeout(5):
        await log.close(0.05)
    os.close(read)  # Now the writing thread ends too.
    await asyncio.to_thread(log._writer.join, 5)
    os.close(write)


async def test_a_file_gets_all_lines(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        log = AccessLog(out.fileno())
        for number in range(1000):
            log.write(a_line(f"r{number}"))
        await log.close(5)

    lines = (tmp_path / "out").read_bytes().splitlines()
    assert [msgspec.json.decode(line)["request"] for line in lines] == [f"r{number}" for number in range(1000)]
