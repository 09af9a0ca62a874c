"""OpenAI's chat completions, as its documentation and the types of its SDK 3.54 tell them (November 2026).

developers.openai.com/api/docs: api-reference/chat, guides/reasoning, …/function-calling, …/structured-outputs.
With `thinks` it is one of those that speak the same API and show their reasoning, as DeepSeek's documentation has it
(api-docs.deepseek.com/guides/thinking_mode): `reasoning_content`, which it wants back beside every call of a tool. That
it may be empty there is what other models' calls need (deepseek-ai/deepseek-harness, discussion 739).
"""

from __future__ import annotations

import base64
import re
from typing import Any, NotRequired

import msgspec
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from tests.actors import Received
from tests.vendors import schemas
from tests.vendors.replies import Event, Play, Reply, Say, Think, Tokens, Use, pieces
from tests.vendors.serving import KEY, RefusedError, Vendor
from tests.vendors.shapes import fault

STOPS = {
    "end": "stop",
    "length": "length",
    "tool": "tool_calls",
    "stop_sequence": "stop",
    "filtered": "content_filter",
    "refused": "stop",
}
ERRORS = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "unsupported_country_region_territory"),
    404: ("invalid_request_error", "model_not_found"),
    429: ("requests", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", None),
}
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_REASONS = re.compile(r"o[1-9]|gpt-[5-9]")
_MOST_ID = 40
_MOST_STOPS = 4


class _Base(CompletionCreateParamsBase):
    stream: NotRequired[bool | None]


