"""The messages of a chat completions request as turns."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence

import msgspec

from balancer.errors import RequestError
from balancer.translation import marks
from balancer.translation.chat import members
from balancer.translation.chat.members import Members, decoded, refused
from balancer.translation.conversation import (
    Cache,
    Call,
    Media,
    Part,
    Refusal,
    Result,
    Text,
    Thinking,
    Turn,
)

_DATA_URL = re.compile(r"data:([^;,]*)((?:;[^;,]+)*),", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_TYPES = {
    "pdf": "application/pdf",
    "txt": "text/plain",
    "md": "text/markdown",
    "csv": "text/csv",
    "html": "text/html",
    "json": "application/json",
}


class Said(msgspec.Struct, frozen=True):
    """All that is said, and the paths of what is only bookkeeping."""

    system: tuple[Text, ...] = ()
    turns: tuple[Turn, ...] = ()
    hints: tuple[str, ...] = ()


def read(raw: msgspec.Raw | None) -> Said:
    """The messages. Leading ones of the system or developer are its text; neighbouring results are one turn."""
    if raw is None:
        raise members.missing("messages")
    messages = members.objects(raw, "messages")
    if not messages:
        raise RequestError("messages: is empty", param="messages")
    reader = _Reader(messages)
    return Said(system=tuple(reader.system), turns=tuple(reader.turns), hints=tuple(reader.hints))


class _Reader:
    def __init__(self, messages: Sequence[Members]) -> None:
        self.system: list[Text] = []
        self.turns: list[Turn] = []
        self.hints: list[str] = []
        self._results: list[Result] = []
        roles = [message.need("role", members.text) for message in messages]
        names = [message.take("name", members.text) or "" for message in messages]
        speakers = {name for role, name in zip(roles, names, strict=True) if role == "user" and name}
        # One name is bookkeeping; several tell the model who speaks.
        self._is_crowd = len(speakers) > 1
        for message, role, name in zip(messages, roles, names, strict=True):
            self._read(message, role, name)
        self._flush()

    def _read(self, message: Members, role: str, name: str) -> None:
        match role:
            case "tool":
                # Its name is the call's, which is known by its id.
                self._results.append(self._result(message))
                message.finish()
                return
            case "system" | "developer":
                self._flush()
                self._system(message)
            case "user":
                self._flush()
                self._user(message, name if self._is_crowd else "")
            case "assistant":
                self._flush()
                self._assistant(message)
            case _:
                raise refused(message.at("role"), f"{role!r} is not known to the services of this rule")
        if name and not (role == "user" and self._is_crowd):
            self.hints.append(message.at("name"))
        message.finish()

    def _flush(self) -> None:
        if self._results:
            at = self._results[0].at
            self.turns.append(Turn(role="user", parts=tuple(self._results), at=at))
            self._results = []

    def _system(self, message: Members) -> None:
        parts = self._content(message)
        texts = []
        for part in parts:
            if not isinstance(part, Text):
                raise refused(part.at, "the system's message has text only")
            texts.append(part)
        if self.turns:
            self.turns.append(Turn(role="system", parts=tuple(texts), at=message.path))
        else:
            self.system += texts

    def _user(self, message: Members, name: str) -> None:
        parts = self._content(message)
        if name:
            first = next((number for number, part in enumerate(parts) if isinstance(part, Text)), None)
            if first is None:
                parts.insert(0, Text(text=f"{name}:", at=message.path))
            else:
                spoken = parts[first]
                assert isinstance(spoken, Text), "it was looked for"
                parts[first] = msgspec.structs.replace(spoken, text=f"{name}: {spoken.text}")
        self.turns.append(Turn(role="user", parts=tuple(parts), at=message.path))

    def _result(self, message: Members) -> Result:
        call_id = message.need("tool_call_id", members.text)
        own = cache_of(message)
        parts = _parts(message.raw("content"), message.at("content"))
        cached: Cache = own
        content: list[Text | Media] = []
        for part in parts:
            match part:
                case Text() | Media():
                    cached = cached or part.cache
                    content.append(msgspec.structs.replace(part, cache="") if part.cache else part)
                case _:
                    raise refused(message.at("content"), "a tool gives text and media only")
        return Result(call_id=call_id, content=tuple(content), cache=cached, at=message.path)

    def _content(self, message: Members) -> list[Text | Media]:
        """The content of a message that has to have some; a mark of the whole message is its last part's."""
        own = cache_of(message)
        raw = message.raw("content")
        if raw is None:
            raise members.missing(message.at("content"))
        parts: list[Text | Media] = []
        for part in _parts(raw, message.at("content")):
            if not isinstance(part, Text | Media):
                raise refused(part.at, "only an assistant refuses")
            parts.append(part)
        if own and parts and not parts[-1].cache:
            parts[-1] = msgspec.structs.replace(parts[-1], cache=own)
        return parts

    def _assistant(self, message: Members) -> None:
        own = cache_of(message)
        parts: list[Part] = list(_thoughts(message))
        spoken = [part for part in _parts(message.raw("content"), message.at("content")) if _is_said(part)]
        for part in spoken:
            if isinstance(part, Media):
                raise refused(part.at, "an assistant's message has text only")
        parts += spoken
        refusal = message.take("refusal", members.text)
        if refusal:
            parts.append(Refusal(text=refusal, at=message.at("refusal")))
        parts += [self._call(each) for each in message.objects("tool_calls")]
        if message.raw("function_call") is not None:
            raise refused(message.at("function_call"), "deprecated, and not carried; send `tool_calls`")
        if message.raw("audio") is not None:
            raise refused(message.at("audio"), "the services of this rule do not keep audio")
        if own and parts and isinstance(parts[-1], Text | Call):
            parts[-1] = msgspec.structs.replace(parts[-1], cache=own)
        # An answer comes back with all that its vendor put in it.
        self._drop(message)
        self.turns.append(Turn(role="assistant", parts=tuple(parts), at=message.path))

    def _call(self, call: Members) -> Call:
        kind = call.take("type", members.text) or "function"
        call_id = call.need("id", members.text)
        cache = cache_of(call)
        call.raw("index")  # Of a stream, kept by some clients.
        if kind not in ("function", "custom"):
            raise refused(call.at("type"), f"{kind!r} is not known to the services of this rule")
        called = call.object(kind)
        if called is None:
            raise members.missing(call.at(kind))
        name = called.need("name", members.text)
        if kind == "custom":
            text = called.take("input", members.text) or ""
            read = Call(id=call_id, name=name, arguments=text, kind="custom", cache=cache, at=call.path)
        else:
            text = called.take("arguments", members.text) or "{}"
            read = Call(id=call_id, name=name, arguments=text, cache=cache, at=call.path)
        self._drop(called)
        self._drop(call)
        return read

    def _drop(self, answered: Members) -> None:
        for name in answered.names():
            self.hints.append(answered.at(name))
            answered.raw(name)


