"""`python -m bench coldstart`: from process start to the first 200 on an existing data directory."""

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from bench.load import ProtocolError, answer_status
from bench.payloads import Population, request_bytes
from bench.processes import ProcessFailed, Server, free_port, processes_of
from bench.report import envelope, number, print_table, print_verdicts, verdict_rows, write_result
from bench.targets import ENV, READY, READY_SECONDS, ROUTER, SECRET, serve_argv
from bench.verdicts import Verdict, missed

DEFAULT_SLO_MS = 1_750.0
PREPARED_MESSAGES = 500
_POLL_SECONDS = 0.002
_GONE_SECONDS = 15


def slo_ms() -> float:
    return float(os.environ.get("WA_CORE_COLD_START_SLO_MS", DEFAULT_SLO_MS))


def post(port: int, request: bytes, seconds: float = 5.0) -> str:
    """Sends one request on its own connection; the status code of the answer.

    Raises:
        OSError: nobody listens, or the connection broke; also when it was closed before a whole answer.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as sock:
        sock.sendall(request)
        data = b""
        while (answer := answer_status(data)) is None:
            received = sock.recv(65_536)
            if not received:
                raise ConnectionResetError("closed before the answer")
            data += received
    return answer[0]


def requests_for(port: int) -> Iterator[bytes]:
    """Signed webhooks without end, each with a new id."""
    population = Population()
    for index in count():
        yield request_bytes(population.bodies(1, index)[0], SECRET, f"127.0.0.1:{port}")


def start_server(home: Path, port: int) -> Server:
    argv = [argument.format(data=home / "data", files=home) for argument in serve_argv(port)]
    return Server([sys.executable, "-m", ROUTER.module, *argv], ENV, home / "server.log")


def wait_all_gone(home: Path) -> None:
    """Waits until no process of the server is left, its Postgres included."""
    deadline = time.monotonic() + _GONE_SECONDS
    while alive := processes_of(home):
        if time.monotonic() > deadline:
            raise ProcessFailed(f"still alive after the stop: {alive}")
        time.sleep(0.05)


def first_answer(server: Server, port: int, started: float) -> dict[str, float]:
    """Asks until the first 200; milliseconds from `started` to the first connection and to that answer."""
    connected: float | None = None
    requests = requests_for(port)
    for request in requests:
        if server.ended():
            raise ProcessFailed(f"ended before its first 200:\n{server.log_tail()}")
        if time.perf_counter() - started > READY_SECONDS:
            raise ProcessFailed(f"no 200 in {READY_SECONDS} s:\n{server.log_tail()}")
        with suppress(OSError, ProtocolError):
            status = post(port, request)
            now = time.perf_counter()
            connected = connected or now
            if status == "200":
                return {"first_answer_ms": (connected - started) * 1e3, "first_200_ms": (now - started) * 1e3}
        time.sleep(_POLL_SECONDS)
    raise AssertionError("unreachable: the requests do not end")


def prepare(home: Path) -> None:
    """Makes the data directory: migrated, with some messages in it, stopped cleanly."""
    (home / "postroom.toml").write_text(ROUTER.files["postroom.toml"], encoding="utf-8")
    port = free_port()
    server = start_server(home, port)
    try:
        server.wait_ready(READY, READY_SECONDS)
        requests = requests_for(port)
        statuses = [post(port, next(requests)) for _ in range(PREPARED_MESSAGES)]
    finally:
        code = server.stop()
    if code != 0 or set(statuses) != {"200"}:
        raise ProcessFailed(f"preparing: exit {code}, answers {sorted(set(statuses))}\n{server.log_tail()}")


def cold_round(home: Path) -> dict[str, float]:
    """One start from nothing alive to the first 200, and the stop after it."""
    wait_all_gone(home)
    port = free_port()
    started = time.perf_counter()
    server = start_server(home, port)
    try:
        return first_answer(server, port, started)
    finally:
        server.stop()


def run(rounds: int, json_path: Path | None) -> int:
    """The whole benchmark; the exit code, 1 when the median misses its limit."""
    head = envelope(
        "coldstart", {"rounds": rounds, "slo_ms": slo_ms(), "prepared_messages": PREPARED_MESSAGES}
    )
    # Postgres runs as another user when we are root, and must be able to pass through.
    home = Path(tempfile.mkdtemp(prefix="postroom-bench-", dir="/tmp"))
    home.chmod(0o755)
    try:
        prepare(home)
        measured: list[dict[str, Any]] = [{"number": n, **cold_round(home)} for n in range(1, rounds + 1)]
        wait_all_gone(home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    middle = median(r["first_200_ms"] for r in measured)
    verdict = Verdict(
        "process start to first 200, median", middle, slo_ms(), at_least=False, required=True, unit="ms"
    )
    print_table(
        "Cold start on an existing data directory",
        ("round", "first answer ms", "first 200 ms"),
        [(str(r["number"]), number(r["first_answer_ms"]), number(r["first_200_ms"])) for r in measured],
    )
    print_verdicts([verdict])
    failures = missed([verdict])
    body = {
        **head,
        "median_ms": middle,
        "verdicts": verdict_rows([verdict]),
        "passed": not failures,
        "rounds": measured,
    }
    print(f"result: {write_result(body, json_path)}")
    return 1 if failures else 0
