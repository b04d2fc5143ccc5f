"""Carries a population's deliveries to a webhook over many connections, and tells the ledger about each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Protocol

import trio

from router.simulator.client import Answer, NotAnswered, WebhookClient
from router.simulator.deliveries import PLAIN, Delivery, Manner
from router.simulator.ledger import Ledger
from router.simulator.phones import Population

CATCH_UP = 1.0
"""Seconds of a schedule that may be made up for, as fast as it goes, after all connections were busy."""


class Client(Protocol):
    """One connection, as `WebhookClient` is one; `post` raises NotAnswered. It is told a manner only where
    that is not the plain one, so only a population with faults needs it.
    """

    async def post(self, body: bytes, *, manner: Manner = PLAIN) -> Answer: ...

    def close(self) -> None: ...


async def run_traffic(
    population: Population,
    ledger: Ledger,
    url: str,
    secret: str,
    *,
    connections: int,
    rate: float | None = None,
    stop: trio.Event | float,
    settle: float = 30.0,
    open_client: Callable[[str, str], Client] = WebhookClient,
) -> int:
    """Send until `stop` (an event, or seconds from now), then redeliver what was not answered 200.

    The second part ends when everything was answered 200, or after `settle` seconds, when what is still in
    flight is abandoned. Returns how many deliveries were not answered 200.

    With `rate`, that many deliveries per second leave on a schedule that answers do not slow down, as long as
    one of `connections` is free; without, each connection sends its next delivery when the last was answered.
    A twin leaves on a further connection, at the same moment as the other one; both are one delivery, and it
    is answered 200 when one of them is.
    The population must run on trio's clock, which it does unless told otherwise.
    """
    if connections < 1 or (rate is not None and rate <= 0):
        raise ValueError("traffic needs at least one connection and, if any, a rate above 0")
    traffic = _Traffic(population, ledger, rate)
    async with trio.open_nursery() as nursery:
        for _ in range(connections):
            nursery.start_soon(traffic.carry, partial(open_client, url, secret))
        if isinstance(stop, trio.Event):
            await stop.wait()
        else:
            await trio.sleep(stop)
        traffic.stop()
        nursery.cancel_scope.deadline = trio.current_time() + settle
    return population.unanswered


class _Traffic:
    """What the connections of one run share."""

    def __init__(self, population: Population, ledger: Ledger, rate: float | None) -> None:
        self._population = population
        self._ledger = ledger
        self._interval = 0.0 if rate is None else 1 / rate
        self._next_turn = trio.current_time()
        self._stopping = trio.Event()
        self._idle = trio.lowlevel.ParkingLot()

    def stop(self) -> None:
        """Give out nothing new from now on."""
        self._stopping.set()

    async def carry(self, open_client: Callable[[], Client]) -> None:
        """Be one connection, and one more for twins, until nothing is left to do."""
        clients = [open_client()]
        try:
            while True:
                delivery = await self._next()
                if delivery is None:
                    return
                if delivery.twin and len(clients) == 1:
                    clients.append(open_client())
                await self._exchange(clients if delivery.twin else clients[:1], delivery)
        finally:
            for client in clients:
                client.close()

    async def _next(self) -> Delivery | None:
        await self._turn()
        while not (self._stopping.is_set() and self._population.unanswered == 0):
            if self._stopping.is_set():
                delivery = self._population.next_redelivery()
            else:
                delivery = self._population.next_delivery()
            if delivery is not None:
                return delivery
            due = self._population.next_due
            with trio.move_on_at(inf if due is None else due):
                await self._idle.park()
        return None

    async def _turn(self) -> None:
        """Wait for a place in the schedule; once stopping, there is none."""
        if self._interval == 0.0:
            return
        turn = max(self._next_turn, trio.current_time() - CATCH_UP)
        self._next_turn = turn + self._interval
        with trio.move_on_at(turn):
            await self._stopping.wait()

    async def _exchange(self, clients: Sequence[Client], delivery: Delivery) -> None:
        statuses: list[int | None] = []
        try:
            if len(clients) == 1:
                await self._post(clients[0], delivery, statuses)
            else:
                async with trio.open_nursery() as nursery:
                    for client in clients:
                        nursery.start_soon(self._post, client, delivery, statuses)
        finally:
            self._population.answered(delivery, 200 if 200 in statuses else next(iter(statuses), None))
            self._idle.unpark_all()

    async def _post(self, client: Client, delivery: Delivery, statuses: list[int | None]) -> None:
        status, seconds = None, None
        self._ledger.sent(delivery)
        try:
            if delivery.manner == PLAIN:
                answer = await client.post(delivery.body)
            else:
                answer = await client.post(delivery.body, manner=delivery.manner)
            status, seconds = answer.status, answer.seconds
        except NotAnswered:
            pass
        finally:
            statuses.append(status)
            self._ledger.answered(delivery, status, seconds)
