"""A whole answer of Google's."""

from __future__ import annotations

import msgspec

from balancer.errors import UpstreamAnswerError
from balancer.sse import Event
from balancer.translation.answer import Answer, Broke
from balancer.translation.conversation import Target, Thinking
from balancer.translation.folding import Folder
from balancer.translation.google.streams import StreamReader


def read_answer(body: bytes, target: Target) -> Answer:
    """The answer, which is of the shape of a stream's chunk. Raises UpstreamAnswerError for what is none."""
    reader, folder = StreamReader(target, is_whole=True), Folder()
    steps = [*reader.read(Event(b"", "", body)), *reader.finish()]
    if not reader.has_answer or any(isinstance(step, Broke) for step in steps):
        raise UpstreamAnswerError("the upstream's answer is none of generateContent")
    folder.take(steps)
    answer = folder.answer()
    # In a stream a thought that nobody signed does not tell whose it is.
    parts = (
        msgspec.structs.replace(part, vendor=target.vendor) if isinstance(part, Thinking) else part
        for part in answer.parts
    )
    return msgspec.structs.replace(answer, parts=tuple(parts))
