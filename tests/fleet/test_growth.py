"""The parts of `make growth`: figures, the clients' parser, and that what is linear, or leaks, is seen."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import redis

from balancer.bodies import estimate_tokens
from benchmarks.chaos.processes import size_of
from benchmarks.growth import crowd, leaks, scripts, upstream
from benchmarks.growth.figures import Part, Plot, Table, Verdict, growth, quantile, report, slope
from benchmarks.growth.inside import Lines, Marks, _is_request
from benchmarks.growth.path import Case, Seen, compared, linear
from benchmarks.growth.processes import Worker, a_document, publish
from tests import servers

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = scripts.Sizes(services=(2, 4), rules=(2, 4), pins=(10, 20), pools=(1, 2), holdings=(5, 700), calls=4)

# -- figures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "rise"),
    [
        ([(0.0, 5.0), (10.0, 25.0), (20.0, 45.0)], 2.0),
        ([(0.0, 1.0), (1.0, 0.0), (2.0, 1.0), (3.0, 0.0)], -0.2),
        ([(4.0, 7.0), (4.0, 9.0)], 0.0),
        ([], 0.0),
    ],
)
def test_a_slope_is_that_of_the_straight_line_nearest_to_all_points(
    points: list[tuple[float, float]], rise: float
) -> None:
    assert slope(points) == pytest.approx(rise)


def test_growth_compares_the_greatest_with_the_least_whatever_their_order() -> None:
    assert growth([(200.0, 30.0), (2.0, 10.0), (20.0, 90.0)]) == 3.0
    assert growth([(1.0, 0.0), (2.0, 1.0)]) == float("inf")


def test_a_quantile_of_nothing_is_0_and_the_last_one_is_the_greatest() -> None:
    assert quantile([], 0.5) == 0.0
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_a_report_names_every_bound_and_those_that_are_not_held() -> None:
    part = Part(
        title="Pins",
        text="Of sessions.",
        tables=(Table(columns=("pins", "µs"), rows=(("10", "3.5"),)),),
        plots=(Plot(name="pins", x="pins", y="µs", curves={}), Plot(name="undrawn", x="x", y="y", curves={})),
        verdicts=(
            Verdict(claim="a pin costs", figure=3.5, bound=3.5, unit="µs"),
            Verdict(claim="keys more", figure=1, bound=0),
        ),
        notes=("ten is few",),
    )

    text = report([part], "A run.", ["pins"])

    assert "1 of 2 bounds hold." in text
    assert "| a pin costs | 3.5 µs | 3.5 | yes |\n| keys more | 1 | 0 | NO |" in text
    assert "## Pins\n\nOf sessions.\n\n| pins | µs |\n|---|--:|\n| 10 | 3.5 |\n" in text
    assert "![µs against pins](growth-pins.svg)" in text
    assert "undrawn" not in text
    assert text.endswith("- ten is few\n")


# -- clients and upstream ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 4096])
async def test_an_answer_ends_with_its_length_or_its_last_chunk_however_it_is_cut(size: int) -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    stream = b"HTTP/1.1 201 Made\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n[DONE]\r\n0\r\n\r\n"
    ends = []
    for raw in (whole, stream):
        answer = crowd.Answer()
        for at in range(0, len(raw), size):
            assert not answer.ended.done()
            answer.feed(raw[at : at + size])
        ends.append((answer.begun.result(), answer.ended.result()[-13:]))
    assert ends == [(200, b"hello"), (201, b"[DONE]\r\n0\r\n\r\n")]


async def test_an_answer_that_breaks_off_fails_for_who_waits_and_stays_what_it_was_when_it_had_ended() -> None:
    cut, whole = crowd.Answer(), crowd.Answer()
    cut.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel")
    whole.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    for answer in (cut, whole):
        answer.breaks_off()
    assert cut.begun.result() == 200
    with pytest.raises(ConnectionResetError):
        await cut.ended
    assert whole.ended.result() == b""


async def test_the_upstream_answers_at_once_or_holds_a_stream_until_it_is_told_to_finish() -> None:
    actor = upstream.Upstream()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: upstream._Connection(actor), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client, holder = await crowd.connected(port), await crowd.connected(port)
    try:
        status, body = await client.ask(crowd.request("/v1/chat/completions", crowd.chat("m")))
        held = holder.send(crowd.request("/v1/chat/completions", crowd.chat("m", holds=True)))
        assert (status, await held.begun) == (200, 200)
        assert b'"prompt_tokens":11' in body
        assert not held.ended.done()
        await actor.finish()
        assert b"[DONE]" in await held.ended
        assert (actor.requests, actor.streams, actor.held) == (1, 1, [])
    finally:
        client.leave()
        holder.leave()
        server.close()
        await server.wait_closed()


async def test_turns_are_taken_by_each_number_once_and_no_more_at_a_time_than_told() -> None:
    done, at_work, most = [], 0, 0

    async def work(number: int) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0)
        at_work -= 1
        done.append(number)

    await crowd.in_turns(20, 3, work)
    assert (sorted(done), most) == (list(range(20)), 3)


# -- what is linear ----------------------------------------------------------------------------------------------------


def test_a_line_is_linear_when_it_runs_more_often_the_more_there_is() -> None:
    few = {"a": 2.0, "b": 5.0, "c": 1.0}
    many = {"a": 100.0, "b": 6.0, "c": 1.0, "d": 49.0}
    assert linear(few, many, 98) == {"a": 1.0, "d": 0.5}


def test_functions_that_are_linear_in_rules_are_not_told_again_for_pools() -> None:
    base = Seen(cpu_us={"chat": 1.0}, lines={"chat": {"m.py:f:7": 10.0, "m.py:g:1": 1.0}})
    more = {
        Case(rules=110): Seen(cpu_us={"chat": 9.0}, lines={"chat": {"m.py:f:7": 110.0, "m.py:f:8": 50.0}}),
        Case(rules=110, pools=101): Seen(cpu_us={"chat": 9.0}, lines={"chat": {"m.py:f:7": 110.0, "m.py:g:1": 201.0}}),
    }

    found = compared(base, more)

    assert [(each.place, each.lines, each.of, each.share) for each in found] == [
        ("m.py:g", (1,), "pools", 2.0),
        ("m.py:f", (7, 8), "rules", 1.5),
    ]


def test_lines_of_the_product_are_counted_for_requests_and_for_nothing_else() -> None:
    lines = Lines()
    before = sys.gettrace()
    try:
        lines.begin()
        estimate_tokens(b"background")
        _is_request.set(True)
        estimate_tokens(b"request")
        estimate_tokens(b"request")
        _is_request.set(False)
    finally:
        counts = lines.end()
        sys.settrace(before)
    assert counts
    assert "balancer/bodies.py:estimate_tokens" in {name.rpartition(":")[0] for name in counts}
    assert min(counts.values()) == 2  # A third time was none of a request.


def test_what_has_come_since_a_mark_is_told_by_type() -> None:
    class Leaked:
        """Of which nothing else has any."""

    marks = Marks()
    marks.mark()
    kept = [Leaked() for _ in range(7)]
    found = marks.since()
    assert [count for name, count in found.types.items() if name.endswith("Leaked")] == [len(kept)]
    assert (found.lines, found.traced_bytes) == ({}, 0)


# -- small runs --------------------------------------------------------------------------------------------------------


def test_every_question_to_the_scripts_is_answered_with_a_figure_for_each_size() -> None:
    questions = (scripts.by_services, scripts.by_rules, scripts.by_pins, scripts.by_pools, scripts.by_holdings)
    with servers.running("valkey-9") as url, redis.Redis.from_url(url) as client:
        parts = [question(client, SIZES) for question in questions]
    for part in parts:
        assert part.tables[0].rows
        assert part.verdicts
        assert all(y > 0 for plot in part.plots for points in plot.curves.values() for _, y in points)
    # Seven hundred of a dead worker are more than one call reaps.
    assert [row[-1] for row in parts[-1].tables[0].rows] == ["1", "2"]


async def test_requests_of_every_new_kind_get_the_status_that_they_should_and_leave_no_key_that_stays() -> None:
    made = 0

    def done() -> None:
        nonlocal made
        made += 1

    with servers.running("valkey-9") as url:
        actor = upstream.Upstream()
        server = await asyncio.get_running_loop().create_server(lambda: upstream._Connection(actor), "127.0.0.1", 0)
        raw = a_document(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", rules=2)
        raw["rules"][1]["session_affinity"] = 60
        await publish(url, raw)
        async with Worker.running(url) as worker:
            for kind in leaks.KINDS:
                await leaks._drive(worker.port, kind, 0, 10, done)
            size = await worker.size()
        keys = leaks._keys(url)
        server.close()
        await server.wait_closed()
    assert made == 10 * len(leaks.KINDS)
    assert size.blocks > 0
    assert (keys.kinds["pin"], keys.kinds["response"], keys.lasting) == (10, 10, 0)


def test_a_key_that_never_expires_is_found() -> None:
    with servers.running("valkey-9") as url, redis.Redis.from_url(url) as client:
        client.set("balancer:{p}:pin:1", "x", px=60_000)
        client.set("balancer:{p}:stray", "x")
        client.hset("balancer:{registry}:head", "revision", 1)
        assert leaks._keys(url) == leaks.Keys(kinds={"pin": 1, "registry": 1, "stray": 1}, lasting=1)


async def test_a_run_that_is_told_to_end_ends_all_that_it_has_started(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.growth", "--quick", "--only", "connected", "--into", str(tmp_path)),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    pid = process.pid

    def children() -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]

    async with asyncio.timeout(60):
        while len(started := children()) < 3:  # noqa: ASYNC110 - a server, an upstream and a worker of that process
            await asyncio.sleep(0.02)
        process.terminate()
        assert await process.wait() == 143
        # One that was just being started ends by itself, when it finds that nobody reads what it prints.
        while any(size_of(child) for child in started):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.02)
