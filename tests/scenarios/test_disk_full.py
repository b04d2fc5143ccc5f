"""The disk that holds Postgres and the spool is full: what cannot be made durable is answered 503, and
nothing that was answered 200 is lost.
"""

# ruff: noqa: ASYNC110 - disks and tables send no events

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Load

from router.simulator import NotAnswered

pytestmark = pytest.mark.postgres

SIZE_MIB = 256


@contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """A file system of its own at `path`. Skips the test where we may not mount one."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m,mode=755", "tmpfs", path],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        kit.kill_processes_of(path.parent)
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(file: Path) -> None:
    """Until nothing more fits, not even a few bytes."""
    with file.open("ab", buffering=0) as stream:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while True:
                    stream.write(b"\0" * size)


async def until_refused(url: str) -> int:
    """Send big bodies until one is not answered 200; returns with what."""
    for number in range(200):
        big = kit.new_message("taxi " + "x" * 3_000 + f" {number}", sender="999007000001")
        with suppress(NotAnswered):
            status = await kit.post(url, kit.body_of(*[big] * 20))
            if status != 200:
                return status
    raise AssertionError("a full disk took everything")


async def test_a_full_disk_is_answered_503_and_loses_nothing(home: Path) -> None:
    disk = home / "small"
    with small_disk(disk):
        subprocess.run(["cp", "-a", home / "data", disk / "data"], check=True)  # noqa: ASYNC221
        async with kit.open_services() as services:
            config = kit.write_config(home, services)
            common = ("--data-dir", disk / "data", "--config", config)
            async with kit.serving(home, *common) as router, trio.open_nursery() as nursery:
                database = Database.of(disk / "data")
                load = Load(services.ledger, seed=21, rate=60.0)
                load.urls = [router.webhook]
                nursery.start_soon(load.run)
                await services.until_seen(60)
                await trio.to_thread.run_sync(fill, disk / "filler")
                with trio.fail_after(kit.HANGS):
                    assert await until_refused(router.webhook) == 503
                status, body = await kit.get(f"{router.admin}/health")
                assert (status, json.loads(body)["status"]) != (200, "healthy")
                (disk / "filler").unlink()
                with trio.fail_after(kit.HANGS):
                    while json.loads((await kit.get(f"{router.admin}/health"))[1])["status"] != "healthy":
                        await trio.sleep(0.1)
                seen = len(services.sights)
                await services.until_seen(seen + 60)
                load.stop()
                while load.unanswered < 0:
                    await trio.sleep(0.05)
                assert load.unanswered == 0
                await database.until(lambda count: count == 0)
                conservation = await database.recount()
                assert conservation.ok, conservation.problems
                assert await router.stop() == 0
    assert services.wrong == []
