"""What Redis means when it refuses: whether the command was executed, what to do next, and words for people.

The first word of an error is its code. Most codes say that nothing was executed; then asking again is safe, here or on
another node. Messages hold no address, no user and no password.
"""

from __future__ import annotations

import enum
import os
import re
import ssl
from collections.abc import Iterator

from redis.exceptions import MovedError, RedisError, ResponseError

from balancer.errors import StoreUnavailableError


class Then(enum.Enum):
    """What to do after a refusal."""

    MOVE = "move"
    """Not executed here: find out where the master is now, and ask there."""
    AGAIN = "again"
    """Not executed: ask again in a moment, on the same connection."""
    GIVE_UP = "give up"
    """Not executed, and not going to be before somebody acts."""
    UNKNOWN = "unknown"
    """Refused, perhaps half-way through a script."""


class RefusedError(StoreUnavailableError):
    """Redis answered that it does not execute the command; `then` tells what to do."""

    def __init__(self, message: str, then: Then, moved_to: tuple[int, str, int] | None = None) -> None:
        super().__init__(message)
        self.then = then
        self.moved_to = moved_to
        """The slot, host (empty: the one that was asked) and port of MOVED."""

    @property
    def may_have_run(self) -> bool:
        """True when some of it may have been executed."""
        return self.then is Then.UNKNOWN


_REFUSALS: dict[str, tuple[Then, str]] = {
    "MOVED": (Then.MOVE, "the slot of this pool is on another node now"),
    "READONLY": (Then.MOVE, "this Redis is a read-only replica"),
    "LOADING": (Then.MOVE, "Redis is loading its data"),
    "MASTERDOWN": (Then.MOVE, "this Redis is a replica that has lost its master"),
    "CLUSTERDOWN": (Then.MOVE, "the Cluster is down (CLUSTERDOWN): a slot has no master, or most masters are away"),
    # A slot under migration answers ASK when none of a command's keys is on the old node any more, TRYAGAIN when only
    # some are. Following ASK would not help: our scripts name keys that may not exist (holdings of a new worker, a
    # stream that nobody records), and the new node, even when told ASKING, answers TRYAGAIN while a key is missing.
    # The pool has a handful of keys, so this is over in milliseconds.
    "ASK": (Then.AGAIN, "the slot of this pool is being moved"),
    "TRYAGAIN": (Then.AGAIN, "the slot of this pool is being moved"),
    "BUSY": (Then.AGAIN, "a script or function blocks Redis (BUSY)"),
    "OOM": (Then.GIVE_UP, "Redis is out of memory (OOM): raise maxmemory or add space"),
    "MISCONF": (Then.GIVE_UP, "Redis cannot write to its disk and refuses writes (MISCONF): see its log"),
    "NOREPLICAS": (Then.GIVE_UP, "too few replicas are in sync for a write (NOREPLICAS, min-replicas-to-write)"),
    "NOAUTH": (Then.GIVE_UP, "Redis refused the user (NOAUTH): the URL needs a user and password"),
    "WRONGPASS": (Then.GIVE_UP, "Redis refused the user (WRONGPASS): wrong user or password, or the user is off"),
    "NOPERM": (Then.UNKNOWN, "Redis refused the user (NOPERM)"),
}
_IN_SCRIPT = re.compile(r"^ERR Error running script .*?@user_script: ?\d+: -?([A-Z]+) ")
"""Redis 6.2 wraps what a command in a script was refused with."""
_COMMAND = re.compile(r"'([\w|-]+)' (?:sub)?command|(?:sub)?command '([\w|-]+)'")


def refusal(exc: BaseException) -> RefusedError | None:
    """What the server refused with, None for a lost connection or an error of a script's own."""
    while not isinstance(exc, ResponseError) and isinstance(exc.__cause__, RedisError):
        exc = exc.__cause__  # redis-py wraps a refused handshake, but on unix sockets only.
    if not isinstance(exc, RedisError):
        return None
    code = _code(exc)
    if code not in _REFUSALS:
        return None
    then, message = _REFUSALS[code]
    if code == "NOPERM":
        message = f"{message}: {_missing(str(exc))}"
    moved_to = (exc.slot_id, exc.host, exc.port) if isinstance(exc, MovedError) else None
    return RefusedError(message, then, moved_to)


def _code(exc: RedisError) -> str:
    text = str(exc)
    if exc.status_code and exc.status_code != "ERR":
        return exc.status_code
    if match := _IN_SCRIPT.match(text):
        return match[1]
    if "ACL failure in script" in text:
        return "NOPERM"
    return text.partition(" ")[0]


def _missing(text: str) -> str:
    """What the user may not do. Redis' own sentence names the user."""
    if match := _COMMAND.search(text):
        return f"it may not run {(match[1] or match[2]).upper().replace('|', ' ')}"
    what = "channels" if "channel" in text else "keys" if "key" in text else "commands"
    return f"some of the {what} are not permitted"


def describe(exc: BaseException) -> str:
    """What a server refused, or the kind of failure; never an address."""
    if isinstance(exc, StoreUnavailableError):
        return exc.message
    if refused := refusal(exc):
        return refused.message
    if isinstance(exc, ResponseError):
        return str(exc)
    if "max number of clients" in str(exc):
        return "Redis takes no more connections (maxclients)"
    return f"Redis does not answer ({_reason(exc)})"


def _reason(exc: BaseException) -> str:
    for cause in _causes(exc):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"TLS: {cause.verify_message}"
        if isinstance(cause, ssl.SSLError):
            return f"TLS: {cause.reason or 'failed'}"
        if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
            return os.strerror(cause.errno)  # Its own text may hold the address.
    return type(exc).__name__


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__
