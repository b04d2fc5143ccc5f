"""How much and for how long: sizes, deadlines, connections and body bytes in flight."""

from __future__ import annotations

import os
import resource
from unittest import mock

import pytest
import trio
from wire import GONE, Wire, chunked, connected, get, listening, post, response, settled, until

from actors.kernel import Address
from actors.messages import Delivery
from router import accept as accepting
from router.accept import Webhooks
from router.config import AppConfig
from router.simulator import signature


class TestHeads:
    @pytest.mark.parametrize("extra", [0, 1])
    async def test_the_limit_is_exact(self, extra: int) -> None:
        async with listening(header_max_bytes=2_000) as edge, edge.connect() as wire:
            used = len(b"/" + b"HostX-A") + len(b"here") + 2 * 4
            await wire.send(get(b"/", b"X-A: " + b"a" * (2_000 - used + extra)))
            answer = await wire.answer()
            assert answer.status == (431 if extra else 200)
            assert len(edge.taker.seen) == (0 if extra else 1)

    @pytest.mark.parametrize(
        "head",
        [
            b"GET /" + b"a" * 40_000,
            b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 40_000,
            b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(3_000)),
            b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a" * 40_000,
        ],
        ids=["path", "value", "fields", "name"],
    )
    async def test_a_head_without_end(self, head: bytes) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(head)
            answer = await wire.answer()
            assert (answer.status, answer.closes) == (431, True)
            await wire.ended()

    @pytest.mark.parametrize(("count", "status"), [(99, 200), (100, 431)])
    async def test_too_many_headers(self, count: int, status: int) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(get(b"/", *(b"X-%d: y" % number for number in range(count))))
            answer = await wire.answer()
            assert answer.status == status
            assert b"too_many_headers" in answer.body or status == 200

    @pytest.mark.parametrize(
        "endless", [b"X-Trailer: " + b"t" * 200_000, b"5;" + b"x" * 200_000], ids=["trailer", "extension"]
    )
    async def test_chunks_do_not_get_around_it(self, endless: bytes) -> None:
        async with listening() as edge, edge.connect() as wire, trio.open_nursery() as nursery:
            last = b"" if endless[0:1] == b"5" else b"0\r\n"
            nursery.start_soon(_send_what_is_taken, wire, chunked(b"x")[:-5] + last + endless)
            assert (await wire.answer()).status == 431
            assert edge.taker.seen == []


class TestBodies:
    async def test_too_large_by_content_length_is_refused_unread(self) -> None:
        async with listening(body_max_bytes=1_000) as edge, edge.connect() as wire:
            await wire.send(post(b"", length=b"1001"))
            answer = await wire.answer()
            assert (answer.status, answer.closes) == (413, True)
            assert answer.body == b'{"error":"body_too_large","detail":"at most 1000 bytes"}'
            await wire.ended()
            assert edge.taker.seen == []

    @pytest.mark.parametrize("extra", [0, 1])
    async def test_the_limit_is_exact(self, extra: int) -> None:
        async with listening(body_max_bytes=1_000) as edge, edge.connect() as wire:
            for data in (chunked(*[b"a" * 100] * 10, b"b" * extra), post(b"a" * (1_000 + extra))):
                await wire.send(data if extra else data.replace(b"0\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"))
                assert (await wire.answer()).status == (413 if extra else 200)
                if extra:
                    break

    async def test_the_sender_of_a_large_body_sees_the_answer(self) -> None:
        """It is still writing when it is refused; a reset would take the answer away."""
        async with listening(body_max_bytes=1_000) as edge:
            for data in (post(b"x" * 3_000_000), chunked(*[b"x" * 30_000] * 100)):
                async with edge.connect() as wire:
                    await wire.send(data)  # all of it: it is read on
                    assert (await wire.answer()).status == 413
                    await wire.ended()
            assert edge.taker.seen == []

    async def test_what_was_reserved_for_a_refused_body_is_given_back(self) -> None:
        async with listening(body_max_bytes=1_000) as edge, edge.connect() as wire:
            await wire.send(chunked(b"x" * 600, b"x" * 600))
            assert (await wire.answer()).status == 413
            await wire.stream.aclose()
            await until(lambda: edge.in_flight == 0)


