"""A small run of the proof: real workers under faults, every decision replayed, every attempt accounted for."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("topology", ["standalone", "sentinel"])
async def test_some_thousand_decisions_under_faults_are_all_right(topology: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.prove", "--phases", "1", "--topology", topology),
        *("--decisions", "15000", "--workers", "3", "--seed", "5"),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(110):
        out, _ = await process.communicate()
    text = out.decode()
    assert process.returncode == 0, text
    assert re.search(r"^\d{4,} decisions, \d{4,} attempts, 0 violations, 0 faults in the books: PROVEN$", text, re.M), (
        text
    )
    assert text.count("full check") == 2