class Chat(Vendor):
    """OpenAI, or with `thinks` a vendor whose models show what they think."""

    name = "openai"

    def __init__(self, play: Play | None = None, *, thinks: bool = False) -> None:
        super().__init__(play)
        self.thinks = thinks
        self.thoughts: set[str] = set()

    # -- what it refuses -----------------------------------------------------------------------------------------------

    def counts(self, request: Received) -> bool:
        return False

    def streams_for(self, request: Received, body: Any) -> bool:
        return body.get("stream") is True

    def check(self, request: Received, body: Any) -> None:
        if request.method != "POST" or request.target != "/v1/chat/completions":
            raise RefusedError(f"Invalid URL ({request.method} {request.target})", 404)
        if request.header("authorization") != f"Bearer {KEY}":
            raise RefusedError("Incorrect API key provided.", 401)
        if (request.header("content-type") or "").partition(";")[0] != "application/json":
            raise RefusedError("Unsupported content type")
        shaped = body
        if self.thinks:
            shaped = body | {"messages": [self._without_thoughts(m, i) for i, m in enumerate(body["messages"])]}
        _require(fault(shaped, _Base))
        if body.get("reasoning_effort") is not None and not (self.thinks or _REASONS.match(body["model"])):
            raise RefusedError("Unrecognized request argument supplied: reasoning_effort")
        for rule in (_check_numbers, _check_tools, _check_format, _check_turns):
            _require(rule(body))

    def _without_thoughts(self, message: Any, number: int) -> Any:
        thought = message.get("reasoning_content")
        if thought and (message["role"] != "assistant" or thought not in self.thoughts):
            raise RefusedError(f"messages[{number}].reasoning_content: not what this model thought")
        if thought is None and message.get("tool_calls"):
            raise RefusedError(f"Missing reasoning_content field in the assistant message at message index {number}.")
        return {name: value for name, value in message.items() if name != "reasoning_content"}

    # -- what it says --------------------------------------------------------------------------------------------------

    def _usage(self, said: Reply) -> tuple[dict[str, Any], Tokens]:
        told = Tokens(input=said.input, output=said.output, cached=said.cached, reasoning=said.reasoning)
        usage = {
            "prompt_tokens": said.input,
            "completion_tokens": said.output,
            "total_tokens": said.input + said.output,
            "prompt_tokens_details": {"cached_tokens": said.cached, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": said.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }
        return usage, told

    def _calls(self, body: Any, said: Reply) -> list[dict[str, Any]]:
        customs = {tool["custom"]["name"] for tool in body.get("tools") or () if tool["type"] == "custom"}
        calls = []
        for i, part in enumerate(part for part in said.parts if isinstance(part, Use)):
            call: dict[str, Any] = {"id": f"call_{'d' if self.thinks else 'o'}{self.number:020d}_{i:02d}"}
            if part.name in customs:
                calls.append(call | {"type": "custom", "custom": {"name": part.name, "input": part.text}})
            else:
                arguments = msgspec.json.encode({"input": part.text} if part.text else part.arguments).decode()
                calls.append(call | {"type": "function", "function": {"name": part.name, "arguments": arguments}})
        return calls

    def _thought(self, said: Reply) -> str:
        thought = "".join(part.text for part in said.parts if isinstance(part, Think)) if self.thinks else ""
        if thought:
            self.thoughts.add(thought)
        return thought

    def whole(self, body: Any, said: Reply) -> Event:
        usage, told = self._usage(said)
        text = "".join(part.text for part in said.parts if isinstance(part, Say))
        message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None, "annotations": []}
        if said.ending == "refused":
            message |= {"content": None, "refusal": text}
        if thought := self._thought(said):
            message["reasoning_content"] = thought
        if calls := self._calls(body, said):
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": STOPS[said.ending]}
        return Event(msgspec.json.encode(self._completion(body, "chat.completion", [choice]) | {"usage": usage}), told)

    def _completion(self, body: Any, kind: str, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.number:029d}",
            "object": kind,
            "created": 1_795_000_000,
            "model": body["model"],
            "choices": choices,
            "service_tier": "default",
            "system_fingerprint": "fp_0123456789",
        }

    def events(self, body: Any, said: Reply) -> list[Event]:
        wants_usage = (body.get("stream_options") or {}).get("include_usage") is True

        def chunk(delta: dict[str, Any], reason: str | None = None) -> Event:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            head = self._completion(body, "chat.completion.chunk", [choice])
            return Event(_event(head | ({"usage": None} if wants_usage else {})))

        events = [chunk({"role": "assistant", "content": "", "refusal": None})]
        events += (chunk({"content": None, "reasoning_content": piece}) for piece in pieces(self._thought(said)))
        for part in said.parts:
            if isinstance(part, Say):
                name = "refusal" if said.ending == "refused" else "content"
                events += (chunk({name: piece}) for piece in pieces(part.text))
        for i, call in enumerate(self._calls(body, said)):
            kind = call["type"]
            field = "input" if kind == "custom" else "arguments"
            events.append(chunk({"tool_calls": [{"index": i} | call | {kind: call[kind] | {field: ""}}]}))
            for piece in pieces(call[kind][field]):
                events.append(chunk({"tool_calls": [{"index": i, kind: {field: piece}}]}))
        events.append(chunk({}, STOPS[said.ending]))
        if wants_usage:
            usage, told = self._usage(said)
            events.append(Event(_event(self._completion(body, "chat.completion.chunk", []) | {"usage": usage}), told))
        return [*events, Event(b"data: [DONE]\n\n")]

    def error(self, status: int, message: str) -> bytes:
        kind, code = ERRORS.get(status, ("server_error", None))
        return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})

    def broken(self, message: str) -> bytes:
        error = {"message": message or "The server had an error", "type": "server_error", "param": None, "code": None}
        return _event({"error": error})


