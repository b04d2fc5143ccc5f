"""`python -m bench`: one subcommand for each benchmark; the benchmarks themselves live beside this file."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import click

from bench import ack as ack_benchmark
from bench import bridge as bridge_benchmark
from bench import coldstart as coldstart_benchmark
from bench import deliver as deliver_benchmark
from bench import hang as hang_benchmark
from bench import outage as outage_benchmark
from bench import recover as recover_benchmark
from bench import storage as storage_benchmark
from bench.databases import UnfairDatabase
from bench.processes import ProcessFailed

_JSON = click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Result file."
)


def _numbers(_context: click.Context, _option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter("numbers with commas between them, as in 32,128") from None
    if any(number < 1 for number in numbers):
        raise click.BadParameter("at least one connection")
    return numbers


def _finish(benchmark: Callable[[], int]) -> NoReturn:
    """Exits with the code of the benchmark; a target that failed is a message and not a traceback."""
    try:
        code = benchmark()
    except* (ProcessFailed, UnfairDatabase) as failures:
        raise click.ClickException("; ".join(str(failure) for failure in failures.exceptions)) from None
    sys.exit(code)


@click.group()
def main() -> None:
    """Benchmarks of Postroom. Each exits 1 when a goal that it must reach is missed."""


@main.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--seconds", default=3.0, show_default=True, type=click.FloatRange(0.5), help="Length of one load."
)
@click.option(
    "--connections", default="32,128", show_default=True, callback=_numbers, help="Keep-alive connections."
)
@click.option("--targets", default="", help="Only these, as in router,fastapi; the goals then lack values.")
@click.option("--quick", is_flag=True, help="One short round: shows that it works, says nothing.")
@_JSON
def ack(
    rounds: int,
    seconds: float,
    connections: tuple[int, ...],
    targets: str,
    quick: bool,
    json_path: Path | None,
) -> None:
    """Durable acks per second and CPU time per ack, beside two references.

    Example: python -m bench ack --rounds 5 --seconds 3
    """
    settings = ack_benchmark.AckSettings(rounds=rounds, seconds=seconds, connections=connections)
    if targets:
        settings = replace(settings, targets=tuple(targets.split(",")))
    try:
        ack_benchmark.chosen_targets(settings.targets)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--targets") from None
    chosen = settings.quick() if quick else settings
    _finish(lambda: ack_benchmark.run(chosen, json_path))


@main.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@_JSON
def coldstart(rounds: int, json_path: Path | None) -> None:
    """Time from process start to the first 200 on an existing data directory.

    Example: python -m bench coldstart --rounds 5
    """
    _finish(lambda: coldstart_benchmark.run(rounds, json_path))


@main.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Pairs of loads.")
@click.option(
    "--seconds", default=8.0, show_default=True, type=click.FloatRange(0.5), help="Length of one load."
)
@_JSON
def hang(rounds: int, seconds: float, json_path: Path | None) -> None:
    """What the other services notice while one service hangs for a whole run.

    Example: python -m bench hang --rounds 5 --seconds 8
    """
    settings = hang_benchmark.HangSettings(rounds=rounds, seconds=seconds)
    _finish(lambda: hang_benchmark.run(settings, json_path))


@main.command()
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--seconds", default=60.0, show_default=True, type=click.FloatRange(1), help="Postgres is away so long."
)
@click.option(
    "--rate", default=300.0, show_default=True, type=click.FloatRange(1), help="Webhooks per second."
)
@_JSON
def outage(rounds: int, seconds: float, rate: float, json_path: Path | None) -> None:
    """How fast webhooks are answered while Postgres is away, and the time to catch up after it.

    Example: python -m bench outage --rounds 3 --seconds 60
    """
    settings = outage_benchmark.OutageSettings(rounds=rounds, seconds=seconds, rate=rate)
    _finish(lambda: outage_benchmark.run(settings, json_path))


@main.command()
@click.option(
    "--items", default=20_000, show_default=True, type=click.IntRange(1_000), help="Of each batch size."
)
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Pairs of loads.")
@click.option(
    "--long-seconds",
    default=600.0,
    show_default=True,
    type=click.FloatRange(10),
    help="Length of the load in which dead tuples are counted.",
)
@click.option(
    "--messages",
    default=5_000_000,
    show_default=True,
    type=click.IntRange(10_000),
    help="In the database whose queries are timed.",
)
@_JSON
def storage(items: int, rounds: int, long_seconds: float, messages: int, json_path: Path | None) -> None:
    """What a message costs the database over its whole life, what is left of it, and how long the queries of
    commands take among millions.

    Example: python -m bench storage --rounds 5
    """
    settings = storage_benchmark.StorageSettings(
        items=items, rounds=rounds, long_seconds=long_seconds, messages=messages
    )
    _finish(lambda: storage_benchmark.run(settings, json_path))


@main.command()
@click.option(
    "--rounds", default=5, show_default=True, type=click.IntRange(1), help="Of each kind, in turns."
)
@click.option("--lanes", default=32, show_default=True, type=click.IntRange(1), help="Deliveries at once.")
@_JSON
def deliver(rounds: int, lanes: int, json_path: Path | None) -> None:
    """Signed deliveries with recorded outcomes for a CPU second, beside httpcore and httpx.

    Example: python -m bench deliver --rounds 5
    """
    settings = deliver_benchmark.DeliverSettings(rounds=rounds, lanes=lanes)
    _finish(lambda: deliver_benchmark.run(settings, json_path))


@main.command()
@click.option("--completed", default=5_000_000, show_default=True, type=click.IntRange(1))
@click.option("--undelivered", default=100_000, show_default=True, type=click.IntRange(1))
@_JSON
def recover(completed: int, undelivered: int, json_path: Path | None) -> None:
    """How soon a start after SIGKILL delivers what is undelivered, and how fast.

    Example: python -m bench recover --completed 5000000 --undelivered 100000
    """
    settings = recover_benchmark.RecoverSettings(completed=completed, undelivered=undelivered)
    _finish(lambda: recover_benchmark.run(settings, json_path))


@main.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option(
    "--seconds", default=3.0, show_default=True, type=click.FloatRange(0.5), help="Length of one load."
)
@click.option(
    "--connections", default="32,128", show_default=True, callback=_numbers, help="Keep-alive connections."
)
@_JSON
def bridge(rounds: int, seconds: float, connections: tuple[int, ...], json_path: Path | None) -> None:
    """asyncpg on a thread of its own beside asyncpg through trio-asyncio, on the router's append path.

    Example: python -m bench bridge --rounds 5 --seconds 3
    """
    settings = bridge_benchmark.BridgeSettings(rounds=rounds, seconds=seconds, connections=connections)
    _finish(lambda: bridge_benchmark.run(settings, json_path))


if __name__ == "__main__":
    main()
