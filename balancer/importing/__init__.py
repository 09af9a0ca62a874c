"""Other gateways' configurations become documents of ours; what cannot be carried over is told, never dropped silently.

`litellm` and `tingly` each take what a file of theirs holds. Nothing here reads files or the environment.
"""

from __future__ import annotations

from balancer.importing.litellm import litellm
from balancer.importing.notes import Imported
from balancer.importing.tingly import parse_export, tingly

__all__ = ["Imported", "litellm", "parse_export", "tingly"]
