"""What translates between the API that a client speaks and the one of a service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from balancer.domain import Provider
from balancer.sse import Event
from balancer.translation.answer import Answer, Echo, Step
from balancer.translation.apis import ClientApi, ServiceApi
from balancer.translation.chat import answers as chat_answers
from balancer.translation.chat import reading as chat_reading
from balancer.translation.chat import streams as chat_streams
from balancer.translation.chat import writing as chat_writing
from balancer.translation.conversation import Conversation, Target, Written
from balancer.translation.google import answers as google_answers
from balancer.translation.google import streams as google_streams
from balancer.translation.google import writing as google_writing
from balancer.translation.messages import answers as messages_answers
from balancer.translation.messages import reading as messages_reading
from balancer.translation.messages import streams as messages_streams
from balancer.translation.messages import writing as messages_writing
from balancer.translation.responses import answers as responses_answers
from balancer.translation.responses import reading as responses_reading
from balancer.translation.responses import streams as responses_streams


class Reader(Protocol):
    """Reads a service's stream."""

    def read(self, event: Event) -> list[Step]:
        """What an event tells. Never raises."""

    def finish(self) -> list[Step]:
        """What it tells that the stream is over: Ended where that is a proper end, nothing where it was cut."""


class Writer(Protocol):
    """Writes a client's stream."""

    def write(self, steps: Sequence[Step]) -> bytes:
        """The events that tell it, b"" for none."""


class ClientSide(msgspec.Struct, frozen=True, kw_only=True):
    """One API as clients speak it."""

    read_request: Callable[[bytes], Conversation]
    write_answer: Callable[[Answer, Echo], bytes]
    writer: Callable[[Echo], Writer]


class ServiceSide(msgspec.Struct, frozen=True, kw_only=True):
    """One API as services speak it."""

    write_request: Callable[[Conversation, Target, Provider], Written]
    read_answer: Callable[[bytes, Target], Answer]
    reader: Callable[[Target], Reader]


def _write_chat(conversation: Conversation, target: Target, provider: Provider) -> Written:
    return chat_writing.write_request(conversation, target, asks_usage=provider.stream_usage)


CLIENTS: Mapping[ClientApi, ClientSide] = {
    "chat": ClientSide(
        read_request=chat_reading.read_request,
        write_answer=chat_answers.write_answer,
        writer=chat_streams.StreamWriter,
    ),
    "messages": ClientSide(
        read_request=messages_reading.read_request,
        write_answer=messages_answers.write_answer,
        writer=messages_streams.StreamWriter,
    ),
    "responses": ClientSide(
        read_request=responses_reading.read_request,
        write_answer=responses_answers.write_answer,
        writer=responses_streams.StreamWriter,
    ),
}
SERVICES: Mapping[ServiceApi, ServiceSide] = {
    "chat": ServiceSide(
        write_request=_write_chat,
        read_answer=chat_answers.read_answer,
        reader=chat_streams.StreamReader,
    ),
    "messages": ServiceSide(
        write_request=lambda conversation, target, _: messages_writing.write_request(conversation, target),
        read_answer=messages_answers.read_answer,
        reader=messages_streams.StreamReader,
    ),
    "google": ServiceSide(
        write_request=lambda conversation, target, _: google_writing.write_request(conversation, target),
        read_answer=google_answers.read_answer,
        reader=google_streams.StreamReader,
    ),
}
