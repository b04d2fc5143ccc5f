"""`python -m bench hang`: what the other services notice while one service hangs for a whole run."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
import trio

from bench.load import LoadSpec
from bench.processes import ProcessFailed
from bench.report import envelope, number, print_table, print_verdicts, verdict_rows, write_result
from bench.rounds import Round, measure, spec_for
from bench.targets import IN_PROCESS, Running, Target, running
from bench.verdicts import Verdict, median_or_none, missed
from router.conservation import recount
from router.postgres.statements import statements

# Every other sender has something for the service that hangs; with one service a sender, none changes over.
TEXTS = ("taxi", "insurance")
SERVICES = ("rides", "insurance")
MOVES_LESS_THAN = 1.20
RSS_BOUND_MIB = 256.0
_REPORT_SECONDS = 10
_PLACES = """
SELECT payload #>> '{text,body}' AS text, place, coalesce(service, '') AS service, count(*) AS messages
  FROM whatsapp_messages WHERE direction = 'inbound' GROUP BY 1, 2, 3
"""
# The load is over when nothing is on its way to the service that answers.
_RIDES_UNSETTLED = """
SELECT count(*) FROM whatsapp_messages
 WHERE direction = 'inbound' AND place = 'journaled' AND payload #>> '{text,body}' = 'taxi'
"""
ANSWERING = Target(
    name="all answer",
    module="bench.hang_server",
    argv=("--data-dir", "{data}", "--reports", "{files}"),
    postgres="inside",
    rows=IN_PROCESS.rows,
    unsettled=_RIDES_UNSETTLED,
)
HANGING = replace(ANSWERING, name="one hangs", argv=(*ANSWERING.argv, "--hang"))
# With every service answering, capacity is counted until the last message is with its service.
SATURATED = replace(ANSWERING, name="saturation", unsettled=IN_PROCESS.unsettled)


@dataclass(frozen=True)
class HangSettings:
    """What one call of the benchmark does; times in seconds."""

    rounds: int = 5
    seconds: float = 8.0
    connections: int = 32
    warm_up_seconds: float = 1.0
    saturation_rounds: int = 3
    fraction: float = 0.4

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "texts": TEXTS, "senders": 1_000, "rss_bound_mib": RSS_BOUND_MIB}


@dataclass(frozen=True)
class Accounts:
    """Where the tables say that the messages are, after a round."""

    rides: dict[str, int]
    insurance: dict[str, int]
    recoverable: int  # what the next start would find undelivered
    problems: list[str]


@dataclass
class HangRound:
    """One load on a fresh data directory. Latencies run from journaled to the call of the handler."""

    hang: bool
    load: Round
    rides_seen: int
    latency_ms: dict[str, float]
    peak_rss_mib: float
    accounts: Accounts
    void: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "load": self.load.as_json()}


@dataclass
class HangRounds:
    saturation: list[Round] = field(default_factory=list)
    pairs: list[tuple[HangRound, HangRound]] = field(default_factory=list)  # all answer, one hangs

    def saturation_rate(self) -> float | None:
        return median_or_none(r.settled_rate for r in self.saturation if not r.void)

    def ratios(self) -> list[float]:
        """p95 with one service hanging over p95 without, of each pair that counts."""
        counted = [pair for pair in self.pairs if not any(one.void for one in pair)]
        return [hung.latency_ms["p95"] / calm.latency_ms["p95"] for calm, hung in counted]

    def all(self) -> list[HangRound]:
        return [one for pair in self.pairs for one in pair]


def peak_rss_mib(pid: int) -> float:
    """The most memory that the process has had resident."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise ProcessFailed(f"no VmHWM in /proc/{pid}/status")


class Reports:
    """Asks the server for what its handlers saw since the last time."""

    def __init__(self, pid: int, directory: Path) -> None:
        self._pid = pid
        self._directory = directory
        self._asked = 0

    async def next(self) -> dict[str, Any]:
        self._asked += 1
        path = self._directory / f"{self._asked}.json"
        os.kill(self._pid, signal.SIGUSR1)
        deadline = time.monotonic() + _REPORT_SECONDS
        while time.monotonic() < deadline:
            with suppress(FileNotFoundError):
                report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return report
            await trio.sleep(0.01)
        raise ProcessFailed(f"no report from the server in {_REPORT_SECONDS} s")


