"""Which conversation a request belongs to: requests of one session go to one service, where its prompt is cached."""

from __future__ import annotations

from collections.abc import Mapping

from balancer.bodies import Peek
from balancer.domain import Rule

CLAUDE_CODE_HEADER = "x-claude-code-session-id"
"""Sent with every request by Claude Code (code.claude.com/docs/en/llm-gateway-protocol, November 2026)."""


def session_of(rule: Rule, first: Mapping[str, str], peek: Peek) -> str:
    """What names the session, in the client's own words; empty without one, or when the rule pins none.

    `first` has the first value of each of the client's headers, by the name in lower case.

    The first that is there and not blank: the rule's `session_header`, Claude Code's session header, Anthropic's
    `metadata.user_id`, OpenAI's `prompt_cache_key`, then `user`. It may be of any length.
    """
    if rule.session_affinity <= 0:
        return ""
    for name in (rule.session_header.lower(), CLAUDE_CODE_HEADER):
        session = first.get(name, "").strip() if name else ""
        if session:
            # Bytes that are no text reach us as lone surrogates, which nobody could encode.
            return session.encode("utf-8", "backslashreplace").decode()
    return peek.user_id.strip() or peek.prompt_cache_key.strip() or peek.user.strip()
