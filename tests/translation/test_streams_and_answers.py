"""A vendor's answer is the same to a client whether it comes whole or as a stream, whatever the model says."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer import sse
from balancer.translation.answer import Echo
from balancer.translation.conversation import Target
from tests.actors import Received
from tests.translation.golden import ASKED
from tests.vendors.chat import Chat
from tests.vendors.google import Google
from tests.vendors.messages import Messages
from tests.vendors.replies import Reply, Said, Say, Think, Use
from tests.vendors.serving import Vendor

PAIRS = [
    (service, client)
    for service in ("chat", "messages", "google")
    for client in ("chat", "messages", "responses")
    if service != client
]
SIGNERS = {"chat": "openai/a", "messages": "anthropic", "google": "google"}
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
SAID = st.one_of(
    st.builds(Say, TEXTS),
    st.builds(Think, TEXTS),
    st.builds(Use, st.just("weather"), st.dictionaries(TEXTS, VALUES, max_size=3)),
)
REPLIES = st.builds(
    Reply,
    parts=st.lists(SAID, max_size=5).map(lambda said: tuple(_unlike(said))),
    stop=st.sampled_from(["", "length", "filtered"]),
    cached=st.integers(0, 100),
    reasoning=st.integers(0, 30),
)


def _unlike(said: Sequence[Said]) -> Sequence[Said]:
    """With no text or thought behind another: in a stream two of them cannot be told from one."""
    runs = [list(run) for _, run in groupby(said, type)]
    return [part for run in runs for part in (run if isinstance(run[0], Use) else run[:1])]


def _vendor(api: str) -> Vendor:
    vendors: dict[str, Callable[[], Vendor]] = {
        "chat": lambda: Chat(thinks=True),
        "messages": Messages,
        "google": Google,
    }
    vendor = vendors[api]()
    target = {
        "chat": "/v1/chat/completions",
        "messages": "/v1/messages",
        # Gemini 3 signs a text at its end, which in a stream is somewhere else.
        "google": "/v1beta/models/gemini-2.5-pro:generateContent",
    }[api]
    vendor.received.append(Received(method="POST", target=target, headers=(), body=b""))
    vendor.bodies.append({"model": "m", "messages": [], "stream_options": {"include_usage": True}})
    return vendor


def _module(api: str, name: str) -> Any:
    return importlib.import_module(f"balancer.translation.{api}.{name}")


@pytest.mark.parametrize(("service", "client"), PAIRS)
@settings(max_examples=30, deadline=None)
@given(said=REPLIES)
def test_a_stream_says_what_the_whole_answer_says(service: str, client: str, said: Reply) -> None:
    asked = msgspec.json.encode({"model": "asked", "stream": True} | ASKED[client])
    conversation = _module(client, "reading").read_request(asked)
    vendor = SIGNERS[service]
    echo = Echo(conversation=conversation, model="told", id="0123456789abcdef", created=1_795_000_009, vendor=vendor)
    target = Target(model="m", vendor=vendor)
    account = _vendor(service)
    answer = _module(service, "answers").read_answer(account.whole(account.bodies[0], said).data, target)
    whole = msgspec.json.decode(_module(client, "answers").write_answer(answer, echo))

    reader, writer = _module(service, "streams").StreamReader(target), _module(client, "streams").StreamWriter(echo)
    account = _vendor(service)
    parser, out = sse.Parser(), b""
    for event in account.events(account.bodies[0], said):
        for read in parser.feed(event.data):
            out += writer.write(reader.read(read))
    out += writer.write(reader.finish())
    events = [event.data for event in sse.Parser().feed(out) if event.data and event.data != b"[DONE]"]
    gathered = {"chat": _chat, "messages": _messages, "responses": _responses}[client](
        [msgspec.json.decode(event) for event in events]
    )
    assert gathered == {"chat": _of_chat, "messages": _of_messages, "responses": _of_responses}[client](whole)


# -- chat --------------------------------------------------------------------------------------------------------------


def _chat(chunks: list[Any]) -> Any:
    texts = {"content": "", "refusal": "", "reasoning_content": ""}
    details: dict[int, dict[str, Any]] = {}
    calls: dict[int, dict[str, Any]] = {}
    reason, usage = None, None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            delta = choice["delta"]
            reason = choice["finish_reason"] or reason
            for name in texts:
                texts[name] += delta.get(name) or ""
            for detail in delta.get("reasoning_details", ()):
                kept = details.setdefault(detail["index"], {"text": ""})
                kept |= detail | {"text": kept["text"] + detail.get("text", "")}
            for call in delta.get("tool_calls", ()):
                kept = calls.setdefault(call["index"], {"id": call.get("id"), "arguments": ""})
                kept["name"] = kept.get("name") or call["function"].get("name")
                kept["arguments"] += call["function"].get("arguments", "")
    return texts, _signed([details[i] for i in sorted(details)]), [calls[i] for i in sorted(calls)], reason, usage


def _signed(details: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The thoughts, without whose they are where nobody signed them: that is for those who sign."""
    return [
        {name: value for name, value in detail.items() if name not in ("signature", "format")}
        if detail.get("signature", ":").endswith(":")
        else detail
        for detail in details
        if detail.get("type") != "reasoning.encrypted" or detail.get("data")
    ]


def _of_chat(answer: Any) -> Any:
    message = answer["choices"][0]["message"]
    texts = {name: message.get(name) or "" for name in ("content", "refusal", "reasoning_content")}
    details = [{"text": ""} | detail for detail in message.get("reasoning_details", ())]
    calls = [{"id": call["id"]} | call["function"] for call in message.get("tool_calls") or ()]
    return texts, _signed(details), calls, answer["choices"][0]["finish_reason"], answer["usage"]


# -- messages ----------------------------------------------------------------------------------------------------------


def _messages(events: list[Any]) -> Any:
    blocks: list[dict[str, Any]] = []
    stop, usage = None, None
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            block, delta = blocks[event["index"]], event["delta"]
            kind = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}
            name = kind.get(delta["type"], "json")
            block[name] += delta["partial_json" if name == "json" else name]
        elif event["type"] == "message_delta":
            stop, usage = event["delta"]["stop_reason"], event["usage"]
    for block in blocks:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = msgspec.json.decode(text or "{}")
    return blocks, stop, usage


def _of_messages(answer: Any) -> Any:
    return answer["content"], answer["stop_reason"], answer["usage"]


# -- responses ---------------------------------------------------------------------------------------------------------


def _responses(events: list[Any]) -> Any:
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    return _of_responses(events[-1]["response"])


def _of_responses(answer: Any) -> Any:
    output = [{name: value for name, value in item.items() if name != "id"} for item in answer["output"]]
    return output, answer["status"], answer["incomplete_details"], answer["usage"]
