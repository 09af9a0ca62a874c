"""What a text goes back to, in Anthropic's words and in ours."""

from __future__ import annotations

import msgspec

from balancer.translation.conversation import Citation


class Location(msgspec.Struct, frozen=True):
    """A citation of any kind: of a page of the web, of a search result, or of a document of the request."""

    type: str | None = None
    url: str | None = None
    source: str | None = None
    title: str | None = None
    document_title: str | None = None
    document_index: int | None = None
    cited_text: str | None = None

    def citation(self) -> Citation | None:
        """It in our words; None when it names nothing."""
        quote = self.cited_text or ""
        if self.url or self.source:
            return Citation(url=self.url or self.source or "", title=self.title or "", quote=quote)
        if self.document_index is not None:
            return Citation(document=self.document_index, title=self.document_title or "", quote=quote)
        return None


def location(citation: Citation) -> dict[str, object] | None:
    """A page of the web as a citation of Anthropic's; None for anything else."""
    if not citation.url:
        return None
    return {
        "type": "web_search_result_location",
        "cited_text": citation.quote,
        "encrypted_index": "",
        "title": citation.title or None,
        "url": citation.url,
    }
