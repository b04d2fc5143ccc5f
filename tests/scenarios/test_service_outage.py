"""One service that dies or becomes slow while messages come, and is well again: meanwhile it gets no more
calls than open its breaker and try it, then each conversation has all its messages, in order, by itself.
"""

from __future__ import annotations

import json
import math
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import scenarios_kit as kit
import trio
from scenarios_kit import Database, Message, Plan, RouterProcess, Services
from test_outage import until_all_are_delivered

from router.simulator import WebhookClient

pytestmark = pytest.mark.postgres

LANES = 8
FAILURES = 5  # in a row that open the breaker
SLOW = 0.2  # seconds
QUICK = Plan(delay=0.02)


def most_probes(seconds: float) -> int:
    """Calls that may be made in so many seconds after the breaker opened, none of which succeeds."""
    # The nth pause is between half of and 2**(n - 1) s (pause() of router/retry.py), and one probe ends it.
    # With the shortest, the nth probe comes (1 + 2 + 4 + ... + 2**(n - 1)) / 2 = (2**n - 1) / 2 s after the
    # opening: 0.5, 1.5, 3.5, 7.5, 15.5. So n of them fit in while 2**n <= 2 * seconds + 1.
    assert seconds < 30.5, "the sixth pause is at most 30 s, and not 32"
    return int(math.log2(2 * seconds + 1))


