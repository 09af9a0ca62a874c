"""What Claude models take, by their names: each generation refuses what another one needs.

From platform.claude.com's pages on thinking, effort, structured outputs and each model's news (read in November 2026).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from balancer.domain import Struct
from balancer.translation.conversation import Effort

_NAME = re.compile(r"claude-(?:(?P<line>[a-z]+)-)?(?P<major>\d{1,2})(?!\d)(?:[-.](?P<minor>\d{1,2})(?!\d))?")
_LATEST = (99, 0)
_ALWAYS_THINK = ("fable", "mythos")
_LEAST_BUDGET = 1024

BUDGETS: Mapping[Effort, int] = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16384, "xhigh": 32768}
"""How many tokens an effort is worth; `max` is the model's most."""

_LEVELS: tuple[Effort, ...] = ("low", "medium", "high", "xhigh", "max")


class Traits(Struct, frozen=True, kw_only=True):
    """What a model takes. A name that is none of Claude's is a compatible service's: it takes the older forms."""

    is_claude: bool
    line: str = ""
    version: tuple[int, int] = _LATEST

    @property
    def default_max_tokens(self) -> int:
        """What may be written where the client does not say."""
        if self.is_claude and self.version < (3, 5):
            return 4096
        return 8192 if self.is_claude and self.version == (3, 5) else 32000

    @property
    def most_tokens(self) -> int:
        """The most that may be written, thoughts included; of models that think by a budget."""
        if self.is_claude and self.line == "opus" and self.version <= (4, 1):
            return 32000
        return 64000

    @property
    def thinks(self) -> bool:
        """True unless the model knows no thinking."""
        return not self.is_claude or self.version >= (3, 7)

    @property
    def thinks_by_budget(self) -> bool:
        """True when thinking is switched on with a number of tokens, and not left to the model."""
        return not self.is_claude or self.version <= (4, 5)

    @property
    def off(self) -> str | None:
        """The type of `thinking` that switches it off: empty when that is the default, None when it is always on."""
        if self.version <= (4, 8) and self.is_claude:
            return ""
        if not self.is_claude:
            return "disabled"
        if self.line in _ALWAYS_THINK or self.version > (5, 5) or (self.line == "opus" and self.version == (5, 5)):
            return None
        return "between_tools" if self.line == "sonnet" and self.version == (5, 5) else "disabled"

    @property
    def samples(self) -> bool:
        """True when the model takes temperature, top_p and top_k; from 4.7 on none does."""
        return not self.is_claude or self.version < (4, 7)

    @property
    def samples_by_one(self) -> bool:
        """True when it refuses temperature and top_p together."""
        return self.is_claude and self.version >= (4, 1)

    @property
    def has_schemas(self) -> bool:
        """True when it holds its answers, and its calls of strict tools, to a schema."""
        return self.is_claude and self.version >= (4, 5)

    @property
    def can_be_forced(self) -> bool:
        """True when the model may be told to call a tool."""
        return not self.binds_thoughts or self.version == _LATEST or self.line in ("sonnet", "haiku")

    @property
    def binds_thoughts(self) -> bool:
        """True when a thought that comes back must have before it just what it had when the model thought it."""
        return self.is_claude and self.version >= ((5, 1) if self.line in _ALWAYS_THINK else (5, 5))

    @property
    def continues(self) -> bool:
        """True when it goes on with an assistant's turn that ends the conversation."""
        return not self.is_claude or self.version <= (4, 5)

    def budget(self, effort: Effort) -> int:
        """The tokens that an effort is worth here."""
        most = self.most_tokens * 3 // 4
        return min(BUDGETS.get(effort, most), most)

    def effort(self, effort: Effort) -> str:
        """The nearest effort that the model knows, at or above."""
        if effort in ("none", "minimal"):
            return "low"
        return "max" if effort == "xhigh" and self.version == (4, 6) else effort


@lru_cache(maxsize=512)
def traits(model: str) -> Traits:
    """What a model takes. An unknown name of Claude's counts as the latest."""
    name = model.lower()
    if "claude" not in name:
        return Traits(is_claude=False)
    match = _NAME.search(name)
    if match is None:
        line = next((line for line in _ALWAYS_THINK if line in name), "")
        return Traits(is_claude=True, line=line)
    version = (int(match["major"]), int(match["minor"] or 0))
    return Traits(is_claude=True, line=match["line"] or "", version=version)


def effort_of(budget_tokens: int) -> Effort:
    """The nearest effort at or above a number of tokens."""
    for level in _LEVELS[:-1]:
        if budget_tokens <= BUDGETS[level]:
            return level
    return "max"
