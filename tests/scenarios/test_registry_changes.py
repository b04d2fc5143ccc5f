"""Services are changed while a router delivers to them: another URL, a pause, a drain, a removal, a canary, a
shadow, another configuration file. What was sent, and what came to each URL, decides how it went.
"""

# ruff: noqa: ASYNC110 - tables and processes send no events

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import scenarios_kit as kit
import trio
from click.testing import CliRunner
from scenarios_kit import Database, Load, Message, Plan, RouterProcess, Services, Sight

from router.cli import main
from router.simulator import Delivery, Ledger, SentItem, payloads
from router.simulator.deliveries import MESSAGE

pytestmark = pytest.mark.postgres

LANES = 4
WAITING = 16  # deliveries that rides takes beside those that run; more stand in line
RIDES = {"lanes": LANES, "timeout_ms": 10_000, "breaker_failures": 100_000, "breaker_failure_ratio": 1}
ON_ITS_WAY = 0.3
"""Seconds: an attempt that ran when a change was heard of has come by then. What was sent after the change
has no such time.
"""
SHARE = 0.1
WITH_RIDES, WITH_INSURANCE = "999001900001", "999001900002"


@dataclass
class Place:
    """One URL: what came there, and what it took. `plan` is how it answers from now on."""

    services: Services
    plan: Plan = field(default_factory=Plan)
    took: list[Sight] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.services.plan = self._decide

    def _decide(self, sight: Sight) -> Plan:
        if self.plan.accepts:
            self.took.append(sight)
        return self.plan

    @property
    def url(self) -> str:
        return self.services.url("rides")

    @property
    def rides(self) -> list[Sight]:
        return [sight for sight in self.services.sights if sight.domain == "rides"]

    async def more(self, count: int) -> None:
        """Wait until that many more attempts have come for rides."""
        wanted = len(self.rides) + count
        with trio.fail_after(kit.HANGS):
            while len(self.rides) < wanted:
                await trio.sleep(0.01)


@dataclass(frozen=True)
class Mark:
    """A moment: the newest message that was journaled, and how many attempts had come to a URL."""

    seq: int
    came: Mapping[str, int]