class TestExpectations:
    EXPECT = b"Expect: 100-continue"

    async def test_continue_is_said_before_the_body(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            for body in (b"hello", b"again"):
                await wire.send(post(b"", self.EXPECT, length=b"5"))
                assert (await wire.answer()).status == 100
                assert len(edge.taker.seen) == (0 if body == b"hello" else 1)
                await wire.send(body)
                assert (await wire.answer()).status == 200
                assert edge.taker.seen[-1].body == body

    async def test_it_is_not_said_to_who_does_not_wait(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(post(b"hello", self.EXPECT), post(b"", self.EXPECT))
            assert [(await wire.answer()).status for _ in range(2)] == [200, 200]
            await wire.send(b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n")
            await settled()
            await wire.send(b"x")
            assert (await wire.answer()).status == 200

    async def test_it_waits_for_the_answers_before_it(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            edge.taker.hold = True
            await wire.send(get(b"/1"), get(b"/2"), post(b"", self.EXPECT, length=b"5"))
            await edge.seen(2)
            await settled()
            edge.taker.held[1](response(b"2"))
            edge.taker.held[0](response(b"1"))
            assert [(await wire.answer()).body for _ in range(2)] == [b"1", b"2"]
            assert (await wire.answer()).status == 100
            await wire.send(b"hello")
            await edge.seen(3)

    async def test_too_large_is_refused_without_it(self) -> None:
        async with listening(body_max_bytes=10) as edge, edge.connect() as wire:
            await wire.send(post(b"", self.EXPECT, length=b"11"))
            assert (await wire.answer()).status == 413
            await wire.ended()

    async def test_other_expectations_fail(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(post(b"", b"Expect: a-miracle", length=b"5"))
            answer = await wire.answer()
            assert (answer.status, answer.closes) == (417, True)
            assert edge.taker.seen == []


class TestDeadlines:
    @pytest.mark.parametrize(
        "half",
        [b"POST / HTT", get()[:-2], post()[:-1], chunked(b"hello")[:-3], post(b"", length=b"5")],
        ids=["request line", "head", "body", "last chunk", "no body"],
    )
    async def test_a_slow_request(self, half: bytes) -> None:
        async with listening(read_timeout_ms=40) as edge, edge.connect() as wire:
            await wire.send(half)
            answer = await wire.answer()
            assert (answer.status, answer.closes) == (408, True)
            await wire.ended()
            assert edge.in_flight == 0
            assert edge.listener.statistics.timed_out == 1

    async def test_it_is_for_the_whole_request_not_for_each_read(self) -> None:
        async with listening(read_timeout_ms=80) as edge, edge.connect() as wire:
            started = trio.current_time()
            await wire.send(b"GET /")
            with pytest.raises(GONE):  # noqa: PT012
                for _ in range(1_000):
                    await wire.send(b"x")
                    await trio.sleep(0.01)
            assert trio.current_time() - started < 5
            assert edge.taker.seen == []

    async def test_idle(self) -> None:
        async with listening(idle_timeout_ms=40) as edge:
            async with edge.connect() as fresh, edge.connect() as used:
                await used.send(get())
                await used.answer()
                await fresh.ended()
                await used.ended()
            assert edge.listener.statistics.timed_out == 2

    async def test_empty_lines_are_idle(self) -> None:
        async with listening(idle_timeout_ms=40) as edge, edge.connect() as wire, trio.open_nursery() as n:
            n.start_soon(_send_what_is_taken, wire, *[b"\r\n"] * 100)
            await wire.gone()

    async def test_an_answer_that_takes_long_is_neither(self) -> None:
        async with listening(idle_timeout_ms=40, read_timeout_ms=40) as edge, edge.connect() as wire:
            edge.taker.hold = True
            await wire.send(get())
            await edge.seen(1)
            await trio.sleep(0.1)
            edge.taker.held.pop()(response())
            assert (await wire.answer()).status == 200

    async def test_a_refusal_that_waits_for_slow_answers_is_neither(self) -> None:
        async with listening(idle_timeout_ms=40, read_timeout_ms=40) as edge, edge.connect() as wire:
            edge.taker.hold = True
            await wire.send(get(), get()[:-2] + b"Host: again\r\n\r\n")
            await edge.seen(1)
            await trio.sleep(0.1)
            edge.taker.held.pop()(response())
            assert [(await wire.answer()).status for _ in range(2)] == [200, 400]

    async def test_a_sender_that_never_reads(self) -> None:
        async with listening(write_timeout_ms=100) as edge, edge.connect(receive_buffer=4_096) as wire:
            edge.taker.body = b"x" * 20_000_000
            await wire.send(get())
            await until(lambda: edge.listener.statistics.timed_out == 1)
            assert edge.listener.statistics.connections == 0
            await wire.gone()

    async def test_a_sender_that_never_reads_but_goes_on_asking(self) -> None:
        async with listening(write_timeout_ms=100) as edge, edge.connect(receive_buffer=4_096) as wire:
            edge.taker.body = b"x" * 400_000
            with trio.move_on_after(10) as asking, pytest.raises(GONE):  # noqa: PT012
                while True:
                    await wire.send(get())
                    await trio.sleep(0.001)
            assert not asking.cancelled_caught, "it could ask forever"
            assert len(edge.taker.seen) < 100  # answers that nobody reads are not collected
            assert edge.listener.statistics.timed_out == 1

    async def test_a_sender_that_reads_slowly_gets_all_of_it(self) -> None:
        async with listening(write_timeout_ms=200) as edge, edge.connect() as wire:
            edge.taker.body = bytes(12_000_000)
            await wire.send(get(), post()[:-1])
            for _ in range(8):
                await trio.sleep(0.035)
                wire.received += await wire.stream.receive_some(1_000_000)
            assert len((await wire.answer()).body) == 12_000_000
            edge.taker.body = None
            await wire.send(b"o", get(b"/next"))
            assert [(await wire.answer()).body for _ in range(2)] == [b"/", b"/next"]


class TestConnections:
    async def test_the_cap(self) -> None:
        async with listening(max_connections=2) as edge:
            async with edge.connect() as one, edge.connect() as two:
                for wire in (one, two):
                    await wire.send(get())
                    assert (await wire.answer()).status == 200
                async with edge.connect() as three:
                    answer = await three.answer()
                    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
                    await three.ended()
                await one.send(get())
                assert (await one.answer()).status == 200
                assert edge.listener.statistics.refused == 1
            await until(lambda: edge.listener.statistics.connections == 0)
            await edge.is_alive()

    async def test_without_file_descriptors_new_ones_wait_and_others_go_on(self) -> None:
        async with listening() as edge, edge.connect() as wire:
            await wire.send(get())
            await wire.answer()
            late = trio.socket.socket()
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (_next_fd(), limit[1]))
            try:
                await late.connect(("127.0.0.1", edge.port))
                await settled()
                started = trio.current_time()
                for _ in range(100):
                    await wire.send(get())
                    assert (await wire.answer()).status == 200
                assert trio.current_time() - started < 1.5
                assert edge.listener.statistics.accepted == 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            async with trio.SocketStream(late) as stream:
                waiting = Wire(stream)
                await waiting.send(get())
                assert (await waiting.answer()).status == 200


class TestBodyBytesInFlight:
    async def test_the_cap_holds_for_bodies_that_come_at_once(self) -> None:
        cap, size = 1_000_000, 400_000
        peak = 0
        async with listening(body_bytes_in_flight=cap, body_max_bytes=size) as edge:

            async def sender() -> None:
                nonlocal peak
                async with connected(edge.port) as wire:
                    await wire.send(post(b"x" * size)[:1_000])
                    await settled()
                    peak = max(peak, edge.in_flight)
                    await wire.send(post(b"x" * size)[1_000:])
                    assert (await wire.answer()).status == 200

            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(sender)
            assert len(edge.taker.seen) == 8
            assert 0 < peak <= cap

    async def test_reading_pauses_until_there_is_room(self) -> None:
        async with (
            listening(body_bytes_in_flight=1_000, body_max_bytes=1_000, read_timeout_ms=60) as edge,
            edge.connect() as first,
            edge.connect() as second,
        ):
            edge.taker.hold = True
            await first.send(post(b"x" * 900))
            await edge.seen(1)
            await second.send(post(b"", b"Expect: 100-continue", length=b"900"))
            with trio.move_on_after(0.12) as waited:  # longer than its read deadline: it is ours to wait
                await second.stream.receive_some(1)
            assert waited.cancelled_caught
            assert edge.in_flight == 900
            edge.taker.held.pop()(response())
            assert (await first.answer()).status == 200
            assert (await second.answer()).status == 100
            assert edge.in_flight == 900
            await second.send(b"y" * 900)
            await edge.seen(2)
            edge.taker.held.pop()(response())
            assert (await second.answer()).status == 200

    async def test_who_waits_for_room_may_leave(self) -> None:
        async with listening(body_bytes_in_flight=1_000, body_max_bytes=1_000) as edge:
            edge.taker.hold = True
            async with edge.connect() as first:
                await first.send(post(b"x" * 900))
                await edge.seen(1)
                async with edge.connect() as second:
                    await second.send(post(b"", length=b"900"))
                    await settled()
                async with edge.connect() as third:
                    await third.send(post(b"", length=b"800"))
                    await settled()
                    edge.taker.held.pop()(response())
                    assert (await first.answer()).status == 200
                    await third.send(b"z" * 800)
                    await edge.seen(2)
                    edge.taker.held.pop()(response())
                    assert (await third.answer()).status == 200

    async def test_half_sent_bodies_are_no_deadlock(self) -> None:
        async with listening(body_bytes_in_flight=5_000, body_max_bytes=1_000) as edge:
            gate = trio.Event()

            async def sender(number: int) -> None:
                data = (chunked if number % 2 else post)(b"x" * 1_000)
                async with connected(edge.port) as wire:
                    await wire.send(data[: 100 + number])
                    if number == 29:
                        await settled()
                        assert edge.in_flight <= 5_000
                        gate.set()
                    await gate.wait()
                    await wire.send(data[100 + number :], get(b"/next"))
                    assert [(await wire.answer()).status for _ in range(2)] == [200, 200]

            async with trio.open_nursery() as nursery:
                for number in range(30):
                    nursery.start_soon(sender, number)
            assert len(edge.taker.seen) == 60

    async def test_small_bodies_that_wait_for_their_flush_count(self) -> None:
        async with listening(body_bytes_in_flight=1_500, body_max_bytes=1_000) as edge:
            edge.taker.hold = True
            async with edge.connect() as wire:
                for _ in range(3):
                    await wire.send(post(b"x" * 1_000))
                    await settled()
                assert len(edge.taker.seen) == 2
                edge.taker.held[0](response())
                await edge.seen(3)


class TestAFullIngress:
    APPS = (AppConfig(secret="s", verify_token="v"),)

    def signed(self, number: int) -> bytes:
        body = b'{"number":%d}' % number
        return post(
            body, b"X-Hub-Signature-256: " + signature("s", body).encode(), path=b"/webhooks/whatsapp"
        )

    async def test_it_is_waited_for_in_the_order_of_arrival(self) -> None:
        ingress: Address[Delivery] = Address("ingress", 1)
        webhooks = Webhooks(self.APPS, ingress, dedup_key=lambda: b"k")
        async with listening(webhooks.accept_nowait) as edge, edge.connect() as wire:
            await wire.send(*(self.signed(number) for number in range(5)))
            taken: list[bytes] = []
            while len(taken) < 5:
                with trio.fail_after(5):
                    for delivery in await ingress.mailbox.drain():
                        taken.append(delivery.body)
                        delivery.settle(True)
            assert taken == [b'{"number":%d}' % number for number in range(5)]
            assert [(await wire.answer()).status for _ in range(5)] == [200] * 5

    async def test_nobody_waits_longer_than_the_one_before(self) -> None:
        ingress: Address[Delivery] = Address("ingress", 1)
        webhooks = Webhooks(self.APPS, ingress, dedup_key=lambda: b"k")
        with mock.patch.object(accepting, "ROOM_TIMEOUT", 0.05):
            async with listening(webhooks.accept_nowait) as edge, edge.connect() as wire:
                started = trio.current_time()
                await wire.send(*(self.signed(number) for number in range(21)))
                await until(lambda: ingress.mailbox.statistics().waiting == 1)
                await until(lambda: edge.listener.statistics.requests == 21)
                await trio.sleep(0.1)
                ingress.mailbox.drain_nowait()[0].settle(True)
                statuses = [(await wire.answer()).status for _ in range(21)]
                assert statuses == [200] + [503] * 20
                assert trio.current_time() - started < 2.5


async def _send_what_is_taken(wire: Wire, *parts: bytes) -> None:
    try:
        for part in parts:
            await wire.send(part)
            await trio.sleep(0.005)
    except GONE:
        pass


def _next_fd() -> int:
    """The next file descriptor that would be opened."""
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    return read
