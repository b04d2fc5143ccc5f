"""What a run of the tests is: how thorough its property tests are, which rounds it leaves out, and how many
processes share it.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# Quick at a desk, thorough in CI (and with --hypothesis-profile=thorough).
settings.register_profile("quick", max_examples=10, deadline=None)
settings.register_profile("thorough", max_examples=200, deadline=None)
settings.load_profile("thorough" if os.environ.get("CI") == "true" else "quick")

# Where bytecode may not be kept, each of several processes would rewrite the asserts of every file again,
# which takes longer than all these tests. A failure is shown without its values there: `-n0` shows them.
if sys.dont_write_bytecode and "PYTEST_XDIST_WORKER" in os.environ:
    sys.meta_path[:] = [one for one in sys.meta_path if type(one).__name__ != "AssertionRewritingHook"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that is about Postgres as a whole is not even imported where Postgres is left out."""
    if "not postgres" in config.option.markexpr and collection_path.suffix == ".py":
        return "\npytestmark = pytest.mark.postgres\n" in collection_path.read_text(encoding="utf-8") or None
    return None


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What collecting makes stays to the end: to look for garbage in it, then and later, is in vain."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Full fault rounds run only where `-m` speaks of them: `-m "not postgres"` must not begin one. Whatever
    runs whole routers, and kills and measures them, is done by one process, one after the other.
    """
    alone = tuple(config.rootpath / "tests" / name for name in ("bench", "scenarios"))
    for item in items:
        if item.get_closest_marker("postgres") and any(item.path.is_relative_to(one) for one in alone):
            item.add_marker(pytest.mark.xdist_group("routers"))
    if "acceptance" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("acceptance")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many as suit two cores. Many tests of the part without Postgres wait for a deadline, so three share
    it. Full rounds have the machine for themselves; in CI everything has, so that no failure is the other
    process's.
    """
    if "acceptance" in config.option.markexpr or os.environ.get("CI") == "true":
        return 0
    return 3 if "not postgres" in config.option.markexpr else 2
