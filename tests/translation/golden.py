"""What becomes of the recorded streams for clients of the other APIs: `python -m tests.translation.golden` writes it.

Whoever runs it reads what changed against the vendors' documentation, line by line, before it is committed.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import msgspec

from balancer import sse
from balancer.translation.answer import Broke, Echo, Step
from balancer.translation.conversation import Target

RECORDINGS = Path(__file__).resolve().parent.parent / "recordings"
GOLDEN = RECORDINGS / "golden"
UPSTREAMS = {
    "azure": ("chat", "openai/azure"),
    "claude": ("messages", "anthropic"),
    "deepseek": ("chat", "openai/deepseek"),
    "gemini": ("google", "google"),
    "openai": ("chat", "openai/openai"),
}
CLIENTS = ("chat", "messages", "responses")
HI = {"role": "user", "content": "Hi"}
ASKED: dict[str, dict[str, Any]] = {
    "chat": {"messages": [HI], "stream_options": {"include_usage": True}},
    "messages": {"messages": [HI], "max_tokens": 999, "stop_sequences": ["three"]},
    "responses": {"input": "Hi", "include": ["reasoning.encrypted_content"], "store": False},
}
"""What else the clients asked, as far as the answer depends on it."""


def streams() -> list[Path]:
    """The recorded streams."""
    return sorted(RECORDINGS.glob("*.sse"))


def pairs() -> list[tuple[Path, str]]:
    """Each recorded stream with each API whose clients get it in translation."""
    return [(path, client) for path in streams() for client in CLIENTS if client != upstream_of(path)[0]]


def upstream_of(path: Path) -> tuple[str, str]:
    """The API that a recorded stream is of, and who signs in it."""
    return UPSTREAMS[path.name.partition("_")[0]]


def steps_of(path: Path, *, chunk_bytes: int = 1 << 20) -> list[list[Step]]:
    """The steps of each event, and last those of the end, read in chunks of this size."""
    api, vendor = upstream_of(path)
    reader = _module(api, "streams").StreamReader(Target(model="up-model", vendor=vendor))
    parser = sse.Parser()
    data = path.read_bytes()
    chunks = (data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes))
    read = [list(reader.read(event)) for chunk in chunks for event in parser.feed(chunk)]
    assert parser.is_between_events, "a recorded stream ends with an event's blank line"
    return [*read, list(reader.finish())]


def translated(path: Path, client: str, *, chunk_bytes: int = 1 << 20) -> bytes:
    """What the client gets of a recorded stream; a line tells where the upstream broke off."""
    writer = _module(client, "streams").StreamWriter(_echo(client, upstream_of(path)[1]))
    out: bytes = b""
    for steps in steps_of(path, chunk_bytes=chunk_bytes):
        broke = [step for step in steps if isinstance(step, Broke)]
        out += writer.write([step for step in steps if not isinstance(step, Broke)])
        if broke:
            return out + b"# broke off: %b\n" % msgspec.json.encode(broke[0])
    return out


def _echo(client: str, vendor: str) -> Echo:
    asked = msgspec.json.encode({"model": "asked", "stream": True} | ASKED[client])
    conversation = _module(client, "reading").read_request(asked)
    return Echo(conversation=conversation, model="told", id="0123456789abcdef", created=1_795_000_009, vendor=vendor)


def golden(path: Path, client: str) -> Path:
    """The file that holds what is right."""
    return GOLDEN / f"{path.stem}.{client}.sse"


def _module(api: str, name: str) -> Any:
    return importlib.import_module(f"balancer.translation.{api}.{name}")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for recorded, to in pairs():
        golden(recorded, to).write_bytes(translated(recorded, to))
