"""import litellm, import tingly: other gateways' files become ours; what they lose on the way is told on stderr."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from balancer import document, importing
from balancer.errors import ConfigurationError


class _Dumper(yaml.SafeDumper):
    """YAML as people write it: what is said twice stands there twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """True: nothing is an anchor."""
        return True


def run(options: argparse.Namespace) -> int:
    """Writes the document, and its warnings to stderr; 1 if `check` would refuse it until something is added."""
    text = _read(options.file)
    if options.source == "tingly":
        raw = importing.parse_export(text)
        imported = importing.tingly(
            document.parse(text, options.file) if raw is None else raw, is_literal=options.literals
        )
    else:
        imported = importing.litellm(document.parse(text, options.file), is_literal=options.literals)
    warnings = list(imported.warnings)
    faults: tuple[str, ...] = ()
    try:
        warnings += document.read(imported.document, door="strict").warnings
    except ConfigurationError as exc:
        faults = exc.faults
    _write(
        yaml.dump(
            imported.document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
        ),
        options.output,
    )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for fault in faults:
        print(f"to do: {fault}", file=sys.stderr)
    if not faults:
        return 0
    count = len(faults)
    print(
        f"balancer: `check` refuses the result until {'this is' if count == 1 else 'these are'} mended", file=sys.stderr
    )
    return 1


def _read(path: str) -> str:
    """The text of a file, or with `-` of stdin."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"cannot read {path}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path} is no UTF-8 text") from exc


def _write(text: str, path: str) -> None:
    """Writes to a file that only its owner may read, or to stdout."""
    if not path:
        print(text, end="")
        return
    try:
        file = Path(path)
        file.touch(mode=0o600)
        file.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"cannot write {path}: {exc.strerror}") from exc
