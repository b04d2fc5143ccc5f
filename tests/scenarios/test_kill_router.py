"""SIGKILL of the router under load: what was answered 200 reaches its service, in order, under one key."""

from __future__ import annotations

from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Load, Plan, RouterProcess, open_services

pytestmark = pytest.mark.postgres

AT_LEAST = 50
"""Unfinished items at a kill; a round with fewer shows nothing and is repeated."""


async def kill_rounds(home: Path, rounds: int, *, seed: int) -> None:
    data = home / "data"
    database = Database.of(data)
    counted: list[int] = []
    async with open_services() as services:
        slow = False
        services.plan = lambda sight: Plan(delay=0.3 if slow else 0.0)
        config = kit.write_config(home, services)
        load = Load(services.ledger, seed=seed)
        router = RouterProcess(home, "--data-dir", data, "--config", config)
        try:
            async with trio.open_nursery() as nursery:
                load.urls = [(await router.ready()).webhook]
                nursery.start_soon(load.run)
                for _ in range(2 * rounds):
                    slow = True  # the load is larger than the services
                    await database.until(lambda count: count >= AT_LEAST + 30)
                    await router.kill()
                    unfinished = await database.unfinished()
                    if unfinished >= AT_LEAST:
                        counted.append(unfinished)
                        kit.say(f"round {len(counted)}: {unfinished} unfinished items at the kill")
                    slow = False
                    router = RouterProcess(home, "--data-dir", data, "--config", config)
                    load.urls = [(await router.ready()).webhook]
                    if len(counted) == rounds:
                        break
                    await kit.caught_up(load, database)
                load.stop()
            assert load.unanswered == 0
            await database.until(lambda count: count == 0)
            report = await kit.verdict(database, services)
            assert await router.stop() == 0
        finally:
            router.end()
    kit.say(
        f"{report.received} messages answered 200, {report.repeats} delivered again, "
        f"at most {report.longest_repeat} in a row"
    )
    assert len(counted) == rounds
    assert report.dead_letters == 0
    assert report.received == report.distinct == sum(report.delivered.values())


async def test_killed_under_load_nothing_is_lost(home: Path) -> None:
    await kill_rounds(home, 2, seed=1)


@pytest.mark.acceptance
async def test_killed_twenty_times_under_load_nothing_is_lost(home: Path) -> None:
    await kill_rounds(home, 20, seed=2)
