"""`python -m bench bridge`: two ways to run asyncpg from trio, on the router's own append path."""

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from bench.ack import describe
from bench.bridge_server import BRIDGES
from bench.processes import ProcessFailed
from bench.report import envelope, number, print_table, write_result
from bench.rounds import Round, measure_closed
from bench.targets import ROUTER, Target, running
from bench.verdicts import median_or_none


@dataclass(frozen=True)
class BridgeSettings:
    """What one call of the benchmark does; times in seconds."""

    rounds: int = 5
    seconds: float = 3.0
    connections: tuple[int, ...] = (32, 128)
    warm_up_seconds: float = 1.0


def target_of(bridge: str) -> Target:
    """The router, ingest alone, over that bridge."""
    return Target(
        name=bridge,
        module="bench.bridge_server",
        argv=("--data-dir", "{data}", "--bridge", bridge),
        postgres="inside",
        rows=ROUTER.rows,
    )


async def run_rounds(settings: BridgeSettings, home: Path, progress: Callable[[str], None]) -> list[Round]:
    """Alternate; each round begins with the other bridge, so that drift of the machine favours none."""
    result = []
    for index in range(1, settings.rounds + 1):
        for bridge in BRIDGES if index % 2 else reversed(BRIDGES):
            async with running(target_of(bridge), home / bridge) as one:
                for connections in settings.connections:
                    measured = await measure_closed(
                        one,
                        index,
                        connections=connections,
                        seconds=settings.seconds,
                        warm_up_seconds=settings.warm_up_seconds,
                    )
                    progress(describe(measured))
                    result.append(measured)
    return result


def summary(settings: BridgeSettings, rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Medians over the rounds that count."""
    records = []
    for connections in settings.connections:
        for bridge in BRIDGES:
            mine = [r for r in rounds if r.target == bridge and r.load.connections == connections]
            counted = [r for r in mine if not r.void]
            records.append(
                {
                    "bridge": bridge,
                    "connections": connections,
                    "rounds": len(mine),
                    "void": len(mine) - len(counted),
                    "rate": median_or_none(r.rate for r in counted),
                    "server_us": median_or_none(r.server_us for r in counted),
                    "postgres_us": median_or_none(r.postgres_us for r in counted),
                    "p50_ms": median_or_none(r.load.latency_ms["p50"] for r in counted),
                    "p99_ms": median_or_none(r.load.latency_ms["p99"] for r in counted),
                }
            )
    return records


def show(records: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            record["bridge"],
            str(record["connections"]),
            number(record["rate"]),
            number(record["server_us"]),
            number(record["postgres_us"]),
            number(record["p50_ms"], 1),
            number(record["p99_ms"], 1),
            f"{record['void']}/{record['rounds']}",
        )
        for record in records
    ]
    columns = ("bridge", "conns", "acks/s", "server us", "Postgres us", "p50 ms", "p99 ms", "void")
    print_table("asyncpg from trio, ingest alone: medians of the rounds that count", columns, rows)


def run(settings: BridgeSettings, json_path: Path | None) -> int:
    """The whole benchmark. It compares and has no goal: the exit code is 0."""
    if importlib.util.find_spec("trio_asyncio") is None:
        raise ExceptionGroup("", [ProcessFailed("trio-asyncio is not installed: pip install -e '.[bench]'")])
    head = envelope("bridge", asdict(settings))
    # Postgres runs as another user when we are root, and must be able to pass through.
    home = Path(tempfile.mkdtemp(prefix="postroom-bench-", dir="/tmp"))
    home.chmod(0o755)
    try:
        rounds = trio.run(run_rounds, settings, home, lambda line: print(line, flush=True))
    finally:
        shutil.rmtree(home, ignore_errors=True)
    records = summary(settings, rounds)
    show(records)
    body = {**head, "summary": records, "rounds": [r.as_json() for r in rounds]}
    print(f"result: {write_result(body, json_path)}")
    return 0