def _is_said(part: Part) -> bool:
    return not isinstance(part, Text) or bool(part.text)


def cache_of(holder: Members) -> Cache:
    """The mark for a cache that an object carries: Anthropic's, which OpenRouter takes too, or OpenAI's own."""
    cache: Cache = ""
    control = holder.object("cache_control")
    if control is not None:
        control.take("type", members.text)
        cache = "1h" if control.take("ttl", members.text) == "1h" else "5m"
        control.finish()
    point = holder.object("prompt_cache_breakpoint")
    if point is not None:
        point.take("mode", members.text)
        cache = cache or ("5m" if point.take("ttl", members.text) is None else "1h")
        point.finish()
    return cache


# -- parts -------------------------------------------------------------------------------------------------------------


def _parts(raw: msgspec.Raw | None, path: str) -> Iterable[Text | Media | Refusal]:
    if raw is None:
        return
    if members.is_text(raw):
        yield Text(text=decoded(members.text, raw, path), at=path)
        return
    for part in members.objects(raw, path):
        yield _part(part)
        part.finish()


def _part(part: Members) -> Text | Media | Refusal:
    kind = part.need("type", members.text)
    cache = cache_of(part)
    match kind:
        case "text":
            part.raw("annotations")  # What an answer's text came with.
            return Text(text=part.need("text", members.text), cache=cache, at=part.path)
        case "refusal":
            return Refusal(text=part.need("refusal", members.text), at=part.path)
        case "image_url":
            return _image(part, cache)
        case "input_audio":
            return _audio(part, cache)
        case "file":
            return _file(part, cache)
        case _:
            raise refused(part.path, f"a part of the type {kind!r} is not known to the services of this rule")


def _inner(part: Members, name: str) -> Members:
    inner = part.object(name)
    if inner is None:
        raise members.missing(part.at(name))
    return inner


def _image(part: Members, cache: Cache) -> Media:
    image = _inner(part, "image_url")
    url = image.need("url", members.text)
    detail = image.take("detail", members.text) or ""
    image.finish()
    media_type, data = _data(url, image.at("url"))
    if data is None:
        return Media(kind="image", url=url, detail=detail, cache=cache, at=part.path)
    return Media(kind="image", media_type=media_type, data=data, detail=detail, cache=cache, at=part.path)