@dataclass
class Stage:
    """A router and its load. The configuration has rides and insurance at `first`; `second` is for what
    becomes of rides, `shadow` has a ledger that counts for nothing. `menu`: messages that no service gets.
    """

    home: Path
    config: Path
    router: RouterProcess
    database: Database
    first: Place
    second: Place
    shadow: Place
    ledger: Ledger
    rides: Load
    insurance: Load
    menu: list[Message] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def sights(self) -> list[Sight]:
        """All attempts, as they came."""
        both = (self.first.services.sights, self.second.services.sights)
        return sorted(itertools.chain(*both), key=lambda sight: sight.at)

    # What an operator does

    async def change(self, *arguments: str) -> Mark:
        """`postroom services ...` as a process; returns when the router goes by it."""
        ended = await kit.postroom("services", *arguments, *self._common, cwd=self.home)
        assert ended.returncode == 0, ended.stderr.decode()
        return await self._said(ended.stdout)

    async def change_here(self, *arguments: str) -> Mark:
        """The same command without the second that a process takes to start."""
        unset = dict.fromkeys(os.environ.keys() - kit.environment().keys())
        line = ["services", *arguments, *map(str, self._common)]
        with trio.fail_after(kit.HANGS):
            ended = await trio.to_thread.run_sync(lambda: CliRunner(env=unset).invoke(main, line))
        assert ended.exit_code == 0, ended.output
        return await self._said(ended.stdout_bytes)

    @property
    def _common(self) -> tuple[str | Path, ...]:
        return ("--data-dir", self.home / "data", "--config", self.config, "--json")

    async def _said(self, printed: bytes) -> Mark:
        said = json.loads(printed)
        return await self._heard(said["state"], said["version"])

    async def write(self, state: str, **definition: Any) -> Mark:
        """The same by SQL: any number of times a second."""
        newest = await self.database.value(
            "SELECT coalesce(max(version), 0) FROM service_versions WHERE service = 'rides'"
        )
        version = await self.database.value(
            "SELECT postroom_add_service_version(now(), 'test', 'rides', $1, $2, $3, NULL)",
            newest,
            state,
            json.dumps(definition),
        )
        assert version is not None, "somebody else writes versions"
        return await self._heard(state, version)

    async def _heard(self, state: str, version: int) -> Mark:
        with trio.fail_after(kit.HANGS):
            while True:
                health = await self.health()
                if health is None if state == "removed" else health and health["version"] == version:
                    break
                await trio.sleep(0.01)
        assert health is None or health["state"] == state
        return await self.mark()

    async def health(self) -> Any:
        """What the admin port says of rides; None: it does not know it."""
        _, body = await kit.get(f"{self.router.admin}/health")
        return json.loads(body)["components"]["delivery"]["services"].get("rides")

    async def mark(self) -> Mark:
        came = {place.url: len(place.rides) for place in (self.first, self.second, self.shadow)}
        return Mark(await self.database.value("SELECT max(seq) FROM whatsapp_messages_items"), came)

    async def nothing_came(self, *places: Place, since: Mark, seconds: float) -> None:
        """What ran at the change may have come still. Then nothing, for so many seconds; and never anything
        that was sent after it.
        """
        await trio.sleep(ON_ITS_WAY)
        came = [len(place.rides) for place in places]
        for place, count in zip(places, came, strict=True):
            assert count - since.came[place.url] <= LANES, "more attempts than can have run"
        await trio.sleep(seconds)
        assert [len(place.rides) for place in places] == came
        later = (await self.journal(after=since.seq)).keys()
        assert later, "nothing was sent"
        for place in places:
            assert not later & {sight.message_id for sight in place.rides[since.came[place.url] :]}

    # What phones do

    async def say(self, *messages: Message, domain: str | None = None) -> None:
        """These in one body. The ledger knows of it; without `domain` any service may get them, or none."""
        items = tuple(
            SentItem(MESSAGE, one.message_id, one.number, one.sender, domain, 1, payloads.text_of(one.json))
            for one in messages
        )
        delivery = Delivery(-next(self._numbers), kit.body_of(*messages), items)
        self.ledger.sent(delivery)
        status = await kit.post(self.router.webhook, delivery.body)
        self.ledger.answered(delivery, status, None)
        assert status == 200

    async def get_the_menu(self, *messages: Message) -> None:
        """Say these, and be answered by the router itself."""
        await self.say(*messages)
        self.menu += messages
        ids = [message.message_id for message in messages]
        with trio.fail_after(kit.HANGS):
            while "journaled" in (places := await self.places_of(ids)):
                await trio.sleep(0.02)
        assert set(places) == {"handled"}

    async def rest(self) -> None:
        """The phones of rides write no more, and what they wrote has an outcome: dead letters wait still."""
        self.rides.rest()
        await trio.sleep(ON_ITS_WAY)
        seq = (await self.mark()).seq
        with trio.fail_after(kit.HANGS):
            while await self.database.value(
                "SELECT count(*) FROM whatsapp_messages_items i WHERE i.bucket IS NULL AND seq <= $1 AND "
                "NOT EXISTS (SELECT FROM message_outcomes o WHERE o.seq = i.seq)",
                seq,
            ):
                await trio.sleep(0.02)

    # The verdict

    async def places_of(self, message_ids: list[str]) -> list[str]:
        rows = await self.database.fetch(
            "SELECT place FROM whatsapp_messages WHERE message_id = ANY ($1) ORDER BY seq", message_ids
        )
        return [row["place"] for row in rows]

    async def journal(self, *, after: int = 0) -> dict[str, tuple[str, int]]:
        """Messages by their ids: the conversation and the seq of each."""
        rows = await self.database.fetch(
            "SELECT message_id, session_key, seq FROM whatsapp_messages_items WHERE kind = 'm' AND seq > $1",
            after,
        )
        return {row["message_id"]: (row["session_key"], row["seq"]) for row in rows}

    async def letters(self) -> dict[str, str | None]:
        """Open dead letters: the message, and why it is one."""
        rows = await self.database.fetch(
            "SELECT message_id, resolution FROM webhook_dlq WHERE status IN ('pending', 'processing')"
        )
        return {row["message_id"]: row["resolution"] for row in rows}

    async def no_letters(self) -> None:
        with trio.fail_after(kit.HANGS):
            while await self.letters():
                await trio.sleep(0.05)

    async def verdict(self) -> None:
        self.rides.stop()
        self.insurance.stop()
        await self.database.until(lambda count: count == 0)
        await self.no_letters()
        wrong = self.first.services.wrong + self.second.services.wrong
        await kit.verdict(self.database, Services(self.ledger, sights=self.sights, wrong=wrong))
        assert self.rides.unanswered == self.insurance.unanswered == 0
        journal = await self.journal()
        # As kit.verdict, but also those that waited as dead letters.
        assert kit.late_first_deliveries(self.sights, journal, set()) == []
        taken = Counter(sight.message_id for sight in self.first.took + self.second.took)
        menu = {message.message_id for message in self.menu}
        assert journal.keys() - menu == taken.keys()
        seen: set[str] = set()
        for sight in self.sights:
            assert sight.message_id not in seen or sight.body["redelivered"], "again, and does not say so"
            assert "x-postroom-shadow" not in sight.headers
            seen.add(sight.message_id)
        kit.say(
            f"{len(journal)} messages, {len(menu)} for the menu; rides: {len(self.first.rides)} attempts "
            f"at one URL, {len(self.second.rides)} at the other; {taken.total() - len(taken)} taken again"
        )
        assert await self.router.stop() == 0


