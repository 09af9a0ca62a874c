"""A client's request of the responses API as a conversation."""

from __future__ import annotations

import msgspec

from balancer import lenient
from balancer.errors import RequestError
from balancer.translation.conversation import Conversation, Effort, Format, Reasoning, Text
from balancer.translation.responses.fields import Fields, malformed, named, unsupported
from balancer.translation.responses.items import Input
from balancer.translation.responses.kept import Kept
from balancer.translation.responses.tools import Tools

_FIELDS = {
    "system": "instructions",
    "turns": "input",
    "is_parallel": "parallel_tool_calls",
    "max_tokens": "max_output_tokens",
    "format": "text.format",
}

_HINTS = (
    "access_programs",
    "client_metadata",
    "context_management",
    "image",
    "prompt_cache_retention",
    "stream_options",
)
"""Fields that only cost, speed, bookkeeping or the tools of OpenAI's own servers depend on."""

_REFUSED = {
    "background": "nothing runs on here without its client",
    "background_options": "nothing runs on here without its client",
    "conversation": "no service of this rule keeps conversations; send the whole input",
    "moderation": "the services of this rule do not moderate",
    "previous_response_id": "no service of this rule keeps responses; send the whole input",
    "prompt": "prompt templates are OpenAI's; send the instructions and the input",
}

