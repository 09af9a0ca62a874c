"""Why an answer of Google's ended, in our words."""

from __future__ import annotations

from collections.abc import Mapping

from balancer.translation.answer import Stop
from balancer.translation.google.shapes import Body, Candidate

STOPS: Mapping[str, Stop] = {
    "STOP": "end",
    "MAX_TOKENS": "length",
    "CONTINUATION": "length",
    **dict.fromkeys(
        (
            "SAFETY",
            "RECITATION",
            "LANGUAGE",
            "BLOCKLIST",
            "PROHIBITED_CONTENT",
            "SPII",
            "IMAGE_SAFETY",
            "IMAGE_PROHIBITED_CONTENT",
            "IMAGE_RECITATION",
            "MODEL_ARMOR",
            "ESCALATION",
            "PUP_LIMITED_DISABLED",
        ),
        "filtered",
    ),
}
"""Any other reason counts as `end`."""

_UNSPECIFIED = ("", "FINISH_REASON_UNSPECIFIED")


def reason_of(body: Body, candidate: Candidate | None) -> str:
    """Google's word for why the answer ended, empty where it goes on. A prompt that was blocked has ended."""
    if candidate is not None:
        reason = candidate.finish_reason or ""
        return "" if reason in _UNSPECIFIED else reason
    return "SAFETY" if body.prompt_feedback is not None and body.prompt_feedback.block_reason else ""


def stop_of(reason: str, *, has_calls: bool) -> Stop:
    """Why it ended; who calls a tool waits for what it gives back."""
    stop = STOPS.get(reason, "end")
    return "tool" if has_calls and stop == "end" else stop


def excuse(reason: str, message: str, *, has_said: bool) -> str:
    """What is told in place of an answer that ended with nothing said, for no reason that a client would know.

    A call that the model could not spell (MALFORMED_FUNCTION_CALL) would otherwise look like an answer, and an agent
    would take its task for done.
    """
    if has_said or not reason or reason in STOPS:
        return ""
    return f"The model ended its answer with {reason}" + (f": {message}" if message else ".")
