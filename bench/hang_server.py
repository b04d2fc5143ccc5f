"""A program that embeds the router with two services in its own process: `rides` answers at once, and
`insurance` does so too or, with --hang, never. What `bench hang` runs.

SIGUSR1 makes it write what it has seen since the last one to `--reports`/N.json, N counting from 1.
"""

from __future__ import annotations

import json
import signal
import sys
from array import array
from datetime import UTC, datetime
from pathlib import Path

import click
import trio

from bench.verdicts import latency_summary
from router import Ack, Config, Envelope, open_router
from router.edge.http1 import Listener


class Services:
    """Both handlers and what they saw."""

    def __init__(self, *, hang: bool) -> None:
        self._hang = hang
        self._latencies = array("d")
        self._insurance = 0
        self._released = trio.Event()

    async def rides(self, envelope: Envelope) -> Ack:
        self._latencies.append((datetime.now(UTC) - envelope.received_at).total_seconds())
        return Ack()

    async def insurance(self, envelope: Envelope) -> Ack:
        self._insurance += 1
        if self._hang:
            await self._released.wait()
        return Ack()

    def release(self) -> None:
        """The program ends: nobody waits for what hangs."""
        self._released.set()

    def report(self) -> dict[str, object]:
        """Latencies of rides from journaled to handed over, and attempts, since the last report."""
        seen: dict[str, object] = {
            "rides": len(self._latencies),
            "rides_latency_ms": latency_summary(self._latencies),
            "insurance_attempts": self._insurance,
        }
        self._latencies = array("d")
        self._insurance = 0
        return seen


def write_report(directory: Path, number: int, report: dict[str, object]) -> None:
    unfinished = directory / "unfinished"
    unfinished.write_text(json.dumps(report), encoding="utf-8")
    unfinished.rename(directory / f"{number}.json")


async def run(data_dir: Path, reports: Path, secret: str, hang: bool) -> None:
    config = Config.for_embedding(app_secret=secret, verify_token="bench", data_dir=data_dir, port=0)
    listener = Listener(config.limits)
    port = listener.bind(config.host, config.port)
    services = Services(hang=hang)
    handlers = {"rides": services.rides, "insurance": services.insurance}
    number = 0
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
        async with open_router(config, handlers) as router, trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, router.webhooks.accept_nowait)
            path = router.webhooks.paths[0]
            click.echo(f"ready webhook=http://127.0.0.1:{port}{path} admin=- data={data_dir}")
            sys.stdout.flush()
            async for received in signals:
                if received == signal.SIGTERM:
                    break
                number += 1
                write_report(reports, number, services.report())
            services.release()
            nursery.cancel_scope.cancel()


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--reports", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--secret", envvar="WHATSAPP_APP_SECRET", required=True)
@click.option("--hang", is_flag=True, help="insurance never answers.")
def main(data_dir: Path, reports: Path, secret: str, hang: bool) -> None:
    """Serve until SIGTERM."""
    trio.run(run, data_dir, reports, secret, hang)


if __name__ == "__main__":
    main()
