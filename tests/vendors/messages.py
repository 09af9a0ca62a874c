"""Anthropic's Messages API, as its documentation and the types of its SDK 2.12 tell it (November 2026).

platform.claude.com/docs: api/messages, …/versioning, …/errors, build-with-claude/thinking, …/thinking-tool-workflows,
…/preserved-thinking, …/structured-outputs, …/prompt-caching, about-claude/models/migration-guide.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any, NotRequired

import msgspec
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase

from tests.actors import Received
from tests.vendors import schemas
from tests.vendors.replies import Event, Play, Reply, Say, Think, Tokens, Use, pieces
from tests.vendors.serving import KEY, RefusedError, Vendor
from tests.vendors.shapes import fault

STOPS = {
    "end": "end_turn",
    "length": "max_tokens",
    "tool": "tool_use",
    "stop_sequence": "stop_sequence",
    "filtered": "refusal",
    "refused": "refusal",
}
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_ID = re.compile(r"[a-zA-Z0-9_-]+")
_ONLY_BUDGETS = re.compile(r"claude-3|claude-(opus|sonnet|haiku)-4(-1|-5)?(-\d{8})?$")
"""Models that think by a budget only; those behind them adapt (4.6 takes both)."""
_TAKES_BOTH = re.compile(r"claude-(opus|sonnet)-4-6")
_HAS_EFFORT = re.compile(r"claude-opus-4-5")
_PRESERVES = re.compile(r"claude-(fable|mythos)-5-[1-9]|claude-(opus|sonnet|haiku)-5-5")
"""Models that take a thought back only behind the very prefix that it was thought behind."""
_IS_NEVER_FORCED = re.compile(r"claude-(fable|mythos)-5-[1-9]|claude-opus-5-5")


class _Body(MessageCreateParamsBase):
    stream: NotRequired[bool]


class _OldBody(_Body):
    """With what later versions of the API have no more."""

    temperature: NotRequired[float]
    top_p: NotRequired[float]
    top_k: NotRequired[int]


class Messages(Vendor):
    """Anthropic. It signs its thoughts, and takes back only those that it signed."""

    name = "anthropic"

    def __init__(self, play: Play | None = None) -> None:
        super().__init__(play)
        self.signed: dict[str, str] = {}
        self.prefixes: dict[str, bytes] = {}
        self.dropped: list[str] = []
        """The thoughts that it left out, because what stands before them is not what stood there."""

    # -- what it refuses -----------------------------------------------------------------------------------------------

    def counts(self, request: Received) -> bool:
        return request.target.partition("?")[0].endswith("/count_tokens")

    def streams_for(self, request: Received, body: Any) -> bool:
        return body.get("stream") is True

    def check(self, request: Received, body: Any) -> None:
        path = request.target.partition("?")[0]
        if request.method != "POST" or path not in ("/v1/messages", "/v1/messages/count_tokens"):
            raise RefusedError(f"Not found: {request.method} {request.target}", 404)
        if request.header("x-api-key") != KEY and request.header("authorization") != f"Bearer {KEY}":
            raise RefusedError("invalid x-api-key", 401)
        if not request.header("anthropic-version"):
            raise RefusedError("anthropic-version: header is required")
        if (request.header("content-type") or "").partition(";")[0] != "application/json":
            raise RefusedError("content-type: application/json is wanted")
        is_old = request.header("anthropic-version") == "2023-06-01"
        shaped = _without_betas(body, request.header("anthropic-beta") or "")
        _require(fault(shaped, MessageCountTokensParams if self.counts(request) else _OldBody if is_old else _Body))
        for rule in (_check_numbers, _check_thinking, _check_tools, _check_format, _check_cache):
            _require(rule(body))
        _require(_first(_text_faults(body.get("system", "x"), "system")))
        _require(_check_turns(body["messages"]))
        self._check_thoughts(body)

    def _check_thoughts(self, body: Any) -> None:
        """Only its own thoughts, unchanged; and with a budget, the tool loop's last turn begins with one."""
        for i, message in enumerate(body["messages"]):
            for j, block in enumerate(_blocks(message)):
                at = f"messages.{i}.content.{j}"
                if block["type"] == "thinking":
                    if block["signature"] not in self.signed:
                        raise RefusedError(f"{at}: Invalid `signature` in `thinking` block")
                    if self.signed[block["signature"]] != block["thinking"]:
                        raise RefusedError(f"{at}: `thinking` blocks cannot be modified")
                elif block["type"] == "redacted_thinking" and block["data"] not in self.signed:
                    raise RefusedError(f"{at}: Invalid `data` in `redacted_thinking` block")
                signature = block.get("signature") or block.get("data")
                is_thought = block["type"] in ("thinking", "redacted_thinking")
                if is_thought and _PRESERVES.match(body["model"]) and self.prefixes[signature] != _prefix(body, i):
                    binding = body.get("thinking", {}).get("block_binding", {})
                    if binding.get("prefix_mismatch_behavior") != "drop_block":
                        raise RefusedError(f"{at}: The block is bound to a different conversation.")
                    self.dropped.append(at)
        if (body.get("thinking") or {}).get("type") != "enabled":
            return
        *_, last = [None, *(m for m in body["messages"] if m["role"] == "assistant")]
        is_loop = any(block["type"] == "tool_result" for block in _blocks(body["messages"][-1]))
        if last is not None and is_loop and _blocks(last)[0]["type"] not in ("thinking", "redacted_thinking"):
            raise RefusedError(
                "messages: Expected `thinking` or `redacted_thinking`, but found another block. When `thinking` is "
                "enabled, a final `assistant` message must start with a thinking block."
            )

    # -- what it says --------------------------------------------------------------------------------------------------

    def _sign(self, thought: Think) -> str:
        signature = base64.b64encode(b"anthropic-%d" % len(self.signed)).decode()
        self.signed[signature] = thought.text
        body = self.bodies[-1]
        self.prefixes[signature] = _prefix(body, len(body["messages"]))
        return signature

    def _told(self, said: Reply, output: int | None = None) -> tuple[dict[str, Any], Tokens]:
        told = Tokens(
            input=said.input - said.cached - said.cache_creation,
            output=said.output if output is None else output,
            cached=said.cached,
            cache_creation=said.cache_creation,
            reasoning=0 if output is not None else said.reasoning,
        )
        usage: dict[str, Any] = {
            "input_tokens": told.input,
            "cache_creation_input_tokens": told.cache_creation,
            "cache_read_input_tokens": told.cached,
            "output_tokens": told.output,
        }
        if told.reasoning:
            usage["output_tokens_details"] = {"thinking_tokens": told.reasoning}
        return usage, told

    def _message(self, body: Any, content: list[Any], stop: str | None, said: Reply, usage: Any) -> dict[str, Any]:
        return {
            "id": f"msg_{self.number:024d}",
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": content,
            "stop_reason": stop,
            "stop_sequence": said.stop_sequence or None if stop else None,
            "usage": usage | {"service_tier": "standard"},
        }

    def _content(self, said: Reply) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for i, part in enumerate(said.parts):
            match part:
                case Say():
                    content.append({"type": "text", "text": part.text})
                case Think(is_redacted=True):
                    content.append({"type": "redacted_thinking", "data": self._sign(part)})
                case Think():
                    content.append({"type": "thinking", "thinking": part.text, "signature": self._sign(part)})
                case Use():
                    arguments = {"input": part.text} if part.text else part.arguments
                    id_ = f"toolu_{self.number:020d}_{i}"
                    content.append({"type": "tool_use", "id": id_, "name": part.name, "input": arguments})
        return content

    def whole(self, body: Any, said: Reply) -> Event:
        usage, told = self._told(said)
        message = self._message(body, self._content(said), STOPS[said.ending], said, usage)
        return Event(msgspec.json.encode(message), told)

    def events(self, body: Any, said: Reply) -> list[Event]:
        usage, told = self._told(said, 1)
        events = [
            Event(_event("message_start", message=self._message(body, [], None, said, usage)), told),
        ]
        for index, block in enumerate(self._content(said)):
            if index == 1:
                events.append(Event(b'event: ping\ndata: {"type": "ping"}\n\n'))
            events += (Event(data) for data in _block_events(index, block))
        usage, told = self._told(said)
        delta = {"stop_reason": STOPS[said.ending], "stop_sequence": said.stop_sequence or None}
        events.append(Event(_event("message_delta", delta=delta, usage=usage), told))
        return [*events, Event(_event("message_stop"))]

    def counted(self, body: Any) -> bytes:
        return b'{"input_tokens":%d}' % (100 * len(body["messages"]))

    def error(self, status: int, message: str) -> bytes:
        kind = ERRORS.get(status, "api_error")
        error = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
        return msgspec.json.encode(error)

    def broken(self, message: str) -> bytes:
        return _event("error", error={"type": "overloaded_error", "message": message or "Overloaded"})


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode({"type": name} | fields))