@asynccontextmanager
async def open_stage(
    home: Path, *, seed: int, phones: int = 30, rate: float = 75.0, judged: bool = True
) -> AsyncIterator[Stage]:
    """`phones` and `rate` (bodies a second) are those of rides; `judged`: it ends with the verdict."""
    ledger = Ledger()
    # A phone of the one is none of the other: they write to other numbers.
    rides, insurance = (
        Load(ledger, seed=own, phones=count, rate=often, texts={name: kit.TEXTS[name]}, numbers=numbers)
        for name, own, count, often, numbers in (
            ("rides", seed, phones, rate, kit.NUMBERS[:2]),
            ("insurance", seed + 1_000, 20, 40.0, kit.NUMBERS[2:]),
        )
    )
    async with (
        kit.open_services(ledger) as first,
        kit.open_services(ledger) as second,
        kit.open_services() as shadow,
    ):
        config = kit.write_config(home, first, rides=RIDES)
        common = ("--data-dir", home / "data", "--config", config)
        async with kit.serving(home, *common) as router:
            database = Database.of(home / "data")
            places = (Place(first), Place(second), Place(shadow))
            stage = Stage(home, config, router, database, *places, ledger, rides, insurance)
            async with trio.open_nursery() as nursery:
                for load in (rides, insurance):
                    load.urls = [router.webhook]
                    nursery.start_soon(load.run)
                yield stage
                for load in (rides, insurance):
                    load.stop()
            if judged:
                await stage.verdict()


# Another URL, and a pause


async def another_url_and_a_pause(home: Path, rounds: int, *, seconds: float, seed: int) -> None:
    """In the first round by command. The old URL is slower than the phones: there is something that waits."""
    rng = Random(seed)
    async with open_stage(home, seed=seed, rate=40.0) as stage:
        old, new = stage.first, stage.second
        for number in range(rounds):
            by_command = number == 0
            old.plan, new.plan = Plan(delay=0.1), Plan()
            await old.more(10)
            await stage.database.until(lambda count: count > WAITING)
            await trio.sleep(rng.uniform(0, 0.2))
            reached = {"url": new.url, "allow_private": True}
            if by_command:
                mark = await stage.change("set", "rides", f"url={new.url}", "allow_private=true")
            else:
                mark = await stage.write("active", **reached)
            await stage.nothing_came(old, since=mark, seconds=seconds / 2)
            await new.more(10)
            if by_command:
                mark = await stage.change_here("pause", "rides")
            else:
                mark = await stage.write("paused", **reached)
            others = len(old.services.sights) + len(new.services.sights)
            await stage.nothing_came(old, new, since=mark, seconds=seconds)
            assert len(old.services.sights) + len(new.services.sights) > others + 10, "insurance waited, too"
            letters = await stage.letters()
            assert letters
            assert set(letters.values()) == {"deferred"}
            await (stage.change_here("resume", "rides") if by_command else stage.write("active", **reached))
            await new.more(len(letters))
            kit.say(f"round {number + 1}: {len(letters)} waited in the pause")
            old, new = new, old


async def test_another_url_and_a_pause(home: Path) -> None:
    await another_url_and_a_pause(home, 1, seconds=0.8, seed=41)


@pytest.mark.acceptance
async def test_another_url_and_a_pause_twenty_times(home: Path) -> None:
    await another_url_and_a_pause(home, 20, seconds=2.0, seed=42)


# Drained, removed, and added again


