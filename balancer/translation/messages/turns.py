"""The turns of a conversation, as the messages of a request to Anthropic."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from typing import assert_never

import msgspec

from balancer import lenient
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
    UntranslatableError,
)
from balancer.translation.messages.ids import KnownIds

Block = dict[str, object]

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
_IMAGES = ("image/jpeg", "image/png", "image/gif", "image/webp")
_MAGIC = {"/9j/": "image/jpeg", "iVBORw0KGgo": "image/png", "R0lGOD": "image/gif", "UklGR": "image/webp"}
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_THOUGHTS = ("thinking", "redacted_thinking")
OPENING = "(The conversation begins.)"
"""What the user says where a conversation begins with the assistant, or says nothing at all."""
GO_ON = "(Go on.)"
"""What the user says where a conversation ends with the assistant, and the model does not go on with that."""


class Turns:
    """Turns one by one into messages; neighbours of one role are one message. `left_out` grows on the way."""

    def __init__(self, vendor: str, *, takes_thoughts: bool, takes_unsigned: bool) -> None:
        self._vendor = vendor
        self._takes_thoughts = takes_thoughts
        self._takes_unsigned = takes_unsigned
        self._ids = KnownIds()
        self.messages: list[tuple[str, list[Block]]] = []
        self.left_out: list[str] = []
        self.has_thoughts = False

    def write(self, turns: Iterable[Turn]) -> None:
        """Puts the turns into `messages`. Raises UntranslatableError for a part that no message can hold."""
        for turn in turns:
            role = "assistant" if turn.role == "assistant" else "user"
            if role == "assistant" and self.messages and self.messages[-1][0] == "user":
                self._ids.forget()
            blocks = self._reminder(turn) if turn.role == "system" else self._blocks(turn)
            if not blocks:
                continue
            if self.messages and self.messages[-1][0] == role:
                self.messages[-1][1].extend(blocks)
            else:
                self.messages.append((role, blocks))
        for role, blocks in self.messages:
            if role == "user":
                blocks.sort(key=_is_no_result)
        if not self.messages or self.messages[0][0] == "assistant":
            self.messages.insert(0, ("user", [{"type": "text", "text": OPENING}]))

    def ends_with_assistant(self) -> bool:
        """True when the conversation ends with what the model itself is to have said."""
        return self.messages[-1][0] == "assistant"

    def go_on(self) -> None:
        """Lets the user speak last."""
        self.messages.append(("user", [{"type": "text", "text": GO_ON}]))

    def prefill(self) -> None:
        """Leaves of the assistant's last turn what a model that does not think goes on with.

        Thoughts are refused there, and so is white space at the end.
        """
        blocks = self.messages[-1][1]
        blocks[:] = [block for block in blocks if block["type"] not in _THOUGHTS]
        if blocks[-1]["type"] == "text":
            blocks[-1]["text"] = str(blocks[-1]["text"]).rstrip()

    def lacks_thoughts(self) -> bool:
        """True when results of tools end the conversation, and the calls behind them do not begin with a thought."""
        if len(self.messages) < 2 or self.messages[-1][1][0]["type"] != "tool_result":
            return False
        return self.messages[-2][1][0]["type"] not in _THOUGHTS

    def _reminder(self, turn: Turn) -> list[Block]:
        texts = [part for part in turn.parts if isinstance(part, Text) and part.text.strip()]
        if not texts:
            return []
        said = "\n".join(text.text for text in texts)
        return [_with_cache({"type": "text", "text": f"<system>\n{said}\n</system>"}, texts[-1].cache)]

    def _blocks(self, turn: Turn) -> list[Block]:
        blocks = [block for part in turn.parts if (block := self._block(part, turn)) is not None]
        if turn.role == "assistant":
            # Thoughts with nothing behind them are refused.
            while blocks and blocks[-1]["type"] in _THOUGHTS:
                blocks.pop()
        return blocks

    def _block(self, part: Part, turn: Turn) -> Block | None:
        match part:
            case Text():
                if part.citations:
                    self.left_out.append(f"{part.at}.citations")
                return text(part)
            case Refusal():
                return {"type": "text", "text": part.text} if part.text.strip() else None
            case Media():
                if turn.role == "assistant":
                    raise UntranslatableError(
                        f"`{part.at}`: Anthropic's models take no images or documents of the assistant", param=part.at
                    )
                return self._media(part)
            case Thinking():
                return self._thinking(part)
            case Call():
                return _with_cache(
                    {
                        "type": "tool_use",
                        "id": self._ids.of_call(part.id),
                        "name": name(part.name, part.at),
                        "input": _input(part),
                    },
                    part.cache,
                )
            case Result():
                return self._result(part)
        assert_never(part)

    def _thinking(self, part: Thinking) -> Block | None:
        is_taken = self._takes_thoughts and bool(part.signature or self._takes_unsigned)
        if part.vendor != self._vendor or not is_taken:
            self.left_out.append(part.at)
            return None
        self.has_thoughts = True
        if part.is_redacted:
            return {"type": "redacted_thinking", "data": part.signature}
        return {"type": "thinking", "thinking": part.text, "signature": part.signature}

    def _result(self, part: Result) -> Block:
        content: list[Block] = []
        for item in part.content:
            block = text(item) if isinstance(item, Text) else self._media(item)
            if block is not None:
                content.append(block)
        if part.is_error and not content:
            content.append({"type": "text", "text": "Error"})
        block = {"type": "tool_result", "tool_use_id": self._ids.of_result(part.call_id)}
        if content:
            block["content"] = content
        if part.is_error:
            block["is_error"] = True
        return _with_cache(block, part.cache)

    def _media(self, part: Media) -> Block:
        if part.detail not in ("", "auto"):
            self.left_out.append(f"{part.at}.detail")
        match part.kind:
            case "image":
                return _with_cache({"type": "image", "source": _image_source(part)}, part.cache)
            case "document":
                block: Block = {"type": "document", "source": _document_source(part)}
                if part.title:
                    block["title"] = part.title
                if part.context:
                    block["context"] = part.context
                if part.wants_citations:
                    block["citations"] = {"enabled": True}
                return _with_cache(block, part.cache)
            case "audio":
                raise UntranslatableError(f"`{part.at}`: Anthropic's models take no sound", param=part.at)
        assert_never(part.kind)


def text(part: Text) -> Block | None:
    """A text block; None for a text that shows nothing, which is refused."""
    if not part.text.strip():
        return None
    return _with_cache({"type": "text", "text": part.text}, part.cache)


def texts(parts: Sequence[Text]) -> list[Block]:
    """Text blocks, without those that show nothing."""
    return [block for part in parts if (block := text(part)) is not None]


def cache_control(cache: Cache) -> Block:
    """What asks for a cache."""
    return {"type": "ephemeral", "ttl": "1h"} if cache == "1h" else {"type": "ephemeral"}


def name(name: str, at: str) -> str:
    """A tool's name. Raises UntranslatableError for one that Anthropic refuses."""
    if _NAME.fullmatch(name):
        return name
    raise UntranslatableError(
        f"`{at}`: Anthropic's models take names of tools of up to 128 letters, digits, `_` and `-`", param=at
    )


