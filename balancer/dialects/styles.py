"""How the accounts of each `api_style` are spoken to."""

from __future__ import annotations

from collections.abc import Mapping

from balancer.dialects import Accounts
from balancer.dialects.anthropic import ANTHROPIC
from balancer.dialects.google import GOOGLE
from balancer.dialects.openai import OPENAI
from balancer.domain import ApiStyle

ACCOUNTS: Mapping[ApiStyle, Accounts] = {"openai": OPENAI, "anthropic": ANTHROPIC, "google": GOOGLE}
