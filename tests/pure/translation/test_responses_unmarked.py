"""What another vendor's model thought does not go to OpenAI."""

from __future__ import annotations

import pytest

from balancer.translation.responses.unmarked import without_foreign

OURS = b'{"type":"reasoning","id":"rs_1","summary":[],"encrypted_content":"balancer:anthropic:Eq"}'
THEIRS = b'{"type":"reasoning","id":"rs_2","summary":[],"encrypted_content":"gAAAA"}'


def test_items_with_our_mark_are_taken_out() -> None:
    body = b'{"model":"m", "input":[%b, {"role" : "user"}, %b,%b],"z":1.50}' % (OURS, OURS, THEIRS)
    assert without_foreign(body) == b'{"model":"m","input":[{"role" : "user"},%b],"z":1.50}' % THEIRS


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"input": "balancer:anthropic:Eq"}',
        b'{"input": 5}',
        b'{"messages": []}',
        b'{"input": [%b]}' % THEIRS,
        b'{"input": [{"role": "user", "content": "balancer:anthropic:Eq"}]}',
        b'{"input": [{"type": "message", "encrypted_content": "balancer:anthropic:Eq"}]}',
        b'{"input": [{"type": "reasoning", "encrypted_content": "see balancer:anthropic:Eq"}]}',
        b'{"input": [{"type": "reasoning", "encrypted_content": {"balancer:": 1}}]}',
        b'{"input": ["balancer:", 5, null, []]}',
        b'{"input": [%b' % OURS,
        b'{"input": ["\xff balancer:"]}',
        b'{"input":' + b"[" * 100_000,
    ],
)
def test_all_other_bodies_are_the_same_bytes(body: bytes) -> None:
    assert without_foreign(body) is body


def test_half_an_emoji_does_not_keep_them_in() -> None:
    body = rb'{"input":[%b,{"role":"user","content":"\ud83d"}]}' % OURS
    assert without_foreign(body) == rb'{"input":[{"role":"user","content":"\ufffd"}]}'