def _block_events(index: int, block: dict[str, Any]) -> Iterator[bytes]:
    def delta(kind: str, name: str, value: str) -> bytes:
        return _event("content_block_delta", index=index, delta={"type": kind, name: value})

    def begins(**change: Any) -> bytes:
        return _event("content_block_start", index=index, content_block=block | change)

    match block["type"]:
        case "text":
            yield begins(text="")
            for piece in pieces(block["text"]):
                yield delta("text_delta", "text", piece)
        case "thinking":
            yield begins(thinking="", signature="")
            for piece in pieces(block["thinking"]):
                yield delta("thinking_delta", "thinking", piece)
            yield delta("signature_delta", "signature", block["signature"])
        case "tool_use":
            yield begins(input={})
            yield delta("input_json_delta", "partial_json", "")
            for piece in pieces(msgspec.json.encode(block["input"]).decode()):
                yield delta("input_json_delta", "partial_json", piece)
        case _:
            yield begins()
    yield _event("content_block_stop", index=index)


def _without_betas(body: Any, betas: str) -> Any:
    """The request without what these betas add to the API."""
    if "context-management-2025-06-27" in betas:
        body = {name: value for name, value in body.items() if name != "context_management"}
    if "thinking-binding-controls-2026-08-01" in betas and "thinking" in body:
        thinking = {name: value for name, value in body["thinking"].items() if name != "block_binding"}
        body = body | {"thinking": thinking}
    return body


