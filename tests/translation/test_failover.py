"""Two vendors that fail, and a third, of another API, that answers the same request."""

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
FAILURES = pytest.mark.parametrize(("number", "failure"), list(enumerate(FAILS.values())), ids=FAILS)


@FAILURES
async def test_another_vendor_answers_a_chat_client(world: World, number: int, failure: Reply) -> None:
    world.says(failure, failure, reply(Say("Here I am.")))
    rule = f"apart-{3 * number}"
    stream = await world.openai.chat.completions.create(model=rule, messages=ASKED, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Here I am."
    await assert_all_three_were_asked(world)


@FAILURES
async def test_another_vendor_answers_a_responses_client(world: World, number: int, failure: Reply) -> None:
    world.says(failure, failure, reply(Say("Here I am.")))
    async with world.openai.responses.stream(model=f"apart-{3 * number + 1}", input="Hello") as stream:
        assert (await stream.get_final_response()).output_text == "Here I am."
    await assert_all_three_were_asked(world)


@FAILURES
async def test_another_vendor_answers_a_messages_client(world: World, number: int, failure: Reply) -> None:
    world.says(failure, failure, reply(Say("Here I am.")))
    rule = f"apart-{3 * number + 2}"
    async with world.anthropic.messages.stream(model=rule, max_tokens=99, messages=ASKED) as stream:
        assert await stream.get_final_text() == "Here I am."
    await assert_all_three_were_asked(world)


async def assert_all_three_were_asked(world: World) -> None:
    """Each of them once; all attempts are counted."""
    assert sorted(len(world.bodies(name)) for name in world.vendors) == [0, 0, 1, 1, 1]
    assert world.refusals == []
    await world.assert_books_agree()
