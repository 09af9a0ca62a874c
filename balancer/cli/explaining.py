"""explain: which entry of a rule's smart routing a request matches, and why the others do not. Nothing is picked."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from balancer.cli.configuration import current_configuration, read_file
from balancer.errors import ConfigurationError
from balancer.explanation import Explanation, explain, rule_of


def run(options: argparse.Namespace) -> int:
    """Prints the explanation of the request in a file."""
    body = _body(options.request)
    configuration = read_file(options.config, lenient=False) if options.config else current_configuration(options)
    rule = rule_of(configuration, body, uuid=options.rule, scenario=options.scenario)
    explanation = explain(configuration, rule, body, datetime.now(UTC))
    if options.output == "json":
        print(msgspec.json.format(msgspec.json.encode(explanation), indent=2).decode())
    else:
        _print(explanation)
    return 0


def _body(path: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as exc:
        raise ConfigurationError(f"cannot read {path}: {exc.strerror}") from exc


def _print(explained: Explanation) -> None:
    print(f"rule {explained.rule}, pool {explained.pool}")
    for entry in explained.considered:
        print(f"  entry {entry.entry}{': ' if entry.description else ''}{entry.description}")
        for op in entry.ops:
            value = f" {op['value']}" if op["value"] else ""
            print(f"    {op['op']}{value}: {'holds' if op['holds'] else 'fails'}, found {op['found']}")
    where = f"entry {explained.entry}" if explained.entry else "the rule itself"
    print(f"served by {where}: {', '.join(explained.services) or 'no active service'}")
    if explained.note:
        print(explained.note)
    if explained.estimated_tokens is not None:
        print(f"estimated tokens: {explained.estimated_tokens}")
