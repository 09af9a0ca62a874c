"""What smart routing may ask of a request: each fact found out when it is asked for, and once. No clock, no I/O.

OpenAI chat and responses, and Anthropic messages, are read alike. What cannot be read is absent, and says why: a
request that is wrong is the upstream's to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, Protocol

import msgspec

from balancer import lenient
from balancer.bodies import Peek
from balancer.domain import AgentMarkers, Service

_BYTES_PER_TOKEN = 4
_SYSTEM_ROLES = ("system", "developer")
_USER = "user"
_NULL = b"null"
_MARKERS = AgentMarkers()
# A part's type, as vendors spell it, and what the operation `type` calls it.
_KINDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "audio": "audio",
    "document": "document",
    "file": "document",
    "input_file": "document",
    "tool_result": "tool_result",
    "function_call_output": "tool_result",
    "custom_tool_call_output": "tool_result",
    "tool": "tool_result",
    "function": "tool_result",
}
CONTENT_KINDS = tuple(dict.fromkeys(_KINDS.values()))
_CALLS = ("function_call", "custom_tool_call")

AGENT_KINDS = ("main", "subagent", "compact")


class AbsentError(Exception):
    """A fact that the request does not give; the message says why, without a word of the prompt."""


class ToolUse(msgspec.Struct, frozen=True):
    """A tool that the model has called, and with what arguments, as JSON."""

    name: str
    arguments: str


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: Any = None
    input: Any = None


class _ToolCall(msgspec.Struct):
    function: _Function | None = None
    custom: _Function | None = None


class _Part(msgspec.Struct):
    type: str | None = None
    text: str | None = None
    thinking: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw(_NULL)
    content: Any = None
    """What a tool gave back: text, parts, or of a shape of the tool's own."""


class _Message(msgspec.Struct):
    """A message of any of the three dialects, or an item of a response's input.

    What calls and results hold differs from tool to tool: a screenshot must not hide all other facts.
    """

    role: str | None = None
    type: str | None = None
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None
    name: str | None = None
    arguments: Any = None
    input: Any = None
    output: Any = None


class _Thinking(msgspec.Struct):
    type: str = ""


class _Reasoning(msgspec.Struct):
    effort: str | None = None


_messages = msgspec.json.Decoder(list[_Message])
_input = msgspec.json.Decoder(str | list[_Message])
_system = msgspec.json.Decoder(str | list[_Part])
_text = msgspec.json.Decoder(str | None)
_thinking = msgspec.json.Decoder(_Thinking | None)
_reasoning = msgspec.json.Decoder(_Reasoning | None)


class Services(Protocol):
    """What is known of services, some seconds late; None where nothing is."""

    def first_token_ms(self, service: Service) -> int | None:
        """How long a service takes to its first token."""

    def used_percent(self, service: Service) -> int | None:
        """How much of what may be in flight on a service, or its provider, is: the larger part."""


