"""What the jobs do. Each takes the epoch under which it runs and returns what it did, for its record."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from importlib import import_module

import trio

from actors.janitor import Work
from actors.ports import Clock
from router.postgres.archives import PostgresArchives
from router.postgres.jobs import Metric, PostgresJobs
from router.postgres.journal import PostgresJournal

_WEEK = timedelta(weeks=1)


class OpenTables(Exception):
    """Rows of tables of ours are open to somebody by mistake; the message says which."""


class NotWatched(Exception):
    """The audit log is to know of tables that cannot be watched; the message says why."""


class Housekeeping:
    """The jobs of one router, by name."""

    def __init__(
        self,
        jobs: PostgresJobs,
        journal: PostgresJournal,
        archives: PostgresArchives,
        archive_location: str,
        *,
        session_ttl: timedelta,
        clock: Clock,
    ) -> None:
        self._jobs = jobs
        self._archives = archives
        self._archive_location = archive_location
        self._journal = journal
        self._session_ttl = session_ttl
        self._clock = clock

    @property
    def work(self) -> Mapping[str, Work]:
        return {
            "session-cleanup": self.clean,
            "create-wa-events-partitions": self.make_partitions,
            "archive-partitions": self.archive,
            "dlq-report": self.report_dead_letters,
            "rls-audit": self.audit_rls,
            "attach-audit": self.attach_audit,
        }

    async def clean(self, epoch: int) -> str:
        """Remove what has had its time: idle sessions, processed dead letters, statuses, logs."""
        now = self._clock()
        settings = await self._jobs.settings()

        def ago(name: str) -> timedelta:
            return timedelta(days=settings[name])

        sessions = await self._jobs.clean_sessions(epoch, now - self._session_ttl)
        letters = await self._jobs.clean_dead_letters(epoch, now - ago("processed_dead_letters_days"))
        statuses = await self._jobs.clean_statuses(epoch, now - ago("statuses_days"))
        runs, metrics = await self._jobs.clean_logs(
            epoch, runs_before=now - ago("run_log_days"), metrics_before=now - ago("metrics_days")
        )
        removed = {
            "sessions": sessions,
            "processed dead letters": letters,
            "statuses": statuses,
            "runs": runs,
            "metrics": metrics,
        }
        await self._jobs.record(
            epoch,
            [
                Metric("session-cleanup", f"{name.replace(' ', '_')}_removed", count)
                for name, count in removed.items()
            ],
        )
        return "removed " + ", ".join(f"{count} {name}" for name, count in removed.items())

    async def make_partitions(self, epoch: int) -> str:
        """The weeks and months ahead."""
        made = await self._journal.make_partitions()
        return f"made {made}"

    async def archive(self, epoch: int) -> str:
        """Weeks and months past their retention, to files."""
        before = self._clock() - timedelta(days=(await self._jobs.settings())["retention_days"])
        # Loaded by the first run, and in a thread: a router that starts does not wait for pyarrow.
        archiving = await trio.to_thread.run_sync(import_module, "router.archiving")
        archiver = archiving.archiver(self._archives, self._archive_location)
        names = await archiver.archive_all(epoch, before)
        held = await self._archives.held(before)
        await self._archives.analyze()
        metrics = {"archived": len(names), "held": held}
        await self._jobs.record(
            epoch, [Metric("archive-partitions", name, count) for name, count in metrics.items()]
        )
        said = f"archived {', '.join(names) or 'nothing'}"
        return f"{said}; {held} week(s) wait for what is under way in them" if held else said

    async def report_dead_letters(self, epoch: int) -> str:
        """What became of the dead letters of the last seven days."""
        now = self._clock()
        by_service = await self._jobs.dlq_report(now - _WEEK, now)
        counted = ("created", "reprocessed", "discarded", "failed", "still_open")
        await self._jobs.record(
            epoch,
            [
                Metric(row["service"], f"dead_letters_of_the_week_{name}", row[name])
                for row in by_service
                for name in counted
            ],
        )
        lines = [
            f"{row['service'] or 'no service'}: "
            + ", ".join(f"{row[name]} {name.replace('_', ' ')}" for name in counted)
            for row in by_service
        ]
        return "; ".join(lines) or "no dead letters in seven days"

    async def audit_rls(self, epoch: int) -> str:
        """Raises OpenTables when there is a finding."""
        findings = await self._jobs.rls_audit()
        if findings:
            raise OpenTables(
                "; ".join(
                    f"{row['table_name']}{' ' + row['policy'] if row['policy'] else ''}: {row['finding']}"
                    for row in findings
                )
            )
        return "no findings"

    async def attach_audit(self, epoch: int) -> str:
        """Raises NotWatched when a table could not be."""
        attached, problems = await self._jobs.attach_audit()
        if problems:
            raise NotWatched("; ".join(problems))
        return f"watches {', '.join(attached)} from now on" if attached else "nothing new"
