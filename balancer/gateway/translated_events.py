"""A translated stream as it comes: its steps, and what they tell of the attempt."""

from __future__ import annotations

from balancer.details import DetailedUsage
from balancer.domain import ApiStyle, Outcome, Usage
from balancer.encoding import DecodeError, Decoder
from balancer.errors import UpstreamAnswerError, UpstreamError
from balancer.failures import Verdict, classify_error_event
from balancer.gateway.accounting import Accounting
from balancer.gateway.masking import Mask
from balancer.gateway.translating import Translated
from balancer.sse import Event, Parser
from balancer.translation.answer import (
    Broke,
    CallBegan,
    CallDelta,
    Counted,
    Counts,
    Ended,
    Pinged,
    RefusalDelta,
    Started,
    Step,
    Stopped,
    TextDelta,
    ThinkingDelta,
)
from balancer.translation.apis import ServiceApi
from balancer.translation.faults import broken
from balancer.usage import StreamUsage

_UNREADABLE = "upstream_bad_answer"
"""What a reader says of an event that is none."""


class Events:
    """Reads one stream. Behind `is_over`, or a `fault`, nothing counts that comes; the `verdict` is on the fault."""

    def __init__(
        self, translated: Translated, client: ApiStyle, attempt: Accounting, mask: Mask, decoder: Decoder
    ) -> None:
        self.is_over = False
        self.fault: UpstreamError | None = None
        self.verdict: Verdict | None = None
        self._client: ApiStyle = client
        self._style = translated.provider.api_style
        self._api = translated.service_api
        self._attempt = attempt
        self._mask = mask
        self._decoder = decoder
        self._reader = translated.service.reader(translated.target)
        self._parser = Parser()
        self._usage = StreamUsage() if attempt.details is None else DetailedUsage(attempt.details)
        self._has_content = False

    def read(self, chunk: bytes) -> list[Step]:
        """The steps that a chunk brings."""
        steps: list[Step] = []
        try:
            for part in self._decoder.feed(chunk):
                for event in self._parser.feed(part):
                    self._hear(event, steps)
        except DecodeError:
            self.fault = UpstreamAnswerError("the upstream's stream is not in the coding that it announced")
        return steps

    def finish(self) -> list[Step]:
        """The steps that follow from that nothing more comes."""
        steps: list[Step] = []
        last = self._parser.finish()
        if last is not None:
            self._hear(last, steps)
        if not self.is_over and self.fault is None and self._decoder.is_finished:
            self._take(self._reader.finish(), b"", steps)
        return steps

    def _hear(self, event: Event, steps: list[Step]) -> None:
        if self.is_over or self.fault is not None:
            return
        data = event.data
        if b'"usage' in data or self._attempt.details is not None:
            self._usage.see(event)
            self._attempt.usage = self._usage.usage or self._attempt.usage
        said = self._reader.read(event)
        if not said and not data and event.raw.startswith(b":"):
            said = [Pinged()]
        self._take(said, data, steps)

    def _take(self, told: list[Step], data: bytes, steps: list[Step]) -> None:
        for step in told:
            match step:
                case TextDelta() | ThinkingDelta() | CallBegan() | CallDelta() | RefusalDelta():
                    if not self._has_content:
                        self._has_content = True
                        self._attempt.saw_token()
                case Started():
                    self._count(step.usage)
                    if self._attempt.details is not None:
                        self._attempt.details.hear(step.id, step.model)
                case Counted():
                    self._count(step.usage)
                case Stopped() if self._attempt.details is not None:
                    self._attempt.details.hear(reason=step.stop)
                case Broke():
                    self._break(step, data)
                    return
                case Ended():
                    self.is_over = True
                case _:
                    pass
            steps.append(step)
            if self.is_over:
                return

    def _count(self, counts: Counts | None) -> None:
        if counts is not None and self._usage.usage is None:  # Else the bytes have said it.
            self._attempt.usage = used(counts, self._api)

    def _break(self, step: Broke, data: bytes) -> None:
        if step.code == _UNREADABLE:
            self.verdict = Verdict(outcome=Outcome.FAILED)
        else:
            self.verdict = classify_error_event(self._style, data)
        message = self._mask.over(step.message.encode("utf-8", "replace")).decode("utf-8", "replace")
        self.fault = broken(self._client, self._style, message, step.code, step.status, self.verdict)


def used(counts: Counts | None, api: ServiceApi) -> Usage | None:
    """The tokens as the vendor reports them: Anthropic's input is without what a cache has a part in."""
    if counts is None:
        return None
    apart = counts.cached + counts.cache_creation if api == "messages" else 0
    return Usage(
        input=max(counts.input - apart, 0),
        output=counts.output,
        cached=counts.cached,
        cache_creation=counts.cache_creation,
        reasoning=counts.reasoning,
    )
