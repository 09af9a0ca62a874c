"""Conversations in which anything is said, and any vendor comes next: each takes what is written for it.

Without the gateway: what a client asks is written for a vendor, which checks it, and its answer is given back to the
client, who goes on from there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from balancer.translation.answer import Echo
from balancer.translation.conversation import Target
from tests.actors import Received
from tests.translation.asked import CITY
from tests.vendors.chat import Chat
from tests.vendors.google import Google
from tests.vendors.messages import Messages
from tests.vendors.replies import Reply, Say, Think, Use
from tests.vendors.serving import KEY, Vendor

VENDORS: dict[str, tuple[str, str, str, Callable[[], Vendor]]] = {
    "claude": ("messages", "anthropic", "claude-opus-4-5", Messages),
    "opus": ("messages", "anthropic", "claude-opus-5-5", Messages),
    "gpt": ("chat", "openai/gpt", "gpt-5", Chat),
    "deepseek": ("chat", "openai/deepseek", "deepseek-v4", lambda: Chat(thinks=True)),
    "gemini": ("google", "google", "gemini-3-pro-preview", Google),
    "flash": ("google", "google", "gemini-2.5-flash", Google),
}
"""The API, who signs, the model, and the vendor."""
NAMES = {
    client: [name for name, (api, *_) in VENDORS.items() if api != client]
    for client in ("chat", "messages", "responses")
}
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12).filter(
    str.strip
)
THOUGHTS = st.builds(Think, WORDS | st.just(""), st.booleans())
CALLS = st.builds(Use, st.just("weather"), st.fixed_dictionaries({"city": WORDS}))
REPLIES = st.builds(
    lambda thoughts, said, calls: Reply(
        parts=(*thoughts, *said, *calls) if said or calls else (*thoughts, Say("Well."))
    ),
    st.lists(THOUGHTS, max_size=2),
    st.lists(st.builds(Say, WORDS), max_size=1),
    st.lists(CALLS, max_size=3),
)


def _module(api: str, name: str) -> Any:
    return importlib.import_module(f"balancer.translation.{api}.{name}")


class Talk:
    """A client's conversation, and the vendors."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.vendors = {name: make() for name, (*_, make) in VENDORS.items()}
        for number, vendor in enumerate(self.vendors.values()):
            vendor.number = number * 1000  # No two have an id in common.
        # Both sign as Google or Anthropic: what one of them signed, the other takes.
        for one, other in (("claude", "opus"), ("gemini", "flash")):
            self.vendors[other].signed = self.vendors[one].signed  # type: ignore[attr-defined]
        self.vendors["opus"].prefixes = self.vendors["claude"].prefixes  # type: ignore[attr-defined]
        self.said: list[Any] = [{"role": "user", "content": "Hi"}]

    @property
    def dropped(self) -> list[str]:
        """The thoughts that a vendor has left out, because they were changed, or what stands before them."""
        return [at for vendor in self.vendors.values() if isinstance(vendor, Messages) for at in vendor.dropped]

    def asks(self, name: str, reply: Reply) -> None:
        """Asks a vendor, which says this; and goes on with what it understood."""
        api, signer, model, _ = VENDORS[name]
        bodies: dict[str, dict[str, Any]] = {
            "chat": {"messages": self.said, "reasoning_effort": "high", "tools": [_tool("chat")]},
            "messages": {
                "messages": self.said,
                "max_tokens": 9000,
                "tools": [_tool("messages")],
                "thinking": {"type": "enabled", "budget_tokens": 4096},
            },
            "responses": {
                "input": self.said,
                "tools": [_tool("responses")],
                "reasoning": {"effort": "high", "summary": "auto"},
                "include": ["reasoning.encrypted_content"],
            },
        }
        asked = msgspec.json.encode({"model": "asked"} | bodies[self.client])
        conversation = _module(self.client, "reading").read_request(asked)
        target = Target(model=model, vendor=signer)
        written = _module(api, "writing").write_request(conversation, target)
        answer = _module(api, "answers").read_answer(self._answer(name, written.body, reply), target)
        echo = Echo(conversation=conversation, model="told", id=f"{len(self.said):016x}", created=1, vendor=signer)
        self._hear(msgspec.json.decode(_module(self.client, "answers").write_answer(answer, echo)), reply)

    def _answer(self, name: str, body: bytes, reply: Reply) -> bytes:
        api, _, model, _ = VENDORS[name]
        vendor = self.vendors[name]
        path = {
            "chat": "/v1/chat/completions",
            "messages": "/v1/messages",
            "google": f"/v1beta/models/{model}:generateContent",
        }[api]
        headers = (
            ("authorization", f"Bearer {KEY}"),
            ("anthropic-version", "2023-06-01"),
            ("anthropic-beta", "thinking-binding-controls-2026-08-01"),
            ("content-type", "application/json"),
        )
        vendor.received.append(Received(method="POST", target=path, headers=headers, body=body))
        asked = msgspec.json.decode(body)
        vendor.bodies.append(asked)
        vendor.number += 1
        vendor.check(vendor.last, asked)
        return vendor.whole(asked, reply).data

    def _hear(self, answer: Any, reply: Reply) -> None:
        """Takes the answer into the conversation, and gives what the tools give, or goes on asking."""
        calls: list[tuple[str, Any]]
        if self.client == "chat":
            message = {
                name: value for name, value in answer["choices"][0]["message"].items() if value not in (None, [])
            }
            self.said.append({"content": None} | message)
            calls = [(c["id"], msgspec.json.decode(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
            self.said += ({"role": "tool", "tool_call_id": id_, "content": "rain"} for id_, _ in calls)
        elif self.client == "messages":
            self.said.append({"role": "assistant", "content": answer["content"]})
            calls = [(block["id"], block["input"]) for block in answer["content"] if block["type"] == "tool_use"]
            results = [{"type": "tool_result", "tool_use_id": id_, "content": "rain"} for id_, _ in calls]
            self.said += [{"role": "user", "content": results}] if calls else []
        else:
            self.said += answer["output"]
            made = [item for item in answer["output"] if item["type"] == "function_call"]
            calls = [(item["call_id"], msgspec.json.decode(item["arguments"])) for item in made]
            self.said += ({"type": "function_call_output", "call_id": id_, "output": "rain"} for id_, _ in calls)
        assert [arguments for _, arguments in calls] == [p.arguments for p in reply.parts if isinstance(p, Use)]
        if not calls:
            self.said.append({"role": "user", "content": "And then?"})


def _tool(api: str) -> dict[str, Any]:
    made: dict[str, Any] = {"name": "weather", "description": "The weather."}
    return {
        "chat": {"type": "function", "function": made | {"parameters": CITY}},
        "messages": made | {"input_schema": CITY},
        "responses": {"type": "function"} | made | {"parameters": CITY, "strict": False},
    }[api]


@pytest.mark.parametrize("client", list(NAMES))
@settings(max_examples=40, deadline=None, phases=[Phase.generate, Phase.shrink])
@given(data=st.data())
def test_whoever_comes_next_takes_what_is_written_for_it(client: str, data: st.DataObject) -> None:
    talk = Talk(client)
    for name, reply in data.draw(st.lists(st.tuples(st.sampled_from(NAMES[client]), REPLIES), min_size=2, max_size=7)):
        talk.asks(name, reply)
    assert talk.dropped == []
