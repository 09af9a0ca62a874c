"""What Gemini's models take, by their names.

From ai.google.dev and docs.cloud.google.com on thinking, thought signatures, function calling and structured output
(read in November 2026).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from balancer.domain import Struct
from balancer.translation.conversation import Effort

_NAME = re.compile(r"gemini-(?P<major>\d{1,2})(?:\.(?P<minor>\d{1,2}))?(?:-(?P<line>pro|flash-lite|flash))?")
_LATEST = (99, 0)

BUDGETS: Mapping[Effort, int] = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 32768}
"""How many tokens an effort is worth; `max` is the model's most."""
_LEVELS: Mapping[Effort, str] = {"low": "LOW", "medium": "MEDIUM", "high": "HIGH", "xhigh": "HIGH", "max": "HIGH"}


class Traits(Struct, frozen=True, kw_only=True):
    """What a model takes. A name without a version (`gemini-flash-latest`) counts as the latest."""

    is_gemini: bool
    line: str = ""
    version: tuple[int, int] = _LATEST
    is_silent: bool = False
    """It paints or speaks; such models of 2.5 do not think."""

    @property
    def thinks_by(self) -> Literal["", "budget", "level"]:
        """How the model is told how much to think, empty for one that does not."""
        if not self.is_gemini or self.version < (2, 5) or (self.is_silent and self.version < (3, 0)):
            return ""
        return "level" if self.version >= (3, 0) else "budget"

    @property
    def needs_signatures(self) -> bool:
        """True when a call that comes back without a signature is refused."""
        return self.is_gemini and self.version >= (3, 0)

    @property
    def names_calls(self) -> bool:
        """True when calls have ids of their own."""
        return self.needs_signatures

    @property
    def validates(self) -> bool:
        """True when calls can be held to their tools, and to some of them, with the model free to make none."""
        return self.is_gemini and self.version >= (2, 5)

    @property
    def calls_and_formats(self) -> bool:
        """True when an answer can be held to a form in a request that has tools."""
        return self.is_gemini and self.version >= (3, 0)

    @property
    def takes_pictures_back(self) -> bool:
        """True when what a tool gives back may have pictures in it."""
        return self.needs_signatures

    @property
    def budgets(self) -> tuple[int, int]:
        """The least and the most tokens that the model may be given to think."""
        if self.line == "pro":
            return 128, 32768
        return (512 if self.line == "flash-lite" else 1), 24576

    @property
    def can_stop_thinking(self) -> bool:
        """True when thinking can be switched off."""
        return self.thinks_by != "level" and self.line != "pro"

    def level(self, effort: Effort) -> str:
        """The nearest level that the model knows, at or above."""
        if effort in ("none", "minimal"):
            return "MINIMAL" if self._knows_minimal else "LOW"
        # Of Gemini 3 Pro there are two levels.
        return "HIGH" if effort == "medium" and (self.line, self.version) == ("pro", (3, 0)) else _LEVELS[effort]

    @property
    def _knows_minimal(self) -> bool:
        return self.line == "flash-lite" or (self.line == "flash" and self.version <= (3, 6))


@lru_cache(maxsize=512)
def traits(model: str) -> Traits:
    """What a model takes."""
    name = model.lower()
    match = _NAME.search(name)
    if match is None:
        return Traits(is_gemini="gemini" in name, line="pro" if "pro" in name else "")
    return Traits(
        is_gemini=True,
        line=match["line"] or "",
        version=(int(match["major"]), int(match["minor"] or 0)),
        is_silent="-image" in name or "-tts" in name,
    )


def effort_of(budget_tokens: int) -> Effort:
    """The nearest effort at or above a number of tokens."""
    return next((effort for effort, tokens in BUDGETS.items() if budget_tokens <= tokens), "max")
