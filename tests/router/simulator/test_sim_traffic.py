"""Traffic carries everything until it is answered 200, keeps its schedule and stops; the ledger agrees."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from router.simulator import Answer, Faults, Ledger, Manner, NotAnswered, Population, run_traffic
from router.simulator.deliveries import PLAIN

NUMBERS = ("1001", "1002")
TEXTS = {"rides": ["taxi"], "insurance": ["insurance"]}


@dataclass
class Router:
    """What a router must do, in memory: keep each message once, in order; answers are late or missing."""

    rng: Random
    ledger: Ledger
    pause: float = 0.01
    failing: float = 0.0
    forgetful: bool = False
    forgotten: str = ""
    kept: dict[str, str] = field(default_factory=dict)
    domains: dict[str, str] = field(default_factory=dict)
    posts: list[float] = field(default_factory=list)
    credulous: bool = False
    flying: Counter[bytes] = field(default_factory=Counter)
    together: int = 0
    closed: int = 0
    busy: int = 0
    busiest: int = 0

    async def post(self, body: bytes, *, manner: Manner = PLAIN) -> Answer:
        if manner.forgery and not self.credulous:
            return Answer(401, {}, b"", self.pause)
        self.posts.append(trio.current_time())
        self.busy += 1
        self.busiest = max(self.busy, self.busiest)
        self.together += self.flying[body] == 1
        self.flying[body] += 1
        try:
            await trio.sleep(self.pause * self.rng.random() * 2)
            draw = self.rng.random()
            if draw < self.failing / 3:
                return Answer(503, {}, b"", 0.5)
            if draw >= self.failing or draw < self.failing * 2 / 3:
                self.keep(body)
            if draw < self.failing or manner.hang_up:
                raise NotAnswered("gone")
            return Answer(200, {}, b"", self.pause)
        finally:
            self.busy -= 1
            self.flying[body] -= 1

    def close(self) -> None:
        self.closed += 1

    def keep(self, body: bytes) -> None:
        for entry in json.loads(body)["entry"]:
            for change in entry["changes"]:
                for one in change["value"].get("messages", []):
                    if isinstance(one, dict) and one.get("from") and isinstance(one.get("id"), str):
                        self.take(one)

    def take(self, message: dict[str, Any]) -> None:
        message_id, sender = message["id"], message["from"]
        if message_id in self.kept or not message_id:
            return
        self.kept[message_id] = sender
        if self.forgetful and sender in self.domains:
            self.forgetful, self.forgotten = False, message_id
            return
        text = message.get("text", {}).get("body")
        domain = next((name for name, words in TEXTS.items() if text in words), None)
        domain = self.domains.setdefault(sender, domain or "fallback")
        self.ledger.seen(domain, message_id, f"msg_{len(self.kept)}", 1, text=text)


def population(senders: int = 30, seed: int = 1, **shares: Any) -> Population:
    shares = {"duplicate_share": 0.2, "batch_share": 0.2, "status_share": 0.2} | shares
    return Population(senders, NUMBERS, Random(seed), TEXTS, unix_time=lambda: 1_700_000_000.0, **shares)


def through(router: Router) -> Callable[[str, str], Router]:
    return lambda url, secret: router


async def run(router: Router, phones: Population, **more: Any) -> int:
    options: dict[str, Any] = {"connections": 8, "open_client": through(router)} | more
    return await run_traffic(phones, router.ledger, "http://sut/", "s", **options)


@pytest.mark.parametrize(("seed", "failing"), [(1, 0.0), (2, 0.4)])
async def test_everything_is_answered_and_the_ledger_agrees(
    seed: int, failing: float, autojump_clock: trio.testing.MockClock
) -> None:
    router = Router(Random(seed), Ledger(), failing=failing)
    assert await run(router, population(seed=seed), stop=0.5, settle=600.0) == 0
    report = router.ledger.verify(dead_letters=(), stored=router.kept)
    assert report.problems == ()
    assert report.received == report.distinct == len(router.kept) > 80
    assert report.duplicates > 10
    assert report.statuses > 10
    assert set(report.delivered) == set(TEXTS)
    assert report.p50_ms == pytest.approx(10.0)
    assert (report.p99_ms == pytest.approx(500.0)) == bool(failing)


async def test_a_forgotten_message_is_found(autojump_clock: trio.testing.MockClock) -> None:
    router = Router(Random(1), Ledger(), forgetful=True)
    await run(router, population(), stop=0.5)
    (problem,) = router.ledger.verify(dead_letters=(), stored=router.kept).problems
    assert router.forgotten
    assert router.forgotten in problem


async def test_all_connections_are_used_and_no_more(autojump_clock: trio.testing.MockClock) -> None:
    router = Router(Random(1), Ledger())
    await run(router, population(), stop=0.2, connections=5)
    assert router.busiest == 5


async def test_few_phones_hold_back_many_connections(autojump_clock: trio.testing.MockClock) -> None:
    router = Router(Random(1), Ledger(), pause=0.1)
    phones = population(2, duplicate_share=0.0, status_share=0.0)
    await run(router, phones, stop=5.0, connections=10)
    assert trio.current_time() < 5.5
    assert router.busiest <= 2
    assert len(router.kept) > 20


async def test_a_rate_is_kept_whatever_the_answers_take(autojump_clock: trio.testing.MockClock) -> None:
    router = Router(Random(1), Ledger(), pause=0.2)
    await run(router, population(200), stop=3.995, rate=50.0, connections=100)
    assert len(router.posts) == 200
    assert all(at == pytest.approx(router.posts[0] + i / 50) for i, at in enumerate(router.posts))
    assert router.busiest > 8


async def test_a_rate_that_cannot_be_kept_is_bounded_by_the_connections(
    autojump_clock: trio.testing.MockClock,
) -> None:
    router = Router(Random(1), Ledger(), pause=0.1)
    await run(router, population(200), stop=4.0, rate=1_000.0, connections=4)
    assert router.busiest == 4
    assert 120 < len(router.posts) < 200


async def test_after_a_stall_one_second_of_the_schedule_is_made_up_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Stalling(Router):
        async def post(self, body: bytes, *, manner: Manner = PLAIN) -> Answer:
            if not self.posts:
                self.posts.append(trio.current_time())
                await trio.sleep(5.0)
            return await super().post(body)

    router = Stalling(Random(1), Ledger(), pause=0.0001)
    started = trio.current_time()
    await run(router, population(200), stop=6.0, rate=10.0, connections=1)
    at_once = [at for at in router.posts if started + 4.99 < at < started + 5.05]
    assert 10 <= len(at_once) <= 13


async def test_an_event_stops_it_even_while_a_slow_schedule_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    router = Router(Random(1), Ledger())
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: run(router, population(), stop=stop, rate=0.01))
        await trio.sleep(150.0)
        stop.set()
        started = trio.current_time()
    assert trio.current_time() - started < 1.0
    assert len(router.posts) == 2


async def test_what_never_gets_a_200_is_given_up_after_settle(autojump_clock: trio.testing.MockClock) -> None:
    router = Router(Random(1), Ledger(), pause=0.05, failing=1.0)
    left = await run(router, population(), stop=0.5, settle=4.0)
    assert trio.current_time() == pytest.approx(4.5, abs=0.1)
    assert left > 0
    assert router.ledger.verify(dead_letters=(), stored=router.kept).received == 0


async def test_what_a_run_gave_up_the_next_one_carries(autojump_clock: trio.testing.MockClock) -> None:
    router = Router(Random(1), Ledger(), pause=100.0)
    phones = population()
    left = await run(router, phones, stop=1.0, settle=0.0)
    assert left == phones.unanswered == 8
    router.pause = 0.01
    assert await run(router, phones, stop=0.5, settle=60.0) == 0
    assert router.ledger.verify(dead_letters=(), stored=router.kept).ok


async def test_with_every_fault_at_once_a_right_router_passes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    router = Router(Random(3), Ledger(), failing=0.2)
    phones = population(60, 3, kinds="all", other_share=0.2, faults=Faults.everything())
    assert await run(router, phones, stop=1.0, settle=600.0) == 0
    report = router.ledger.verify(dead_letters=(), stored=router.kept)
    assert report.problems == ()
    assert report.received == report.distinct == len(router.kept) > 100
    assert report.forged > 3
    assert router.together > 3


async def test_a_router_that_believes_forged_bodies_is_found(
    autojump_clock: trio.testing.MockClock,
) -> None:
    router = Router(Random(3), Ledger(), credulous=True)
    await run(router, population(faults=Faults(forged=0.03)), stop=0.2)
    problems = router.ledger.verify(dead_letters=(), stored=router.kept).problems
    assert any(problem.startswith("a forged body") for problem in problems)
    assert any("is stored but was only forged" in problem for problem in problems)


async def test_twins_are_in_flight_together_even_with_one_connection(
    autojump_clock: trio.testing.MockClock,
) -> None:
    router = Router(Random(1), Ledger())
    phones = population(duplicate_share=0.0, faults=Faults(twins=1.0))
    assert await run(router, phones, stop=0.3, connections=1) == 0
    assert router.busiest == 2
    assert router.together == len(router.posts) / 2 > 10
    assert router.closed == 2
    report = router.ledger.verify(dead_letters=(), stored=router.kept)
    assert report.ok
    assert report.duplicates == report.distinct == report.received > 10


async def test_a_twin_is_answered_200_when_one_of_both_is(autojump_clock: trio.testing.MockClock) -> None:
    class Hesitant(Router):
        async def post(self, body: bytes, *, manner: Manner = PLAIN) -> Answer:
            answer = await super().post(body, manner=manner)
            if len(self.posts) % 2:
                return answer
            raise NotAnswered("the second of two")

    router = Hesitant(Random(1), Ledger(), pause=0.0)
    phones = population(duplicate_share=0.0, status_share=0.0, faults=Faults(twins=1.0))
    assert await run(router, phones, stop=0.0, connections=1, settle=5.0) == 0
    assert router.ledger.verify(dead_letters=(), stored=router.kept).ok


@pytest.mark.parametrize("wrong", [{"connections": 0}, {"rate": 0.0}])
async def test_traffic_needs_a_connection_and_a_rate(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        await run(Router(Random(1), Ledger()), population(), stop=0.0, **wrong)
