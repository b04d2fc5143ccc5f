"""A Postgres that the router did not start is away: what is accepted meanwhile waits on this machine's disk,
also across a SIGKILL of the router and a start without a database, and arrives in order.
"""

# ruff: noqa: ASYNC110 - tables and directories send no events

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Load, RouterProcess

from router.postgres.embedded import EmbeddedPostgres

pytestmark = pytest.mark.postgres


def spooled(home: Path) -> list[Path]:
    return sorted((home / "data" / "spool").glob("*/*.spool"))


async def until_spooled(home: Path, size: int) -> None:
    """So many bytes wait."""
    with trio.fail_after(kit.HANGS):
        while sum(path.stat().st_size for path in spooled(home)) < size:
            await trio.sleep(0.02)


async def until_brought(home: Path) -> None:
    with trio.fail_after(kit.HANGS):
        while spooled(home):
            await trio.sleep(0.02)


async def outages(home: Path, rounds: int, *, seconds: float, seed: int) -> None:
    """Each round: Postgres is killed under load, half of the time later the router, which starts again
    without a database; then Postgres comes back.
    """
    postgres = EmbeddedPostgres(home / "outside")
    dsn = (await postgres.start()).dsn
    database = Database(dsn)
    async with kit.open_services() as services:
        config = kit.write_config(home, services)
        common = ("--data-dir", home / "data", "--config", config, "--migrate")
        environment = kit.environment(DATABASE_URL=dsn)
        load = Load(services.ledger, seed=seed)
        router = RouterProcess(home, *common, env=environment)
        try:
            async with trio.open_nursery() as nursery:
                load.urls = [(await router.ready()).webhook]
                nursery.start_soon(load.run)
                for number in range(rounds):
                    await trio.sleep(1)
                    before = await database.value("SELECT next_seq FROM journal_head")
                    postmaster = kit.postmaster_of(home / "outside")
                    assert postmaster is not None
                    os.kill(postmaster, signal.SIGKILL)
                    await until_spooled(home, 100_000)
                    await trio.sleep(seconds / 2)
                    await router.kill()
                    router = RouterProcess(home, *common, env=environment)
                    load.urls = [(await router.ready()).webhook]
                    size = sum(path.stat().st_size for path in spooled(home))
                    await until_spooled(home, size + 50_000)
                    status, answer = await kit.get(f"{router.admin}/health")
                    assert (status, json.loads(answer)["status"]) == (200, "degraded")
                    await trio.sleep(seconds / 2)
                    waiting = sum(path.stat().st_size for path in spooled(home))
                    await postgres.start()
                    back = trio.current_time()
                    load.rest()
                    await until_brought(home)
                    await database.until(lambda count: count == 0)
                    after = await database.value("SELECT next_seq FROM journal_head")
                    kit.say(
                        f"round {number + 1}: {waiting // 1000} kB waited, {after - before} items journaled, "
                        f"caught up {trio.current_time() - back:.1f} s after Postgres was back"
                    )
                    load.go_on()
                load.stop()
            assert load.unanswered == 0
            await until_brought(home)
            await database.until(lambda count: count == 0)
            report = await kit.verdict(database, services)
            assert await router.stop() == 0
        finally:
            router.end()
            await postgres.stop()
    kit.say(f"{report.received} messages answered 200, {report.repeats} delivered again")
    assert report.dead_letters == 0
    assert report.received == report.distinct == sum(report.delivered.values())


async def test_postgres_is_away_and_the_router_is_killed_meanwhile(home: Path) -> None:
    await outages(home, 1, seconds=4, seed=11)


@pytest.mark.acceptance
async def test_postgres_is_away_for_a_minute_five_times(home: Path) -> None:
    await outages(home, 5, seconds=60, seed=12)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
async def test_the_spool_is_synced_before_the_answer(home: Path) -> None:
    """The database cannot be reached at all; strace sees the sync, and then the 200."""
    async with kit.open_services() as services:
        config = kit.write_config(home, services)
        trace = home / "trace"
        environment = kit.environment(DATABASE_URL="postgresql://postroom@127.0.0.1:9/none")
        async with (
            kit.serving(home, "--data-dir", home / "data", "--config", config, env=environment) as router,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(trio.run_process, [
                "strace", "-f", "-ttt", "-e", "trace=fdatasync,write,sendto,sendmsg", "-s", "24",
                "-o", str(trace), "-p", str(router.pid),
            ])  # fmt: skip
            with trio.fail_after(kit.HANGS):
                while not trace.exists():
                    await trio.sleep(0.05)
            await trio.sleep(0.5)
            for _ in range(5):
                assert await kit.post(router.webhook, kit.body_of(kit.new_message("taxi"))) == 200
            assert await router.stop() == 0
        order = [
            "sync" if "fdatasync" in line else "answer"
            for line in trace.read_text().splitlines()
            if re.search(r"fdatasync\(.*= 0|fdatasync resumed.*= 0|\"HTTP/1\.1 200", line)
        ]
    assert order.count("answer") == 5
    assert order == ["sync", "answer"] * 5
