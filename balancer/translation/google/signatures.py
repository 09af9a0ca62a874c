"""Signatures that know where they stood.

Google takes one back only on the part that it came with, and clients of some APIs return all thoughts before the text.
So the signature of a call leaves here with the call's number in its answer before it, `0:<signature>`; one without a
number is a text's. Base64 has no colon.
"""

from __future__ import annotations

import re

_OF_CALL = re.compile(r"([0-9]{1,4}):(.*)", re.DOTALL)


def of_call(signature: str, index: int) -> str:
    """The signature of an answer's call, the first of which is 0."""
    return f"{index}:{signature}"


def placed(signature: str) -> tuple[int, str]:
    """The number of the call that a signature is of, -1 for a text, and the signature as Google made it."""
    found = _OF_CALL.fullmatch(signature)
    return (int(found[1]), found[2]) if found else (-1, signature)
