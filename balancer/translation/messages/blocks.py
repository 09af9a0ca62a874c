"""The blocks of a client's messages, as parts of turns."""

from __future__ import annotations

from balancer.errors import RequestError
from balancer.translation import marks
from balancer.translation.conversation import (
    Cache,
    Call,
    Citation,
    Media,
    Part,
    Result,
    Text,
    Thinking,
    UntranslatableError,
)
from balancer.translation.messages.fields import INT, OBJECT, RAW, STR, Fields, read

NATIVE = "anthropic"
_SERVER_SEARCH = "tool_search_"


def texts(content: str | list[Fields], at: str) -> tuple[Text, ...]:
    """A content that may hold nothing but text."""
    if isinstance(content, str):
        return (Text(text=content, at=at),)
    found = []
    for block in content:
        if block.need("type", STR) != "text":
            raise UntranslatableError(f"`{block.at}`: only text can be carried here", param=block.at)
        found.append(text(block))
    return tuple(found)


def parts(content: str | list[Fields], at: str) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """What a message holds, and the paths of what any other API does without."""
    if isinstance(content, str):
        return (Text(text=content, at=at),), ()
    found: list[Part] = []
    hints: list[str] = []
    for block in content:
        part = _part(block, hints)
        if part is not None:
            found.append(part)
            block.close()
    return tuple(found), tuple(hints)


def text(block: Fields) -> Text:
    """A text block."""
    found = Text(text=block.need("text", STR), cache=cache(block), citations=_citations(block), at=block.at)
    block.close()
    return found


def cache(block: Fields) -> Cache:
    """How long the prompt up to here is to be cached."""
    control = block.object("cache_control")
    if control is None:
        return ""
    return "1h" if control.take("ttl", STR) == "1h" else "5m"


def _part(block: Fields, hints: list[str]) -> Part | None:
    match block.need("type", STR):
        case "text":
            return text(block)
        case "image":
            hints += block.drop("transformations")
            return _image(block)
        case "document":
            return _document(block)
        case "search_result":
            return _search_result(block)
        case "thinking":
            return _thinking(block)
        case "redacted_thinking":
            vendor, data = marks.opened(block.need("data", STR), NATIVE)
            return Thinking(signature=data, vendor=vendor, is_redacted=True, at=block.at)
        case "tool_use":
            return _call(block)
        case "tool_result":
            return _result(block, hints)
        case "fallback":
            hints.append(block.at)
            return None
        case "server_tool_use" if (block.take("name", STR) or "").startswith(_SERVER_SEARCH):
            hints.append(block.at)
            return None
        case "tool_search_tool_result":
            hints.append(block.at)
            return None
        case other:
            raise UntranslatableError(
                f"`{block.at}`: a block of the type {other[:64]!r} cannot be carried to the services of this model",
                param=block.at,
            )


def _thinking(block: Fields) -> Thinking:
    signature = block.take("signature", STR) or ""
    vendor, signature = marks.opened(signature, NATIVE) if signature else ("", "")
    return Thinking(text=block.take("thinking", STR) or "", signature=signature, vendor=vendor, at=block.at)


def _call(block: Fields) -> Call:
    _refuse_callers(block)
    arguments = block.take("input", RAW)
    if arguments is not None:
        read(OBJECT, arguments, block.path("input"))
    return Call(
        id=block.need("id", STR),
        name=block.need("name", STR),
        arguments="{}" if arguments is None else bytes(arguments).decode(),
        cache=cache(block),
        at=block.at,
    )


def _refuse_callers(block: Fields) -> None:
    caller = block.object("caller")
    if caller is not None and caller.take("type", STR) not in (None, "direct"):
        raise block.refuse("caller", "calls that code made on Anthropic's servers cannot be carried")


def _result(block: Fields, hints: list[str]) -> Result:
    content = block.content("content")
    found: tuple[Text | Media, ...] = ()
    if isinstance(content, str):
        found = (Text(text=content, at=block.path("content")),)
    elif content is not None:
        found = tuple(_of_result(item, hints) for item in content)
    return Result(
        call_id=block.need("tool_use_id", STR),
        content=found,
        is_error=block.flag("is_error"),
        cache=cache(block),
        at=block.at,
    )


