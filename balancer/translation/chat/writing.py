"""A conversation as a chat completions request, for upstreams that speak it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from balancer import lenient
from balancer.translation.chat import inputs, models, schemas, shapes
from balancer.translation.conversation import (
    Call,
    Choice,
    Conversation,
    Format,
    Media,
    Part,
    Refusal,
    Result,
    Target,
    Text,
    Thinking,
    Tool,
    Turn,
    UntranslatableError,
    Written,
)

_ID_LENGTH = 40
_USER_LENGTH = 64
_STOPS = 4
_BREAK = "\n\n"
_BEHIND = "(The next message has it.)"
_AUDIO = {"audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/mp3": "mp3", "audio/mpeg": "mp3"}
_NAMELESS = "answer"
_OFF = {"type": "disabled"}


def write_request(conversation: Conversation, target: Target, *, asks_usage: bool = True) -> Written:
    """The request for the target. `asks_usage`: its stream is to end with its usage; a few upstreams refuse to.

    Raises UntranslatableError for what no chat completions upstream can do.
    """
    return _Writer(conversation, target).request(asks_usage)


class _Writer:
    """Writes one request, and notes what is left out of it."""

    def __init__(self, conversation: Conversation, target: Target) -> None:
        self._conversation = conversation
        self._vendor = target.vendor
        self._model = target.model
        self._family = models.family(target.model)
        self._left_out: dict[str, None] = dict.fromkeys(conversation.hints)

    def request(self, asks_usage: bool) -> Written:
        conversation = self._conversation
        body: dict[str, Any] = {"model": self._model, "messages": self._messages()}
        if conversation.stream:
            body["stream"] = True
            if asks_usage:
                body["stream_options"] = {"include_usage": True}
        if conversation.max_tokens is not None:
            name = "max_completion_tokens" if self._family.takes_completion_tokens else "max_tokens"
            body[name] = conversation.max_tokens
        self._reasoning(body)
        self._sampling(body)
        if conversation.format is not None:
            form = conversation.format
            body["response_format"] = _format(form)
            if form.schema is not None and form.is_strict and not schemas.is_strict(form.schema):
                self._leave(f"{form.at}.strict")
        self._tools(body)
        self._user(body)
        return Written(body=msgspec.json.encode(body), left_out=tuple(self._left_out))

    def _leave(self, path: str) -> None:
        self._left_out[path] = None

    # -- what is said --------------------------------------------------------------------------------------------------

    def _messages(self) -> list[dict[str, Any]]:
        conversation = self._conversation
        messages: list[dict[str, Any]] = []
        self._uncached(conversation.system)
        system = [part.text for part in conversation.system if part.text]
        if system:
            # Templates of open models take one system message, and text only.
            messages.append({"role": "system", "content": _BREAK.join(system)})
        last_words = max(
            (number for number, turn in enumerate(conversation.turns) if turn.role == "user" and _has_words(turn)),
            default=-1,
        )
        for number, turn in enumerate(conversation.turns):
            self._uncached(turn.parts)
            match turn.role:
                case "system":
                    texts = _texts(turn.parts)
                    if texts:
                        messages.append({"role": "system", "content": _BREAK.join(texts)})
                case "user":
                    messages += self._user_turn(turn)
                case "assistant":
                    messages += self._assistant_turn(turn, number > last_words)
        return messages

    def _uncached(self, parts: Iterable[Part]) -> None:
        for part in parts:
            match part:
                case Thinking() | Refusal():
                    pass
                case Text() | Media() | Call():
                    if part.cache:
                        self._leave(f"{part.at}.cache_control")
                case Result():
                    if part.cache:
                        self._leave(f"{part.at}.cache_control")
                    self._uncached(part.content)

    def _user_turn(self, turn: Turn) -> list[dict[str, Any]]:
        """Results are messages of their own, at the front: nothing may stand between calls and their results."""
        messages: list[dict[str, Any]] = []
        behind: list[dict[str, Any]] = []
        spoken: list[Text | Media] = []
        for part in turn.parts:
            match part:
                case Result():
                    messages.append(self._result(part, behind))
                case Text() | Media():
                    spoken.append(part)
                case Call() | Thinking() | Refusal():
                    raise UntranslatableError(
                        f"{part.at or turn.at}: a user's turn cannot hold what a model says", param=part.at or turn.at
                    )
        if behind:  # One message, not two: templates of open models want the roles to alternate.
            messages.append({"role": "user", "content": [*behind, *self._pieces(spoken)]})
        elif spoken or not turn.parts:
            messages.append({"role": "user", "content": self._content(spoken)})
        return messages

    def _result(self, result: Result, behind: list[dict[str, Any]]) -> dict[str, Any]:
        """Tools give text only; an image or a file goes to the user's message right behind the results."""
        texts: list[str] = []
        media: list[dict[str, Any]] = []
        for part in result.content:
            match part:
                case Text():
                    texts.append(part.text)
                case Media() if _is_text(part):
                    texts.append(_document(part))
                case Media():
                    media.append(self._media(part))
        call_id = _call_id(result.call_id)
        if media:
            behind.append({"type": "text", "text": f"From the result of {call_id}:"})
            behind += media
        text = "\n".join(texts) or (_BEHIND if media else "")
        return {"role": "tool", "tool_call_id": call_id, "content": f"Error: {text}" if result.is_error else text}

    def _content(self, parts: Sequence[Text | Media]) -> str | list[dict[str, Any]]:
        """Text alone is a string, which every server takes; with media it is parts."""
        if all(isinstance(part, Text) or _is_text(part) for part in parts):
            return _BREAK.join(part.text if isinstance(part, Text) else _document(part) for part in parts)
        return self._pieces(parts)

    def _pieces(self, parts: Sequence[Text | Media]) -> list[dict[str, Any]]:
        return [
            {"type": "text", "text": part.text} if isinstance(part, Text) else self._media(part)
            for part in parts
            if not isinstance(part, Text) or part.text
        ]

    def _media(self, media: Media) -> dict[str, Any]:
        if media.wants_citations:
            raise UntranslatableError(
                f"{media.at}.citations: the services of this rule cannot cite documents", param=f"{media.at}.citations"
            )
        match media.kind:
            case "image":
                image = {"url": media.url or f"data:{media.media_type or 'image/png'};base64,{media.data}"}
                if media.detail:
                    image["detail"] = media.detail
                return {"type": "image_url", "image_url": image}
            case "audio":
                return self._audio(media)
            case "document":
                return self._file(media)

    def _audio(self, media: Media) -> dict[str, Any]:
        form = _AUDIO.get(media.media_type.partition(";")[0].strip().lower())
        if not media.data or form is None:
            raise UntranslatableError(
                f"{media.at}: the services of this rule take sound as base64 of wav or mp3", param=media.at
            )
        return {"type": "input_audio", "input_audio": {"data": media.data, "format": form}}

    def _file(self, media: Media) -> dict[str, Any]:
        if _is_text(media):
            return {"type": "text", "text": _document(media)}
        if not media.data:
            raise UntranslatableError(
                f"{media.at}: the services of this rule take no document by its URL; send its bytes", param=media.at
            )
        if media.context:
            self._leave(f"{media.at}.context")
        kind = media.media_type or "application/pdf"
        name = media.title or ("document.pdf" if kind == "application/pdf" else "document")
        return {"type": "file", "file": {"filename": name, "file_data": f"data:{kind};base64,{media.data}"}}

    def _assistant_turn(self, turn: Turn, is_running: bool) -> list[dict[str, Any]]:
        texts: list[str] = []
        refusals: list[str] = []
        thoughts: list[Thinking] = []
        calls: list[dict[str, Any]] = []
        has_citations = False
        for part in turn.parts:
            match part:
                case Text():
                    has_citations = has_citations or bool(part.citations)
                    texts.append(part.text)
                case Refusal():
                    refusals.append(part.text)
                case Thinking():
                    thoughts.append(part)
                case Call():
                    calls.append(self._call(part))
                case Media() | Result():
                    raise UntranslatableError(
                        f"{part.at or turn.at}: the services of this rule take only text and calls in an assistant's "
                        "turn",
                        param=part.at or turn.at,
                    )
        # A text with citations comes in pieces that go on in the middle of a sentence.
        content = ("" if has_citations else _BREAK).join(text for text in texts if text)
        message: dict[str, Any] = {"role": "assistant", "content": content or None}
        if refusals:
            message["refusal"] = "".join(refusals)
        self._thoughts(thoughts, message, is_running=is_running, has_calls=bool(calls))
        if calls:
            message["tool_calls"] = calls
        if len(message) == 2 and not content:
            if thoughts:
                return []  # Another vendor's thoughts are all that there was.
            message["content"] = ""
        return [message]

    def _thoughts(
        self, thoughts: Sequence[Thinking], message: dict[str, Any], *, is_running: bool, has_calls: bool
    ) -> None:
        """A vendor's own thoughts go back to it, in turns with calls, and in those since the user spoke last.

        DeepSeek refuses a turn with calls whose thoughts are missing, whenever it was; thoughts of older turns cost
        tokens, and are forgotten by all.
        """
        texts: list[str] = []
        details: list[dict[str, object]] = []
        for thought in thoughts:
            if thought.vendor != self._vendor or not (is_running or has_calls):
                self._leave(thought.at)
                continue
            detail = shapes.unpacked(thought.signature, thought.text, len(details)) if thought.signature else None
            if detail is not None:
                details.append(detail)
            if thought.text:
                texts.append(thought.text)
        if details:
            message["reasoning_details"] = details
        elif texts:
            message["reasoning_content"] = "".join(texts)
        elif has_calls and self._family.blank_thought is not None:
            message["reasoning_content"] = self._family.blank_thought

    def _call(self, call: Call) -> dict[str, Any]:
        call_id = _call_id(call.id)
        if call.kind == "custom" and self._family.is_own:
            return {"id": call_id, "type": "custom", "custom": {"name": call.name, "input": call.arguments}}
        arguments = inputs.wrapped(call.arguments) if call.kind == "custom" else call.arguments or "{}"
        return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": arguments}}

    # -- how it is to be answered --------------------------------------------------------------------------------------

    def _reasoning(self, body: dict[str, Any]) -> None:
        reasoning, family = self._conversation.reasoning, self._family
        is_off = reasoning is not None and reasoning.effort == "none"
        if family.is_unforced and self._is_forced():
            body["thinking"] = _OFF
            if reasoning is not None and not is_off:
                self._leave(reasoning.at)
            return
        if reasoning is None:
            return
        if is_off and family.has_switch:
            body["thinking"] = _OFF
            return
        effort = models.effort(reasoning, family.efforts)
        if effort is not None:
            body["reasoning_effort"] = effort
        elif not (reasoning.is_adaptive and reasoning.effort is None):
            self._leave(reasoning.at)

    def _is_forced(self) -> bool:
        choice = self._conversation.choice
        return choice is not None and choice.mode in ("any", "named") and bool(self._conversation.tools)

    def _sampling(self, body: dict[str, Any]) -> None:
        conversation = self._conversation
        family = self._family
        # Models that think take the defaults of these, and nothing else.
        asked = body.get("reasoning_effort")
        is_fixed = family.thinks and (family.thinks_by_itself or asked not in (None, "none"))
        for name, value, default in (
            ("temperature", conversation.temperature, 1),
            ("top_p", conversation.top_p, 1),
            ("presence_penalty", conversation.presence_penalty, 0),
            ("frequency_penalty", conversation.frequency_penalty, 0),
        ):
            if value is None:
                continue
            if is_fixed:
                if value != default:
                    self._leave(conversation.field(name))
            else:
                body[name] = value
        if conversation.top_k is not None:
            if family.is_own:
                self._leave(conversation.field("top_k"))
            else:
                body["top_k"] = conversation.top_k
        if conversation.seed is not None:
            body["seed"] = conversation.seed
        if conversation.stop:
            if family.is_own and is_fixed:
                # platform.openai.com/docs/api-reference/chat/create (November 2026): reasoning models take none.
                path = conversation.field("stop")
                raise UntranslatableError(f"{path}: an OpenAI model that reasons takes no stop sequences", param=path)
            if family.is_own and len(conversation.stop) > _STOPS:
                path = conversation.field("stop")
                raise UntranslatableError(f"{path}: at most {_STOPS} stop sequences can be told to OpenAI", param=path)
            body["stop"] = list(conversation.stop)

    def _user(self, body: dict[str, Any]) -> None:
        """OpenAI takes 64 characters and asks for a digest; others may refuse the field, and have no use for it."""
        user = self._conversation.user
        if not user:
            return
        if self._family.is_own:
            body["user"] = user if len(user) <= _USER_LENGTH else hashlib.sha256(user.encode()).hexdigest()
        else:
            self._leave(self._conversation.field("user"))

    def _tools(self, body: dict[str, Any]) -> None:
        conversation = self._conversation
        choice = conversation.choice or Choice()
        tools = conversation.tools
        if not tools:
            return
        for tool in tools:
            if tool.cache:
                self._leave(f"{tool.at}.cache_control")
        is_own = self._family.is_own
        if choice.among and not is_own:
            # Only OpenAI can be told to call none but these; to others the rest is not shown.
            tools = tuple(tool for tool in tools if tool.name in choice.among)
        body["tools"] = [self._tool(tool) for tool in tools]
        kinds = {tool.name: self._kind(tool) for tool in tools}
        if choice.among and is_own:
            body["tool_choice"] = {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required" if choice.mode == "any" else "auto",
                    "tools": [_named(name, kinds.get(name, "function")) for name in choice.among],
                },
            }
        elif conversation.choice is not None:
            body["tool_choice"] = _choice(choice, kinds.get(choice.name, "function"))
        if conversation.is_parallel is False:
            body["parallel_tool_calls"] = False

    def _kind(self, tool: Tool) -> str:
        return "custom" if tool.kind == "custom" and self._family.is_own else "function"

    def _tool(self, tool: Tool) -> dict[str, Any]:
        described: dict[str, Any] = {"name": tool.name}
        if self._kind(tool) == "custom":
            if tool.description:
                described["description"] = tool.description
            grammar = _grammar(tool.grammar)
            if grammar is not None:
                described["format"] = {"type": "grammar", "grammar": grammar}
            return {"type": "custom", "custom": described}
        if tool.kind == "custom":
            tool = msgspec.structs.replace(tool, description=_told(tool), schema=inputs.SCHEMA)
        if tool.description:
            described["description"] = tool.description
        described["parameters"] = tool.schema
        if tool.is_strict and schemas.is_strict(tool.schema):
            described["strict"] = True
        elif tool.is_strict:
            self._leave(f"{tool.at}.strict")
        return {"type": "function", "function": described}


