"""The requests: a small one, and one as agents send it, with long messages and tools; each whole and as a stream."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

MODEL = "mock-model"
_WORDS = (
    *("the", "build", "fails", "because", "module", "does", "not", "export", "function", "handler"),
    *("please", "read", "file", "and", "fix", "test", '"quoted"', "path/to/file.py", "line", "error"),
)


def write(folder: Path) -> dict[str, Path]:
    """The files by name: small, agent, small_stream, agent_stream. The same bytes every time."""
    found = {}
    for name, body in (("small", _small()), ("agent", _agent(random.Random(7)))):
        stream = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}} | body
        for suffix, content in (("", body), ("_stream", stream)):
            path = folder / f"{name}{suffix}.json"
            path.write_text(json.dumps(content), encoding="utf-8")
            found[name + suffix] = path
    return found


def _small() -> dict[str, Any]:
    question = "Write one sentence about load balancers, queues and fairness for a status page. " * 2
    return {
        "model": MODEL,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": question},
        ],
        "temperature": 0.2,
        "max_tokens": 64,
    }


def _agent(rand: random.Random) -> dict[str, Any]:
    def text(length: int) -> str:
        words = ""
        while len(words) < length:
            words += rand.choice(_WORDS) + " "
        return words

    def tool(i: int) -> dict[str, Any]:
        properties = {f"arg{j}": {"type": "string", "description": text(60)} for j in range(4)}
        parameters = {"type": "object", "properties": properties, "required": ["arg0"]}
        return {
            "type": "function",
            "function": {"name": f"tool_{i}", "description": text(200), "parameters": parameters},
        }

    messages: list[dict[str, Any]] = [{"role": "system", "content": text(4000)}]
    for i in range(16):
        function = {"name": "tool_1", "arguments": json.dumps({"arg0": text(80)})}
        call = {"id": f"call_{i}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": text(300)},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": text(1300)},
        ]
    return {"model": MODEL, "messages": messages, "tools": [tool(i) for i in range(10)], "max_tokens": 512}
