"""Jobs, their runs, and the housekeeping that they do, on Postgres. Every change is fenced by the epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from actors.ports import Clock, Job

from . import rows
from .bridge import Bridge
from .connections import OWNER, Line
from .errors import translated
from .statements import statements

_SQL = statements("jobs")
_PAGE = 5_000  # rows looked at in one transaction


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of service_metrics. `service`: a domain, or the job that counted for all of them."""

    service: str
    metric: str
    value: float


class PostgresJobs:
    """A connection for all jobs, which are in no hurry and must not keep others waiting; and one for what
    changes the schema."""

    def __init__(self, bridge: Bridge, dsn: Callable[[], str], *, clock: Clock) -> None:
        self._bridge = bridge
        self._clock = clock
        self._line = Line(dsn, "jobs")
        self._owner_line = Line(dsn, "jobs-ddl", role=OWNER, settings={"lock_timeout": "2s"})

    async def close(self) -> None:
        async def close() -> None:
            await self._line.close()
            await self._owner_line.close()

        await self._bridge.run(close)

    async def _fetch(self, name: str, *arguments: Any, line: Line | None = None) -> list[Any]:
        used = self._line if line is None else line

        async def fetch() -> list[Any]:
            with translated("jobs"):
                return await used.fetch(_SQL[name], *arguments)

        return await self._bridge.run(fetch)

    # The log

    async def jobs(self, epoch: int) -> list[Job]:
        return [Job(**row) for row in await self._fetch("jobs", epoch, self._clock())]

    async def begin(self, epoch: int, name: str) -> int:
        run: int = (await self._fetch("begin", epoch, self._clock(), name))[0][0]
        return run

    async def end(self, epoch: int, run: int, *, failed: bool, message: str) -> None:
        await self._fetch("end", epoch, self._clock(), run, failed, rows.text(message))

    # Housekeeping

    async def settings(self) -> dict[str, int]:
        """system_settings, read anew."""
        return {row["name"]: row["value"] for row in await self._fetch("settings")}

    async def clean_sessions(self, epoch: int, before: datetime) -> int:
        """Remove sessions whose last interaction was earlier; returns how many."""
        return await self._pages("clean_sessions", epoch, before, [""])

    async def clean_dead_letters(self, epoch: int, before: datetime) -> int:
        """Remove dead letters that were reprocessed or discarded earlier; returns how many."""
        return await self._pages("clean_dead_letters", epoch, before, [0])

    async def clean_statuses(self, epoch: int, before: datetime) -> int:
        """Remove statuses of outbound messages that were recorded earlier; returns how many."""
        return await self._pages("clean_statuses", epoch, before, ["", ""])

    async def _pages(self, name: str, epoch: int, before: datetime, after: list[Any]) -> int:
        removed = 0
        while after[0] is not None:
            page = (await self._fetch(name, epoch, before, *after, _PAGE))[0]
            removed += page["removed"]
            after = list(page)[1:]
        return removed

    async def clean_logs(
        self, epoch: int, *, runs_before: datetime, metrics_before: datetime
    ) -> tuple[int, int]:
        """Remove runs and metrics that are older; returns how many of each."""
        row = (await self._fetch("clean_logs", epoch, runs_before, metrics_before))[0]
        return row["runs"], row["metrics"]

    async def record(self, epoch: int, metrics: Iterable[Metric]) -> None:
        """Rows of service_metrics."""
        listed = list(metrics)
        await self._fetch(
            "record_metrics",
            epoch,
            self._clock(),
            [one.service for one in listed],
            [one.metric for one in listed],
            [one.value for one in listed],
        )

    async def attach_audit(self) -> tuple[list[str], list[str]]:
        """Watch tables that the audit log is to know of and does not yet: their names, and why others could
        not be watched."""
        row = (await self._fetch("attach_audit", line=self._owner_line))[0]
        return row["attached"], row["problems"]

    async def rls_audit(self) -> list[Any]:
        """Tables whose rows are open to somebody by mistake: table, policy or None, finding."""
        return await self._fetch("rls_audit")

    async def dlq_report(self, since: datetime, until: datetime) -> list[Any]:
        """By service: dead letters created in that time, and what became of them."""
        return await self._fetch("dlq_report", since, until)
