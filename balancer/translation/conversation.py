"""What is said to a model, in no API's words.

`at` is where a part stands in the client's request, in the client's words (`messages[2].content[0]`): what refuses it
names that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from balancer.domain import Struct
from balancer.errors import RequestError

Role = Literal["system", "user", "assistant"]
Cache = Literal["", "5m", "1h"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ToolKind = Literal["function", "custom"]

NO_SCHEMA = msgspec.Raw(b'{"type":"object","properties":{}}')
"""Of a tool that takes nothing."""


class UntranslatableError(RequestError):
    """The request asks for what the services' API cannot do; `param` is the field's path in the client's words."""

    code = "unsupported_parameter"
    reason = "not_supported"


# -- parts of a turn ---------------------------------------------------------------------------------------------------


class Citation(Struct, frozen=True, kw_only=True):
    """What a text of an answer goes back to: a page of the web, or a document of the request (then `url` is empty).

    `start` and `end` count characters of the text that cites, or -1 where nobody told them.
    """

    url: str = ""
    title: str = ""
    quote: str = ""
    document: int = -1
    start: int = -1
    end: int = -1


class Text(Struct, frozen=True, kw_only=True, tag="text"):
    """Plain text."""

    text: str
    cache: Cache = ""
    citations: tuple[Citation, ...] = ()
    at: str = ""


class Media(Struct, frozen=True, kw_only=True, tag="media"):
    """An image, document or sound: base64 in `data`, or a `url`; a document may be plain `text` too.

    `media_type` is empty where the client does not tell it. `detail` is OpenAI's: low, high, auto, original.
    """

    kind: Literal["image", "document", "audio"]
    media_type: str = ""
    data: str = ""
    url: str = ""
    text: str = ""
    title: str = ""
    context: str = ""
    detail: str = ""
    wants_citations: bool = False
    cache: Cache = ""
    at: str = ""


class Thinking(Struct, frozen=True, kw_only=True, tag="thinking"):
    """What the model thought before it went on, and what its vendor signed of that.

    `signature` is only for its `vendor` (see `marks`), which may be all that there is. `is_redacted`: the signature is
    the whole of it, encrypted.
    """

    text: str = ""
    signature: str = ""
    vendor: str = ""
    is_redacted: bool = False
    at: str = ""


class Call(Struct, frozen=True, kw_only=True, tag="call"):
    """The model calls a tool. `arguments` is JSON text for a function, free text for a custom tool."""

    id: str
    name: str
    arguments: str = ""
    kind: ToolKind = "function"
    cache: Cache = ""
    at: str = ""


class Result(Struct, frozen=True, kw_only=True, tag="result"):
    """What a tool gave back."""

    call_id: str
    content: tuple[Text | Media, ...] = ()
    is_error: bool = False
    cache: Cache = ""
    at: str = ""


class Refusal(Struct, frozen=True, kw_only=True, tag="refusal"):
    """The model's words for that it will not."""

    text: str
    at: str = ""


Part = Text | Media | Thinking | Call | Result | Refusal


class Turn(Struct, frozen=True, kw_only=True):
    """What one side says at a time. Results of tools are in turns of the user; a `system` turn stands mid-way."""

    role: Role
    parts: tuple[Part, ...]
    at: str = ""


# -- what else is asked for --------------------------------------------------------------------------------------------


class Tool(Struct, frozen=True, kw_only=True):
    """A tool that the client runs. `grammar` is what a custom tool's input must look like, as the client gave it."""

    name: str
    description: str = ""
    schema: msgspec.Raw = NO_SCHEMA
    is_strict: bool = False
    kind: ToolKind = "function"
    grammar: msgspec.Raw | None = None
    cache: Cache = ""
    at: str = ""


class Choice(Struct, frozen=True, kw_only=True):
    """Which tools may, or must, be called: `named` exactly `name`. `among`: only these, by their names; empty: all."""

    mode: Literal["auto", "none", "any", "named"] = "auto"
    name: str = ""
    among: tuple[str, ...] = ()
    at: str = "tool_choice"


class Format(Struct, frozen=True, kw_only=True):
    """How the answer's text must look: any JSON object, or JSON of a schema."""

    schema: msgspec.Raw | None = None
    name: str = ""
    description: str = ""
    is_strict: bool = True
    at: str = "response_format"


class Reasoning(Struct, frozen=True, kw_only=True):
    """How much the model is to think. Of effort and tokens the client gives one, or neither.

    `is_adaptive`: the model itself decides. `is_shown`: the client wants to see it, or a summary; None: it did not say.
    """

    effort: Effort | None = None
    budget_tokens: int | None = None
    is_adaptive: bool = False
    is_shown: bool | None = None
    at: str = "reasoning_effort"


class Conversation(Struct, frozen=True, kw_only=True):
    """A request for a model's answer.

    `fields` has the client's path of one of our fields where the name differs (`max_tokens`: `max_completion_tokens`).
    `hints` are the client's fields that any other API does without: what they ask for changes cost, speed or
    bookkeeping, not the answer. They are left out, and named. `kept` is what the client's API repeats of a request in
    the answer, in that API's own way; no other module looks into it.
    """

    model: str
    system: tuple[Text, ...] = ()
    turns: tuple[Turn, ...] = ()
    tools: tuple[Tool, ...] = ()
    choice: Choice | None = None
    is_parallel: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: tuple[str, ...] = ()
    format: Format | None = None
    reasoning: Reasoning | None = None
    user: str = ""
    stream: bool = False
    wants_usage: bool = True
    fields: Mapping[str, str] = {}
    hints: tuple[str, ...] = ()
    kept: msgspec.Raw = msgspec.Raw(b"")

    def field(self, name: str) -> str:
        """The client's name for one of our fields."""
        return self.fields.get(name, name)


class Target(Struct, frozen=True, kw_only=True):
    """Who a request is written for, and an answer read from: the model, and who signs what it thinks."""

    model: str
    vendor: str


class Written(Struct, frozen=True, kw_only=True):
    """A request as it goes upstream, and the paths, in the client's words, of what was left out of it by rule.

    `betas` are those of Anthropic's that its body needs named in the header `anthropic-beta`.
    """

    body: bytes
    left_out: tuple[str, ...] = ()
    betas: tuple[str, ...] = ()
