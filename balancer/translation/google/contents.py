"""The turns of a conversation, as the contents of a request to Google."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from typing import assert_never

import msgspec

from balancer import lenient
from balancer.translation.conversation import (
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
from balancer.translation.google.models import Traits
from balancer.translation.google.signatures import placed

Block = dict[str, object]

GO_ON = "(Go on.)"
"""What the user says where a conversation ends with the model: Vertex AI refuses one that does."""
OPENING = "(The conversation begins.)"
"""What the user says where a conversation begins with the model, or says nothing at all."""
UNSIGNED = "skip_thought_signature_validator"
"""What stands for the signature of a call that another model made (ai.google.dev, Thought signatures)."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]{0,127}")
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MAGIC = {
    "/9j/": "image/jpeg",
    "iVBORw0KGgo": "image/png",
    "R0lGOD": "image/gif",
    "UklGR": "image/webp",
    "JVBERi": "application/pdf",
}
_ENDINGS = {
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "png": "image/png",
    "gif": "image/gif",
    "webp": "image/webp",
    "heic": "image/heic",
    "heif": "image/heif",
    "pdf": "application/pdf",
    "txt": "text/plain",
    "md": "text/markdown",
    "html": "text/html",
    "csv": "text/csv",
    "mp3": "audio/mp3",
    "wav": "audio/wav",
}
_USUAL = {"image": "image/jpeg", "document": "application/pdf", "audio": "audio/wav"}
_SCHEMES = ("https://", "http://", "gs://")


class Contents:
    """Turns one by one into contents; neighbours of one role are one. `left_out` grows on the way."""

    def __init__(self, vendor: str, traits: Traits) -> None:
        self._vendor = vendor
        self._traits = traits
        self._names: dict[str, str] = {}
        self._places: dict[str, int] = {}
        self._called = 0
        self._signature = self._signed_at = ""
        self._thoughts: list[tuple[Block, str]] = []
        self._calls: list[Block] = []
        self._signed_calls: dict[int, str] = {}
        self._first_call = 0
        self.contents: list[tuple[str, list[Block]]] = []
        self.left_out: list[str] = []

    def write(self, turns: Iterable[Turn]) -> None:
        """Puts the turns into `contents`. Raises UntranslatableError for a part that none can hold."""
        for turn in turns:
            role = "model" if turn.role == "assistant" else "user"
            if role == "user":
                self._flush()
            self._first_call = len(self._calls)
            parts = self._reminder(turn) if turn.role == "system" else self._parts(turn)
            if not parts:
                continue
            if self.contents and self.contents[-1][0] == role:
                self.contents[-1][1].extend(parts)
            else:
                self.contents.append((role, parts))
        self._flush()
        for role, parts in self.contents:
            if role == "user":
                parts.sort(key=self._place)
        if not self.contents or self.contents[0][0] == "model":
            self.contents.insert(0, ("user", [{"text": OPENING}]))
        if self.contents[-1][0] == "model":
            self.contents.append(("user", [{"text": GO_ON}]))

    def _place(self, part: Block) -> int:
        """Results first, in the order of their calls: that tells which belongs to which."""
        response = part.get("functionResponse")
        if not isinstance(response, dict):
            return self._called
        place: int = response["_place"]
        return place

    def _reminder(self, turn: Turn) -> list[Block]:
        said = "\n".join(part.text for part in turn.parts if isinstance(part, Text) and part.text)
        self._note_caches(turn.parts)
        return [{"text": f"<system>\n{said}\n</system>"}] if said else []

    def _parts(self, turn: Turn) -> list[Block]:
        parts: list[Block] = []
        for part in turn.parts:
            self._part(part, parts)
        return parts

    def _flush(self) -> None:
        """Gives the calls of what the model has said their signatures, and one that waits a text of its own.

        Of the calls that a model makes at once the first has one; what another model made has none.
        """
        for number, signature in self._signed_calls.items():
            if number < len(self._calls):
                self._calls[number]["thoughtSignature"] = signature
        if self._calls and self._traits.needs_signatures:
            self._calls[0].setdefault("thoughtSignature", UNSIGNED)
        self._calls, self._signed_calls = [], {}
        self.left_out += (at for _, at in self._thoughts)
        self._thoughts.clear()
        if self._signature and self.contents and self.contents[-1][0] == "model":
            self.contents[-1][1].append(self._signed({"text": ""}))
        self._signature = ""

    def _part(self, part: Part, parts: list[Block]) -> None:
        match part:
            case Text():
                self._note_caches((part,))
                if part.citations:
                    self.left_out.append(f"{part.at}.citations")
                if part.text:
                    self._say(self._signed({"text": part.text}), parts)
            case Refusal():
                if part.text:
                    self._say(self._signed({"text": part.text}), parts)
            case Media():
                self._say(self._media(part), parts)
            case Thinking():
                self._think(part)
            case Call():
                self._note_caches((part,))
                call: Block = {"functionCall": self._call(part)}
                self._calls.append(call)
                self._say(call, parts)
            case Result():
                self._result(part, parts)
            case _:
                assert_never(part)

    def _signed(self, block: Block) -> Block:
        """The text with the signature that waits for one."""
        if self._signature:
            block["thoughtSignature"] = self._signature
            self._signature = ""
        return block

    def _say(self, block: Block, parts: list[Block]) -> None:
        """Adds a part, behind the thoughts that led to it; those that led to nothing are left out."""
        parts.extend(thought for thought, _ in self._thoughts)
        self._thoughts.clear()
        parts.append(block)

    def _think(self, part: Thinking) -> None:
        if part.vendor != self._vendor or not self._traits.thinks_by:
            self.left_out.append(part.at)
            return
        if part.text and not part.is_redacted:
            self._thoughts.append(({"text": part.text, "thought": True}, part.at))
        number, signature = placed(part.signature)
        if number >= 0:
            self._signed_calls[self._first_call + number] = signature
        elif signature:
            if self._signature:
                self.left_out.append(self._signed_at)
            self._signature, self._signed_at = signature, part.at

    def _call(self, call: Call) -> Block:
        name_ = name(call.name, call.at)
        self._names[call.id] = name_
        # An id may come again in a later answer: its result is of the last call before it.
        self._places[call.id] = self._called
        self._called += 1
        written: Block = {"name": name_, "args": _arguments(call)}
        if self._traits.names_calls and call.id:
            written["id"] = call.id
        return written

    def _result(self, part: Result, parts: list[Block]) -> None:
        self._note_caches((part, *part.content))
        name_ = self._names.get(part.call_id)
        if name_ is None:
            raise UntranslatableError(f"`{part.at}`: gives back what no call before it has asked for", param=part.at)
        texts: list[str] = []
        within: list[Block] = []
        behind: list[Block] = []
        for item in part.content:
            if isinstance(item, Text):
                texts.append(item.text)
                continue
            block = self._media(item)
            if "text" in block:
                texts.append(str(block["text"]))
            elif self._traits.takes_pictures_back and "inlineData" in block:
                within.append(block)
            else:
                behind.append(block)
        response = _response("\n".join(texts), is_error=part.is_error)
        written: Block = {"name": name_, "response": response, "_place": self._places[part.call_id]}
        if self._traits.names_calls and part.call_id:
            written["id"] = part.call_id
        if within:
            written["parts"] = within
        parts.append({"functionResponse": written})
        if behind:
            parts += [{"text": f"From the result of {name_}:"}, *behind]

    # -- media ---------------------------------------------------------------------------------------------------------

    def _media(self, part: Media) -> Block:
        self._note_caches((part,))
        if part.detail not in ("", "auto"):
            self.left_out.append(f"{part.at}.detail")
        if part.wants_citations:
            raise UntranslatableError(
                f"`{part.at}.citations`: Google's models cite no documents of a request", param=f"{part.at}.citations"
            )
        if part.url:
            if not part.url.startswith(_SCHEMES):
                raise UntranslatableError(f"`{part.at}`: Google fetches from HTTP addresses only", param=part.at)
            return {"fileData": {"mimeType": _media_type(part), "fileUri": part.url}}
        if not part.data:
            return {"text": _described(part, part.text)}
        media_type = _media_type(part)
        if part.kind == "document" and (media_type.startswith("text/") or media_type == "application/json"):
            try:
                return {"text": _described(part, base64.b64decode(part.data, validate=True).decode())}
            except (binascii.Error, UnicodeDecodeError) as exc:
                raise UntranslatableError(
                    f"`{part.at}`: the document is no UTF-8 text in base64", param=part.at
                ) from exc
        return {"inlineData": {"mimeType": media_type, "data": part.data}}

    def _note_caches(self, parts: Iterable[Part]) -> None:
        """Names what asks for a cache: Google keeps one by itself."""
        for part in parts:
            if not isinstance(part, Thinking | Refusal) and part.cache:
                self.left_out.append(f"{part.at}.cache_control")


