"""`balancer serve` as real processes: under load, killed, drained, adopted, badly started."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import msgspec
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from balancer.cli.accounts import FakeAccount
from balancer.store import embedded
from tests.actors import Upstream, openai_events
from tests.fleet.conftest import (
    LEASE_S,
    Asker,
    Fleet,
    Start,
    a_document,
    everyone_is_gone,
    idle_view,
    ours,
    pool_view,
    run_command,
    theirs,
    with_upstream,
)
from tests.store.conftest import eventually
from tests.store.test_embedded import is_gone

ROOT = Path(__file__).resolve().parents[2]
WHOLE = (11, 7)
"""Input and output that a scripted upstream reports at the end of a stream."""


class Held:
    """A scripted upstream that holds every stream after its first word until it is released."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.upstream = Upstream()
        self.upstream.streams(openai_events(3, WHOLE), gates={1: self.gate})

    async def first_word(self, asker: Asker) -> aiohttp.ClientResponse:
        """A stream that has begun and is held."""
        response: aiohttp.ClientResponse = await asker.post("held", stream=True)
        assert response.status == 200
        assert b"w0" in await response.content.readline()
        return response


async def is_whole(response: aiohttp.ClientResponse) -> bool:
    """Reads the rest of a stream; False when it broke off."""
    try:
        return b"[DONE]" in await response.read()
    except (aiohttp.ClientError, ConnectionError):
        return False


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    actor = Held()
    async with actor.upstream.running():
        yield actor


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    """A series' values by the values of its labels, in the order of the labels' names."""
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


async def is_refused(url: str) -> bool:
    """True when a new connection finds nobody."""
    host, _, port = url.removeprefix("http://").partition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
    except ConnectionError:
        return True
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return False


# -- load --------------------------------------------------------------------------------------------------------------


async def test_sdk_answers_are_whole_and_the_fleet_s_counters_are_the_accounts_own(
    start: Start, accounts: list[FakeAccount], store_url: str, environment: dict[str, str]
) -> None:
    fleet = await start("--redis", store_url, document=a_document(accounts))
    messages: Any = [{"role": "user", "content": "what about fleets?"}]

    async def chat(number: int, client: openai.AsyncOpenAI) -> object:
        more: Any = {"model": "chat", "messages": messages, "max_tokens": 20 + number}
        if number % 2:
            return (await client.chat.completions.create(**more)).choices[0].finish_reason
        chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **more)]
        return chunks[-1].choices[0].finish_reason

    async def claude(number: int, client: anthropic.AsyncAnthropic) -> object:
        more: Any = {"model": "claude", "messages": messages, "max_tokens": 20 + number}
        if number % 2:
            return (await client.messages.create(**more)).stop_reason
        async with client.messages.stream(**more) as stream:
            return (await stream.get_final_message()).stop_reason

    async with (
        openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="any", max_retries=0) as one,
        anthropic.AsyncAnthropic(base_url=fleet.url, api_key="any", max_retries=0) as two,
    ):
        answers = await asyncio.gather(*(ask for i in range(40) for ask in (chat(i, one), claude(i, two))))

    assert answers == ["stop", "end_turn"] * 40
    view = await idle_view(store_url)
    assert ours(view) == theirs(accounts)
    assert {rule: state.seq for rule, state in view.rules.items()} == {"chat": 40, "claude": 40}
    # A streak of 3 over two accounts is 3 over the whole fleet.
    assert {name: state.picks for name, state in view.services.items()} == {
        f"{name}-{style}:{style}-m": picks
        for style in ("openai", "anthropic")
        for name, picks in (("anna", 21), ("boris", 19))
    }
    _, out, _ = await run_command("get", "stats", "--output", "json", "--redis", store_url, environment=environment)
    (stats,) = msgspec.json.decode(out)
    told = {service["id"]: (service["requests"], service["input"], service["output"]) for service in stats["services"]}
    assert told == theirs(accounts)


