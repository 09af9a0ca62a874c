"""Picks over the API: attempts that a program outside makes, and that any worker can settle.

A worker's own picks are settled in its numbered batches, and only it can number them. Here the settle may arrive at
another worker than the pick, or after the one that picked has died. So each pick over the API is made under a worker id
of its own, `api-<random>`, used for exactly one pick (number 1) and one batch (number 1), by the same scripts. That
gives what other attempts have, without a new rule in them:

- settled once, over whichever worker: batch 1 is applied if the last one was 0; repeated, it changes nothing;
- leased: its lease is the hold's time; when that ends unsettled, any worker reaps it, and it is counted as `lost`;
- a settle that comes later all the same takes the `lost` back.

What it costs is a key for each pick. It is kept for as long as a settle is accepted: the hold's time and an hour, then
the hold is refused as over, so that a repeat can never be counted again. Settled, it leaves the list of leases at once;
never settled, it is listed as reaped for 7 days, as a dead worker is. Only ids that begin with `api-` are accepted, so
that no hold can speak for a worker.

Instead, settles could have been sent on to the worker that picked, but it may be dead or unreachable; or an entry could
have been settled without its worker's batch, but then a repeat would count twice.

The token that names a hold has all that a settle needs; it is opaque to its owner, not secret and not signed: whoever
has the admin token may settle anything.
"""

from __future__ import annotations

import base64
import binascii
import re
import secrets
import time

import msgspec

from balancer.errors import NotFoundError, RequestError
from balancer.store import keys

LATE_MS = 3_600_000
"""So long after the hold's time a settle is accepted."""
_MARGIN_MS = 3_600_000
"""So much longer is remembered that it was settled; more than the clocks of two machines differ."""
_WORKER = re.compile(re.escape(keys.HOLD_PREFIX) + "[0-9a-f]{16}")


def new_worker() -> str:
    """A worker id for one pick."""
    return keys.HOLD_PREFIX + secrets.token_hex(8)


class Hold(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """What names an attempt to whoever made it: where it is held, of what, and until when (ms)."""

    pool: str
    worker: str
    rule: str
    service: str
    until_ms: int

    def token(self) -> str:
        """The hold as text without blanks."""
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).decode().rstrip("=")

    def kept_ms(self) -> int:
        """How long a settle of it must be remembered from now on. Raises NotFoundError when it is too late for one."""
        left_ms = self.until_ms + LATE_MS - round(time.time() * 1000)
        if left_ms <= 0:
            raise NotFoundError("the hold is over: it was settled, or counted as lost, long ago", param="hold")
        return left_ms + _MARGIN_MS


def read(token: str) -> Hold:
    """The hold that a token names. Raises RequestError for what is none."""
    try:
        text = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        hold = msgspec.json.decode(text, type=Hold)
    except (binascii.Error, ValueError) as exc:
        raise RequestError("hold: not one that a pick has given", param="hold") from exc
    if not _WORKER.fullmatch(hold.worker) or not hold.service:
        raise RequestError("hold: not one that a pick has given", param="hold")
    return hold
