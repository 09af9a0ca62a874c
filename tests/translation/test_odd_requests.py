"""Requests and streams in which something is odd: a client is told what, and nothing else happens."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from balancer import sse
from balancer.errors import RequestError
from balancer.translation.conversation import Target
from tests.translation.asked import ALL, BASES
from tests.translation.golden import streams, upstream_of
from tests.translation.test_requests import MODELS, SIGNERS

ODD: list[Any] = [None, True, 0, -1, 1.5, 1 << 70, "", " ", "x", "\ud800", [], [None], {}, {"type": "x"}, [[]], [{}]]
ROUNDS = 40


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that is in a value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield (*path, name)
        yield from _nodes(child, (*path, name))


def _spoilt(value: Any, chance: random.Random) -> Any:
    """The value with something in it replaced, left out, or added."""
    copy = msgspec.json.decode(msgspec.json.encode(value))
    *way, last = chance.choice(list(_nodes(copy)))
    holder = copy
    for name in way:
        holder = holder[name]
    kind = chance.random()
    if kind < 0.2:
        del holder[last]
    elif kind < 0.3 and isinstance(holder, dict):
        holder["unheard_of"] = chance.choice(ODD)
    else:
        holder[last] = chance.choice(ODD)
    return copy


def _encoded(value: Any) -> bytes:
    """JSON, with lone surrogates escaped, as some clients send them."""
    return json.dumps(value, separators=(",", ":")).encode()


@pytest.mark.parametrize(("api", "to"), [(api, to) for api in ALL for to in MODELS if api != to])
def test_a_spoilt_request_is_written_or_refused_with_its_path(api: str, to: str) -> None:
    reading = importlib.import_module(f"balancer.translation.{api}.reading")
    writing = importlib.import_module(f"balancer.translation.{to}.writing")
    chance = random.Random(f"{api} {to}")
    refused = 0
    for name, asked in ALL[api].items():
        for _ in range(ROUNDS):
            body = _encoded(_spoilt(BASES[api] | asked, chance))
            target = Target(model=chance.choice(MODELS[to]), vendor=SIGNERS[to])
            refusal: RequestError | None = None
            try:
                made = writing.write_request(reading.read_request(body), target)
                msgspec.json.decode(made.body)
            except RequestError as exc:
                refusal = exc
            except Exception as exc:  # noqa: BLE001  # what is unforeseen is told with the request that brought it up
                pytest.fail(f"{name}: {exc!r} for {body!r}")
            if refusal is not None:
                refused += 1
                assert refusal.status == 400
                assert refusal.param, (name, body, refusal)
    assert refused > ROUNDS


@pytest.mark.parametrize("path", streams(), ids=lambda path: path.stem)
def test_a_spoilt_stream_never_raises(path: Any) -> None:
    api, vendor = upstream_of(path)
    module = importlib.import_module(f"balancer.translation.{api}.streams")
    chance = random.Random(path.stem)
    events = sse.Parser().feed(path.read_bytes())
    for _ in range(40):
        reader = module.StreamReader(Target(model="m", vendor=vendor))
        for event in events:
            data = bytes(event.data)
            if chance.random() < 0.3 and data.startswith(b"{"):
                data = _encoded(_spoilt(msgspec.json.decode(data), chance))
            elif chance.random() < 0.05:
                data = data[: chance.randrange(len(data) + 1)]
            reader.read(sse.Event(b"", event.name, data))
        reader.finish()
