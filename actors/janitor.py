"""Runs the jobs of a schedule, one run of each at a time, and puts every run on record. What a job does is
not its business; that one fails is nobody else's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime

import trio

from .errors import JournalUnavailable, LeaseLost
from .ports import Clock, Job, JobLog

LOOK_EVERY = 60.0  # seconds between looks at the jobs: a call that was lost, a clock that was set
_AFTER_TROUBLE = 5.0  # seconds until the look after one that failed

Work = Callable[[int], Awaitable[str]]
"""Does a job under an epoch; returns what it did, for its record."""

NextTime = Callable[[str, datetime], datetime]
"""The first time of a schedule that is later than the given one. Raises ValueError: there is none."""


class Janitor:
    """`work` names the jobs that this one can do. A job that was due while nobody could do it is done once,
    as soon as somebody can. A schedule that cannot be read is reported, and its job is done on request only.
    """

    def __init__(
        self,
        log: JobLog,
        *,
        epoch: int,
        work: Mapping[str, Work],
        next_time: NextTime,
        clock: Clock,
        report: Callable[[str, Exception], None],
    ) -> None:
        self._log = log
        self._epoch = epoch
        self._work = work
        self._next_time = next_time
        self._clock = clock
        self._report = report
        self._running: set[str] = set()
        self._wake = trio.Event()

    def wake(self) -> None:
        """A job was switched, or somebody asked for a run."""
        self._wake.set()

    async def run(self) -> None:
        """For as long as the epoch lasts; cancelled, a job is interrupted where it is."""
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                try:
                    wait = self._start_due(await self._log.jobs(self._epoch), nursery)
                except JournalUnavailable as trouble:
                    self._report("jobs", trouble)
                    wait = _AFTER_TROUBLE
                with trio.move_on_after(wait):
                    await self._wake.wait()

    def _start_due(self, jobs: list[Job], nursery: trio.Nursery) -> float:
        """Returns the seconds until the next look."""
        now = self._clock()
        wait = LOOK_EVERY
        for job in jobs:
            if job.name not in self._work or job.name in self._running:
                continue
            due = now if job.requested else self._due(job)
            if due is None:
                continue
            if due <= now:
                self._running.add(job.name)
                nursery.start_soon(self._do, job.name)
            else:
                wait = min(wait, (due - now).total_seconds())
        return wait

    def _due(self, job: Job) -> datetime | None:
        if not job.active:
            return None
        try:
            return self._next_time(job.schedule, job.followed_to)
        except ValueError as error:
            self._report("jobs", error)
            return None

    async def _do(self, name: str) -> None:
        try:
            run = await self._log.begin(self._epoch, name)
            failed = False
            try:
                message = await self._work[name](self._epoch)
            except LeaseLost:
                raise
            except Exception as error:  # an edge: a job that fails is on record, and the others go on
                self._report(f"job {name}", error)
                failed, message = True, f"{type(error).__name__}: {error}"
            await self._end(run, failed, message)
        except JournalUnavailable as trouble:
            self._report(f"job {name}", trouble)
            await trio.sleep(_AFTER_TROUBLE)
        finally:
            self._running.discard(name)
            self._wake.set()

    async def _end(self, run: int, failed: bool, message: str) -> None:
        """Put on record how it ended, also when the database is away for a while."""
        while True:
            try:
                await self._log.end(self._epoch, run, failed=failed, message=message)
                return
            except JournalUnavailable:
                await trio.sleep(_AFTER_TROUBLE)
