"""The bare Python proxy that we are compared with: an aiohttp server, a ClientSession, three upstreams in turn.

It reads nothing, counts nothing, and tells nobody: what remains is what aiohttp costs.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

import aiohttp
from aiohttp import web

_HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer sk-upstream"}


async def main(port: int, upstreams: list[str]) -> None:
    """Serves until it is killed."""
    turns = itertools.cycle(upstreams)
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        auto_decompress=False,
        skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept"),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )

    async def forward(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        async with session.post(f"{next(turns)}{request.path}", data=body, headers=_HEADERS) as answer:
            headers = {"Content-Type": answer.headers["Content-Type"]}
            if answer.content_type != "text/event-stream":
                return web.Response(status=answer.status, body=await answer.read(), headers=headers)
            response = web.StreamResponse(status=answer.status, headers=headers)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app = web.Application(client_max_size=32 << 20)
    app.router.add_post("/v1/chat/completions", forward)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=2048).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