# -- death of a worker -------------------------------------------------------------------------------------------------


async def test_a_killed_worker_breaks_only_its_own_streams_and_every_count_stays_exact(
    start: Start, accounts: list[FakeAccount], held: Held, store_url: str
) -> None:
    document = with_upstream(a_document(accounts), held.upstream.url)
    fleet = await start("--redis", store_url, document=document)
    async with fleet.askers(each=4) as askers:
        victim, other = askers
        chats = [asker.is_whole("chat", stream=i % 2 == 0) for i, asker in enumerate(askers[victim] + askers[other])]
        assert all(await asyncio.gather(*chats))
        streams = {pid: [await held.first_word(asker) for asker in some] for pid, some in askers.items()}

        async def are_counted_as_lost() -> bool:
            return (await pool_view(store_url)).services["held:up-model"].lost == 4

        os.kill(victim, signal.SIGKILL)

        counted = asyncio.create_task(eventually(are_counted_as_lost, LEASE_S + 5))
        assert not any(await asyncio.gather(*(is_whole(stream) for stream in streams[victim])))

        async def ask(number: int) -> bool:
            async with fleet.asker() as asker:
                style, model = (("openai", "chat"), ("anthropic", "claude"))[number % 2]
                return await asker.is_whole(model, style=style, stream=number % 4 < 2)

        assert all(await asyncio.gather(*(ask(number) for number in range(24))))
        held.gate.set()
        assert all(await asyncio.gather(*(is_whole(stream) for stream in streams[other])))
        (replaced,) = await fleet.logged("a worker was replaced")
        workers = await fleet.workers()
        await counted
        view = await idle_view(store_url)

    assert victim not in workers
    assert other in workers
    assert replaced["slot"] == fleet.entries("a worker has died")[0]["slot"]
    assert ours(view) == theirs(accounts)
    assert sum(state.lost for name, state in view.services.items() if not name.startswith("held:")) == 0
    ours_held = view.services["held:up-model"]
    assert (ours_held.requests, ours_held.lost, ours_held.failures) == (len(held.upstream.received), 4, 0)
    assert (ours_held.input, ours_held.output) == (4 * WHOLE[0], 4 * WHOLE[1])
    assert ours_held.lost_tokens > 0
    assert view.rules["held"].seq == 8


async def test_what_waits_in_a_dead_worker_s_socket_is_served_by_its_successor(
    start: Start, accounts: list[FakeAccount], store_url: str
) -> None:
    """Connections that the kernel has queued for a worker are answered, though it never lives to accept them."""
    fleet = await start("--redis", store_url, document=a_document(accounts))
    victim, other = await fleet.workers()
    host, _, port = fleet.url.removeprefix("http://").partition(":")
    os.kill(victim, signal.SIGSTOP)
    connections = [await asyncio.open_connection(host, int(port)) for _ in range(24)]
    for _, writer in connections:
        writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

    os.kill(victim, signal.SIGKILL)

    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(reader.read() for reader, _ in connections))
    for _, writer in connections:
        writer.close()
    states = [msgspec.json.decode(answer.partition(b"\r\n\r\n")[2]) for answer in answers]
    successor = next(iter((await fleet.workers()).keys() - {other}))
    assert {state["pid"] for state in states} == {other, successor}


