"""How a client is told of an error of ours, and where its request went."""

from __future__ import annotations

import math
from collections.abc import Sequence

from balancer import log
from balancer.dialects import Dialect, Headers
from balancer.domain import Pick
from balancer.errors import BalancerError, ConfigurationError, NoServiceError
from balancer.gateway.messages import ClientGoneError, ClientRequest, ClientStream

_LEFT_OUT_LENGTH = 512


async def send_error(
    dialect: Dialect, error: BalancerError, request: ClientRequest, stream: ClientStream, extra: Headers = ()
) -> None:
    """Tells the client of an error, or breaks its connection when its answer has begun already."""
    if request.witness is not None:
        request.witness.error = error.code
    if stream.is_started:
        stream.abort()
        return
    body = dialect.error_body(error, request.request_id)
    challenge = (("WWW-Authenticate", "Bearer"),) if error.status == 401 else ()
    headers = (("Content-Type", "application/json"), *retry_after(error), *challenge, *extra)
    try:
        await stream.start(error.status, headers, len(body))
        await stream.write(body)
        await stream.end()
    except ClientGoneError:
        log.debug("a client left before its error", **request.facts)


def retry_after(error: BalancerError) -> Headers:
    """When the error says that it is worth to ask again: whole seconds, at least 1 (RFC 9110 §10.2.3)."""
    wait_s = error.retry_after_s if isinstance(error, NoServiceError) else None
    if wait_s is not None:
        return (("Retry-After", str(max(1, math.ceil(wait_s)))),)
    return (("Retry-After", "1"),) if error.status == 503 else ()


def decision_headers(pick: Pick, attempts: int, entry: str = "") -> Headers:
    """What tells a client where its request went; `entry` names the smart-routing entry that it belongs to."""
    entries = (("x-balancer-entry", header_text(entry)),) if entry else ()
    degraded = (("x-balancer-degraded", "store"),) if pick.is_local else ()
    return (
        ("x-balancer-decision", pick.decision),
        ("x-balancer-service", header_text(pick.service)),
        *entries,
        ("x-balancer-attempts", str(attempts)),
        *degraded,
    )


def left_out_header(paths: Sequence[str]) -> Headers:
    """What tells a client which fields of its request its service has not got; the last is `...` where more were."""
    told, length = [], 0
    for path in paths:
        length += len(path) + 1
        if length > _LEFT_OUT_LENGTH:
            told.append("...")
            break
        told.append(path)
    return (("x-balancer-left-out", header_text(",".join(told))),) if told else ()


def header_text(text: str) -> str:
    """The text as a header can hold it."""
    return text.encode("ascii", "backslashreplace").decode()


def incomplete(error: ConfigurationError, request: ClientRequest) -> BalancerError:
    """What a client is told where the configuration lacks something; what that is, only the log is told."""
    log.error("a request needs what the configuration does not give", exc=None, reason=str(error), **request.facts)
    return BalancerError("the gateway's configuration is incomplete; its log says what is missing")
