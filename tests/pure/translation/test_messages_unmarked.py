"""Native requests, without other vendors' thoughts."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from balancer.translation.messages.unmarked import without_foreign

FOREIGN = {"type": "thinking", "thinking": "t", "signature": "balancer:google:s"}
FOREIGN_REDACTED = {"type": "redacted_thinking", "data": "balancer:openai/p1:s"}
OWN = {"type": "thinking", "thinking": "t", "signature": "EqQB"}
TEXT = {"type": "text", "text": "balancer: a text that begins so"}
CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
RESULTS = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "r"}]}
ASKED = {"role": "user", "content": "Hi"}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    """A turn of the assistant."""
    return {"role": "assistant", "content": list(blocks)}


def mended(*messages: dict[str, Any], **fields: object) -> dict[str, Any]:
    """What comes out of a request with these messages, decoded."""
    body = msgspec.json.encode({"model": "m", "messages": messages, **fields})
    found: dict[str, Any] = msgspec.json.decode(without_foreign(body))
    return found


@pytest.mark.parametrize(
    ("messages", "left"),
    [
        ([ASKED, assistant(FOREIGN, TEXT)], [ASKED, assistant(TEXT)]),
        ([ASKED, assistant(FOREIGN_REDACTED, FOREIGN, OWN, TEXT)], [ASKED, assistant(OWN, TEXT)]),
        ([ASKED, assistant(OWN, CALL), RESULTS], [ASKED, assistant(OWN, CALL), RESULTS]),
        ([ASKED, assistant(FOREIGN), ASKED], [ASKED, ASKED]),
        ([ASKED, assistant(FOREIGN, CALL), RESULTS, assistant(FOREIGN)], [ASKED, assistant(CALL), RESULTS]),
        (
            [ASKED, {"role": "assistant", "content": "balancer:"}],
            [ASKED, {"role": "assistant", "content": "balancer:"}],
        ),
    ],
)
def test_foreign_thoughts_are_taken_out(messages: list[dict[str, Any]], left: list[dict[str, Any]]) -> None:
    assert mended(*messages)["messages"] == left


def test_all_else_stays_to_the_byte() -> None:
    kept = b'{"role": "user",  "content": [{"type":"text", "text":"\\u0041", "n": 1.0}]}'
    body = (
        b'{"model": "m", "system" : [ {"type":"text","text":"s"} ], "new": 1e2, "messages": [' + kept + b","
        b'{"role":"assistant","content":[{"type":"thinking","thinking":"","signature":"balancer:x:"},'
        b'{"type": "tool_use", "input": {"n": 1.50}}],"extra":  true}]}'
    )
    assert without_foreign(body) == (
        b'{"model":"m","system":[ {"type":"text","text":"s"} ],"new":1e2,"messages":[' + kept + b","
        b'{"role":"assistant","content":[{"type": "tool_use", "input": {"n": 1.50}}],"extra":true}]}'
    )


@pytest.mark.parametrize(
    "body",
    [
        b"balancer:",
        b"[]",
        b'{"model":"balancer:"}',
        b'{"messages":"balancer:"}',
        b'{"messages":[{"role":"user","content":"balancer:"}, 1, {"content": 7, "x":"balancer:"}]}',
        b'{"messages": [{"role":"assistant", "content":[{"type":"text","text":"balancer:"}]}]}',
        b'{"messages": [{"role":"assistant", "content":[{"type":"thinking","signature":["balancer:"]}]}]}',
    ],
)
def test_a_request_without_such_thoughts_stays_as_it_is(body: bytes) -> None:
    assert without_foreign(body) is body


EDITS = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}, {"type": "clear_tool_uses_20250919"}]}


def test_a_budget_of_thoughts_is_taken_off_where_the_calls_lost_theirs() -> None:
    """Anthropic refuses results whose calls come without thoughts, when thinking is on by a budget."""
    thinking = {"type": "enabled", "budget_tokens": 2000}
    running = [ASKED, assistant(FOREIGN, CALL), RESULTS]
    for turns in (
        (assistant(FOREIGN, CALL), RESULTS),
        (assistant(CALL), RESULTS),
        (assistant(TEXT), assistant(OWN, CALL), RESULTS),
        (assistant(CALL), RESULTS, ASKED, {"role": "system", "content": "balancer:"}),
    ):
        request = mended(ASKED, *turns, thinking=thinking, context_management=EDITS)
        assert "thinking" not in request
        assert request["context_management"] == {"edits": EDITS["edits"][1:]}
    only = {"edits": EDITS["edits"][:1]}
    assert "context_management" not in mended(*running, thinking=thinking, context_management=only)


@pytest.mark.parametrize(
    ("messages", "thinking"),
    [
        ([ASKED, assistant(FOREIGN, CALL), RESULTS], {"type": "adaptive"}),
        (
            [ASKED, assistant(FOREIGN, CALL), RESULTS, assistant(TEXT), ASKED],
            {"type": "enabled", "budget_tokens": 2000},
        ),
        ([ASKED, assistant(FOREIGN, OWN, CALL), RESULTS], {"type": "enabled", "budget_tokens": 2000}),
        ([ASKED, assistant(FOREIGN, OWN), assistant(CALL), RESULTS, ASKED], {"type": "enabled", "budget_tokens": 2000}),
        ([RESULTS, assistant(FOREIGN)], {"type": "enabled", "budget_tokens": 2000}),
        ([ASKED, assistant(FOREIGN)], {"type": "enabled", "budget_tokens": 2000}),
    ],
)
def test_else_it_thinks_as_it_was_asked_to(messages: list[dict[str, Any]], thinking: dict[str, Any]) -> None:
    request = mended(*messages, thinking=thinking, context_management=EDITS)
    assert request["thinking"] == thinking
    assert request["context_management"] == EDITS
