"""The load generator on stub servers: its two loops, what it counts, and that a stall cannot hide."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.load import Generator, LoadSpec, ProtocolError, answer_status, build_requests, run_load

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n" + b'{"status":"accepted"}'
BUSY = b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n"
CLOSING = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

Answer = Callable[[int], bytes | None]


@contextmanager
def stub_server(answer: Answer) -> Iterator[int]:
    """A port that answers request number `n`, over all connections, with `answer(n)`; None hangs up."""
    lock, numbers = threading.Lock(), iter(range(1_000_000))
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            while connection.recv(65_536):
                with lock:
                    reply = answer(next(numbers))
                if reply is None:
                    return
                connection.sendall(reply)
                if reply is CLOSING:
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(connection,), daemon=True))
            threads[-1].start()

    threads: list[threading.Thread] = []
    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield listener.getsockname()[1]
    finally:
        # A thread that waits in accept is not woken by close.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join(5)
        for thread in threads:
            thread.join(5)


def spec(port: int, **changes: object) -> LoadSpec:
    settings = {"port": port, "secret": "s", "connections": 2, "seconds": 5.0, "requests": 50, "senders": 10}
    return LoadSpec(**{**settings, **changes})  # type: ignore[arg-type]


def load(port: int, **changes: object):
    chosen = spec(port, **changes)
    return run_load(chosen, build_requests(chosen))


def test_closed_loop_stops_at_the_count():
    with stub_server(lambda n: OK) as port:
        result = load(port)
    assert (result.sent, result.ok, result.failed, result.unanswered) == (50, 50, 0, 0)
    assert result.ended_by == "count"
    assert 0 < result.latency_ms["p50"] <= result.latency_ms["p99.9"] <= result.latency_ms["max"]


def test_closed_loop_stops_at_the_time_and_reads_what_is_outstanding():
    with stub_server(lambda n: OK) as port:
        result = load(port, seconds=0.05, requests=10_000)
    assert result.ended_by == "time"
    assert result.ok == result.sent < 10_000


def test_answers_other_than_200_are_counted_apart():
    with stub_server(lambda n: BUSY if n % 5 == 0 else OK) as port:
        result = load(port)
    assert (result.ok, result.failed) == (40, 10)
    assert result.statuses == {"200": 40, "503": 10}


def test_closed_connections_are_opened_again():
    with stub_server(lambda n: CLOSING if n % 10 == 0 else OK) as port:
        result = load(port)
    assert (result.ok, result.failed, result.reconnects) == (50, 0, 5)


def test_a_request_that_gets_a_hang_up_has_failed():
    with stub_server(lambda n: None if n == 7 else OK) as port:
        result = load(port)
    assert (result.ok, result.failed, result.unanswered) == (49, 1, 0)


@pytest.mark.parametrize("mode", ["closed", "open"])
def test_a_request_without_answer_counts_with_the_wait_it_had(mode):
    released = threading.Event()

    def hold_the_last(number: int) -> bytes:
        if number == 9:
            released.wait(5)
        return OK

    with stub_server(hold_the_last) as port:
        chosen = spec(port, mode=mode, rate=1_000.0, requests=10, seconds=0.05, drain_seconds=0.1)
        result = run_load(chosen, build_requests(chosen))
        released.set()
    assert (result.ok, result.unanswered) == (9, 1)
    assert result.latency_ms["max"] >= 90


def test_open_loop_keeps_its_schedule():
    with stub_server(lambda n: OK) as port:
        result = load(port, mode="open", rate=400.0, seconds=0.1, requests=1_000)
    assert result.sent == result.ok == 40
    assert 0.09 < result.seconds < 1.0


def test_a_stall_shows_in_every_request_that_was_due_meanwhile():
    stall_seconds, rate = 0.15, 500.0
    nothing = threading.Event()

    def stall_once(number: int) -> bytes:
        if number == 25:
            nothing.wait(stall_seconds)
        return OK

    with stub_server(stall_once) as port:
        chosen = spec(port, mode="open", rate=rate, seconds=0.25, requests=125)
        requests = build_requests(chosen)
        generator = Generator(("127.0.0.1", port), 2, requests)
        generator.open_loop(rate, 0.25, 5.0)
        generator.close()
    # Two connections: a clock started at the send would have shown the stall in two requests only.
    slow = [latency for latency in generator.latencies if latency > stall_seconds / 2]
    assert len(generator.latencies) == 125
    assert len(slow) >= 0.8 * rate * stall_seconds / 2
    assert generator.queued >= 0.8 * rate * stall_seconds
    assert max(slow) >= stall_seconds * 0.9


def test_answer_status_waits_for_the_whole_answer():
    assert answer_status(OK[:30]) is None
    assert answer_status(OK[:-1]) is None
    assert answer_status(OK) == ("200", False)
    assert answer_status(CLOSING) == ("200", True)


@pytest.mark.parametrize("data", [OK + b"x", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"])
def test_answers_that_the_generator_does_not_read(data):
    with pytest.raises(ProtocolError):
        answer_status(data)


def test_the_command_waits_for_go_and_prints_one_result():
    with stub_server(lambda n: OK) as port:
        text = json.dumps(
            {"port": port, "secret": "s", "requests": 20, "connections": 4, "wait_for_go": True}
        )
        command = [sys.executable, "-m", "bench.load", "--spec", text]
        done = subprocess.run(command, input="go\n", capture_output=True, text=True, timeout=20, check=True)
    built, result = done.stdout.splitlines()
    assert built == "built"
    assert json.loads(result)["ok"] == 20
