"""Run as a process of its own: a service that attaches, and posts each delivery to where a test looks before
it answers. Arguments: the router's port for services, domain, token, URL to post to, seconds that each takes.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

import trio

from router.client import Ack, Envelope, Retry, serve_domain
from router.delivery.contract import body_of


async def main(url: str, domain: str, token: str, sink: str, takes: float) -> None:
    def post(envelope: Envelope) -> None:
        headers = {"webhook-id": envelope.id, "Idempotency-Key": envelope.id}
        urllib.request.urlopen(urllib.request.Request(sink, body_of(envelope), headers), timeout=30).close()

    async def handle(envelope: Envelope) -> Ack | Retry:
        try:
            await trio.to_thread.run_sync(post, envelope)
        except urllib.error.HTTPError as error:
            return Retry(reason=f"answered {error.code}")
        await trio.sleep(takes)
        return Ack()

    await serve_domain(url, domain, handle, token, concurrency=8)


if __name__ == "__main__":
    *where, takes = sys.argv[1:]
    trio.run(main, *where, float(takes))
