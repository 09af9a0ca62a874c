"""What docs/translation.md says of each field, held to the readers and writers that it tells of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from anthropic.types import message_create_params as messages_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as responses_params

from balancer import document
from balancer.domain import ApiStyle, Provider
from balancer.translation.answer import Stop
from balancer.translation.apis import ClientApi, client_api, is_native, service_api
from balancer.translation.chat import members
from balancer.translation.chat import models as chat_models
from balancer.translation.chat import reading as chat_reading
from balancer.translation.chat import shapes as chat_shapes
from balancer.translation.conversation import Conversation, UntranslatableError
from balancer.translation.google import ending as google_ending
from balancer.translation.google import models as google_models
from balancer.translation.messages import ending as messages_ending
from balancer.translation.messages import fields as messages_fields
from balancer.translation.messages import models as messages_models
from balancer.translation.messages import reading as messages_reading
from balancer.translation.responses import fields as responses_fields
from balancer.translation.responses import objects as responses_objects
from balancer.translation.responses import reading as responses_reading

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "translation.md").read_text(encoding="utf-8")
HEADINGS: Mapping[ClientApi, str] = {
    "chat": "## Chat completions: what a client asks for",
    "messages": "## Messages: what a client asks for",
    "responses": "## Responses: what a client asks for",
}
READERS: Mapping[ClientApi, Callable[[bytes], Conversation]] = {
    "chat": chat_reading.read_request,
    "messages": messages_reading.read_request,
    "responses": responses_reading.read_request,
}
LEAST: Mapping[ClientApi, Mapping[str, object]] = {
    "chat": {"model": "m", "messages": [{"role": "user", "content": "Hello"}]},
    "messages": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]},
    "responses": {"model": "m", "input": "Hello"},
}


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    table = PAGE.partition(f"\n{heading}\n")[2].partition("\n|")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in f"|{table}".splitlines()[2:]]


def code(cell: str) -> list[str]:
    """What stands there in code."""
    return re.findall(r"`([^`]+)`", cell)


def told(api: ClientApi) -> list[str]:
    """The fields of an API's table: what stands in brackets tells more of them."""
    return [name for row in rows(HEADINGS[api]) for name in code(re.sub(r"\(.*?\)", "", row[0]))]


