"""Requests as clients of the responses API send them, shortened where they only go on."""

from __future__ import annotations

from typing import Any

CODEX: dict[str, Any] = {
    "model": "gpt-5-codex",
    "instructions": "You are Codex, based on GPT-5. You are running as a coding agent in the Codex CLI.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions instructions>\nread-only\n</permissions>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [
                {
                    "type": "input_text",
                    "text": "# AGENTS.md instructions for /repo\n\n<INSTRUCTIONS>tabs</INSTRUCTIONS>",
                },
                {"type": "input_text", "text": "<environment_context>\n  <cwd>/repo</cwd>\n</environment_context>"},
            ],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "fix the test"}]},
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "**Looking**\n\nI should look."}],
            "content": None,
            "encrypted_content": "balancer:anthropic:EqQBCg==",
        },
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look."}],
            "phase": "commentary",
        },
        {
            "type": "function_call",
            "name": "exec_command",
            "arguments": '{"cmd":"ls"}',
            "call_id": "toolu_1",
        },
        {
            "type": "custom_tool_call",
            "status": "completed",
            "call_id": "toolu_2",
            "name": "apply_patch",
            "input": "*** Begin Patch\n*** End Patch\n",
        },
        {"type": "function_call_output", "call_id": "toolu_1", "output": "Chunk ID: 1\nOutput:\nREADME.md\n"},
        {"type": "custom_tool_call_output", "call_id": "toolu_2", "output": "Success."},
    ],
    "tools": [
        {
            "type": "function",
            "name": "exec_command",
            "description": "Runs a command in a PTY.",
            "strict": False,
            "parameters": {
                "type": "object",
                "properties": {"cmd": {"type": "string"}, "yield_time_ms": {"type": "number"}},
                "required": ["cmd"],
                "additionalProperties": False,
            },
        },
        {
            "type": "function",
            "name": "update_plan",
            "description": "Updates the task plan.",
            "strict": False,
            "parameters": {"type": "object", "properties": {"plan": {"type": "array"}}, "required": ["plan"]},
        },
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "Edits files. This is a FREEFORM tool, so do not wrap the patch in JSON.",
            "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "*** Begin Patch" LF\n'},
        },
        {
            "type": "function",
            "name": "view_image",
            "description": "Attaches a local image.",
            "strict": False,
            "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
        },
        {
            "type": "namespace",
            "name": "mcp__github",
            "description": "Tools in the mcp__github namespace.",
            "tools": [
                {
                    "type": "function",
                    "name": "search_issues",
                    "description": "Searches issues.",
                    "strict": False,
                    "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
                }
            ],
        },
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "high", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199f3d2-4b7c-7d10-9e2b-3a1f",
    "text": {"verbosity": "medium"},
    "client_metadata": {"x-codex-installation-id": "8f5c"},
}

OPENCODE: dict[str, Any] = {
    "model": "gpt-5",
    "input": [
        {"role": "developer", "content": "You are OpenCode."},
        {"role": "user", "content": [{"type": "input_text", "text": "what is in this picture?"}]},
        {
            "role": "user",
            "content": [{"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}],
        },
        {
            "type": "reasoning",
            "id": "rs_abc_0",
            "encrypted_content": "balancer:google:CiQB",
            "summary": [],
        },
        {"role": "assistant", "content": [{"type": "output_text", "text": "A cat."}], "id": "msg_abc_1"},
        {"type": "function_call", "call_id": "call_9", "name": "read", "arguments": '{"filePath":"/a"}', "id": "fc_9"},
        {"type": "function_call_output", "call_id": "call_9", "output": "<file>\n00001| a\n</file>"},
        {"role": "user", "content": [{"type": "input_text", "text": "go on"}]},
    ],
    "max_output_tokens": 32000,
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "ses_5f2a",
    "reasoning": {"effort": "medium", "summary": "auto"},
    "text": {"verbosity": "low"},
    "tools": [
        {
            "type": "function",
            "name": "read",
            "description": "Reads a file.",
            "parameters": {
                "$schema": "http://json-schema.org/draft-07/schema#",
                "type": "object",
                "properties": {"filePath": {"type": "string"}},
                "required": ["filePath"],
                "additionalProperties": False,
            },
            "strict": False,
        }
    ],
    "tool_choice": "auto",
    "stream": True,
}