def sent(contents: Iterable[tuple[str, list[Block]]]) -> list[Block]:
    """The contents as they are sent, without what only their order needed."""
    for _, parts in contents:
        for part in parts:
            response = part.get("functionResponse")
            if isinstance(response, dict):
                del response["_place"]
    return [{"role": role, "parts": parts} for role, parts in contents]


def name(name: str, at: str) -> str:
    """A tool's name. Raises UntranslatableError for one that Google refuses."""
    if _NAME.fullmatch(name):
        return name
    raise UntranslatableError(
        f"`{at}`: Google's models take names of tools of up to 128 letters, digits and `_.:-`, no digit first",
        param=at,
    )


def _arguments(call: Call) -> object:
    """A call's arguments as an object. What is no object, though it should be, becomes the `input` of one."""
    if call.kind == "custom":
        return {"input": call.arguments}
    return _object(call.arguments) or ({"input": call.arguments} if call.arguments.strip() else {})


def _response(text: str, *, is_error: bool) -> object:
    """What a tool gave back as the object that Google wants: itself if it is one, else within one."""
    if is_error:
        return {"error": text or "Error"}
    return _object(text) or {"result": text}


def _object(text: str) -> object:
    """A JSON text that is an object, as it is, or with lone surrogates replaced; None for any other."""
    data = text.encode("utf-8", "replace")
    if not data.lstrip().startswith(b"{"):
        return None
    try:
        fields = lenient.decode(_OBJECT, data)
    except lenient.UNREADABLE:
        return None
    return fields if fields and rb"\u" in data else msgspec.Raw(data)


def _media_type(part: Media) -> str:
    told = part.media_type.partition(";")[0].strip().lower()
    if told:
        return "image/jpeg" if told == "image/jpg" else told
    if part.data:
        found = next((kind for magic, kind in _MAGIC.items() if part.data.startswith(magic)), "")
    else:
        path = part.url.partition("?")[0].partition("#")[0]
        found = _ENDINGS.get(path.rpartition(".")[2].lower(), "")
    return found or _USUAL[part.kind]


def _described(part: Media, text: str) -> str:
    """A document of plain text, with what the client says of it before."""
    told = "\n".join(line for line in (part.title, part.context) if line)
    return f"{told}\n\n{text}" if told else text
