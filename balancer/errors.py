"""The errors of the program: one shallow tree, each with the HTTP `status` and `code` that a client sees.

`reason` says in the metrics why a request was refused: one of REASONS.
"""

from __future__ import annotations

REASONS = (
    "bad_request",
    "exhausted",
    "inactive",
    "internal",
    "limited",
    "not_found",
    "not_supported",
    "store_lost",
    "too_large",
    "unauthorized",
    "unknown_model",
    "unknown_path",
)


class BalancerError(Exception):
    """Base of all our errors; its message is safe to show to a client."""

    status = 500
    code = "internal_error"
    reason = "internal"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigurationError(BalancerError):
    """A document or a setting was refused; `faults` has one line per fault, each with its path."""

    status = 400
    code = "invalid_configuration"

    def __init__(self, message: str, faults: tuple[str, ...] = ()) -> None:
        super().__init__("\n".join((message, *(f"  {fault}" for fault in faults))) if faults else message)
        self.faults = faults


class ConflictError(BalancerError):
    """Somebody else published a revision in between."""

    status = 409
    code = "revision_conflict"


class RequestError(BalancerError):
    """The client's request cannot be served as it stands."""

    status = 400
    code = "invalid_request"
    reason = "bad_request"


class UnauthorizedError(RequestError):
    """The client's credential is missing or wrong."""

    status = 401
    code = "invalid_api_key"
    reason = "unauthorized"


class ForbiddenError(RequestError):
    """The credential is known, and its role may not do this."""

    status = 403
    code = "forbidden"
    reason = "unauthorized"


class UnknownModelError(RequestError):
    """No rule of the scenario has the requested model."""

    status = 404
    code = "model_not_found"
    reason = "unknown_model"


class UnknownPathError(RequestError):
    """Nothing is served under this path or method."""

    status = 404
    code = "not_found"
    reason = "unknown_path"


class NotFoundError(RequestError):
    """The admin API is asked for a rule, service, pool, hold or decision that is not there."""

    status = 404
    code = "not_found"
    reason = "not_found"


class MethodNotAllowedError(RequestError):
    """The path exists, for other methods."""

    status = 405
    code = "method_not_allowed"


class PreconditionError(RequestError):
    """What stands is not what the client read: somebody else was quicker."""

    status = 412
    code = "precondition_failed"


class PreconditionRequiredError(RequestError):
    """Written without saying which state is meant, an edit of somebody else could be lost (RFC 6585 §3)."""

    status = 428
    code = "precondition_required"


class MisdirectedError(RequestError):
    """The request is for a host that this server does not answer to (RFC 9110 §15.5.20)."""

    status = 421
    code = "misdirected"


class BodyTooLargeError(RequestError):
    """The request's body is longer than BALANCER_MAX_BODY_BYTES."""

    status = 413
    code = "request_too_large"
    reason = "too_large"


class ContentTypeError(RequestError):
    """The request's body is neither JSON nor a form that we read."""

    status = 415
    code = "unsupported_media_type"


class ExpectationError(RequestError):
    """The request's Expect cannot be met."""

    status = 417
    code = "expectation_failed"


class NotSupportedError(RequestError):
    """Part of the design, not built yet."""

    status = 400
    code = "not_supported_yet"
    reason = "not_supported"


class UnknownResponseError(RequestError):
    """Which service keeps the response that a request goes on from is not known here."""

    status = 400
    code = "previous_response_not_found"
    reason = "not_found"


class NoServiceError(BalancerError):
    """The rule has no service that may be picked.

    `cause` is `inactive` (none is switched on), `tried` (each that may serve was tried for this request), `budget` (the
    rule's retries are used up), `broken` (open breakers), or one of RateLimitedError's. `retry_after_s` is when it is
    worth to ask again, None when nobody knows.
    """

    status = 503
    code = "no_service_available"
    reason = "exhausted"

    def __init__(self, message: str, *, cause: str = "inactive", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after_s = retry_after_s
        self.reason = cause if cause in ("inactive", "limited") else "exhausted"


class RateLimitedError(NoServiceError):
    """All services are at their limits (`limited`), or wait until their upstream takes requests again (`cooling`)."""

    status = 429
    code = "rate_limit_exceeded"


class StoreUnavailableError(BalancerError):
    """Redis did not answer within the deadline, or is known to be gone."""

    status = 503
    code = "store_unavailable"
    reason = "store_lost"


class UpstreamError(BalancerError):
    """The upstream could not be reached, or broke off before its answer began.

    `was_sent` is False where nothing of the request can have got there.
    """

    status = 502
    code = "upstream_unreachable"

    def __init__(self, message: str, *, was_sent: bool = True) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class UpstreamTimeoutError(UpstreamError):
    """The upstream did not answer in time; which limit ended it is in the message."""

    status = 504
    code = "upstream_timeout"


class DeadlineError(UpstreamTimeoutError):
    """The time that the client, or the provider, gives to a whole request is over: nobody is to be tried any more."""


class UpstreamAnswerError(UpstreamError):
    """The upstream answered with what is no answer to the request. An error of its own keeps its status."""

    code = "upstream_bad_answer"

    def __init__(self, message: str, *, status: int = 502) -> None:
        super().__init__(message)
        self.status = status