def _event(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(data)


# -- rules -------------------------------------------------------------------------------------------------------------


def _require(found: str) -> None:
    if found:
        raise RefusedError(found)


def _check_numbers(body: Any) -> str:
    for name, least, most in (("temperature", 0, 2), ("top_p", 0, 1), ("presence_penalty", -2, 2)):
        if body.get(name) is not None and not least <= body[name] <= most:
            return f"Invalid '{name}': out of range."
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        return "max_tokens and max_completion_tokens are not both supported."
    if _REASONS.match(body["model"]):
        if body.get("max_tokens") is not None:
            return "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        for name in ("temperature", "top_p"):
            if body.get(name) not in (None, 1):
                return f"Unsupported value: '{name}' does not support {body[name]} with this model."
        if body.get("stop") is not None:
            return "Unsupported parameter: 'stop' is not supported with this model."
    stop = body.get("stop")
    if isinstance(stop, list) and len(stop) > _MOST_STOPS:
        return "Invalid 'stop': array too long."
    if body.get("stream_options") is not None and body.get("stream") is not True:
        return "The 'stream_options' parameter is only allowed when 'stream' is enabled."
    return ""


def _check_tools(body: Any) -> str:
    tools = body.get("tools")
    if tools is not None and not tools:
        return "Invalid 'tools': empty array. Expected an array with minimum length 1, but got an empty array instead."
    if not tools:
        for name in ("tool_choice", "parallel_tool_calls"):
            if body.get(name) is not None:
                return f"Invalid value for '{name}': '{name}' is only allowed when 'tools' are specified."
        return ""
    names = []
    for i, tool in enumerate(tools):
        made = tool[tool["type"]]
        names.append(made["name"])
        if not _NAME.fullmatch(made["name"]):
            return f"Invalid 'tools[{i}].function.name': string does not match pattern '^[a-zA-Z0-9_-]+$'."
        schema = made.get("parameters")
        if schema is not None and schema.get("type") != "object":
            return f"Invalid schema for function '{made['name']}': schema must be a JSON Schema of 'type: \"object\"'."
        if made.get("strict") and (found := schemas.openai(schema)):
            return f"Invalid schema for function '{made['name']}': {found}"
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice["type"] != "allowed_tools" and choice[choice["type"]]["name"] not in names:
        return "Tool choice 'function' not found in 'tools' parameter."
    return ""


def _check_format(body: Any) -> str:
    wanted = body.get("response_format") or {"type": "text"}
    if wanted["type"] == "json_object" and "json" not in str(body["messages"]).lower():
        return "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'."
    if wanted["type"] == "json_schema":
        made = wanted["json_schema"]
        if not _NAME.fullmatch(made["name"]):
            return "Invalid 'response_format.json_schema.name'."
        if made.get("strict") and (found := schemas.openai(made.get("schema"))):
            return f"Invalid schema for response_format '{made['name']}': {found}"
    return ""


def _check_turns(body: Any) -> str:
    if not body["messages"]:
        return "Invalid 'messages': empty array."
    wanted: list[str] = []
    for i, message in enumerate(body["messages"]):
        at = f"messages[{i}]"
        if message["role"] == "tool":
            if message["tool_call_id"] not in wanted:
                return f"{at}: messages with role 'tool' must be a response to a preceding message with 'tool_calls'."
            wanted.remove(message["tool_call_id"])
            continue
        if wanted:
            return (
                f"{at}: An assistant message with 'tool_calls' must be followed by tool messages responding to each "
                f"'tool_call_id': {wanted}"
            )
        calls = message.get("tool_calls")
        if message["role"] == "assistant":
            if calls is not None and not calls:
                return f"Invalid '{at}.tool_calls': empty array."
            if message.get("content") is None and not calls and message.get("refusal") is None:
                return f"Invalid value for 'content' of {at}: expected a string, got null."
        for j, call in enumerate(calls or ()):
            if len(call["id"]) > _MOST_ID:
                return f"Invalid '{at}.tool_calls[{j}].id': string too long. Expected a maximum length of 40."
            wanted.append(call["id"])
        if len(set(wanted)) < len(wanted):
            return f"{at}: duplicate tool call ids"
        if isinstance(message.get("content"), list) and (found := _check_parts(message["content"], at)):
            return found
    return "An assistant message with 'tool_calls' must be followed by tool messages" if wanted else ""


def _check_parts(parts: list[Any], at: str) -> str:
    if not parts:
        return f"Invalid '{at}.content': empty array."
    for i, part in enumerate(parts):
        if part["type"] == "image_url":
            url = part["image_url"]["url"]
            if not re.match(r"https?://|data:image/(png|jpeg|gif|webp);base64,", url):
                return f"Invalid '{at}.content[{i}].image_url.url'."
            if url.startswith("data:") and not _is_base64(url.partition(",")[2]):
                return f"Invalid base64 image_url at {at}.content[{i}]."
        if part["type"] == "file":
            file = part["file"]
            if "file_data" in file and ("filename" not in file or not file["file_data"].startswith("data:")):
                return (
                    f"Invalid '{at}.content[{i}].file.file_data': expected a base64-encoded data URL, and a filename."
                )
    return ""


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return True