async def _accounts(dsn: str) -> Accounts:
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction(isolation="repeatable_read"):  # what waits goes on being deferred
            problems = list((await recount(connection)).problems)
            rows = await connection.fetch(_PLACES)
            recoverable = len(await connection.fetch(statements("journal")["undelivered"]))
    finally:
        await connection.close()
    places: dict[str, dict[str, int]] = {text: {} for text in TEXTS}
    for row in rows:
        places[row["text"]][row["place"]] = row["messages"]
        service = SERVICES[TEXTS.index(row["text"])]
        if row["service"] not in ("", service):
            problems.append(f"{row['messages']} x {row['text']} went to {row['service']}")
    rides, insurance = places.values()
    return Accounts(rides, insurance, recoverable, problems)


def acked_of(loads: Sequence[Round], text: int) -> int:
    """How many acked messages said `TEXTS[text]`: they take turns, and all that were sent were acked."""
    return sum((one.load.ok + 1 - text) // len(TEXTS) for one in loads)


def waits(places: dict[str, int]) -> int:
    """How many wait for the service that hangs: in its line, and, once they lost patience, in their turn."""
    return places.get("journaled", 0) + places.get("deferred", 0)


def what_was_lost(hang: bool, loads: Sequence[Round], accounts: Accounts, rides_seen: int) -> list[str]:
    """Every disagreement between what was acked and what the tables and the handler say. Pure."""
    lost = list(accounts.problems)
    rides, insurance = acked_of(loads, 0), acked_of(loads, 1)
    if accounts.rides != {"delivered": rides}:
        lost.append(f"{rides} rides were acked, the tables say {accounts.rides}")
    if rides_seen != acked_of(loads[-1:], 0):
        lost.append(
            f"{acked_of(loads[-1:], 0)} rides were acked, their handler was called {rides_seen} times"
        )
    if sum(accounts.insurance.values()) != insurance:
        lost.append(f"{insurance} for insurance were acked, the tables say {accounts.insurance}")
    elsewhere = set(accounts.insurance) - {"journaled", "deferred", "dead_letter", "delivered"}
    if elsewhere:
        lost.append(f"for insurance in no place that is delivered or waits: {', '.join(sorted(elsewhere))}")
    waiting = accounts.insurance.get("journaled", 0)
    if hang and accounts.recoverable != waiting:
        lost.append(f"{waiting} wait for insurance, recovery would find {accounts.recoverable}")
    return lost


async def saturation(settings: HangSettings, home: Path, index: int) -> Round:
    """As many as the router can journal and deliver."""
    async with running(SATURATED, home) as one:
        spec = spec_for(one, connections=settings.connections, seconds=settings.seconds, requests=1)
        warm = await measure(one, index, replace(spec, texts=TEXTS, seconds=1.0, requests=20_000))
        requests = int(warm.rate * settings.seconds * 2) + 2_000
        return await measure(one, index, replace(spec, texts=TEXTS, requests=requests))


async def hang_round(settings: HangSettings, home: Path, index: int, rate: float, hang: bool) -> HangRound:
    """One open-loop load at `rate` on a new server, after a warm-up of the same kind."""
    async with running(HANGING if hang else ANSWERING, home) as one:
        assert one.dsn is not None
        reports = Reports(one.server.pid, home / "files")
        warm = await measure(one, index, _open(settings, one, rate, settings.warm_up_seconds))
        await reports.next()
        load = await measure(one, index, _open(settings, one, rate, settings.seconds))
        seen = await reports.next()
        accounts = await trio.to_thread.run_sync(asyncio.run, _accounts(one.dsn))
        rides_seen: int = seen["rides"]
        return HangRound(
            hang=hang,
            load=load,
            rides_seen=rides_seen,
            latency_ms=seen["rides_latency_ms"],
            peak_rss_mib=peak_rss_mib(one.server.pid),
            accounts=accounts,
            void=[*warm.void, *load.void],
            lost=what_was_lost(hang, (warm, load), accounts, rides_seen),
        )


def _open(settings: HangSettings, one: Running, rate: float, seconds: float) -> LoadSpec:
    spec = spec_for(one, connections=settings.connections, seconds=seconds, requests=int(rate * seconds))
    return replace(spec, mode="open", rate=rate, texts=TEXTS)


async def run_rounds(settings: HangSettings, home: Path, progress: Callable[[str], None]) -> HangRounds:
    """Find the saturation, then alternate; each pair begins with the other kind of round."""
    result = HangRounds()
    for index in range(1, settings.saturation_rounds + 1):
        result.saturation.append(await saturation(settings, home / "saturation", index))
        measured = result.saturation[-1]
        progress(f"saturation {index}: {measured.rate:,.0f} acks/s, {measured.settled_rate:,.0f} delivered/s")
    reached = result.saturation_rate()
    if reached is None:
        return result
    for index in range(1, settings.rounds + 1):
        pair: dict[bool, HangRound] = {}
        for hang in (False, True) if index % 2 else (True, False):
            fresh = home / f"round-{index}-{hang}"
            pair[hang] = await hang_round(settings, fresh, index, reached * settings.fraction, hang)
            progress(describe(index, pair[hang]))
            shutil.rmtree(fresh, ignore_errors=True)
        result.pairs.append((pair[False], pair[True]))
    return result


def describe(index: int, one: HangRound) -> str:
    line = (
        f"round {index}  {'one hangs ' if one.hang else 'all answer'} {one.load.rate:>7,.0f}/s  "
        f"rides p50 {one.latency_ms['p50']:>6.1f} p95 {one.latency_ms['p95']:>6.1f} ms  "
        f"peak {one.peak_rss_mib:>4.0f} MiB  insurance {one.accounts.insurance}"
    )
    for word, reasons in (("VOID", one.void), ("LOST", one.lost)):
        if reasons:
            line += f"  {word}: {'; '.join(reasons)}"
    return line


def judge(result: HangRounds) -> list[Verdict]:
    ratios = result.ratios()
    counts = len(ratios) * 2 > len(result.pairs)
    hung = [one for one in result.all() if one.hang]
    peak = max((one.peak_rss_mib for one in hung), default=None)
    lost = float(sum(len(one.lost) for one in result.all())) if hung else None
    return [
        Verdict(
            "rides' delivery p95, insurance hanging / answering, median of the pairs",
            median(ratios) if counts else None,
            MOVES_LESS_THAN,
            at_least=False,
            required=True,
        ),
        Verdict(
            "largest resident memory with insurance hanging",
            peak,
            RSS_BOUND_MIB,
            at_least=False,
            required=True,
            unit="MiB",
        ),
        Verdict("disagreements about what was acked", lost, 0.0, at_least=False, required=True, unit=""),
    ]


def show(result: HangRounds, verdicts: Sequence[Verdict]) -> None:
    rows = []
    for hang in (False, True):
        mine = [one for one in result.all() if one.hang is hang and not one.void]
        latencies = [
            number(median_or_none(one.latency_ms[name] for one in mine), 1) for name in ("p50", "p95", "p99")
        ]
        waiting = number(median_or_none(waits(one.accounts.insurance) for one in mine))
        peak = number(median_or_none(one.peak_rss_mib for one in mine))
        rows.append(("one hangs" if hang else "all answer", *latencies, peak, waiting))
    print_table(
        "Rides, from journaled to handed over: medians of the rounds that count",
        ("insurance", "p50 ms", "p95 ms", "p99 ms", "peak MiB", "waiting for insurance"),
        rows,
    )
    print_verdicts(verdicts)


def run(settings: HangSettings, json_path: Path | None) -> int:
    """The whole benchmark; the exit code, 1 when the acceptance line is missed."""
    head = envelope("hang", settings.as_json())
    # Postgres runs as another user when we are root, and must be able to pass through.
    home = Path(tempfile.mkdtemp(prefix="postroom-bench-", dir="/tmp"))
    home.chmod(0o755)
    try:
        result = trio.run(run_rounds, settings, home, lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    verdicts = judge(result)
    show(result, verdicts)
    failures = missed(verdicts)
    reached = result.saturation_rate()
    body = {
        **head,
        "saturation_per_second": reached,
        "offered_per_second": None if reached is None else reached * settings.fraction,
        "ratios": [round(value, 4) for value in result.ratios()],
        "verdicts": verdict_rows(verdicts),
        "passed": not failures,
        "saturation": [one.as_json() for one in result.saturation],
        "rounds": [one.as_json() for one in result.all()],
    }
    print(f"result: {write_result(body, json_path)}")
    return 1 if failures else 0
