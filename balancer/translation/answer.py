"""What a model says back, in no API's words: whole as an Answer, or in Steps as a stream brings it."""

from __future__ import annotations

from typing import Literal

from balancer.domain import Struct
from balancer.translation.conversation import Call, Citation, Conversation, Refusal, Text, Thinking, ToolKind

Stop = Literal["end", "length", "tool", "stop_sequence", "filtered", "refused", "paused", "context_length"]
"""Why the model ended. `filtered`: somebody cut it off; `refused`: the model declined; `paused`: it would go on."""

Said = Text | Thinking | Call | Refusal


class Counts(Struct, frozen=True, kw_only=True):
    """Tokens. `input` is the whole prompt, with what was read from a cache and what was written to one.

    `reasoning` is part of `output`.
    """

    input: int = 0
    output: int = 0
    cached: int = 0
    cache_creation: int = 0
    reasoning: int = 0


class Answer(Struct, frozen=True, kw_only=True):
    """A whole answer. `id` is the upstream's, empty where it gives none."""

    id: str = ""
    model: str = ""
    parts: tuple[Said, ...] = ()
    stop: Stop = "end"
    stop_sequence: str = ""
    usage: Counts | None = None


# -- a stream's steps --------------------------------------------------------------------------------------------------


class Started(Struct, frozen=True, kw_only=True, tag="started"):
    """The answer begins. Comes once, before all others; `usage` as far as it is known by then."""

    id: str = ""
    model: str = ""
    usage: Counts | None = None


class TextDelta(Struct, frozen=True, kw_only=True, tag="text"):
    """More of a text, and what that goes back to. `begins`: another text part begins with it."""

    text: str = ""
    citations: tuple[Citation, ...] = ()
    begins: bool = False


class ThinkingDelta(Struct, frozen=True, kw_only=True, tag="thinking"):
    """More of a thought. `begins`: another begins with it."""

    text: str
    begins: bool = False


class Signed(Struct, frozen=True, kw_only=True, tag="signed"):
    """The signature of the thought before it, or a whole redacted one. With no thought before it, it stands alone."""

    signature: str
    vendor: str
    is_redacted: bool = False


class RefusalDelta(Struct, frozen=True, kw_only=True, tag="refusal"):
    """More of the model's words for that it will not."""

    text: str


class CallBegan(Struct, frozen=True, kw_only=True, tag="call"):
    """The model calls a tool. `index` counts the answer's calls, from 0; calls may interleave."""

    index: int
    id: str
    name: str
    kind: ToolKind = "function"


class CallDelta(Struct, frozen=True, kw_only=True, tag="arguments"):
    """More of what a tool is called with."""

    index: int
    arguments: str


class Counted(Struct, frozen=True, kw_only=True, tag="counted"):
    """The tokens so far; the last one counts. May come behind Stopped, and before Ended."""

    usage: Counts


class Stopped(Struct, frozen=True, kw_only=True, tag="stopped"):
    """Why the model ended."""

    stop: Stop
    stop_sequence: str = ""


class Pinged(Struct, frozen=True, kw_only=True, tag="pinged"):
    """The upstream is alive."""


class Broke(Struct, frozen=True, kw_only=True, tag="broke"):
    """The upstream tells that it broke off; nothing comes behind it. `status` is 0 where it names none."""

    message: str
    code: str = ""
    status: int = 0


class Ended(Struct, frozen=True, kw_only=True, tag="ended"):
    """The stream is over, as it should be. Comes once, behind all others."""


Step = (
    Started
    | TextDelta
    | ThinkingDelta
    | Signed
    | RefusalDelta
    | CallBegan
    | CallDelta
    | Counted
    | Stopped
    | Pinged
    | Broke
    | Ended
)


class Echo(Struct, frozen=True, kw_only=True):
    """What of a request its answer repeats. `model` is what the client is to see, `created` in seconds since 1970.

    `id` is made by us: letters and digits, to which a writer puts its API's prefix where the upstream gave none.
    `vendor` is the service's (see Target): a streamed thought that nobody signs goes back to that one only.
    """

    conversation: Conversation
    model: str
    id: str
    created: int
    vendor: str = ""
