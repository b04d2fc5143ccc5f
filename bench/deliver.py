"""`python -m bench deliver`: signed deliveries with recorded outcomes for each second of CPU time, over lanes
of the router's, over bare connections of httpcore, and over httpx, on the same trio and the same Postgres.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from bench.databases import ask, durable_settings, migrated
from bench.deliver_client import KINDS
from bench.payloads import Population
from bench.processes import ProcessFailed
from bench.report import envelope, number, print_table, print_verdicts, verdict_rows, write_result
from bench.storage import deliveries
from bench.verdicts import Verdict, median_or_none, missed, ratio
from router.clock import utc_now
from router.postgres.journal import PostgresJournal

OVER_HTTPX = 20.0
OVER_HTTPCORE = 3.0
_SECONDS = 300.0  # for one round, at most


@dataclass(frozen=True)
class DeliverSettings:
    """Rounds of each kind, in turns; deliveries of one round by kind, and how many are under way at once."""

    rounds: int = 5
    lanes: int = 32
    router: int = 10_000
    httpcore: int = 2_000
    httpx: int = 500

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def count(self, kind: str) -> int:
        return {"router": self.router, "httpcore": self.httpcore, "httpx": self.httpx}[kind]


@dataclass(frozen=True)
class DeliverRound:
    """One round of one kind: CPU seconds of the process that delivered; `recorded` outcomes in the table."""

    kind: str
    deliveries: int
    recorded: int
    cpu_seconds: float
    seconds: float

    @property
    def per_cpu_second(self) -> float | None:
        """None: what is not recorded does not count."""
        return ratio(self.deliveries, self.cpu_seconds) if self.recorded == self.deliveries else None


@contextmanager
def service() -> Iterator[int]:
    """Its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.deliver_service"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


async def _append(journal: PostgresJournal, count: int) -> None:
    bodies = Population().bodies(count)
    for start in range(0, count, 1_000):
        await journal.append(deliveries(bodies[start : start + 1_000]), duplicates=0)


async def measured(
    settings: DeliverSettings, home: Path, progress: Callable[[str], None]
) -> list[DeliverRound]:
    async with migrated(home) as (bridge, dsn):
        progress(f"postgres {(await trio.to_thread.run_sync(durable_settings, dsn))['server_version']}")
        journal = PostgresJournal(bridge, lambda: dsn, clock=utc_now, notify=lambda: False)
        try:
            await journal.keep_house()
            await _append(journal, settings.rounds * sum(map(settings.count, KINDS)))
        finally:
            with trio.CancelScope(shield=True):
                await journal.close()
        epoch = (await ask(bridge, dsn, "SELECT postroom_take_lease(gen_random_uuid(), '1 hour', true)"))[0]
        rounds, first = [], 1
        with service() as port:
            for _ in range(settings.rounds):
                for kind in KINDS:
                    count = settings.count(kind)
                    found = await _round(kind, port, dsn, epoch, first, count, settings.lanes)
                    [recorded] = await ask(
                        bridge,
                        dsn,
                        "SELECT count(*) FROM message_outcomes WHERE seq >= $1 AND seq < $2",
                        first,
                        first + count,
                    )
                    one = DeliverRound(kind, count, recorded, found["cpu_seconds"], found["seconds"])
                    rounds.append(one)
                    first += count
                    progress(f"{kind}: {one.per_cpu_second or 0:,.0f} deliveries for a CPU second")
        return rounds


async def _round(
    kind: str, port: int, dsn: str, epoch: int, first: int, count: int, lanes: int
) -> Mapping[str, float]:
    command = [sys.executable, "-m", "bench.deliver_client", kind]
    for name, value in {
        "port": port, "dsn": dsn, "epoch": epoch, "first": first, "count": count, "lanes": lanes
    }.items():  # fmt: skip
        command += [f"--{name}", str(value)]
    with trio.move_on_after(_SECONDS):
        done = await trio.run_process(command, capture_stdout=True, check=False)
        if done.returncode != 0:
            raise ProcessFailed(f"{kind} ended with {done.returncode}")
        found: Mapping[str, float] = json.loads(done.stdout)
        return found
    raise ProcessFailed(f"{kind} took longer than {_SECONDS:g} s")


def medians(rounds: Sequence[DeliverRound]) -> dict[str, float | None]:
    """Deliveries for a CPU second, by kind."""
    return {
        kind: median_or_none(
            one.per_cpu_second for one in rounds if one.kind == kind and one.per_cpu_second is not None
        )
        for kind in KINDS
    }


def judge(rounds: Sequence[DeliverRound]) -> list[Verdict]:
    found = medians(rounds)
    ours = found["router"]

    def times(kind: str) -> float | None:
        theirs = found[kind]
        return None if ours is None or theirs is None else ratio(ours, theirs)

    return [
        Verdict(
            f"deliveries for a CPU second, router / {kind}", times(kind), goal, at_least=True, required=True
        )
        for kind, goal in (("httpx", OVER_HTTPX), ("httpcore", OVER_HTTPCORE))
    ]


def run(settings: DeliverSettings, json_path: Path | None) -> int:
    """The whole benchmark; the exit code, 1 when an acceptance line is missed."""
    head = envelope("deliver", settings.as_json())
    home = Path(tempfile.mkdtemp(prefix="postroom-bench-", dir="/tmp"))
    home.chmod(0o755)
    try:
        rounds = trio.run(measured, settings, home, lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    verdicts = judge(rounds)
    print_table(
        f"Signed deliveries with recorded outcomes, {settings.lanes} at once, medians of {settings.rounds}",
        ("kind", "for a CPU second", "us of CPU each"),
        [
            (kind, number(value or 0), number(0 if not value else 1e6 / value))
            for kind, value in medians(rounds).items()
        ],
    )
    print_verdicts(verdicts)
    failures = missed(verdicts)
    body = {
        **head,
        "rounds": [{**asdict(one), "per_cpu_second": one.per_cpu_second} for one in rounds],
        "medians": medians(rounds),
        "verdicts": verdict_rows(verdicts),
        "passed": not failures,
    }
    print(f"result: {write_result(body, json_path)}")
    return 1 if failures else 0
