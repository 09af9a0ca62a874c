"""A request for services that speak another API than its client: read once, and written for each that it may go to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from balancer import bodies
from balancer.bodies import Peek
from balancer.dialects.google import GENERATE, STREAM
from balancer.dialects.paths import Route
from balancer.domain import Provider, Service, Struct
from balancer.errors import RequestError
from balancer.gateway.matching import FOREIGN, NATIVE, Plan
from balancer.gateway.messages import ClientRequest
from balancer.translation import marks
from balancer.translation.apis import ClientApi, ServiceApi, is_native, service_api
from balancer.translation.conversation import Conversation, Target, UntranslatableError, Written
from balancer.translation.messages.unmarked import without_foreign as unmarked_messages
from balancer.translation.pairs import CLIENTS, SERVICES, ClientSide, ServiceSide
from balancer.translation.responses.unmarked import without_foreign as unmarked_responses

_NAMES_SHOWN = 20
_UNMARK: dict[ClientApi, Callable[[bytes], bytes]] = {"messages": unmarked_messages, "responses": unmarked_responses}


class Translated(Struct, frozen=True, kw_only=True):
    """A request as one service gets it, and who reads its answer."""

    client: ClientSide
    service: ServiceSide
    client_api: ClientApi
    service_api: ServiceApi
    provider: Provider
    target: Target
    conversation: Conversation
    body: bytes
    path: str
    """Begins with /v1."""
    left_out: tuple[str, ...]


class Translation:
    """What becomes of one request for services of other APIs. Nothing is read before one of these may be picked."""

    def __init__(self, request: ClientRequest, route: Route, find: Callable[[str], Provider | None]) -> None:
        """`find` gives the provider of a uuid."""
        self._request = request
        self._api = route.api
        self._find = find
        self._read: Conversation | RequestError | None = None
        self._written: dict[tuple[str, Target], Written] = {}
        self._refusals: dict[ServiceApi, RequestError | None] = {}
        self._plain: tuple[bytes, Peek] | None = None

    def native(self, plan: Plan, peek: Peek) -> tuple[bytes, Peek]:
        """The body for services of the client's own API, without marks that none of their vendors has made."""
        body = self._request.body
        if plan.apart[self._api] == NATIVE or self._api not in _UNMARK or marks.PREFIX_BYTES not in body:
            return body, peek
        if self._plain is None:
            plain = _UNMARK[self._api](body)
            self._plain = plain, bodies.peek(plain)
        return self._plain

    def barred(self, plan: Plan, only: str = "") -> tuple[str, ...]:
        """The ids of the plan's services that cannot be asked what the request asks.

        Raises RequestError, for the first of them, where no service is left; with `only`, where it is that one.
        """
        if plan.apart[self._api] != FOREIGN:
            return ()
        refusal: RequestError | None = None
        barred = []
        for service in plan.foreign[self._api]:
            refused = self._refusal(service, plan.foreign[self._api])
            if refused is not None:
                refusal = refusal or refused
                barred.append(service.id)
        if refusal is not None and (len(barred) == len(plan.usable) or only in barred):
            raise refusal
        return tuple(barred)

    def to(self, provider: Provider, model: str) -> Translated | None:
        """The request as that service gets it, None where it gets the client's own. Raises RequestError."""
        if is_native(self._api, provider):
            return None
        if self._api == "other":
            raise _untranslated(self._request.path, ())
        api, conversation = service_api(provider), self._conversation()
        target = Target(model=model, vendor=marks.vendor(provider.api_style, provider.uuid))
        written = self._write(api, provider, target, conversation)
        return Translated(
            client=CLIENTS[self._api],
            service=SERVICES[api],
            client_api=self._api,
            service_api=api,
            provider=provider,
            target=target,
            conversation=conversation,
            body=written.body,
            path=_path(api, conversation),
            left_out=tuple(dict.fromkeys((*conversation.hints, *written.left_out))),
        )

    def _refusal(self, service: Service, foreign: Sequence[Service]) -> RequestError | None:
        """Why a service cannot be asked. It is found out once for all of its API, and so for one model of them."""
        if self._api == "other":
            return _untranslated(self._request.path, foreign)
        provider = self._find(service.provider)
        if provider is None:
            return None  # It has gone a moment ago: that is told where it is picked.
        api = service_api(provider)
        if api not in self._refusals:
            self._refusals[api] = None
            try:
                self.to(provider, service.model)
            except RequestError as exc:
                self._refusals[api] = exc
        return self._refusals[api]

    def _conversation(self) -> Conversation:
        assert self._api != "other", "it is refused"
        if self._read is None:
            try:
                self._read = CLIENTS[self._api].read_request(self._request.body)
            except RequestError as exc:
                self._read = exc
        if isinstance(self._read, RequestError):
            raise self._read
        return self._read

    def _write(self, api: ServiceApi, provider: Provider, target: Target, conversation: Conversation) -> Written:
        key = provider.uuid if api == "chat" else api, target
        written = self._written.get(key)
        if written is None:
            written = self._written[key] = SERVICES[api].write_request(conversation, target, provider)
        return written


def _path(api: ServiceApi, conversation: Conversation) -> str:
    match api:
        case "chat":
            return "/v1/chat/completions"
        case "messages":
            return "/v1/messages"
        case "google":
            return STREAM if conversation.stream else GENERATE


def _untranslated(path: str, services: Sequence[Service]) -> UntranslatableError:
    whose = ", ".join(service.id for service in services[:_NAMES_SHOWN])
    return UntranslatableError(
        f"{path} has no translation: only services of providers with api_style openai serve it"
        + (f", not {whose}" if whose else "")
    )
