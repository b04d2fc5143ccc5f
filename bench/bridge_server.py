"""A program that embeds the router, accepting and journaling only, over one or the other bridge to
asyncpg: what `bench bridge` runs.
"""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path

import click
import trio

import router.app
from router import Config, open_router
from router.config import DeliveryConfig
from router.edge.http1 import Listener

BRIDGES = ("thread", "trio-asyncio")


def choose(bridge: str) -> None:
    """Put a bridge in the place of the router's own."""
    if bridge == "trio-asyncio":
        from bench import bridge_trio_asyncio

        setattr(router.app, "open_bridge", bridge_trio_asyncio.open_bridge)  # noqa: B010 - not one of its exports


async def run(data_dir: Path, secret: str) -> None:
    config = Config.for_embedding(app_secret=secret, verify_token="bench", data_dir=data_dir, port=0)
    config = replace(config, delivery=DeliveryConfig(enabled=False))
    listener = Listener(config.limits)
    port = listener.bind(config.host, config.port)
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with open_router(config) as opened, trio.open_nursery() as nursery:
            nursery.start_soon(listener.serve, opened.webhooks.accept_nowait)
            path = opened.webhooks.paths[0]
            click.echo(f"ready webhook=http://127.0.0.1:{port}{path} admin=- data={data_dir}")
            sys.stdout.flush()
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()


@click.command()
@click.option("--data-dir", type=click.Path(path_type=Path), required=True)
@click.option("--secret", envvar="WHATSAPP_APP_SECRET", required=True)
@click.option("--bridge", type=click.Choice(BRIDGES), required=True)
def main(data_dir: Path, secret: str, bridge: str) -> None:
    """Serve until SIGTERM."""
    choose(bridge)
    trio.run(run, data_dir, secret)


if __name__ == "__main__":
    main()
