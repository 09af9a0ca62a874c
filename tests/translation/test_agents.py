"""Claude Code, Codex and OpenCode with every vendor: their requests as they send them, in their scenarios."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest
import pytest_asyncio

from tests.translation.conftest import TOKEN, World
from tests.translation.golden import RECORDINGS
from tests.vendors.replies import Reply, Say, Think, Use, reply

pytestmark = pytest.mark.asyncio(loop_scope="module")
VENDORS = pytest.mark.parametrize("rule", ["claude", "gpt", "gemini", "deepseek"])
CLAUDE_CODE = {
    "accept": "application/json",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27,"
    "prompt-caching-scope-2026-01-05,mid-conversation-system-2026-04-07",
    "anthropic-dangerous-direct-browser-access": "true",
    "anthropic-version": "2023-06-01",
    "authorization": f"Bearer {TOKEN}",
    "content-type": "application/json",
    "user-agent": "claude-cli/2.1.278 (external, cli)",
    "x-app": "cli",
    "x-claude-code-session-id": "123e4567-e89b-12d3-a456-426614174000",
    "x-stainless-helper-method": "stream",
    "x-stainless-lang": "js",
    "x-stainless-timeout": "600",
}
CODEX = {
    "accept": "text/event-stream",
    "authorization": f"Bearer {TOKEN}",
    "content-type": "application/json",
    "originator": "codex_cli_rs",
    "session-id": "0199a213-81c0-7800-8aa1-bbab2a035a53",
    "user-agent": "codex_cli_rs/0.98.0 (Debian 12; x86_64) xterm",
    "version": "0.98.0",
}
OPENCODE = {
    "authorization": f"Bearer {TOKEN}",
    "content-type": "application/json",
    "user-agent": "opencode/1.14.33 ai-sdk/openai-compatible/2.0.4",
}
THINKS_AND_CALLS = (Think("I look."), Say("A moment."))


class Agent:
    """An agent's HTTP: it posts a recorded request and reads the events."""

    def __init__(self, world: World, session: aiohttp.ClientSession) -> None:
        self.world = world
        self.session = session
        self.left_out = ""

    async def asks(
        self, recording: str, rule: str, path: str, headers: dict[str, str], status: int = 200
    ) -> list[tuple[str, Any]]:
        """The events of the answer, or one that holds all of it where it is no stream."""
        body = recorded(recording) | {"model": rule}
        async with self.session.post(self.world.url + path, json=body, headers=headers) as answer:
            data = await answer.read()
            assert answer.status == status, data
            self.left_out = answer.headers.get("x-balancer-left-out", "")
            if answer.content_type != "text/event-stream":
                return [("", msgspec.json.decode(data))]
        events = []
        for block in data.decode().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
            if "data" in lines:
                name, text = lines.get("event", ""), lines["data"]
                events.append((name, text if text == "[DONE]" else msgspec.json.decode(text)))
        return events


def recorded(name: str) -> dict[str, Any]:
    """A recorded request."""
    request: dict[str, Any] = msgspec.json.decode((RECORDINGS / f"{name}.json").read_bytes())
    return request


@pytest_asyncio.fixture(loop_scope="module")
async def agent(world: World) -> AsyncIterator[Agent]:
    async with aiohttp.ClientSession() as session:
        yield Agent(world, session)


def says(*uses: Use) -> Reply:
    """A thought, a word, and calls."""
    return reply(*THINKS_AND_CALLS, *uses, input=500, cached=100, output=50, reasoning=20)


# -- Claude Code -------------------------------------------------------------------------------------------------------


@VENDORS
async def test_claude_code_s_first_request(agent: Agent, rule: str) -> None:
    agent.world.says(says(Use("Read", {"file_path": "/w/pyproject.toml"}), Use("Bash", {"command": "ls"})))
    events = await agent.asks("claude_code_first", rule, "/claude_code/v1/messages?beta=true", CLAUDE_CODE)
    assert [name for name, _ in events if name in ("message_start", "message_delta", "message_stop")] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]
    begun = [data["content_block"] for name, data in events if name == "content_block_start"]
    assert [block["name"] for block in begun if block["type"] == "tool_use"] == ["Read", "Bash"]
    assert all(name == data["type"] for name, data in events)
    assert agent.world.refusals == []
    await agent.world.assert_books_agree()


@pytest.mark.parametrize("rule", ["gpt", "gemini", "deepseek"])
async def test_claude_code_s_later_request(agent: Agent, rule: str) -> None:
    agent.world.says(reply(Say("A dot.")))
    events = await agent.asks("claude_code_loop", rule, "/claude_code/v1/messages?beta=true", CLAUDE_CODE)
    assert events[-1][0] == "message_stop"
    assert agent.world.refusals == []
    sent = str(agent.world.bodies(rule))
    for words in ("requires-python", "ls: cannot access", "plan mode is off", "And this screenshot?", "Read"):
        assert words in sent
    for foreign in ("EqoBCkgIARABGAIiQA", "cache_control", "user_id"):
        assert foreign not in sent
    assert "context_management" in agent.left_out