async def test_a_worker_that_cannot_start_is_tried_ever_more_slowly_and_the_others_go_on(
    start: Start, accounts: list[FakeAccount], store_url: str, tmp_path: Path
) -> None:
    scripts, away = tmp_path / "lua", tmp_path / "away"
    scripts.symlink_to(ROOT / "lua")
    fleet = await start(
        "--redis", store_url, document=a_document(accounts), variables={"BALANCER_SCRIPTS_DIR": str(scripts)}
    )
    async with fleet.askers() as askers:
        victim, other = askers
        scripts.rename(away)
        os.kill(victim, signal.SIGKILL)

        failures = await fleet.logged("a worker cannot start", count=4)

        assert await askers[other][0].is_whole("chat")
        away.rename(scripts)
        await fleet.logged("a worker was replaced")
        assert other in await fleet.workers()
    times = [datetime.fromisoformat(entry["ts"]) for entry in failures]
    assert (times[3] - times[2]).total_seconds() >= 0.8
    assert "no Lua scripts" in fleet.entries("worker ended")[0]["reason"]


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_drained_fleet_finishes_open_streams_and_leaves_no_process(
    start: Start, accounts: list[FakeAccount], held: Held, tmp_path: Path, environment: dict[str, str]
) -> None:
    """SIGTERM: not ready, still serving for the delay, then closed to new connections; what is open ends whole."""
    data_dir = tmp_path / "data"
    document = with_upstream(a_document(accounts), held.upstream.url)
    fleet = await start("--data-dir", str(data_dir), document=document, variables={"BALANCER_DRAIN_DELAY_S": "1.5"})
    store = store_processes(data_dir)
    async with fleet.askers(each=2) as askers:
        streams = [await held.first_word(some[0]) for some in askers.values()]
        watchers = [some[1] for some in askers.values()]

        fleet.process.send_signal(signal.SIGTERM)
        await fleet.logged("draining")

        async def is_draining() -> bool:
            states = [await watcher.get("/readyz") for watcher in watchers]
            return all(status == 503 and msgspec.json.decode(text)["draining"] for status, text in states)

        await eventually(is_draining)
        async with fleet.asker() as late, late.post("chat") as response:
            assert (response.status, response.headers["Connection"]) == (200, "close")
        await eventually(lambda: is_refused(fleet.url))
        # An HTTP server that merely closes gives its handlers a second.
        await asyncio.sleep(2)
        held.gate.set()
        assert all(await asyncio.gather(*(is_whole(stream) for stream in streams)))

    assert await fleet.ended() == 0
    assert fleet.entries()[-1]["event"] == "stopped"
    await everyone_is_gone(store)


async def test_a_stream_that_outlasts_the_drain_is_broken_off_and_settled(
    start: Start, accounts: list[FakeAccount], held: Held, store_url: str
) -> None:
    document = with_upstream(a_document(accounts), held.upstream.url)
    fleet = await start("--redis", store_url, document=document, variables={"BALANCER_DRAIN_TIMEOUT_S": "0.5"})
    async with fleet.asker() as asker:
        stream = await held.first_word(asker)

        assert await fleet.stopped(signal.SIGINT) == 0

        assert not await is_whole(stream)
    async with asyncio.timeout(10):
        await held.upstream.hung_up.wait()
    state = (await pool_view(store_url)).services["held:up-model"]
    assert (state.picks, state.requests, state.lost, state.in_flight, state.reserved) == (1, 1, 0, 0, 0)


async def test_workers_of_a_killed_supervisor_finish_what_is_open_and_end_with_their_store(
    start: Start, accounts: list[FakeAccount], held: Held, tmp_path: Path, environment: dict[str, str]
) -> None:
    data_dir = tmp_path / "data"
    fleet = await start("--data-dir", str(data_dir), document=with_upstream(a_document(accounts), held.upstream.url))
    store = store_processes(data_dir)
    async with fleet.askers() as askers:
        streams = [await held.first_word(some[0]) for some in askers.values()]
        workers = set(askers)

        fleet.process.kill()

        assert await fleet.process.wait() == -signal.SIGKILL
        await eventually(lambda: is_refused(fleet.url))
        held.gate.set()
        assert all(await asyncio.gather(*(is_whole(stream) for stream in streams)))
    await everyone_is_gone(workers | store)


# -- two on one machine ------------------------------------------------------------------------------------------------


