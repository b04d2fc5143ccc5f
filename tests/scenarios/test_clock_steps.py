"""The machine's clock is set, forwards and backwards, while messages come: nothing is lost and nothing out of
order, also where the clock points to a time that has no partition.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database

from router import Ack, Config, Envelope, Reply, Retry, Router, ServiceConfig, inbound, open_router

pytestmark = pytest.mark.postgres

STEPS = (
    timedelta(hours=2),
    timedelta(hours=-2),
    timedelta(days=3),
    timedelta(days=-3),
    timedelta(days=400),  # no partition is made so far ahead: the flush makes it
    timedelta(days=-11_000),
)
"""From the true time, one after the other."""


class Clock:
    """The system's, set by as much as the last step said."""

    def __init__(self) -> None:
        self.off = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.off


def config(data_dir: Path) -> Config:
    rides = ServiceConfig(name="rides", timeout_ms=500, deadline_ms=1000)
    return Config.for_embedding(
        app_secret=kit.SECRET, verify_token=kit.VERIFY_TOKEN, data_dir=data_dir, services=[rides]
    )


async def test_whatever_the_clock_is_set_to(home: Path) -> None:
    clock = Clock()
    heard: list[str] = []
    wanted: list[str] = []
    arrived = trio.Event()

    async def rides(envelope: Envelope) -> Ack | Retry:
        if envelope.text.endswith("again") and envelope.attempt == 1:
            return Retry(0.05)
        heard.append(envelope.text)
        if len(heard) == len(wanted):
            arrived.set()
        return Ack((Reply("it comes"),))

    async def say(router: Router, *texts: str) -> None:
        for text in texts:
            wanted.append(text)
            message = kit.new_message(text, sender="999006000001")
            await router.submit(inbound(phone_number_id=message.number, message=message.json))

    async with open_router(config(home / "data"), {"rides": rides}, clock=clock) as router:
        for number, step in enumerate(STEPS):
            arrived = trio.Event()
            await say(router, f"taxi before {number}", f"taxi {number} again")
            clock.off = step
            await say(router, f"taxi after {number}", f"taxi after {number} again")
            clock.off = timedelta()
            await say(router, f"taxi at last {number}")
            with trio.fail_after(kit.HANGS):
                await arrived.wait()
        database = Database.of(home / "data")
        await database.until(lambda count: count == 0)
        conservation = await database.recount()
        assert conservation.ok, conservation.problems
        assert conservation.places["delivered"] == len(wanted)
    assert heard == wanted
    assert router.statistics().ingress.refused == 0
    assert router.statistics().ingress.spooled == 0
