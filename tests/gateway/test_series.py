"""What a worker's metrics say of refusals, exemplars and retries, and that clients add nothing to them."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as text_string_to_open_families

from balancer.errors import REASONS, BalancerError, NoServiceError
from balancer.exposition import CLASSIC_TYPE, OPEN_TYPE, is_open_wanted
from balancer.metrics import BY_NAME
from tests.actors import Upstream, openai_events
from tests.gateway import wire
from tests.gateway.conftest import Serve, Served, a_document
from tests.gateway.pairs import counted, requests_total

OPEN = "application/openmetrics-text;version=1.0.0"
ODD = ("\0", "\x7f", "\n", "\\", '"', "{", "}", "é", "ﷺ", "\u202e", "💥", '{a="b"}', "..", "%00", "%2e%2e", "x" * 300)
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;"
    "escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
METHODS = (*("GET", "POST", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "PROPFIND") * 5, "BREW")
HEADERS = ("Authorization", "x-api-key", "x-request-id", "User-Agent", "anthropic-version", "traceparent")
STATUS_LINE = re.compile(rb"HTTP/1\.[01] [1-5][0-9]{2} ")
PATHS = ("/v1/chat/completions", "/v1/messages", "/tingly/openai/v1/responses", "/v1/models/", "/v1/responses/", "/")


async def scraped(gateway: Served, accept: str = "") -> tuple[str, str]:
    """The content type and the text of a scrape."""
    headers = {"Accept": accept} if accept else {}
    async with gateway.session.get(f"{gateway.url}/metrics", headers=headers) as response:
        assert response.status == 200
        return response.headers["Content-Type"], await response.text()


async def post(gateway: Served, path: str, body: bytes, token: str = "known") -> None:
    """A request with a client's token, which is refused."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    async with gateway.session.post(gateway.url + path, data=body, headers=headers) as response:
        assert 400 <= response.status < 500


def series_in(text: str) -> set[str]:
    """The names and labels of all series."""
    return {line.partition("} ")[0].partition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def open_families(text: str) -> list[Metric]:
    """The families of OpenMetrics, as the library reads them, which is strict."""
    families: Iterable[Metric] = text_string_to_open_families(text)  # type: ignore[no-untyped-call]
    return list(families)


# -- odd clients -------------------------------------------------------------------------------------------------------


def an_odd_request(rng: random.Random) -> bytes:
    """A request that no two clients would send alike: of what it says, some may be valid, and some is no UTF-8."""

    def odd() -> str:
        return "".join(rng.choice((*ODD, f"{rng.getrandbits(64):x}")) for _ in range(rng.randint(1, 3)))

    def plain() -> str:
        return "".join(char for char in odd() if char.isascii() and char.isprintable() and char != " ")

    method, path = rng.choice(METHODS), rng.choice(PATHS) + (plain() if rng.random() < 0.5 else "")
    body = b'{"model": "%b", "messages": []}' % odd().encode()
    if rng.random() < 0.2:
        body = rng.randbytes(20)
    if rng.random() < 0.05:
        method, path, body = (
            "POST",
            PATHS[0],
            b'{"model": "gpt", "messages": [], "%b": 1}' % plain().encode().hex().encode(),
        )
    kind = rng.choice(["application/json", "application/json", "text/x", "multipart/form-data"])
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", f"Content-Type: {kind}"]
    names = [name for name in (*HEADERS, f"x-{rng.getrandbits(32)}") if rng.random() < 0.3]
    lines += [f"{name}: " + "".join(char for char in odd() if char.isprintable()) for name in names]
    head = "\r\n".join(lines).encode()
    if rng.random() < 0.1:
        head += b"\r\nx-bytes: \xff\xfe"
    return head + b"\r\n\r\n" + body


async def send_all(gateway: Served, chunks: Iterable[Sequence[bytes]]) -> None:
    """Sends the requests of each chunk at once on one connection, and on new ones what is left when that closes."""
    for chunk in chunks:
        left = chunk
        while left:
            async with wire.a_line(gateway.url) as line:
                await line.send(b"".join(left), b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                await line.until_closed()
                left = left[max(1, len(STATUS_LINE.findall(bytes(line.held)))) :]


async def test_ten_thousand_odd_requests_add_no_series(gateway: Served, upstream: Upstream) -> None:
    """Models, paths, methods and headers are the clients'; labels are not. There are as many for each front."""
    rng = random.Random(7)
    odd = [an_odd_request(rng) for _ in range(5_000)]
    chunks = [odd[i : i + 10] for i in range(0, len(odd), 10)]
    for _ in range(25):  # Until the cursor has moved.
        async with gateway.chat() as response:
            assert response.status == 200
    await send_all(gateway, chunks[:200])
    before = series_in((await scraped(gateway))[1])
    async with asyncio.TaskGroup() as group:
        for begin in range(4):
            group.create_task(send_all(gateway, chunks[200 + begin :: 4]))
    _, text = await scraped(gateway)
    assert series_in(text) == before
    refusals = counted(gateway.gateway.metrics.refusals)
    assert sum(refusals.values()) > 3000
    assert {reason for _, reason in refusals} == {"bad_request", "not_found", "unknown_model", "unknown_path"}
    assert sum(counted(gateway.gateway.metrics.requests).values()) > 4000
    assert ("gpt", "success") in requests_total(gateway)


# -- refusals ----------------------------------------------------------------------------------------------------------


async def test_a_refusal_is_counted_by_its_reason(serve: Serve, upstream: Upstream) -> None:
    gateway = await serve(a_document(upstream.url), max_body_bytes=1000, client_tokens="known")
    await post(gateway, "/v1/chat/completions", b'{"model": "gpt"}', token="other")
    await post(gateway, "/v1/chat/completions", b'{"model": "made-up"}')
    await post(gateway, "/v1/messages", b'{"model": "made-up"}')
    await post(gateway, "/v1/messages", b"{")
    await post(gateway, "/v1/chat/completions", b" " * 1001)
    await post(gateway, "/nowhere", b"{}")
    async with gateway.session.get(
        f"{gateway.url}/v1/responses/resp_1", headers={"Authorization": "Bearer known"}
    ) as response:
        assert response.status == 404

    assert counted(gateway.gateway.metrics.refusals) == {
        ("openai", "unauthorized"): 1,
        ("openai", "unknown_model"): 1,
        ("anthropic", "unknown_model"): 1,
        ("anthropic", "bad_request"): 1,
        ("openai", "too_large"): 1,
        ("", "unknown_path"): 1,
        ("openai", "not_found"): 1,
    }
    assert sum(counted(gateway.gateway.metrics.requests).values()) == 7


async def test_what_is_picked_for_is_not_refused_and_a_second_attempt_is_a_retry(
    serve: Serve, upstream: Upstream
) -> None:
    document = a_document(upstream.url)
    document["providers"].append(document["providers"][0] | {"name": "down"})
    document["rules"][0]["services"].insert(0, {"provider": "down", "model": "down-model"})
    gateway = await serve(document)
    upstream.answers(500)
    async with gateway.chat() as response:
        assert response.status == 500

    assert counted(gateway.gateway.metrics.refusals) == {}
    assert counted(gateway.gateway.metrics.retries) == {("default", "gpt"): 1}


async def test_a_limit_refuses_and_is_told(serve: Serve, upstream: Upstream) -> None:
    document = a_document(upstream.url, limits={"rpm": 1})
    gateway = await serve(document)
    for status in (200, 429):
        async with gateway.chat() as response:
            assert response.status == status

    assert counted(gateway.gateway.metrics.refusals) == {("openai", "limited"): 1}
    lines = (await scraped(gateway))[1].splitlines()
    limit = 'pool="default",service="up:*",kind="rpm"'
    assert f"balancer_limit{{{limit}}} 1.0" in lines
    assert f"balancer_limit_used{{{limit}}} 1.0" in lines


def test_each_reason_is_a_word_and_there_are_few() -> None:
    def kinds(kind: type[BalancerError]) -> Iterable[type[BalancerError]]:
        yield kind
        for each in kind.__subclasses__():
            yield from kinds(each)

    reasons = {kind.reason for kind in kinds(BalancerError)} | {
        NoServiceError("no", cause=cause).reason for cause in ("inactive", "limited", "cooling", "broken", "tried")
    }
    assert reasons == set(REASONS)


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "is_open"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        (OPEN, True),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.7", False),
        ("application/openmetrics-text;version=1.0.0;q=0", False),
        ("application/openmetrics-text;version=1.0.0;q=none", False),
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
    ],
)
def test_openmetrics_is_for_who_asks_for_it(accept: str, is_open: bool) -> None:
    assert is_open_wanted([accept] if accept else []) == is_open


