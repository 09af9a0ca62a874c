"""What differs between the APIs that clients and upstreams speak: paths, credentials, errors, lists of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from balancer.domain import ApiStyle, Provider
from balancer.errors import BalancerError

Headers = tuple[tuple[str, str], ...]


class Accounts(Protocol):
    """How the accounts that speak one API want to be asked."""

    @property
    def name(self) -> ApiStyle:
        """The dialect's word: the `api_style` of their providers."""

    def credential_headers(self, provider: Provider, access_token: str, client: Callable[[str], str]) -> dict[str, str]:
        """The headers that carry the upstream's credential, and what must go with it.

        `client` gives all values of a header (its name in lower case) that the client sent, empty for none.
        """


class Dialect(Accounts, Protocol):
    """One API's manners towards clients too; a service of a provider with this `api_style` serves them natively."""

    def error_body(self, error: BalancerError, request_id: str) -> bytes:
        """The JSON body of an error, as the vendor's SDK reads it."""

    def error_event(self, error: BalancerError, path: str) -> bytes:
        """The event that tells an open stream that it broke."""

    def models_body(self, models: Sequence[str]) -> bytes:
        """The list of models."""

    def model_body(self, model: str) -> bytes:
        """One model."""
