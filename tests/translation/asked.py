"""Requests as clients of each API may send them, by what is particular about them.

All are what their own API takes. Where another API cannot do it, `REFUSED` has the path that a client must be told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PDF = "JVBERi0xLjQKJSVFT0YK"
WAV = "UklGRiQAAABXQVZFZm10IBAAAAABAAEA"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
REPORT = {
    "type": "object",
    "properties": {"rain": {"type": "boolean"}, "degrees": {"type": "array", "items": {"type": "integer"}}},
    "required": ["rain", "degrees"],
    "additionalProperties": False,
}
LIMITED = {
    "type": "object",
    "properties": {
        "degrees": {"type": "integer", "minimum": -90, "maximum": 60},
        "city": {"type": "string", "minLength": 1, "maxLength": 80, "pattern": "^[A-Z]"},
        "days": {"type": "array", "items": {"type": "string"}, "maxItems": 7},
    },
    "required": ["degrees", "city", "days"],
    "additionalProperties": False,
}
LOOSE = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "country": {"type": "object"}},
    "required": ["city"],
}
OPTIONAL = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "country": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
HI = {"role": "user", "content": "Hi there"}

# -- chat --------------------------------------------------------------------------------------------------------------


def _function(name: str = "weather", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": "Weather.", "parameters": CITY} | more}


def _called(*ids: str, arguments: str = '{"city": "Bern"}', **more: Any) -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": "weather", "arguments": arguments}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls} | more


def _gave(id_: str, content: Any = "rain") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id_, "content": content}


GRAMMAR = {"type": "grammar", "grammar": {"syntax": "lark", "definition": 'start: "a"+'}}
PATCH = {"type": "custom", "custom": {"name": "patch", "description": "Patch a file.", "format": GRAMMAR}}
TOOLS: dict[str, Any] = {"tools": [_function(), {"type": "function", "function": {"name": "now"}}]}
LOOP: dict[str, Any] = TOOLS | {"messages": [HI, _called("call_1", "call_2"), _gave("call_1"), _gave("call_2", "sun")]}

CHAT: Mapping[str, dict[str, Any]] = {
    "plain": {"messages": [{"role": "system", "content": "Be brief."}, HI]},
    "developer": {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, HI]},
    "system only": {"messages": [{"role": "system", "content": "Say hello."}]},
    "system midway": {"messages": [HI, {"role": "assistant", "content": "Hi"}, {"role": "system", "content": "S"}, HI]},
    "one role in a row": {"messages": [HI, HI, {"role": "assistant", "content": "a"}] * 2 + [HI]},
    "assistant first": {"messages": [{"role": "assistant", "content": "How can I help?"}, HI]},
    "empty texts": {"messages": [HI, {"role": "assistant", "content": ""}, {"role": "user", "content": "x"}]},
    "names": {"messages": [HI | {"name": "Urs"}]},
    "numbers": {"temperature": 0.3, "max_tokens": 50, "stop": ["a", "b"]},
    "both samplings": {"temperature": 0.3, "top_p": 0.9},
    "hot": {"temperature": 1.7},
    "completion tokens": {"max_completion_tokens": 50},
    "one stop": {"stop": "END"},
    "blank stop": {"stop": ["\n\n"]},
    "seed": {"seed": 7},
    "nothing asked": {
        "n": 1, "logprobs": False, "logit_bias": None, "stop": None, "tools": None, "temperature": None,
        "presence_penalty": 0, "frequency_penalty": 0, "response_format": {"type": "text"}, "modalities": ["text"],
    },
    "bookkeeping": {
        "user": "u1", "safety_identifier": "s", "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "prompt_cache_key": "k", "verbosity": "low",
    },
    "images": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}", "detail": "high"}},
                    {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
                ],
            }
        ]
    },
    "document": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "file", "file": {"filename": "a.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}}
                ],
            }
        ]
    },
    "sound": {
        "messages": [
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}}]}
        ]
    },
    "tools": TOOLS,
    "strict tool": {"tools": [_function(strict=True)]},
    "loop": LOOP,
    "loop in another order": LOOP | {"messages": [*LOOP["messages"][:2], _gave("call_2"), _gave("call_1")]},
    "loop that goes on": LOOP | {"messages": [*LOOP["messages"], {"role": "assistant", "content": "Rain."}, HI]},
    "loop with a word of the user": LOOP | {"messages": [*LOOP["messages"], HI]},
    "loop in two steps": LOOP | {"messages": [*LOOP["messages"], _called("call_3", content="More."), _gave("call_3")]},
    "two loops of one id": TOOLS | {"messages": [HI, *[_called("call_1"), _gave("call_1")] * 2]},
    "odd ids": TOOLS | {"messages": [HI, _called("functions.weather:0"), _gave("functions.weather:0")]},
    "long id": TOOLS | {"messages": [HI, _called("c" * 40), _gave("c" * 40)]},
    "empty arguments": TOOLS | {"messages": [HI, _called("call_1", arguments=""), _gave("call_1")]},
    "empty result": TOOLS | {"messages": [HI, _called("call_1"), _gave("call_1", "")]},
    "result in parts": TOOLS | {"messages": [HI, _called("call_1"), _gave("call_1", [{"type": "text", "text": "r"}])]},
    "loop without tools": {"messages": LOOP["messages"]},
    "required": TOOLS | {"tool_choice": "required"},
    "named": TOOLS | {"tool_choice": {"type": "function", "function": {"name": "now"}}},
    "none": TOOLS | {"tool_choice": "none"},
    "allowed": TOOLS
    | {
        "tool_choice": {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "now"}}]},
        }
    },
    "one at a time": TOOLS | {"parallel_tool_calls": False},
    "at once": TOOLS | {"parallel_tool_calls": True},
    "custom tool": {
        "tools": [PATCH],
        "messages": [
            HI,
            {
                "role": "assistant",
                "tool_calls": [{"id": "call_1", "type": "custom", "custom": {"name": "patch", "input": 'a"a\n'}}],
            },
            _gave("call_1", "done"),
        ],
    },
    "json": {"response_format": {"type": "json_object"}, "messages": [{"role": "user", "content": "In JSON please"}]},
    "schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": REPORT, "strict": True}}
    },
    "schema with limits": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": LIMITED, "strict": True}}
    },
    "loose schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": LOOSE}}},
    "strict tool with limits": {"tools": [_function(parameters=LIMITED, strict=True)]},
    "loose tool": {"tools": [_function(parameters=LOOSE)]},
    "schema and tools": TOOLS
    | {"response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": REPORT, "strict": True}}},
    **{f"effort {e}": {"reasoning_effort": e} for e in ("none", "minimal", "low", "medium", "high", "xhigh", "max")},
    "effort, few tokens": {"reasoning_effort": "high", "max_completion_tokens": 2000},
    "effort, cool": {"reasoning_effort": "medium", "temperature": 0.2},
    "effort, loop": LOOP | {"reasoning_effort": "high"},
    "effort, required": TOOLS | {"reasoning_effort": "high", "tool_choice": "required"},
    "refusal": {"messages": [HI, {"role": "assistant", "content": None, "refusal": "No."}, HI]},
    "assistant in parts": {
        "messages": [
            HI,
            {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]},
            HI,
        ]
    },
    "foreign thoughts": LOOP
    | {
        "messages": [
            HI,
            _called("call_1", reasoning_content="Hm.", reasoning_details=[
                {"type": "reasoning.text", "text": "Hm.", "signature": "eA==", "format": "other", "index": 0}
            ]),
            _gave("call_1"),
        ]
    },
}  # fmt: skip

# -- messages ----------------------------------------------------------------------------------------------------------


def _used(*ids: str, first: tuple[Any, ...] = ()) -> dict[str, Any]:
    uses = [{"type": "tool_use", "id": i, "name": "weather", "input": {"city": "Bern"}} for i in ids]
    return {"role": "assistant", "content": [*first, *uses]}


def _result(id_: str, content: Any = "rain", **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id_, "content": content} | more


def _user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def _text(text: str = "Go on", **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text} | more


EPHEMERAL: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}
WEATHER = {"name": "weather", "description": "Weather.", "input_schema": CITY}
NATIVE_THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "EqoBCkgIARABGAIiQA=="}
USES: dict[str, Any] = {"tools": [WEATHER, {"name": "now", "input_schema": {"type": "object"}}]}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}

MESSAGES: Mapping[str, dict[str, Any]] = {
    "plain": {"system": "Be brief."},
    "system in parts": {"system": [_text("Be brief."), _text("And kind.", **EPHEMERAL)]},
    "cached": {"messages": [_user(_text("Hi", cache_control={"type": "ephemeral", "ttl": "1h"}))]},
    "system midway": {"messages": [HI, {"role": "assistant", "content": "a"}, {"role": "system", "content": "S"}, HI]},
    "one role in a row": {"messages": [HI, HI, {"role": "assistant", "content": "a"}, HI]},
    "numbers": {"temperature": 0.3, "stop_sequences": ["a", "b"], "max_tokens": 50},
    "bookkeeping": {"metadata": {"user_id": "u1"}, "service_tier": "auto"},
    "geography": {"inference_geo": "us"},
    "images": {
        "messages": [
            _user(IMAGE, {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}, _text())
        ]
    },
    "documents": {
        "messages": [
            _user(
                {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": PDF}},
                {
                    "type": "document",
                    "source": {"type": "text", "media_type": "text/plain", "data": "Once."},
                    "title": "T",
                    "context": "C",
                    "citations": {"enabled": False},
                },
                _text(),
            )
        ]
    },
    "tools": USES,
    "cached tool": {"tools": [WEATHER | EPHEMERAL]},
    "strict tool": {"tools": [WEATHER | {"strict": True}]},
    "loop": USES | {"messages": [HI, _used("toolu_1", "toolu_2"), _user(_result("toolu_1"), _result("toolu_2"))]},
    "loop with a word": USES | {"messages": [HI, _used("toolu_1"), _user(_result("toolu_1"), _text())]},
    "loop with cached text": USES
    | {"messages": [HI, _used("toolu_1"), _user(_result("toolu_1", **EPHEMERAL), _text(**EPHEMERAL))]},
    "error": USES | {"messages": [HI, _used("toolu_1"), _user(_result("toolu_1", "no such city", is_error=True))]},
    "no content": USES | {"messages": [HI, _used("toolu_1"), _user({"type": "tool_result", "tool_use_id": "toolu_1"})]},
    "image in a result": USES
    | {
        "messages": [
            HI,
            _used("toolu_1", "toolu_2"),
            _user(_result("toolu_1", [_text("See:"), IMAGE]), _result("toolu_2")),
        ]
    },
    "any": USES | {"tool_choice": {"type": "any"}},
    "named": USES | {"tool_choice": {"type": "tool", "name": "now"}},
    "none": USES | {"tool_choice": {"type": "none"}},
    "one at a time": USES | {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
    "thinking": {"thinking": {"type": "enabled", "budget_tokens": 4096}},
    "thinking a little": {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1500},
    "adaptive": {"thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "medium"}},
    "adaptive alone": {"thinking": {"type": "adaptive"}},
    "effort alone": {"output_config": {"effort": "max"}},
    "no thinking": {"thinking": {"type": "disabled"}},
    "thoughts": USES
    | {
        "thinking": {"type": "enabled", "budget_tokens": 2048},
        "messages": [HI, _used("toolu_1", first=(NATIVE_THOUGHT, _text("I look."))), _user(_result("toolu_1"))],
    },
    "redacted thoughts": USES
    | {
        "thinking": {"type": "adaptive"},
        "messages": [
            HI,
            _used("toolu_1", first=({"type": "redacted_thinking", "data": "EmwKAhgB"},)),
            _user(_result("toolu_1")),
        ],
    },
    "sealed thoughts": USES
    | {
        "thinking": {"type": "enabled", "budget_tokens": 2048},
        "messages": [
            HI,
            _used("call_1", first=({"type": "thinking", "thinking": "Hm.", "signature": "balancer:other:eA=="},)),
            _user(_result("call_1")),
        ],
    },
    "schema": {"output_config": {"format": {"type": "json_schema", "schema": REPORT}}},
    "schema with an option": {"output_config": {"format": {"type": "json_schema", "schema": OPTIONAL}}},
    "strict tool with an option": {"tools": [WEATHER | {"strict": True, "input_schema": OPTIONAL}]},
    "loose tool": {"tools": [WEATHER | {"input_schema": LOOSE}]},
    "many stops": {"stop_sequences": ["a", "b", "c", "d", "e", "f"]},
    "document in a result": USES
    | {
        "messages": [
            HI,
            _used("toolu_1"),
            _user(
                _result(
                    "toolu_1",
                    [{"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Once."}}],
                )
            ),
        ]
    },
    "context management": {
        "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
    },
}  # fmt: skip

# -- responses ---------------------------------------------------------------------------------------------------------


def _item(role: str, *parts: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": list(parts)}


def _call(id_: str, arguments: str = '{"city": "Bern"}') -> dict[str, Any]:
    return {"type": "function_call", "call_id": id_, "name": "weather", "arguments": arguments}


def _output(id_: str, output: Any = "rain") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id_, "output": output}


ASK = _item("user", {"type": "input_text", "text": "Hi there"})
FLAT = {"type": "function", "name": "weather", "description": "Weather.", "parameters": CITY, "strict": True}
CALLS: dict[str, Any] = {"tools": [FLAT]}

RESPONSES: Mapping[str, dict[str, Any]] = {
    "plain": {"input": "Hi there", "instructions": "Be brief."},
    "items": {"input": [_item("developer", {"type": "input_text", "text": "Be brief."}), ASK]},
    "short items": {"input": [{"role": "user", "content": "Hi there"}]},
    "answers before": {
        "input": [
            ASK,
            {
                "type": "message",
                "id": "msg_1",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "Hi.", "annotations": []}],
            },
            ASK,
        ]
    },
    "numbers": {"max_output_tokens": 50, "temperature": 0.3},
    "bookkeeping": {
        "store": False, "metadata": {}, "service_tier": "auto", "prompt_cache_key": "k", "truncation": "disabled",
        "user": "u1", "include": ["reasoning.encrypted_content"], "text": {"verbosity": "medium"},
    },
    "images": {
        "input": [
            _item(
                "user",
                {"type": "input_text", "text": "What is it?"},
                {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "auto"},
            )
        ]
    },
    "document": {
        "input": [
            _item(
                "user",
                {
                    "type": "input_file",
                    "filename": "a.pdf",
                    "file_data": f"data:application/pdf;base64,{PDF}",
                },
            )
        ]
    },
    "tools": CALLS,
    "loop": CALLS | {"input": [ASK, _call("call_1"), _call("call_2"), _output("call_1"), _output("call_2")]},
    "loop, one by one": CALLS
    | {"input": [ASK, _call("call_1"), _output("call_1"), _call("call_2"), _output("call_2")]},
    "image in a result": CALLS
    | {
        "input": [
            ASK,
            _call("call_1"),
            _output("call_1", [{"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}]),
        ]
    },
    "required": CALLS | {"tool_choice": "required"},
    "named": CALLS | {"tool_choice": {"type": "function", "name": "weather"}},
    "one at a time": CALLS | {"parallel_tool_calls": False},
    "custom tool": {
        "tools": [{"type": "custom", "name": "patch", "description": "Patch.", "format": {"type": "text"}}],
        "input": [
            ASK,
            {"type": "custom_tool_call", "call_id": "call_1", "name": "patch", "input": "*** Begin\n"},
            {"type": "custom_tool_call_output", "call_id": "call_1", "output": "done"},
        ],
    },
    "schema": {"text": {"format": {"type": "json_schema", "name": "r", "schema": REPORT, "strict": True}}},
    "schema with limits": {"text": {"format": {"type": "json_schema", "name": "r", "schema": LIMITED, "strict": True}}},
    "system": {"input": [{"role": "system", "content": "S"}, {"role": "assistant", "content": "A"}, ASK]},
    "json": {"text": {"format": {"type": "json_object"}}, "input": "In JSON please"},
    "effort": {"reasoning": {"effort": "high", "summary": "auto"}},
    "thoughts": CALLS
    | {
        "reasoning": {"effort": "medium", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "store": False,
        "input": [
            ASK,
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "Hm."}],
                "encrypted_content": "balancer:other:eA==",
            },
            _call("call_1"),
            _output("call_1"),
        ],
    },
    "native thoughts": CALLS
    | {
        "reasoning": {"effort": "medium"},
        "input": [
            ASK,
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAAAB"},
            _call("call_1"),
            _output("call_1"),
        ],
    },
}  # fmt: skip

BASES: Mapping[str, dict[str, Any]] = {
    "chat": {"model": "asked", "messages": [HI]},
    "messages": {"model": "asked", "max_tokens": 6000, "messages": [HI]},
    "responses": {"model": "asked", "input": "Hi there"},
}
ALL: Mapping[str, Mapping[str, dict[str, Any]]] = {"chat": CHAT, "messages": MESSAGES, "responses": RESPONSES}

REFUSED: Mapping[tuple[str, str, str], str] = {
    ("chat", "sound", "messages"): "messages[0].content[0]",
    ("chat", "blank stop", "messages"): "stop",
    ("messages", "geography", "chat"): "inference_geo",
    ("messages", "many stops", "chat"): "stop_sequences",
    ("messages", "many stops", "google"): "stop_sequences",
    ("messages", "geography", "google"): "inference_geo",
}
"""By the client's API, what is particular, and the service's API: the path."""
NEVER_FORCED = {"chat": ("required", "named", "effort, required"), "responses": ("required", "named")}
"""What Claude's Opus 5.5 refuses: it cannot be told to call a tool."""
NEVER_STOPPED = {("messages", "numbers"): "stop_sequences"}
"""What OpenAI's models refuse that reason: they take no stop sequences."""