class Taken:
    """Notes the top-level fields that a reader looks for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def note(self, holder: object, *names: str) -> None:
        """Notes fields of the request itself."""
        at = holder.path if isinstance(holder, members.Members) else getattr(holder, "at")  # noqa: B009 - of two classes
        if not at:
            self.names.update(names)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """What the readers take of requests from now on."""
    taken = Taken()

    def watch(kind: type, name: str) -> None:
        method = getattr(kind, name)

        def watched(holder: object, *arguments: object) -> object:
            taken.note(holder, *(one for one in arguments if isinstance(one, str)))
            return method(holder, *arguments)

        monkeypatch.setattr(kind, name, watched)

    watch(members.Members, "raw")
    watch(messages_fields.Fields, "take")
    watch(messages_fields.Fields, "drop")
    watch(responses_fields.Fields, "take")
    watch(responses_fields.Fields, "peek")
    return taken


@pytest.mark.parametrize("api", READERS)
def test_the_table_of_an_api_has_every_field_that_its_reader_knows_and_no_other(api: ClientApi, taken: Taken) -> None:
    READERS[api](msgspec.json.encode(LEAST[api]))
    assert sorted(told(api)) == sorted(taken.names)


@pytest.mark.parametrize(
    ("api", "params"),
    [
        ("chat", (chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming)),
        ("messages", (messages_params.MessageCreateParamsNonStreaming, messages_params.MessageCreateParamsStreaming)),
        ("responses", (responses_params.ResponseCreateParamsNonStreaming,)),
    ],
)
def test_every_field_of_the_official_sdk_is_told(api: ClientApi, params: Iterable[type]) -> None:
    named = set(told(api)) | set(
        code(PAGE.partition(HEADINGS[api])[2].partition("\nAny other field")[2].split("\n\n")[0])
    )
    asked = {name for each in params for base in each.__mro__ for name in getattr(base, "__annotations__", {})}
    assert asked - named == set()


ASKED: Mapping[ClientApi, Mapping[str, object]] = {
    "chat": {
        "audio": {"voice": "a", "format": "mp3"},
        "cache_control": {"type": "ephemeral"},
        "function_call": {"name": "f"},
        "functions": [{"name": "f"}],
        "logit_bias": {"1": 1},
        "logprobs": True,
        "metadata": {"a": "b"},
        "min_p": 0.1,
        "modalities": ["text", "audio"],
        "moderation": {"model": "m"},
        "n": 2,
        "prediction": {"type": "content", "content": "a"},
        "prompt_cache_key": "a",
        "prompt_cache_options": {"mode": "explicit"},
        "prompt_cache_retention": "24h",
        "repetition_penalty": 1.1,
        "service_tier": "flex",
        "store": True,
        "top_a": 0.1,
        "top_logprobs": 2,
        "usage": {"include": True},
        "verbosity": "low",
        "web_search_options": {},
    },
    "messages": {
        "anthropic_beta": ["a"],
        "anthropic_version": "a",
        "betas": ["a"],
        "billing_policy": "a",
        "cache_control": {"type": "ephemeral"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015"}]},
        "diagnostics": {"a": 1},
        "fallback_credit_token": "a",
        "fallbacks": ["a"],
        "service_tier": "auto",
        "speed": "fast",
        "user_profile_id": "a",
        "workspace_id": "a",
    },
    "responses": {
        "access_programs": ["a"],
        "background": True,
        "background_options": {"a": 1},
        "client_metadata": {"a": "b"},
        "context_management": [{"type": "compaction"}],
        "conversation": "a",
        "image": {"a": 1},
        "max_tool_calls": 1,
        "metadata": {"a": "b"},
        "moderation": {"model": "m"},
        "previous_response_id": "a",
        "prompt": {"id": "a"},
        "prompt_cache_key": "a",
        "prompt_cache_options": {"mode": "explicit"},
        "prompt_cache_retention": "24h",
        "service_tier": "flex",
        "stream_options": {"include_obfuscation": True},
        "top_logprobs": 2,
    },
}


def everywhere(api: ClientApi) -> list[list[str]]:
    """The rows of fields that no API carries."""
    nowhere = ("left out", "refused")
    table = [row for row in rows(HEADINGS[api]) if row[1].startswith(nowhere)]
    return [row for row in table if all(cell.startswith((*nowhere, "the same")) for cell in row[2:])]


@pytest.mark.parametrize(("api", "row"), [(api, row) for api in READERS for row in everywhere(api)])
def test_what_the_page_calls_refused_or_left_out_is(api: ClientApi, row: list[str]) -> None:
    for name in code(row[0]):
        body = msgspec.json.encode({**LEAST[api], name: ASKED[api][name]})
        if row[1].startswith("left out"):
            assert READERS[api](body).hints == (name,)
        else:
            with pytest.raises(UntranslatableError) as refused:
                READERS[api](body)
            assert refused.value.param == name


def test_the_reasons_to_stop_are_those_of_readers_and_writers() -> None:
    table = rows("## Why the model stopped")
    assert [row[0] for row in table] == list(get_args(Stop))
    for column, stops in enumerate((chat_shapes.STOPS, messages_ending.STOPS, google_ending.STOPS), start=1):
        assert {word: row[0] for row in table for word in code(row[column])} == dict(stops)
    for row in table:
        stop: Stop = msgspec.convert(row[0], Stop)
        status, reason = responses_objects.ending(stop, False)
        assert code(row[4]) == [chat_shapes.FINISHES[stop]]
        assert code(row[5]) == [messages_ending.REASONS[stop]]
        assert row[6] == (f"{status}, `{reason}`" if reason else status)


def test_efforts_are_as_many_tokens_as_the_page_says() -> None:
    head, line = re.findall(r"^\| (?:effort|tokens) \|(.*)\|$", PAGE, re.MULTILINE)
    efforts = dict(zip(code(head), (int(cell) for cell in line.split("|")), strict=True))
    assert efforts == dict(chat_models.EFFORT_TOKENS)
    assert efforts == {"none": 0, **messages_models.BUDGETS}
    assert efforts == {"none": 0, **google_models.BUDGETS}


def test_which_api_reaches_which_service_is_as_the_page_says() -> None:
    styles: list[tuple[ApiStyle, bool]] = [("openai", True), ("openai", False), ("anthropic", True), ("google", True)]
    table = rows("## Which APIs")
    assert len(table) == 4
    for row in table:
        api = client_api(paths[0].removeprefix("POST ")) if (paths := code(row[0])) else "other"
        expected = []
        for style, responses in styles:
            provider = Provider(uuid="a", name="a", api_base="https://a", api_style=style, responses=responses)
            if is_native(api, provider):
                expected.append("native")
            else:
                expected.append("–" if api == "other" else service_api(provider))
        assert row[1:] == expected


def test_the_configuration_that_it_shows_is_valid() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    reading = document.read(document.parse(shown), door="strict")
    assert reading.warnings == ()
    assert {provider.api_style for provider in reading.configuration.providers} == set(get_args(ApiStyle))
