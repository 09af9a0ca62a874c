"""A stream of Google's, read chunk by chunk."""

from __future__ import annotations

from balancer import lenient
from balancer.sse import Event
from balancer.translation.answer import (
    Broke,
    CallBegan,
    CallDelta,
    Counted,
    Counts,
    Ended,
    Pinged,
    RefusalDelta,
    Signed,
    Started,
    Step,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.conversation import Citation, Target
from balancer.translation.google import shapes
from balancer.translation.google.citing import citations_of, place_in
from balancer.translation.google.ending import excuse, reason_of, stop_of
from balancer.translation.google.signatures import of_call

_ENDLESS_BYTES = 1024 * 1024
"""No event without data is as long, but for one that the parser did not hold."""
_DONE = b"[DONE]"
BAD_ANSWER = "upstream_bad_answer"


class StreamReader:
    """Steps from chunks.

    No event ends such a stream: it is whole if a reason was told when the upstream ended it. Some models tell one in
    every chunk, so that it is told by `finish`.

    The signature of a text that has begun is left out: Google does without it, and an answer that ends with a thought
    is none that clients know.
    """

    def __init__(self, target: Target, *, is_whole: bool = False) -> None:
        """`is_whole`: the one event that comes is a whole answer."""
        self._is_whole = is_whole
        self._text = ""
        self.has_answer = False
        """Something was said, or why nothing is."""
        self._vendor = target.vendor
        self._seed = ""
        self._calls = 0
        self._has_started = False
        self._has_said = False
        self._is_over = False
        self._reason = ""
        self._message = ""
        self._counts: Counts | None = None
        self._text_bytes = 0
        self._is_ascii = True
        self._cited: set[Citation] = set()

    def read(self, event: Event) -> list[Step]:
        """What an event tells; never raises."""
        data = event.data
        if self._is_over:
            return []
        if not data:
            return self._silence(event)
        try:
            body = shapes.read_body(data)
        except lenient.UNREADABLE:
            # Some that stand in for Google end their streams as OpenAI does.
            return self.finish() if data.strip() == _DONE else self._broke("the upstream sent a chunk that is no JSON")
        if body.error is not None:
            return self._failed(body.error)
        steps: list[Step] = []
        counts = shapes.counts(body.usage_metadata) if body.usage_metadata is not shapes.NULL else None
        if not self._has_started:
            self._has_started = True
            self._seed = shapes.seed_of(body, data)
            self._counts = counts
            steps.append(Started(id=body.response_id or "", model=body.model_version or "", usage=counts))
        candidate = body.candidates[0] if body.candidates else None
        if candidate is not None:
            if candidate.content is not None:
                for part in candidate.content.parts or ():
                    self._say(part, steps)
            self._cite(candidate, steps)
        reason = reason_of(body, candidate)
        self.has_answer = self.has_answer or candidate is not None or bool(reason)
        if reason:
            self._reason = reason
            self._message = (candidate and candidate.finish_message) or ""
        if counts is not None and counts != self._counts:
            self._counts = counts
            steps.append(Counted(usage=counts))
        return steps

    def finish(self) -> list[Step]:
        """How the answer ended, when it was whole; nothing when it was cut off."""
        if self._is_over or not (self._reason or self._is_whole):
            return []
        self._is_over = True
        steps: list[Step] = []
        excuse_ = excuse(self._reason, self._message, has_said=self._has_said)
        if excuse_:
            steps.append(RefusalDelta(text=excuse_))
        stop = "refused" if excuse_ else stop_of(self._reason, has_calls=self._calls > 0)
        return [*steps, Stopped(stop=stop), Ended()]

    def _say(self, part: shapes.Part, steps: list[Step]) -> None:
        text, call = part.text, part.function_call
        if part.thought:
            if text:
                steps.append(ThinkingDelta(text=text))
            self._sign(part.thought_signature, steps)
            return
        if part.thought_signature:
            if call is not None:
                self._sign(of_call(part.thought_signature, self._calls), steps)
            elif text and not self._has_said:
                self._sign(part.thought_signature, steps)
        if text:
            self._tell(text, steps)
        elif call is not None:
            if call.name:
                index = self._calls
                self._calls += 1
                self._has_said = True
                steps.append(CallBegan(index=index, id=shapes.call_id(call, self._seed, index), name=call.name))
                steps.append(CallDelta(index=index, arguments=shapes.arguments(call)))
        elif text is None:
            self._tell(shapes.shown(part), steps)

    def _sign(self, signature: str | None, steps: list[Step]) -> None:
        if signature:
            steps.append(Signed(signature=signature, vendor=self._vendor))

    def _tell(self, text: str, steps: list[Step]) -> None:
        if text:
            self._has_said = True
            self._text_bytes += len(text)
            self._is_ascii = self._is_ascii and text.isascii()
            if self._is_whole:
                self._text += text
            steps.append(TextDelta(text=text))

    def _cite(self, candidate: shapes.Candidate, steps: list[Step]) -> None:
        """What was not told yet: each chunk may repeat what others said."""
        place = place_in(self._text) if self._is_whole else self._place
        citations = [citation for citation in citations_of(candidate, place) if citation not in self._cited]
        if citations:
            self._cited.update(citations)
            steps.append(TextDelta(citations=tuple(citations)))

    def _place(self, start: int, end: int) -> tuple[int, int]:
        """Bytes are characters in plain ASCII; of other texts all that was said would have to be kept."""
        return (start, end) if self._is_ascii and 0 <= start < end <= self._text_bytes else (-1, -1)

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _silence(self, event: Event) -> list[Step]:
        """A comment is a sign of life. An event beyond the parser's limit has lost its data, and the answer with it."""
        if event.raw.startswith(b":"):
            return [Pinged()]
        return self._broke("the upstream sent a chunk that is too long") if len(event.raw) > _ENDLESS_BYTES else []

    def _failed(self, error: shapes.Error) -> list[Step]:
        self._is_over = True
        code = error.code if isinstance(error.code, int) and 400 <= error.code < 600 else 0
        message = error.message if isinstance(error.message, str) and error.message else "the upstream broke off"
        return [Broke(message=message, code=error.status if isinstance(error.status, str) else "", status=code)]

    def _broke(self, message: str) -> list[Step]:
        self._is_over = True
        return [Broke(message=message, code=BAD_ANSWER)]
