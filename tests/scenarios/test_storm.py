"""Every fault of the simulator at the same time: senders, services and phones that fail in all their ways,
then with the router and Postgres killed as well. Nothing is lost and nothing out of order, replies included.
"""

# ruff: noqa: ASYNC110 - tables send no events

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from random import Random

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Load, Plan, RouterProcess, Services, Sight

from router.simulator import Faults, GraphEndpoint, GraphFaults, Ledger, Refused, Taken

pytestmark = pytest.mark.postgres

TOKEN = "EAAGstorm"
PHONES_FAIL = GraphFaults(
    error=0.02,
    limited=0.01,
    pair_limited=0.02,
    refused=0.01,
    drop_before=0.01,
    drop_after=0.01,
    slow=0.02,
    slow_seconds=0.3,
)
SETTINGS: dict[str, int | str] = {"timeout_ms": 500, "deadline_ms": 2_000, "dead_letters": '"fast"'}


class Weather:
    """What services and phones do while it storms, and afterwards."""

    def __init__(self, ledger: Ledger, rng: Random) -> None:
        self.calm = False
        self._ledger = ledger
        self._rng = rng

    def plan(self, sight: Sight) -> Plan:
        if not self.calm:
            draw = self._rng.random()
            for share, trouble in (
                (0.02, Plan(status=500)),
                (0.03, Plan(hang=True)),
                (0.04, Plan(status=503, retry_after=1)),
                (0.05, Plan(status=422)),
            ):
                if draw < share:
                    return trouble
        texts = [f"{sight.message_id} {number}" for number in range(int(sight.key[4:6], 16) % 3)]
        self._ledger.replied(sight.message_id, texts)
        answer = json.dumps({"replies": [{"text": text} for text in texts]}).encode()
        slow = not self.calm and self._rng.random() < 0.05
        return Plan(answer=answer, delay=0.2 if slow else 0.0)


