"""What translation costs a worker: its CPU for a chunk of a stream and for a request, beside what passes natively.

`python -m benchmarks.translation` prints both. A chunk is one event of one word, as models stream them: heard, read,
and written in the client's words; natively it is heard, and passes. A request is read and written anew; natively only
its model is peeked at and replaced. The least of some rounds. The client's socket and the upstream's are not in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from balancer import bodies
from balancer.dialects import Headers
from balancer.domain import ApiStyle, Provider
from balancer.encoding import Decoder
from balancer.gateway.accounting import Uncounted
from balancer.gateway.events import EventRelay
from balancer.gateway.masking import Mask
from balancer.gateway.rewriting import Rewriter
from balancer.gateway.translated_events import Events
from balancer.gateway.translating import Translated
from balancer.translation.answer import Echo
from balancer.translation.apis import ClientApi, ServiceApi
from balancer.translation.conversation import Conversation, Target
from balancer.translation.pairs import CLIENTS, SERVICES
from tests.actors import anthropic_events, openai_events
from tests.gateway.translations import generated_events

_ROUNDS = 7
_CHUNKS = 3000
_STYLES: dict[ServiceApi, ApiStyle] = {"chat": "openai", "messages": "anthropic", "google": "google"}
_PAIRS: tuple[tuple[ClientApi, ServiceApi], ...] = (
    ("chat", "messages"),
    ("chat", "google"),
    ("messages", "chat"),
    ("messages", "google"),
    ("responses", "chat"),
    ("responses", "messages"),
    ("responses", "google"),
)


class _Client:
    """A client's way back that takes all at once, and forgets it."""

    is_started = True

    def give_until(self, time: float) -> None: ...
    async def start(self, status: int, headers: Headers, length: int | None) -> None: ...
    async def write(self, chunk: bytes) -> None: ...
    def write_now(self, chunk: bytes, framed: bytes = b"", /) -> bool:
        return True

    async def end(self, last: bytes = b"", /) -> None: ...
    async def send(self, status: int, headers: Headers, body: bytes) -> None: ...
    def abort(self) -> None: ...


def least_us(act: Callable[[], object], count: int = 1) -> float:
    """The least time of some rounds, in µs, for each of so many things that are done at once."""
    times = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        act()
        times.append(time.process_time() - began)
    return min(times) / count * 1e6


def chunk_us(client: ClientApi, service: ServiceApi, events: Sequence[bytes]) -> float:
    """What an event takes from one API to another."""
    conversation = Conversation(model="m", stream=True)
    translated = Translated(
        client=CLIENTS[client],
        service=SERVICES[service],
        client_api=client,
        service_api=service,
        provider=a_provider(service),
        target=Target(model="m", vendor="v"),
        conversation=conversation,
        body=b"",
        path="",
        left_out=(),
    )

    def run() -> None:
        heard = Events(translated, "openai", Uncounted(), Mask(), Decoder(""))
        writer = translated.client.writer(Echo(conversation=conversation, model="m", id="x", created=1))
        for event in events:
            writer.write(heard.read(event))

    return least_us(run, len(events))


def native_chunk_us(events: Sequence[bytes]) -> float:
    """What an event takes that passes."""

    def run() -> None:
        relay = EventRelay(
            attempt=Uncounted(),
            stream=_Client(),
            decoder=Decoder(""),
            rewriter=Rewriter("", hides_usage=False),
            mask=Mask(),
            error_event=lambda error: b"",
            path="/v1/chat/completions",
        )
        for event in events:
            if not relay.take(event):
                relay.hear(event)
                relay.send_now()

    return least_us(run, len(events))


def a_request(turns: int, client: ClientApi) -> bytes:
    """A conversation of so many turns of 400 bytes, and twenty tools where it is long: 60 KB with a hundred turns."""
    said = [{"role": ("user", "assistant")[i % 2], "content": "hello " * 67} for i in range(turns)]
    schema = {"type": "object", "properties": {"path": {"type": "string", "description": "where it is " * 16}}}
    names = [f"tool_{i}" for i in range(20 if turns > 1 else 0)]
    function = {"description": "what it does " * 24, "parameters": schema}
    body: dict[str, Any] = {"model": "m", "stream": True, "messages": said}
    match client:
        case "messages":
            tool = {"description": function["description"], "input_schema": schema}
            body |= {"max_tokens": 1000, "tools": [{"name": name} | tool for name in names]}
        case "responses":
            body["input"] = body.pop("messages")
            body["tools"] = [{"type": "function", "name": name, "strict": False} | function for name in names]
        case _:
            body["tools"] = [{"type": "function", "function": {"name": name} | function} for name in names]
    return msgspec.json.encode(body)


def request_us(client: ClientApi, service: ServiceApi, body: bytes) -> float:
    """What a request takes from one API to another."""
    target, provider = Target(model="m", vendor="v"), a_provider(service)

    def run() -> None:
        SERVICES[service].write_request(CLIENTS[client].read_request(body), target, provider)

    return least_us(run)


def native_request_us(body: bytes) -> float:
    """What is done with a request's body that passes."""
    return least_us(lambda: bodies.replace_model(body, "another", bodies.peek(body)))


def a_provider(service: ServiceApi) -> Provider:
    """An account that no network reaches."""
    return Provider(uuid="a", name="a", api_base="https://upstream.invalid", api_style=_STYLES[service])


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(prog="python -m benchmarks.translation", description=__doc__).parse_args()
    events: dict[ServiceApi, list[bytes]] = {
        "chat": openai_events(_CHUNKS),
        "messages": anthropic_events(_CHUNKS),
        "google": generated_events(_CHUNKS),
    }
    print("| client | service | µs a chunk | µs a request of 400 B | µs a request of 60 KB |")
    print("|---|---|---:|---:|---:|")
    short, long = a_request(1, "chat"), a_request(101, "chat")
    native = native_chunk_us(events["chat"]), native_request_us(short), native_request_us(long)
    print("| chat | native | " + " | ".join(f"{us:.1f}" for us in native) + " |")
    for client, service in _PAIRS:
        each = (
            chunk_us(client, service, events[service]),
            request_us(client, service, a_request(1, client)),
            request_us(client, service, a_request(101, client)),
        )
        print(f"| {client} | {service} | " + " | ".join(f"{us:.1f}" for us in each) + " |")


if __name__ == "__main__":
    main()
