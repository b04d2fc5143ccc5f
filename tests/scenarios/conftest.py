"""A data directory for every test, copied from one that was made and migrated once; and what a service in it
needs that pip cannot bring.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import scenarios_kit as kit


@pytest.fixture(scope="session")
def _template() -> Iterator[Path]:
    with kit.new_home() as home:
        made = subprocess.run(
            kit.command("migrate", "--data-dir", home / "data"),
            cwd=home,
            env=kit.environment(),
            capture_output=True,
            text=True,
            timeout=kit.HANGS,
            check=False,
        )
        assert made.returncode == 0, made.stderr
        yield home / "data"


@pytest.fixture
def home(_template: Path) -> Iterator[Path]:
    """A directory of the test's own; `home / "data"` is a migrated data directory."""
    with kit.new_home() as home:
        subprocess.run(["cp", "-a", _template, home / "data"], check=True)
        yield home


@pytest.fixture
def express(home: Path) -> None:
    """Express, in `home`; without npm or its registry the test is skipped, and fails where CI requires it."""
    missing = "Node.js and npm are not installed"
    if shutil.which("npm") is not None:
        install = ["npm", "install", "--no-audit", "--no-fund", "express@5"]
        if subprocess.run(install, cwd=home, capture_output=True, check=False).returncode == 0:
            return
        missing = "express cannot be installed: the npm registry is not reached"
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
