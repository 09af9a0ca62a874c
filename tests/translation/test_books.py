"""Many clients of all APIs at once, whole answers and streams, errors and hang-ups: the books agree, to the token."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from typing import Any

import anthropic
import msgspec
import openai
import pytest

from tests.translation.conftest import STYLES, World
from tests.vendors.replies import Reply, Say, Think, Use, reply

pytestmark = pytest.mark.asyncio(loop_scope="module")
CLIENTS = 60
TEXT = "These words come in pieces, and a client that has enough of them leaves in their midst. " * 2
PIECES = {"openai": (7, 1), "anthropic": (7, 2), "google": (12, 0)}
"""How long a piece of a text is in each vendor's streams, and how many events come before the first."""


def _reply(chance: random.Random, number: int, gate: asyncio.Event) -> tuple[str, Reply]:
    """What becomes of a request, and what the vendor says."""
    counted = {"input": 100 + number, "cached": number, "output": 50 + number, "reasoning": number % 7}
    kind = chance.choice(["whole", "stream", "stream", "leaves", "fails", "is cut", "breaks"])
    parts = (Think("Hm."), Say(TEXT), Use("weather", {"city": "Bern"}))
    match kind:
        case "fails":
            return kind, Reply(status=chance.choice([400, 429, 500, 503]), message="No.")
        case "is cut":
            return kind, reply(*parts, cut_after=chance.randrange(3, 9), **counted)
        case "breaks":
            return kind, reply(*parts, broken_after=chance.randrange(3, 9), message="Overloaded.", **counted)
        case "leaves":
            return kind, reply(Say(TEXT), gate=gate, gate_before=chance.randrange(4, 9), **counted)
        case _:
            return kind, reply(*parts, **counted)


async def test_the_books_of_a_crowd_agree(world: World) -> None:
    chance = random.Random(7)
    gate = asyncio.Event()
    wanted = [_reply(chance, number, gate) for number in range(CLIENTS)]

    def find(body: Any) -> Reply:
        number = re.search(rb"number (\d+)\.", msgspec.json.encode(body))
        assert number
        return wanted[int(number[1])][1]

    world.play.answers_by(find)
    names = list(world.vendors)
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for number, (kind, said) in enumerate(wanted):
            rule, api = names[number % len(names)], chance.choice(["chat", "messages", "responses"])
            group.create_task(_ask(world, rule, api, kind, said, f"I am number {number}."))
    assert world.refusals == []
    await world.assert_books_agree()


async def _ask(world: World, rule: str, api: str, kind: str, said: Reply, text: str) -> None:
    enough = 1 << 30
    if kind == "leaves":
        # All that comes before the vendor waits: what it told by then is what counts.
        size, before = PIECES[STYLES[rule]]
        enough = size * (said.gate_before - before)
    heard = 0
    with contextlib.suppress(openai.APIError, anthropic.APIError):
        stream = await _stream(world, rule, api, text, is_whole=kind == "whole")
        if stream is None:
            return
        async for event in stream:
            heard += len(_text(api, event))
            if heard >= enough:
                break
        await stream.close()
    assert kind != "leaves" or heard == enough


async def _stream(world: World, rule: str, api: str, text: str, *, is_whole: bool) -> Any:
    """A stream, or None where all was there at once."""
    asked: Any = [{"role": "user", "content": text}]
    match api:
        case "chat":
            answer: Any = await world.openai.chat.completions.create(model=rule, messages=asked, stream=not is_whole)
        case "messages":
            answer = await world.anthropic.messages.create(
                model=rule, max_tokens=2000, messages=asked, stream=not is_whole
            )
        case _:
            answer = await world.openai.responses.create(model=rule, input=asked, stream=not is_whole)
    return None if is_whole else answer


def _text(api: str, event: Any) -> str:
    match api:
        case "chat":
            return "".join(choice.delta.content or "" for choice in event.choices)
        case "messages":
            return getattr(event.delta, "text", "") if event.type == "content_block_delta" else ""
        case _:
            return event.delta if event.type == "response.output_text.delta" else ""
