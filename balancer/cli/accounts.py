"""A fake upstream account: answers like the real APIs, checks its key, and keeps its own count of what it reported.

`python -m balancer.cli.accounts --name a --key k` runs one on a free port, prints its URL, and ends with its stdin.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web

_WORDS = ("the", "fleet", "decides", "as", "one", "and", "every", "token", "counts")
_MOST_CHUNKS = 12

Json = dict[str, Any]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Count(msgspec.Struct):
    """What an account reported for one model, or for one request."""

    requests: int = 0
    input: int = 0
    output: int = 0
    cut: int = 0


class Ledger(msgspec.Struct):
    """An account's own books: by model, and by the id that a request carried in x-request-id."""

    models: dict[str, Count] = msgspec.field(default_factory=dict)
    requests: dict[str, Count] = msgspec.field(default_factory=dict)

    def note(self, model: str, request_id: str, *, requests: int = 0, input_: int = 0, output: int = 0) -> None:
        """Adds to both accounts."""
        for book, key in ((self.models, model), (self.requests, request_id)):
            count = book.setdefault(key, Count())
            count.requests += requests
            count.input += input_
            count.output += output


class FakeAccount:
    """One account. `async with` starts it on a free port of loopback; `url` is its api_base without /v1."""

    def __init__(self, name: str = "fake", api_key: str = "", *, chunk_interval_s: float = 0.0) -> None:
        self.name = name
        self.api_key = api_key
        self.chunk_interval_s = chunk_interval_s
        self.ledger = Ledger()
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> FakeAccount:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self, port: int = 0) -> None:
        """Serves until `stop`."""
        self._runner = web.AppRunner(self._app(), access_log=None, handler_cancellation=True, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Closes every connection."""
        if self._runner:
            await self._runner.cleanup()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        routes: dict[str, Handler] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            "/v1/responses": self._responses,
            "/v1/embeddings": self._embeddings,
            "/v1/audio/speech": self._speech,
            "/v1/audio/transcriptions": self._transcriptions,
            "/v1/images/generations": self._images,
            "/v1/messages": self._messages,
            "/v1/messages/count_tokens": self._count_tokens,
            "/openai/deployments/{model}/chat/completions": self._chat,
        }
        for path, handler in routes.items():
            app.router.add_post(path, self._guarded(handler))
        app.router.add_get("/__ledger", self._show_ledger)
        return app

    def _guarded(self, handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            headers = request.headers
            given = headers.get("x-api-key") or headers.get("api-key") or headers.get("authorization", "")[7:]
            if self.api_key and given != self.api_key:
                message = "Incorrect API key provided."
                if request.path.startswith("/v1/messages"):
                    body: Json = {"type": "error", "error": {"type": "authentication_error", "message": message}}
                else:
                    error = {"message": message, "type": "invalid_request_error", "code": "invalid_api_key"}
                    body = {"error": error | {"param": None}}
                return _json(body, status=401)
            return await handler(request)

        return guarded

    async def _show_ledger(self, request: web.Request) -> web.Response:
        return _json(msgspec.to_builtins(self.ledger))

    # -- what is counted -----------------------------------------------------------------------------------------------

    async def _begin(self, request: web.Request) -> tuple[Json, str, str, int, int]:
        """The body, its model, the request's id, and its input and output tokens."""
        raw = await request.read()
        body: Json = msgspec.json.decode(raw)
        model, request_id = str(body.get("model", "")), request.headers.get("x-request-id", "")
        self.ledger.note(model, request_id, requests=1)
        input_tokens = max(1, len(raw) // 4)
        number = int.from_bytes(hashlib.sha256(raw).digest()[:2], "big")
        wanted = body.get("max_tokens") or body.get("max_completion_tokens") or body.get("max_output_tokens") or 40
        return body, model, request_id, input_tokens, 1 + number % int(wanted)

    def _report(self, model: str, request_id: str, input_tokens: int, output_tokens: int) -> None:
        self.ledger.note(model, request_id, input_=input_tokens, output=output_tokens)

    @contextlib.asynccontextmanager
    async def _stream(
        self, request: web.Request, model: str, request_id: str
    ) -> AsyncIterator[tuple[Callable[[bytes], Awaitable[None]], web.StreamResponse]]:
        """Sends events; a caller that leaves is noted as a cut."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)

        async def send(event: bytes) -> None:
            if self.chunk_interval_s:
                await asyncio.sleep(self.chunk_interval_s)
            await response.write(event)

        try:
            yield send, response
            await response.write_eof()
        except (ConnectionError, asyncio.CancelledError):
            for book, key in ((self.ledger.models, model), (self.ledger.requests, request_id)):
                book[key].cut += 1
            raise

    # -- OpenAI --------------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body, model, request_id, input_tokens, output_tokens = await self._begin(request)
        usage = _openai_usage(input_tokens, output_tokens)
        base: Json = {"id": "chatcmpl-fake", "created": 1_790_000_000, "model": model}
        call = _tool_call(body)
        if not body.get("stream"):
            message: Json = {"role": "assistant", "content": None if call else _text(output_tokens)}
            if call:
                message["tool_calls"] = [
                    {"id": "call_1", "type": "function", "function": {"name": call, "arguments": '{"city":"Paris"}'}}
                ]
            choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if call else "stop"}
            self._report(model, request_id, input_tokens, output_tokens)
            return _json({**base, "object": "chat.completion", "choices": [choice], "usage": usage})
        with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        extra: Json = {"usage": None} if with_usage else {}

        def chunk(delta: Json, finish: str | None = None) -> bytes:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return _event({**base, "object": "chat.completion.chunk", "choices": [choice], **extra})

        async with self._stream(request, model, request_id) as (send, response):
            await send(chunk({"role": "assistant", "content": ""}))
            if call:
                function: Json = {"name": call, "arguments": ""}
                await send(
                    chunk({"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": function}]})
                )
                for part in ('{"city":', '"Paris"}'):
                    await send(chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}))
            else:
                for word in _chunks(output_tokens):
                    await send(chunk({"content": word}))
            await send(chunk({}, "tool_calls" if call else "stop"))
            if with_usage:
                self._report(model, request_id, input_tokens, output_tokens)
                await send(_event({**base, "object": "chat.completion.chunk", "choices": [], "usage": usage}))
            await send(b"data: [DONE]\n\n")
        return response

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        _, model, request_id, input_tokens, output_tokens = await self._begin(request)
        self._report(model, request_id, input_tokens, output_tokens)
        choice = {"index": 0, "text": _text(output_tokens), "finish_reason": "stop", "logprobs": None}
        answer = {"id": "cmpl-fake", "object": "text_completion", "created": 1, "model": model, "choices": [choice]}
        return _json({**answer, "usage": _openai_usage(input_tokens, output_tokens)})

    async def _responses(self, request: web.Request) -> web.StreamResponse:
        body, model, request_id, input_tokens, output_tokens = await self._begin(request)
        text = _text(output_tokens)
        usage = {
            "input_tokens": input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input_tokens + output_tokens,
        }
        content: Json = {"type": "output_text", "text": text, "annotations": []}
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [content]}
        answer: Json = {
            "id": "resp_fake",
            "object": "response",
            "created_at": 1_790_000_000,
            "status": "completed",
            "model": model,
            "output": [item],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }
        if not body.get("stream"):
            self._report(model, request_id, input_tokens, output_tokens)
            return _json({**answer, "usage": usage})
        async with self._stream(request, model, request_id) as (send, response):
            number = 0
            started = {**answer, "status": "in_progress", "output": [], "usage": None}
            await send(_event({"type": "response.created", "response": started, "sequence_number": number}, True))
            place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
            for word in _chunks(output_tokens):
                number += 1
                delta = {"type": "response.output_text.delta", "delta": word, **place, "sequence_number": number}
                await send(_event(delta, True))
            self._report(model, request_id, input_tokens, output_tokens)
            done = {"type": "response.completed", "response": {**answer, "usage": usage}}
            await send(_event({**done, "sequence_number": number + 1}, True))
        return response

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        _, model, request_id, input_tokens, _ = await self._begin(request)
        self._report(model, request_id, input_tokens, 0)
        data = [{"object": "embedding", "index": 0, "embedding": [0.25, -0.5, 0.125]}]
        usage = {"prompt_tokens": input_tokens, "total_tokens": input_tokens}
        return _json({"object": "list", "data": data, "model": model, "usage": usage})

    async def _speech(self, request: web.Request) -> web.StreamResponse:
        await self._begin(request)
        return web.Response(body=bytes(range(256)) * 64, headers={"Content-Type": "audio/mpeg"})

    async def _transcriptions(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        self.ledger.note(str(form["model"]), request.headers.get("x-request-id", ""), requests=1)
        return _json({"text": "hello"})

    async def _images(self, request: web.Request) -> web.StreamResponse:
        await self._begin(request)
        return _json({"created": 1, "data": [{"b64_json": "aGVsbG8="}]})

    # -- Anthropic -----------------------------------------------------------------------------------------------------

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        body, model, request_id, input_tokens, output_tokens = await self._begin(request)
        call = _tool_call(body)
        content: list[Json] = (
            [{"type": "tool_use", "id": "toolu_1", "name": call, "input": {"city": "Paris"}}]
            if call
            else [{"type": "text", "text": _text(output_tokens)}]
        )
        reason = "tool_use" if call else "end_turn"
        base: Json = {"id": "msg_fake", "type": "message", "role": "assistant", "model": model, "stop_sequence": None}
        usage = {"input_tokens": input_tokens, "output_tokens": output_tokens, "cache_read_input_tokens": 3}
        if not body.get("stream"):
            self._report(model, request_id, input_tokens, output_tokens)
            return _json({**base, "content": content, "stop_reason": reason, "usage": usage})
        async with self._stream(request, model, request_id) as (send, response):
            message = {**base, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
            self._report(model, request_id, input_tokens, 1)
            await send(_event({"type": "message_start", "message": message}, True))
            if call:
                block: Json = {"type": "tool_use", "id": "toolu_1", "name": call, "input": {}}
                deltas: list[Json] = [{"type": "input_json_delta", "partial_json": p} for p in ('{"city":', '"Paris"}')]
            else:
                block = {"type": "text", "text": ""}
                deltas = [{"type": "text_delta", "text": word} for word in _chunks(output_tokens)]
            await send(_event({"type": "content_block_start", "index": 0, "content_block": block}, True))
            await send(_event({"type": "ping"}, True))
            for delta in deltas:
                await send(_event({"type": "content_block_delta", "index": 0, "delta": delta}, True))
            await send(_event({"type": "content_block_stop", "index": 0}, True))
            self._report(model, request_id, 0, output_tokens - 1)
            end = {"stop_reason": reason, "stop_sequence": None}
            await send(_event({"type": "message_delta", "delta": end, "usage": {"output_tokens": output_tokens}}, True))
            await send(_event({"type": "message_stop"}, True))
        return response

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        return _json({"input_tokens": max(1, len(await request.read()) // 4)})


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def _event(value: Json, named: bool = False) -> bytes:
    name = b"event: %b\n" % str(value["type"]).encode() if named else b""
    return b"%bdata: %b\n\n" % (name, msgspec.json.encode(value))


def _openai_usage(input_tokens: int, output_tokens: int) -> Json:
    return {
        "prompt_tokens": input_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _text(tokens: int) -> str:
    return " ".join(_WORDS[i % len(_WORDS)] for i in range(tokens))


def _chunks(tokens: int) -> list[str]:
    """The text in a few pieces."""
    words = _text(tokens).split(" ")
    size = -(-len(words) // _MOST_CHUNKS)
    return [" ".join(words[i : i + size]) + " " for i in range(0, len(words), size)]


def _tool_call(body: Json) -> str | None:
    """The name of the tool that the request makes the model call."""
    if body.get("tools") and body.get("tool_choice") not in (None, "none", "auto"):
        tool = body["tools"][0]
        return str(tool.get("function", tool)["name"])
    return None


async def _main(name: str, key: str) -> None:
    async with FakeAccount(name, key) as account:
        print(account.url, flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="fake")
    parser.add_argument("--key", default="")
    arguments = parser.parse_args()
    asyncio.run(_main(arguments.name, arguments.key))
