"""A vendor that fails, and another of another API that answers the same request."""

from __future__ import annotations

from typing import Any

import pytest

from tests.translation.conftest import World
from tests.vendors.replies import Reply, Say, reply

pytestmark = pytest.mark.asyncio(loop_scope="module")
ASKED: list[Any] = [{"role": "user", "content": "Hello"}]
FAILS = {
    "an error": Reply(status=500, message="Out of order."),
    "too many requests": Reply(status=429, message="Later.", headers=(("Retry-After", "1"),)),
    "a stream that breaks at once": reply(Say("Hello"), broken_after=0, message="Overloaded."),
    "a stream without an event": reply(Say("Hello"), cut_after=0),
}
RULES = pytest.mark.parametrize(("rule", "count"), [("hop", 2), ("pairs", 1)], ids=["hop", "pairs"])
FAILURES = pytest.mark.parametrize("failure", FAILS.values(), ids=FAILS)


@RULES
@FAILURES
async def test_another_vendor_answers_a_chat_client(world: World, rule: str, count: int, failure: Reply) -> None:
    world.says(*[failure] * count, reply(Say("Here I am.")))
    stream = await world.openai.chat.completions.create(model=rule, messages=ASKED, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Here I am."
    await assert_others_were_asked(world, count)


@RULES
@FAILURES
async def test_another_vendor_answers_a_messages_client(world: World, rule: str, count: int, failure: Reply) -> None:
    world.says(*[failure] * count, reply(Say("Here I am.")))
    async with world.anthropic.messages.stream(model=rule, max_tokens=99, messages=ASKED) as stream:
        assert await stream.get_final_text() == "Here I am."
    await assert_others_were_asked(world, count)


@RULES
@FAILURES
async def test_another_vendor_answers_a_responses_client(world: World, rule: str, count: int, failure: Reply) -> None:
    world.says(*[failure] * count, reply(Say("Here I am.")))
    async with world.openai.responses.stream(model=rule, input="Hello") as stream:
        assert (await stream.get_final_response()).output_text == "Here I am."
    await assert_others_were_asked(world, count)


async def assert_others_were_asked(world: World, count: int) -> None:
    """As many vendors more as have failed, each once; all attempts are counted."""
    asked = [len(world.bodies(name)) for name in world.vendors]
    assert sorted(asked) == [0] * (len(asked) - 1 - count) + [1] * (1 + count)
    assert world.refusals == []
    await world.assert_books_agree()
