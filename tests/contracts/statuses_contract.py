"""What every queue of statuses promises: written once, run on the double in memory and on Postgres."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from actors.errors import LeaseLost
from actors.ports import StatusLog, StatusPage


@dataclass
class World:
    """One queue under test, to which nobody has subscribed. `sent` has a service send a message, and returns
    its id; `happened` says what became of it; `wait` lets seconds pass.
    """

    log: StatusLog
    epoch: int
    sent: Callable[[str], Awaitable[str]]
    happened: Callable[[str, str], Awaitable[None]]
    wait: Callable[[float], None]
    end_epoch: Callable[[], Awaitable[None]]

    async def subscribe(self, *services: str) -> None:
        await self.log.subscribe(services, epoch=self.epoch)

    async def due(self, service: str = "rides", limit: int = 10) -> list[tuple[str, str]]:
        return told(await self.log.due(service, limit))


def told(page: StatusPage) -> list[tuple[str, str]]:
    found = [news.envelope.message["status"] for news in page.news]
    return [(status["id"], status["status"]) for status in found]


async def who_wants_to_know_is_told_and_nobody_else(world: World) -> None:
    await world.subscribe("rides")
    mine, other = await world.sent("rides"), await world.sent("jobs")
    await world.happened(mine, "delivered")
    await world.happened(other, "delivered")
    assert await world.due("rides") == [(mine, "delivered")]
    assert await world.due("jobs") == []
    [news] = (await world.log.due("rides", 10)).news
    assert news.envelope.domain == "rides"
    assert news.envelope.message["type"] == "status"
    assert (news.attempts, news.envelope.redelivered) == (0, False)
    assert news.envelope.id.startswith("sts_")


async def those_of_one_message_come_one_after_the_other(world: World) -> None:
    await world.subscribe("rides")
    first, second = await world.sent("rides"), await world.sent("rides")
    await world.happened(first, "sent")
    await world.happened(first, "delivered")
    await world.happened(second, "sent")
    page = await world.log.due("rides", 10)
    assert told(page) == [(first, "sent"), (second, "sent")]
    await world.log.record([page.news[0].id], [], epoch=world.epoch)
    assert sorted(await world.due()) == sorted([(first, "delivered"), (second, "sent")])
    assert len(await world.due(limit=1)) == 1


async def what_is_put_off_comes_at_its_time_and_holds_up_its_own_message(world: World) -> None:
    await world.subscribe("rides")
    first, second = await world.sent("rides"), await world.sent("rides")
    await world.happened(first, "sent")
    await world.happened(first, "delivered")
    await world.happened(second, "sent")
    page = await world.log.due("rides", 10)
    await world.log.record([page.news[1].id], [(page.news[0].id, 8.0)], epoch=world.epoch)
    page = await world.log.due("rides", 10)
    assert page.news == []
    assert page.next_in == pytest.approx(8.0)
    world.wait(8.0)
    [news] = (await world.log.due("rides", 10)).news
    assert told(StatusPage([news])) == [(first, "sent")]
    assert (news.attempts, news.envelope.redelivered) == (1, True)


async def the_same_status_has_the_same_key(world: World) -> None:
    await world.subscribe("rides")
    message = await world.sent("rides")
    await world.happened(message, "sent")
    await world.happened(message, "read")
    [once] = (await world.log.due("rides", 10)).news
    [again] = (await world.log.due("rides", 10)).news
    assert once.envelope.id == again.envelope.id
    await world.log.record([once.id], [], epoch=world.epoch)
    [later] = (await world.log.due("rides", 10)).news
    assert later.envelope.id != once.envelope.id


async def who_does_not_want_to_know_any_more_is_forgotten(world: World) -> None:
    await world.subscribe("rides", "jobs")
    mine, other = await world.sent("rides"), await world.sent("jobs")
    await world.happened(mine, "sent")
    await world.happened(other, "sent")
    await world.subscribe("jobs")
    await world.happened(mine, "delivered")
    await world.subscribe("rides", "jobs")
    assert await world.due("rides") == []
    assert await world.due("jobs") == [(other, "sent")]


async def an_epoch_that_is_over_changes_nothing(world: World) -> None:
    await world.subscribe("rides")
    message = await world.sent("rides")
    await world.happened(message, "sent")
    page = await world.log.due("rides", 10)
    await world.end_epoch()
    with pytest.raises(LeaseLost):
        await world.log.record([page.news[0].id], [], epoch=world.epoch)
    with pytest.raises(LeaseLost):
        await world.subscribe()
    assert await world.due() == [(message, "sent")]


CONTRACT = [
    who_wants_to_know_is_told_and_nobody_else,
    those_of_one_message_come_one_after_the_other,
    what_is_put_off_comes_at_its_time_and_holds_up_its_own_message,
    the_same_status_has_the_same_key,
    who_does_not_want_to_know_any_more_is_forgotten,
    an_epoch_that_is_over_changes_nothing,
]