@contextmanager
def held_port() -> Iterator[socket.socket]:
    """It listens all along, whoever serves it: a call between two of them waits for the next one, and none
    is refused that nobody would have counted.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as port:
        yield port


@asynccontextmanager
async def served(
    port: socket.socket, handle: Callable[[trio.SocketStream], Awaitable[None]]
) -> AsyncIterator[None]:
    """At the end of the block every connection is closed, whatever it was in the middle of."""
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(port.dup()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, [listener])
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


@dataclass
class Dead:
    """In the place of a service that died: hangs up on every call. A lane connects anew after that, so that
    each connection is one call.
    """

    calls: int = 0

    async def handle(self, stream: trio.SocketStream) -> None:
        self.calls += 1
        await trio.aclose_forcefully(stream)


@dataclass
class Phones:
    """24 conversations that write to rides, 8 at the same time: where one fails the others do, so that the
    breaker opens before any of them has used up its attempts.
    """

    client: WebhookClient
    sent: list[Message] = field(default_factory=list)

    async def write(self) -> None:
        written = [
            kit.new_message("taxi", sender=f"9990050000{(len(self.sent) + number) % 24:02}")
            for number in range(8)
        ]
        self.sent += written
        assert (await self.client.post(kit.body_of(*written))).status == 200

    async def write_until(self, holds: Callable[[], bool]) -> None:
        """40 messages a second."""
        with trio.fail_after(kit.HANGS):
            while not holds():
                next_at = trio.current_time() + 0.2
                await self.write()
                await trio.sleep_until(next_at)

    async def write_for(self, seconds: float) -> float:
        """Returns how many it were."""
        begun = trio.current_time()
        await self.write_until(lambda: trio.current_time() >= begun + seconds)
        return trio.current_time() - begun


@dataclass
class Scene:
    """A router, the port that it posts to, and the service that is there when nothing is wrong."""

    port: socket.socket
    services: Services
    router: RouterProcess
    database: Database
    phones: Phones

    def openings(self) -> list[dict[str, Any]]:
        """What the router told about its breaker, each time that this opened."""
        lines = [json.loads(line) for line in self.router.errors.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == "breaker" and line["state"] == "open"]

    async def is_used_again(self, before: int, since: float) -> None:
        """By more than the one that tried it, within two of the pauses that were current. While what waits is
        delivered, there comes more.
        """
        await self.phones.write_until(lambda: len(self.services.sights) > before + LANES)
        await self.phones.write_for(1.0)
        took, pause = self.services.sights[before + LANES].at - since, self.openings()[-1]["probe_in"]
        kit.say(f"in use again after {took:.1f} s, in a pause of {pause:.1f} s")
        assert took <= 2 * pause

    async def judge(self) -> int:
        """By what was sent and what the service has seen; returns how many messages it has seen twice."""
        sent: dict[str, list[str]] = {}
        for message in self.phones.sent:
            sent.setdefault(message.sender, []).append(message.message_id)
        seen: dict[str, list[str]] = {}
        for sight in self.services.sights:
            mine = seen.setdefault(sight.body["session"]["wa_id"], [])
            if mine[-1:] != [sight.message_id]:  # again, before the next one came
                mine.append(sight.message_id)
        assert seen == sent
        assert self.services.wrong == []
        conservation = await self.database.recount()
        assert conservation.ok, conservation.problems
        assert conservation.places["delivered"] == len(self.phones.sent)
        times = Counter(sight.message_id for sight in self.services.sights)
        assert max(times.values()) <= 2
        return len(self.services.sights) - len(times)


@asynccontextmanager
async def scene(home: Path, **settings: int | str) -> AsyncIterator[Scene]:
    with held_port() as port:
        services = Services(port=port.getsockname()[1])
        config = kit.write_config(home, services, rides={"lanes": LANES, **settings})
        async with kit.serving(home, "--data-dir", home / "data", "--config", config) as router:
            client = WebhookClient(router.webhook, kit.SECRET, timeout=30)
            try:
                yield Scene(port, services, router, Database.of(home / "data"), Phones(client))
            finally:
                client.close()
            assert await router.stop() == 0


async def test_a_service_dies_and_returns(home: Path) -> None:
    async with scene(home, breaker_failures=FAILURES) as here:
        services, phones = here.services, here.phones
        async with served(here.port, services.handle):
            await phones.write_until(lambda: len(services.sights) >= 40)
            # It dies in the middle of two of eight: too few to open the breaker without calls that follow.
            services.plan = lambda sight: Plan(hang=len(services.sights) % 4 == 0)
            await phones.write()
            await services.until_seen(len(phones.sent))
        before, dead, since = len(services.sights), Dead(), trio.current_time()
        async with served(here.port, dead.handle):
            await phones.write_until(lambda: bool(here.openings()) or trio.current_time() > since + 4.0)
            await phones.write_for(0.2)  # what was under way has come, and no probe yet
            opening = dead.calls
            await phones.write_until(lambda: trio.current_time() > since + 4.0)
        returned = trio.current_time()
        down_for = returned - since
        parked = await here.database.value("SELECT count(*) FROM webhook_dlq WHERE resolution = 'deferred'")
        kit.say(f"{opening} calls and {dead.calls - opening} in {down_for:.1f} s; {parked} messages wait")
        # FAILURES open it. At that moment each of the other lanes may have one call under way.
        assert opening <= FAILURES + LANES - 1
        assert 1 <= dead.calls - opening <= most_probes(down_for)
        assert parked > 0

        services.plan = lambda sight: QUICK
        async with served(here.port, services.handle):
            await here.is_used_again(before, returned)
            await here.database.until(lambda count: count == 0)
            await until_all_are_delivered(here.database)
        assert 1 <= await here.judge() <= LANES  # what was under way when it died


async def test_a_service_that_answers_slowly_is_left_alone_until_it_is_quick(home: Path) -> None:
    async with scene(home, breaker_slow_ms=int(1000 * SLOW)) as here:
        services, phones = here.services, here.phones
        async with served(here.port, services.handle):
            await phones.write_until(lambda: len(services.sights) >= 40)
            services.plan, before = lambda sight: Plan(delay=1.5 * SLOW), len(services.sights)
            slow_for = await phones.write_for(4.0)
            services.plan, returned = lambda sight: QUICK, trio.current_time()
            slow = len(services.sights) - before
            kit.say(f"{slow} slow calls in {slow_for:.1f} s")
            # 40 of the last 50 open it: that is when the 40th slow call has ended, if not before. At that
            # moment each of the other lanes may have one under way.
            assert slow <= 40 + LANES - 1 + most_probes(slow_for)
            assert "attempts took 0.2 s or longer" in here.openings()[0]["reason"]
            await here.is_used_again(before + slow, returned)
            await here.database.until(lambda count: count == 0)
            await until_all_are_delivered(here.database)
        assert await here.judge() == 0  # slow or not, it was answered