class Statuses:
    """What the table says of outbound messages, again and again: it never goes back."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.ranks: dict[tuple[str, str], int] = {}
        self.names: dict[tuple[str, str], str] = {}

    async def look(self) -> None:
        for row in await self._database.fetch(
            "SELECT phone_number_id, message_id, status, rank FROM whatsapp_statuses"
        ):
            known = row["phone_number_id"], row["message_id"]
            assert row["rank"] >= self.ranks.get(known, 0), f"a status of {known[1]} went back"
            self.ranks[known], self.names[known] = row["rank"], row["status"]


async def storm(home: Path, *, seconds: float, seed: int, kills: bool) -> None:
    rng = Random(seed)
    ledger = Ledger()
    weather = Weather(ledger, rng)
    load = Load(ledger, seed=seed, rate=100.0, faults=Faults.everything())

    in_doubt: list[str] = []

    def taken(message: Taken) -> None:
        ledger.reply_taken(message.phone_number_id, message.recipient, message.text)
        load.population.took(message.message_id, message.phone_number_id, message.recipient)

    def refused(message: Refused) -> None:
        if message.for_good:
            ledger.reply_refused(message.phone_number_id, message.recipient, message.text)

    graph = GraphEndpoint(
        token=TOKEN,
        rng=rng,
        on_taken=taken,
        on_refused=refused,
        on_in_doubt=lambda message: in_doubt.append(message.text),
        faults=PHONES_FAIL,
    )
    async with kit.open_services(ledger) as services, trio.open_nursery() as nursery:
        services.plan = weather.plan
        url = await nursery.start(graph.serve)
        sender = f'[sender]\nurl = "{url}"\ntoken_env = "GRAPH_TOKEN"\ntimeout_ms = 2000'
        config = kit.write_config(home, services, sender, rides=SETTINGS, insurance=SETTINGS)
        place = Place(home, home / "data", config)
        try:
            load.urls = [await place.start()]
            nursery.start_soon(load.run)
            await keep_on(place, load, seconds, rng if kills else None)
            weather.calm, graph.faults = True, GraphFaults()
            load.stop()
            with trio.fail_after(kit.HANGS):
                while load.unanswered < 0:
                    await trio.sleep(0.05)
            assert load.unanswered == 0
            await place.settled()
            await judge(place, services, load, in_doubt, crashed=kills)
            assert await place.router.stop() == 0
        finally:
            place.router.end()
        nursery.cancel_scope.cancel()


async def keep_on(place: Place, load: Load, seconds: float, rng: Random | None) -> None:
    """Look at the statuses, and with `rng` kill router or Postgres every 3 to 8 seconds."""
    ends = trio.current_time() + seconds
    while (now := trio.current_time()) < ends:
        await trio.sleep_until(min(ends, now + (rng.uniform(3, 8) if rng is not None else 1.0)))
        if rng is None:
            await place.statuses.look()
        elif place.is_routers_turn(rng):
            await place.router.kill()
            load.urls = [await place.start()]
            place.kills["router"] += 1
        elif (postmaster := kit.postmaster_of(place.data)) is not None:
            os.kill(postmaster, signal.SIGKILL)
            place.kills["postgres"] += 1


class Place:
    """One router after the other on one data directory."""

    def __init__(self, home: Path, data: Path, config: Path) -> None:
        self._home = home
        self._config = config
        self.data = data
        self.database = Database.of(data)
        self.statuses = Statuses(self.database)
        self.kills = {"router": 0, "postgres": 0}
        self.router: RouterProcess

    def is_routers_turn(self, rng: Random) -> bool:
        """Whichever was killed less often; by chance where that is neither."""
        lead = self.kills["router"] - self.kills["postgres"]
        return lead < 0 or (lead == 0 and rng.random() < 0.5)

    async def start(self) -> str:
        self.router = RouterProcess(
            self._home,
            *("--data-dir", self.data, "--config", self._config),
            env=kit.environment(GRAPH_TOKEN=TOKEN),
        )
        return (await self.router.ready()).webhook

    async def settled(self) -> None:
        """Dead letters are retried until none waits, replies are sent until none does."""
        common = ("--data-dir", self.data, "--config", self._config)
        env = kit.environment(GRAPH_TOKEN=TOKEN)
        with trio.fail_after(4 * kit.HANGS):
            await self.database.until(lambda count: count == 0)
            while await self.database.value(
                "SELECT count(*) FROM webhook_dlq WHERE status IN ('pending', 'processing')"
            ):
                retry = ("dlq", "retry", "--status", "pending", "--all")
                await kit.postroom(*retry, *common, cwd=self._home, env=env)
                await trio.sleep(1)
            while await self.database.value("SELECT count(*) FROM whatsapp_outbox WHERE status = 'pending'"):
                await trio.sleep(0.2)


async def judge(place: Place, services: Services, load: Load, in_doubt: list[str], *, crashed: bool) -> None:
    report = await kit.verdict(place.database, services, replies=True, in_doubt=in_doubt)
    await place.statuses.look()
    furthest = load.population.furthest_statuses()
    assert {key: place.statuses.names.get(key) for key in furthest} == furthest
    by_itself = await place.database.value(
        "SELECT count(*) FROM webhook_dlq "
        "WHERE status = 'failed' AND resolution NOT IN ('rejected', 'exhausted')"
    )
    assert by_itself == 0
    kit.say(
        f"{report.received} messages, {report.duplicates} sent again, {report.dead_letters} dead letters, "
        f"{report.replies} replies ({report.reply_repeats} again, at most {report.longest_reply_repeat} in a "
        f"row), {report.forged} forged bodies, {len(furthest)} outbound messages with statuses; "
        f"killed: {place.kills}"
    )
    assert report.replies > 0
    assert not crashed or all(place.kills.values())


async def test_every_fault_and_kills_for_a_while(home: Path) -> None:
    await storm(home, seconds=20, seed=31, kills=True)


@pytest.mark.acceptance
async def test_every_fault_for_a_minute(home: Path) -> None:
    await storm(home, seconds=60, seed=32, kills=False)


@pytest.mark.acceptance
async def test_every_fault_and_kills_for_ten_minutes(home: Path) -> None:
    await storm(home, seconds=600, seed=33, kills=True)
