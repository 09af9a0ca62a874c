"""What an answer says of itself, in whatever shape, and that nothing of what a model wrote is taken for it."""

from __future__ import annotations

import pytest

from balancer.config import SEMCONV_VERSIONS
from balancer.details import DetailedUsage, Details
from balancer.dialects.paths import shape
from balancer.domain import Provider
from balancer.semconv import CONVENTIONS, peer_of
from balancer.sse import Event


def read(data: bytes) -> tuple[str, str, tuple[str, ...]]:
    details = Details()
    details.read(data)
    return details.id, details.model, details.finish_reasons


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b'{"id":"c","model":"m","choices":[{"finish_reason":"stop"}]}', ("c", "m", ("stop",))),
        (b'{"choices":[{"finish_reason":"stop"},{"finish_reason":"length"}]}', ("", "", ("stop", "length"))),
        (b'{"id":"m1","type":"message","model":"m","stop_reason":"end_turn"}', ("m1", "m", ("end_turn",))),
        (b'{"id":"r","object":"response","model":"m","status":"completed"}', ("r", "m", ("completed",))),
        (b'{"type":"message_start","message":{"id":"m1","model":"m","stop_reason":null}}', ("m1", "m", ())),
        (b'{"type":"message_delta","delta":{"stop_reason":"tool_use"}}', ("", "", ("tool_use",))),
        (b'{"type":"response.created","response":{"id":"r","status":"in_progress"}}', ("r", "", ())),
        (b'{"delta":"text","model":"m"}', ("", "m", ())),
        (b'{"model":"two words","id":7,"choices":[{"finish_reason":"' + b"x" * 200 + b'"}]}', ("", "", ())),
        (b'{"model":{"name":"m"},"choices":[{"message":{"model":"written"}}]}', ("", "", ())),
        (b'{"choices":7,"model":"m"}', ("", "", ())),
        (b"[1]", ("", "", ())),
        (b'{"model":"m', ("", "", ())),
        (b"[" * 100_000, ("", "", ())),
    ],
)
def test_only_names_in_their_places_are_taken(data: bytes, told: tuple[str, str, tuple[str, ...]]) -> None:
    assert read(data) == told


def test_a_stream_tells_it_in_parts() -> None:
    details = Details()
    usage = DetailedUsage(details)
    for data in (
        b'{"id":"c","model":"m"}',
        b'{"choices":[{"finish_reason":"stop"}],"usage":{"prompt_tokens":2}}',
        b"[DONE]",
    ):
        usage.see(Event(raw=b"", name="", data=data))

    assert (details.id, details.model, details.finish_reasons) == ("c", "m", ("stop",))
    assert usage.is_complete
    assert usage.usage is not None
    assert usage.usage.input == 2


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/tingly/claude_code/v1/messages", "/v1/messages"),
        ("/opencode/v1/embeddings", "/v1/embeddings"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/org/model", "/v1/models/{model}"),
        ("/v1/responses/resp_1", "/v1/responses/{id}"),
        ("/openai/v1/responses/resp_1/cancel", "/v1/responses/{id}/cancel"),
        ("/v1/responses/resp_1/input_items", "/v1/responses/{id}/input_items"),
        ("/v1/responses/resp_1/else", "_OTHER"),
        ("/v1/sk-secret", "_OTHER"),
        ("/sk-secret/v1/messages", "_OTHER"),
        ("", "_OTHER"),
    ],
)
def test_of_a_path_only_its_shape_is_told(path: str, told: str) -> None:
    assert shape(path) == told


@pytest.mark.parametrize(
    ("base", "more", "told"),
    [
        ("https://api.openai.com/v1", {}, ("openai", "api.openai.com", 443)),
        ("http://[::1]:8000", {}, ("openai", "::1", 8000)),
        ("https://api.groq.com/openai/v1", {}, ("groq", "api.groq.com", 443)),
        ("https://x.openai.azure.com", {"provider_type": "azure"}, ("azure.ai.openai", "x.openai.azure.com", 443)),
        ("https://proxy.internal", {"provider_type": "azure"}, ("azure.ai.openai", "proxy.internal", 443)),
        ("http://bedrock.amazonaws.com", {"api_style": "anthropic"}, ("anthropic", "bedrock.amazonaws.com", 80)),
    ],
)
def test_a_provider_is_told_by_its_vendor_and_its_host(
    base: str, more: dict[str, str], told: tuple[str, str, int]
) -> None:
    peer = peer_of(Provider(uuid="p", name="p", api_base=base, **more))  # type: ignore[arg-type]
    assert (peer.vendor, peer.address, peer.port) == told


def test_the_versions_to_choose_from_are_those_that_are_known() -> None:
    assert tuple(CONVENTIONS) == SEMCONV_VERSIONS