_OF_TOOLS = (
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""What `include` may ask for, and what only an answer of tools could have that are refused."""

_ENCRYPTED = "reasoning.encrypted_content"
_EFFORTS: tuple[Effort, ...] = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_REPEATED = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
    "truncation",
    "user",
)

_ORDINARY_TIERS = ("", "auto", "default")
_EMPTY = msgspec.Raw(b"{}")
_decoder = msgspec.json.Decoder(dict[str, object])


def read_request(body: bytes) -> Conversation:
    """What the body of a `POST /v1/responses` asks for.

    Raises RequestError for what OpenAI would refuse too, UntranslatableError for what another API cannot carry.
    """
    try:
        members = lenient.decode(_decoder, body)
    except lenient.UNREADABLE as exc:
        raise RequestError(f"the request's body is no JSON object: {exc}") from exc
    fields = Fields(members)
    tools = Tools()
    for at, tool in fields.each("tools"):
        tools.read(tool, at)
    given = Input(tools)
    instructions = fields.maybe_text("instructions")
    if instructions:
        given.system.append(Text(text=instructions, at="instructions"))
    given.read(fields.take("input"))
    hints = set(_hints(fields))
    is_sealed = _is_sealed(fields, hints)
    user = fields.maybe_text("user")
    conversation = Conversation(
        model=fields.text("model"),
        system=tuple(given.system),
        turns=given.turns,
        tools=tools.all,
        choice=tools.choice(fields),
        is_parallel=fields.flag("parallel_tool_calls"),
        max_tokens=fields.count("max_output_tokens"),
        temperature=fields.number("temperature"),
        top_p=fields.number("top_p"),
        format=_format(fields, hints),
        reasoning=_reasoning(fields, hints),
        user=fields.maybe_text("safety_identifier") or user,
        stream=bool(fields.flag("stream")),
        fields={**_FIELDS, "user": "safety_identifier" if members.get("safety_identifier") else "user"},
        hints=tuple(sorted(hints | given.hints | tools.hints)),
        kept=_kept(members, is_sealed, tools),
    )
    _refuse(fields)
    return conversation


def _hints(fields: Fields) -> set[str]:
    hints = {name for name in _HINTS if fields.take(name)}
    if fields.maybe_text("prompt_cache_key"):
        hints.add("prompt_cache_key")
    if fields.raw("metadata") not in (None, _EMPTY):
        hints.add("metadata")
    if fields.count("max_tool_calls") is not None:
        hints.add("max_tool_calls")
    if fields.maybe_text("service_tier") not in _ORDINARY_TIERS:
        hints.add("service_tier")
    if fields.flag("store"):
        hints.add("store")
    options = fields.inner("prompt_cache_options")
    if options is not None:
        if options.flag("prewarm"):
            raise unsupported(options.path("prewarm"), "there is no request here that has no answer")
        hints.add("prompt_cache_options")
    if fields.peek("safety_identifier") and fields.peek("user"):
        hints.add("user")
    return hints


def _is_sealed(fields: Fields, hints: set[str]) -> bool:
    """True when the client wants the signatures; what else it wants included is refused, or can never come up."""
    wants = False
    for path, value in fields.each("include"):
        if value == _ENCRYPTED:
            wants = True
        elif value in _OF_TOOLS:
            hints.add("include")
        elif isinstance(value, str):
            raise unsupported(path, f"{named(value)} is nothing that the services of this rule give")
        else:
            raise malformed(path, "a string")
    return wants


def _format(fields: Fields, hints: set[str]) -> Format | None:
    text = fields.inner("text")
    if text is None:
        return None
    if text.word("verbosity", ("low", "medium", "high"), "medium") != "medium":
        hints.add("text.verbosity")
    given = text.inner("format")
    text.done()
    if given is None:
        return None
    kind = given.text("type")
    form: Format | None
    match kind:
        case "text":
            form = None
        case "json_object":
            form = Format(at=given.at, is_strict=False)
        case "json_schema":
            schema = given.raw("schema")
            if schema is None:
                raise malformed(given.path("schema"), "an object")
            form = Format(
                schema=schema,
                name=given.text("name"),
                description=given.maybe_text("description"),
                is_strict=given.flag("strict") is True,
                at=given.at,
            )
        case _:
            raise unsupported(given.path("type"), f"{named(kind)} is none of text, json_object, json_schema")
    given.done()
    return form


def _reasoning(fields: Fields, hints: set[str]) -> Reasoning | None:
    given = fields.inner("reasoning")
    if given is None:
        return None
    effort = given.maybe_text("effort")
    known = next((known for known in _EFFORTS if known == effort), None)
    if effort and known is None:
        raise unsupported(given.path("effort"), f"{named(effort)} is none of {', '.join(_EFFORTS)}")
    words = ("auto", "concise", "detailed", "none")
    summary = given.word("summary", words, "")
    summary = given.word("generate_summary", words, "") or summary
    if given.word("mode", ("standard", "pro"), "standard") != "standard":
        raise unsupported(given.path("mode"), "the services of this rule have the standard mode only")
    if given.maybe_text("context") not in ("", "auto"):
        hints.add("reasoning.context")
    given.done()
    if known is None and not summary:
        return None
    return Reasoning(
        effort=known,
        is_shown=summary != "none" if summary else None,
        at=given.path("effort") if known else given.at,
    )


def _refuse(fields: Fields) -> None:
    if fields.peek("background") is False:
        fields.skip("background")
    if fields.peek("top_logprobs") == 0:
        fields.skip("top_logprobs")
    if fields.word("truncation", ("auto", "disabled"), "disabled") != "disabled":
        raise unsupported("truncation", "the services of this rule do not cut the input; send less, or `disabled`")
    fields.refuse("top_logprobs", "the services of this rule do not tell the odds of tokens")
    for name, why in _REFUSED.items():
        fields.refuse(name, why)
    fields.done()


def _kept(members: dict[str, object], is_sealed: bool, tools: Tools) -> msgspec.Raw:
    repeated = {name: members.get(name) for name in _REPEATED}
    given = {name: value for name, value in repeated.items() if value is not None}
    repeated = {
        **repeated,
        "metadata": {},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "truncation": "disabled",
        **given,
        "text": {"format": {"type": "text"}, "verbosity": "medium", **_given(given, "text")},
        "reasoning": {"effort": None, "summary": None, **_given(given, "reasoning")},
    }
    kept = Kept(
        repeated=msgspec.Raw(msgspec.json.encode(repeated)),
        is_sealed=is_sealed or members.get("store") is False,
        namespaces=tools.namespaces,
    )
    return msgspec.Raw(msgspec.json.encode(kept))


def _given(members: dict[str, object], name: str) -> dict[str, object]:
    """What a member says; "none" is a word of clients, which answers do not have."""
    value = members.get(name)
    if not isinstance(value, dict):
        return {}
    return {key: said for key, said in value.items() if said is not None and (key, said) != ("summary", "none")}
