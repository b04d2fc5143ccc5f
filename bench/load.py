"""The load generator, one separate process: `python -m bench.load --spec JSON`, the result as JSON.

Raw non-blocking sockets and epoll, all requests built before the clock starts; knows nothing of targets.
"""

import gc
import json
import resource
import select
import socket
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import click

from bench.payloads import DEFAULT_TEXTS, WEBHOOK_PATH, Population, new_run_tag, request_bytes
from bench.verdicts import latency_summary

_RECEIVE = 65_536


@dataclass(frozen=True)
class LoadSpec:
    """What one run does; times in seconds, `rate` in requests per second (open loop only)."""

    port: int
    secret: str
    mode: Literal["closed", "open"] = "closed"
    host: str = "127.0.0.1"
    path: str = WEBHOOK_PATH
    connections: int = 32
    seconds: float = 8.0
    requests: int = 10_000
    rate: float = 0.0
    drain_seconds: float = 10.0
    senders: int = 1_000
    texts: Sequence[str] = DEFAULT_TEXTS
    tag: str = ""
    wait_for_go: bool = False


@dataclass(frozen=True)
class LoadResult:
    """What the generator saw. `failed` counts answers other than 200 and connections that broke;
    `unanswered` counts requests that were due and got no answer before the drain ended."""

    mode: str
    connections: int
    sent: int
    ok: int
    failed: int
    unanswered: int
    statuses: dict[str, int]
    reconnects: int
    queued: int
    seconds: float
    ended_by: Literal["time", "count"]
    cpu_seconds: float
    cpu_us_per_request: float
    latency_ms: dict[str, float]

    @property
    def rate(self) -> float:
        return self.ok / self.seconds if self.seconds > 0 else 0.0


class ProtocolError(Exception):
    """The target answered with something that the generator does not read, a chunked body for instance."""


class _Connection:
    """One keep-alive connection with at most one request outstanding."""

    __slots__ = ("address", "buffer", "since", "sock")

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.open()

    def open(self) -> None:
        self.sock = socket.create_connection(self.address, timeout=5)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.buffer = b""
        self.since = 0.0

    def send(self, request: bytes, since: float) -> None:
        self.since = since
        # With one request outstanding the send buffer is empty, so a short write is not backpressure.
        if self.sock.send(request) != len(request):
            raise ProtocolError("short write on an idle connection")


