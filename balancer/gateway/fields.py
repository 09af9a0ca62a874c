"""Header fields as the fast readers of requests and answers know them: a part of what HTTP/1.1 allows (RFC 9112 §5)."""

from __future__ import annotations

import re

FIELD = re.compile(r"(?<=\n)([!#$%&'*+.^_`|~0-9A-Za-z-]++):[ \t]*+([ -~\t]*+)\r\n")
"""A field's line, with its name and value: no space before the colon, no folding, no control characters, ASCII only.

Each match is one line and begins behind one: as many as there are lines means that nothing was passed over. Every
quantifier is possessive, so that no head takes long.
"""
LONGEST_LENGTH = 15
"""Of a body's length in digits: below 2^53, and so the same number to every reader."""