class Facts:
    """The facts of one request. Each may raise AbsentError."""

    def __init__(
        self, peek: Peek, now: datetime, services: Services | None = None, markers: AgentMarkers = _MARKERS
    ) -> None:
        self._peek = peek
        self._markers = markers
        self.now = now
        """The time, in any zone."""
        self.services = services
        """What is known of services; None where nothing is."""

    @property
    def model(self) -> str:
        """The model that the client asks for."""
        return self._peek.model

    @cached_property
    def thinks(self) -> bool:
        """True when the client asks the model to think before it answers."""
        thinking = _read(_thinking, self._peek.raw_thinking, "thinking")
        if thinking is not None:
            return thinking.type in ("enabled", "adaptive")
        reasoning = _read(_reasoning, self._peek.raw_reasoning, "reasoning")
        effort = reasoning.effort if reasoning else _read(_text, self._peek.raw_reasoning_effort, "reasoning_effort")
        return effort not in (None, "", "none")

    @cached_property
    def system(self) -> str:
        """All system and developer texts, one a line."""
        texts = []
        if _is_given(self._peek.raw_system):
            texts.append(_joined(_read(_system, self._peek.raw_system, "system")))
        if _is_given(self._peek.raw_instructions):
            texts.append(_read(_text, self._peek.raw_instructions, "instructions") or "")
        texts += [_joined(message.content) for message in self._conversation if message.role in _SYSTEM_ROLES]
        return "\n".join(texts)

    @cached_property
    def user(self) -> str:
        """All texts of the user, one a line."""
        texts = (_joined(message.content) for message in self._conversation if _is_users(message))
        return "\n".join(text for text in texts if text)

    @cached_property
    def latest_user(self) -> str:
        """The text of the latest message. Absent when that is not the user's."""
        return _joined(self._latest_of_user().content)

    @cached_property
    def latest_kinds(self) -> tuple[str, ...]:
        """What the latest message holds, of CONTENT_KINDS. Absent when that is not the user's, nor a tool's result."""
        latest = self._latest
        if _is_of_a_tool(latest):
            return ("tool_result",)
        content = self._latest_of_user().content
        if isinstance(content, str):
            return ("text",)
        return tuple(dict.fromkeys(_KINDS[part.type] for part in content or () if part.type in _KINDS))

    @cached_property
    def tool_uses(self) -> tuple[ToolUse, ...]:
        """The tools that the model has called in its latest turn, when the request brings their results, or nothing."""
        uses: list[ToolUse] = []
        for message in reversed(self._conversation):
            if message.type in _CALLS:
                uses.append(ToolUse(message.name or "", _given_to(message)))
            elif message.role == "assistant":
                uses += reversed(list(_uses_of(message)))
                break
            elif uses or not _is_result(message):
                break
        return tuple(reversed(uses))

    @cached_property
    def tokens(self) -> int:
        """The prompt's estimated tokens: a quarter of the bytes of all texts, tool calls, their results, and tools."""
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in self._texts())
        tools = self._peek.raw_tools
        return (size + (len(bytes(tools)) if _is_given(tools) else 0)) // _BYTES_PER_TOKEN

    @cached_property
    def agent(self) -> str:
        """Which kind of request of Claude Code's this is, of AGENT_KINDS, by the words of its prompts."""
        system, markers = self.system, self._markers
        if markers.compact_marker in system or markers.compact_marker in self.user:
            return "compact"
        if markers.main_preamble not in system and markers.subagent_marker in system:
            return "subagent"
        return "main"

    @cached_property
    def _conversation(self) -> Sequence[_Message]:
        if _is_given(self._peek.raw_messages):
            messages: list[_Message] = _read(_messages, self._peek.raw_messages, "messages")
            return messages
        if _is_given(self._peek.raw_input):
            items: str | list[_Message] = _read(_input, self._peek.raw_input, "input")
            return [_Message(role=_USER, content=items)] if isinstance(items, str) else items
        return ()

    @property
    def _latest(self) -> _Message:
        if not self._conversation:
            raise AbsentError("there is no message")
        return self._conversation[-1]

    def _latest_of_user(self) -> _Message:
        if not _is_users(self._latest):
            raise AbsentError("the latest message is not the user's")
        return self._latest

    def _texts(self) -> Iterator[str]:
        if _is_given(self._peek.raw_system):
            yield from _texts_of(_read(_system, self._peek.raw_system, "system"))
        if _is_given(self._peek.raw_instructions):
            yield _read(_text, self._peek.raw_instructions, "instructions") or ""
        for message in self._conversation:
            yield from _texts_of(message.content)
            yield from _texts_of_result(message.output)
            yield _given_to(message)
            for use in _uses_of(message):
                yield use.arguments


def _is_given(raw: msgspec.Raw) -> bool:
    return bytes(raw) != _NULL


def _read(decoder: msgspec.json.Decoder[Any], raw: msgspec.Raw, name: str) -> Any:
    try:
        return lenient.decode(decoder, raw)
    except lenient.UNREADABLE as exc:
        raise AbsentError(f"`{name}` has a shape that is not known") from exc


def _is_users(message: _Message) -> bool:
    return message.role == _USER


def _is_result(message: _Message) -> bool:
    """True for a message that brings nothing but results of tools."""
    if _is_of_a_tool(message):
        return True
    content = message.content
    return isinstance(content, list) and bool(content) and all(part.type == "tool_result" for part in content)


def _is_of_a_tool(message: _Message) -> bool:
    return "tool_result" in (_KINDS.get(message.type or ""), _KINDS.get(message.role or ""))


def _uses_of(message: _Message) -> Iterator[ToolUse]:
    for call in message.tool_calls or ():
        function = call.function or call.custom
        if function is not None:
            yield ToolUse(function.name or "", _given_to(function))
    if isinstance(message.content, list):
        for part in message.content:
            if part.type == "tool_use":
                yield ToolUse(part.name or "", bytes(part.input).decode("utf-8", "replace"))


def _given_to(call: _Message | _Function) -> str:
    """What a tool is called with: the text as it is, what is no text as JSON."""
    given = call.arguments or call.input or ""
    return given if isinstance(given, str) else msgspec.json.encode(given).decode("utf-8", "replace")


def _joined(content: str | list[_Part] | None) -> str:
    """A message's own text: not what tools gave back."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if part.text)


def _texts_of(content: str | list[_Part] | None) -> Iterator[str]:
    """All texts, results of tools among them."""
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        yield part.text or part.thinking or ""
        yield from _texts_of_result(part.content)


def _texts_of_result(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        text = part.get("text") if isinstance(part, dict) else None
        if isinstance(text, str):
            yield text
