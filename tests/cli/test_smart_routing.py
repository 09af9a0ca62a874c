"""explain and models refresh, as a person runs them."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from tests.cli.conftest import Run, Write, a_document

LONG = {"position": "token", "operation": "ge", "value": 100}
POLITE = {"position": "user", "operation": "regex", "value": "(?i)please"}
ENTRY = {
    "uuid": "long",
    "description": "long and polite",
    "ops": [LONG, POLITE],
    "services": [{"provider": "up", "model": "big"}],
}
SMART: dict[str, Any] = {"smart_enabled": True, "smart_routing": [ENTRY]}
PROMPT = "word " * 100 + "canary"


def a_request(content: str, model: str = "gpt") -> str:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": content}]})


# -- explain -----------------------------------------------------------------------------------------------------------


def test_explain_tells_the_entry_and_what_each_op_found(run: Run, write: Write) -> None:
    config, request = write(a_document(**SMART)), write(a_request(f"{PROMPT} Please"), "request.txt")

    ran = run("explain", "--request", request, "--config", config)

    assert (ran.status, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "rule gpt, pool default",
        "  entry long: long and polite",
        "    token.ge 100: holds, found 128",
        "    user.regex (?i)please: holds, found 513 characters",
        "served by entry long: up:big",
        "estimated tokens: 128",
    ]


def test_explain_tells_why_an_entry_fails_and_no_word_of_the_prompt(run: Run, write: Write) -> None:
    config, request = write(a_document(**SMART)), write(a_request(PROMPT), "request.txt")

    ran = run("explain", "--request", request, "--config", config, "--output", "json", "--rule", "gpt")

    told = msgspec.json.decode(ran.out)
    assert [op["holds"] for op in told["considered"][0]["ops"]] == [True, False]
    assert (told["entry"], told["services"], told["estimated_tokens"]) == ("", ["up:m1", "up:m2"], 126)
    assert told["note"] == "no entry matches: the rule's own services serve"
    assert "canary" not in ran.out


def test_explain_reads_stdin_and_asks_the_configuration_that_stands(
    on_store: Run, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UP_KEY", "sk-x")
    assert on_store("apply", write(a_document(**SMART))).status == 0
    stdin = io.TextIOWrapper(io.BytesIO(a_request(f"please {PROMPT}").encode()))
    monkeypatch.setattr("sys.stdin", stdin)

    ran = on_store("explain", "--request", "-")

    assert (ran.status, ran.err) == (0, "")
    assert "served by entry long: up:big" in ran.out


@pytest.mark.parametrize(
    ("arguments", "request_text", "words"),
    [
        (("--rule", "nobody"), a_request("x"), "there is no rule with uuid 'nobody'"),
        ((), a_request("x", "other"), "no active rule of scenario openai has the request's model"),
        (("--scenario", "anthropic"), a_request("x"), "no active rule of scenario anthropic"),
        ((), "{", "the request's body is no valid JSON"),
        ((), "[]", "the request's body"),
        ((), '{"messages": []}', "model"),
    ],
)
def test_explain_says_what_is_wrong(
    run: Run, write: Write, arguments: tuple[str, ...], request_text: str, words: str
) -> None:
    config, request = write(a_document(**SMART)), write(request_text, "request.txt")

    ran = run("explain", "--request", request, "--config", config, *arguments)

    assert (ran.status, ran.out) == (1, "")
    assert words in ran.err


def test_explain_names_a_file_that_is_not_there(run: Run, write: Write) -> None:
    ran = run("explain", "--request", "/nowhere/at/all", "--config", write(a_document(**SMART)))
    assert ran.status == 1
    assert "cannot read /nowhere/at/all: No such file" in ran.err


@pytest.mark.parametrize(
    ("more", "note"),
    [({}, "the rule has no smart routing"), (SMART | {"smart_enabled": False}, "smart_enabled is false")],
)
def test_explain_says_why_no_entry_is_asked(run: Run, write: Write, more: dict[str, Any], note: str) -> None:
    config, request = write(a_document(**more)), write(a_request(PROMPT), "request.txt")
    ran = run("explain", "--request", request, "--config", config)
    assert "served by the rule itself: up:m1, up:m2" in ran.out
    assert note in ran.out


# -- models refresh ----------------------------------------------------------------------------------------------------


class Vendor:
    """A provider that lists models, page by page; what it was asked."""

    def __init__(self) -> None:
        self.pages: list[tuple[int, Any]] = [(200, {"object": "list", "data": [{"id": "m1"}, {"id": "m3"}]})]
        self.asked: list[tuple[str, dict[str, str]]] = []
        vendor = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                vendor.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                status, page = vendor.pages[min(len(vendor.asked), len(vendor.pages)) - 1]
                body = page if isinstance(page, bytes) else json.dumps(page).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    """A provider that answers."""
    vendor = Vendor()
    thread = threading.Thread(target=vendor.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield vendor
    vendor.server.shutdown()
    thread.join()
    vendor.server.server_close()


def applied(run: Run, write: Write, vendor: Vendor, monkeypatch: pytest.MonkeyPatch, **provider: Any) -> None:
    monkeypatch.setenv("UP_KEY", "sk-secret-1")
    document = a_document()
    document["providers"][0] |= {"api_base": vendor.url, "models": ["m1", "m2"]} | provider
    if provider.get("api_style") == "anthropic":
        document["rules"][0]["scenario"] = "anthropic"
    assert run("apply", write(document)).status == 0


def provider_of(run: Run) -> Any:
    (provider,) = msgspec.json.decode(run("get", "providers", "--output", "json").out)
    return provider


def test_models_are_fetched_with_the_providers_credential_and_published(
    on_store: Run, write: Write, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied(on_store, write, vendor, monkeypatch)
    ran = on_store("models", "refresh", "up")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.splitlines() == ["+ m3", "- m2", "up: 2 models, published as revision 2"]
    ((path, headers),) = vendor.asked
    assert (path, headers["authorization"]) == ("/v1/models", "Bearer sk-secret-1")
    provider = provider_of(on_store)
    assert provider["models"] == ["m1", "m3"]
    assert provider["last_updated"].endswith("Z")
    assert "sk-secret-1" not in ran.out
    # The file that was applied before is not published over it.
    again = on_store("apply", write(a_document_of(vendor)))
    assert "ignored: this file was revision 1, and revision 2 is newer" in again.out + again.err
    assert provider_of(on_store)["models"] == ["m1", "m3"]


def a_document_of(vendor: Vendor) -> dict[str, Any]:
    document = a_document()
    document["providers"][0] |= {"api_base": vendor.url, "models": ["m1", "m2"]}
    return document


def test_anthropics_list_is_read_page_by_page(
    on_store: Run, write: Write, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied(on_store, write, vendor, monkeypatch, api_style="anthropic")
    vendor.pages = [
        (200, {"data": [{"id": "a"}, {"id": "b"}], "has_more": True, "last_id": "b"}),
        (200, {"data": [{"id": "c"}, {"id": "b"}], "has_more": False, "last_id": "b"}),
    ]
    assert on_store("models", "refresh", "up").out.splitlines()[-1] == "up: 3 models, published as revision 2"
    assert [parse_qs(urlsplit(path).query) for path, _ in vendor.asked] == [
        {"limit": ["1000"]},
        {"limit": ["1000"], "after_id": ["b"]},
    ]
    assert {headers["x-api-key"] for _, headers in vendor.asked} == {"sk-secret-1"}
    assert all("anthropic-version" in headers for _, headers in vendor.asked)
    assert provider_of(on_store)["models"] == ["a", "b", "c"]


def test_googles_list_is_read_page_by_page_for_what_generates(
    on_store: Run, write: Write, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied(on_store, write, vendor, monkeypatch, api_style="google")
    generates, embeds = ["generateContent", "countTokens"], ["embedContent"]
    vendor.pages = [
        (
            200,
            {
                "models": [
                    {"name": "models/gemini-3-pro", "supportedGenerationMethods": generates},
                    {"name": "models/gemini-embedding", "supportedGenerationMethods": embeds},
                ],
                "nextPageToken": "t 1",
            },
        ),
        (200, {"models": [{"name": "tunedModels/mine", "supportedGenerationMethods": generates}]}),
    ]
    assert on_store("models", "refresh", "up").out.splitlines()[-1] == "up: 2 models, published as revision 2"
    assert [(urlsplit(path).path, parse_qs(urlsplit(path).query)) for path, _ in vendor.asked] == [
        ("/v1beta/models", {"pageSize": ["1000"]}),
        ("/v1beta/models", {"pageSize": ["1000"], "pageToken": ["t 1"]}),
    ]
    assert {headers["x-goog-api-key"] for _, headers in vendor.asked} == {"sk-secret-1"}
    assert provider_of(on_store)["models"] == ["gemini-3-pro", "tunedModels/mine"]


@pytest.mark.parametrize(
    ("status", "page", "words"),
    [
        (401, {"error": {"message": "bad key sk-secret-1"}}, "up answered 401 to /v1/models"),
        (200, b"<html>", "with no list of models"),
        (200, {"data": {"id": "x"}}, "with no list of models"),
        (200, {"data": [{"name": "x"}]}, "with no list of models"),
        (200, b"x" * (9 * 2**20), "with more than 8388608 bytes"),
    ],
)
def test_a_wrong_answer_is_told_and_changes_nothing(
    on_store: Run, write: Write, vendor: Vendor, monkeypatch: pytest.MonkeyPatch, status: int, page: Any, words: str
) -> None:
    applied(on_store, write, vendor, monkeypatch)
    vendor.pages = [(status, page)]
    ran = on_store("models", "refresh", "up")
    assert ran.status != 0
    assert words in ran.err
    assert "sk-secret-1" not in ran.err + ran.out
    assert provider_of(on_store)["models"] == ["m1", "m2"]


def test_pages_that_never_end_are_given_up(
    on_store: Run, write: Write, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied(on_store, write, vendor, monkeypatch, api_style="anthropic")
    vendor.pages = [(200, {"data": [], "has_more": True, "last_id": str(n)}) for n in range(60)]
    ran = on_store("models", "refresh", "up")
    assert ran.status != 0
    assert "more than 50 pages" in ran.err
    assert len(vendor.asked) == 50


def test_a_provider_that_is_not_there_or_does_not_answer_is_named(
    on_store: Run, write: Write, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nothing has been published yet" in on_store("models", "refresh", "up").err
    applied(on_store, write, vendor, monkeypatch, api_base="http://127.0.0.1:1")
    ran = on_store("models", "refresh", "down")
    assert (ran.status, ran.err) == (1, "balancer: there is no provider 'down' (known: up)\n")
    ran = on_store("models", "refresh", "up")
    assert ran.status != 0
    assert ran.err.startswith("balancer: ")
    assert "Traceback" not in ran.err


def test_a_refresh_gives_no_rule_a_new_revision(
    on_store: Run, write: Write, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from balancer.store import connection
    from balancer.store.registry import Registry

    async def revisions() -> tuple[int, int]:
        import os

        client = connection.client(os.environ["BALANCER_REDIS"])
        try:
            snapshot = await Registry(client).current()
        finally:
            await client.aclose()
        assert snapshot is not None
        return snapshot.revision, snapshot.rule_revision("gpt")

    import asyncio

    applied(on_store, write, vendor, monkeypatch)
    assert asyncio.run(revisions()) == (1, 1)
    assert on_store("models", "refresh", "up").status == 0
    assert asyncio.run(revisions()) == (2, 1)
