"""The bridge through trio-asyncio keeps the promises of ours, and one short comparison of both."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import trio

pytest.importorskip("trio_asyncio", reason="the bench extra is not installed")

from bench.bridge_trio_asyncio import open_bridge


async def answer(value: object) -> object:
    await asyncio.sleep(0)
    return value


async def test_results_and_exceptions_come_back():
    async def fail() -> None:
        raise ArithmeticError

    async with open_bridge() as bridge:
        assert await bridge.run(lambda: answer(1)) == 1
        with pytest.raises(ArithmeticError):
            await bridge.run(fail)


async def test_a_cancelled_caller_waits_for_the_end():
    events = []
    started = trio.Event()

    async with open_bridge() as bridge:

        async def work() -> None:
            bridge.call_soon(started.set)
            try:
                await asyncio.sleep(3_600)
            except asyncio.CancelledError:
                await asyncio.sleep(0)
                events.append("cleaned up")
                raise

        async with trio.open_nursery() as nursery:
            nursery.start_soon(bridge.run, work)
            await started.wait()
            nursery.cancel_scope.cancel()
        assert events == ["cleaned up"]


@pytest.mark.postgres
def test_a_short_call(tmp_path: Path):
    path = tmp_path / "bridge.json"
    options = ["--rounds", "1", "--seconds", "0.5", "--connections", "8", "--json", str(path)]
    command = [sys.executable, "-m", "bench", "bridge", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert [one["bridge"] for one in result["summary"]] == ["thread", "trio-asyncio"]
    assert all(one["load"]["failed"] == 0 and one["rows"] == one["load"]["ok"] for one in result["rounds"])
