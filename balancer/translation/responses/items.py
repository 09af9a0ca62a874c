"""The input of a request: its items, and the parts of which they are made, as system text and turns."""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Sequence
from typing import Literal

from balancer.errors import RequestError
from balancer.translation.conversation import (
    Cache,
    Call,
    Media,
    Part,
    Refusal,
    Result,
    Role,
    Text,
    Thinking,
    Turn,
)
from balancer.translation.responses import seals
from balancer.translation.responses.fields import Fields, entries, malformed, named, unsupported
from balancer.translation.responses.tools import Tools, called_name

_BOOKKEEPING = ("id", "status", "created_by", "encrypted_function_args")
_PASSED_THROUGH = "internal_chat_message_metadata_passthrough"
_TYPES = {
    "csv": "text/csv",
    "htm": "text/html",
    "html": "text/html",
    "json": "application/json",
    "md": "text/markdown",
    "txt": "text/plain",
}
"""Of files that are sent without a type."""
_SOUNDS = {"mp3": "audio/mpeg", "wav": "audio/wav"}


class Input:
    """Gathers what the items of a request say."""

    def __init__(self, tools: Tools) -> None:
        self.system: list[Text] = []
        self.hints: set[str] = set()
        self._tools = tools
        self._turns: list[tuple[Role, str, list[Part]]] = []
        self._called: set[str] = set()
        self._results: list[tuple[str, str]] = []

    def read(self, value: object) -> None:
        """Adds all items; a string is what the user says."""
        instructions = len(self.system)
        if isinstance(value, str):
            self._say("user", "input", [Text(text=value, at="input")])
        elif isinstance(value, list):
            for at, item in entries(value, "input"):
                self._item(Fields(item, at))
            self._check()
            if not self._turns and len(self.system) == instructions:
                raise RequestError("`input` has nothing that the model could answer", param="input")
        else:
            raise malformed("input", "a string or a list of items")

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns so far. What the model said in one go is one turn, and so are results that stand side by side."""
        return tuple(Turn(role=role, parts=tuple(parts), at=at) for role, at, parts in self._turns)

    def _item(self, item: Fields) -> None:
        kind = item.take("type")
        if kind is None:
            kind = "message" if "role" in item else "item_reference"
        match kind:
            case "message":
                self._message(item)
            case "reasoning":
                self._reasoning(item)
            case "function_call" | "custom_tool_call":
                self._call(item, "function" if kind == "function_call" else "custom")
            case "function_call_output" | "custom_tool_call_output":
                self._result(item)
            case "additional_tools":
                item.skip("role", "id")
                for at, tool in item.each("tools"):
                    self._tools.read(tool, at)
                item.done()
            case "web_search_call":
                self.hints.add(item.at)
            case "item_reference":
                raise unsupported(item.at, "no service of this rule keeps items; send the item itself")
            case str():
                raise unsupported(item.at, f"the services of this rule cannot be given {named(kind)} items")
            case _:
                raise malformed(item.path("type"), "a string")

    def _message(self, item: Fields) -> None:
        role = item.text("role")
        if item.take("phase") is not None:
            self.hints.add("input[].phase")
        match role:
            case "system" | "developer":
                said = list(self._texts(item))
                if self._turns:
                    self._turns.append(("system", item.at, list(said)))
                else:
                    self.system += said
            case "user":
                self._say("user", item.at, self._content(item, "content"))
            case "assistant":
                self._say("assistant", item.at, self._spoken(item))
            case _:
                raise unsupported(item.path("role"), f"{named(role)} is none of user, assistant, system, developer")
        self._done(item)

    def _texts(self, item: Fields) -> Iterator[Text]:
        for part in self._content(item, "content"):
            if not isinstance(part, Text):
                raise unsupported(part.at, "instructions are text only")
            yield part

    def _reasoning(self, item: Fields) -> None:
        summary = list(_thoughts(item, "summary", "summary_text"))
        content = list(_thoughts(item, "content", "reasoning_text"))
        encrypted = item.maybe_text("encrypted_content")
        self._done(item)
        if not (summary or content or encrypted):
            return
        text = "\n\n".join(summary or content)
        vendor, signature, is_redacted = seals.opened(encrypted) if encrypted else ("", "", False)
        thought = Thinking(
            text=text,
            signature=signature,
            vendor=vendor,
            is_redacted=is_redacted and not text,
            at=item.at,
        )
        self._say("assistant", item.at, [thought])

    def _call(self, item: Fields, kind: Literal["function", "custom"]) -> None:
        call_id = item.text("call_id")
        name = called_name(item)
        arguments = item.text("arguments" if kind == "function" else "input")
        self._called_directly(item)
        self._done(item)
        self._called.add(call_id)
        self._say("assistant", item.at, [Call(id=call_id, name=name, arguments=arguments, kind=kind, at=item.at)])

    def _result(self, item: Fields) -> None:
        call_id = item.text("call_id")
        content = self._content(item, "output")
        for part in content:
            if isinstance(part, Media) and part.kind == "audio":
                raise unsupported(part.at, "tools give text, images and files")
        item.skip("name", "namespace")
        self._called_directly(item)
        self._done(item)
        self._results.append((item.path("call_id"), call_id))
        self._say("user", item.at, [Result(call_id=call_id, content=tuple(content), at=item.at)])

    def _called_directly(self, item: Fields) -> None:
        caller = item.inner("caller")
        if caller is not None and caller.take("type") != "direct":
            raise unsupported(item.path("caller"), "only the model itself calls tools")
        if item.flag("async"):
            raise unsupported(item.path("async"), "the model waits for what its tools give")

    def _done(self, item: Fields) -> None:
        item.skip(*_BOOKKEEPING)
        if item.take(_PASSED_THROUGH) is not None:
            self.hints.add(f"input[].{_PASSED_THROUGH}")
        item.done()

    def _say(self, role: Role, at: str, parts: Sequence[Part]) -> None:
        """Adds a turn, or to the last one: all that the model said until it was answered, and results side by side."""
        if self._turns and self._turns[-1][0] == role:
            last = self._turns[-1][2]
            is_results = bool(parts) and isinstance(parts[0], Result) and all(isinstance(part, Result) for part in last)
            if role == "assistant" or is_results:
                last += parts
                return
        self._turns.append((role, at, list(parts)))

    def _check(self) -> None:
        for path, call_id in self._results:
            if call_id not in self._called:
                raise RequestError(f"`{path}` is the `call_id` of no call in the input", param=path)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _content(self, item: Fields, name: str) -> list[Text | Media]:
        value = item.take(name)
        at = item.path(name)
        if isinstance(value, str):
            return [Text(text=value, at=at)]
        if not isinstance(value, list):
            raise malformed(at, "a string or a list of parts")
        return [self._part(Fields(part, path)) for path, part in entries(value, at)]

    def _spoken(self, item: Fields) -> list[Text | Refusal | Media]:
        value = item.take("content")
        at = item.path("content")
        if isinstance(value, str):
            return [Text(text=value, at=at)]
        if not isinstance(value, list):
            raise malformed(at, "a string or a list of parts")
        return [self._spoken_part(Fields(part, path)) for path, part in entries(value, at)]

    def _spoken_part(self, part: Fields) -> Text | Refusal | Media:
        match part.peek("type"):
            case "output_text":
                part.skip("type", "logprobs")
                if part.take("annotations"):
                    self.hints.add("input[].content[].annotations")
                text = Text(text=part.text("text"), at=part.at)
                part.done()
                return text
            case "refusal":
                part.skip("type")
                refusal = Refusal(text=part.text("refusal"), at=part.at)
                part.done()
                return refusal
            case "input_text":
                return self._part(part)
            case _:
                raise unsupported(part.at, "a message of the assistant has texts and refusals only")

    def _part(self, part: Fields) -> Text | Media:
        kind = part.text("type")
        read: Text | Media
        match kind:
            case "input_text":
                read = Text(text=part.text("text"), cache=_cache(part), at=part.at)
            case "input_image":
                read = _image(part)
            case "input_file":
                read = _file(part)
            case "input_audio":
                read = _sound(part)
            case _:
                raise unsupported(part.at, f"the services of this rule cannot be given {named(kind)} parts")
        part.done()
        return read


def _image(part: Fields) -> Media:
    _refuse_file_id(part)
    url, detail = part.text("image_url"), part.maybe_text("detail")
    cache = _cache(part)
    if not url.startswith("data:"):
        return Media(kind="image", url=url, detail=detail, cache=cache, at=part.at)
    media_type, data = _data(url, part.path("image_url"))
    return Media(kind="image", media_type=media_type, data=data, detail=detail, cache=cache, at=part.at)


def _file(part: Fields) -> Media:
    """A document. `file_data` is a data URL, or bare base64, whose type the file's name tells."""
    _refuse_file_id(part)
    part.skip("detail")
    name, cache = part.maybe_text("filename"), _cache(part)
    url, data = part.maybe_text("file_url"), part.maybe_text("file_data")
    if url:
        return Media(kind="document", url=url, title=name, cache=cache, at=part.at)
    if not data:
        raise RequestError(f"`{part.at}` has neither `file_data` nor `file_url`", param=part.at)
    media_type = _TYPES.get(name.rpartition(".")[2].lower(), "application/pdf")
    if data.startswith("data:"):
        media_type, data = _data(data, part.path("file_data"))
    text = _plain(data) if media_type.startswith("text/") or media_type == "application/json" else ""
    return Media(
        kind="document",
        media_type=media_type,
        data="" if text else data,
        text=text,
        title=name,
        cache=cache,
        at=part.at,
    )


