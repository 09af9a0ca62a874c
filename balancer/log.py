"""Structured logs: one JSON object a line on stderr, a constant message with facts beside it.

Never a prompt, a completion or a credential: callers pass names and numbers.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

import msgspec

_LOGGER = logging.getLogger("balancer")


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "pid": record.process,
        }
        if record.name != _LOGGER.name:
            line["logger"] = record.name
        line |= {name: value for name, value in getattr(record, "facts", {}).items() if name not in line}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:
            # Half a surrogate pair, from a name that was no text to begin with: the line is worth more.
            return json.dumps(line, default=str, ensure_ascii=False).encode("utf-8", "replace").decode()


def configure(level: str, stream: TextIO | None = None) -> None:
    """Sends what is ours from that level on to stderr, and the libraries' warnings."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _LOGGER.setLevel(level.upper())


def ignore(library: str) -> None:
    """Has a library's logger write errors alone: one whose warnings say what clients have sent."""
    logging.getLogger(library).setLevel(logging.ERROR)


def is_debugging() -> bool:
    """True when `debug` writes anything: what is dear to tell is then worth it."""
    return _LOGGER.isEnabledFor(logging.DEBUG)


def debug(event: str, **facts: object) -> None:
    """For an attempt."""
    _LOGGER.debug(event, extra={"facts": facts})


def info(event: str, **facts: object) -> None:
    """For a transition."""
    _LOGGER.info(event, extra={"facts": facts})


def warning(event: str, **facts: object) -> None:
    """For what someone should look at."""
    _LOGGER.warning(event, extra={"facts": facts})


def error(event: str, *, exc: BaseException | None = None, **facts: object) -> None:
    """For a fault of ours; with the exception's traceback when given."""
    _LOGGER.error(event, extra={"facts": facts}, exc_info=exc)
