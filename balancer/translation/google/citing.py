"""What an answer of Google's goes back to: pages that a search found, and works that it recites."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from balancer import lenient
from balancer.translation.conversation import Citation
from balancer.translation.google.shapes import NULL, Candidate


class _Web(msgspec.Struct):
    uri: str | None = None
    title: str | None = None


class _Chunk(msgspec.Struct):
    web: _Web | None = None


class _Segment(msgspec.Struct, rename="camel"):
    start_index: int = 0
    end_index: int = 0
    text: str | None = None


class _Support(msgspec.Struct, rename="camel"):
    segment: _Segment | None = None
    grounding_chunk_indices: list[int] | None = None


class _Grounding(msgspec.Struct, rename="camel"):
    grounding_chunks: list[_Chunk] | None = None
    grounding_supports: list[_Support] | None = None


class _Source(msgspec.Struct, rename="camel"):
    uri: str | None = None
    title: str | None = None
    start_index: int = 0
    end_index: int = 0


class _Recited(msgspec.Struct, rename="camel"):
    citation_sources: list[_Source] | None = None  # of the Gemini API
    citations: list[_Source] | None = None  # of Vertex AI


_grounding = msgspec.json.Decoder(_Grounding | None)
_recited = msgspec.json.Decoder(_Recited | None)


Place = Callable[[int, int], tuple[int, int]]
"""Which characters the bytes from one place to another are, -1 for both where that is not known."""


def citations_of(candidate: Candidate, place: Place) -> list[Citation]:
    """All that the answer's text so far goes back to. Google counts bytes of UTF-8. What cannot be read is none."""
    found: list[Citation] = []
    if candidate.grounding_metadata is NULL and candidate.citation_metadata is NULL:
        return found
    try:
        grounding = lenient.decode(_grounding, candidate.grounding_metadata)
        recited = lenient.decode(_recited, candidate.citation_metadata)
    except lenient.UNREADABLE:
        return found
    chunks = (grounding and grounding.grounding_chunks) or []
    for support in (grounding and grounding.grounding_supports) or []:
        segment = support.segment or _Segment()
        start, end = place(segment.start_index, segment.end_index)
        for index in support.grounding_chunk_indices or []:
            web = chunks[index].web if 0 <= index < len(chunks) else None
            if web is not None and web.uri:
                found.append(
                    Citation(url=web.uri, title=web.title or "", quote=segment.text or "", start=start, end=end)
                )
    for source in (recited and (recited.citation_sources or recited.citations)) or []:
        if source.uri:
            start, end = place(source.start_index, source.end_index)
            found.append(Citation(url=source.uri, title=source.title or "", start=start, end=end))
    return list(dict.fromkeys(found))


def place_in(text: str) -> Place:
    """Places in a text that is known."""
    said = text.encode()

    def place(start: int, end: int) -> tuple[int, int]:
        if not 0 <= start < end <= len(said):
            return -1, -1
        return len(said[:start].decode(errors="ignore")), len(said[:end].decode(errors="ignore"))

    return place
