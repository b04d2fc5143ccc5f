"""`python -m bench ack`: durable acks per second and CPU time per ack, beside two references."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import trio

from bench.databases import durable_settings
from bench.report import (
    envelope,
    number,
    print_table,
    print_verdicts,
    verdict_rows,
    write_result,
)
from bench.rounds import Round, measure_closed, measure_open
from bench.targets import CEILINGS, DURABLE, Running, Target, running
from bench.verdicts import Verdict, median_or_none, missed, ratio

DEFAULT_P95_SLO_MS = 1_200.0
BARE_SHARE = 0.90
# Cores used by programs that are not ours, above which a round is printed as disturbed.
DISTURBED = 0.25


@dataclass(frozen=True)
class AckSettings:
    """What one call of the benchmark does; times in seconds."""

    rounds: int = 5
    seconds: float = 3.0
    connections: tuple[int, ...] = (32, 128)
    warm_up_seconds: float = 1.0
    ceiling_seconds: float = 3.0
    open_rounds: int = 3
    open_fraction: float = 0.4
    targets: tuple[str, ...] = ()

    def quick(self) -> "AckSettings":
        """A short run that shows whether everything works; too short to quote."""
        return AckSettings(1, 2.0, self.connections, 0.5, 1.5, 1, self.open_fraction, self.targets)

    def as_json(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "p95_slo_ms": p95_slo_ms(),
            "body_bytes": 600,
            "senders": 1_000,
        }


@dataclass
class AckRounds:
    """All rounds of a call, void ones included."""

    closed: list[Round] = field(default_factory=list)
    ceilings: list[Round] = field(default_factory=list)
    open: list[Round] = field(default_factory=list)
    postgres: dict[str, dict[str, str]] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def median(self, target: str, connections: int, value: Callable[[Round], float]) -> float | None:
        """Median over the rounds that count; None when half of them or more are void."""
        rounds = [r for r in self.closed if r.target == target and r.load.connections == connections]
        return _majority_median(rounds, value)

    def ceiling(self, target: str) -> float | None:
        return _majority_median([r for r in self.ceilings if r.target == target], lambda r: r.rate)

    def open_latency(self, target: str, name: str) -> float | None:
        return _majority_median(
            [r for r in self.open if r.target == target], lambda r: r.load.latency_ms[name]
        )


def _majority_median(rounds: Sequence[Round], value: Callable[[Round], float]) -> float | None:
    counted = [value(r) for r in rounds if not r.void]
    return median_or_none(counted) if len(counted) * 2 > len(rounds) else None


def p95_slo_ms() -> float:
    return float(os.environ.get("WA_CORE_P95_SLO_MS", DEFAULT_P95_SLO_MS))


def chosen_targets(names: Sequence[str]) -> tuple[list[Target], list[str]]:
    """The targets of a run, and the names of those that this checkout does not have."""
    known = {target.name for target in DURABLE}
    unknown = set(names) - known
    if unknown:
        raise ValueError(
            f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )
    wanted = [target for target in DURABLE if not names or target.name in names]
    present = [target for target in wanted if target.available()]
    return present, [target.name for target in wanted if target not in present]


async def run_rounds(settings: AckSettings, home: Path, progress: Callable[[str], None]) -> AckRounds:
    """Alternate the targets over the rounds, then load each openly at a fraction of its own median rate."""
    targets, absent = chosen_targets(settings.targets)
    result = AckRounds(absent=absent)

    async def closed_rounds(one: Running, index: int, seconds: float, counts: Iterable[int]) -> list[Round]:
        done = []
        for connections in counts:
            measured = await measure_closed(
                one,
                index,
                connections=connections,
                seconds=seconds,
                warm_up_seconds=settings.warm_up_seconds,
            )
            progress(describe(measured))
            done.append(measured)
        return done

    for index in range(1, settings.rounds + 1):
        # Each round begins with another target, so that drift of the machine favours none.
        shift = (index - 1) % max(1, len(targets))
        for target in targets[shift:] + targets[:shift]:
            async with running(target, home / _directory(target)) as one:
                if one.dsn is not None and target.name not in result.postgres:
                    result.postgres[target.name] = await trio.to_thread.run_sync(durable_settings, one.dsn)
                result.closed += await closed_rounds(one, index, settings.seconds, settings.connections)
            for ceiling in CEILINGS.get(target.name, ()):
                async with running(ceiling, home / _directory(ceiling)) as one:
                    smallest = (min(settings.connections),)
                    result.ceilings += await closed_rounds(one, index, settings.ceiling_seconds, smallest)

    connections = max(settings.connections)
    for index in range(1, settings.open_rounds + 1):
        for target in targets:
            reached = result.median(target.name, connections, lambda r: r.rate)
            if reached is None:
                continue
            async with running(target, home / _directory(target)) as one:
                measured = await measure_open(
                    one,
                    index,
                    connections=connections,
                    seconds=settings.seconds,
                    warm_up_seconds=settings.warm_up_seconds,
                    rate=reached * settings.open_fraction,
                )
                progress(describe(measured))
                result.open.append(measured)
    return result


def _directory(target: Target) -> str:
    return target.name.replace(" ", "-").replace("+", "-")


def describe(measured: Round) -> str:
    load = measured.load
    line = (
        f"round {measured.number}  {measured.target:<16} {load.mode:<6} {load.connections:>4} conns "
        f"{measured.rate:>9,.0f}/s  server {measured.server_us:>6.0f} us  "
        f"postgres {measured.postgres_us:>5.0f} us  p95 {load.latency_ms['p95']:>8.1f} ms"
    )
    if measured.others_share > DISTURBED:
        line += f"  (other programs: {measured.others_share:.1f} cores)"
    return f"{line}  VOID: {'; '.join(measured.void)}" if measured.void else line


def judge(settings: AckSettings, result: AckRounds) -> list[Verdict]:
    """Every acceptance line as a verdict: rates and CPU at the largest number of connections decide."""
    most = max(settings.connections)
    verdicts = []
    for connections in settings.connections:
        decides = connections == most

        def rate(target: str, connections: int = connections) -> float | None:
            return result.median(target, connections, lambda r: r.rate)

        for reference, first, eventual in (("fastapi", 3.0, 6.0), ("quart", 10.0, 20.0)):
            value = ratio(rate("router"), rate(reference))
            label = f"acks/s, router / {reference}, {connections} connections"
            verdicts.append(Verdict(label, value, first, at_least=True, required=decides))
            if decides:
                verdicts.append(Verdict(f"{label} (later)", value, eventual, at_least=True, required=False))
    cpu = ratio(
        result.median("router", most, lambda r: r.cpu_us), result.median("fastapi", most, lambda r: r.cpu_us)
    )
    label = f"CPU per ack with Postgres, router / fastapi, {most} connections"
    verdicts.append(Verdict(label, cpu, 1 / 6, at_least=False, required=True))
    verdicts.append(Verdict(f"{label} (later)", cpu, 1 / 8, at_least=False, required=False))
    tuned = ratio(
        result.median("router", most, lambda r: r.cpu_us),
        result.median("fastapi tuned", most, lambda r: r.cpu_us),
    )
    label = f"CPU per ack with Postgres, router / fastapi tuned, {most} connections"
    verdicts.append(Verdict(label, tuned, 1 / 6, at_least=False, required=False))
    for reference, (bare, hello) in CEILINGS.items():
        share = ratio(result.ceiling(bare.name), result.ceiling(hello.name))
        label = f"{reference} without its work / its framework's bare rate"
        verdicts.append(Verdict(label, share, BARE_SHARE, at_least=True, required=True))
    for target in ("router", "router+delivery"):
        value = result.open_latency(target, "p95")
        label = f"{target} p95 at {settings.open_fraction:.0%} of its closed rate"
        verdicts.append(
            Verdict(label, value, p95_slo_ms(), at_least=False, required=target == "router", unit="ms")
        )
    return verdicts


def summary(settings: AckSettings, result: AckRounds) -> list[dict[str, Any]]:
    """Medians over the rounds that count, one record for each target and number of connections."""
    records = []
    for connections in settings.connections:
        for target in dict.fromkeys(r.target for r in result.closed):
            mine = [r for r in result.closed if r.target == target and r.load.connections == connections]
            server = result.median(target, connections, lambda r: r.server_us)
            postgres = result.median(target, connections, lambda r: r.postgres_us)
            records.append(
                {
                    "target": target,
                    "connections": connections,
                    "rounds": len(mine),
                    "void": sum(bool(r.void) for r in mine),
                    "rate": result.median(target, connections, lambda r: r.rate),
                    "settled_rate": result.median(target, connections, lambda r: r.settled_rate),
                    "server_us": server,
                    "postgres_us": postgres,
                    "p50_ms": result.median(target, connections, lambda r: r.load.latency_ms["p50"]),
                    "p99_ms": result.median(target, connections, lambda r: r.load.latency_ms["p99"]),
                    "generator_share": median(r.generator_share for r in mine) if mine else None,
                }
            )
    return records


def show(settings: AckSettings, result: AckRounds, verdicts: Sequence[Verdict]) -> None:
    columns = (
        "target",
        "conns",
        "acks/s",
        "delivered/s",
        "server us",
        "Postgres us",
        "p50 ms",
        "p99 ms",
        "void",
    )
    rows = []
    for r in summary(settings, result):
        rate, delivered = number(r["rate"]), "-"
        if r["target"] == "router+delivery":
            delivered = number(r["settled_rate"])
        costs = (
            number(r["server_us"]),
            number(r["postgres_us"]),
            number(r["p50_ms"], 1),
            number(r["p99_ms"], 1),
        )
        void = f"{r['void']}/{r['rounds']}"
        rows.append((r["target"], str(r["connections"]), rate, delivered, *costs, void))
    print_table("Closed loop: durable acks, medians of the rounds that count", columns, rows)
    names = dict.fromkeys(r.target for r in result.ceilings)
    print_table(
        f"Without storage, {min(settings.connections)} connections",
        ("target", "requests/s"),
        [(name, number(result.ceiling(name))) for name in names],
    )
    percentiles = ("p50", "p95", "p99", "p99.9", "max")
    names = dict.fromkeys(r.target for r in result.open)
    print_table(
        f"Open loop at {settings.open_fraction:.0%} of each closed rate, ms from the scheduled time",
        ("target", *percentiles),
        [(name, *(number(result.open_latency(name, p), 1) for p in percentiles)) for name in names],
    )
    print_verdicts(verdicts)


def run(settings: AckSettings, json_path: Path | None) -> int:
    """The whole benchmark; the exit code, 1 when an acceptance line is missed."""
    head = envelope("ack", settings.as_json())
    # Postgres runs as another user when we are root, and must be able to pass through.
    home = Path(tempfile.mkdtemp(prefix="postroom-bench-", dir="/tmp"))
    home.chmod(0o755)
    try:
        result = trio.run(run_rounds, settings, home, _print_line)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    verdicts = judge(settings, result)
    show(settings, result, verdicts)
    for name in result.absent:
        print(f"{name}: not in this checkout, not measured")
    failures = missed(verdicts)
    body = {
        **head,
        "postgres": result.postgres,
        "summary": summary(settings, result),
        "verdicts": verdict_rows(verdicts),
        "passed": not failures,
        "absent": result.absent,
        "rounds": [r.as_json() for r in result.closed],
        "ceilings": [r.as_json() for r in result.ceilings],
        "open_loop": [r.as_json() for r in result.open],
    }
    print(f"result: {write_result(body, json_path)}")
    return 1 if failures else 0


def _print_line(line: str) -> None:
    print(line, flush=True)
