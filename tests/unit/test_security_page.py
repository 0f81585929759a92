"""SECURITY.md names only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "SECURITY.md").read_text()


def proofs() -> list[str]:
    """What the last column of each table names."""
    tables = re.findall(r"^\| .* \| .* \| (`.*`) \|$", PAGE, re.MULTILINE)
    return [name for cell in tables for name in re.findall(r"`([^`]+)`", cell)]


def test_every_test_named_is_there() -> None:
    names = proofs()
    assert len(names) > 30
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    there = set(re.findall(r"^(?:async )?def (\w+)\(", source, re.MULTILINE))
    missing = [n for n in names if n not in there and not (ROOT / n).is_file()]
    assert missing == []


def test_every_attempt_has_its_proof() -> None:
    tables = PAGE.split("## What could be tried")[1].split("### The debug shell")[0]
    rows = [
        line for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| attempt")
    ]
    assert [row for row in rows if not row.endswith("` |")] == []