async def test_the_format_is_the_client_s_choice(gateway: Served) -> None:
    kind, text = await scraped(gateway)
    assert kind == CLASSIC_TYPE
    assert "# EOF" not in text
    kind, text = await scraped(gateway, OPEN)
    assert kind == OPEN_TYPE
    assert text.endswith("\n# EOF\n")


async def test_openmetrics_says_the_same_with_exemplars_that_name_the_decision(
    gateway: Served, upstream: Upstream
) -> None:
    decisions = []
    for is_stream in (False, True):
        if is_stream:
            upstream.streams(openai_events(3, (11, 7)))
        async with gateway.chat(stream=is_stream) as response:
            await response.read()
            decisions.append(response.headers["x-balancer-decision"])

    families = open_families((await scraped(gateway, OPEN))[1])
    exemplars: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            if sample.exemplar:
                assert set(sample.exemplar.labels) == {"decision"}
                exemplars.setdefault(family.name, set()).add(sample.exemplar.labels["decision"])
                if "le" in sample.labels:
                    assert sample.exemplar.value <= float(sample.labels["le"])
    assert exemplars.keys() == {
        family.name.removesuffix("_total") for family in BY_NAME.values() if family.has_exemplars
    }
    assert exemplars["balancer_time_to_first_token_seconds"] == {decisions[1]}
    assert exemplars["balancer_upstream_duration_seconds"] <= set(decisions)

    _, classic = await scraped(gateway)
    told = {line for line in classic.splitlines() if line.startswith(("balancer_attempts", "balancer_tokens"))}
    again = (await scraped(gateway, OPEN))[1].splitlines()
    assert told <= {line.partition(" # ")[0] for line in again}


@pytest.mark.needs("apt:prometheus")
async def test_promtool_finds_nothing_to_say_about_the_metrics(gateway: Served, upstream: Upstream) -> None:
    async with gateway.chat() as response:
        await response.read()
    promtool = shutil.which("promtool")
    assert promtool, "it is needed"
    _, text = await scraped(gateway)
    checking = await asyncio.create_subprocess_exec(
        promtool, "check", "metrics", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = await checking.communicate(text.encode())
    assert (checking.returncode, out.decode()) == (0, "")
