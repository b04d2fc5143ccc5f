"""A program that embeds the router with one in-process service for every domain: what `bench ack` runs to
measure the rate with routing and delivery.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click
import trio

from router import Ack, Config, Envelope, open_router
from router.edge.http1 import Listener


async def take(envelope: Envelope) -> Ack:
    return Ack()


async def run(data_dir: Path, secret: str) -> None:
    config = Config.for_embedding(app_secret=secret, verify_token="bench", data_dir=data_dir, port=0)
    listener = Listener(config.limits)
    port = listener.bind(config.host, config.port)
    handlers = dict.fromkeys(config.services, take)
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with open_router(config, handlers) as router, trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, router.webhooks.accept_nowait)
            path = router.webhooks.paths[0]
            click.echo(f"ready webhook=http://127.0.0.1:{port}{path} admin=- data={data_dir}")
            sys.stdout.flush()
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--secret", envvar="WHATSAPP_APP_SECRET", required=True)
def main(data_dir: Path, secret: str) -> None:
    """Serve until SIGTERM."""
    trio.run(run, data_dir, secret)


if __name__ == "__main__":
    main()
