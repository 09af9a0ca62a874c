"""Leaves bytecode beside every module that the gateway may import. Run once, while the image is built.

All of the image's Python would be 35 MB of it. Checked by the sources' hashes: whatever becomes of their times in a
registry or in an image made from this one, no stale bytecode is run.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import pkgutil
import py_compile
import sys
from pathlib import Path

import balancer


def main() -> None:
    """Imports all that is named anywhere in the package, and compiles what that brought in."""
    for found in pkgutil.walk_packages(balancer.__path__, "balancer."):
        module = importlib.import_module(found.name)
        for name in named(Path(str(module.__file__)).read_text(encoding="utf-8")):
            with contextlib.suppress(ImportError):  # Such as uvloop, which may be absent.
                importlib.import_module(name)
    files = {spec.origin for module in list(sys.modules.values()) if (spec := getattr(module, "__spec__", None))}
    for file in sorted(file for file in files if file and file.endswith(".py")):
        py_compile.compile(file, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


def named(source: str) -> set[str]:
    """The modules that a source imports, inside of functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


if __name__ == "__main__":
    main()
