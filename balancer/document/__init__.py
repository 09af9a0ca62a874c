"""The configuration document: what people write becomes the domain's structs, and the other way round.

`parse` takes text apart, `read` makes structs of it through one of three doors, `write`, `masked` and `diff` show them.
"""

from balancer.document.parsing import parse
from balancer.document.reading import Door, Reading, is_tingly_box, read, read_tactic
from balancer.document.writing import diff, digest, masked, select_view, write

__all__ = [
    "Door",
    "Reading",
    "diff",
    "digest",
    "is_tingly_box",
    "masked",
    "parse",
    "read",
    "read_tactic",
    "select_view",
    "write",
]