def answer_status(data: bytes) -> tuple[str, bool] | None:
    """Status code and whether the server closes, once `data` holds one whole answer; None before."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end].lower()
    at = head.find(b"\r\ncontent-length:")
    if at < 0:
        raise ProtocolError(f"answer without Content-Length: {data[:80]!r}")
    stop = head.find(b"\r\n", at + 17)
    length = int(head[at + 17 : stop if stop > 0 else end])
    if len(data) < end + 4 + length:
        return None
    if len(data) > end + 4 + length:
        raise ProtocolError("bytes after the answer")
    return data[9:12].decode(), b"\r\nconnection: close" in head


class Generator:
    """Sends prepared requests over its connections in one of two loops."""

    def __init__(self, address: tuple[str, int], connections: int, requests: Sequence[bytes]) -> None:
        self._requests = requests
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        for _ in range(connections):
            connection = _Connection(address)
            self._connections[connection.sock.fileno()] = connection
            self._epoll.register(connection.sock.fileno(), select.EPOLLIN)
        self.latencies: list[float] = []
        self.statuses: dict[str, int] = {}
        self.sent = self.ok = self.broken = self.reconnects = self.queued = 0
        self.started = self.ended = 0.0
        self.ended_by: Literal["time", "count"] = "time"

    def close(self) -> None:
        for connection in self._connections.values():
            connection.sock.close()
        self._epoll.close()

    def _send(self, connection: _Connection, since: float) -> None:
        """Sends the next request, on a new connection when the server has hung up on the idle one."""
        request = self._requests[self.sent]
        try:
            connection.send(request, since)
        except ConnectionError:
            self._reopen(connection)
            connection.send(request, since)
        self.sent += 1

    def closed_loop(self, seconds: float, drain_seconds: float) -> None:
        """Each connection sends its next request as soon as its answer is read."""
        total = len(self._requests)
        busy: set[_Connection] = set()
        self.started = perf_counter()
        deadline = self.started + seconds
        for connection in list(self._connections.values())[:total]:
            self._send(connection, perf_counter())
            busy.add(connection)
        while busy:
            events = self._epoll.poll(max(0.0, deadline + drain_seconds - perf_counter()))
            if not events:
                break
            for fd, _ in events:
                connection = self._connections[fd]
                now = perf_counter()
                if not self._answered(connection, now):
                    continue
                if now < deadline and self.sent < total:
                    self._send(connection, now)
                else:
                    busy.discard(connection)
        self.ended = perf_counter()
        self.ended_by = "count" if self.sent == total else "time"
        # A request that never came back still counts, with the wait that it had so far.
        self.latencies.extend(self.ended - connection.since for connection in busy)

    def open_loop(self, rate: float, seconds: float, drain_seconds: float) -> None:
        """Requests are due at a fixed rate, whatever the target does.

        A latency runs from the scheduled time, so the wait for a free connection is part of it: a
        target that stalls cannot thin out the schedule and hide its stall (coordinated omission).
        """
        total = min(len(self._requests), int(rate * seconds))
        free = deque(self._connections.values())
        queued_through = 0
        self.started = perf_counter()
        give_up = self.started + seconds + drain_seconds
        while True:
            now = perf_counter()
            due = min(total, int((now - self.started) * rate) + 1)
            while self.sent < due and free:
                self._send(free.popleft(), self.started + self.sent / rate)
            if self.sent < due:
                self.queued += due - max(self.sent, queued_through)
                queued_through = due
            if (self.sent == total and len(free) == len(self._connections)) or now >= give_up:
                break
            if self.sent == total or not free:
                wait = give_up - now
            else:
                wait = self.started + self.sent / rate - perf_counter()
            # epoll's own timeout is rounded up to a millisecond; select on the epoll descriptor is not.
            if wait > 0 and not select.select((self._epoll.fileno(),), (), (), wait)[0]:
                continue
            for fd, _ in self._epoll.poll(0):
                connection = self._connections[fd]
                if self._answered(connection, perf_counter()):
                    free.append(connection)
        self.ended = perf_counter()
        self.ended_by = "count" if total < int(rate * seconds) else "time"
        idle = set(free)
        outstanding = [c for c in self._connections.values() if c not in idle]
        self.latencies.extend(self.ended - connection.since for connection in outstanding)
        due = min(total, int((self.ended - self.started) * rate) + 1)
        self.latencies.extend(self.ended - (self.started + i / rate) for i in range(self.sent, due))

    def _answered(self, connection: _Connection, now: float) -> bool:
        """Reads what is there; True when the connection is free for another request."""
        try:
            data = connection.sock.recv(_RECEIVE)
        except BlockingIOError:
            return False
        except ConnectionError:
            data = b""
        if not data:
            # The server hung up on us: an outstanding request is lost, an idle connection is not news.
            if connection.since:
                self.broken += 1
                self.latencies.append(now - connection.since)
            outstanding = bool(connection.since)
            self._reopen(connection)
            return outstanding
        if connection.buffer:
            data = connection.buffer + data
        answer = answer_status(data)
        if answer is None:
            connection.buffer = data
            return False
        status, closes = answer
        if status == "200":
            self.ok += 1
        else:
            self.statuses[status] = self.statuses.get(status, 0) + 1
        self.latencies.append(now - connection.since)
        connection.buffer = b""
        connection.since = 0.0
        if closes:
            self._reopen(connection)
        return True

    def _reopen(self, connection: _Connection) -> None:
        del self._connections[connection.sock.fileno()]
        self._epoll.unregister(connection.sock.fileno())
        connection.sock.close()
        connection.open()
        self.reconnects += 1
        self._connections[connection.sock.fileno()] = connection
        self._epoll.register(connection.sock.fileno(), select.EPOLLIN)


def build_requests(spec: LoadSpec) -> list[bytes]:
    """All requests of a run, signed, with ids that no other run uses."""
    population = Population(spec.senders, spec.texts, spec.tag or new_run_tag())
    host = f"{spec.host}:{spec.port}"
    return [request_bytes(body, spec.secret, host, spec.path) for body in population.bodies(spec.requests)]


def run_load(spec: LoadSpec, requests: Sequence[bytes]) -> LoadResult:
    """Runs the loop that the spec names and sums up what happened."""
    generator = Generator((spec.host, spec.port), spec.connections, requests)
    gc.collect()
    gc.freeze()
    gc.disable()
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        if spec.mode == "closed":
            generator.closed_loop(spec.seconds, spec.drain_seconds)
        else:
            generator.open_loop(spec.rate, spec.seconds, spec.drain_seconds)
    finally:
        gc.enable()
        generator.close()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answered = generator.ok + sum(generator.statuses.values())
    return LoadResult(
        mode=spec.mode,
        connections=spec.connections,
        sent=generator.sent,
        ok=generator.ok,
        failed=sum(generator.statuses.values()) + generator.broken,
        unanswered=len(generator.latencies) - answered - generator.broken,
        statuses={"200": generator.ok, **generator.statuses},
        reconnects=generator.reconnects,
        queued=generator.queued,
        seconds=generator.ended - generator.started,
        ended_by=generator.ended_by,
        cpu_seconds=cpu,
        cpu_us_per_request=cpu * 1e6 / max(1, generator.sent),
        latency_ms=latency_summary(generator.latencies),
    )


@click.command()
@click.option("--spec", "spec_json", required=True, help="A LoadSpec as JSON, or @FILE.")
def main(spec_json: str) -> None:
    """Run one load and print its result as JSON.

    With `wait_for_go` it first prints "built" and waits for a line on stdin, so that the
    caller can read the target's CPU clocks at the start of the load and not of the signing.
    """
    if spec_json.startswith("@"):
        spec_json = Path(spec_json[1:]).read_text(encoding="utf-8")
    spec = LoadSpec(**json.loads(spec_json))
    requests = build_requests(spec)
    if spec.wait_for_go:
        print("built", flush=True)
        sys.stdin.readline()
    print(json.dumps(asdict(run_load(spec, requests))), flush=True)


if __name__ == "__main__":
    main()
