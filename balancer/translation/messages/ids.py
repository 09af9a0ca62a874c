"""Ids of calls as Anthropic takes them: of its letters, and each once in a conversation."""

from __future__ import annotations

import hashlib
import re

_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_COUNTED = re.compile(r"(?:[a-zA-Z]+[_-])?\d{1,4}")
"""What begins anew with the next answer: `call_0`."""


def _made(seed: str) -> str:
    return f"toolu_{hashlib.sha256(seed.encode('utf-8', 'replace')).hexdigest()[:24]}"


class NewIds:
    """Those of an answer's calls, for a client that may go on with Anthropic itself.

    An upstream's id stays, but for one that Anthropic would refuse then, or that may well come again.
    """

    def __init__(self, seed: str) -> None:
        self._seed = seed
        self._taken: set[str] = set()

    def of(self, id_: str) -> str:
        """The id that the client is told."""
        if id_ in self._taken or not _ID.fullmatch(id_) or _COUNTED.fullmatch(id_):
            id_ = _made(f"{self._seed}:{len(self._taken)}")
        self._taken.add(id_)
        return id_


class KnownIds:
    """Those of a conversation that another API's client holds, whose services may have counted anew in each answer."""

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}
        self._taken: set[str] = set()
        self._given: dict[str, str] = {}
        self._open: dict[str, list[str]] = {}

    def forget(self) -> None:
        """Lets no result belong to a call of an earlier turn any more."""
        self._open.clear()

    def of_call(self, id_: str) -> str:
        """Another id, if need be, for a call."""
        use = self._uses[id_] = self._uses.get(id_, 0) + 1
        found = id_
        if id_ in self._taken or not _ID.fullmatch(id_):
            found = _made(f"{use}:{id_}")
        self._taken.add(found)
        self._given[id_] = found
        self._open.setdefault(id_, []).append(found)
        return found

    def of_result(self, id_: str) -> str:
        """The id of the call that a result is of: of calls with one id the first that has none yet."""
        waiting = self._open.get(id_)
        return waiting.pop(0) if waiting else self._given.get(id_, id_)
