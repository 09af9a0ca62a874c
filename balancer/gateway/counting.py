"""Tokens of a prompt for clients of Anthropic's, counted where the service speaks another API: asked, or estimated."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import msgspec

from balancer import bodies, lenient
from balancer.bodies import Peek
from balancer.dialects.google import COUNT_TOKENS
from balancer.encoding import DecodeError, decoded
from balancer.errors import BalancerError, RequestError, UpstreamAnswerError
from balancer.facts import AbsentError, Facts
from balancer.gateway.messages import ClientRequest, ClientStream, Upstream
from balancer.gateway.opening import Opening
from balancer.gateway.outgoing import Preparer
from balancer.gateway.relay import read_whole
from balancer.gateway.translating import Translated, Translation

ESTIMATED = ("x-balancer-token-count", "estimated")
"""Tells a client that the number is a quarter of the prompt's bytes, and not its model's."""
_ANSWER_LIMIT_BYTES = 1024 * 1024
_VERTEX = "/publishers/google"


class _Told(msgspec.Struct):
    totalTokens: Annotated[int, msgspec.Meta(ge=0)] = 0  # noqa: N815 - Google's name.


_told = msgspec.json.Decoder(_Told)
_members = msgspec.json.Decoder(dict[str, msgspec.Raw])


class TokenCounter:
    """Counts the tokens of prompts."""

    def __init__(self, preparer: Preparer, upstream: Upstream) -> None:
        self._preparer = preparer
        self._upstream = upstream

    async def tell(
        self, request: ClientRequest, translation: Translation, service_id: str, peek: Peek, stream: ClientStream
    ) -> None:
        """Answers how long the prompt is, as well as can be known."""
        count = await self._asked(request, translation, service_id)
        is_estimated = count is None
        if count is None:
            count = estimated(peek, request.body)
        body = msgspec.json.encode({"input_tokens": count})
        headers = (("Content-Type", "application/json"), *((ESTIMATED,) if is_estimated else ()))
        await stream.send(200, headers, body)

    async def _asked(self, request: ClientRequest, translation: Translation, service_id: str) -> int | None:
        """What Google counts; None where nobody can be asked, or does not answer."""
        provider = self._preparer.provider(service_id)
        if provider.api_style != "google":
            return None
        witness = request.witness
        if witness is not None:
            witness.asks()
        status, fault = 0, ""
        try:
            translated = translation.to(provider, service_id.partition(":")[2])
            assert translated is not None, "no client speaks Google's API"
            outgoing = self._preparer.translated(request, _counting(translated), elapsed_s=0)
            answer = Opening(await self._upstream.send(outgoing.request))
            try:
                status = answer.status
                body, is_whole = await read_whole(answer, await answer.read(), _ANSWER_LIMIT_BYTES)
                if status != 200 or not is_whole:
                    raise UpstreamAnswerError("the upstream did not count the tokens")
                return lenient.decode(_told, decoded(body, answer.coding, _ANSWER_LIMIT_BYTES)).totalTokens
            finally:
                await answer.close()
        except RequestError:
            return None  # What cannot be asked of it in a request for an answer, that will tell.
        except BalancerError as exc:
            fault = exc.code
            return None
        except (DecodeError, *lenient.UNREADABLE):
            fault = UpstreamAnswerError.code
            return None
        finally:
            if witness is not None:
                witness.asked(service_id, status, fault)


def estimated(peek: Peek, body: bytes) -> int:
    """The tokens by the bytes of the prompt's texts, as smart routing takes them; of all bytes where that fails."""
    try:
        return max(1, Facts(peek, datetime.now(UTC)).tokens)
    except AbsentError:
        return bodies.estimate_tokens(body)


def _counting(translated: Translated) -> Translated:
    """The same request as Google counts it: Vertex AI takes its parts, the Gemini API all of it, with the model's name.

    ai.google.dev/api/tokens; cloud.google.com/vertex-ai/generative-ai/docs, "CountTokens API" (November 2026).
    """
    members = _members.decode(translated.body)
    if _VERTEX in translated.provider.api_base:
        names = ("contents", "systemInstruction", "tools", "generationConfig")
        body = msgspec.json.encode({name: members[name] for name in names if name in members})
    else:
        model = translated.target.model
        whole = {"model": msgspec.Raw(msgspec.json.encode(model if "/" in model else f"models/{model}"))} | members
        body = msgspec.json.encode({"generateContentRequest": whole})
    return msgspec.structs.replace(translated, body=body, path=COUNT_TOKENS)
