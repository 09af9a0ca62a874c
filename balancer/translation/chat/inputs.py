r"""A custom tool as a function with the one string parameter `input`, and the bare input out of such a call.

Most models know functions only. What they call such a function with is JSON, `{"input":"…"}`, and comes in pieces cut
anywhere, inside of an escape as well.
"""

from __future__ import annotations

import json
import re

import msgspec

from balancer import lenient

SCHEMA = msgspec.Raw(
    b'{"type":"object","properties":{"input":{"type":"string"}},"required":["input"],"additionalProperties":false}'
)

_OPENING = re.compile(r'\s*\{\s*"input"\s*:\s*"')
_MAY_OPEN = re.compile(r'\s*(?:\{\s*(?:"(?:i(?:n(?:p(?:u(?:t(?:"\s*(?::\s*)?)?)?)?)?)?)?)?)?')
# Whole characters of a JSON string. The first half of a pair waits for the second.
_WHOLE = re.compile(
    r'(?:[^"\\]+|\\[^uU]|\\u[dD][89abAB][0-9a-fA-F]{2}(?:\\u[0-9a-fA-F]{4}|(?=[^\\]|\\[^u]))'
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4})*"
)


class _Input(msgspec.Struct, forbid_unknown_fields=True):
    input: str


_input = msgspec.json.Decoder(_Input)


def wrapped(text: str) -> str:
    """The arguments of a function call that has this input."""
    return msgspec.json.encode(_Input(text)).decode()


def bare(arguments: str) -> str:
    """The input of a function call; the arguments as they are where they hold anything else."""
    try:
        return lenient.decode(_input, arguments.encode("utf-8", "replace")).input
    except lenient.UNREADABLE:
        return arguments


class Unwrapping:
    """The input out of arguments that come piece by piece; never more is held than an unfinished escape.

    Arguments that hold anything else come out as they are.
    """

    def __init__(self) -> None:
        self._held = ""
        self._is_open = False
        self._is_closed = False
        self._is_other = False

    def feed(self, piece: str) -> str:
        """What this piece adds to the input."""
        if self._is_closed:
            return ""
        if self._is_other:
            return piece
        text = self._held + piece
        if not self._is_open:
            opening = _OPENING.match(text)
            if opening is None:
                return self._wait(text)
            self._is_open = True
            text = text[opening.end() :]
        whole = _WHOLE.match(text)
        assert whole is not None, "nothing at all is whole too"
        end = whole.end()
        self._is_closed = text[end : end + 1] == '"'
        self._held = "" if self._is_closed else text[end:]
        return _unescaped(whole[0])

    def finish(self) -> str:
        """What was still held when the call ended."""
        held, self._held = self._held, ""
        return held if not self._is_open else ""

    def _wait(self, text: str) -> str:
        if _MAY_OPEN.fullmatch(text):
            self._held = text
            return ""
        self._is_other = True
        self._held = ""
        return text


def _unescaped(text: str) -> str:
    if "\\" not in text:
        return text
    try:
        plain = json.loads(f'"{text}"', strict=False)
    except ValueError:
        return text
    assert isinstance(plain, str), "a JSON string"
    return plain.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