async def test_a_second_serve_adopts_the_embedded_store_and_outlives_the_first(
    start: Start, accounts: list[FakeAccount], tmp_path: Path, environment: dict[str, str]
) -> None:
    data_dir = tmp_path / "data"
    first = await start("--data-dir", str(data_dir), document=a_document(accounts), workers=1)
    second = await start("--data-dir", str(data_dir), workers=1)
    store = store_processes(data_dir)
    for fleet in (first, second, first, second):
        async with fleet.asker() as asker:
            assert await asker.is_whole("chat")

    assert await first.stopped() == 0

    async with second.asker() as asker:
        assert await asker.is_whole("chat")
        status, text = await asker.get("/readyz")
    state = msgspec.json.decode(text)
    assert (status, state["revision"], state["pools"]) == (200, 1, {"default": "ok"})
    assert not any(is_gone(pid) for pid in store)
    _, out, _ = await run_command(
        *("get", "stats", "--output", "json", "--data-dir", str(data_dir)), environment=environment
    )
    (stats,) = msgspec.json.decode(out)
    assert {s["id"]: (s["requests"], s["input"], s["output"]) for s in stats["services"] if s["picks"]} == theirs(
        accounts
    )
    assert stats["rules"][0] | {"uuid": "chat", "picks": 5, "streak": 2} == stats["rules"][0]
    assert await second.stopped() == 0
    await everyone_is_gone(store)


