"""What of the API a model takes, as its name tells: OpenAI's own refuse what others want, and the other way round.

From OpenAI's pages of its models and of reasoning (November 2026). Names of Azure's deployments may be anything; one
that hides a model of OpenAI's is taken for another vendor's.

DeepSeek and Moonshot think by default, and then refuse a forced tool, and a turn with calls that has no
`reasoning_content`, as another vendor's has none: DeepSeek takes an empty one (BerriAI/litellm pull 26660), Moonshot
a blank (theopenco/llmgateway pull 2093). They are told not to think by `thinking`, as Z.ai is.
"""

from __future__ import annotations

import re

import msgspec

from balancer.translation.conversation import Effort, Reasoning

_OWN = re.compile(
    r"(?:.*/)?(?:ft:)?(?:(?P<chat>chatgpt-|gpt-3\.5|gpt-4)|gpt-(?P<major>[5-9]|[1-9]\d+)(?:\.(?P<minor>\d+))?(?![\d.])"
    r"|(?P<o>o[1-9])(?![\w.]))(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_DEEPSEEK = re.compile(r"deepseek", re.IGNORECASE)
_KIMI = re.compile(r"kimi", re.IGNORECASE)
_KIMI_FIXED = re.compile(r"kimi-k(?:2\.[5-9]|[3-9])", re.IGNORECASE)
_GLM = re.compile(r"(?:.*/)?glm-", re.IGNORECASE)
_OLD = re.compile(r"gpt-3\.5|gpt-4(?![o.])", re.IGNORECASE)

EFFORT_TOKENS: tuple[tuple[Effort, int], ...] = (
    ("none", 0),
    ("minimal", 1024),
    ("low", 2048),
    ("medium", 8192),
    ("high", 16384),
    ("xhigh", 32768),
)
_ORDER: tuple[Effort, ...] = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Family(msgspec.Struct, frozen=True):
    """What a model takes. `efforts` are those that it knows, the least first.

    `blank_thought` stands where a turn with calls lacks one; None where nobody misses it. `has_switch`: it takes
    `thinking: {type: disabled}`. `is_unforced`: as long as it thinks, no tool can be forced on it.
    """

    is_own: bool = False
    takes_completion_tokens: bool = False
    efforts: tuple[Effort, ...] = ("low", "medium", "high")
    thinks: bool = False
    thinks_by_itself: bool = False
    blank_thought: str | None = None
    has_switch: bool = False
    is_unforced: bool = False


def family(model: str) -> Family:
    """What a model of this name takes."""
    found = _OWN.match(model)
    if found is None:
        return _other(model)
    if found["chat"]:
        return Family(is_own=True, takes_completion_tokens=not _OLD.search(model), efforts=())
    if found["o"]:
        return Family(is_own=True, takes_completion_tokens=True, thinks=True, thinks_by_itself=True)
    version = (int(found["major"]), int(found["minor"] or 0))
    if "-chat" in found["rest"]:
        return Family(is_own=True, takes_completion_tokens=True, efforts=())
    return Family(
        is_own=True,
        takes_completion_tokens=True,
        efforts=_efforts(version, found["rest"]),
        thinks=True,
        # Up to 5.4 the later ones think only when asked to.
        thinks_by_itself=version == (5, 0),
    )


def _other(model: str) -> Family:
    if _DEEPSEEK.search(model):
        return Family(efforts=("low", "high", "max"), blank_thought="", has_switch=True, is_unforced=True)
    if _KIMI.search(model):
        is_fixed = _KIMI_FIXED.search(model) is not None
        return Family(
            thinks=is_fixed, thinks_by_itself=is_fixed, blank_thought=" ", has_switch=is_fixed, is_unforced=is_fixed
        )
    return Family(has_switch=_GLM.match(model) is not None)


def _efforts(version: tuple[int, int], rest: str) -> tuple[Effort, ...]:
    if version == (5, 0):
        return ("low", "medium", "high") if "codex" in rest else ("minimal", "low", "medium", "high")
    if version == (5, 1):
        return ("none", "low", "medium", "high", "xhigh") if "max" in rest else ("none", "low", "medium", "high")
    if version < (5, 6):
        return ("none", "low", "medium", "high", "xhigh")
    return ("none", "low", "medium", "high", "xhigh", "max")


def effort(reasoning: Reasoning, known: tuple[Effort, ...]) -> Effort | None:
    """The effort to ask for: the one that is wanted, or the nearest that is known; None for nothing to say.

    Tokens become the least effort that has as many. To switch thinking off is only said to who knows that.
    """
    wanted = reasoning.effort
    if wanted is None and reasoning.budget_tokens is not None:
        budget = reasoning.budget_tokens
        wanted = next((name for name, tokens in EFFORT_TOKENS if budget <= tokens), "max")
    if wanted is None or not known:
        return None
    if wanted == "none":
        return "none" if "none" in known else None
    thinking = [name for name in known if name != "none"]
    at_least = [name for name in thinking if _ORDER.index(name) >= _ORDER.index(wanted)]
    return at_least[0] if at_least else thinking[-1]
