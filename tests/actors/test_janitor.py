"""The janitor: which job is due, one run of each at a time, and what becomes of those that fail."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import trio
from trio.testing import MockClock

from actors.errors import JournalUnavailable, LeaseLost
from actors.janitor import LOOK_EVERY, Janitor
from actors.ports import Job

START = datetime(2026, 3, 2, 1, 0, tzinfo=UTC)


def daily_at_two(schedule: str, after: datetime) -> datetime:
    """The only schedule of these tests."""
    if schedule != "daily":
        raise ValueError(schedule)
    due = after.replace(hour=2, minute=0, second=0, microsecond=0)
    return due if due > after else due + timedelta(days=1)


class Log:
    """Jobs and runs in memory: (job, failed, message) of each that ended."""

    def __init__(self, clock: Callable[[], datetime], *jobs: Job) -> None:
        self.by_name = {job.name: job for job in jobs}
        self.begun: list[str] = []
        self.ended: list[tuple[str, bool, str]] = []
        self.away: set[str] = set()
        self.lost = False
        self._clock = clock

    def _enter(self, method: str) -> None:
        if method in self.away:
            raise JournalUnavailable("away")
        if self.lost:
            raise LeaseLost("over")

    async def jobs(self, epoch: int) -> list[Job]:
        self._enter("jobs")
        return list(self.by_name.values())

    async def begin(self, epoch: int, name: str) -> int:
        self._enter("begin")
        self.by_name[name] = replace(self.by_name[name], followed_to=self._clock(), requested=False)
        self.begun.append(name)
        return len(self.begun) - 1

    async def end(self, epoch: int, run: int, *, failed: bool, message: str) -> None:
        self._enter("end")
        self.ended.append((self.begun[run], failed, message))


def job(name: str = "cleanup", **changes: object) -> Job:
    return replace(Job(name, "daily", True, START, False), **changes)  # type: ignore[arg-type]


class World:
    def __init__(self, *jobs: Job) -> None:
        self.log = Log(self.now, *jobs)
        self.reports: list[str] = []
        self.work: dict[str, Callable[[int], Awaitable[str]]] = {"cleanup": self.clean}
        self.takes = 0.0

    def now(self) -> datetime:
        return START + timedelta(seconds=trio.current_time() - self.began)

    async def clean(self, epoch: int) -> str:
        await trio.sleep(self.takes)
        return f"cleaned under {epoch}"

    @asynccontextmanager
    async def janitor(self) -> AsyncIterator[Janitor]:
        self.began = trio.current_time()
        janitor = Janitor(
            self.log,
            epoch=7,
            work=self.work,
            next_time=daily_at_two,
            clock=self.now,
            report=lambda what, error: self.reports.append(f"{what}: {error}"),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(janitor.run)
            yield janitor
            nursery.cancel_scope.cancel()


async def test_a_job_is_done_when_its_time_comes(autojump_clock: MockClock) -> None:
    world = World(job())
    async with world.janitor():
        await trio.sleep(3_599)
        assert world.log.begun == []
        await trio.sleep(2)
        assert world.log.ended == [("cleanup", False, "cleaned under 7")]
        await trio.sleep(86_400)
        assert len(world.log.ended) == 2


async def test_what_was_missed_is_done_once(autojump_clock: MockClock) -> None:
    world = World(job(followed_to=START - timedelta(days=9)))
    async with world.janitor():
        await trio.sleep(10)
        assert len(world.log.ended) == 1


@pytest.mark.parametrize("active", [True, False])
async def test_a_request_is_done_now(autojump_clock: MockClock, active: bool) -> None:
    world = World(job(active=active, requested=True))
    async with world.janitor():
        await trio.sleep(1)
        assert len(world.log.ended) == 1
        await trio.sleep(2 * LOOK_EVERY)
        assert len(world.log.ended) == 1


async def test_a_call_is_heard_at_once(autojump_clock: MockClock) -> None:
    world = World(job())
    async with world.janitor() as janitor:
        await trio.sleep(LOOK_EVERY / 2)
        world.log.by_name["cleanup"] = job(requested=True)
        janitor.wake()
        await trio.sleep(1)
        assert len(world.log.ended) == 1


async def test_a_lost_call_is_noticed_with_the_next_look(autojump_clock: MockClock) -> None:
    world = World(job())
    async with world.janitor():
        await trio.sleep(1)
        world.log.by_name["cleanup"] = job(requested=True)
        await trio.sleep(LOOK_EVERY)
        assert len(world.log.ended) == 1


async def test_a_job_that_is_off_is_not_done(autojump_clock: MockClock) -> None:
    world = World(job(active=False))
    async with world.janitor():
        await trio.sleep(3 * 86_400)
        assert world.log.begun == []


async def test_a_job_never_runs_beside_itself(autojump_clock: MockClock) -> None:
    world = World(job(requested=True))
    world.takes = 3 * 86_400.0
    async with world.janitor() as janitor:
        await trio.sleep(2 * 86_400)
        janitor.wake()
        await trio.sleep(1)
        assert world.log.begun == ["cleanup"]
        await trio.sleep(86_400)
        assert world.log.begun == ["cleanup", "cleanup"]  # it was due meanwhile


async def test_one_that_takes_long_holds_up_no_other(autojump_clock: MockClock) -> None:
    world = World(job("archive", requested=True), job(requested=True))

    async def archive(epoch: int) -> str:
        await trio.sleep_forever()
        raise AssertionError("it was cancelled")

    world.work["archive"] = archive
    async with world.janitor():
        await trio.sleep(1)
        assert [name for name, _, _ in world.log.ended] == ["cleanup"]


async def test_one_that_fails_is_on_record_and_goes_on(autojump_clock: MockClock) -> None:
    world = World(job())

    async def fail(epoch: int) -> str:
        raise RuntimeError("no room")

    world.work["cleanup"] = fail
    async with world.janitor():
        await trio.sleep(2 * 86_400)
    assert world.log.ended == [("cleanup", True, "RuntimeError: no room")] * 2
    assert world.reports == ["job cleanup: no room"] * 2


async def test_how_it_ended_is_put_on_record_when_the_database_is_back(autojump_clock: MockClock) -> None:
    world = World(job(requested=True))
    world.log.away = {"end"}
    async with world.janitor():
        await trio.sleep(20)
        assert world.log.ended == []
        world.log.away = set()
        await trio.sleep(20)
        assert world.log.begun == ["cleanup"]
        assert len(world.log.ended) == 1


@pytest.mark.parametrize("method", ["jobs", "begin"])
async def test_it_waits_for_the_database(autojump_clock: MockClock, method: str) -> None:
    world = World(job(requested=True))
    world.log.away = {method}
    async with world.janitor():
        await trio.sleep(20)
        assert world.log.begun == []
        world.log.away = set()
        await trio.sleep(20)
        assert len(world.log.ended) == 1


async def test_a_schedule_that_cannot_be_read_is_reported(autojump_clock: MockClock) -> None:
    world = World(job("odd", schedule="whenever"), job())
    world.work["odd"] = world.clean
    async with world.janitor() as janitor:
        await trio.sleep(3_601)
        assert [name for name, _, _ in world.log.ended] == ["cleanup"]
        assert "jobs: whenever" in world.reports
        world.log.by_name["odd"] = job("odd", schedule="whenever", requested=True)
        janitor.wake()
        await trio.sleep(1)
        assert [name for name, _, _ in world.log.ended] == ["cleanup", "odd"]


async def test_a_job_of_which_it_knows_nothing_is_left_alone(autojump_clock: MockClock) -> None:
    world = World(job("other", requested=True))
    async with world.janitor():
        await trio.sleep(86_400)
        assert world.log.begun == []


async def test_it_ends_with_its_epoch(autojump_clock: MockClock) -> None:
    world = World(job(requested=True))
    world.takes = 10.0

    async def live() -> None:
        async with world.janitor():
            await trio.sleep(1)
            world.log.lost = True
            await trio.sleep(86_400)

    with pytest.raises(ExceptionGroup) as caught:
        await live()
    assert caught.group_contains(LeaseLost)
    assert world.log.ended == []