def _audio(part: Members, cache: Cache) -> Media:
    audio = _inner(part, "input_audio")
    data = audio.need("data", members.text)
    form = audio.need("format", members.text)
    audio.finish()
    return Media(kind="audio", media_type=f"audio/{form}", data=data, cache=cache, at=part.path)


def _file(part: Members, cache: Cache) -> Media:
    file = _inner(part, "file")
    if file.take("file_id", members.text):
        raise refused(file.at("file_id"), "the services of this rule do not have that file; send it as `file_data`")
    name = file.take("filename", members.text) or ""
    given = file.need("file_data", members.text)
    file.finish()
    media_type, data = _data(given, file.at("file_data"))
    if data is None and _URL.match(given):
        return Media(kind="document", url=given, title=name, cache=cache, at=part.path)
    if data is None:
        data = given  # Base64 alone: the name tells what it is.
    if not media_type:
        media_type = _TYPES.get(name.rpartition(".")[2].lower(), "application/pdf")
    if media_type.startswith("image/"):
        return Media(kind="image", media_type=media_type, data=data, cache=cache, at=part.path)
    if media_type.startswith("audio/"):
        return Media(kind="audio", media_type=media_type, data=data, cache=cache, at=part.path)
    text = _plain(data) if media_type.startswith("text/") or media_type == "application/json" else ""
    return Media(
        kind="document",
        media_type=media_type,
        data="" if text else data,
        text=text,
        title=name,
        cache=cache,
        at=part.path,
    )


def _data(url: str, path: str) -> tuple[str, str | None]:
    """The media type and the base64 of a data URL (RFC 2397); None for any other."""
    head = _DATA_URL.match(url)
    if head is None:
        return "", None
    if not head[2].lower().endswith(";base64"):
        raise refused(path, "a data URL has to be base64")
    return head[1].strip().lower(), url[head.end() :]


def _plain(data: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode("utf-8")
    except ValueError:
        return ""


# -- thoughts ----------------------------------------------------------------------------------------------------------


def _thoughts(message: Members) -> Iterable[Thinking]:
    """What the client was given of the model's thoughts, and gives back: details with whose they are, or text alone."""
    plain = message.take("reasoning_content", members.text) or ""
    routed = message.take("reasoning", members.text) or ""
    listed = message.objects("reasoning_details")
    if not listed:
        if plain or routed:
            name = "reasoning_content" if plain else "reasoning"
            yield Thinking(text=plain or routed, at=message.at(name))
        return
    details = [_detail(each) for each in listed]
    thoughts = _joined(details)
    if (plain or routed) and not any(thought.text for thought in thoughts):
        # Of a stream some keep the text from the one field, and the signature from the other.
        signed = next((number for number, thought in enumerate(thoughts) if not thought.is_redacted), None)
        if signed is None:
            yield Thinking(text=plain or routed, at=message.at("reasoning_content"))
        else:
            thoughts[signed] = msgspec.structs.replace(thoughts[signed], text=plain or routed)
    yield from thoughts


def _detail(detail: Members) -> tuple[object, Thinking]:
    index = detail.take("index", members.anything)
    kind = detail.take("type", members.text) or ""
    text = detail.take("text", members.text) or detail.take("summary", members.text) or ""
    signature = detail.take("signature", members.text) or ""
    data = detail.take("data", members.text) or ""
    form = detail.take("format", members.text) or ""
    sealed = data if kind == "reasoning.encrypted" else signature
    vendor, opened = marks.opened(sealed, form) if sealed else (form, "")
    is_redacted = kind == "reasoning.encrypted"
    return index, Thinking(text=text, signature=opened, vendor=vendor, is_redacted=is_redacted, at=detail.path)


def _joined(details: list[tuple[object, Thinking]]) -> list[Thinking]:
    """The thoughts, of entries that a stream brought piece by piece: those of one index are one."""
    thoughts: list[Thinking] = []
    last: object = None
    for index, thought in details:
        if thoughts and index is not None and index == last and not thought.is_redacted:
            before = thoughts[-1]
            thoughts[-1] = msgspec.structs.replace(
                before,
                text=before.text + thought.text,
                signature=thought.signature or before.signature,
                vendor=thought.vendor or before.vendor,
            )
        else:
            thoughts.append(thought)
        last = index
    return thoughts
