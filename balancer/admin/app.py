"""The admin server's HTTP front, on aiohttp: its requests as ours, our answers as its."""

from __future__ import annotations

import secrets

from aiohttp import web

from balancer.admin.api import Answer, Api, refusal
from balancer.config import Settings
from balancer.errors import BodyTooLargeError, RequestError
from balancer.gateway.messages import ClientRequest
from balancer.metrics import Metrics
from balancer.store.balance import Balance
from balancer.store.credentials import Sealer

MAX_BODY_BYTES = 2**20


_HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
)
"""On every answer: it is data for programs, which no browser should show, keep, guess the type of, or frame."""


def create_app(settings: Settings, balance: Balance, metrics: Metrics, sealer: Sealer | None = None) -> web.Application:
    """The admin server over a worker's store. It starts and closes nothing of it. `sealer` seals what is written."""
    api = Api(settings, balance, metrics, sealer)

    async def answer(request: web.Request) -> web.Response:
        path, _, query = request.raw_path.partition("?")
        headers = tuple(
            (name.decode("latin-1"), value.decode("utf-8", "surrogateescape")) for name, value in request.raw_headers
        )
        try:
            body = await _body(request)
        except RequestError as exc:
            response = _response(refusal(exc))
            response.force_close()  # The rest of the body is still coming.
            return response
        return _response(
            await api.answer(
                ClientRequest(
                    method=request.method,
                    path=path,
                    query=query,
                    headers=headers,
                    body=body,
                    request_id=secrets.token_hex(16),
                )
            )
        )

    app = web.Application(client_max_size=0)
    app.router.add_route(
        "*", "/{path:(?s:.*)}", answer
    )  # A name may hold a line end, which a dot alone does not match.
    return app


async def _body(request: web.Request) -> bytes:
    too_large = f"the body is longer than {MAX_BODY_BYTES} bytes"
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise BodyTooLargeError(too_large)
    chunks, held = [], 0
    try:
        async for chunk in request.content.iter_any():
            chunks.append(chunk)
            held += len(chunk)
            if held > MAX_BODY_BYTES:
                raise BodyTooLargeError(too_large)
    except (web.RequestPayloadError, ConnectionError) as exc:
        raise RequestError("the request's body broke off") from exc
    return b"".join(chunks)


def _response(answer: Answer) -> web.Response:
    return web.Response(
        status=answer.status,
        body=answer.body,
        content_type="application/json",
        headers=[*answer.headers, *_HEADERS],
    )