async def drained_and_removed(home: Path, *, seconds: float, phones: int, rate: float, seed: int) -> None:
    async with open_stage(home, seed=seed, phones=phones, rate=rate) as stage:
        first = stage.first
        with trio.fail_after(kit.HANGS):
            while len(conversations(first.rides)) < phones:
                await trio.sleep(0.01)
        await stage.say(kit.new_message("taxi", sender=WITH_RIDES), domain="rides")
        await stage.say(kit.new_message("insurance", sender=WITH_INSURANCE), domain="insurance")

        mark = await stage.change("drain", "rides")
        await stage.get_the_menu(*(kit.new_message("taxi", sender=f"99900290{n:04}") for n in range(5)))
        await stage.say(kit.new_message("how long?", sender=WITH_RIDES), domain="rides")
        await stage.say(kit.new_message("taxi", sender=WITH_INSURANCE), domain="insurance")
        await first.more(phones)
        await trio.sleep(seconds)
        assert len(conversations(first.rides)) == phones + 1, "another conversation got there"
        goes_on = first.rides[mark.came[first.url] :]
        kit.say(f"drained: {len(goes_on)} attempts of {len(conversations(goes_on))} conversations since")

        await stage.write("paused")
        await trio.sleep(seconds / 2)
        await stage.rest()
        mark = await stage.change_here("remove", "rides")
        letters = await stage.letters()
        assert letters
        for sender in (WITH_RIDES, "999002990000"):
            await stage.get_the_menu(kit.new_message("taxi", sender=sender))
        await stage.nothing_came(first, since=mark, seconds=seconds)
        assert await stage.letters() == letters
        assert set(letters.values()) <= {"deferred", "no_service"}

        await stage.change_here("resume", "rides")
        await stage.say(kit.new_message("there?", sender=WITH_RIDES), domain="rides")
        stage.rides.go_on()
        await first.more(len(letters) + 10)
        await stage.rest()
        await stage.no_letters()
        assert letters.keys() <= {sight.message_id for sight in first.took}

        # What runs is finished; what waits for a lane cannot go on.
        first.plan = Plan(delay=1.5)
        waiting = [kit.new_message("taxi", sender=f"99900390{n:04}") for n in range(WAITING)]
        await stage.say(*waiting, domain="rides")
        await first.more(LANES)
        await trio.sleep(ON_ITS_WAY)  # the others have come as far as they can
        mark = await stage.write("removed")
        await stage.nothing_came(first, since=mark, seconds=0.2)
        letters = await stage.letters()
        ids = {message.message_id for message in waiting}
        assert letters.keys() == ids - {sight.message_id for sight in first.rides}
        assert set(letters.values()) == {"no_service"}
        first.plan = Plan()
        await stage.write("active")
        stage.rides.go_on()
        await first.more(10)


@pytest.mark.acceptance
async def test_what_stands_in_line_for_a_removed_service_waits_for_it(home: Path) -> None:
    async with open_stage(home, seed=49, judged=False) as stage:
        first = stage.first
        await stage.rest()
        phones = [f"99900390{n:04}" for n in range(3 * WAITING)]
        await stage.say(*(kit.new_message("taxi", sender=phone) for phone in phones))
        await stage.rest()
        first.plan = Plan(delay=1.5)
        said = [kit.new_message("how long?", sender=phone) for phone in phones]
        await stage.say(*said)
        await first.more(LANES)
        await stage.write("removed")
        await stage.rest()
        places = Counter(await stage.places_of([message.message_id for message in said]))
    kit.say(f"removed while {len(said)} waited: {dict(places)}")
    assert places.keys() <= {"delivered", "dead_letter", "deferred"}


def conversations(sights: list[Sight]) -> set[str]:
    return {sight.body["session"]["key"] for sight in sights}


async def test_drained_removed_and_added_again(home: Path) -> None:
    await drained_and_removed(home, seconds=0.4, phones=20, rate=50, seed=43)


@pytest.mark.acceptance
async def test_drained_removed_and_added_again_with_many(home: Path) -> None:
    await drained_and_removed(home, seconds=5.0, phones=200, rate=100, seed=44)


# A canary


async def a_canary(
    home: Path, *, phones: int, conversations_at_least: int, bound: float, rate: float, seed: int
) -> None:
    async with open_stage(home, seed=seed, phones=phones, rate=rate) as stage:
        stable, canary = stage.first, stage.second
        await stable.more(20)
        await stage.change(
            "set", "rides", f"canary_url={canary.url}", f"canary_share={SHARE}", "allow_private=true"
        )
        await trio.sleep(ON_ITS_WAY)  # what ran before goes on
        began = [len(place.rides) for place in (stable, canary)]  # one moment for both
        with trio.fail_after(kit.HANGS):
            while True:
                to_stable, to_canary = stable.rides[began[0] :], canary.rides[began[1] :]
                at_stable, at_canary = conversations(to_stable), conversations(to_canary)
                if len(at_canary | at_stable) >= conversations_at_least:
                    break
                await trio.sleep(0.1)
        often = Counter(sight.body["session"]["key"] for sight in to_stable + to_canary)
        assert sum(count > 1 for count in often.values()) > conversations_at_least / 3, (
            "hardly one wrote twice"
        )
        assert not at_canary & at_stable, "a conversation was at both"
        share = len(at_canary) / len(at_canary | at_stable)
        kit.say(
            f"{len(at_canary)} of {len(at_canary | at_stable)} conversations at the canary: {share:.2%}, "
            f"{often.total()} messages; bound {bound * 100:.1f} points"
        )
        assert abs(share - SHARE) <= bound
        status = await stage.health()
        assert status["canary"]["failures"] == 0

        both = {"canary_url": canary.url, "canary_share": 1.0, "allow_private": True}
        mark = await stage.write("active", **both)
        await canary.more(50)
        await stage.nothing_came(stable, since=mark, seconds=0.5)
        mark = await stage.change_here("set", "rides", f"url={canary.url}", "canary_url=", "canary_share=")
        await canary.more(50)
        await stage.nothing_came(stable, since=mark, seconds=0.5)
        assert conversations(canary.rides) > at_canary