def _with_cache(block: Block, cache: Cache) -> Block:
    if cache:
        block["cache_control"] = cache_control(cache)
    return block


def _is_no_result(block: Block) -> bool:
    return block["type"] != "tool_result"


def _input(call: Call) -> object:
    return arguments(call.arguments) if call.kind == "function" else {"input": call.arguments}


def arguments(text: str) -> object:
    """A call's arguments as an object. What is no object, though it should be, becomes the `input` of one."""
    if not text.strip():
        return {}
    data = text.encode("utf-8", "replace")
    try:
        fields = lenient.decode(_OBJECT, data)
    except lenient.UNREADABLE:
        return {"input": text}
    # Half a pair of surrogates, which nobody else may take, is replaced in the fields; what needs no mending stays.
    return fields if rb"\u" in data else msgspec.Raw(data)


def _image_source(part: Media) -> Block:
    if part.url:
        return {"type": "url", "url": _http(part)}
    media_type = "image/jpeg" if part.media_type == "image/jpg" else part.media_type
    if not media_type:
        media_type = next((kind for magic, kind in _MAGIC.items() if part.data.startswith(magic)), "")
    if media_type not in _IMAGES:
        raise UntranslatableError(
            f"`{part.at}`: Anthropic's models take images as JPEG, PNG, GIF or WebP", param=part.at
        )
    return {"type": "base64", "media_type": media_type, "data": part.data}


def _document_source(part: Media) -> Block:
    if part.url:
        return {"type": "url", "url": _http(part)}
    media_type = part.media_type.partition(";")[0].strip().lower()
    if part.data and media_type in ("", "application/pdf"):
        return {"type": "base64", "media_type": "application/pdf", "data": part.data}
    if not part.data:
        return {"type": "text", "media_type": "text/plain", "data": part.text}
    if media_type.startswith("text/") or media_type == "application/json":
        try:
            plain = base64.b64decode(part.data, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise UntranslatableError(f"`{part.at}`: the document is no UTF-8 text in base64", param=part.at) from exc
        return {"type": "text", "media_type": "text/plain", "data": plain}
    raise UntranslatableError(f"`{part.at}`: Anthropic's models take documents as PDF or text", param=part.at)


def _http(part: Media) -> str:
    if part.url.startswith(("https://", "http://")):
        return part.url
    raise UntranslatableError(f"`{part.at}`: Anthropic fetches from HTTP addresses only", param=part.at)
