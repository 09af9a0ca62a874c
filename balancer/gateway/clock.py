"""How long a request may take, over all its attempts."""

from __future__ import annotations

import contextlib
import time

from balancer.dialects.headers import client_timeout_s
from balancer.errors import DeadlineError
from balancer.gateway.deadlines import Deadlines
from balancer.gateway.messages import ClientRequest, ClientStream

CLIENT_MARGIN_S = 1.0
"""Beyond a provider's timeout, until which what is written to a client may wait."""
_UNLIMITED: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


class Clock:
    """How long a request may still take, counted from its arrival over all attempts."""

    def __init__(self, request: ClientRequest, deadlines: Deadlines, began: float | None = None) -> None:
        """`began`: when it arrived, of the monotonic clock; now unless it is given."""
        self._deadlines = deadlines
        self.began = time.monotonic() if began is None else began
        patience_s = client_timeout_s(request.first)
        self._client_at = self.began + patience_s if patience_s is not None else None

    @property
    def elapsed_s(self) -> float:
        """Since the request's arrival."""
        return time.monotonic() - self.began

    def left_s(self, timeout_s: float) -> float:
        """Until the whole request's limit, or the client's own if that is earlier."""
        return self._ends_at(timeout_s) - time.monotonic()

    def until_first_byte(
        self, timeout_s: float | None = None, *, most_s: float
    ) -> contextlib.AbstractContextManager[object]:
        """Raises DeadlineError when the client's time is over, or the whole request's where that is given.

        SDKs wait so long for the first byte; what comes behind it they wait for anew. `most_s`: what is waited for has
        limits of its own, which end it by then.
        """
        ends_at = self._client_at if timeout_s is None else self._ends_at(timeout_s)
        if ends_at is None or ends_at > time.monotonic() + most_s:
            return _UNLIMITED
        return self._deadlines.at(ends_at, _too_late)

    def limit(self, stream: ClientStream, timeout_s: float) -> None:
        """Lets nothing that is written to the client wait for longer than the provider's timeout.

        The upstream's part has limits of its own: only a client that does not read makes an attempt outlive it. It
        would be taken for lost, and what it holds given away, while it still lives.
        """
        stream.give_until(time.monotonic() + timeout_s + CLIENT_MARGIN_S)

    def _ends_at(self, timeout_s: float) -> float:
        ends_at = self.began + timeout_s
        return ends_at if self._client_at is None else min(ends_at, self._client_at)


def _too_late() -> DeadlineError:
    return DeadlineError("no answer came in the time that the client, or the provider, gives to it")