def deviations(count: int, conversations_: int) -> float:
    """So many standard deviations of the share of that many conversations."""
    return count * math.sqrt(SHARE * (1 - SHARE) / conversations_)


async def test_a_canary(home: Path) -> None:
    at_least = 200
    bound = deviations(3, at_least)
    await a_canary(home, phones=280, conversations_at_least=at_least, bound=bound, rate=200, seed=45)


@pytest.mark.acceptance
async def test_a_canary_among_two_thousand_conversations(home: Path) -> None:
    await a_canary(home, phones=2_750, conversations_at_least=2_500, bound=0.02, rate=300, seed=46)


# A shadow


async def test_a_shadow_gets_copies_and_changes_nothing(home: Path) -> None:
    slow = 2.0
    async with open_stage(home, seed=47) as stage:
        first, shadow = stage.first, stage.shadow
        shadow.plan = Plan(status=500)
        mark = await stage.change("set", "rides", f"shadow_url={shadow.url}", "allow_private=true")
        quick: set[str] = set()
        with trio.fail_after(kit.HANGS):
            while len(quick) <= 50:  # what was under way at the change comes first
                await first.more(20)
                seen = {sight.message_id for sight in first.rides}
                quick = seen & (await stage.journal(after=mark.seq)).keys()
            while not quick <= {sight.message_id for sight in shadow.rides}:
                await trio.sleep(0.01)
        assert (await stage.health())["shadow"]["failures"] > 50

        shadow.plan = Plan(delay=slow)
        began, before = trio.current_time(), len(first.rides)
        await first.more(100)
        took, count = trio.current_time() - began, len(first.rides) - before
        kit.say(f"{count} deliveries in {took:.1f} s beside a shadow that takes {slow:g} s")
        assert count > LANES * (took / slow + 1), "they waited for the shadow"
        await stage.rest()
        status = await stage.health()
        assert (status["failures"], status["breaker"], status["lanes"]) == (0, "closed", LANES)
        assert await stage.letters() == {}
        originals = {sight.message_id: sight.body for sight in first.rides}
        assert len(originals) == len(first.rides), "a delivery was tried again"
        assert len({sight.message_id for sight in shadow.rides}) == len(shadow.rides), "a copy came twice"
        for copy in shadow.rides:
            assert copy.headers["x-postroom-shadow"] == "true"
            assert copy.body == originals[copy.message_id]


# The configuration file


async def test_the_configuration_file_is_read_again(home: Path) -> None:
    async with open_stage(home, seed=48) as stage:
        first, second, router = stage.first, stage.second, stage.router
        good = stage.config.read_text()

        async def read_again(text: str, says: str) -> Mark:
            stage.config.write_text(text)
            known = router.errors.count(says)
            router.signal(signal.SIGHUP)
            with trio.fail_after(kit.HANGS):
                while router.errors.count(says) == known:
                    await trio.sleep(0.01)
            return await stage.mark()

        await first.more(30)
        assert first.url in good
        mark = await read_again(good.replace(first.url, second.url), "the configuration was read again")
        await stage.nothing_came(first, since=mark, seconds=0.5)
        await second.more(30)
        for broken, why in (
            (good + "\n[services.rides", "scenario.toml"),
            (good.replace(first.url, "ftp://rides"), "services.rides.url"),
        ):
            mark = await read_again(broken, "the configuration cannot be used, and all stays as it was")
            assert why in router.errors.rpartition("all stays as it was")[2]
            await second.more(20)
            await stage.nothing_came(first, since=mark, seconds=0.2)
        await read_again(good, "the configuration was read again")
        await first.more(20)