def _sound(part: Fields) -> Media:
    sound = part.inner("input_audio")
    if sound is None:
        raise malformed(part.path("input_audio"), "an object")
    data, encoding = sound.text("data"), sound.word("format", tuple(_SOUNDS), "wav")
    sound.done()
    return Media(kind="audio", media_type=_SOUNDS[encoding], data=data, at=part.at)


def _refuse_file_id(part: Fields) -> None:
    if part.maybe_text("file_id"):
        raise unsupported(
            part.path("file_id"), "one vendor's files are not those of the services here; send the file itself"
        )


def _data(url: str, path: str) -> tuple[str, str]:
    """The media type and the base64 of a data URL (RFC 2397)."""
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestError(f"`{path}` must be a data URL in base64", param=path)
    return head.removeprefix("data:").split(";", 1)[0], data


def _plain(data: str) -> str:
    """The text of a document that is plain text, empty where it is something else."""
    try:
        return binascii.a2b_base64(data).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _cache(part: Fields) -> Cache:
    """How long what stands up to here is to be cached: OpenAI's half an hour and more is Anthropic's hour."""
    point = part.inner("prompt_cache_breakpoint")
    if point is None:
        return ""
    point.skip("mode")
    ttl = point.word("ttl", ("30m", "12h"), "")
    point.done()
    return "1h" if ttl else "5m"


def _thoughts(item: Fields, name: str, kind: str) -> Iterator[str]:
    for path, value in item.each(name):
        part = Fields(value, path)
        if part.text("type") != kind:
            raise unsupported(path, f"only `{kind}` parts stand here")
        yield part.text("text")
        part.done()
