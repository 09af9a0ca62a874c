"""Names of requests that came without one."""

from __future__ import annotations

import itertools
import secrets

_process = secrets.token_hex(8)
_numbers = itertools.count(1)


def new_request_id() -> str:
    """32 hexadecimal digits that no other request has: half of them are the process', drawn once."""
    return f"{_process}{next(_numbers):016x}"
