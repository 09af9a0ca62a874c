"""The response object and its items, and what of an answer goes where in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from balancer.translation.answer import Counts, Echo, Stop
from balancer.translation.conversation import Citation
from balancer.translation.responses.kept import Kept

Status = Literal["in_progress", "completed", "incomplete"]

_REASONS: dict[Stop, Literal["max_output_tokens", "content_filter"]] = {
    "length": "max_output_tokens",
    "context_length": "max_output_tokens",
    "filtered": "content_filter",
    "refused": "content_filter",
}
"""Why an answer is incomplete, by why the model ended; all others are complete."""

encode = msgspec.json.encode


class UrlCitation(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="url_citation"):
    """A page of the web, and the characters of the text that go back to it."""

    start_index: int
    end_index: int
    url: str
    title: str


class FileCitation(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="file_citation"):
    """A document of the request; it has no id, as OpenAI's files have."""

    file_id: str
    filename: str
    index: int


class OutputText(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    """A text of a message."""

    text: str
    annotations: Sequence[UrlCitation | FileCitation] = ()
    logprobs: tuple[()] = ()


class OutputRefusal(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    """The model's words for that it will not."""

    refusal: str


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """What the model says."""

    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: Sequence[OutputText | OutputRefusal] = ()


class Summary(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="summary_text"):
    """A thought, or a summary of it."""

    text: str


class ReasoningItem(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought."""

    id: str
    summary: Sequence[Summary] = ()
    encrypted_content: str | msgspec.UnsetType = msgspec.UNSET


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """The model calls a function."""

    id: str
    status: Status
    call_id: str
    name: str
    arguments: str = ""
    namespace: str | msgspec.UnsetType = msgspec.UNSET


class CustomCall(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="custom_tool_call"):
    """The model calls a custom tool."""

    id: str
    status: Status
    call_id: str
    name: str
    input: str = ""
    namespace: str | msgspec.UnsetType = msgspec.UNSET


Item = Message | ReasoningItem | FunctionCall | CustomCall
_PREFIXES: dict[type[Item], str] = {Message: "msg", ReasoningItem: "rs", FunctionCall: "fc", CustomCall: "ctc"}


def item_id(kind: type[Item], echo: Echo, index: int) -> str:
    """The id of the answer's item at this place."""
    return f"{_PREFIXES[kind]}_{echo.id}_{index}"


def annotated(citations: Sequence[Citation], length: int) -> list[UrlCitation | FileCitation]:
    """What a text of this length goes back to; all of it does where nobody told the place."""
    return [
        UrlCitation(
            url=citation.url,
            title=citation.title,
            start_index=max(citation.start, 0),
            end_index=citation.end if citation.end >= 0 else length,
        )
        if citation.url
        else FileCitation(file_id="", filename=citation.title, index=max(citation.document, 0))
        for citation in citations
    ]


def ending(stop: Stop, has_refusal: bool) -> tuple[Status, str]:
    """The answer's status, and why it is incomplete. A refusal in words is complete."""
    reason = "" if stop == "refused" and has_refusal else _REASONS.get(stop, "")
    return ("incomplete", reason) if reason else ("completed", "")


class _Incomplete(msgspec.Struct, frozen=True):
    reason: str


class _InputDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int


class _OutputDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class _Usage(msgspec.Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: _InputDetails
    output_tokens: int
    output_tokens_details: _OutputDetails
    total_tokens: int


class _Response(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: bool = False
    error: None = None
    incomplete_details: _Incomplete | None
    model: str
    output: Sequence[Item | msgspec.Raw]
    previous_response_id: None = None
    store: bool = False
    usage: _Usage | None


def response(
    echo: Echo,
    kept: Kept,
    answer_id: str,
    model: str,
    *,
    status: Status = "in_progress",
    reason: str = "",
    output: Sequence[Item] = (),
    usage: Counts | None = None,
) -> bytes:
    """The response object. `answer_id` is the upstream's, empty where it gave none.

    Whoever reads an answer to its end finds tokens there, though they be none: clients do not look for less.
    """
    own = _Response(
        id=answer_id or f"resp_{echo.id}",
        created_at=echo.created,
        status=status,
        incomplete_details=_Incomplete(reason) if reason else None,
        model=echo.model or model,
        output=output,
        usage=None if status == "in_progress" else _usage(usage or Counts()),
    )
    return b"%b,%b" % (encode(own)[:-1], bytes(kept.repeated)[1:])


def _usage(counts: Counts) -> _Usage:
    return _Usage(
        input_tokens=counts.input,
        input_tokens_details=_InputDetails(counts.cached, counts.cache_creation),
        output_tokens=counts.output,
        output_tokens_details=_OutputDetails(counts.reasoning),
        total_tokens=counts.input + counts.output,
    )