async def test_an_old_process_that_restarts_does_not_revert_the_fleet(
    start: Start, accounts: list[FakeAccount], store_url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    old, new = a_document(accounts), a_document(accounts, threshold=7)
    first = await start("--redis", store_url, document=old, workers=1)
    newer = tmp_path / "newer.yaml"
    newer.write_text(yaml.safe_dump(new), encoding="utf-8")
    status, out, err = await run_command("apply", str(newer), "--redis", store_url, environment=environment)
    assert (status, out.splitlines()[-1], err) == (0, "published as revision 2", "")

    second = await start("--redis", store_url, document=old, workers=1)

    (entry,) = second.entries("configuration file")
    assert entry["level"] == "warning"
    assert "ignored: this file was revision 1, and revision 2 is newer" in entry["outcome"]
    for fleet in (first, second):

        async def stands_on_2(fleet: Fleet = fleet) -> bool:
            async with fleet.asker() as asker:
                return bool(msgspec.json.decode((await asker.get("/readyz"))[1])["revision"] == 2)

        await eventually(stands_on_2)
    _, out, _ = await run_command("get", "rules", "--redis", store_url, environment=environment)
    assert [rule["lb_tactic"]["params"]["request_threshold"] for rule in yaml.safe_load(out)] == [7, 7]


async def test_a_fleet_is_ready_as_soon_as_a_configuration_is_applied_and_its_pools_are_open(
    start: Start, accounts: list[FakeAccount], store_url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    """The first requests to a pool that a worker had not opened yet were refused, as if Redis were away."""
    file = tmp_path / "late.yaml"
    document = a_document(accounts)

    async def applied(revision: int) -> None:
        """Publishes the document, and returns when the worker is ready on it."""
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        assert (await run_command("apply", str(file), "--redis", store_url, environment=environment))[0] == 0

        async def is_ready() -> bool:
            status, text = await asker.get("/readyz")
            return status == 200 and bool(msgspec.json.decode(text)["revision"] == revision)

        await eventually(is_ready)

    fleet = await start("--redis", store_url, workers=1)
    async with fleet.asker() as asker:
        assert (await asker.get("/healthz"))[0] == 200
        status, text = await asker.get("/readyz")
        assert (status, msgspec.json.decode(text)["ready"]) == (503, False)
        assert "no configuration has been published" in text
        async with asker.post("chat") as response:
            assert response.status == 503
        await applied(1)
        assert await asker.is_whole("chat")
        document["rules"][0]["pool"] = "another"
        await applied(2)
        assert await asker.is_whole("chat")


# -- metrics -----------------------------------------------------------------------------------------------------------


async def test_metrics_of_any_worker_speak_for_all_and_do_not_fall_when_one_is_replaced(
    start: Start, accounts: list[FakeAccount], store_url: str
) -> None:
    fleet = await start("--redis", store_url, document=a_document(accounts))

    async def ask_each(times: int, total: int) -> list[str]:
        """Asks every worker so often; then the metrics as each of them tells them, once it knows of what others did."""
        async with fleet.askers() as askers:
            for (asker,) in askers.values():
                for _ in range(times):
                    assert await asker.is_whole("chat", stream=True)

            async def know_all() -> bool:
                texts[:] = [(await asker.get("/metrics"))[1] for (asker,) in askers.values()]
                return all(counts_of(text) == (total, total, total) for text in texts)

            texts: list[str] = []
            await eventually(know_all)
            return texts

    for text in await ask_each(3, total=6):
        assert tokens_of(text) == Counter(input=sum_of(accounts)[1], output=sum_of(accounts)[2])
        assert samples(text, "balancer_in_flight_requests")["default", "anna-openai:openai-m"] == 0
        assert samples(text, "balancer_window_requests")["default", "anna-openai:openai-m", "300"] == 3
        assert samples(text, "balancer_current_service_index")["default", "chat"] == 1
        assert samples(text, "balancer_store_up") == {("default",): 1}
        assert samples(text, "balancer_config_revision") == {(): 1}
    os.kill(next(iter(await fleet.workers())), signal.SIGKILL)
    await fleet.logged("a worker was replaced")

    for text in await ask_each(2, total=10):
        assert tokens_of(text) == Counter(input=sum_of(accounts)[1], output=sum_of(accounts)[2])


def counts_of(text: str) -> tuple[float, float, float]:
    """Requests, picks and attempts of all labels."""
    names = ("balancer_requests_total", "balancer_picks_total", "balancer_attempts_total")
    requests, picks, attempts = (sum(samples(text, name).values()) for name in names)
    return requests, picks, attempts


def tokens_of(text: str) -> Counter[str]:
    """Tokens by kind."""
    found: Counter[str] = Counter()
    for labels, value in samples(text, "balancer_tokens_total").items():
        found[labels[0]] += int(value)
    return found


def sum_of(accounts: list[FakeAccount]) -> tuple[int, ...]:
    """Requests, input and output by the accounts' books."""
    return tuple(sum(column) for column in zip(*theirs(accounts).values(), strict=True))


async def test_metrics_move_to_a_port_of_their_own(start: Start, accounts: list[FakeAccount], store_url: str) -> None:
    port = a_free_port()
    fleet = await start("--redis", store_url, "--metrics-port", str(port), document=a_document(accounts), workers=1)
    async with fleet.asker() as asker:
        assert await asker.is_whole("chat")
        async with asker.session.get(f"http://127.0.0.1:{port}/metrics") as response:
            assert (response.status, counts_of(await response.text())) == (200, (1, 1, 1))
        assert (await asker.get("/metrics"))[0] == 404
        async with asker.session.get(f"http://127.0.0.1:{port}/v1/models") as response:
            assert response.status == 404


async def test_metrics_on_a_port_of_their_own_are_served_until_the_last_answer_has_ended(
    start: Start, accounts: list[FakeAccount], held: Held, store_url: str
) -> None:
    """They went with the data plane: a pod that drained was a target that is down, its last answers in no sum."""
    document = with_upstream(a_document(accounts), held.upstream.url)
    port = a_free_port()
    fleet = await start("--redis", store_url, "--metrics-port", str(port), document=document, workers=1)
    async with fleet.asker() as asker, aiohttp.ClientSession() as session:
        stream = await held.first_word(asker)
        fleet.process.send_signal(signal.SIGTERM)
        await eventually(lambda: is_refused(fleet.url))

        async def tells_that_it_drains() -> bool:
            async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                lines = (await response.text()).splitlines()
            return {"balancer_ready_workers 0.0", "balancer_open_requests 1.0"} <= set(lines)

        await eventually(tells_that_it_drains)
        held.gate.set()
        assert await is_whole(stream)
    assert await fleet.ended() == 0
    assert await is_refused(f"http://127.0.0.1:{port}")


def a_free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# -- bad starts --------------------------------------------------------------------------------------------------------


BAD_STARTS: dict[str, tuple[list[str], dict[str, str], str]] = {
    "no such file": (["--config", "absent.yaml"], {}, "cannot read absent.yaml: No such file or directory"),
    "no valid YAML": (["--config", "torn.yaml"], {}, "torn.yaml, line 2"),
    "faults": (["--config", "faulty.yaml"], {}, "rules[0].services[0].provider"),
    "a literal without a key": (["--config", "literal.yaml"], {}, "BALANCER_SECRET_KEY"),
    "no URL of a Redis": (["--redis", "http://127.0.0.1:1"], {}, "BALANCER_REDIS"),
    "Redis away": (["--redis", "redis://u:hunter2@127.0.0.1:1"], {}, "Redis does not answer"),
    "a setting of the wrong kind": ([], {"BALANCER_LEASE_S": "soon"}, "BALANCER_LEASE_S: expected a number"),
    "a flag of the wrong kind": (["--port", "http"], {}, "BALANCER_PORT: expected a whole number"),
    "all addresses without tokens": (["--host", "0.0.0.0"], {}, "BALANCER_CLIENT_TOKENS"),
    "no scripts": (["--config", "good.yaml"], {"BALANCER_SCRIPTS_DIR": "nowhere"}, "no Lua scripts in nowhere"),
}


@pytest.mark.parametrize("case", BAD_STARTS)
async def test_a_bad_start_is_one_message_and_a_status(
    case: str, environment: dict[str, str], store_url: str, tmp_path: Path
) -> None:
    arguments, variables, complaint = BAD_STARTS[case]
    document: dict[str, Any] = a_document([])
    document["providers"] = [{"name": "p", "api_base": "http://127.0.0.1:1", "token": "sk-literal-0123"}]
    (tmp_path / "literal.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    document["providers"][0]["token"] = "${UP_KEY}"
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    document["rules"][0]["services"] = [{"provider": "gone", "model": "m"}]
    (tmp_path / "faulty.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    (tmp_path / "torn.yaml").write_text("rules: [\n", encoding="utf-8")
    line = ["serve", "--redis", store_url, "--port", "0", *arguments]

    status, out, err = await run_command(*line, environment=environment | variables, cwd=tmp_path)

    assert (status, out) == (1, "")
    assert complaint in err
    assert len([text for text in err.splitlines() if text.startswith("balancer: ")]) == 1
    assert "Traceback" not in err
    assert "hunter2" not in err
    assert "sk-literal" not in err


async def test_a_port_in_use_is_named(environment: dict[str, str], store_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        status, out, err = await run_command(
            "serve", "--redis", store_url, "--port", str(port), environment=environment
        )
    assert (status, out) == (1, "")
    assert err == f"balancer: cannot listen on 127.0.0.1:{port}: Address already in use\n"


async def test_a_port_that_another_balancer_serves_is_in_use_too(
    start: Start, accounts: list[FakeAccount], store_url: str, environment: dict[str, str]
) -> None:
    """Its sockets may be shared between its own workers, not with a stranger that has another configuration."""
    fleet = await start("--redis", store_url, document=a_document(accounts), workers=1)
    port = fleet.url.rpartition(":")[2]
    line = ("serve", "--redis", store_url, "--port", port)
    status, out, err = await run_command(*line, environment=environment, timeout_s=10)
    assert (status, out) == (1, "")
    assert err == f"balancer: cannot listen on 127.0.0.1:{port}: Address already in use\n"


def store_processes(data_dir: Path) -> set[int]:
    """The embedded store's guardian and server, as somebody who adopts them for a moment sees them."""
    with embedded.acquire(data_dir) as hold:
        return {hold.guardian_pid, hold.server_pid}
