"""Graceful drain: who is idle goes at once, who waits or is half way is answered and then let go."""

from __future__ import annotations

import pytest
import trio
from tables import each
from wire import GONE, chunked, get, listening, post, response, settled, until

from router.config import LimitsConfig
from router.edge.http1 import Listener


async def test_idle_connections_end_at_once() -> None:
    async with listening() as edge, edge.connect() as fresh, edge.connect() as used:
        await used.send(get())
        await used.answer()
        edge.listener.drain()
        await fresh.ended()
        await used.ended()
        with trio.fail_after(5):
            await edge.listener.drained()


async def test_nobody_new_is_let_in() -> None:
    async with listening() as edge, edge.connect() as busy:
        edge.taker.hold = True
        await busy.send(get())
        await edge.seen(1)
        edge.listener.drain()
        with pytest.raises(GONE):
            async with edge.connect():
                pass


async def test_what_is_in_flight_is_answered_and_told_that_it_was_the_last() -> None:
    async with listening() as edge, edge.connect() as wire:
        edge.taker.hold = True
        await wire.send(post())
        await edge.seen(1)
        edge.listener.drain()
        await settled()
        assert edge.listener.statistics.connections == 1
        edge.taker.held.pop()(response())
        answer = await wire.answer()
        assert (answer.status, answer.closes) == (200, True)
        await wire.ended()


async def test_all_that_was_taken_from_a_pipeline_is_answered() -> None:
    async with listening() as edge, edge.connect() as wire:
        edge.taker.hold = True
        await wire.send(post(), post(), post())
        await edge.seen(3)
        edge.listener.drain()
        await wire.send(post(path=b"/late"))
        await settled()
        for respond in edge.taker.held:
            respond(response())
        answers = [await wire.answer() for _ in range(3)]
        assert [answer.status for answer in answers] == [200] * 3
        assert [answer.closes for answer in answers] == [False, False, True]
        await wire.ended()
        assert b"/late" not in edge.taker.paths


@each("data", [post(), chunked(b"x", b"y"), get()])
@each("sent", [5, -1])
async def test_a_half_read_request_is_finished(data: bytes, sent: int) -> None:
    async with listening() as edge, edge.connect() as wire:
        await wire.send(get(b"/before"), data[:sent])
        await wire.answer()
        await settled()
        edge.listener.drain()
        await settled()
        await wire.send(data[sent:])
        answer = await wire.answer()
        assert (answer.status, answer.closes) == (200, True)
        await wire.ended()
        assert len(edge.taker.seen) == 2


async def test_a_half_read_request_behind_one_that_waits() -> None:
    async with listening() as edge, edge.connect() as wire:
        edge.taker.hold = True
        await wire.send(post(), post()[:-2])
        await edge.seen(1)
        edge.listener.drain()
        edge.taker.held[0](response())
        assert not (await wire.answer()).closes
        await wire.send(post()[-2:], post(path=b"/late"))
        await edge.seen(2)
        edge.taker.held[1](response())
        assert (await wire.answer()).closes
        await wire.ended()
        assert b"/late" not in edge.taker.paths


async def test_one_that_is_never_finished_has_its_deadline() -> None:
    async with listening(read_timeout_ms=60) as edge, edge.connect() as wire:
        await wire.send(post()[:-1])
        await settled()
        edge.listener.drain()
        with trio.fail_after(5):
            await edge.listener.drained()
        assert (await wire.answer()).status == 408


async def test_an_answer_that_is_being_written_is_written_whole() -> None:
    async with listening() as edge, edge.connect() as wire:
        edge.taker.body = bytes(12_000_000)
        await wire.send(get())
        await edge.seen(1)
        edge.listener.drain()
        await settled()
        assert edge.listener.statistics.connections == 1
        assert len((await wire.answer()).body) == 12_000_000
        await wire.ended()


async def test_a_refused_sender_is_still_read_on() -> None:
    async with listening(body_max_bytes=10) as edge, edge.connect() as wire:
        await wire.send(post(b"x" * 100_000))
        await until(lambda: edge.listener.statistics.connections == 1)
        edge.listener.drain()
        assert (await wire.answer()).status == 413
        await wire.ended()


async def test_twice_is_once() -> None:
    async with listening() as edge:
        edge.listener.drain()
        edge.listener.drain()
        await edge.listener.drained()


async def test_cancelled_serving_closes_everything() -> None:
    async with listening() as edge, edge.connect() as wire:
        edge.taker.hold = True
        await wire.send(post(), post()[:-1])
        await edge.seen(1)
        edge.listener._drained.set()  # what a cancelled nursery runs through as well
        await wire.gone()
        assert edge.in_flight == 0


async def test_before_serving() -> None:
    listener = Listener(LimitsConfig())
    listener.bind("127.0.0.1", 0)
    listener.drain()
    with trio.fail_after(5):
        await listener.serve(lambda request, respond: None)
        await listener.drained()
