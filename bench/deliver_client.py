"""One round of `bench deliver`, in a process of its own: items of a journal are delivered over HTTP, signed,
and their outcomes recorded in it. Only what makes the attempt differs: a lane of Postroom's, an httpcore
connection for each lane, or an httpx client for all. Prints a line of JSON.
"""

import json
import resource
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import click
import httpcore
import httpx
import trio

from actors.completer import Completer
from actors.kernel import Address, MailboxFull
from actors.messages import Ack, Completion, Envelope, Item, Outcome, Session
from actors.ports import Handler, Unreadable
from bench.storage import completion
from router.clock import utc_now
from router.delivery import signing
from router.delivery.contract import body_of, read_answer, traceparent
from router.delivery.http import Target, open_lane
from router.mac import HmacSha256
from router.postgres.bridge import open_bridge
from router.postgres.journal import PostgresJournal

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
KINDS = ("router", "httpcore", "httpx")


def headers(port: int, key: HmacSha256, envelope: Envelope, body: bytes) -> dict[str, str]:
    """What a delivery carries, as the router writes it."""
    now = int(utc_now().timestamp())
    return {
        "Host": f"127.0.0.1:{port}",
        "User-Agent": "postroom",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "webhook-id": envelope.id,
        "webhook-timestamp": str(now),
        "Idempotency-Key": envelope.id,
        "X-Correlation-ID": envelope.correlation_id,
        "traceparent": traceparent(envelope),
        "webhook-signature": signing.sign(key, envelope.id, now, body),
    }


class HttpcoreLane:
    """A connection of httpcore's, without its pool."""

    def __init__(self, port: int, key: HmacSha256) -> None:
        self._url, self._port, self._key = f"http://127.0.0.1:{port}/messages", port, key
        self._connection = httpcore.AsyncHTTPConnection(httpcore.Origin(b"http", b"127.0.0.1", port))

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        body = body_of(envelope)
        answer = await self._connection.request(
            "POST",
            self._url,
            headers=list(headers(self._port, self._key, envelope, body).items()),
            content=body,
        )
        assert answer.status == 200
        return read_answer(answer.content, lambda name: True)

    async def close(self) -> None:
        await self._connection.aclose()


class HttpxLane:
    """One of many users of an httpx client, which has a pool of as many connections."""

    def __init__(self, port: int, key: HmacSha256, client: httpx.AsyncClient) -> None:
        self._url, self._port, self._key = f"http://127.0.0.1:{port}/messages", port, key
        self._client = client

    async def attempt(self, envelope: Envelope) -> Outcome | Unreadable:
        body = body_of(envelope)
        answer = await self._client.post(
            self._url, content=body, headers=headers(self._port, self._key, envelope, body)
        )
        assert answer.status_code == 200
        return read_answer(answer.content, lambda name: True)


@asynccontextmanager
async def handlers(kind: str, port: int, lanes: int) -> AsyncIterator[list[Handler]]:
    key = signing.key_of(SECRET)
    async with AsyncExitStack() as stack:
        if kind == "router":
            target = Target.of(f"http://127.0.0.1:{port}/messages", SECRET)
            lane = open_lane(target, clock=utc_now, known_domain=lambda name: True)
            yield [await stack.enter_async_context(lane()) for _ in range(lanes)]
        elif kind == "httpcore":
            made = [HttpcoreLane(port, key) for _ in range(lanes)]
            for one in made:
                stack.push_async_callback(one.close)
            yield list(made)
        else:
            limits = httpx.Limits(max_connections=lanes, max_keepalive_connections=lanes)
            client = await stack.enter_async_context(httpx.AsyncClient(limits=limits))
            yield [HttpxLane(port, key, client) for _ in range(lanes)]


def envelope_of(item: Item) -> Envelope:
    session = Session(key=item.session_key, phone_number_id=item.phone_number_id, wa_id=item.wa_id)
    return Envelope(
        id=item.key,
        message_id=item.message_id,
        domain="rides",
        session=session,
        message=item.message,
        contact=item.contact,
        received_at=item.received_at,
        correlation_id=item.correlation_id,
    )


async def deliver(
    kind: str, port: int, dsn: str, epoch: int, first: int, count: int, lanes: int
) -> dict[str, float]:
    """CPU seconds of this process and seconds, from the first delivery to the last commit."""
    async with open_bridge() as bridge:
        journal = PostgresJournal(bridge, lambda: dsn, clock=utc_now, notify=lambda: False)
        try:
            items = await journal.read(range(first, first + count))
            assert len(items) == count
            async with handlers(kind, port, lanes) as made:
                for handler, item in zip(made, items, strict=False):  # connections are open, code is loaded
                    await handler.attempt(envelope_of(item))
                return await _measured(journal, epoch, made, items)
        finally:
            with trio.CancelScope(shield=True):
                await journal.close()


async def _measured(
    journal: PostgresJournal, epoch: int, made: list[Handler], items: list[Item]
) -> dict[str, float]:
    committed = 0
    done = trio.Event()

    def on_committed(batch: list[Completion], stragglers: list[int]) -> None:
        nonlocal committed
        committed += len(batch)
        if committed == len(items):
            done.set()

    completer = Completer(
        journal,
        epoch=epoch,
        marks=lambda: (1, []),
        on_committed=on_committed,
        on_unavailable=_fail,
        max_rows=2_000,
    )
    address: Address[Completion] = Address("completer", 4_096)
    waiting = iter(items)

    async def lane(handler: Handler) -> None:
        for item in waiting:
            outcome = await handler.attempt(envelope_of(item))
            assert isinstance(outcome, Ack)
            try:  # as a session does it
                address.tell_nowait(completion(item, item.seq))
            except MailboxFull:
                await address.tell(completion(item, item.seq))

    began, cpu = time.perf_counter(), _cpu()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: address.run(completer))
        for handler in made:
            nursery.start_soon(lane, handler)
        await done.wait()
        took = {"cpu_seconds": _cpu() - cpu, "seconds": time.perf_counter() - began}
        nursery.cancel_scope.cancel()
    return took


def _fail(error: Exception) -> None:
    raise error


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--port", type=int, required=True)
@click.option("--dsn", required=True)
@click.option("--epoch", type=int, required=True)
@click.option("--first", type=int, required=True)
@click.option("--count", type=int, required=True)
@click.option("--lanes", type=int, required=True)
def main(kind: str, port: int, dsn: str, epoch: int, first: int, count: int, lanes: int) -> None:
    """Deliver `count` items from the seq `first` on."""
    print(json.dumps(trio.run(deliver, kind, port, dsn, epoch, first, count, lanes)))


if __name__ == "__main__":
    main()