def _prefix(body: Any, count: int) -> bytes:
    """What stands before a message, in one form, and without marks for the cache."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items() if name != "cache_control"}
        return [plain(item) for item in value] if isinstance(value, list) else value

    messages = [[message["role"], plain(_blocks(message))] for message in body["messages"][:count]]
    return msgspec.json.encode([plain(body.get("system")), plain(body.get("tools")), messages], order="deterministic")


# -- rules -------------------------------------------------------------------------------------------------------------


def _require(found: str) -> None:
    if found:
        raise RefusedError(found)


def _first(faults: Iterator[str]) -> str:
    return next((found for found in faults if found), "")


def _blocks(message: Any) -> list[Any]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text_faults(content: Any, at: str) -> Iterator[str]:
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for i, block in enumerate(blocks):
        if block["type"] == "text" and not block["text"].strip():
            yield f"{at}.{i}: text content blocks must contain non-whitespace text"


def _has_no_sampling(model: str) -> bool:
    """From Claude Opus 4.7 on."""
    return not (_ONLY_BUDGETS.match(model) or _TAKES_BOTH.match(model))


def _check_numbers(body: Any) -> str:
    model = body["model"]
    if body.get("max_tokens", 1) < 1:
        return "max_tokens: must be greater than 0"
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is not None and not 0 <= temperature <= 1:
        return "temperature: range: 0..1"
    if top_p is not None and not 0 <= top_p <= 1:
        return "top_p: range: 0..1"
    for name in ("temperature", "top_p", "top_k"):
        if name in body and _has_no_sampling(model):
            return f"`{name}` is deprecated for this model."
    if temperature is not None and top_p is not None and not model.startswith(("claude-3", "claude-opus-4-2")):
        return "`temperature` and `top_p` cannot both be specified for this model. Please use only one."
    for stop in body.get("stop_sequences", ()):
        if not stop.strip():
            return "stop_sequences: each stop sequence must contain non-whitespace"
    return ""


def _check_thinking(body: Any) -> str:
    thinking = body.get("thinking") or {"type": "disabled"}
    model = body["model"]
    effort = (body.get("output_config") or {}).get("effort")
    if effort and _ONLY_BUDGETS.match(model) and not _HAS_EFFORT.match(model):
        return "This model does not support the effort parameter."
    if (body.get("tool_choice") or {}).get("type") in ("any", "tool") and _IS_NEVER_FORCED.match(model):
        return "tool_choice: forced tool use is not supported for this model"
    if thinking["type"] == "disabled":
        if "thinking" in body and (_IS_NEVER_FORCED.match(model) or "fable" in model or "mythos" in model):
            return '"thinking.type.disabled" is not supported for this model.'
        if "thinking" in body and model.startswith("claude-opus-5") and effort in ("xhigh", "max"):
            return "thinking: may not be disabled at this effort"
        return ""
    if thinking["type"] == "adaptive" and _ONLY_BUDGETS.match(model):
        return "adaptive thinking is not supported on this model"
    if thinking["type"] == "enabled":
        if _has_no_sampling(model):
            return '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive"'
        if thinking["budget_tokens"] < 1024:
            return "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024"
        if thinking["budget_tokens"] >= body.get("max_tokens", 1 << 60):
            return "`max_tokens` must be greater than `thinking.budget_tokens`"
        if (body.get("tool_choice") or {}).get("type") in ("any", "tool"):
            return "Thinking may not be enabled when tool_choice forces tool use."
    if body.get("temperature", 1) != 1:
        return "`temperature` may only be set to 1 when thinking is enabled"
    if "top_k" in body:
        return "`top_k` must be unset when thinking is enabled"
    if body.get("top_p", 1) < 0.95:
        return "`top_p` must be greater than or equal to 0.95 or unset when thinking is enabled"
    return ""


def _check_tools(body: Any) -> str:
    tools = body.get("tools") or []
    names = [tool["name"] for tool in tools]
    if len(set(names)) < len(names):
        return "tools: Tool names must be unique."
    for i, tool in enumerate(tools):
        if not _NAME.fullmatch(tool["name"]):
            return f"tools.{i}.custom.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'"
        schema = tool.get("input_schema")
        if schema is None:
            continue
        if schema.get("type") != "object":
            return f"tools.{i}.custom.input_schema.type: Input should be 'object'"
        if {"oneOf", "allOf", "anyOf"} & set(schema):
            return f"tools.{i}.custom.input_schema: oneOf, allOf, and anyOf are not supported at the top level"
        if tool.get("strict") and (found := schemas.anthropic(schema)):
            return f"tools.{i}.custom.input_schema: {found}"
    choice = body.get("tool_choice")
    if choice is not None:
        if not tools:
            return "tool_choice: may only be specified while providing tools"
        if choice["type"] == "tool" and choice["name"] not in names:
            return f"Tool '{choice['name']}' not found in provided tools"
    return ""


def _check_format(body: Any) -> str:
    wanted = (body.get("output_config") or {}).get("format")
    return f"output_config.format.schema: {found}" if wanted and (found := schemas.anthropic(wanted["schema"])) else ""


def _check_cache(body: Any) -> str:
    def marks(value: Any) -> int:
        if isinstance(value, dict):
            return ("cache_control" in value) + sum(map(marks, value.values()))
        return sum(map(marks, value)) if isinstance(value, list) else 0

    if (count := marks([body.get("system"), body["messages"], body.get("tools")])) > 4:
        return f"A maximum of 4 blocks with cache_control may be provided. Found {count}."
    return ""


def _check_turns(messages: list[Any]) -> str:
    if not messages:
        return "messages: at least one message is required"
    if messages[0]["role"] != "user":
        return 'messages: first message must use the "user" role'
    wanted: list[str] = []
    seen: set[str] = set()
    before = ""
    for i, message in enumerate(messages):
        at = f"messages.{i}"
        if message["role"] == before or message["role"] == "system":
            return f"{at}: roles must alternate between user and assistant"
        before = message["role"]
        blocks = _blocks(message)
        if not blocks and i < len(messages) - 1:
            return f"{at}: all messages must have non-empty content except for the optional final assistant message"
        if found := _first(_text_faults(message["content"], at)):
            return found
        if found := _check_blocks(blocks, at, message["role"]):
            return found
        given = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        if sorted(given) != sorted(wanted):
            return (
                f"{at}: `tool_use` ids were found without `tool_result` blocks immediately after, or the other way "
                f"round: {wanted} and {given}"
            )
        kinds = [block["type"] == "tool_result" for block in blocks]
        if kinds != sorted(kinds, reverse=True):
            return f"{at}: `tool_result` blocks come first in their message"
        wanted = [block["id"] for block in blocks if block["type"] == "tool_use"]
        if seen & set(wanted) or len(set(wanted)) < len(wanted):
            return f"{at}: `tool_use` ids must be unique"
        seen |= set(wanted)
    if wanted:
        return "messages: `tool_use` ids were found without `tool_result` blocks immediately after"
    return ""


def _check_blocks(blocks: list[Any], at: str, role: str) -> str:
    for j, block in enumerate(blocks):
        kind = block["type"]
        if kind in ("tool_use", "thinking", "redacted_thinking") and role != "assistant":
            return f"{at}.content.{j}: `{kind}` blocks can only be in `assistant` messages"
        if kind in ("tool_result", "image", "document") and role != "user":
            return f"{at}.content.{j}: `{kind}` blocks can only be in `user` messages"
        if kind == "tool_use" and not _ID.fullmatch(block["id"]):
            return f"{at}.content.{j}.tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'"
        if kind == "tool_result" and isinstance(block.get("content"), list):
            if found := _first(_text_faults(block["content"], f"{at}.content.{j}")):
                return found
            if found := _check_blocks(block["content"], f"{at}.content.{j}", role):
                return found
        if kind in ("image", "document") and (found := _check_source(block["source"], kind)):
            return f"{at}.content.{j}.{kind}.source: {found}"
    return ""


def _check_source(source: Any, kind: str) -> str:
    if source["type"] == "url":
        return "" if source["url"].startswith("https://") else "Only HTTPS URLs are supported."
    if source["type"] == "base64":
        wanted = {"application/pdf"} if kind == "document" else set(_IMAGES)
        if source["media_type"] not in wanted:
            return f"media_type: Input should be one of {sorted(wanted)}"
        try:
            base64.b64decode(source["data"], validate=True)
        except ValueError:
            return "data: Invalid base64"
    return ""