def _has_words(turn: Turn) -> bool:
    return any(isinstance(part, Text | Media) for part in turn.parts)


def _texts(parts: Iterable[Part]) -> list[str]:
    return [part.text for part in parts if isinstance(part, Text) and part.text]


def _is_text(media: Part) -> bool:
    return isinstance(media, Media) and media.kind == "document" and bool(media.text) and not media.wants_citations


def _document(media: Media) -> str:
    """A text document as part of a text, with what it is called and what is said about it."""
    return "\n".join(line for line in (media.title, media.context, media.text) if line)


def _call_id(given: str) -> str:
    """The id, or a digest of one that is too long; the same for a call and its result."""
    return given if len(given) <= _ID_LENGTH else "call_" + hashlib.sha256(given.encode()).hexdigest()[:24]


def _named(name: str, kind: str) -> dict[str, Any]:
    return {"type": kind, kind: {"name": name}}


def _choice(choice: Choice, kind: str) -> str | dict[str, Any]:
    match choice.mode:
        case "any":
            return "required"
        case "named":
            return _named(choice.name, kind)
        case "auto" | "none":
            return choice.mode


def _format(form: Format) -> dict[str, Any]:
    if form.schema is None:
        return {"type": "json_object"}
    schema: dict[str, Any] = {"name": form.name or _NAMELESS, "schema": form.schema}
    if form.description:
        schema["description"] = form.description
    if form.is_strict and schemas.is_strict(form.schema):
        schema["strict"] = True
    return {"type": "json_schema", "json_schema": schema}


class _Grammar(msgspec.Struct):
    """A grammar as chat completions have it (nested), or as responses do (flat)."""

    grammar: _Grammar | None = None
    definition: str | None = None
    syntax: str | None = None


_grammar_decoder = msgspec.json.Decoder(_Grammar)


def _grammar(raw: msgspec.Raw | None) -> dict[str, str] | None:
    """The grammar of a custom tool, None where there is none that we can read."""
    if raw is None:
        return None
    try:
        found = lenient.decode(_grammar_decoder, raw)
    except lenient.UNREADABLE:
        return None
    found = found.grammar or found
    if found.definition is None:
        return None
    return {"definition": found.definition, "syntax": found.syntax or "lark"}


def _told(tool: Tool) -> str:
    """The description of a custom tool as a function's, with the grammar that its input has to follow."""
    grammar = _grammar(tool.grammar)
    if grammar is None:
        return tool.description
    heading = f"`input` must follow this grammar ({grammar['syntax']}):"
    return _BREAK.join(line for line in (tool.description, heading, grammar["definition"]) if line)
