"""`postroom jobs`: done by the router that runs, seen in SQL, taken over with the lease."""

# ruff: noqa: ASYNC110 - another process sends no events, so it is asked again

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, RouterProcess

pytestmark = pytest.mark.postgres


async def jobs(home: Path, *arguments: str, exits: int = 0) -> Any:
    done = await kit.postroom("jobs", *arguments, "--data-dir", home / "data", cwd=home)
    assert done.returncode == exits, done.stderr.decode()
    return done.stdout.decode() if exits == 0 else done.stderr.decode()


async def test_jobs_are_done_and_switched_while_a_router_runs(home: Path) -> None:
    router = RouterProcess(home, "--data-dir", home / "data")
    try:
        await router.ready()
        assert (await jobs(home, "run", "session-cleanup")).startswith("succeeded: removed 0 sessions")
        await jobs(home, "disable", "dlq-processor")
        assert (await jobs(home, "run", "process-dlq-entries")).startswith("succeeded: 0 processed")
        listed = {one["name"]: one for one in json.loads(await jobs(home, "list", "--json"))}
        assert not listed["process-dlq-entries"]["active"]
        assert not listed["dlq-processor"]["active"]
        assert listed["session-cleanup"]["active"]
        assert listed["session-cleanup"]["last_status"] == "succeeded"
        [run] = json.loads(await jobs(home, "runs", "session-cleanup", "--json"))
        assert run["status"] == "succeeded"
        assert "there are: process-dlq-entries" in await jobs(home, "run", "nothing", exits=1)
        assert "Bad minute" in await jobs(home, "schedule", "session-cleanup", "61 * * * *", exits=2)
        await jobs(home, "schedule", "session-cleanup", "5 4 * * *")
        assert "at least every five minutes" in await jobs(
            home, "schedule", "dlq-processor", "* * * * *", exits=1
        )
        assert await router.stop() == 0
        assert "is a postroom serve running" in await jobs(home, "run", "dlq-report", "--wait", "0", exits=1)
        router = RouterProcess(home, "--data-dir", home / "data")
        await router.ready()
        with trio.fail_after(kit.HANGS):
            while not json.loads(await jobs(home, "runs", "dlq-report", "--json")):
                await trio.sleep(0.1)
    finally:
        router.end()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
async def test_another_process_does_the_jobs_of_one_that_is_gone(home: Path, end: signal.Signals) -> None:
    first = RouterProcess(home, "--data-dir", home / "data")
    second: RouterProcess | None = None
    try:
        await first.ready()
        second = await RouterProcess(home, "--data-dir", home / "data").ready()
        await jobs(home, "run", "dlq-report")
        first.signal(end)
        await jobs(home, "run", "dlq-report")
        database = Database.of(home / "data")
        epochs = await database.fetch("SELECT epoch FROM postroom_job_runs ORDER BY runid")
        assert [row["epoch"] for row in epochs] == [1, 2]
    finally:
        first.end()
        if second is not None:
            second.end()
