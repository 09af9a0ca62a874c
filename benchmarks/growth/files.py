"""How many files a process may have open."""

from __future__ import annotations

import resource


def raise_open_files() -> int:
    """Raises the process's limit of open files as far as it may; what it is now."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 2**20 if hard == resource.RLIM_INFINITY else hard