@VENDORS
async def test_claude_code_s_small_requests(agent: Agent, rule: str) -> None:
    agent.world.says(reply(Say('{"title": "A Python"}')))
    events = await agent.asks("claude_code_title", rule, "/claude_code/v1/messages?beta=true", CLAUDE_CODE)
    deltas = [data["delta"] for name, data in events if name == "content_block_delta"]
    text = "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta")
    assert text == '{"title": "A Python"}'
    ((_, quota),) = await agent.asks("claude_code_quota", rule, "/claude_code/v1/messages?beta=true", CLAUDE_CODE)
    assert quota["type"] == "message"
    path = "/claude_code/v1/messages/count_tokens?beta=true"
    ((_, counted),) = await agent.asks("claude_code_count", rule, path, CLAUDE_CODE)
    assert counted["input_tokens"] > 0
    assert agent.world.refusals == []
    await agent.world.assert_books_agree()


@pytest.mark.parametrize("rule", ["gpt", "gemini"])
async def test_claude_code_is_told_that_there_is_no_web_search(agent: Agent, rule: str) -> None:
    path = "/claude_code/v1/messages?beta=true"
    ((_, refusal),) = await agent.asks("claude_code_search", rule, path, CLAUDE_CODE, 400)
    assert refusal["error"]["type"] == "invalid_request_error"
    assert "tools[0]" in refusal["error"]["message"]
    assert "web_search" in refusal["error"]["message"]


# -- Codex -------------------------------------------------------------------------------------------------------------


@VENDORS
@pytest.mark.parametrize("recording", ["codex_first", "codex_loop"])
async def test_codex(agent: Agent, rule: str, recording: str) -> None:
    patch = '*** Begin Patch\n*** Add File: a\n+"\\n"\n*** End Patch\n'
    agent.world.says(says(Use("exec_command", {"cmd": "ls"}), Use("apply_patch", text=patch)))
    events = await agent.asks(recording, rule, "/v1/responses", CODEX)
    assert events[0][0] == "response.created"
    assert events[-1][0] == "response.completed"
    done = [data["item"] for name, data in events if name == "response.output_item.done"]
    calls = [item for item in done if item["type"] in ("function_call", "custom_tool_call")]
    assert [(call["type"], call["name"]) for call in calls] == [
        ("function_call", "exec_command"),
        ("custom_tool_call", "apply_patch"),
    ]
    assert calls[1]["input"] == patch
    if rule != "gpt":
        thoughts = [item for item in done if item["type"] == "reasoning"]
        assert thoughts
        assert all(thought["encrypted_content"] for thought in thoughts)
    usage = events[-1][1]["response"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (500, 50)
    assert usage["input_tokens_details"]["cached_tokens"] == 100
    assert agent.world.refusals == []
    await agent.world.assert_books_agree()


async def test_codex_is_told_that_there_is_no_web_search(agent: Agent) -> None:
    ((_, refusal),) = await agent.asks("codex_search", "claude", "/v1/responses", CODEX, 400)
    assert refusal["error"]["param"].startswith("tools[4]")
    assert "web_search" in refusal["error"]["message"]


# -- OpenCode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["claude", "opus", "gemini"])
async def test_opencode_over_chat(agent: Agent, rule: str) -> None:
    agent.world.says(says(Use("read", {"filePath": "/w/b"})))
    events = await agent.asks("opencode_chat", rule, "/opencode/v1/chat/completions", OPENCODE)
    assert events[-1] == ("", "[DONE]")
    chunks = [data for _, data in events[:-1]]
    calls = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "read"
    assert "".join(call["function"].get("arguments", "") for call in calls) == '{"filePath":"/w/b"}'
    assert chunks[-1]["usage"]["prompt_tokens"] == 500
    assert agent.world.refusals == []
    await agent.world.assert_books_agree()


@pytest.mark.parametrize("rule", ["gpt", "gemini", "deepseek"])
async def test_opencode_over_messages(agent: Agent, rule: str) -> None:
    agent.world.says(says(Use("read", {"filePath": "/w/b"})))
    headers = OPENCODE | {"x-api-key": TOKEN, "anthropic-version": "2023-06-01"}
    events = await agent.asks("opencode_messages", rule, "/opencode/v1/messages", headers)
    assert events[-1][0] == "message_stop"
    assert agent.world.refusals == []
    await agent.world.assert_books_agree()


@VENDORS
async def test_opencode_over_responses(agent: Agent, rule: str) -> None:
    agent.world.says(says(Use("read", {"filePath": "/w/b"})))
    events = await agent.asks("opencode_responses", rule, "/opencode/v1/responses", OPENCODE)
    assert events[-1][0] == "response.completed"
    assert [item["type"] for item in events[-1][1]["response"]["output"]][-1] == "function_call"
    assert agent.world.refusals == []
    await agent.world.assert_books_agree()
