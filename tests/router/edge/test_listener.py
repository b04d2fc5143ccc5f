"""Answers on the hot listener's connections: their order, keep-alive, and what happens when senders leave
or `accept` breaks.
"""

from __future__ import annotations

import random

import pytest
import trio
from tables import each
from wire import chunked, get, listening, post, response, settled, until

from router.accept import Request, Respond
from router.config import LimitsConfig
from router.edge.http1 import Listener


class TestRequests:
    async def test_accept_is_given_what_was_sent(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(
                b"POST /a/b?x=1&y=%20 HTTP/1.1\r\nhOsT: h\r\nX-HUB-SIGNATURE-256: abc\r\n"
                b"X-Other: x\r\nContent-Length: 5\r\n\r\nhello"
            )
            assert (await wire.answer()).body == b"/a/b"
            (request,) = edge.taker.seen
            assert (request.method, request.path, request.query) == (b"POST", b"/a/b", b"x=1&y=%20")
            assert request.headers[b"x-hub-signature-256"] == b"abc"
            assert request.body == b"hello"

    async def test_the_answer_on_the_wire(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(get(b"/x"))
            answer = await wire.answer()
            assert answer.status == 200
            assert answer.body == b"/x"
            assert answer.headers["content-type"] == "application/json"
            assert answer.headers["date"].endswith("GMT")
            assert "connection" not in answer.headers

    async def test_arriving_byte_by_byte(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            for data in (post(b"one", path=b"/1"), chunked(b"t", b"wo", trailers=b"X-T: 1\r\n")):
                for position in range(len(data)):
                    await wire.send(data[position : position + 1])
                assert (await wire.answer()).status == 200
            assert [request.body for request in edge.taker.seen] == [b"one", b"two"]

    async def test_the_answer_to_head_has_no_body(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(b"HEAD /h HTTP/1.1\r\nHost: a\r\n\r\n", get(b"/next"))
            answer = await wire.answer(to_head=True)
            assert answer.headers["content-length"] == "2"
            assert (await wire.answer()).body == b"/next"

    async def test_a_trailer_says_nothing(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(chunked(b"x", trailers=b"X-Hub-Signature-256: late\r\nHost: other\r\n"))
            assert (await wire.answer()).status == 200
            (request,) = edge.taker.seen
            assert b"x-hub-signature-256" not in request.headers
            assert request.headers[b"host"] == b"here"

    @each("sizes", [[1] * 5_000, [70_000] * 3, [2] * 1_023, [2] * 1_025])
    async def test_a_body_is_put_together_again(self, sizes: list[int]) -> None:
        rng = random.Random(1)
        pieces = [rng.randbytes(size) for size in sizes]
        async with listening() as edge, edge.connect() as wire:
            await wire.send(chunked(*pieces))
            assert (await wire.answer()).status == 200
            assert edge.taker.seen[0].body == b"".join(pieces)
            assert type(edge.taker.seen[0].body) is bytes

    async def test_serve_before_bind(self) -> None:
        with pytest.raises(RuntimeError):
            await Listener(LimitsConfig()).serve(lambda request, respond: None)


class TestOrder:
    async def test_pipelined_requests_are_answered_in_order(self) -> None:
        paths = [b"/%d" % number for number in range(20)]
        async with listening() as edge, edge.connect() as wire:
            await wire.send(*(post(path=path) for path in paths))
            assert [(await wire.answer()).body for _ in paths] == paths

    @each("seed", range(8))
    async def test_also_when_their_flushes_end_out_of_order(self, seed: int) -> None:
        rng = random.Random(seed)
        async with listening() as edge, edge.connect() as wire:
            edge.taker.hold = True
            for burst in range(3):
                count = rng.randint(2, 30)
                await wire.send(*(post(b"x" * rng.randint(0, 900)) for _ in range(count)))
                await until(lambda count=count: len(edge.taker.held) == count)
                order = list(enumerate(edge.taker.held))
                rng.shuffle(order)
                for number, respond in order:
                    respond(response(b"%d.%d" % (burst, number)))
                    if rng.random() < 0.3:
                        await trio.lowlevel.checkpoint()
                edge.taker.held.clear()
                answers = [(await wire.answer()).body for _ in range(count)]
                assert answers == [b"%d.%d" % (burst, number) for number in range(count)]

    async def test_an_answer_waits_for_the_one_before_it(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            edge.taker.hold = True
            await wire.send(get(), get())
            await edge.seen(2)
            edge.taker.held[1](response(b"second"))
            with trio.move_on_after(0.05) as waited:
                await wire.stream.receive_some(1)
            assert waited.cancelled_caught
            edge.taker.held[0](response(b"first"))
            assert [(await wire.answer()).body for _ in range(2)] == [b"first", b"second"]

    async def test_reading_stops_at_32_that_wait(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            edge.taker.hold = True
            for _ in range(32):
                await wire.send(get())
            await edge.seen(32)
            await wire.send(get(b"/later"))
            await settled()
            assert len(edge.taker.seen) == 32
            edge.taker.held[0](response())
            await edge.seen(33)
            assert edge.taker.paths[-1] == b"/later"

    async def test_hundreds_at_once_are_all_answered(self) -> None:
        async with listening() as edge, edge.connect() as wire, trio.open_nursery() as nursery:
            nursery.start_soon(wire.send, b"".join(post(b"x" * 50, path=b"/%d" % n) for n in range(900)))
            assert [(await wire.answer()).body for _ in range(900)] == [b"/%d" % n for n in range(900)]

    async def test_a_head_that_shares_its_read_with_bodies_before_it_is_not_too_large(self) -> None:
        async with listening(header_max_bytes=500) as edge, edge.connect() as wire:
            split = post(path=b"/split")
            await wire.send(post(b"x" * 20_000), split[:30])
            assert (await wire.answer()).status == 200
            await wire.send(split[30:])
            assert (await wire.answer()).body == b"/split"

    async def test_a_second_answer_to_one_request_is_dropped(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            edge.taker.hold = True
            await wire.send(get())
            await edge.seen(1)
            edge.taker.held[0](response(b"first"))
            edge.taker.held[0](response(b"again"))
            assert (await wire.answer()).body == b"first"
            await wire.send(get())
            await edge.seen(2)
            edge.taker.held[0](response(b"again"))
            edge.taker.held[1](response(b"second"))
            assert (await wire.answer()).body == b"second"


class TestTheEndOfAConnection:
    @pytest.mark.parametrize(
        "last",
        [get(b"/", b"Connection: close"), b"GET / HTTP/1.0\r\n\r\n"],
        ids=["Connection: close", "HTTP/1.0"],
    )
    async def test_the_last_request(self, last: bytes) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(last)
            answer = await wire.answer()
            assert answer.status == 200
            assert answer.closes
            await wire.ended()
            await wire.stream.aclose()
            await until(lambda: edge.listener.statistics.connections == 0)

    async def test_nothing_after_the_last_request_is_taken(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            edge.taker.hold = True
            await wire.send(get(b"/1"), get(b"/2", b"Connection: close"), post(path=b"/3"))
            await edge.seen(2)
            await wire.send(post(path=b"/4"))
            await settled()
            edge.taker.held[1](response(b"2"))
            edge.taker.held[0](response(b"1"))
            assert [(await wire.answer()).body for _ in range(2)] == [b"1", b"2"]
            await wire.ended()
            assert edge.taker.paths == [b"/1", b"/2"]

    async def test_keep_alive_in_http_1_0(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            for _ in range(2):
                await wire.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
                assert (await wire.answer()).status == 200

    async def test_many_requests_on_one_connection(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            for _ in range(300):
                await wire.send(post())
                assert (await wire.answer()).status == 200
            assert edge.listener.statistics.accepted == 1
            assert edge.listener.statistics.requests == 300

    async def test_a_sender_that_has_sent_all_it_wants_still_gets_its_answers(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            edge.taker.hold = True
            await wire.send(get(), get())
            await wire.stream.send_eof()
            await edge.seen(2)
            await settled()
            for respond in edge.taker.held:
                respond(response())
                assert (await wire.answer()).status == 200
            await wire.ended()

    @pytest.mark.parametrize("reset", [False, True])
    async def test_a_sender_that_leaves_before_its_answers(self, reset: bool) -> None:
        async with listening() as edge:
            edge.taker.hold = True
            async with edge.connect() as wire:
                await wire.send(post(b"x" * 1000), post(b"y" * 1000), post()[:-1])
                await edge.seen(2)
                assert edge.in_flight == 2005
                if reset:
                    _reset_on_close(wire.stream)
            if reset:
                await until(lambda: edge.listener.statistics.connections == 0)
                assert edge.in_flight == 0
            for respond in edge.taker.held:
                respond(response())
            await until(lambda: edge.listener.statistics.connections == 0)
            assert edge.in_flight == 0
            edge.taker.hold = False
            await edge.is_alive()

    async def test_a_sender_that_leaves_while_its_pipeline_is_being_answered(self) -> None:
        """Answering the first of one read finds the connection dead; the others are no leak."""
        async with listening() as edge, edge.connect() as wire:

            def leave(request: Request, respond: Respond) -> None:
                connection = next(iter(edge.listener._connections.values()), None)
                if connection is not None:
                    connection.close()
                respond(response())

            edge.listener._accept = leave
            await wire.send(*[post(b"x" * 500)] * 5, post(b"x" * 900)[:-1])
            await wire.gone()
            assert edge.in_flight == 0

    async def test_an_exception_in_accept_ends_only_its_connection(self) -> None:
        async with listening(failed=1) as edge, edge.connect() as other, edge.connect() as wire:
            await other.send(post()[:-2])
            edge.taker.crash = True
            await wire.send(post(b"boom"))
            await wire.gone()
            edge.taker.crash = False
            assert edge.in_flight == 5
            await other.send(post()[-2:])
            assert (await other.answer()).status == 200
            await edge.is_alive()


def _reset_on_close(stream: trio.SocketStream) -> None:
    stream.setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # SOL_SOCKET, SO_LINGER: on, 0 s
