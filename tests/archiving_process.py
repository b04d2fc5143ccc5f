"""Run as a process of its own: archives what is past its time, and kills itself with SIGKILL before a step.

Arguments: connection string, directory of archives, epoch, the step or its number, `before` as ISO 8601.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import datetime

import trio

from router.archive.files import ArchiveFiles
from router.archiving import Archiver
from router.clock import utc_now
from router.postgres.archives import PostgresArchives
from router.postgres.bridge import open_bridge


async def archive(dsn: str, directory: str, epoch: int, step: str, before: datetime) -> None:
    steps = 0

    def on_step(name: str) -> None:
        nonlocal steps
        if step in (name, str(steps)):
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1

    async with open_bridge() as bridge:
        archives = PostgresArchives(bridge, lambda: dsn, clock=utc_now)
        try:
            await Archiver(archives, ArchiveFiles(directory), on_step=on_step).archive_all(epoch, before)
        finally:
            await archives.close()


if __name__ == "__main__":
    dsn, directory, epoch, step, before = sys.argv[1:]
    trio.run(archive, dsn, directory, int(epoch), step, datetime.fromisoformat(before))
