"""Two `postroom serve` on one database: both accept, one delivers, and the other takes over when it is gone
or stands still. One that comes back writes nothing any more under the epoch that it had.
"""

# ruff: noqa: ASYNC110 - processes and tables send no events

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Load, Plan, RouterProcess, Services, open_services

pytestmark = pytest.mark.postgres


async def role(router: RouterProcess) -> str:
    _, body = await kit.get(f"{router.admin}/health")
    return str(json.loads(body)["components"]["delivery"]["role"])


async def epoch(database: Database) -> int:
    value: int = await database.value("SELECT epoch FROM leases WHERE holder IS NOT NULL")
    return value


async def until_epoch_after(database: Database, old: int) -> float:
    """Seconds until another one holds the lease."""
    started = trio.current_time()
    with trio.fail_after(kit.HANGS):
        while (await epoch(database) or 0) <= old:
            await trio.sleep(0.02)
    return trio.current_time() - started


@asynccontextmanager
async def two_servers(home: Path, services: Services) -> AsyncIterator[tuple[RouterProcess, RouterProcess]]:
    """The one that delivers, and the one that stands by."""
    common = ("--data-dir", home / "data", "--config", kit.write_config(home, services))
    async with kit.serving(home, *common) as first:
        while await role(first) != "delivers":
            await trio.sleep(0.02)
        async with kit.serving(home, *common) as second:
            yield first, second


async def test_both_accept_and_one_delivers(home: Path) -> None:
    async with open_services() as services, two_servers(home, services) as (first, second):
        database = Database.of(home / "data")
        assert [await role(first), await role(second)] == ["delivers", "stands by"]
        messages = [kit.new_message(f"taxi {n}", sender=f"99900000{n % 5:04}") for n in range(40)]
        for n, message in enumerate(messages):
            router = second if n % 2 else first
            assert await kit.post(router.webhook, kit.body_of(message)) == 200
        # The same again at the other one: its ledger is the same.
        assert await kit.post(second.webhook, kit.body_of(messages[0])) == 200
        await database.until(lambda count: count == 0)
        epochs = await database.fetch("SELECT DISTINCT epoch FROM message_outcomes")
        conservation = await database.recount()
        assert await second.stop() == 0
        assert await first.stop() == 0
    assert len(epochs) == 1
    assert conservation.ok, conservation.problems
    assert conservation.duplicates == 1
    for sender in {message.sender for message in messages}:
        order = [message.message_id for message in messages if message.sender == sender]
        assert [s.message_id for s in services.sights if s.message_id in order] == order


async def test_the_other_takes_over_from_one_that_was_killed(home: Path) -> None:
    async with open_services() as services, two_servers(home, services) as (first, second):
        database = Database.of(home / "data")
        services.plan = lambda sight: Plan(delay=0.2)
        load = Load(services.ledger, seed=11)
        load.urls = [first.webhook, second.webhook]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await database.until(lambda count: count >= 50)
            old = await epoch(database)
            load.urls = [second.webhook]
            await first.kill()
            unfinished = await database.unfinished()
            seconds = await until_epoch_after(database, old)
            kit.say(f"{unfinished} unfinished items at the kill, taken over after {seconds:.1f} s")
            assert seconds < 10
            services.plan = lambda sight: Plan()
            await trio.sleep(0.5)  # of traffic on the new one
            load.stop()
        assert load.unanswered == 0
        await database.until(lambda count: count == 0)
        assert await role(second) == "delivers"
        report = await kit.verdict(database, services)
        assert await second.stop() == 0
    assert unfinished >= 50
    assert report.received == report.distinct == sum(report.delivered.values())


async def stand_still(home: Path, seconds: float, *, seed: int) -> None:
    async with open_services() as services, two_servers(home, services) as (first, second):
        database = Database.of(home / "data")
        services.plan = lambda sight: Plan(delay=0.2)
        load = Load(services.ledger, seed=seed)
        load.urls = [first.webhook, second.webhook]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load.run)
            await database.until(lambda count: count >= 50)
            old = await epoch(database)
            load.urls = [second.webhook]
            first.signal(signal.SIGSTOP)
            stopped = trio.current_time()
            taken_over = await until_epoch_after(database, old)
            assert taken_over < 10
            written = await completions(database, old)
            services.plan = lambda sight: Plan()
            await trio.sleep_until(stopped + seconds)
            load.stop()
            sights = len(services.sights)
            first.signal(signal.SIGCONT)
        await database.until(lambda count: count == 0)
        with trio.fail_after(kit.HANGS):
            while await role(first) != "stands by":
                await trio.sleep(0.05)
        assert load.unanswered == 0
        assert await completions(database, old) == written, "a late write under the old epoch"
        assert await epoch(database) == old + 1
        known = {sight.message_id for sight in services.sights[:sights]}
        late = [sight for sight in services.sights[sights:] if sight.message_id in known]
        kit.say(f"taken over after {taken_over:.1f} s, {len(late)} attempts repeated after {seconds:g} s")
        sessions = [sight.body["session"]["key"] for sight in late]
        assert len(sessions) == len(set(sessions)), "more than the attempt that had begun was repeated"
        report = await kit.verdict(database, services)
        assert report.received == report.distinct == sum(report.delivered.values())
        assert [await role(first), await role(second)] == ["stands by", "delivers"]
        for router in (first, second):
            message = kit.new_message("taxi", sender="999000009999")
            assert await kit.post(router.webhook, kit.body_of(message)) == 200
            with trio.fail_after(kit.HANGS):
                while not services.of(message.message_id):
                    await trio.sleep(0.01)
        assert await first.stop() == 0
        assert await second.stop() == 0


async def completions(database: Database, of_epoch: int) -> int:
    count: int = await database.value("SELECT count(*) FROM message_outcomes WHERE epoch = $1", of_epoch)
    return count


async def test_one_that_stood_still_writes_nothing_late(home: Path) -> None:
    await stand_still(home, 12, seed=12)


@pytest.mark.acceptance
async def test_one_that_stood_still_for_half_a_minute_writes_nothing_late(home: Path) -> None:
    await stand_still(home, 30, seed=13)


async def test_the_other_takes_over_from_one_that_is_asked_to_stop(home: Path) -> None:
    async with open_services() as services, two_servers(home, services) as (first, second):
        old = await epoch(Database.of(home / "data"))
        assert await first.stop() == 0
        assert await until_epoch_after(Database.of(home / "data"), old) < 5
        message = kit.new_message("taxi")
        assert await kit.post(second.webhook, kit.body_of(message)) == 200
        await services.until_seen(1)
        assert await second.stop() == 0
