"""Names of requests: the client's own, or one of ours."""

from __future__ import annotations

import itertools
import re
import secrets

_GIVEN = re.compile(r"[\x21-\x7e]{1,128}")
_process = secrets.token_hex(8)
_numbers = itertools.count(1)


def new_request_id() -> str:
    """32 hexadecimal digits that no other request has: half of them are the process', drawn once."""
    return _process + "%016x" % next(_numbers)  # noqa: UP031 - in two thirds of the time.


def request_id_of(given: str) -> str:
    """What the client calls its request, if that can be passed on; else a name of ours."""
    return given if given and _GIVEN.fullmatch(given) else new_request_id()
