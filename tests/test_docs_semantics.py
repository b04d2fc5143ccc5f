"""docs/actor-semantics.md names only tests that exist, one of them for each promise."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "actor-semantics.md"


def promises() -> list[str]:
    promised = PAGE.read_text().split("## What it does not promise")[0]
    return [line for line in promised.splitlines() if line.startswith("- ")]


def test_each_promise_names_tests_that_exist() -> None:
    files = (ROOT / "tests" / "actors").rglob("test_*.py")
    existing = {
        name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)
    }
    assert len(promises()) > 20
    for promise in promises():
        named = set(re.findall(r"`(test_\w+)`", promise))
        assert named, f"no test is named for: {promise}"
        assert named <= existing, f"missing: {named - existing}"