def _of_result(block: Fields, hints: list[str]) -> Text | Media:
    kind = block.need("type", STR)
    if kind == "tool_reference":
        # Tools that were held back are given at once: what the client's search for them says is all that is left of it.
        found: Text | Media = Text(
            text=f"Tool {block.need('tool_name', STR)} is loaded.", cache=cache(block), at=block.at
        )
        block.close()
        return found
    if kind == "image":
        hints += block.drop("transformations")
        found = _image(block)
    elif kind == "document":
        found = _document(block)
    elif kind == "search_result":
        found = _search_result(block)
    elif kind == "text":
        found = text(block)
    else:
        raise UntranslatableError(
            f"`{block.at}`: a tool's result of the type {kind[:64]!r} cannot be carried to the services of this model",
            param=block.at,
        )
    block.close()
    return found


def _image(block: Fields) -> Media:
    source = _source(block)
    kind = source.need("type", STR)
    if kind == "base64":
        media = Media(
            kind="image",
            media_type=source.need("media_type", STR),
            data=source.need("data", STR),
            cache=cache(block),
            at=block.at,
        )
    elif kind == "url":
        media = Media(kind="image", url=source.need("url", STR), cache=cache(block), at=block.at)
    else:
        raise _unknown_source(source, kind)
    source.close()
    return media


def _document(block: Fields) -> Media:
    source = _source(block)
    kind = source.need("type", STR)
    media_type = source.take("media_type", STR) or ""
    data = url = plain = ""
    match kind:
        case "base64":
            data = source.need("data", STR)
            media_type = media_type or "application/pdf"
        case "text":
            plain = source.need("data", STR)
            media_type = media_type or "text/plain"
        case "url":
            url = source.need("url", STR)
            media_type = media_type or "application/pdf"
        case "content":
            content = source.content("content") or ""
            plain = "\n\n".join(part.text for part in texts(content, source.path("content")))
            media_type = "text/plain"
        case _:
            raise _unknown_source(source, kind)
    source.close()
    return Media(
        kind="document",
        media_type=media_type,
        data=data,
        url=url,
        text=plain,
        title=block.take("title", STR) or "",
        context=block.take("context", STR) or "",
        wants_citations=_wants_citations(block),
        cache=cache(block),
        at=block.at,
    )


def _search_result(block: Fields) -> Media:
    found = texts(block.objects("content"), block.path("content"))
    return Media(
        kind="document",
        media_type="text/plain",
        text="\n\n".join(part.text for part in found),
        title=block.need("title", STR),
        context=block.need("source", STR),
        wants_citations=_wants_citations(block),
        cache=cache(block),
        at=block.at,
    )


def _source(block: Fields) -> Fields:
    source = block.object("source")
    if source is None:
        raise RequestError(f"`{block.path('source')}` is missing", param=block.path("source"))
    return source


def _unknown_source(source: Fields, kind: str) -> UntranslatableError:
    what = "a file that only Anthropic keeps" if kind == "file" else f"a source of the type {kind[:64]!r}"
    return UntranslatableError(f"`{source.at}`: {what} cannot be carried; send the content itself", param=source.at)


def _wants_citations(block: Fields) -> bool:
    citations = block.object("citations")
    return citations is not None and citations.flag("enabled")


def _citations(block: Fields) -> tuple[Citation, ...]:
    """What an earlier answer's text went back to; places in documents of other kinds than pages of the web are lost."""
    found = []
    for item in block.objects("citations"):
        url = item.take("url", STR)
        document = item.take("document_index", INT)
        title = item.take("title", STR) or item.take("document_title", STR) or ""
        quote = item.take("cited_text", STR) or ""
        if url:
            found.append(Citation(url=url, title=title, quote=quote))
        elif document is not None:
            found.append(Citation(document=document, title=title, quote=quote))
    return tuple(found)
